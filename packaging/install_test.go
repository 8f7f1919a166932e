//go:build vm

package packaging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/testvm"
)

// debian is a Debian system in a folder, in which packages are installed as on a
// machine. `make packages` has to have made them.
type debian struct {
	t   *testing.T
	dir string
}

func newDebian(t *testing.T) *debian {
	t.Helper()
	cache, err := testvm.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	tar, err := testvm.FindSystem(t.Context(), cache, testvm.InitramfsTools)
	if err != nil {
		t.Fatal(err)
	}
	d := &debian{t: t, dir: filepath.Join(t.TempDir(), "root")}
	if err := os.Mkdir(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	output(t, "tar", "-xpf", tar, "--numeric-owner", "-C", d.dir)
	// Small images, which are made in less time.
	if err := os.WriteFile(filepath.Join(d.dir, "etc/initramfs-tools/conf.d/small"), []byte("MODULES=list\nCOMPRESS=gzip\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, version := range []string{"", "9.1", "9.2"} {
		into := filepath.Join(d.dir, "debs", fmt.Sprint(i))
		if err := os.MkdirAll(into, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"mandos-escrow", "mandos-escrow-client"} {
			found, err := filepath.Glob("../dist/" + name + "_*.deb")
			if err != nil || len(found) != 1 {
				t.Fatalf("debs of %s: %q, %v; `make packages` makes one", name, found, err)
			}
			if version == "" {
				output(t, "cp", found[0], into)
			} else {
				newer(t, found[0], filepath.Join(into, name+"_"+version+".deb"), version)
			}
		}
	}
	return d
}

// newer makes a deb of another version, with another boot program.
func newer(t *testing.T, deb, into, version string) {
	t.Helper()
	output(t, "sh", "-ec", `
cd "$1"
dpkg-deb -R "$2" tree
sed -i "s/^Version: .*/Version: $4/; s/mandos-escrow (= [^)]*)/mandos-escrow (= $4)/" tree/DEBIAN/control
program=tree/usr/lib/mandos-escrow/mandos-escrow-unlock
[ ! -e $program ] || echo "of version $4" >>$program
rm -f tree/DEBIAN/conffiles # has an empty line, which dpkg minds only here
dpkg-deb -Znone -b tree "$3"
`, "sh", t.TempDir(), absolute(t, deb), into, version)
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	full, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return full
}

// limit is far above the seconds that a script takes on a quiet host.
const limit = 10 * time.Minute

// pivot makes folder $1 the root and runs script $2 there. After a mere chroot
// systemd could give its services no mounts of their own.
const pivot = `
mount --bind "$1" "$1"
cd "$1"
pivot_root . mnt
exec chroot . sh -ec 'mount -t proc proc /proc; umount -l /mnt; exec sh -c "$1"' sh "$2"
`

// run runs a script in the system, in namespaces of its own, and returns what
// it says and its exit code.
func (d *debian) run(script string) (string, int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--fork", "--kill-child",
		"sh", "-ec", pivot, "sh", d.dir, "set -e; export DEBIAN_FRONTEND=noninteractive LC_ALL=C\n"+script)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		d.t.Fatalf("%v, %v\n%s", err, ctx.Err(), out)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (d *debian) must(script string) string {
	d.t.Helper()
	out, code := d.run(script)
	if code != 0 {
		d.t.Fatalf("exit code %d of:\n%s\n%s", code, script, out)
	}
	return out
}

// mustFail wants a failure that is told, by this text among others.
func (d *debian) mustFail(script, text string) {
	d.t.Helper()
	out, code := d.run(script)
	if code == 0 || !strings.Contains(out, text) {
		d.t.Errorf("exit code %d without %q of:\n%s\n%s", code, text, script, out)
	}
}

func (d *debian) mustSay(script, text string) {
	d.t.Helper()
	if out := d.must(script); !strings.Contains(out, text) {
		d.t.Errorf("no %q of:\n%s\n%s", text, script, out)
	}
}

// image returns the bytes of the newest boot image.
func (d *debian) image() []byte {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.dir, "boot/initrd.img-*"))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("images: %q, %v", found, err)
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		d.t.Fatal(err)
	}
	return data
}

// enrol leaves what enroll leaves, as far as packages look at it.
const enrol = `
install -d -m 700 /etc/mandos-escrow /var/lib/mandos-escrow-agent
echo 'volume-uuid: 00000000-0000-0000-0000-000000000000' >/etc/mandos-escrow/unlock.conf
chmod 600 /etc/mandos-escrow/unlock.conf
echo policy >/var/lib/mandos-escrow-agent/policy
`

const kept = `[ -s /etc/mandos-escrow/unlock.conf ] && [ -s /var/lib/mandos-escrow-agent/policy ]`

// sameProgram: the boot program in the image is the one that is installed.
const sameProgram = `
rm -rf /tmp/image; unmkinitramfs /boot/initrd.img-* /tmp/image
cmp /usr/lib/mandos-escrow/mandos-escrow-unlock "$(find /tmp/image -name mandos-escrow-unlock -type f)"
[ "$(stat -c %a /boot/initrd.img-*)" = 600 ]
`

// brokenHook makes every new boot image fail.
const brokenHook = `printf '#!/bin/sh\n[ "$1" = prereqs ] || exit 1\n' >/etc/initramfs-tools/hooks/broken && chmod +x /etc/initramfs-tools/hooks/broken`

// TestLifeOfAMachine installs, upgrades, removes and purges by dpkg, with boot
// images that can be made and with ones that cannot. There is a whole image at
// every moment, and the enrolment outlives the packages.
func TestLifeOfAMachine(t *testing.T) {
	d := newDebian(t)
	d.must("update-initramfs -u") // as it is here, to compare with
	stock, list := d.image(), d.must("lsinitramfs /boot/initrd.img-*")

	d.must("dpkg -i /debs/0/*.deb; dpkg -V mandos-escrow mandos-escrow-client")
	d.must("[ \"$(stat -c '%U %G %a' /var/lib/mandos-escrow)\" = 'mandos-escrow mandos-escrow 700' ]; [ ! -e /etc/mandos-escrow ]")
	d.must("! systemctl is-enabled mandos-escrow.service; mandos-escrow --version; bash -n /usr/share/bash-completion/completions/mandos-escrow")
	d.must("dpkg -i /debs/1/*.deb; dpkg -r mandos-escrow-client; dpkg -i /debs/1/*.deb")
	if !bytes.Equal(d.image(), stock) {
		t.Error("the boot image of a machine that is not enrolled was touched")
	}

	d.must(enrol + "update-initramfs -u" + sameProgram)
	d.must("dpkg -i /debs/2/*.deb; grep -aq 'of version 9.2' /usr/lib/mandos-escrow/mandos-escrow-unlock" + sameProgram)

	enrolled := d.image()
	d.must(brokenHook)
	d.mustFail("dpkg -i --force-downgrade /debs/1/*.deb", "failed for /boot/initrd.img")
	d.mustFail("dpkg -r mandos-escrow-client", "still hold the boot program and its keys")
	if !bytes.Equal(d.image(), enrolled) {
		t.Error("an image that could not be made anew is another")
	}
	d.must("rm /etc/initramfs-tools/hooks/broken; dpkg --configure -a")

	d.mustSay("dpkg -r mandos-escrow-client", "still enrolled")
	if got := d.must("lsinitramfs /boot/initrd.img-*"); got != list {
		t.Errorf("the image after removal holds\n%s\nand before it held\n%s", got, list)
	}
	d.must("dpkg -i /debs/2/*.deb" + sameProgram) // again, and it boots as before
	d.must("dpkg -r mandos-escrow-client;" + kept)
	d.mustSay("dpkg -P mandos-escrow-client 2>&1", "mandos-escrow unenroll")
	d.must("echo settings >/var/lib/mandos-escrow/server.conf; " + kept)
	d.mustSay("dpkg -P mandos-escrow 2>&1", "kept in /var/lib/mandos-escrow")
	d.must("[ -s /var/lib/mandos-escrow/server.conf ] && ! dpkg -s mandos-escrow && " + kept)
}

// stubDracut does to its output file what dracut does: it writes over it, and
// removes it when that fails.
const stubDracut = `
rm /usr/sbin/update-initramfs
cat >/usr/bin/dracut <<'END'
#!/bin/sh
for last; do image=$kernel kernel=$last; done
if [ -e /broken ] && [ "$kernel" = 2 ]; then rm -f "$image"; exit 1; fi
echo "new for $kernel" >"$image"
END
chmod +x /usr/bin/dracut
mkdir -p /lib/modules/1 /lib/modules/2
for kernel in 1 2; do echo old >/boot/initrd.img-$kernel; done
`

// mustHold wants these images of the two kernels, and no draft beside them.
func (d *debian) mustHold(one, two string) {
	d.t.Helper()
	d.must(fmt.Sprintf("[ \"$(cat /boot/initrd.img-1)\" = %q ]; [ \"$(cat /boot/initrd.img-2)\" = %q ]; ! ls /boot/*mandos-escrow*", one, two))
}

// TestDracut: an image that dracut cannot make leaves the old one.
func TestDracut(t *testing.T) {
	d := newDebian(t)
	d.must("dpkg -i /debs/0/*.deb" + enrol + stubDracut + "touch /broken")
	d.mustFail("dpkg -i /debs/1/*.deb", "could not make /boot/initrd.img-2 anew")
	d.mustHold("new for 1", "old")
	d.must("rm /broken; dpkg --configure -a; [ \"$(stat -c %a /boot/initrd.img-2)\" = 600 ]")
	d.mustHold("new for 1", "new for 2")
	d.must("for kernel in 1 2; do echo with us >/boot/initrd.img-$kernel; done; dpkg -r mandos-escrow-client")
	d.mustHold("new for 1", "new for 2")
}

// TestRPM: the same scripts, called by rpm.
func TestRPM(t *testing.T) {
	d := newDebian(t)
	d.must(enrol + stubDracut)
	rpm := func(args ...string) string {
		t.Helper()
		return output(t, "rpm", append([]string{"--root", d.dir, "--nodeps"}, args...)...)
	}
	files, err := filepath.Glob("../dist/*.rpm")
	if err != nil || len(files) != 2 {
		t.Fatalf("rpms: %q, %v; `make packages` makes them", files, err)
	}
	rpm(append([]string{"-i"}, files...)...)
	rpm("-V", "mandos-escrow", "mandos-escrow-client")
	d.mustHold("new for 1", "new for 2")
	d.must("[ \"$(stat -c '%U %G %a' /var/lib/mandos-escrow)\" = 'mandos-escrow mandos-escrow 700' ]")
	d.must("for kernel in 1 2; do echo with us >/boot/initrd.img-$kernel; done; echo settings >/var/lib/mandos-escrow/server.conf")
	rpm("-e", "mandos-escrow-client", "mandos-escrow")
	d.mustHold("new for 1", "new for 2")
	d.must("[ ! -e /usr/bin/mandos-escrow ]; [ -s /var/lib/mandos-escrow/server.conf ]; " + kept)
}
