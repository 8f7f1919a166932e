//go:build packages

package packaging

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/initrd"
)

const dist = "../dist"

// packages are the names of both, each of which there is as a deb and an rpm.
var packages = []string{"mandos-escrow", "mandos-escrow-client"}

// file returns the only package of this name and kind in a folder.
func file(t *testing.T, folder, name, kind string) string {
	t.Helper()
	separator := map[string]string{"deb": "_", "rpm": "-[0-9]"}[kind]
	found, err := filepath.Glob(filepath.Join(folder, name+separator+"*."+kind))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s of %s: %q, %v; `make packages` makes one", kind, name, found, err)
	}
	return found[0]
}

// contents maps the paths in a package to their mode, as ls shows it, and for
// links to where they lead. Folders are left out.
func contents(t *testing.T, name, kind string) map[string]string {
	t.Helper()
	list := []string{"dpkg-deb", "-c"}
	if kind == "rpm" {
		list = []string{"rpm", "-qplv"}
	}
	found := map[string]string{}
	for line := range strings.Lines(output(t, list[0], append(list[1:], file(t, dist, name, kind))...)) {
		line, target, link := strings.Cut(strings.TrimSpace(line), " -> ")
		fields := strings.Fields(line)
		mode, owner, path := fields[0], fields[1], strings.TrimPrefix(fields[len(fields)-1], ".")
		if kind == "rpm" {
			owner = fields[2] + "/" + fields[3]
		}
		if owner != "root/root" {
			t.Errorf("%s: %s belongs to %s", kind, path, owner)
		}
		switch {
		case strings.HasPrefix(mode, "d"):
			if mode != "drwxr-xr-x" {
				t.Errorf("%s: folder %s has mode %s", kind, path, mode)
			}
		case link:
			found[path] = target
		default:
			found[path] = mode
		}
	}
	return found
}

// expected is what a package has to hold, from what the source holds.
func expected(t *testing.T, name, kind string) map[string]string {
	t.Helper()
	const program, data = "-rwxr-xr-x", "-rw-r--r--"
	want := map[string]string{"/usr/share/doc/" + name + "/copyright": data}
	pages, err := filepath.Glob("../docs/man/*.8")
	if err != nil || len(pages) < 10 {
		t.Fatalf("man pages: %q, %v", pages, err)
	}
	for _, page := range pages {
		if client := filepath.Base(page) == "mandos-escrow-unlock.8"; client == (name == "mandos-escrow-client") {
			want["/usr/share/man/man8/"+filepath.Base(page)+".gz"] = data
		}
	}
	if name == "mandos-escrow" {
		want["/usr/bin/mandos-escrow"] = program
		want["/usr/lib/systemd/system/mandos-escrow.service"] = data
		want["/usr/lib/sysusers.d/mandos-escrow.conf"] = data
		documents, err := filepath.Glob("../docs/*.md")
		if err != nil || len(documents) < 5 {
			t.Fatalf("documents: %q, %v", documents, err)
		}
		for _, document := range documents {
			want["/usr/share/doc/mandos-escrow/"+filepath.Base(document)] = data
		}
		want["/usr/share/bash-completion/completions/mandos-escrow"] = data
		want["/usr/share/fish/vendor_completions.d/mandos-escrow.fish"] = data
		want["/usr/share/zsh/"+map[string]string{"deb": "vendor-completions", "rpm": "site-functions"}[kind]+"/_mandos-escrow"] = data
		return want
	}
	want["/"+initrd.Program] = program
	want["/usr/lib/systemd/system/mandos-escrow-agent.service"] = data
	want["/usr/lib/systemd/system/multi-user.target.wants/mandos-escrow-agent.service"] = "../mandos-escrow-agent.service"
	for folder, place := range initrd.Folders {
		err := fs.WalkDir(initrd.Files, folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			text, err := initrd.Files.ReadFile(path)
			want["/"+place+strings.TrimPrefix(path, folder)] = data
			if bytes.HasPrefix(text, []byte("#!")) {
				want["/"+place+strings.TrimPrefix(path, folder)] = program
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return want
}

// TestContents: each package holds what the source says and nothing else, with
// the same modes in both kinds. No configuration and no state is among it: what
// enroll and `server init` make is never a package's to remove.
func TestContents(t *testing.T) {
	for _, name := range packages {
		for _, kind := range []string{"deb", "rpm"} {
			got, want := contents(t, name, kind), expected(t, name, kind)
			for path, mode := range want {
				if got[path] != mode {
					t.Errorf("%s of %s: %s is %q, want %q", kind, name, path, got[path], mode)
				}
			}
			for path := range got {
				if _, known := want[path]; !known {
					t.Errorf("%s of %s holds %s, which nobody expects", kind, name, path)
				}
			}
		}
	}
}

// TestPackaged: the files are those of the source, byte for byte, and the
// programs know their version.
func TestPackaged(t *testing.T) {
	root := t.TempDir()
	for _, name := range packages {
		output(t, "dpkg-deb", "-x", file(t, dist, name, "deb"), root)
	}
	for packaged, source := range map[string]string{
		"usr/bin/mandos-escrow": "../bin/mandos-escrow",
		initrd.Program:          "../bin/mandos-escrow-unlock",
		"usr/lib/systemd/system/mandos-escrow.service":             "systemd/mandos-escrow.service",
		"usr/lib/systemd/system/mandos-escrow-agent.service":       "systemd/mandos-escrow-agent.service",
		"usr/lib/dracut/modules.d/95mandos-escrow/module-setup.sh": "../initrd/dracut/95mandos-escrow/module-setup.sh",
	} {
		got, err := os.ReadFile(filepath.Join(root, packaged))
		if err != nil {
			t.Fatal(err)
		}
		if want, err := os.ReadFile(source); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not %s (%v)", packaged, source, err)
		}
	}
	page := output(t, "gzip", "-dc", filepath.Join(root, "usr/share/man/man8/mandos-escrow-unlock.8.gz"))
	if want, err := os.ReadFile("../docs/man/mandos-escrow-unlock.8"); err != nil || page != string(want) {
		t.Errorf("the man page is another (%v)", err)
	}
	completion := filepath.Join(root, "usr/share/bash-completion/completions/mandos-escrow")
	output(t, "bash", "-n", completion)
	if text := output(t, "cat", completion); !strings.Contains(text, "__start_mandos-escrow") {
		t.Error("the completion is not one of mandos-escrow")
	}
}

func TestControl(t *testing.T) {
	arch := strings.TrimSpace(output(t, "go", "env", "GOARCH"))
	version := strings.TrimSpace(output(t, "dpkg-deb", "-f", file(t, dist, "mandos-escrow", "deb"), "Version"))
	for _, name := range packages {
		deb := file(t, dist, name, "deb")
		want := map[string]string{"Package": name, "Version": version, "Depends": "systemd | passwd", "Architecture": arch}
		if name == "mandos-escrow-client" {
			want["Depends"] = "mandos-escrow (= " + version + "), cryptsetup-bin (>= 2:2.6)"
		}
		for field, value := range want {
			if got := strings.TrimSpace(output(t, "dpkg-deb", "-f", deb, field)); got != value {
				t.Errorf("%s of %s is %q, want %q", field, name, got, value)
			}
		}
		rpm := file(t, dist, name, "rpm")
		if got := output(t, "rpm", "-qp", "--qf", "%{NAME} %{VERSION}-%{RELEASE} %{BUILDHOST}", rpm); got != name+" "+version+" reproducible" {
			t.Errorf("%s says %q", rpm, got)
		}
		requires := strings.Split(strings.TrimSpace(output(t, "rpm", "-qp", "--requires", rpm)), "\n")
		if name == "mandos-escrow-client" && !slices.Contains(requires, "mandos-escrow = "+version) {
			t.Errorf("%s requires %q", rpm, requires)
		}
		for _, script := range []string{"postinst", "postrm"} {
			path := filepath.Join(t.TempDir(), script)
			text := output(t, "dpkg-deb", "-I", deb, script)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			output(t, "sh", "-n", path)
			if !strings.Contains(output(t, "rpm", "-qp", "--scripts", rpm), strings.TrimSpace(text)) {
				t.Errorf("%s has another %s than %s", rpm, script, deb)
			}
		}
	}
}

// TestVersionsAreOrdered by dpkg and rpm as we mean them.
func TestVersionsAreOrdered(t *testing.T) {
	for i := range versions[1:] {
		older, newer := versions[i].packaged, versions[i+1].packaged
		output(t, "dpkg", "--compare-versions", older+"-1", "lt", newer+"-1")
		if got := output(t, "rpm", "--eval", fmt.Sprintf(`%%{lua: print(rpm.vercmp("%s-1", "%s-1"))}`, older, newer)); strings.TrimSpace(got) != "-1" {
			t.Errorf("rpm compares %s with %s: %s", older, newer, got)
		}
	}
}

// TestReproducible builds the programs and the packages again from a copy of the
// source elsewhere, with another umask, time zone and language.
func TestReproducible(t *testing.T) {
	copied := filepath.Join(t.TempDir(), "elsewhere")
	build := exec.Command("sh", "-ec", `
umask 077
mkdir "$1"
(cd .. && git -c safe.directory='*' ls-files -z | xargs -0 tar -cf -) | tar -xf - -C "$1"
cd "$1"
make -s build VERSION="$VERSION"
packaging/build.sh "$2"
`, "sh", copied, os.Getenv("NFPM"))
	build.Env = append(os.Environ(), "TZ=Pacific/Auckland", "LC_ALL=C.UTF-8", "MAKEFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range packages {
		for _, kind := range []string{"deb", "rpm"} {
			first, err := os.ReadFile(file(t, dist, name, kind))
			if err != nil {
				t.Fatal(err)
			}
			second, err := os.ReadFile(file(t, filepath.Join(copied, "dist"), name, kind))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(first, second) {
				t.Errorf("the %s of %s is another when it is built elsewhere", kind, name)
			}
		}
	}
}
