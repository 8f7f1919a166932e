package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

var update = flag.Bool("update", false, "write testdata anew")

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func testServer(n byte) unlock.Server {
	return unlock.Server{
		Name: "srv" + string('0'+n), KeyID: identity.KeyID(strings.Repeat("0"+string('0'+n), 32)),
		Addresses: []string{"192.0.2.1:7625", "[2001:db8::1]:7625"},
	}
}

func testToken() Token {
	return Token{PolicyDigest: [32]byte{7}, Threshold: 2, Servers: []TokenServer{
		{testServer(1), []string{strings.Repeat("AB", 20) + " master of srv1"}, nil, bytes.Repeat([]byte{1}, 16)},
		{testServer(2), nil, nil, bytes.Repeat([]byte{2}, 16)},
	}}
}

func testInvite() Invite {
	return Invite{PolicyDigest: [32]byte{7}, Server: testServer(1), Name: "alice", Secret: bytes.Repeat([]byte{3}, 16)}
}

// golden compares with a file: what was handed out must stay readable.
func golden(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, []byte(text+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if file, err := os.ReadFile(path); err != nil || string(file) != text+"\n" {
		t.Errorf("%s is not what is written today: %v\n%s", path, err, text)
	}
}

func TestTokenAndInviteAreFrozen(t *testing.T) {
	token := must(testToken().Text())
	golden(t, "token", token)
	if got, err := ParseToken([]byte(token)); err != nil || !reflect.DeepEqual(*got, testToken()) {
		t.Errorf("%+v, %v", got, err)
	}
	invite := must(testInvite().Text())
	golden(t, "invite", invite)
	if got, err := ParseInvite([]byte(invite)); err != nil || !reflect.DeepEqual(*got, testInvite()) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{token, invite} {
		if strings.ContainsAny(text, " \t\n'\"$\\`+/=") {
			t.Errorf("%q must be quoted in a shell or a kickstart", text)
		}
	}
}

func parsers() map[string]func([]byte) error {
	return map[string]func([]byte) error{
		must(testToken().Text()):  func(text []byte) error { _, err := ParseToken(text); return err },
		must(testInvite().Text()): func(text []byte) error { _, err := ParseInvite(text); return err },
	}
}

func TestEveryMistypedCharacter(t *testing.T) {
	for text, parse := range parsers() {
		for i := range text {
			for _, c := range []byte{text[i] ^ 1, text[i] ^ 0x20, 'x', ' ', '\n', 0, 0xff} {
				if c == text[i] {
					continue
				}
				changed := []byte(text)
				changed[i] = c
				if err := parse(changed); !errors.Is(err, ErrTicket) {
					t.Errorf("character %d (%q) as %q: %v", i, text[i], c, err)
				}
			}
			if err := parse([]byte(text[:i])); !errors.Is(err, ErrTicket) {
				t.Errorf("cut to %d: %v", i, err)
			}
			if err := parse([]byte(text[:i] + text[i+1:])); !errors.Is(err, ErrTicket) {
				t.Errorf("without character %d: %v", i, err)
			}
			if i > 0 && text[i] != text[i-1] {
				swapped := []byte(text)
				swapped[i], swapped[i-1] = swapped[i-1], swapped[i]
				if err := parse(swapped); !errors.Is(err, ErrTicket) {
					t.Errorf("%d and %d swapped: %v", i-1, i, err)
				}
			}
		}
		if err := parse([]byte(text + "A")); !errors.Is(err, ErrTicket) {
			t.Errorf("one more character: %v", err)
		}
	}
}

// People paste tokens over several lines.
func TestWhiteSpaceIsDropped(t *testing.T) {
	for text, parse := range parsers() {
		var broken strings.Builder
		for i, c := range text {
			if i > 0 && i%64 == 0 {
				broken.WriteString("\r\n  ")
			}
			broken.WriteRune(c)
		}
		for _, form := range []string{" " + text + "\n", broken.String()} {
			if err := parse([]byte(form)); err != nil {
				t.Errorf("%q: %v", form, err)
			}
		}
	}
}

func TestOneIsNotTheOther(t *testing.T) {
	if _, err := ParseToken([]byte(must(testInvite().Text()))); !errors.Is(err, ErrTicket) {
		t.Errorf("an invite as a token: %v", err)
	}
	if _, err := ParseInvite([]byte(must(testToken().Text()))); !errors.Is(err, ErrTicket) {
		t.Errorf("a token as an invite: %v", err)
	}
}

// ticket packs a record, right or wrong, with a right check.
func ticket(prefix, text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return []byte(prefix + base64.RawURLEncoding.EncodeToString(append([]byte(text), sum[:checkBytes]...)))
}

func unpack(text string) string {
	raw := must(base64.RawURLEncoding.DecodeString(text[strings.IndexByte(text, '.')+1:]))
	return string(raw[:len(raw)-checkBytes])
}

// The check is against typing, so what is inside is judged too. One fault each.
func TestWrongContent(t *testing.T) {
	token, invite := unpack(must(testToken().Text())), unpack(must(testInvite().Text()))
	replace := func(text, old, replacement string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(text, old, replacement, 1)
	}
	secondServer := strings.LastIndex(token, "server: ")
	for name, text := range map[string]string{
		"version 2":       replace(token, "token: 1", "token: 2"),
		"no server":       token[:strings.Index(token, "server: ")],
		"no address":      replace(replace(token, "address: 192.0.2.1:7625\n", ""), "address: [2001:db8::1]:7625\n", ""),
		"no port":         replace(token, "192.0.2.1:7625", "192.0.2.1"),
		"nine addresses":  replace(token, "address: 192.0.2.1:7625\n", strings.Repeat("address: a:1\n", 9)),
		"short key ID":    replace(token, "key-id: 01", "key-id: "),
		"upper case":      replace(token, strings.Repeat("01", 32), "0A"+strings.Repeat("01", 31)),
		"short secret":    replace(token, "secret: 01", "secret: "),
		"no secret":       token[:strings.LastIndex(token, "secret: ")],
		"33 servers":      token[:secondServer] + strings.Repeat(token[secondServer:], 32),
		"more":            token + "more: 1\n",
		"boots with none": replace(token, "threshold: 2\n", "threshold: 2\nboot-threshold: 0\n"),
		"boots with 3":    replace(token, "threshold: 2\n", "threshold: 2\nboot-threshold: 3\n"),
		"two keys for 1":  replace(token, "master of srv1\n", "master of srv1\ntrustee-key: AAAA\ntrustee-key: AAAA\n"),
		"a key of nobody": replace(token, "secret: 0202", "trustee-key: AAAA\nsecret: 0202"),
		"control in name": replace(token, "srv1", "srv\x1b1"),
		"empty":           "",
	} {
		if got, err := ParseToken(ticket("met1.", text)); !errors.Is(err, ErrTicket) {
			t.Errorf("token, %s: %+v, %v", name, got, err)
		}
	}
	for name, text := range map[string]string{
		"version 2": replace(invite, "invite: 1", "invite: 2"),
		"no name":   replace(invite, "name: alice\n", ""),
		"no secret": invite[:strings.Index(invite, "secret: ")],
		"more":      invite + "more: 1\n",
	} {
		if got, err := ParseInvite(ticket("mei1.", text)); !errors.Is(err, ErrTicket) {
			t.Errorf("invite, %s: %+v, %v", name, got, err)
		}
	}
	if _, err := ParseToken(ticket("met1.", token)); err != nil {
		t.Errorf("unchanged: %v", err)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(must(testToken().Text()))
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken([]byte(text))
		if err != nil {
			if !errors.Is(err, ErrTicket) {
				t.Fatal(err)
			}
			return
		}
		if again, err := token.Text(); err != nil || again != strings.Join(strings.Fields(text), "") {
			t.Fatalf("another spelling: %v\n%s\n%s", err, text, again)
		}
	})
}

func FuzzParseInvite(f *testing.F) {
	f.Add(must(testInvite().Text()))
	f.Fuzz(func(t *testing.T, text string) {
		invite, err := ParseInvite([]byte(text))
		if err != nil {
			if !errors.Is(err, ErrTicket) {
				t.Fatal(err)
			}
			return
		}
		if again, err := invite.Text(); err != nil || again != strings.Join(strings.Fields(text), "") {
			t.Fatalf("another spelling: %v\n%s\n%s", err, text, again)
		}
	})
}

func TestRegistration(t *testing.T) {
	boot, running, other := must(identity.Generate()), must(identity.Generate()), must(identity.Generate())
	good := Registration{Name: "laptop7", MachineIDHash: strings.Repeat("ab", 32), Boot: boot.Public(), Running: running.KeyID()}
	signed := must(good.Sign(boot))
	got, err := ParseRegistration(signed, running.KeyID())
	if err != nil || !reflect.DeepEqual(*got, good) {
		t.Fatalf("%+v, %v", got, err)
	}
	sign := func(change func(*Registration), by *identity.Key) []byte {
		r := good
		change(&r)
		return must(r.Sign(by))
	}
	for name, c := range map[string]struct {
		data    []byte
		running identity.KeyID
	}{
		"sent by another running identity": {signed, other.KeyID()},
		"signed by another":                {resign(signed, other), running.KeyID()},
		"one key for both":                 {sign(func(r *Registration) { r.Running = boot.KeyID() }, boot), boot.KeyID()},
		"long name":                        {sign(func(r *Registration) { r.Name = strings.Repeat("x", MaxName+1) }, boot), running.KeyID()},
		"no hash":                          {sign(func(r *Registration) { r.MachineIDHash = "ab" }, boot), running.KeyID()},
		"no key ID":                        {sign(func(r *Registration) { r.Running = "ab" }, boot), "ab"},
		"after its end":                    {append(bytes.Clone(signed), "x: y\n"...), running.KeyID()},
		"empty":                            {nil, running.KeyID()},
	} {
		if got, err := ParseRegistration(c.data, c.running); !errors.Is(err, ErrRegistration) || got != nil {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for i := range signed {
		changed := bytes.Clone(signed)
		changed[i] ^= 1
		if _, err := ParseRegistration(changed, running.KeyID()); !errors.Is(err, ErrRegistration) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if _, err := ParseRegistration(signed[:i], running.KeyID()); !errors.Is(err, ErrRegistration) {
			t.Errorf("cut to %d: %v", i, err)
		}
	}
	if _, err := (Registration{Name: "a\nb", MachineIDHash: good.MachineIDHash, Running: good.Running}).Sign(boot); err == nil {
		t.Error("a name of two lines was signed")
	}
}

// resign makes another key's signature under the same body.
func resign(signed []byte, by *identity.Key) []byte {
	body := signed[:bytes.Index(signed, []byte("signature: "))]
	var w record.Writer
	return bytes.Clone(must(w.Raw(body).Base64("signature", by.Sign("registration", body)).Bytes()))
}
