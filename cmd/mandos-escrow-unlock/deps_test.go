package main

import (
	"os/exec"
	"strings"
	"testing"
)

// denied says why the boot program may not link a package, or those below it.
var denied = map[string]string{
	"net/http":                      "1 MB and more, and the boot protocol needs none",
	"regexp":                        "190 KB",
	"os/exec":                       "nothing in the initramfs is started from here",
	"text/template":                 "keeps the linker from dropping unused methods",
	"html/template":                 "keeps the linker from dropping unused methods",
	"github.com/spf13":              "commands are for the other program",
	"go.etcd.io/bbolt":              "a store is for servers",
	"github.com/anatol":             "mapping is for who mounts",
	"github.com/tyler-smith":        "word lists are for recovery",
	"github.com/grandcat":           "594 KB, and no zones: unlock/discover.go is small",
	"golang.org/x/term":             "there is no terminal to speak of",
	"mandos-escrow/store":           "a store is for servers",
	"mandos-escrow/recovery":        "recovery is for people",
	"mandos-escrow/luks/cryptsetup": "starts programs",
	"mandos-escrow/internal/api":    "HTTP",
	"mandos-escrow/internal/server": "HTTP",
}

// allowedModules are all that may be linked beside the standard library.
var allowedModules = []string{
	"mandos-escrow/", "golang.org/x/crypto/", "golang.org/x/sys/", "github.com/ProtonMail/go-crypto/", "github.com/cloudflare/circl/",
	"github.com/hashicorp/vault/shamir/", "github.com/emmansun/gmsm/sm3/", "github.com/jzelinskie/whirlpool/", "golang.org/x/net/dns/dnsmessage/",
}

func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, out)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("go list names only %q", deps)
	}
	for _, dep := range deps {
		for bad, why := range denied {
			if dep == bad || strings.HasPrefix(dep, bad+"/") {
				t.Errorf("links %s: %s", dep, why)
			}
		}
		if first, _, _ := strings.Cut(dep, "/"); (strings.Contains(first, ".") || first == "mandos-escrow") && !allowed(dep) {
			t.Errorf("links %s, which nobody allowed", dep)
		}
	}
}

func allowed(dep string) bool {
	for _, prefix := range allowedModules {
		if strings.HasPrefix(dep+"/", prefix) {
			return true
		}
	}
	return false
}
