package server

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAPIDocument holds docs/api.md to the table of routes and to the audit
// actions of this package.
func TestAPIDocument(t *testing.T) {
	data, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(data)
	row := regexp.MustCompile("(?m)^\\| `((?:GET|POST|PUT|DELETE) [^`]+)` \\| (\\w+) \\| ([ur]?) ?\\| ?`?([a-z.]*)`? ?\\|$")
	documented := map[string][]string{}
	for _, m := range row.FindAllStringSubmatch(page, -1) {
		if documented[m[1]] != nil {
			t.Errorf("docs/api.md has %s twice", m[1])
		}
		documented[m[1]] = m[2:]
	}
	names := map[access]string{anyone: "anyone", machines: "machine", viewer: "viewer", helpdesk: "helpdesk", approver: "approver", admin: "admin", local: "local"}
	for _, rt := range routes {
		mark := ""
		switch {
		case rt.unconfirmed:
			mark = "u"
		case rescueRoutes[rt.pattern]:
			mark = "r"
		}
		want := []string{names[rt.access], mark, rt.refusal}
		if got := documented[rt.pattern]; strings.Join(got, "|") != strings.Join(want, "|") {
			t.Errorf("docs/api.md says of %s %q, the table of routes %q", rt.pattern, got, want)
		}
		delete(documented, rt.pattern)
		if !strings.Contains(page, "\n- `"+rt.pattern) && !strings.Contains(page, ", `"+rt.pattern+"`: ") {
			t.Errorf("docs/api.md does not describe %s", rt.pattern)
		}
	}
	for pattern := range documented {
		t.Errorf("docs/api.md has %s, which is no route", pattern)
	}
	for _, action := range auditActions(t) {
		if !strings.Contains(page, "`"+action+"`") {
			t.Errorf("docs/api.md lacks the audit action %s", action)
		}
	}
}

// auditActions are the names of actions in this package's source.
func auditActions(t *testing.T) []string {
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	action := regexp.MustCompile(`"((?:server|backup|master|admin|token|machine|packet|recover|rescue|boot|alarm|policy)\.[a-z.]+)"`)
	var found []string
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range action.FindAllStringSubmatch(string(data), -1) {
			if m[1] != settingsFile {
				found = append(found, m[1])
			}
		}
	}
	if len(found) < 20 {
		t.Fatalf("only %d audit actions found: is the pattern still right?", len(found))
	}
	return found
}
