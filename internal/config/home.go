package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

// ErrHome: a folder that is not an administrator's home, or not fully one.
var ErrHome = errors.New("administrator's home")

// ErrNoRequest: a home that holds no such request of its own.
var ErrNoRequest = errors.New("request")

// Home is an administrator's folder: an identity that never leaves it, the
// servers that it is known to, what those have pinned, and the one-off keys of
// open requests.
type Home struct{ Dir string }

// Membership is an administrator's place at one server.
type Membership struct {
	Server unlock.Server
	Name   string // by which the server knows this administrator
	Policy escrow.Policy
}

const (
	serversFolder  = "servers"
	requestsFolder = "requests"
)

// Make makes the home if need be, and returns its identity.
func (h Home) Make() (*identity.Key, error) {
	for _, dir := range []string{h.Dir, filepath.Join(h.Dir, serversFolder), filepath.Join(h.Dir, requestsFolder)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	return MakeKey(h.Dir)
}

// Key returns the home's identity.
func (h Home) Key() (*identity.Key, error) {
	key, err := LoadKey(h.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s has no identity yet: `mandos-escrow --home %s admin login --invite-file FILE` makes one", ErrHome, h.Dir, h.Dir)
	}
	return key, err
}

// Join keeps a membership. A server that is pinned already keeps its pin.
func (h Home) Join(m Membership) error {
	path := h.serverFile(m.Server.KeyID)
	switch old, err := readMembership(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case old.Policy.Digest() != m.Policy.Digest():
		return fmt.Errorf("%w: %s is pinned with another policy in %s", ErrHome, m.Server.Name, path)
	}
	w := record.New("mandos-escrow-membership", 1).
		Text("server", m.Server.Name).
		Text("server-key-id", string(m.Server.KeyID))
	for _, a := range m.Server.Addresses {
		w.Text("address", a)
	}
	data, err := w.Text("name", m.Name).Base64("policy", m.Policy.Bytes()).Bytes()
	if err != nil {
		return err
	}
	return Replace(path, data)
}

// Memberships lists the servers that this home is known to, by name.
func (h Home) Memberships() ([]Membership, error) {
	paths, err := filesIn(filepath.Join(h.Dir, serversFolder), ".server")
	if err != nil {
		return nil, err
	}
	var out []Membership
	for _, path := range paths {
		m, err := readMembership(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b Membership) int { return strings.Compare(a.Server.Name, b.Server.Name) })
	return out, nil
}

func readMembership(path string) (m Membership, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	in := record.Parse(data, "mandos-escrow-membership", 1, 64<<10)
	m.Server.Name = in.Text("server")
	m.Server.KeyID = identity.KeyID(hex.EncodeToString(in.Hex("server-key-id", 32)))
	m.Server.Addresses = in.Repeated("address", unlock.MaxAddresses)
	m.Name = in.Text("name")
	policy := in.Base64("policy")
	if err := in.End(); err != nil {
		return m, err
	}
	m.Policy, err = escrow.ParsePolicy(policy)
	return m, err
}

func (h Home) serverFile(id identity.KeyID) string {
	return filepath.Join(h.Dir, serversFolder, string(id)+".server")
}

// HeadFile is where the newest audit head of a server is kept.
func (h Home) HeadFile(id identity.KeyID) string {
	return filepath.Join(h.Dir, serversFolder, string(id)+".head")
}

// KeepRequest keeps the signed request and its one-off key until the release.
func (h Home) KeepRequest(id string, signed, oneOff []byte) error {
	if err := Replace(h.requestFile(id, "key"), oneOff); err != nil {
		return err
	}
	return Replace(h.requestFile(id, "request"), signed)
}

// Request returns what KeepRequest kept.
func (h Home) Request(id string) (signed, oneOff []byte, err error) {
	if signed, err = os.ReadFile(h.requestFile(id, "request")); err != nil {
		return nil, nil, err
	}
	oneOff, err = os.ReadFile(h.requestFile(id, "key"))
	return signed, oneOff, err
}

// ForgetRequest deletes a request's one-off key and the request.
func (h Home) ForgetRequest(id string) error {
	path := h.requestFile(id, "key")
	overwrite(path)
	return errors.Join(Remove(path), Remove(h.requestFile(id, "release")), Remove(h.requestFile(id, "request")))
}

// ForgetOver deletes the requests of this home that can bring nothing any more:
// their time is over, and no release of theirs waits to be delivered.
func (h Home) ForgetOver(now time.Time) error {
	paths, err := filesIn(filepath.Join(h.Dir, requestsFolder), ".request")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range paths {
		id := strings.TrimSuffix(filepath.Base(path), ".request")
		signed, err := os.ReadFile(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if request, err := recovery.ParseRequest(signed); err == nil && !now.Before(request.Expires) {
			errs = append(errs, h.ForgetUncollected(id))
		}
	}
	return errors.Join(append(errs, h.forgetLeftovers(now))...)
}

// leftoverAge is how long a request may take to be written.
const leftoverAge = 10 * time.Minute

// forgetLeftovers deletes what a command that was killed left: a one-off key
// without its request, and drafts of files.
func (h Home) forgetLeftovers(now time.Time) error {
	all, err := filesIn(filepath.Join(h.Dir, requestsFolder), "")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range all {
		info, err := os.Lstat(path)
		if err != nil || now.Sub(info.ModTime()) < leftoverAge {
			continue
		}
		id, isKey := strings.CutSuffix(path, ".key")
		_, err = os.Lstat(id + ".request")
		if isKey && errors.Is(err, fs.ErrNotExist) || strings.HasPrefix(filepath.Base(path), ".") {
			overwrite(path)
			errs = append(errs, Remove(path))
		}
	}
	return errors.Join(errs...)
}

// filesIn lists the files of a folder whose names end so; a folder that is not
// there has none. (filepath.Glob would take a folder's name for a pattern.)
func filesIn(dir, suffix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var paths []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	return paths, err
}

// ForgetUncollected is ForgetRequest, unless a release waits to be delivered.
func (h Home) ForgetUncollected(id string) error {
	if _, err := os.Lstat(h.requestFile(id, "release")); err == nil {
		return nil
	}
	return h.ForgetRequest(id)
}

func (h Home) requestFile(id, kind string) string {
	return filepath.Join(h.Dir, requestsFolder, filepath.Base(id)+"."+kind)
}

// Requests are the ids of the requests that this home waits for.
func (h Home) Requests() ([]string, error) {
	paths, err := filesIn(filepath.Join(h.Dir, requestsFolder), ".request")
	var ids []string
	for _, path := range paths {
		ids = append(ids, strings.TrimSuffix(filepath.Base(path), ".request"))
	}
	return ids, err
}

// KeepImport keeps a packet that was sealed anew, as all servers are to get it. It
// is sealed to trustees: nobody can read it here.
func (h Home) KeepImport(id string, packet []byte) error {
	path := h.importFile(id)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return Replace(path, packet)
}

// Import returns what KeepImport kept, or fs.ErrNotExist.
func (h Home) Import(id string) ([]byte, error) { return os.ReadFile(h.importFile(id)) }

func (h Home) importFile(id string) string {
	return filepath.Join(h.Dir, "imports", filepath.Base(id)+".packet")
}

// FindRequest finds a request of this home by its id or the beginning of it.
func (h Home) FindRequest(word string) (string, error) {
	ids, err := h.Requests()
	if err != nil {
		return "", err
	}
	fits := slices.DeleteFunc(ids, func(id string) bool { return word == "" || !strings.HasPrefix(id, strings.ToLower(word)) })
	switch len(fits) {
	case 0:
		return "", fmt.Errorf("%w: %s has none %q to collect; only the home that made a request can, and only once: was it released already, make a new one", ErrNoRequest, h.Dir, word)
	case 1:
		return fits[0], nil
	}
	return "", fmt.Errorf("%w: %q could be several:\n  %s", ErrNoRequest, word, strings.Join(fits, "\n  "))
}

// Destroy removes the home, with zeros in the place of its keys.
func (h Home) Destroy() error {
	for _, folder := range []string{h.Dir, filepath.Join(h.Dir, requestsFolder)} {
		paths, err := filesIn(folder, "")
		if err != nil {
			return err
		}
		for _, path := range paths {
			overwrite(path)
		}
	}
	return os.RemoveAll(h.Dir)
}

// KeepRelease keeps a release, which only the one-off key opens, until it was
// delivered.
func (h Home) KeepRelease(id string, data []byte) error {
	return Replace(h.requestFile(id, "release"), data)
}

// Release returns what KeepRelease kept; fs.ErrNotExist if nothing.
func (h Home) Release(id string) ([]byte, error) { return os.ReadFile(h.requestFile(id, "release")) }
