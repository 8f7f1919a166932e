package initrd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	rootUUID = "11111111-1111-4111-8111-111111111111"
	dataUUID = "22222222-2222-4222-8222-222222222222"
)

// crypttab of a machine whose volumes are all enrolled but one. A name is no
// pattern: data.1 is not dataX1.
const crypttab = "# comment\n" +
	"dataX1 UUID=" + rootUUID + " none luks\n" +
	"data.1 UUID=" + dataUUID + " none luks,discard\n" +
	"late UUID=" + dataUUID + " none luks,nofail\n" +
	"keyed UUID=" + dataUUID + " /etc/key luks\n" +
	"other UUID=33333333-3333-4333-8333-333333333333 none luks\n" +
	"$(touch${IFS}injected) UUID=" + dataUUID + " none luks"

const (
	rootLine = "dataX1 UUID=" + rootUUID + " none luks\n"
	added    = "data.1 UUID=" + dataUUID + " none luks,discard\n$(touch${IFS}injected) UUID=" + dataUUID + " none luks\n"
)

// dracut does what dracut does in its loop over modules. crypt, in an image for
// one host, writes the volumes that it knows of in place of what is there.
const dracut = `
inst_simple() { :; }
inst() { :; }
mark_hostonly() { :; }
SYSTEMCTL=true systemdsystemunitdir=/usr/lib/systemd/system
for moddir in modules.d/[0-9][0-9]*; do
	. "$moddir/module-setup.sh"
	install
done`

// TestDracutAddsVolumes: after crypt, whose table it adds to.
func TestDracutAddsVolumes(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "modules.d"), os.DirFS("dracut")); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("modules.d/90crypt/module-setup.sh", `install() { mkdir -p "$initdir/etc"; grep ^dataX1 "$dracutsysrootdir/etc/crypttab" > "$initdir/etc/crypttab"; }`)
	write("system/etc/crypttab", crypttab)
	write("system/etc/mandos-escrow/unlock.conf", "volume-uuid: "+rootUUID+"\nvolume-uuid: "+dataUUID+"\n")
	cmd := exec.Command("bash", "-c", dracut)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "dracutsysrootdir="+dir+"/system", "initdir="+dir+"/image", "hostonly=yes")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "image/etc/crypttab"))
	if err != nil || string(got) != rootLine+added {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "image/etc/mandos-escrow/unlock.conf")); err != nil {
		t.Error(err)
	}
	for _, where := range []string{dir, dir + "/image"} {
		if _, err := os.Stat(filepath.Join(where, "injected")); err == nil {
			t.Error("a name was run")
		}
	}
}

// TestHookAddsVolumes: the same of initramfs-tools, whose hook looks at the
// running system alone, so only the function is run.
func TestHookAddsVolumes(t *testing.T) {
	hook, err := os.ReadFile("initramfs-tools/hooks/mandos-escrow")
	if err != nil {
		t.Fatal(err)
	}
	_, functions, found1 := strings.Cut(string(hook), "# The UUID of a volume as crypttab names it.\n")
	functions, _, found2 := strings.Cut(functions, "\nif [ ! -x \"$program\" ]")
	if !found1 || !found2 {
		t.Fatal("the hook has other functions")
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"crypttab": crypttab, "table": rootLine, "unlock.conf": "volume-uuid: " + rootUUID + "\nvolume-uuid: " + dataUUID + "\n",
		"sbin/cryptsetup": "#!/bin/sh\n", "lib/cryptsetup/askpass": "",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	functions = strings.ReplaceAll(functions, "</etc/crypttab", "<crypttab")
	cmd := exec.Command("sh", "-ec", "config=. table=table DESTDIR=.\nsay() { echo \"$*\" >&2; }\n"+functions+"\nadd_data_volumes")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "table")); err != nil || string(got) != rootLine+added {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "injected")); err == nil {
		t.Error("a name was run")
	}
}

// TestCheckScript: the check's exit codes 0 and 5 let the boot go on, every other
// one stops it, again after each shell that an administrator leaves.
func TestCheckScript(t *testing.T) {
	script, err := os.ReadFile("initramfs-tools/scripts/local-premount/mandos-escrow")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"functions": "panic() { echo panic; }\n", "unlock.conf": "",
		"check": "#!/bin/sh\necho run >>runs\nexit $(sed -n \"$(grep -c . runs)p\" codes)\n", // the next of the codes
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	here := strings.NewReplacer("/scripts/functions", "./functions", "/etc/mandos-escrow/unlock.conf", "unlock.conf",
		"/usr/lib/mandos-escrow/mandos-escrow-unlock --check-mapped", "./check").Replace(string(script))
	for codes, want := range map[string]string{"0": "", "5": "", "4\n0": "panic\n", "1\n4\n5": "panic\npanic\n"} {
		for name, text := range map[string]string{"codes": codes + "\n", "runs": ""} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("sh", "-c", here)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != want {
			t.Errorf("%q: %v, %q, want %q", codes, err, out, want)
		}
	}
}
