package bootimage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/unlock"
)

// fake is a system in a folder. Its programs are shell scripts (testdata/fake)
// that run without a chroot, so that no root is needed: they find the folder in
// the environment, and an image is a tar file.
type fake struct {
	*System
	said bytes.Buffer
}

var kernels = []string{"6.1.0-1", "6.1.0-2"}

func newFake(t *testing.T, kind Kind) *fake {
	t.Helper()
	root := filepath.Join(t.TempDir(), "[new] root") // as somebody may call it
	if err := os.CopyFS(root, os.DirFS("testdata/fake")); err != nil {
		t.Fatal(err)
	}
	f := &fake{System: &System{Root: root}}
	write := func(name, text string) { f.write(t, name, text) }
	for _, name := range []string{unlock.ConfigFile, unlock.TLSPrivateKeyFile, unlock.TLSPublicKeyFile, unlock.PrivateKeyFile, unlock.PublicKeyFile} {
		write("etc/mandos-escrow/"+name, "boot "+name)
		write("var/lib/mandos-escrow-agent/"+name, "running "+name)
	}
	for _, kernel := range kernels {
		write("boot/vmlinuz-"+kernel, "kernel")
		write("boot/initrd.img-"+kernel, "the image before, of "+kernel)
		write("lib/modules/"+kernel+"/modules.dep", "")
	}
	write("boot/vmlinuz-removed", "kernel without modules")
	write("usr/lib/systemd/systemd", "")
	write("usr/lib/dracut/modules.d/01systemd-initrd/module-setup.sh", "")
	for _, dir := range []string{"hooks", "conf-hooks.d", "scripts/init-premount", "scripts/local-premount", "scripts/init-bottom"} {
		if err := os.MkdirAll(f.path("usr/share/initramfs-tools", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if kind == Dracut {
		if err := os.Remove(filepath.Join(root, "usr/sbin/mkinitramfs")); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("the boot program"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Detect(root)
	if err != nil || s.Kind != kind {
		t.Fatalf("%+v, %v", s, err)
	}
	s.Program, s.Run = program, runFake
	s.Progress = func(format string, args ...any) { fmt.Fprintf(&f.said, format+"\n", args...) }
	f.System = s
	return f
}

func (f *fake) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(f.path(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func runFake(ctx context.Context, root string, c Command) error {
	cmd := exec.CommandContext(ctx, filepath.Join(root, c.Path), c.Args...)
	cmd.Dir = filepath.Join(root, c.Dir)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "ROOT=" + root}, c.Env...)
	cmd.Stdout, cmd.Stderr = c.Out, c.Out
	return cmd.Run()
}

// goesWrong says what the fake programs do wrong from now on.
func (f *fake) goesWrong(t *testing.T, how string) {
	t.Helper()
	if err := os.WriteFile(f.path("etc/fake"), []byte(how+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree is every file, folder and link below the root, with its mode and bytes.
// Left out is what has to outlast a run: locks, and what was told to go wrong.
func (f *fake) tree(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(f.Root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		name := f.inside(file)
		if strings.HasSuffix(name, ".lock") || name == "/etc/fake" {
			return nil
		}
		found[name] = info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(file)
			found[name] += " " + string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// unchanged compares the whole system with what it was.
func (f *fake) unchanged(t *testing.T, before map[string]string) {
	t.Helper()
	after := f.tree(t)
	for name, what := range before {
		if after[name] != what {
			t.Errorf("%s was %.60q and is %.60q", name, what, after[name])
		}
	}
	for name := range after {
		if _, there := before[name]; !there {
			t.Errorf("%s was left behind", name)
		}
	}
}

func (f *fake) mustApply(t *testing.T) []Image {
	t.Helper()
	images, err := f.Apply(t.Context())
	if err != nil {
		t.Fatalf("%v\n%s", err, f.said.Bytes())
	}
	return images
}

// both runs a test for both kinds of system.
func both(t *testing.T, test func(t *testing.T, f *fake)) {
	t.Helper()
	for _, kind := range []Kind{InitramfsTools, Dracut} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			test(t, newFake(t, kind))
		})
	}
}

func is(t *testing.T, err, want error, texts ...string) {
	t.Helper()
	if want != nil && !errors.Is(err, want) || err == nil {
		t.Errorf("got %v, wanted %v", err, want)
	}
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("no %q in: %v", text, err)
		}
	}
}
