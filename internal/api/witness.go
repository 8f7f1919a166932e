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

// Names of the headers that carry signed heads.
const (
	HeaderHead = "Mandos-Escrow-Head" // in replies
	HeaderSeen = "Mandos-Escrow-Seen" // in requests
)

// ErrSetBack: the server shows an older state than it has shown before.
var ErrSetBack = errors.New("the server shows an older audit log than it has shown before: its store was set back; nothing more is sent to it")

// Witness keeps the newest head that a server has shown, in a file, and shows
// it to the server with every call.
type Witness struct {
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
func (w *Witness) Kept() (store.Head, error) {
	signed, err := os.ReadFile(w.path)
	if errors.Is(err, fs.ErrNotExist) {
		return store.Head{}, nil
	}
	if err != nil {
		return store.Head{}, err
	}
	return store.ParseHead(signed)
}

// show adds the newest head to a call, and returns it.
func (w *Witness) show(h http.Header) []byte {
	signed, err := os.ReadFile(w.path)
	if err != nil {
		return nil
	}
	h.Set(HeaderSeen, base64.StdEncoding.EncodeToString(signed))
	return signed
}

// see checks the head of a reply against the one that was shown with the call,
// and keeps the newest. It does not compare with what another call has kept
// meanwhile: replies may overtake each other. A stranger's reply has no head.
func (w *Witness) see(reply *http.Response, shown []byte) error {
	text := reply.Header.Get(HeaderHead)
	if text == "" || reply.TLS == nil {
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
	if newest, err := w.Seen(key); err != nil || !head.Newer(newest) {
		return err
	}
	return config.Replace(w.path, signed)
}
