package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/bootimage"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"mandos-escrow": func() {
		detectSystem = detectFake
		checkpoint = endAt
		cheapSlots = os.Getenv("CHEAP_SLOTS") != ""
		main()
	}})
}

// endAt ends the process where END_AT says, as a power cut would.
func endAt(step string) {
	if os.Getenv("END_AT") == step {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// fakeSystem has programs that stand in for those of a system.
const fakeSystem = "../../internal/bootimage/testdata/fake"

// oldPackets has packets of volume_key, and the key that they are sealed to.
const oldPackets = "../../escrow/volumekey/testdata"

// detectFake has the programs of a fake system run without a chroot, which is
// for root only. They find their folder in the environment.
func detectFake(root string) (*bootimage.System, error) {
	s, err := bootimage.Detect(root)
	if err == nil {
		s.Run = func(ctx context.Context, root string, c bootimage.Command) error {
			cmd := exec.CommandContext(ctx, filepath.Join(root, c.Path), c.Args...)
			cmd.Dir, cmd.Stdout, cmd.Stderr = filepath.Join(root, c.Dir), c.Out, c.Out
			cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "ROOT=" + root}, c.Env...)
			return cmd.Run()
		}
	}
	return s, err
}

// cmdSystem: `system initramfs-tools|dracut FOLDER` makes a root with one kernel
// and its boot image, and the boot program in its place.
func cmdSystem(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: system initramfs-tools|dracut FOLDER")
	}
	root := ts.MkAbs(args[1])
	ts.Check(os.CopyFS(root, os.DirFS(ts.Getenv("FAKE_SYSTEM"))))
	program, err := os.ReadFile(ts.Getenv("UNLOCK"))
	ts.Check(err)
	for name, data := range map[string][]byte{
		initrd.Program: program, "boot/vmlinuz-6.1.0-1": nil, "boot/initrd.img-6.1.0-1": []byte("before"), "lib/modules/6.1.0-1/modules.dep": nil, "etc/fstab": nil,
		"usr/lib/systemd/systemd": nil, "usr/lib/dracut/modules.d/01systemd-initrd/module-setup.sh": nil,
	} {
		file := filepath.Join(root, name)
		ts.Check(os.MkdirAll(filepath.Dir(file), 0o755))
		ts.Check(os.WriteFile(file, data, 0o600))
	}
	ts.Check(os.Chmod(filepath.Join(root, initrd.Program), 0o755))
	if args[0] == "dracut" {
		ts.Check(os.Remove(filepath.Join(root, "usr/sbin/mkinitramfs")))
	}
}

// TestScript runs testdata/script: what people type, with exact exit codes,
// real servers and real LUKS volumes.
func TestScript(t *testing.T) {
	for _, tool := range []string{"cryptsetup", "gpg", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt-get install cryptsetup-bin gnupg jq", tool)
		}
	}
	unlock := filepath.Join(t.TempDir(), "mandos-escrow-unlock")
	build := exec.Command("go", "build", "-o", unlock, "../mandos-escrow-unlock")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the boot program: %v\n%s", err, out)
	}
	fake, err := filepath.Abs(fakeSystem)
	if err != nil {
		t.Fatal(err)
	}
	old, err := filepath.Abs(oldPackets)
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			for _, name := range []string{"ADDR", "ADDR2", "ADDR3"} { // all held at once, so that they differ
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				defer l.Close()
				e.Setenv(name, l.Addr().String())
			}
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			e.Setenv("XDG_CONFIG_HOME", filepath.Join(e.WorkDir, "home", "config"))
			e.Setenv("CHEAP_SLOTS", "1") // but where a script takes it out
			e.Setenv("LC_ALL", "C.UTF-8")
			e.Setenv("UNLOCK", unlock)
			e.Setenv("FAKE_SYSTEM", fake)
			e.Setenv("OLD_PACKETS", old)
			e.Setenv("PATH", filepath.Dir(unlock)+":"+e.Getenv("PATH")+":/usr/sbin:/sbin")
			return os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":  cmdExits,
			"disk":   cmdDisk,
			"server": cmdServer,
			"flip":   cmdFlip,
			"cut":    cmdCut,
			"jqset":  cmdJQSet,
			"system": cmdSystem,
			"phone":  cmdPhone,
		},
	})
}

// cmdExits: `exits CODE COMMAND...` demands an exact exit code. Its output is
// there for stdout and stderr checks afterwards.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v: %v", args[1:], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit %d, wanted %d: %v", got, want, args[1:])
	}
}

// cmdDisk: `disk luks1|luks2 FILE PASSFILE` makes a small volume.
func cmdDisk(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: disk luks1|luks2 FILE PASSFILE")
	}
	image := ts.MkAbs(args[1])
	ts.Check(os.WriteFile(image, nil, 0o600))
	ts.Check(os.Truncate(image, 32<<20))
	cost := []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	if args[0] == "luks1" {
		cost = cost[2:]
	}
	format := append([]string{"luksFormat", "-q", "--type", args[0]}, cost...)
	ts.Check(ts.Exec("cryptsetup", append(format, image, ts.MkAbs(args[2]))...))
}

// cmdServer: `server NAME [ADDRESS]` makes a server with the master passphrase of
// the file master.
func cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: server NAME [ADDRESS]")
	}
	name, address := args[0], ts.Getenv("ADDR")
	if len(args) == 2 {
		address = args[1]
	}
	ts.Check(os.WriteFile(ts.MkAbs("master"), []byte("correct-horse-battery-staple-7719"), 0o600))
	ts.Check(ts.Exec("mandos-escrow", "server", "init", "--state", name, "--name", name,
		"--listen", address, "--address", address, "--master-passphrase-file", "master"))
}

// cmdFlip: `flip FILE OFFSET` changes one bit; a negative offset counts from
// the end.
func cmdFlip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	at, err := strconv.Atoi(args[1])
	ts.Check(err)
	if at < 0 {
		at += len(data)
	}
	data[at] ^= 1
	ts.Check(os.WriteFile(path, data, 0o600))
}

// cmdCut: `cut FILE N` leaves the first N bytes.
func cmdCut(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: cut FILE N")
	}
	n, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	ts.Check(os.Truncate(ts.MkAbs(args[0]), n))
}

// cmdJQSet: `jqset VAR FILTER FILE` sets a variable from a JSON file.
func cmdJQSet(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: jqset VAR FILTER FILE")
	}
	cmd := exec.Command("jq", "-er", args[1], ts.MkAbs(args[2]))
	out, err := cmd.Output()
	if err != nil {
		ts.Fatalf("jq %s: %v", args[1], err)
	}
	ts.Setenv(args[0], string(out[:len(out)-1]))
}
