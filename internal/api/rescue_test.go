package api

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/unlock"
)

func rescueInvite(servers int) RescueInvite {
	i := RescueInvite{Volume: "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"}
	for n := range servers {
		digit := string("0123456789abcdef"[n%16])
		s := RescueServer{
			Server: unlock.Server{Name: "srv", KeyID: identity.KeyID(strings.Repeat(digit, 64)), Addresses: []string{"srv1.example.org:7625"}},
			Secret: bytes.Repeat([]byte{byte(n)}, 16),
		}
		s.PolicyDigest[0] = byte(n)
		i.Servers = append(i.Servers, s)
	}
	return i
}

func TestRescueInvite(t *testing.T) {
	for n, lines := range map[int]int{1: 5, 2: 10, 3: 14, 5: 22} {
		i := rescueInvite(n)
		text, err := i.Text()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseRescueInvite([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if second, err := again.Text(); err != nil || second != text {
			t.Errorf("%d servers: it changed: %s, %v", n, second, err)
		}
		typed, err := i.Typed()
		if err != nil {
			t.Fatal(err)
		}
		written := escrow.Lines(typed)
		if len(written) != lines {
			t.Errorf("%d servers take %d lines", n, len(written))
		}
		data, err := escrow.ParseLines([]byte(strings.Join(written, "\n")))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseTypedRescue(data)
		if err != nil {
			t.Fatal(err)
		}
		if parsed.Servers[0].Name != "srv1.example.org:7625" {
			t.Errorf("a server is called %q", parsed.Servers[0].Name)
		}
		for j := range parsed.Servers {
			parsed.Servers[j].Name = "srv"
		}
		if second, err := parsed.Text(); err != nil || second != text {
			t.Errorf("%d servers: typed, it changed: %s, %v", n, second, err)
		}
		// without the last line, the check at the end is missing
		if data, err := escrow.ParseLines([]byte(strings.Join(written[:len(written)-1], "\n"))); err == nil {
			if _, err := ParseTypedRescue(data); !errors.Is(err, ErrTicket) {
				t.Errorf("%d servers without the last line: %v", n, err)
			}
		}
	}
}

func TestRescueInviteDamaged(t *testing.T) {
	i := rescueInvite(2)
	text, err := i.Text()
	if err != nil {
		t.Fatal(err)
	}
	typed, err := i.Typed()
	if err != nil {
		t.Fatal(err)
	}
	for at := range typed {
		for _, broken := range [][]byte{typed[:at], bytes.Join([][]byte{typed[:at], {typed[at] ^ 4}, typed[at+1:]}, nil)} {
			if _, err := ParseTypedRescue(broken); !errors.Is(err, ErrTicket) {
				t.Fatalf("typed, byte %d: %v", at, err)
			}
		}
	}
	for at := range text {
		if _, err := ParseRescueInvite([]byte(text[:at])); !errors.Is(err, ErrTicket) {
			t.Fatalf("cut at %d: %v", at, err)
		}
	}
	twice, upper, none := rescueInvite(2), rescueInvite(1), rescueInvite(0)
	twice.Servers[1].KeyID = twice.Servers[0].KeyID
	upper.Volume = strings.ToUpper(upper.Volume)
	for name, i := range map[string]RescueInvite{"a server twice": twice, "upper case": upper, "no server": none} {
		text, err := i.Text()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseRescueInvite([]byte(text)); !errors.Is(err, ErrTicket) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := i.Typed(); !errors.Is(err, ErrTicket) {
			t.Errorf("%s, typed: %v", name, err)
		}
	}
	invite, err := (Invite{Server: i.Servers[0].Server, Name: "bob", Secret: make([]byte, 16)}).Text()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseRescueInvite([]byte(invite)); !errors.Is(err, ErrTicket) {
		t.Errorf("an administrator's invite: %v", err)
	}
}

func FuzzRescueInvite(f *testing.F) {
	for _, n := range []int{1, 3} {
		i := rescueInvite(n)
		text, err := i.Text()
		typed, err2 := i.Typed()
		if err != nil || err2 != nil {
			f.Fatal(err, err2)
		}
		f.Add([]byte(text))
		f.Add(typed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if i, err := ParseRescueInvite(data); err == nil {
			if text, err := i.Text(); err != nil {
				t.Errorf("%q is read and not written: %v", data, err)
			} else if _, err := ParseRescueInvite([]byte(text)); err != nil {
				t.Errorf("%q: %v", text, err)
			}
		}
		if i, err := ParseTypedRescue(data); err == nil {
			if again, err := i.Typed(); err != nil || !bytes.Equal(again, data) {
				t.Errorf("%x is written as %x, %v", data, again, err)
			}
		}
	})
}
