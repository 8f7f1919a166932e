// Package house holds no code, only the test of how the packages of this
// module may depend on each other. .golangci.yml holds the same for the
// linter; this holds it for everybody who runs the tests.
package house

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "mandos-escrow"

// outside is what rooms and leaves may not reach, not even by way of others.
var outside = []string{
	"go.etcd.io/bbolt", "github.com/spf13/cobra", "net/http", "os/exec",
	module + "/store", module + "/cmd", module + "/internal/api", module + "/internal/server", module + "/internal/enroll", module + "/internal/config", module + "/internal/sheet", module + "/internal/bootimage",
	module + "/luks/cryptsetup",
}

var rooms = []string{"escrow", "escrow/volumekey", "unlock", "recovery", "luks", "luks/content"}

var leaves = []string{"internal/record", "internal/seal", "internal/secret", "internal/identity", "internal/certkey"}

// sole names the only package, or the only file, that may import another
// module. Its own tests may, too.
var sole = map[string]string{
	"codeberg.org/go-pdf/fpdf":        "internal/sheet",
	"github.com/ProtonMail/go-crypto": "internal/seal",
	"github.com/anatol/luks.go":       "luks/dmcrypt",
	"github.com/aead/serpent":         "luks/content",
	"github.com/dgryski/go-camellia":  "luks/content",
	"lukechampine.com/adiantum":       "luks/content",
	"github.com/boombuler/barcode":    "internal/sheet",
	"github.com/hashicorp/vault":      "escrow/shares.go",
	"github.com/tyler-smith/go-bip39": "recovery",
	"go.etcd.io/bbolt":                "store",
	"github.com/spf13/cobra":          "cmd/mandos-escrow",
	"github.com/rogpeppe/go-internal": "cmd/mandos-escrow",
	"golang.org/x/net":                "unlock",
	"github.com/grandcat/zeroconf":    "internal/server/announce.go",
	"golang.org/x/term":               "cmd/mandos-escrow",
	"github.com/youmark/pkcs8":        "internal/certkey/certkey.go",
}

// TestRoomsReachNothingOutside: nor does initrd, an edge, because the boot
// program links it.
func TestRoomsReachNothingOutside(t *testing.T) {
	for _, room := range append(rooms, "initrd") {
		for _, dep := range dependencies(t, room) {
			if within(dep, outside) {
				t.Errorf("%s reaches %s", room, dep)
			}
		}
	}
}

func TestLeavesReachNoRoom(t *testing.T) {
	for _, leaf := range leaves {
		for _, dep := range dependencies(t, leaf) {
			name, ours := strings.CutPrefix(dep, module+"/")
			if within(dep, outside) || ours && !within(name, leaves) {
				t.Errorf("%s reaches %s", leaf, dep)
			}
		}
	}
}

// dependencies are all packages that one links.
func dependencies(t *testing.T, dir string) []string {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "./"+dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v: %s", dir, err, stderr.Bytes())
	}
	deps := strings.Fields(string(out))
	if len(deps) < 10 {
		t.Fatalf("%s links only %q: that is not all of it", dir, deps)
	}
	return deps
}

func within(pkg string, list []string) bool {
	for _, l := range list {
		if pkg == l || strings.HasPrefix(pkg, l+"/") {
			return true
		}
	}
	return false
}

func TestSoleImporters(t *testing.T) {
	seen := map[string]bool{}
	for file, imports := range sourceImports(t) {
		for _, imported := range imports {
			for pkg, home := range sole {
				if !within(imported, []string{pkg}) {
					continue
				}
				seen[pkg] = true
				if path.Dir(file) != home && file != home && file != strings.TrimSuffix(home, ".go")+"_test.go" {
					t.Errorf("%s imports %s, which only %s may", file, imported, home)
				}
			}
		}
	}
	for pkg, home := range sole {
		if !seen[pkg] {
			t.Errorf("nothing imports %s, which %s is allowed: take it off the list", pkg, home)
		}
	}
}

// sourceImports parses every Go file of this module, whatever its build tags.
func sourceImports(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(".", func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && file != "." && strings.HasPrefix(entry.Name(), "."):
			return fs.SkipDir
		case entry.IsDir() || path.Ext(file) != ".go":
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		found[filepath.ToSlash(file)] = nil
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			found[filepath.ToSlash(file)] = append(found[filepath.ToSlash(file)], imported)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestFewDependencies: every line of go.sum is code that somebody has to trust.
func TestFewDependencies(t *testing.T) {
	const most = 150
	data, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(data, []byte("\n")); lines == 0 || lines >= most {
		t.Errorf("go.sum has %d lines; fewer than %d are wanted", lines, most)
	}
}
