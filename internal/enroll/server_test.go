package enroll

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks"
	"mandos-escrow/store"
)

// TestServerGone stops the server after each checkpoint; the enrolment fails,
// and succeeds when it is there again.
func TestServerGone(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, step := range []string{"identities", "registered", "journal", "uploaded", "added the recovery slot", "boot configuration", "committed at the server"} {
		t.Run(step, func(t *testing.T) {
			m := newMachine(t, s, luks.Type2)
			o, err := m.job().options()
			if err != nil {
				t.Fatal(err)
			}
			o.Checkpoint = func(reached string) {
				if reached == step {
					s.stop()
				}
			}
			_, err = Run(t.Context(), o)
			if needsServer := step != "committed at the server"; errors.Is(err, api.ErrUnreachable) != needsServer {
				t.Errorf("got %v", err)
			}
			s.start(t)
			mustRun(t, m.job())
			m.check(t, true, userSlot, colleagueSlot)
		})
	}
}

// TestNoServer: what is wrong on this side is found without any server.
func TestNoServer(t *testing.T) {
	t.Parallel()
	var asked atomic.Bool
	key, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	address := fakeServer(t, key, func(http.ResponseWriter, *http.Request) { asked.Store(true) })
	m := newMachine(t, sharedSite(t), luks.Type2)
	m.token = tokenFor(t, key.KeyID(), address, [32]byte{})
	for name, change := range map[string]func(*job){
		"root is missing":    func(j *job) { j.Root += "/missing" },
		"root is a file":     func(j *job) { j.Root = m.disks[0] },
		"a wrong name":       func(j *job) { j.Name = "two\nlines" },
		"a long name":        func(j *job) { j.Name = strings.Repeat("n", 101) },
		"wrong passphrase":   func(j *job) { j.Passphrase = []byte("wrong") },
		"no volume":          func(j *job) { j.Devices = []string{m.root} },
		"no cryptsetup":      func(j *job) { j.Cryptsetup = m.root + "/cryptsetup" },
		"two servers":        func(j *job) { j.Token = twoServers(t, j.Token) },
		"volume named twice": func(j *job) { j.Devices = append(j.Devices, m.disks[0]) },
	} {
		j := m.job()
		change(&j)
		t.Run(name, func(t *testing.T) { m.refused(t, j, nil) })
	}
	if asked.Load() {
		t.Error("the server was asked")
	}
	if exists(m.root + "/missing") {
		t.Error("the root folder was made")
	}
}

func twoServers(t *testing.T, text string) string {
	t.Helper()
	token, err := api.ParseToken([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	token.Servers = append(token.Servers, token.Servers[0])
	out, err := token.Text()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestCorruptServer: a server that has the right TLS key cannot make a machine
// seal to anybody whom the token does not vouch for.
func TestCorruptServer(t *testing.T) {
	t.Parallel()
	key, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	good, evil := armoredKey(t), armoredKey(t)
	policy := policyOf(t, 1, good)
	two := policyOf(t, 1, good, evil)
	for name, c := range map[string]struct {
		shown api.Policy
		want  error
	}{
		"another policy":     {api.Policy{Policy: policyOf(t, 1, evil), Keys: []string{evil}}, ErrPolicy},
		"a policy of two":    {api.Policy{Policy: two, Keys: []string{good, evil}}, ErrPolicy},
		"no policy":          {api.Policy{Keys: []string{good}}, escrow.ErrPolicy},
		"another key":        {api.Policy{Policy: policy, Keys: []string{evil}}, ErrPolicy},
		"two keys":           {api.Policy{Policy: policy, Keys: []string{good, evil}}, ErrPolicy},
		"no key":             {api.Policy{Policy: policy}, ErrPolicy},
		"two keys in one":    {api.Policy{Policy: policy, Keys: []string{splice(t, good, evil, 0)}}, seal.ErrKey},
		"its own subkey":     {api.Policy{Policy: policy, Keys: []string{splice(t, good, evil, 14)}}, seal.ErrKey},
		"not a key":          {api.Policy{Policy: policy, Keys: []string{"key"}}, seal.ErrKey},
		"a changed policy":   {api.Policy{Policy: policy + "\n", Keys: []string{good}}, escrow.ErrPolicy},
		"a policy of 1 of 2": {api.Policy{Policy: policyOf(t, 2, good, evil), Keys: []string{good, evil}}, ErrPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			var after atomic.Bool
			address := fakeServer(t, key, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/v1/enroll" {
					after.Store(true)
				}
				if err := json.NewEncoder(w).Encode(c.shown); err != nil {
					t.Error(err)
				}
			})
			m := newMachine(t, sharedSite(t), luks.Type2)
			m.token = tokenFor(t, key.KeyID(), address, hash([]byte(policy)))
			m.refused(t, m.job(), c.want)
			if after.Load() || exists(m.running()+"/policy") {
				t.Error("it went on")
			}
		})
	}
}

func armoredKey(t *testing.T) string {
	t.Helper()
	key, err := seal.Generate("trustee", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.Public().Armor()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func policyOf(t *testing.T, threshold int, keys ...string) string {
	t.Helper()
	var trustees []escrow.Trustee
	for _, text := range keys {
		key, err := seal.ParsePublic([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		trustees = append(trustees, escrow.Trustee{Fingerprint: key.Fingerprint(), Name: "trustee"})
	}
	policy, err := escrow.NewPolicy(1, threshold, nil, trustees)
	if err != nil {
		t.Fatal(err)
	}
	return string(policy.Bytes())
}

// splice joins two armored keys (RFC 4880, section 4.2): all of the first, or
// what comes before its first packet with that tag, and the second from its
// first packet with that tag.
func splice(t *testing.T, first, second string, tag byte) string {
	t.Helper()
	a, b := unarmor(t, first), unarmor(t, second)
	if tag == 0 {
		return rearmor(append(a, b...))
	}
	return rearmor(append(a[:packetAt(t, a, tag)], b[packetAt(t, b, tag):]...))
}

func unarmor(t *testing.T, text string) []byte {
	t.Helper()
	_, body, _ := strings.Cut(text, "\n\n")
	body, _, _ = strings.Cut(body, "\n-----END")
	if i := strings.LastIndex(body, "\n="); i >= 0 {
		body = body[:i]
	}
	data, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(body, "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func rearmor(data []byte) string {
	return "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n" + base64.StdEncoding.EncodeToString(data) + "\n-----END PGP PUBLIC KEY BLOCK-----\n"
}

func packetAt(t *testing.T, data []byte, tag byte) int {
	t.Helper()
	for at := 0; at+2 < len(data); {
		if data[at]&0xc0 != 0xc0 || data[at+1] >= 224 {
			t.Fatal("not a packet with a short header of the new format")
		}
		if data[at]&0x3f == tag {
			return at
		}
		if n := int(data[at+1]); n < 192 {
			at += 2 + n
		} else {
			at += 3 + (n-192)<<8 + int(data[at+2]) + 192
		}
	}
	t.Fatalf("no packet with tag %d", tag)
	return 0
}

func TestWrongServerKey(t *testing.T) {
	t.Parallel()
	pinned, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, sharedSite(t), luks.Type1)
	m.token = tokenFor(t, pinned.KeyID(), m.site.address, [32]byte{})
	m.refused(t, m.job(), identity.ErrPin)
}

// TestTokens: those that do not let a machine in.
func TestTokens(t *testing.T) {
	t.Parallel()
	s := sharedSite(t)
	for name, spoil := range map[string]func(t *testing.T, m *machine){
		"foreign": func(t *testing.T, m *machine) {
			token, err := api.ParseToken([]byte(m.token))
			if err != nil {
				t.Fatal(err)
			}
			token.Servers[0].Secret = bytes.Repeat([]byte{7}, 16)
			if m.token, err = token.Text(); err != nil {
				t.Fatal(err)
			}
		},
		"expired": func(t *testing.T, m *machine) {
			s.changeToken(t, m.token, func(token *store.Token) { token.Expires = time.Now().Add(-time.Second) })
		},
		"revoked": func(t *testing.T, m *machine) {
			s.changeToken(t, m.token, func(token *store.Token) { token.Revoked = true })
		},
		"used by another machine": func(t *testing.T, m *machine) {
			other := newMachine(t, s, luks.Type1)
			other.token = m.token
			mustRun(t, other.job())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, s, luks.Type1)
			spoil(t, m)
			m.refused(t, m.job(), nil)
			if _, err := run(t, m.job()); api.CodeOf(err) != api.CodeRefused {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestOtherServer: a machine that is enrolled goes to no other server.
func TestOtherServer(t *testing.T) {
	t.Parallel()
	other := newSite(t)
	for _, noBoot := range []bool{false, true} {
		m := newMachine(t, sharedSite(t), luks.Type1)
		j := m.job()
		j.NoBoot = noBoot
		mustRun(t, j)
		j.Token = other.token(t)
		m.refused(t, j, ErrOther)
		m.token, m.site = j.Token, other
		if m.asked(t) {
			t.Error("the other server was asked")
		}
	}
}

// TestOtherPolicy: a token of the same server names another policy.
func TestOtherPolicy(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	token, err := api.ParseToken([]byte(m.token))
	if err != nil {
		t.Fatal(err)
	}
	m.token = tokenFor(t, token.Servers[0].KeyID, m.site.address, hash([]byte("another policy")))
	m.refused(t, m.job(), ErrOther)
}

// TestRemovedMachine: what an administrator removed is enrolled anew with a new
// token, and boots; a disabled one stays disabled.
func TestRemovedMachine(t *testing.T) {
	t.Parallel()
	for _, noBoot := range []bool{false, true} {
		m := newMachine(t, sharedSite(t), luks.Type2)
		j := m.job()
		j.NoBoot = noBoot
		mustRun(t, j)
		m.change(t, api.Change{Remove: true})
		j.Token = m.site.token(t)
		mustRun(t, j)
		m.check(t, !noBoot, userSlot, colleagueSlot)
		if r := m.record(t); !r.Enabled {
			t.Errorf("disabled: %s", r.DisabledBecause)
		}
		disable := false
		m.change(t, api.Change{Enable: &disable})
		j.Remove = true
		mustRun(t, j)
		if r := m.record(t); r.Enabled {
			t.Error("enrolling again revived a disabled machine")
		}
	}
}

// TestLostJournal: whoever enrols the same volume as the same machine without
// naming the packet before may be a copy: both are held, and it is said.
func TestLostJournal(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	first := m.journal(t, 0)
	if err := config.Remove(m.journalPath(0)); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m.job())
	second := m.journal(t, 0)
	verified := m.site.entries(t, identityOf(t, m.boot()).Key.KeyID(), m.uuids[0])[escrow.Verified]
	if len(verified) != 2 || !strings.Contains(strings.Join(m.audit(t), " "), "alarm.fork") {
		t.Errorf("%d packets, audit log %v", len(verified), m.audit(t))
	}
	if h := header(t, m.disks[0]); len(h.Slots) != 6 {
		t.Errorf("%d keyslots: those of the lost journal cannot be told from others", len(h.Slots))
	}
	if r := mustRun(t, m.job())[0]; !r.Already || r.Packet != second.packet || first.packet == second.packet {
		t.Errorf("afterwards: %+v", r)
	}
}

// TestSetBack: the server has the packet before the newest again.
func TestSetBack(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	first := m.journal(t, 0)
	m.site.lose(t, first.packet)
	mustRun(t, m.job())
	second := m.journal(t, 0)
	j := m.job()
	j.Remove = true
	mustRun(t, j) // replaces the second
	third := m.journal(t, 0)
	if third.supersedes != second.packet {
		t.Fatalf("the third packet replaces %s", third.supersedes)
	}
	s := m.check(t, true, colleagueSlot)[0]
	m.site.lose(t, third.packet)
	m.site.update(t, func(tx *store.Tx) error {
		e, err := tx.Entry(second.packet)
		if err != nil {
			return err
		}
		e.State, e.SupersededBy, e.ObsoleteAt = escrow.Verified, "", time.Time{}
		return tx.PutEntry(e)
	})
	j.Passphrase, j.Remove = s.recovery, false
	mustRun(t, j)
	m.check(t, true, colleagueSlot)
}

// TestCopiedMachine: a copy of the whole disk with a new machine-id is told
// what to do.
func TestCopiedMachine(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	if err := config.Replace(m.root+"/etc/machine-id", []byte("0123456789abcdef0123456789abcdef\n")); err != nil {
		t.Fatal(err)
	}
	m.refused(t, m.job(), nil)
	if _, err := run(t, m.job()); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "another machine-id") {
		t.Errorf("got %v", err)
	}
}
