package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// upload makes and uploads a next packet of an enrolled machine's volume.
func (s *site) upload(h *host, volume, supersedes string) error {
	s.t.Helper()
	master, _ := siteMaster()
	header := escrow.Header{
		Supersedes: supersedes, Machine: h.name, KeyID: h.boot.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: volume},
	}
	payload := &escrow.PassphrasePayload{Passphrase: []byte(sitePassphrase), Slot: 1, LUKSType: "luks2"}
	h.packet = must(escrow.Make(header, s.policy(), []*seal.PublicKey{master.Public()}, []escrow.Payload{payload}, h.running, time.Now()))
	return h.Call(s.t.Context(), "PUT", "/v1/self/volumes/"+volume, api.Upload{Packet: h.packet, Blob: h.blob}, nil)
}

// again is upload, and its commit.
func (s *site) again(h *host, volume, supersedes string) error {
	s.t.Helper()
	if err := s.upload(h, volume, supersedes); err != nil {
		return err
	}
	return h.Call(s.t.Context(), "POST", "/v1/self/volumes/"+volume+"/commit", api.Commit{Packet: h.packetID(), Boot: true}, nil)
}

func (s *site) packetNow(id string) (p api.Packet) {
	s.t.Helper()
	s.local("GET", "/v1/packets/"+id, nil, &p)
	return p
}

func (s *site) setLife(group, lifetime, retention string) {
	s.t.Helper()
	l, r := must(unlock.ParseDuration(lifetime)), must(unlock.ParseDuration(retention))
	s.local("PUT", "/v1/lives", api.SetLife{Group: group, Lifetime: &l, Retention: &r}, nil)
}

func (h *host) self(t *testing.T) api.MachineVolume {
	t.Helper()
	var out []api.MachineVolume
	if err := h.Call(t.Context(), "GET", "/v1/self", nil, &out); err != nil || len(out) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	return out[0]
}

func (s *site) status() (st api.Status) {
	s.t.Helper()
	s.local("GET", "/v1/status", nil, &st)
	return st
}

// A packet that expired, by its lifetime or by somebody's word, is due, is told
// to its machine, and is released all the same; the next one is not due, but its
// volume still has the key that may be known.
func TestExpiredIsDueAndReleased(t *testing.T) {
	s := newSite(t)
	h, other := s.enroll("laptop7", siteVolume), s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	s.setLife("", "P30D", "PT0S")
	if p := s.packetNow(h.packetID()); p.State != escrow.Verified || len(p.Due) != 0 {
		t.Errorf("new: %s, due %v", p.State, p.Due)
	}
	s.offset.Store(int64(31 * 24 * time.Hour))
	if p := s.packetNow(other.packetID()); p.State != escrow.Expired || !slices.Equal(p.Due, []string{api.DueRotate}) {
		t.Errorf("too old: %s, due %v", p.State, p.Due)
	}
	if v := h.self(t); !v.Expired || v.Reencrypt || v.Revealed || !v.RotateDue() {
		t.Errorf("the machine is told %+v", v)
	}
	s.offset.Store(0)
	var done api.Expired
	s.local("POST", "/v1/packets/expire", api.Expire{Machine: "laptop7"}, &done)
	if done.Packets != 1 || !slices.Contains(s.actions(h.packetID()), "packet.expire") {
		t.Errorf("%d packets, %v", done.Packets, s.actions(h.packetID()))
	}
	if v := h.self(t); !v.Expired || !v.Reencrypt {
		t.Errorf("the machine is told %+v", v)
	}
	if p := s.packetNow(h.packetID()); p.State != escrow.Expired || !slices.Equal(p.Due, []string{api.DueRotate, api.DueReencrypt}) {
		t.Errorf("%s, due %v", p.State, p.Due)
	}
	if st := s.status(); st.RotateDue != 1 || st.ReencryptDue != 1 || st.Unproved != 0 || st.Packets != 2 || st.Machines != 2 {
		t.Errorf("%+v", st)
	}
	asked := s.person("hugo", "helpdesk").file(s, h)
	if err := s.person("anna", "approver").approve(asked, h); err != nil {
		t.Fatal(err)
	}
	if _, err := s.people["hugo"].collect(asked); err != nil {
		t.Errorf("an expired packet: %v", err)
	}
	events := s.audit()
	release := events[slices.IndexFunc(events, func(e store.Event) bool { return e.Action == "recover.release" })]
	if release.Detail != "passphrase to hugo, approved by anna: forgot it" || release.Actor != "admin:hugo" || release.Machine != string(h.boot.KeyID()) {
		t.Errorf("%+v", release)
	}
	if err := s.again(h, siteVolume, h.packetID()); err != nil {
		t.Fatal(err)
	}
	if v := h.self(t); v.Expired || v.Revealed || !v.Reencrypt {
		t.Errorf("after a new packet the machine is told %+v", v)
	}
	before := h.packetID()
	if err := s.upload(h, siteVolume, before); err != nil {
		t.Fatal(err)
	}
	if err := h.Call(t.Context(), "POST", "/v1/self/volumes/"+siteVolume+"/commit", api.Commit{Packet: h.packetID(), Boot: true, NewVolumeKey: true}, nil); err != nil {
		t.Fatal(err)
	}
	if v := h.self(t); v.Reencrypt {
		t.Errorf("after re-encryption the machine is told %+v", v)
	}
	s.local("POST", "/v1/packets/expire", api.Expire{Packet: h.packetID()}, nil)
	s.local("POST", "/v1/packets/"+h.packetID()+"/reencrypted", nil, nil)
	if v := h.self(t); v.Reencrypt || !v.Expired {
		t.Errorf("after an administrator's word the machine is told %+v", v)
	}
}

// That a volume's key may be known is true whatever becomes of packets: it is over
// when somebody says that the volume has another key, and not before.
func TestReencryptDueOutlivesPackets(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	remove := func() {
		s.local("DELETE", "/v1/packets/"+h.packetID(), api.Delete{ID: h.packetID(), Newest: true}, nil)
	}
	s.local("POST", "/v1/packets/expire", api.Expire{Machine: "laptop7"}, nil)
	remove()
	must(0, s.again(h, siteVolume, ""))
	if v := h.self(t); !v.Reencrypt || v.Expired {
		t.Errorf("after deleting the expired packet: %+v", v)
	}
	remove()
	must(0, h.Call(t.Context(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: h.packet, Blob: h.blob}, nil))
	must(0, h.Call(t.Context(), "POST", "/v1/self/volumes/"+siteVolume+"/commit", api.Commit{Packet: h.packetID(), Boot: true}, nil))
	if v := h.self(t); !v.Reencrypt {
		t.Errorf("after the deleted one came again: %+v", v)
	}
	s.local("POST", "/v1/packets/"+h.packetID()+"/reencrypted", nil, nil)
	remove()
	must(0, s.again(h, siteVolume, ""))
	if v := h.self(t); v.Reencrypt {
		t.Errorf("after somebody's word: %+v", v)
	}
}

// A volume key that is released from a packet that was replaced meanwhile is that of
// the packet in use.
func TestVolumeKeyOfReplacedPacket(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	old := h.packetID()
	must(0, s.again(h, siteVolume, old))
	releaseKey := func() {
		must(0, s.server.store.Update(func(tx *store.Tx) error {
			e, err := tx.Entry(old)
			return errors.Join(err, reveal(tx, e, escrow.ForVolumeKey, s.now()), tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "test"}))
		}))
	}
	releaseKey()
	if v := h.self(t); !v.Reencrypt || v.Revealed {
		t.Errorf("%+v", v)
	}
	s.local("POST", "/v1/packets/"+h.packetID()+"/reencrypted", nil, nil)
	releaseKey()
	if v := h.self(t); v.Reencrypt {
		t.Errorf("the key of before: %+v", v)
	}
}

func TestExpireWords(t *testing.T) {
	s := newSite(t)
	one := s.enroll("laptop7", siteVolume)
	two := s.enroll("laptop7", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	expire := func(in api.Expire) error { return s.control.Call(t.Context(), "POST", "/v1/packets/expire", in, nil) }
	wantCode(t, "nothing", expire(api.Expire{}), api.CodeUsage)
	wantCode(t, "two", expire(api.Expire{Machine: "laptop7", Group: "x"}), api.CodeUsage)
	wantCode(t, "two machines", expire(api.Expire{Machine: "laptop7"}), api.CodeAmbiguous)
	wantCode(t, "nobody's group", expire(api.Expire{Group: "x"}), api.CodeNotFound)
	wantCode(t, "no packet", expire(api.Expire{Packet: strings.Repeat("0", 32)}), api.CodeNotFound)
	group := "laptops"
	s.change(two, api.Change{Set: &api.MachineSettings{Group: &group}})
	if err := expire(api.Expire{Group: group}); err != nil {
		t.Fatal(err)
	}
	if a, b := s.packetNow(one.packetID()), s.packetNow(two.packetID()); a.State != escrow.Verified || b.State != escrow.Expired {
		t.Errorf("%s, %s", a.State, b.State)
	}
}

// One is deleted by its id, twice and whole; held ones are refused, and the
// newest unless it is named as such. What was deleted says so.
func TestDelete(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	first, firstBytes := h.packetID(), h.packet
	if err := s.again(h, siteVolume, first); err != nil {
		t.Fatal(err)
	}
	del := func(id string, in api.Delete) error {
		return s.control.Call(t.Context(), "DELETE", "/v1/packets/"+id, in, nil)
	}
	wantCode(t, "the beginning", del(first[:8], api.Delete{ID: first[:8]}), api.CodeNotFound)
	wantCode(t, "another id", del(first, api.Delete{ID: h.packetID()}), api.CodeUsage)
	wantCode(t, "no id", del(first, api.Delete{}), api.CodeUsage)
	s.local("POST", "/v1/packets/"+first+"/hold", api.Hold{Hold: true}, nil)
	wantCode(t, "held", del(first, api.Delete{ID: first, Newest: true}), api.CodeRefused)
	s.local("POST", "/v1/packets/"+first+"/hold", api.Hold{}, nil)
	hold := true
	s.local("PUT", "/v1/lives", api.SetLife{Hold: &hold}, nil)
	if !s.packetNow(first).Held {
		t.Error("not shown as held with its group")
	}
	wantCode(t, "its group held", del(first, api.Delete{ID: first, Newest: true}), api.CodeRefused)
	hold = false
	s.local("PUT", "/v1/lives", api.SetLife{Hold: &hold}, nil)
	wantCode(t, "the newest", del(h.packetID(), api.Delete{ID: h.packetID()}), api.CodeRefused)
	if err := del(first, api.Delete{ID: first}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "twice", del(first, api.Delete{ID: first}), api.CodeNotFound)
	if p := s.packetNow(first); p.State != escrow.Purged || p.PurgedAt.IsZero() || p.SupersededBy != h.packetID() {
		t.Errorf("%+v", p)
	}
	for name, err := range map[string]error{
		"export":   s.control.Stream(t.Context(), "/v1/packets/"+first+"/file", &strings.Builder{}),
		"recover":  s.control.Call(t.Context(), "GET", "/v1/recoverable?volume="+first, nil, nil),
		"hold":     s.control.Call(t.Context(), "POST", "/v1/packets/"+first+"/hold", api.Hold{Hold: true}, nil),
		"obsolete": s.control.Call(t.Context(), "POST", "/v1/packets/"+first+"/obsolete", nil, nil),
		"request": s.person("hugo", "helpdesk").Call(t.Context(), "POST", "/v1/requests", api.Signed{
			Signed: newAsk(s.people["hugo"], &host{packet: firstBytes}, escrow.ForPassphrase, time.Hour, s.now()).signed,
		}, nil),
	} {
		if api.CodeOf(err) != api.CodeNotFound || !strings.Contains(err.Error(), "was purged on") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if actions := s.actions(first); actions[len(actions)-1] != "packet.delete" {
		t.Errorf("%v", actions)
	}
	if err := del(h.packetID(), api.Delete{ID: h.packetID(), Newest: true}); err != nil {
		t.Errorf("the newest, named: %v", err)
	}
	err := s.control.Call(t.Context(), "GET", "/v1/recoverable?volume=laptop7", nil, nil)
	if api.CodeOf(err) != api.CodeNotFound || !strings.Contains(err.Error(), "was purged on") {
		t.Error(err)
	}
	master, _ := siteMaster()
	other, deleted := *h, h.packet
	other.packet = must(escrow.Make(escrow.Header{
		ID: h.packetID(), Machine: h.name, KeyID: h.boot.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: siteVolume},
	}, s.policy(), []*seal.PublicKey{master.Public()}, []escrow.Payload{&escrow.PassphrasePayload{Passphrase: []byte(sitePassphrase), Slot: 1, LUKSType: "luks2"}}, h.running, time.Now()))
	wantCode(t, "another with its id", h.Call(t.Context(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: other.packet}, nil), api.CodeConflict)
	if err := h.Call(t.Context(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: deleted}, nil); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if p := s.packetNow(h.packetID()); p.State != escrow.Pending {
		t.Errorf("the same again is %s", p.State)
	}
	if err := s.again(h, siteVolume, ""); err != nil {
		t.Errorf("a new packet: %v", err)
	}
	if st := s.status(); st.Packets != 2 || st.Unproved != 0 {
		t.Errorf("%+v", st)
	}
}

// The server's own timer purges what is obsolete for longer than its retention,
// at the start and every hour, and nothing that is held, newest, or asked for.
func TestPurgeByTimer(t *testing.T) {
	siteMaster()
	dir := filepath.Join(t.TempDir(), "srv")
	newState(t, dir)
	synctest.Test(t, func(t *testing.T) {
		state := must(OpenState(dir))
		defer state.Close()
		start := time.Now()
		entries := map[string]func(*escrow.Entry){
			"old":      func(e *escrow.Entry) {},
			"held":     func(e *escrow.Entry) { e.Hold = true },
			"grouped":  func(e *escrow.Entry) { e.Group = "lawyers" },
			"only one": func(e *escrow.Entry) { e.Volume.UUID = "3f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff" },
			"lately":   func(e *escrow.Entry) { e.ObsoleteAt = start.Add(90 * time.Minute) },
			"in use": func(e *escrow.Entry) {
				e.State, e.Stored, e.ObsoleteAt = escrow.Verified, start.Add(time.Minute), time.Time{}
			},
		}
		must(0, state.Store.Update(func(tx *store.Tx) error {
			for name, change := range entries {
				e, data := storedPacket(name, "keyid", siteVolume, start)
				e.State, e.ObsoleteAt = escrow.Obsolete, start
				change(&e)
				if err := tx.PutPacket(e, data); err != nil {
					return err
				}
			}
			lives := escrow.Lives{"": {Retention: 2 * time.Hour}, "lawyers": {Retention: time.Hour, Hold: true}}
			return errors.Join(store.Lives.Put(tx, lives), tx.Audit(store.Event{Time: start, Actor: "test", Action: "test"}))
		}))
		srv := New(state, slog.New(slog.DiscardHandler), time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go srv.sweepPackets(ctx)
		for _, step := range []struct {
			at   time.Duration
			want string
		}{{time.Hour, ""}, {2*time.Hour + time.Second, "old"}, {5 * time.Hour, "lately old"}, {1000 * time.Hour, "lately old"}} {
			time.Sleep(time.Until(start.Add(step.at)))
			synctest.Wait()
			var gone []string
			must(0, state.Store.View(func(tx *store.Tx) error {
				for e, err := range tx.Entries() {
					if err != nil {
						return err
					}
					if e.State == escrow.Purged {
						gone = append(gone, e.ID)
					}
				}
				return nil
			}))
			if got := strings.Join(gone, " "); got != step.want {
				t.Errorf("after %s: %q, want %q", step.at, got, step.want)
			}
		}
		purges := 0
		must(0, state.Store.View(func(tx *store.Tx) error {
			for _, e := range must(tx.AuditFrom(1, 100)) {
				if e.Action == "packet.purge" && e.Actor == "server" && e.Packet != "" {
					purges++
				}
			}
			return nil
		}))
		if purges != 2 {
			t.Errorf("%d entries in the audit log", purges)
		}
		cancel()
		synctest.Wait()
	})
}

// A server that was set back purges nothing before somebody confirmed it; a
// packet that somebody asks for waits until that is over.
func TestPurgeWaits(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	first := *h
	if err := s.again(h, siteVolume, h.packetID()); err != nil {
		t.Fatal(err)
	}
	s.setLife("", "PT0S", "PT1H")
	later := s.now().Add(2 * time.Hour)
	due, err := s.server.toPurge(later)
	if err != nil || !slices.Equal(due, []string{first.packetID()}) {
		t.Fatalf("due: %v, %v", due, err)
	}
	asked := newAsk(s.person("hugo", "helpdesk"), &first, escrow.ForPassphrase, 6*time.Hour, s.now())
	if err := s.people["hugo"].Call(t.Context(), "POST", "/v1/requests", api.Signed{Signed: asked.signed}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.server.purge(later); err != nil || s.packetNow(first.packetID()).State != escrow.Obsolete {
		t.Errorf("asked for: %s, %v", s.packetNow(first.packetID()).State, err)
	}
	err = s.server.store.Update(func(tx *store.Tx) error {
		return errors.Join(purgeAll(tx, due, later), tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "test"}))
	})
	if err != nil || s.packetNow(first.packetID()).State != escrow.Obsolete {
		t.Errorf("asked for after it was found to be due: %s, %v", s.packetNow(first.packetID()).State, err)
	}
	set := func(why string) {
		must(0, s.server.store.Update(func(tx *store.Tx) error {
			return errors.Join(store.Unconfirmed.Put(tx, why), tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "test"}))
		}))
	}
	later = later.Add(24 * time.Hour) // the request is over
	set("set back")
	if err := s.server.purge(later); err != nil || s.packetNow(first.packetID()).State != escrow.Obsolete {
		t.Errorf("unconfirmed: %s, %v", s.packetNow(first.packetID()).State, err)
	}
	set("")
	if err := s.server.purge(later); err != nil || s.packetNow(first.packetID()).State != escrow.Purged || s.packetNow(h.packetID()).State != escrow.Verified {
		t.Errorf("%s, %v", s.packetNow(first.packetID()).State, err)
	}
}

// Machines that were set up anew, renamed or removed: their packets stay, and are
// found by the UUID, by the names they had and have, and by the key ID.
func TestNeverOrphaned(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	anew := s.enroll("laptop7", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff") // the same machine-id, other keys and UUID
	for _, x := range []*host{h, anew} {
		if p := s.packetNow(x.packetID()); p.State != escrow.Verified || p.Hold {
			t.Errorf("%s, held %t", p.State, p.Hold)
		}
	}
	if slices.Contains(s.actions(anew.packetID()), "alarm.fork") {
		t.Error("a reinstalled machine raised an alarm")
	}
	finds := func(word string, want *host) {
		t.Helper()
		var head api.PacketHead
		err := s.control.Call(t.Context(), "GET", "/v1/recoverable?volume="+word, nil, &head)
		if err != nil || head.Digest != hexDigest(want.packet) {
			t.Errorf("%s: another packet, %v", word, err)
		}
	}
	wantCode(t, "two of one name", s.control.Call(t.Context(), "GET", "/v1/recoverable?volume=laptop7", nil, nil), api.CodeAmbiguous)
	name := "laptop9"
	s.change(anew, api.Change{Set: &api.MachineSettings{Name: &name}})
	finds("laptop9", anew)
	s.change(h, api.Change{Remove: true})
	for _, word := range []string{siteVolume, siteVolume[:8], string(h.boot.KeyID()), string(h.boot.KeyID())[:8], h.packetID(), strings.ToUpper(siteVolume[:13])} {
		finds(word, h)
	}
	finds("1f1e", anew)
	s.change(anew, api.Change{Remove: true})
	finds("1f1e2d3c", anew)
	lone := s.enroll("tower1", "2f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	s.change(lone, api.Change{Remove: true})
	finds("tower1", lone)
	var list []api.Packet
	s.local("GET", "/v1/packets?machine=tower1", nil, &list)
	if len(list) != 1 || list[0].ID != lone.packetID() {
		t.Errorf("%+v", list)
	}
}

// A packet of another machine that says it is newer takes nothing's place: both
// are held, an alarm is raised, and a request must name one.
func TestNewerOfAnotherMachine(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	mallory := newHost(s, "mallory")
	if err := mallory.register(s.token(1)); err != nil {
		t.Fatal(err)
	}
	if err := s.again(mallory, siteVolume, h.packetID()); err != nil {
		t.Fatal(err)
	}
	for _, x := range []*host{h, mallory} {
		if p := s.packetNow(x.packetID()); p.State != escrow.Verified || !p.Hold || p.SupersededBy != "" {
			t.Errorf("%s: %s, held %t", x.name, p.State, p.Hold)
		}
	}
	if !slices.Contains(s.actions(mallory.packetID()), "alarm.fork") {
		t.Error("no alarm")
	}
	wantCode(t, "by UUID", s.control.Call(t.Context(), "GET", "/v1/recoverable?volume="+siteVolume, nil, nil), api.CodeAmbiguous)
	if err := s.control.Call(t.Context(), "GET", "/v1/recoverable?volume="+h.packetID(), nil, nil); err != nil {
		t.Error(err)
	}
}

func TestUploadAllowance(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var a allowance
	for n := range uploadLimit.burst {
		var ok bool
		if a, ok = a.take(uploadLimit, now); !ok {
			t.Fatalf("upload %d", n)
		}
	}
	for _, c := range []struct {
		after time.Duration
		left  int
	}{{0, 0}, {uploadLimit.refill - 1, 0}, {uploadLimit.refill, 1}, {2*uploadLimit.refill + 1, 2}, {time.Hour, uploadLimit.burst}, {1e6 * time.Hour, uploadLimit.burst}, {-time.Hour, 0}} {
		b := a
		for n := 0; ; n++ {
			var ok bool
			if b, ok = b.take(uploadLimit, now.Add(c.after)); !ok {
				if n != c.left {
					t.Errorf("after %s: %d, want %d", c.after, n, c.left)
				}
				break
			}
		}
	}
	half, _ := a.take(uploadLimit, now.Add(uploadLimit.refill*3/2)) // what began to come back is not lost
	if _, ok := half.take(uploadLimit, now.Add(uploadLimit.refill*2)); !ok {
		t.Error("half a refill was lost")
	}
}

// One machine cannot keep the server busy, and does not stand in the way of
// another.
func TestTooManyUploads(t *testing.T) {
	s := newSite(t)
	h, other := s.enroll("laptop7", siteVolume), s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	upload := func(h *host, volume string) error {
		return h.Call(t.Context(), "PUT", "/v1/self/volumes/"+volume, api.Upload{Packet: h.packet, Blob: h.blob}, nil)
	}
	for n := range uploadLimit.burst - 1 {
		if err := upload(h, siteVolume); err != nil {
			t.Fatalf("%d: %v", n, err)
		}
	}
	err := upload(h, siteVolume)
	wantCode(t, "one more", err, api.CodeLimit)
	if api.CodeLimit.Status() != http.StatusTooManyRequests {
		t.Error(api.CodeLimit.Status())
	}
	if err := upload(other, "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"); err != nil {
		t.Errorf("another machine: %v", err)
	}
	s.offset.Store(int64(uploadLimit.refill + time.Second))
	if err := upload(h, siteVolume); err != nil {
		t.Errorf("a minute later: %v", err)
	}
}

// Lists are filtered and paged by the server; together the pages are the list.
func TestListFilters(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	first := h.packetID()
	if err := s.again(h, siteVolume, first); err != nil {
		t.Fatal(err)
	}
	tower := s.enroll("tower1", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	group := "towers"
	s.change(tower, api.Change{Set: &api.MachineSettings{Group: &group}})
	begun := newHost(s, "begun")
	if err := begun.register(s.token(1)); err != nil {
		t.Fatal(err)
	}
	begun.packet = begun.makePacket(s.policy(), "2f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	if err := begun.Call(t.Context(), "PUT", "/v1/self/volumes/2f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff", api.Upload{Packet: begun.packet}, nil); err != nil {
		t.Fatal(err)
	}
	ids := func(query string) []string {
		t.Helper()
		var list []api.Packet
		s.local("GET", "/v1/packets?"+query, nil, &list)
		out := []string{}
		for _, p := range list {
			out = append(out, p.ID)
		}
		return out
	}
	sorted := func(ids ...string) []string { slices.Sort(ids); return ids }
	all := sorted(first, h.packetID(), tower.packetID(), begun.packetID())
	s.offset.Store(int64(40 * 24 * time.Hour))
	for query, want := range map[string][]string{
		"limit=1000":               all,
		"limit=10&machine=laptop7": sorted(first, h.packetID()),
		"limit=10&machine=" + string(h.boot.KeyID()[:9]):                  sorted(first, h.packetID()),
		"limit=10&machine=laptop7&state=obsolete":                         {first},
		"limit=10&machine=laptop7&volume=1f1e":                            {},
		"limit=10&volume=1f1e2d3c":                                        {tower.packetID()},
		"limit=10&volume=laptop7":                                         {},
		"limit=10&group=towers":                                           {tower.packetID()},
		"limit=10&group=others":                                           {},
		"limit=10&state=verified":                                         sorted(h.packetID(), tower.packetID()),
		"limit=10&state=pending":                                          {begun.packetID()},
		"limit=10&unverified=true":                                        {begun.packetID()},
		"limit=10&unverified=true&since=P30D":                             sorted(h.packetID(), tower.packetID(), begun.packetID()),
		"limit=10&unverified=true&since=P50D":                             {begun.packetID()},
		"limit=2":                                                         all[:2],
		"limit=2&after=" + all[1]:                                         all[2:],
		"limit=2&after=" + all[3]:                                         {},
		"limit=1&machine=laptop7&after=" + sorted(first, h.packetID())[0]: sorted(first, h.packetID())[1:],
	} {
		if got := ids(query); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", query, got, want)
		}
	}
	if got := sorted(ids("")...); !slices.Equal(got, all) {
		t.Errorf("as callers of before: %v", got)
	}
	for _, query := range []string{"limit=0", "limit=1001", "limit=x", "state=gone", "unverified=maybe", "since=P1D", "unverified=1&since=soon"} {
		wantCode(t, query, s.control.Call(t.Context(), "GET", "/v1/packets?"+query, nil, nil), api.CodeUsage)
	}
	var machines []api.Machine
	s.local("GET", "/v1/machines?limit=2", nil, &machines)
	if len(machines) != 2 || machines[0].KeyID > machines[1].KeyID {
		t.Fatalf("%+v", machines)
	}
	after := machines[1].KeyID
	s.local("GET", "/v1/machines?limit=2&after="+string(after), nil, &machines)
	if len(machines) != 1 || machines[0].KeyID <= after {
		t.Errorf("%+v", machines)
	}
}

func TestLifeSettings(t *testing.T) {
	s := newSite(t)
	hour, minute, yes := unlock.Duration(time.Hour), unlock.Duration(time.Minute), true
	set := func(in api.SetLife) error { return s.control.Call(t.Context(), "PUT", "/v1/lives", in, nil) }
	wantCode(t, "too short", set(api.SetLife{Lifetime: &minute}), api.CodeUsage)
	wantCode(t, "too short", set(api.SetLife{Retention: &minute}), api.CodeUsage)
	wantCode(t, "a bad name", set(api.SetLife{Group: "a\nb", Hold: &yes}), api.CodeUsage)
	must(0, errors.Join(set(api.SetLife{Retention: &hour}), set(api.SetLife{Group: "servers", Hold: &yes})))
	var lives []api.Life
	s.local("GET", "/v1/lives", nil, &lives)
	if !slices.Equal(lives, []api.Life{{Retention: hour}, {Group: "servers", Retention: hour, Hold: true}}) {
		t.Errorf("%+v", lives)
	}
	must(0, set(api.SetLife{Group: "servers", Inherit: true}))
	s.local("GET", "/v1/lives", nil, &lives)
	if len(lives) != 1 {
		t.Errorf("%+v", lives)
	}
	details := []string{}
	for _, e := range s.audit() {
		if e.Action == "policy.set" {
			details = append(details, e.Detail)
		}
	}
	if want := []string{`lifetime PT0S, retention PT1H, hold false, of group ""`, `lifetime PT0S, retention PT1H, hold true, of group "servers"`, `as other groups, of group "servers"`}; !slices.Equal(details, want) {
		t.Errorf("%q", details)
	}
}

// storedPacket is a packet as the store takes it, with bytes that nothing opens.
func storedPacket(id string, machine identity.KeyID, volume string, stored time.Time) (escrow.Entry, []byte) {
	data := []byte("packet " + id)
	return escrow.Entry{
		ID: id, KeyID: machine, Volume: escrow.Volume{UUID: volume}, Digest: hexDigest(data), Size: len(data), State: escrow.Verified,
		Created: stored, Stored: stored, VerifiedAt: stored,
	}, data
}

func hexDigest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
