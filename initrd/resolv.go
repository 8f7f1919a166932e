package initrd

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// maxNameServers is what resolvers read of resolv.conf(5).
const maxNameServers = 3

// resolver keeps name servers in a resolv.conf that was absent or empty; somebody else's is left alone.
type resolver struct {
	path    string
	existed bool   // empty
	wrote   string // what stands there now; empty: nothing of ours
}

// set writes the name servers. Go's resolver looks at the file again after five seconds.
func (r *resolver) set(servers []netip.Addr) error {
	var text strings.Builder
	for _, s := range servers[:min(len(servers), maxNameServers)] {
		fmt.Fprintf(&text, "nameserver %s\n", s)
	}
	if text.String() == r.wrote || !r.ours() {
		return nil
	}
	if text.Len() == 0 {
		return r.restore()
	}
	// What reads the file meanwhile must not find half of it.
	temporary := r.path + ".mandos-escrow"
	err := os.WriteFile(temporary, []byte(text.String()), 0o644)
	if err == nil {
		err = os.Rename(temporary, r.path)
	}
	if err != nil {
		_ = os.Remove(temporary)
		return fmt.Errorf("initrd: name servers: %w", err)
	}
	r.wrote = text.String()
	return nil
}

// ours: what stands there is what was found empty, or what was written last.
func (r *resolver) ours() bool {
	info, err := os.Lstat(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	data, err := os.ReadFile(r.path)
	if r.wrote == "" && err == nil && len(data) == 0 {
		r.existed = true
	}
	return err == nil && string(data) == r.wrote
}

// restore puts back what was there.
func (r *resolver) restore() error {
	if r.wrote == "" || !r.ours() {
		return nil
	}
	r.wrote = ""
	if r.existed {
		return os.Truncate(r.path, 0)
	}
	if err := os.Remove(r.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// distinct are the addresses without those that came before.
func distinct(list []netip.Addr) []netip.Addr {
	var found []netip.Addr
	for _, a := range list {
		if !slices.Contains(found, a) {
			found = append(found, a)
		}
	}
	return found
}
