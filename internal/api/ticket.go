package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

// ErrTicket: a token or an invite that was mistyped, cut or changed.
var ErrTicket = errors.New("not a whole token or invite: it was cut, mistyped or changed")

const (
	maxTicket  = 64 << 10
	checkBytes = 8 // of the SHA-256 behind the record: catches typing, not attackers
)

// Token lets machines enroll. Each server is sent only its own secret.
// Threshold and the servers' trustees are what a policy 1 is made of when
// tokens of several servers are merged (Merge).
type Token struct {
	PolicyDigest [32]byte
	Threshold    int
	BootOf       int // servers that give the boot passphrase back; 0: Threshold, or all when they are fewer
	Servers      []TokenServer
}

// TokenServer is one server's part of a token.
type TokenServer struct {
	unlock.Server
	Trustees []string // `FINGERPRINT NAME`, as a policy has them
	Keys     [][]byte // the trustees' public OpenPGP keys, binary, in that order; none in tokens of old servers
	Secret   []byte   // 16 random bytes
}

// BootThreshold is how many of the token's servers give a machine its boot
// passphrase back.
func (t Token) BootThreshold() int {
	if t.BootOf > 0 {
		return t.BootOf
	}
	return min(t.Threshold, len(t.Servers))
}

// Text is the token as people and kickstart files carry it: one line.
func (t Token) Text() (string, error) {
	w := record.New("mandos-escrow-token", 1).Hex("policy-sha256", t.PolicyDigest[:]).Uint("threshold", uint64(t.Threshold))
	if t.BootOf > 0 {
		w.Uint("boot-threshold", uint64(t.BootOf))
	}
	for _, s := range t.Servers {
		addServer(w, s.Server)
		for _, trustee := range s.Trustees {
			w.Text("trustee", trustee)
		}
		for _, key := range s.Keys {
			w.Base64("trustee-key", key)
		}
		w.Hex("secret", s.Secret)
	}
	return ticketText("met1.", w)
}

// ParseToken reads a token's text.
func ParseToken(text []byte) (*Token, error) {
	body, err := ticketBody("met1.", text)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	in := record.Parse(body, "mandos-escrow-token", 1, maxTicket)
	var t Token
	copy(t.PolicyDigest[:], in.Hex("policy-sha256", 32))
	t.Threshold = int(min(in.Uint("threshold"), 255))
	if in.Next("boot-threshold") {
		if t.BootOf = int(min(in.Uint("boot-threshold"), 255)); t.BootOf == 0 {
			in.Fail("boot-threshold", "it is 0")
		}
	}
	for in.Next("server") && len(t.Servers) < 32 {
		s := TokenServer{Server: readServer(in), Trustees: in.Repeated("trustee", 32)}
		for in.Next("trustee-key") && len(s.Keys) < 32 {
			s.Keys = append(s.Keys, in.Base64("trustee-key"))
		}
		if len(s.Keys) != 0 && len(s.Keys) != len(s.Trustees) {
			in.Fail("trustee-key", "not as many as there are trustees")
		}
		s.Secret = in.Hex("secret", 16)
		t.Servers = append(t.Servers, s)
	}
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTicket, err)
	}
	switch {
	case len(t.Servers) == 0:
		return nil, fmt.Errorf("%w: it names no server", ErrTicket)
	case t.BootThreshold() > len(t.Servers):
		return nil, fmt.Errorf("%w: boot threshold %d of %d servers", ErrTicket, t.BootThreshold(), len(t.Servers))
	}
	return &t, nil
}

// Invite lets one administrator make an identity of their own at one server.
type Invite struct {
	PolicyDigest [32]byte
	Server       unlock.Server
	Name         string
	Secret       []byte
}

// Text is the invite as one line.
func (i Invite) Text() (string, error) {
	w := record.New("mandos-escrow-invite", 1).Hex("policy-sha256", i.PolicyDigest[:])
	addServer(w, i.Server)
	w.Text("name", i.Name).Hex("secret", i.Secret)
	return ticketText("mei1.", w)
}

// ParseInvite reads an invite's text.
func ParseInvite(text []byte) (*Invite, error) {
	body, err := ticketBody("mei1.", text)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	in := record.Parse(body, "mandos-escrow-invite", 1, maxTicket)
	var i Invite
	copy(i.PolicyDigest[:], in.Hex("policy-sha256", 32))
	i.Server = readServer(in)
	i.Name = in.Text("name")
	i.Secret = in.Hex("secret", 16)
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTicket, err)
	}
	return &i, nil
}

func addServer(w *record.Writer, s unlock.Server) {
	w.Text("server", s.Name).Text("server-key-id", string(s.KeyID))
	for _, a := range s.Addresses {
		w.Text("address", a)
	}
}

func readServer(in *record.Reader) unlock.Server {
	s := unlock.Server{Name: in.Text("server"), KeyID: identity.KeyID(hex.EncodeToString(in.Hex("server-key-id", 32)))}
	s.Addresses = in.Repeated("address", 8)
	if len(s.Addresses) == 0 {
		in.Fail("address", "a server needs at least one")
	}
	for _, a := range s.Addresses {
		if err := unlock.CheckAddress(a); err != nil {
			in.Fail("address", err.Error())
		}
	}
	return s
}

func ticketText(prefix string, w *record.Writer) (string, error) {
	body, err := w.Bytes()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(body)
	return prefix + base64.RawURLEncoding.EncodeToString(append(body, sum[:checkBytes]...)), nil
}

// ticketBody undoes ticketText. White space is dropped: people paste tokens
// over several lines.
func ticketBody(prefix string, text []byte) ([]byte, error) {
	packed := strings.Join(strings.Fields(string(text)), "")
	encoded, found := strings.CutPrefix(packed, prefix)
	if !found {
		return nil, fmt.Errorf("%w: it does not begin with %s", ErrTicket, prefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(raw) <= checkBytes {
		return nil, ErrTicket
	}
	body, check := raw[:len(raw)-checkBytes], raw[len(raw)-checkBytes:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:checkBytes], check) {
		return nil, ErrTicket
	}
	return body, nil
}
