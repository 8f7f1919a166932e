package api

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"sync"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
)

// Names of the headers of our own.
const (
	HeaderHead = "Mandos-Escrow-Head" // in replies: the signed head
	HeaderSeen = "Mandos-Escrow-Seen" // in requests: the newest that was seen
	HeaderSize = "Mandos-Escrow-Size" // in replies that are files: bytes that follow
)

// ErrSetBack: the server shows an older state than it has shown before.
var ErrSetBack = errors.New("the server shows an older audit log than it has shown before: its store was set back; nothing more is sent to it")

// Witness keeps the newest head that a server has shown, in a file, and shows
// it to the server with every call.
type Witness struct {
	// Warn, if set, is told when the server was set back and an administrator
	// let it serve again.
	Warn func(text string)

	path   string
	server identity.KeyID
	mu     sync.Mutex
}

// NewWitness keeps the head of the server with this key ID in a file.
func NewWitness(path string, server identity.KeyID) *Witness {
	return &Witness{path: path, server: server}
}

// Seen returns the newest head seen; the zero Head if none was.
func (w *Witness) Seen(server identity.Public) (store.Head, error) {
	signed, err := os.ReadFile(w.path)
	if errors.Is(err, fs.ErrNotExist) {
		return store.Head{}, nil
	}
	if err != nil {
		return store.Head{}, err
	}
	return store.VerifyHead(signed, server)
}

// Kept returns the newest head seen, without a server's key at hand to check
// the signature again; the file lies in the caller's own folder.
func (w *Witness) Kept() (store.Head, error) { return kept(w.path) }

// Before returns the last head that was seen before a server was set back and
// confirmed; the zero Head if that was never, or was acknowledged.
func (w *Witness) Before() (store.Head, error) { return kept(w.beforePath()) }

// Acknowledge forgets the head that Before returns.
func (w *Witness) Acknowledge() error { return config.Remove(w.beforePath()) }

func (w *Witness) beforePath() string { return w.path + ".before" }

func kept(path string) (store.Head, error) {
	signed, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return store.Head{}, nil
	}
	if err != nil {
		return store.Head{}, err
	}
	return store.ParseHead(signed)
}

// show adds the newest head to a call, and returns it. A damaged file is found
// before anything is sent.
func (w *Witness) show(h http.Header) ([]byte, error) {
	signed, err := os.ReadFile(w.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		_, err = store.ParseHead(signed)
	}
	if err != nil {
		return nil, fmt.Errorf("audit head that was seen last, %s: %w", w.path, err)
	}
	h.Set(HeaderSeen, base64.StdEncoding.EncodeToString(signed))
	return signed, nil
}

// see checks the head of a reply against the one that was shown with the call,
// and keeps the newest. It does not compare with what another call has kept
// meanwhile: replies may overtake each other. A refusal may lack a head, being
// one of a stranger; what was served once a head is known may not.
func (w *Witness) see(reply *http.Response, shown []byte) error {
	text := reply.Header.Get(HeaderHead)
	switch {
	case reply.TLS == nil:
		return nil
	case text == "" && shown != nil && reply.StatusCode == http.StatusOK:
		return fmt.Errorf("%w (it shows none at all)", ErrSetBack)
	case text == "":
		return nil
	}
	key, err := identity.PeerKey(*reply.TLS)
	if err != nil {
		return err
	}
	signed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return fmt.Errorf("audit head: %w", err)
	}
	head, err := store.VerifyHead(signed, key)
	if err != nil {
		return err
	}
	if before, err := store.VerifyHead(shown, key); err == nil && reply.StatusCode != CodeUnconfirmed.Status() {
		if before.Newer(head) || head.Epoch == before.Epoch && head.Seq == before.Seq && head.Hash != before.Hash {
			return ErrSetBack
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	newest, err := w.Seen(key)
	if err != nil || !head.Newer(newest) {
		return err
	}
	if newest.Seq > 0 && head.Epoch > newest.Epoch {
		if err := w.rememberBefore(); err != nil {
			return err
		}
	}
	return config.Replace(w.path, signed)
}

// rememberBefore keeps the last head of an epoch that is over: a new epoch lets
// the server show a shorter log, and this head tells what is missing in it.
func (w *Witness) rememberBefore() error {
	if w.Warn != nil {
		w.Warn("the server was set back, and an administrator let it serve again; `mandos-escrow audit verify` tells what its log has lost")
	}
	if _, err := os.Lstat(w.beforePath()); err == nil {
		return nil // an older loss, not acknowledged yet
	}
	last, err := os.ReadFile(w.path)
	if err != nil {
		return err
	}
	return config.Replace(w.beforePath(), last)
}
