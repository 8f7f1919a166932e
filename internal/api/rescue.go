package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

// RescueInvite lets a rescue system, which has no identity, ask for the packet of
// one volume. Each server is sent only its own secret.
type RescueInvite struct {
	Volume  string // UUID
	Servers []RescueServer
}

// RescueServer is one server's part of a rescue invite.
type RescueServer struct {
	unlock.Server
	PolicyDigest [32]byte
	Secret       []byte // 16 random bytes
}

const (
	rescuePrefix  = "mer1."
	rescueVersion = 1 // of the typed form
	maxRescue     = 32
	typedCheck    = 4 // of the SHA-256 behind the typed form
)

// Text is the rescue invite as one line.
func (i RescueInvite) Text() (string, error) {
	w := record.New("mandos-escrow-rescue-invite", 1).Text("volume-uuid", i.Volume)
	defer w.Wipe()
	for _, s := range i.Servers {
		addServer(w, s.Server)
		w.Hex("policy-sha256", s.PolicyDigest[:]).Hex("secret", s.Secret)
	}
	return ticketText(rescuePrefix, w)
}

// ParseRescueInvite reads the one-line form.
func ParseRescueInvite(text []byte) (*RescueInvite, error) {
	body, err := ticketBody(rescuePrefix, text)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	in := record.Parse(body, "mandos-escrow-rescue-invite", 1, maxTicket)
	i := RescueInvite{Volume: in.Text("volume-uuid")}
	for in.Next("server") && len(i.Servers) < maxRescue {
		s := RescueServer{Server: readServer(in)}
		copy(s.PolicyDigest[:], in.Hex("policy-sha256", len(s.PolicyDigest)))
		s.Secret = in.Hex("secret", 16)
		i.Servers = append(i.Servers, s)
	}
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTicket, err)
	}
	return &i, i.check()
}

// check refuses what no command of ours makes.
func (i RescueInvite) check() error {
	switch {
	case !record.IsUUID(i.Volume) || strings.ToLower(i.Volume) != i.Volume:
		return fmt.Errorf("%w: volume %q", ErrTicket, i.Volume)
	case len(i.Servers) == 0:
		return fmt.Errorf("%w: it names no server", ErrTicket)
	}
	seen := map[identity.KeyID]bool{}
	for _, s := range i.Servers {
		if seen[s.KeyID] {
			return fmt.Errorf("%w: it names a server twice", ErrTicket)
		}
		seen[s.KeyID] = true
	}
	return nil
}

// Wipe clears the secrets.
func (i RescueInvite) Wipe() {
	for _, s := range i.Servers {
		clear(s.Secret)
	}
}

// Typed is the rescue invite in few bytes, to be typed. The names of the servers
// are not in it.
func (i RescueInvite) Typed() ([]byte, error) {
	uuid, err := hex.DecodeString(strings.ReplaceAll(i.Volume, "-", ""))
	if err != nil || i.check() != nil {
		return nil, fmt.Errorf("%w: volume %q", ErrTicket, i.Volume)
	}
	out := append([]byte{rescueVersion}, uuid...)
	for _, s := range i.Servers {
		id, err := hex.DecodeString(string(s.KeyID))
		if err != nil || len(id) != 32 || len(s.Secret) != 16 || len(s.Addresses) == 0 || len(s.Addresses) > unlock.MaxAddresses {
			return nil, fmt.Errorf("%w: server %q", ErrTicket, s.Name)
		}
		out = append(append(append(out, id...), s.PolicyDigest[:]...), s.Secret...)
		out = append(out, byte(len(s.Addresses)))
		for _, a := range s.Addresses {
			if len(a) > 255 {
				return nil, fmt.Errorf("%w: address %q is too long to be typed", ErrTicket, a)
			}
			out = append(append(out, byte(len(a))), a...)
		}
	}
	sum := sha256.Sum256(out)
	return append(out, sum[:typedCheck]...), nil
}

// ParseTypedRescue reads the bytes that were typed.
func ParseTypedRescue(data []byte) (*RescueInvite, error) {
	end := len(data) - typedCheck
	if end < 0 {
		return nil, fmt.Errorf("%w: its end is missing", ErrTicket)
	}
	if sum := sha256.Sum256(data[:end]); !bytes.Equal(sum[:typedCheck], data[end:]) {
		return nil, fmt.Errorf("%w: its end is missing, or lines of several invites were mixed", ErrTicket)
	}
	in := &bytesReader{rest: data[:end]}
	if version := in.take(1); in.bad || version[0] != rescueVersion {
		return nil, fmt.Errorf("%w: another version", ErrTicket)
	}
	var i RescueInvite
	if uuid := hex.EncodeToString(in.take(16)); !in.bad {
		i.Volume = uuid[:8] + "-" + uuid[8:12] + "-" + uuid[12:16] + "-" + uuid[16:20] + "-" + uuid[20:]
	}
	for !in.bad && len(in.rest) > 0 && len(i.Servers) < maxRescue {
		i.Servers = append(i.Servers, in.server())
	}
	if in.bad || len(in.rest) > 0 {
		return nil, fmt.Errorf("%w: it is no rescue invite", ErrTicket)
	}
	return &i, i.check()
}

// bytesReader takes bytes apart; the first fault sticks.
type bytesReader struct {
	rest []byte
	bad  bool
}

// take is the next n bytes, a copy; zeros after a fault.
func (r *bytesReader) take(n int) []byte {
	if r.bad || len(r.rest) < n {
		r.bad = true
		return make([]byte, n)
	}
	out := bytes.Clone(r.rest[:n:n])
	r.rest = r.rest[n:]
	return out
}

func (r *bytesReader) server() (s RescueServer) {
	s.KeyID = identity.KeyID(hex.EncodeToString(r.take(32)))
	copy(s.PolicyDigest[:], r.take(len(s.PolicyDigest)))
	s.Secret = r.take(16)
	count := int(r.take(1)[0])
	if count == 0 || count > unlock.MaxAddresses {
		r.bad = true
	}
	for range count {
		a := string(r.take(int(r.take(1)[0])))
		if r.bad || unlock.CheckAddress(a) != nil {
			r.bad = true
			return s
		}
		s.Addresses = append(s.Addresses, a)
	}
	if !r.bad {
		s.Name = s.Addresses[0]
	}
	return s
}
