// Package packaging holds no code, only the tests of the packages: of their
// units and scripts here, of what `make packages` made under the build tag
// packages, and of installing it under the build tag vm.
package packaging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// output runs a program and returns what it says on standard output.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

func units(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob("systemd/*.service")
	if err != nil || len(found) != 2 {
		t.Fatalf("units: %q, %v", found, err)
	}
	return found
}

// TestUnits: systemd understands every line. The program, which is not
// installed here, is replaced.
func TestUnits(t *testing.T) {
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(t.TempDir(), filepath.Base(unit))
		if err := os.WriteFile(copied, []byte(strings.ReplaceAll(string(text), "/usr/bin/mandos-escrow ", "/bin/true ")), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", copied).CombinedOutput()
		if err != nil || len(out) != 0 {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
	}
}

// TestExposure: at most 2.0 of 10. docs/operations.md shows the same command.
func TestExposure(t *testing.T) {
	for _, unit := range units(t) {
		out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
	}
}

// TestScripts: any POSIX shell understands them.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("scripts/*/*")
	if err != nil || len(scripts) < 6 {
		t.Fatalf("scripts: %q, %v", scripts, err)
	}
	for _, script := range append(scripts, "build.sh", "version.sh") {
		output(t, "sh", "-n", script)
	}
}

// versions are what git says, what the packages say, oldest first.
var versions = []struct{ git, packaged string }{
	{"6217baf", "0~git20261125165000.6217baf"},
	{"6217baf-dirty", "0~git20261125165000.6217baf+dirty"},
	{"v1.2.0-rc1", "1.2.0~rc1"},
	{"v1.2.0-rc1-2-g6217baf", "1.2.0~rc1+2.g6217baf"},
	{"v1.2.0", "1.2.0"},
	{"v1.2.0-9-g6217baf", "1.2.0+9.g6217baf"},
	{"v1.2.0-10-g1234567", "1.2.0+10.g1234567"},
	{"v1.2.0-10-g1234567-dirty", "1.2.0+10.g1234567+dirty"},
	{"v1.2.1", "1.2.1"},
	{"1.10", "1.10"},
}

func TestVersion(t *testing.T) {
	for _, v := range versions {
		got := strings.TrimSpace(output(t, "./version.sh", v.git, fmt.Sprint(1795625400)))
		if got != v.packaged {
			t.Errorf("%s gives %q, want %q", v.git, got, v.packaged)
		}
	}
}
