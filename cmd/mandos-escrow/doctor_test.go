package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/unlock"
)

func TestClosesShell(t *testing.T) {
	for line, want := range map[string]struct{ tools, dracut bool }{
		"quiet ro":                       {false, false},
		"panic=30":                       {true, false},
		"panic=0 rd.shell=0":             {true, true},
		"panic=":                         {false, false},
		"panic=30 panic=":                {false, false},
		"xpanic=30 nopanic rd.shell":     {false, false},
		"rd.shell=no":                    {false, true},
		"rd.shell=0 rd.emergency=reboot": {false, true},
		"rd.shell=0 rd.shell=1":          {false, false},
		"rd.shell=0 rd.break":            {false, false},
		"rd.shell=0 rd.break=pre-mount":  {false, false},
		"rd.emergency=halt":              {false, false},
	} {
		if got := closesShell(bootimage.InitramfsTools, line); got != want.tools {
			t.Errorf("initramfs-tools, %q: %t", line, got)
		}
		if got := closesShell(bootimage.Dracut, line); got != want.dracut {
			t.Errorf("dracut, %q: %t", line, got)
		}
	}
}

// place writes a file below root.
func place(t *testing.T, root, name, text string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestKernelCommandLine(t *testing.T) {
	root := t.TempDir()
	if _, _, err := kernelCommandLine(root); err == nil {
		t.Error("none was found, and that was no error")
	}
	place(t, root, "etc/kernel/cmdline", "root=/dev/sda1 panic=9\n")
	if line, from, err := kernelCommandLine(root); err != nil || from != "/etc/kernel/cmdline" || !closesShell(bootimage.InitramfsTools, line) {
		t.Errorf("%q of %s, %v", line, from, err)
	}
	place(t, root, "etc/default/grub", "# GRUB_CMDLINE_LINUX=\"panic=1\"\nGRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT=quiet\n GRUB_CMDLINE_LINUX='rd.shell=0'\n")
	if line, from, err := kernelCommandLine(root); err != nil || from != "/etc/default/grub" || line != "quiet rd.shell=0" {
		t.Errorf("%q of %s, %v", line, from, err)
	}
}

// TestShellOfDracut: each system is told its own words.
func TestShellOfDracut(t *testing.T) {
	root := t.TempDir()
	place(t, root, "usr/bin/dracut", "")
	place(t, root, "usr/lib/systemd/systemd", "")
	place(t, root, "usr/lib/dracut/modules.d/01systemd-initrd/module-setup.sh", "")
	place(t, root, "etc/default/grub", "GRUB_CMDLINE_LINUX=\"panic=30\"\n")
	if f := checkShell(root); f.Level != problem || !strings.Contains(f.Text, "rd.shell=0 rd.emergency=reboot") || !strings.Contains(f.Do, "grubby") {
		t.Errorf("%+v", f)
	}
	place(t, root, "etc/default/grub", "GRUB_CMDLINE_LINUX=\"rd.shell=0\"\n")
	if f := checkShell(root); f.Level != fine {
		t.Errorf("%+v", f)
	}
}

func TestCrypttab(t *testing.T) {
	const uuid = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	for line, want := range map[string]string{
		"":                                   "does not name",
		"# data UUID=" + uuid + " none luks": "does not name",
		"data":                               "does not name",
		"data UUID=" + uuid:                  "",
		"data UUID=" + strings.ToUpper(uuid): "",
		`data UUID="` + uuid + `" none`:      "",
		"data /dev/disk/by-uuid/" + uuid + " - x":  "",
		"data /dev/nosuch none luks,discard":       "data is /dev/nosuch",
		"data UUID=" + uuid + " none luks,noauto":  "noauto",
		"data UUID=" + uuid + " none keyscript=/x": "keyscript=/x",
		"data UUID=" + uuid + " /etc/key luks":     "/etc/key",
		"data UUID=" + uuid + " none tries=3":      "",
	} {
		root := t.TempDir()
		place(t, root, "etc/crypttab", line+"\n")
		s := machineStatus{State: enroll.State{Volumes: []enroll.VolumeState{{UUID: uuid, Device: "/dev/nosuch", Boot: true}, {UUID: "escrowed only"}}}}
		found := checkCrypttab(root, s)
		if want == "" && len(found) != 0 || want != "" && (len(found) != 1 || !strings.Contains(found[0].Text, want)) {
			t.Errorf("%q: %+v, want %q", line, found, want)
		}
	}
}

func TestResume(t *testing.T) {
	const uuid = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	s := machineStatus{State: enroll.State{Volumes: []enroll.VolumeState{{UUID: uuid, Boot: true}}}}
	for text, want := range map[string]int{"RESUME=/dev/mapper/swap\n": 1, "RESUME=/dev/mapper/other\n": 0, "RESUME=none\n": 0, "RESUME=/dev/sda2": 0} {
		root := t.TempDir()
		place(t, root, "etc/crypttab", "swap UUID="+uuid+" none swap\n")
		place(t, root, "etc/initramfs-tools/conf.d/resume", text)
		if found := checkCrypttab(root, s); len(found) != want {
			t.Errorf("%q: %+v", text, found)
		}
	}
}

func TestSwapAreas(t *testing.T) {
	root := t.TempDir()
	if found := checkSwap(root); len(found) != 0 {
		t.Errorf("no fstab: %+v", found)
	}
	place(t, root, "etc/fstab", "# /dev/sda1 none swap sw\n/dev/sda2 none swap sw 0 0\n/dev/mapper/swap none swap sw\n/dev/sda3 / ext4 defaults\nUUID=1 none swap\n\nx\n")
	if found := checkSwap(root); len(found) != 2 || !strings.Contains(found[0].Text, "/dev/sda2") || !strings.Contains(found[1].Text, "UUID=1") {
		t.Errorf("%+v", found)
	}
	if !plainBlock("/dev/nosuch") || plainBlock("/dev/zram0") && exists("/dev/zram0") {
		t.Error("a device that is not there counts as encrypted")
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestImages: an image that others can read, and one that is stale.
func TestImages(t *testing.T) {
	readable := imageStatus{Path: "/boot/initrd.img-1", Problem: "readable", err: bootimage.ErrReadable}
	stale := imageStatus{Path: "/boot/initrd.img-2", Problem: "stale", err: bootimage.ErrContents}
	found := findingsOfImages(machineStatus{Images: []imageStatus{readable, stale, {Path: "/boot/initrd.img-3"}}})
	if len(found) != 3 || found[0].Level != problem || found[1].Level != problem || found[2].Level != fine ||
		!strings.Contains(found[0].Do, "boot identity") || strings.Contains(found[1].Do, "boot identity") {
		t.Errorf("%+v", found)
	}
}

func TestVolumeFindings(t *testing.T) {
	good := enroll.VolumeState{UUID: "u", Device: "/dev/sda3", Finished: true, Others: []int{0}, Slots: []enroll.SlotState{{Slot: 1, Purpose: "boot", State: enroll.Proved}}}
	for name, c := range map[string]struct {
		change func(*enroll.VolumeState)
		want   string // levels
	}{
		"good":         {func(*enroll.VolumeState) {}, fine},
		"mismatch":     {func(v *enroll.VolumeState) { v.Problem = "cipher" }, problem},
		"not finished": {func(v *enroll.VolumeState) { v.Finished, v.Slots = false, nil }, problem},
		"gone":         {func(v *enroll.VolumeState) { v.Slots = []enroll.SlotState{{Slot: 1, State: enroll.Gone}} }, problem},
		"only ours":    {func(v *enroll.VolumeState) { v.Others = nil }, fine + " " + warning},
		"not there":    {func(v *enroll.VolumeState) { v.Device, v.Others, v.Problem = "", nil, "not found" }, problem},
	} {
		v := good
		c.change(&v)
		var levels []string
		for _, f := range checkVolume(v) {
			levels = append(levels, f.Level)
			if f.Level != fine && f.Do == "" {
				t.Errorf("%s: %q says not what to do", name, f.Text)
			}
		}
		if got := strings.Join(levels, " "); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestBootOf: a boot program that could not work has opened nothing, and that
// is told.
func TestBootOf(t *testing.T) {
	state := enroll.State{Volumes: []enroll.VolumeState{{UUID: "a", Boot: true}, {UUID: "b"}}}
	boot := bootOf(initrd.Report{BootID: "id", Fault: "unlock.conf is damaged"}, state)
	if boot.ID != "id" || len(boot.Volumes) != 1 || boot.Volumes[0] != (unlock.VolumeBoot{UUID: "a", Outcome: unlock.Unanswered, Reason: "unlock.conf is damaged"}) {
		t.Errorf("%+v", boot)
	}
	told := initrd.Report{BootID: "id", Volumes: []initrd.VolumeReport{{VolumeBoot: unlock.VolumeBoot{UUID: "a", Outcome: unlock.Opened}}}}
	if boot := bootOf(told, state); len(boot.Volumes) != 1 || boot.Volumes[0].Outcome != unlock.Opened {
		t.Errorf("%+v", boot)
	}
}

func TestLastBootFindings(t *testing.T) {
	levels := map[unlock.Outcome]string{
		unlock.Opened: fine, unlock.Answered: fine, unlock.Unanswered: warning, unlock.Rejected: problem, unlock.Mismatched: problem,
	}
	for outcome, want := range levels {
		s := machineStatus{LastBoot: &bootStatus{Boot: unlock.Boot{Volumes: []unlock.VolumeBoot{{UUID: "u", Outcome: outcome, Reason: "because"}}}}}
		if found := checkLastBoot(s); len(found) != 1 || found[0].Level != want || !strings.Contains(found[0].Text, "because") {
			t.Errorf("%s: %+v", outcome, found)
		}
	}
	if found := checkLastBoot(machineStatus{}); len(found) != 1 || found[0].Level != warning {
		t.Errorf("no report: %+v", found)
	}
	if found := checkLastBoot(machineStatus{LastBoot: &bootStatus{Fault: "no keys"}}); len(found) != 1 || found[0].Level != problem {
		t.Errorf("fault: %+v", found)
	}
}

func TestServerFindings(t *testing.T) {
	for level, s := range map[string]api.Status{
		problem + " " + problem: {Unconfirmed: "restored", MasterHere: true},
		fine + " " + fine:       {MasterHere: true, MasterSaved: time.Now()},
	} {
		if got := checkServes(s).Level + " " + checkMaster(s).Level; got != level {
			t.Errorf("%s, want %s", got, level)
		}
	}
	if f := checkMaster(api.Status{}); f.Level != fine {
		t.Errorf("kept elsewhere: %+v", f)
	}
	m := api.Machine{Machine: unlock.Machine{Name: "web1", LastBoot: unlock.Boot{Volumes: []unlock.VolumeBoot{{Outcome: unlock.Mismatched}, {Outcome: unlock.Opened}}}}}
	if found := checkBoots([]api.Machine{m}); len(found) != 1 || found[0].Level != problem {
		t.Errorf("%+v", found)
	}
}

func TestShellWord(t *testing.T) {
	for in, want := range map[string]string{"web1": "web1", "/dev/sda3": "/dev/sda3", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$(x)": "'$(x)'"} {
		if got := shellWord(in); got != want {
			t.Errorf("%q: %s", in, got)
		}
	}
}
