package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/enroll"
	"mandos-escrow/unlock"
)

// machineStatus is what this machine says of itself.
type machineStatus struct {
	enroll.State
	Images   []imageStatus `json:"images"`
	Unseen   string        `json:"images_not_looked_at,omitempty"` // why
	LastBoot *bootStatus   `json:"last_boot,omitempty"`
	unseen   error         // why, or nil
}

// imageStatus is one boot image.
type imageStatus struct {
	Kernel  string `json:"kernel"`
	Path    string `json:"path,omitempty"`
	Problem string `json:"problem,omitempty"`
	err     error
}

// bootStatus is what the boot program left of this boot.
type bootStatus struct {
	unlock.Boot
	Fault string `json:"fault,omitempty"`
}

func newStatus(g *globals) *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "say how this machine is enrolled, and what became of its last boot",
		Long: `Says with whom this machine is enrolled; of each volume, whether header and
keyslots are still those that were proved; whether its boot images hold what they
must (as root); and what became of the last boot. It changes nothing and asks no
server. "mandos-escrow doctor" says what to do about what is wrong;
"mandos-escrow server status" is about a server.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := inspectMachine(cmd.Context(), root)
			if err != nil {
				return fmt.Errorf("status: %w", err)
			}
			if g.json {
				return g.printJSON(s)
			}
			printMachineStatus(g, s)
			return nil
		},
	}
	cmd.Flags().StringVar(&root, "root", "/", "prefix of what enroll wrote")
	return g.withJSON(cmd)
}

// inspectMachine looks at everything, and changes nothing.
func inspectMachine(ctx context.Context, root string) (machineStatus, error) {
	s := machineStatus{Images: []imageStatus{}}
	var err error
	if s.State, err = enroll.Inspect(root); err != nil {
		return s, err
	}
	if !s.Enrolled {
		return s, nil
	}
	if s.boots() {
		if s.Images, s.unseen = inspectImages(ctx, root); s.unseen != nil {
			s.Unseen = s.unseen.Error()
		}
	}
	report, err := readReport(root)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	s.LastBoot = &bootStatus{bootOf(report, s.State), report.Fault}
	return s, nil
}

// boots reports whether a volume boots unattended.
func (s machineStatus) boots() bool {
	for _, v := range s.Volumes {
		if v.Boot {
			return true
		}
	}
	return false
}

func inspectImages(ctx context.Context, root string) (images []imageStatus, unseen error) {
	images = []imageStatus{}
	if os.Geteuid() != 0 {
		return images, errors.New("only root can look into them")
	}
	system, err := detectSystem(root)
	if err != nil {
		return images, err
	}
	found, err := system.Inspect(ctx)
	if err != nil {
		return images, err
	}
	for _, image := range found {
		s := imageStatus{Kernel: image.Kernel, Path: image.Path, err: image.Err}
		if image.Err != nil {
			s.Problem = strings.ReplaceAll(image.Err.Error(), "\n", "; ")
		}
		images = append(images, s)
	}
	return images, nil
}

func printMachineStatus(g *globals, s machineStatus) {
	if !s.Enrolled {
		fmt.Fprintln(g.out, "this machine is not enrolled")
		return
	}
	fmt.Fprintf(g.out, "machine    %s, key ID %s\n", safe(s.Machine), s.KeyID)
	for _, server := range s.Servers {
		fmt.Fprintf(g.out, "server     %s, key ID %s, %s\n", safe(server.Name), server.KeyID, safe(strings.Join(server.Addresses, " ")))
	}
	for _, v := range s.Volumes {
		printVolumeState(g, v)
	}
	for _, image := range s.Images {
		said := "boots unattended"
		if image.err != nil {
			said = "NOT AS IT MUST BE: " + safe(image.Problem)
		}
		fmt.Fprintf(g.out, "image      of kernel %s %s: %s\n", safe(image.Kernel), safe(image.Path), said)
	}
	if s.Unseen != "" {
		fmt.Fprintf(g.out, "images     not looked at: %s\n", safe(s.Unseen))
	}
	if s.LastBoot == nil {
		fmt.Fprintln(g.out, "last boot  the boot program left no report")
		return
	}
	if s.LastBoot.Fault != "" {
		fmt.Fprintf(g.out, "last boot  the boot program could not work: %s\n", safe(s.LastBoot.Fault))
	}
	for _, v := range s.LastBoot.Volumes {
		fmt.Fprintf(g.out, "last boot  volume %s %s\n", v.UUID, becauseOf(v))
	}
}

func printVolumeState(g *globals, v enroll.VolumeState) {
	where := "NOT FOUND"
	if v.Device != "" {
		where = safe(v.Device)
	}
	how := "boots unattended"
	switch {
	case !v.Finished:
		how = "ENROLMENT NOT FINISHED"
	case !v.Boot:
		how = "escrowed only"
	}
	fmt.Fprintf(g.out, "volume     %s, %s, %s\n", v.UUID, where, how)
	if v.Problem != "" {
		fmt.Fprintf(g.out, "           NOT AS ENROLLED: %s\n", safe(strings.ReplaceAll(v.Problem, "\n", "; ")))
	}
	for _, s := range v.Slots {
		fmt.Fprintf(g.out, "keyslot %-2d %s passphrase, %s\n", s.Slot, s.Purpose, s.State)
	}
	for _, name := range v.Behind {
		fmt.Fprintf(g.out, "%-10s IS STILL TO GET IT: run enroll again\n", safe(name))
	}
	for _, n := range v.Others {
		fmt.Fprintf(g.out, "keyslot %-2d not ours\n", n)
	}
}
