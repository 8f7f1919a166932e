package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/enroll"
)

type verifyOptions struct {
	root             string
	volumes, devices []string
	prove            bool
}

func newVerify(g *globals) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "check that volumes, keyslots and escrowed packets are still those that were proved",
		Long: `Compares, for each enrolled volume and without any secret: its header with what
was enrolled, the keyslots of the boot and the recovery passphrase with those that
were proved, and the packet at every server, byte for byte by its digest, with the
one that was made then. Every server that answers is told what was found and keeps
the date ("packet show", "machine show"); what is wrong is an alarm in its log.

A passphrase that was released, has expired, or is older than its lifetime is said as
due: "mandos-escrow rotate" makes a new one. So is a volume key that others may know:
that takes re-encryption by a person. Neither is a failure. A server that does not hold
the packet whole is one, and "mandos-escrow rotate" mends it.

With --prove the boot passphrase is fetched as at a boot, and has to open its
keyslot. To the server this is a boot.

The exit code is 4 when a header is not the enrolled one, 5 when a keyslot changed,
a header is gone or damaged, or a server holds other bytes or none, otherwise 1 when
something was not found or a server did not answer, which is named.`,
		Example: `  mandos-escrow verify
  mandos-escrow verify --prove --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runVerify(cmd.Context(), g, o) },
	}
	cmd.Flags().StringVar(&o.root, "root", "/", "prefix of what enroll wrote")
	cmd.Flags().StringArrayVar(&o.volumes, "volume", nil, "UUID of a volume, or its beginning; may be repeated (default: all)")
	cmd.Flags().StringArrayVar(&o.devices, "device", nil, "where a volume lies that is not where it was; may be repeated")
	cmd.Flags().BoolVar(&o.prove, "prove", false, "also fetch the boot passphrase, and try it")
	return g.withJSON(cmd)
}

// failedVerify is a verification of which not all holds. Its errors give the exit
// code; their texts were printed.
type failedVerify struct {
	failed, all int
	errs        []error
}

func (f failedVerify) Error() string {
	return fmt.Sprintf("verify: %d of %d volumes are not all well", f.failed, f.all)
}

// Unwrap gives what decides: not this volume, then other bytes. What servers say of
// a call decides nothing.
func (f failedVerify) Unwrap() (decisive []error) {
	for _, err := range f.errs {
		if code := exitCode(err); api.CodeOf(err) == "" && (code == exitMismatch || code == exitIntegrity) {
			decisive = append(decisive, err)
		}
	}
	return decisive
}

func runVerify(ctx context.Context, g *globals, o verifyOptions) error {
	options := enroll.VerifyOptions{Root: o.root, Volumes: o.volumes, Devices: o.devices, Prove: o.prove, Progress: g.progress}
	if o.prove {
		program, err := bootimage.Program(o.root)
		if err != nil {
			return fmt.Errorf("verify: %w", err)
		}
		options.Program = program
	}
	results, err := enroll.Verify(ctx, options)
	if err != nil {
		return err
	}
	if g.json {
		err = g.printJSON(results)
	} else {
		printVerified(g, results)
	}
	if err != nil {
		return err
	}
	failed := failedVerify{all: len(results)}
	for _, r := range results {
		if errs := r.Errs(); len(errs) > 0 {
			failed.failed, failed.errs = failed.failed+1, append(failed.errs, errs...)
		}
	}
	if failed.failed > 0 {
		return failed
	}
	return nil
}

// printVerified prints a line for each volume.
func printVerified(g *globals, results []enroll.Verified) {
	for _, r := range results {
		said := []string{}
		for _, p := range r.Problems {
			said = append(said, safe(p))
		}
		verdict := "ok"
		if len(said) > 0 {
			verdict = "FAILED"
		} else {
			said = append(said, fmt.Sprintf("header, keyslots and packet %s at %d servers are those that were proved", r.Packet, len(r.Servers)))
		}
		if r.Proved {
			said = append(said, "the boot passphrase was fetched and opens it")
		}
		for _, due := range r.Due {
			said = append(said, "DUE: "+due)
		}
		fmt.Fprintf(g.out, "%-6s %s: %s\n", verdict, r.UUID, strings.Join(said, "; "))
	}
}
