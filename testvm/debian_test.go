//go:build vm

package testvm

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// rootSpace is what a Debian root has room in, in bytes; it needs 350 MB.
const rootSpace = 512 << 20

// systems are the tar files of both, made when a test first needs one.
var systems = map[string]func() (string, error){
	InitramfsTools.Name: sync.OnceValues(func() (string, error) { return findSystem(InitramfsTools) }),
	Dracut.Name:         sync.OnceValues(func() (string, error) { return findSystem(Dracut) }),
}

func findSystem(system System) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	return FindSystem(ctx, cache, system)
}

// debian is a Debian machine of a site, enrolled from inside of its root.
type debian struct {
	*site
	name   string
	prompt string // what its console shows last when it asks
	tree   *Tree
	port   *Port
	disks  []string // image files; the first has the root
	uuids  []string // of their volumes
}

// newDebian makes a machine with an encrypted root and as many more encrypted
// disks as are wanted. It is not enrolled.
func (s *site) newDebian(name string, system System, moreDisks int) *debian {
	s.t.Helper()
	tar, err := systems[system.Name]()
	if err != nil {
		s.t.Fatal(err)
	}
	d := &debian{site: s, name: name, prompt: system.Prompt}
	if d.tree, err = Unpack(s.t.Context(), tar, s.path(name), s.marker); err != nil {
		s.t.Fatal(err)
	}
	if d.port, err = s.lan.Plug(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	crypttab := ""
	for n := range 1 + moreDisks {
		mapping, options, size := "root", "luks,initramfs", int64(rootSpace)
		if n > 0 {
			mapping, options, size = "data"+string(rune('0'+n)), "luks", 16<<20
		}
		image := name + "-" + mapping + ".img"
		if err := FormatVolume(s.t.Context(), s.path(image), size, s.passphrase); err != nil {
			s.t.Fatal(err)
		}
		uuid := s.cryptsetup(nil, "luksUUID", image)
		d.tree.Attach("vd"+string(rune('a'+n)), s.path(image))
		d.disks, d.uuids = append(d.disks, image), append(d.uuids, uuid)
		crypttab += mapping + " UUID=" + uuid + " none " + options + "\n"
	}
	d.write("etc/crypttab", crypttab, 0o644)
	return d
}

// write makes a file of the root.
func (d *debian) write(name, text string, mode os.FileMode) {
	d.t.Helper()
	if err := d.tree.Write(name, text, mode); err != nil {
		d.t.Fatal(err)
	}
}

// command is a command in the root.
func (d *debian) command(ctx context.Context, argv ...string) *exec.Cmd {
	return d.tree.Command(ctx, d.lan, argv...)
}

// must runs a command in the root, which has to succeed, and returns all that
// it said.
func (d *debian) must(argv ...string) string {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 10*time.Minute)
	defer cancel()
	out, err := d.command(ctx, argv...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s: %s: %v\n%s", d.name, strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// install installs our packages, as `make packages` made them.
func (d *debian) install() {
	d.t.Helper()
	packages, err := filepath.Glob("../dist/mandos-escrow*.deb")
	if err != nil || len(packages) != 2 {
		d.t.Fatalf("%d packages in dist, wanted two (%v); run make packages", len(packages), err)
	}
	argv := []string{"dpkg", "-i"}
	for _, file := range packages {
		data, err := os.ReadFile(file)
		if err != nil {
			d.t.Fatal(err)
		}
		name := "root/" + filepath.Base(file)
		d.write(name, string(data), 0o644)
		argv = append(argv, "/"+name)
	}
	d.must(argv...)
	d.must("sh", "-c", "rm /root/*.deb")
}

// enroll enrolls all disks, as an installer does at its end.
func (d *debian) enroll(state string) {
	d.t.Helper()
	d.write("root/token", d.site.must("token", "create", "--state", state, "--uses", "1", "--ttl", "1h"), 0o600)
	d.write("root/user.pass", string(d.passphrase), 0o600)
	argv := []string{"mandos-escrow", "enroll", "--token-file", "/root/token", "--passphrase-file", "/root/user.pass", "--name", d.name}
	for n := range d.disks {
		argv = append(argv, "--device", "/dev/vd"+string(rune('a'+n)))
	}
	d.t.Log(d.must(argv...))
	d.must("rm", "/root/token", "/root/user.pass")
	for n, image := range d.disks {
		unlock := d.command(d.t.Context(), "/usr/lib/mandos-escrow/mandos-escrow-unlock", "--volume", d.uuids[n], "--print", "--once")
		d.learnSecrets(unlock, image, d.name+"/etc/mandos-escrow")
	}
}

// finish writes the root to its disk. The kernel and its image are read from
// the folder, as a boot loader reads them from a disk that is not encrypted.
func (d *debian) finish() {
	d.t.Helper()
	initrd, err := os.ReadFile(d.tree.Initrd())
	if err != nil {
		d.t.Fatal(err)
	}
	if bytes.Contains(initrd, []byte(d.marker)) {
		d.t.Fatal("the boot image holds the marker in clear")
	}
	if err := WriteTree(d.t.Context(), d.path(d.disks[0]), d.passphrase, d.tree.Dir); err != nil {
		d.t.Fatal(err)
	}
	d.mustNotHoldMarker(d.disks[0])
}

// in is the same machine for a part of its test.
func (d *debian) in(t *testing.T) *debian {
	part, s := *d, *d.site
	part.site, s.t = &s, t
	return &part
}

// staticAddress is the kernel's word for this machine's own IPv4 address.
func (d *debian) staticAddress() string {
	return "ip=" + d.port.Addr.Addr().String() + ":::255.255.255.0::"
}

// noSystem has the machine's last program started in place of systemd: what
// happened before is proved, in half of the time.
const noSystem = "init=/usr/local/sbin/testvm-report"

// boot starts the machine, from its own disks, with these words on the kernel
// command line.
func (d *debian) boot(words ...string) *Machine {
	d.t.Helper()
	return d.bootFrom(d.disks, words...)
}

// bootFrom is boot with other disks.
func (d *debian) bootFrom(disks []string, words ...string) *Machine {
	d.t.Helper()
	m := &Machine{
		Kernel: d.tree.Kernel.Image,
		Initrd: d.tree.Initrd(),
		Memory: 1024,
		Port:   d.port,
		Append: append([]string{"root=/dev/mapper/root", "ro"}, words...),
	}
	for _, disk := range disks {
		m.Disks = append(m.Disks, d.path(disk))
	}
	d.start(m)
	return m
}

// mustReachRoot waits until the last program of the boot has run, from this
// volume.
func (d *debian) mustReachRoot(m *Machine) {
	d.t.Helper()
	mapping := "CRYPT-LUKS2-" + strings.ReplaceAll(d.uuids[0], "-", "") + "-root"
	d.mustEndWith(m, "testvm: root on "+mapping+"\ntestvm: marker "+d.marker+"\n")
}

// mustReport checks what the boot program left in /run about its volumes, the
// root first, and that only root may read it.
func (d *debian) mustReport(m *Machine, outcomes ...string) {
	d.t.Helper()
	_, report, ok := strings.Cut(m.Console.String(), "testvm: -rw------- /run/mandos-escrow/boot: ")
	if !ok {
		d.t.Fatal("no report, or others may read it")
	}
	report, _, _ = strings.Cut(report, "\n")
	for n, outcome := range outcomes {
		want := "volume-uuid: " + d.uuids[n] + ";outcome: " + outcome + ";"
		if !strings.Contains(report, want) {
			d.t.Errorf("the report does not say %q: %s", want, report)
		}
	}
}

// mustSay waits until the console shows one of the texts.
func (d *debian) mustSay(m *Machine, texts ...string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), bootLimit)
	defer cancel()
	if err := m.WaitFor(ctx, texts...); err != nil {
		d.t.Fatal(err)
	}
}

// mustNotAnswer shows that the boot program has handed over no passphrase.
func (d *debian) mustNotAnswer(m *Machine) {
	d.t.Helper()
	d.mustBeLocked(m)
	if m.Console.Contains("handed over") {
		d.t.Fatal("the boot program handed a passphrase over")
	}
}

// answerPrompt types the user's passphrase when the console asks the nth time.
func (d *debian) answerPrompt(m *Machine, n int) {
	d.t.Helper()
	d.typeAt(m, n, string(d.passphrase))
}

func (d *debian) typeAt(m *Machine, n int, line string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), bootLimit)
	defer cancel()
	if err := m.WaitForCount(ctx, n, d.prompt); err != nil {
		d.t.Fatal(err)
	}
	// Like a person: the prompt is written before the echo is turned off.
	time.Sleep(2 * time.Second)
	if err := m.Type(line); err != nil {
		d.t.Fatal(err)
	}
}

// copyDisk makes a copy of the root's disk.
func (d *debian) copyDisk(name string) {
	d.t.Helper()
	if _, err := run(d.t.Context(), d.dir, nil, "cp", "--sparse=always", d.disks[0], name); err != nil {
		d.t.Fatal(err)
	}
}

// mustBeAsFound shows that the boot program has ended, and left no address on
// the network card and the card not up.
func (d *debian) mustBeAsFound(m *Machine) {
	d.t.Helper()
	if m.Console.Contains("testvm: the boot program still runs") {
		d.t.Error("the boot program outlives the boot image")
	}
	_, network, _ := strings.Cut(m.Console.String(), "testvm: network ")
	network, _, _ = strings.Cut(network, "\n")
	if fields := strings.Fields(network); len(fields) != 2 || fields[1] != "DOWN" {
		d.t.Errorf("the network was not left as it was found: %q", network)
	}
}
