package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// carried is a packet of no machine, as an administrator brings it.
func carried(h escrow.Header, policy escrow.Policy, keys ...*seal.PublicKey) []byte {
	oneOff := must(identity.Generate())
	h.KeyID, h.MachineIDHash = oneOff.KeyID(), strings.Repeat("cd", 32)
	payload := &escrow.VolumeKeyPayload{Key: siteVolumeKey, Cipher: "aes-xts-plain64", KeyBits: 512, DataOffset: escrow.NoOffset}
	return must(escrow.Make(h, policy, keys, []escrow.Payload{payload}, oneOff, time.Now()))
}

func (s *site) carried(machine, volume string) []byte {
	master, _ := siteMaster()
	return carried(escrow.Header{Machine: machine, Volume: escrow.Volume{UUID: volume}}, s.policy(), master.Public())
}

func (p *person) bring(packet []byte, proved bool) (out api.Packet, err error) {
	return out, p.Call(context.Background(), "POST", "/v1/packets", api.Import{Packet: packet, Proved: proved}, &out)
}

// recoverable is the id of the packet that a word means.
func (p *person) recoverable(word string) (string, error) {
	var head api.PacketHead
	if err := p.Call(context.Background(), "GET", "/v1/recoverable?volume="+word, nil, &head); err != nil {
		return "", err
	}
	_, id, _ := bytes.Cut(head.Header, []byte("\nid: "))
	return string(id[:32]), nil
}

func TestImport(t *testing.T) {
	s := newSite(t)
	adam, hugo := s.person("adam", "admin"), s.person("hugo", "helpdesk")
	data := s.carried("old", siteVolume)
	id := must(escrow.Parse(data)).ID
	first, err := adam.bring(data, false)
	if err != nil || first.State != escrow.Pending || !first.Imported || first.Verified || first.ID != id {
		t.Fatalf("%+v, %v", first, err)
	}
	if again, err := adam.bring(data, false); err != nil || !again.Stored.Equal(first.Stored) {
		t.Errorf("again: %+v, %v", again, err)
	}
	if found, err := hugo.recoverable(siteVolume[:8]); err != nil || found != id {
		t.Errorf("the only packet of the volume: %s, %v", found, err)
	}
	proved, err := adam.bring(data, true)
	if err != nil || proved.State != escrow.Verified || !proved.Verified {
		t.Errorf("proved: %+v, %v", proved, err)
	}
	if again, err := adam.bring(data, false); err != nil || again.State != escrow.Verified {
		t.Errorf("what was proved: %+v, %v", again, err)
	}
	master, _ := siteMaster()
	other := carried(escrow.Header{ID: id, Machine: "old", Volume: escrow.Volume{UUID: siteVolume}}, s.policy(), master.Public())
	_, err = adam.bring(other, true)
	wantCode(t, "another with its id", err, api.CodeConflict)
	if got := s.actions(id); strings.Join(got, " ") != strings.TrimSpace(strings.Repeat("packet.import ", 4)) {
		t.Errorf("audit: %v", got)
	}
	for _, e := range s.audit() {
		if e.Packet == id && e.Actor != "admin:adam" {
			t.Errorf("%+v", e)
		}
	}
	_, err = hugo.bring(data, true)
	wantCode(t, "by the helpdesk", err, api.CodeRefused)
}

func TestImportRefused(t *testing.T) {
	s := newSite(t)
	h, adam := s.enroll("laptop7", siteVolume), s.person("adam", "admin")
	_, err := adam.bring(h.packet, false)
	wantCode(t, "a machine's own", err, api.CodeRefused)
	merged, other := mergedPolicy(t, s, 2)
	foreign := must(escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: other.Public().Fingerprint(), Name: "srv2"}}))
	header := escrow.Header{Machine: "old", Volume: escrow.Volume{UUID: siteVolume}}
	_, err = adam.bring(carried(header, foreign, other.Public()), false)
	wantCode(t, "to other trustees", err, api.CodeRefused)
	master, _ := siteMaster()
	if _, err := adam.bring(carried(header, merged, master.Public(), other.Public()), false); err != nil {
		t.Errorf("to a merged policy: %v", err)
	}
	data := s.carried("old", siteVolume)
	for i := 0; i < len(data); i += 97 {
		damaged := bytes.Clone(data)
		damaged[i] ^= 1
		if _, err := adam.bring(damaged, false); err == nil || api.CodeOf(err) != api.CodeIntegrity {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	_, err = adam.bring(bytes.Repeat([]byte("x"), 1<<20), false)
	wantCode(t, "1 MB of garbage", err, api.CodeIntegrity)
}

// TestImportBesideAMachine: whatever is imported, whenever, whoever says that it is
// proved: the machine's packet stays the one that is meant.
func TestImportBesideAMachine(t *testing.T) {
	s := newSite(t)
	h, adam, hugo := s.enroll("laptop7", siteVolume), s.person("adam", "admin"), s.person("hugo", "helpdesk")
	master, _ := siteMaster()
	s.offset.Add(int64(time.Hour))
	newer := carried(escrow.Header{Machine: "laptop7", Supersedes: h.packetID(), Volume: escrow.Volume{UUID: siteVolume}}, s.policy(), master.Public())
	for _, data := range [][]byte{newer, s.carried("laptop7", siteVolume), s.carried("laptop7", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")} {
		if _, err := adam.bring(data, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, word := range []string{"laptop7", siteVolume, siteVolume[:8], string(h.boot.KeyID())} {
		if id, err := hugo.recoverable(word); err != nil || id != h.packetID() {
			t.Errorf("%s means %s, %v", word, id, err)
		}
	}
	var own api.Packet
	s.local("GET", "/v1/packets/"+h.packetID(), nil, &own)
	if own.State != escrow.Verified || own.SupersededBy != "" || own.Hold {
		t.Errorf("the machine's packet: %+v", own)
	}
	if id, err := hugo.recoverable(must(escrow.Parse(newer)).ID); err != nil || id != must(escrow.Parse(newer)).ID {
		t.Errorf("the import by its id: %s, %v", id, err)
	}
	s.noAlarm(t)
}

// TestEnrollAfterImport: a machine that enrolls with a volume of which something was
// imported is no copy of anything.
func TestEnrollAfterImport(t *testing.T) {
	s := newSite(t)
	adam, hugo := s.person("adam", "admin"), s.person("hugo", "helpdesk")
	imported, err := adam.bring(s.carried("laptop7", siteVolume), true)
	if err != nil {
		t.Fatal(err)
	}
	h := s.enroll("laptop7", siteVolume)
	if id, err := hugo.recoverable("laptop7"); err != nil || id != h.packetID() {
		t.Errorf("%s, %v", id, err)
	}
	var after api.Packet
	s.local("GET", "/v1/packets/"+imported.ID, nil, &after)
	if after.State != escrow.Verified || after.Hold || after.SupersededBy != "" {
		t.Errorf("the import: %+v", after)
	}
	s.noAlarm(t)
}

func (s *site) noAlarm(t *testing.T) {
	t.Helper()
	if i := slices.IndexFunc(s.audit(), func(e store.Event) bool { return strings.HasPrefix(e.Action, "alarm.") }); i >= 0 {
		t.Errorf("%+v", s.audit()[i])
	}
}

// TestSeveralImports: without a machine's packet the proved one is meant, and of
// several that are alike none.
func TestSeveralImports(t *testing.T) {
	s := newSite(t)
	adam, hugo := s.person("adam", "admin"), s.person("hugo", "helpdesk")
	packets := [][]byte{s.carried("a", siteVolume), s.carried("b", siteVolume)}
	for _, data := range packets {
		if _, err := adam.bring(data, false); err != nil {
			t.Fatal(err)
		}
	}
	_, err := hugo.recoverable(siteVolume)
	wantCode(t, "two that are not proved", err, api.CodeAmbiguous)
	if _, err := adam.bring(packets[1], true); err != nil {
		t.Fatal(err)
	}
	if id, err := hugo.recoverable(siteVolume); err != nil || id != must(escrow.Parse(packets[1])).ID {
		t.Errorf("%s, %v", id, err)
	}
}

// TestImportIsRecovered: by the same request, approval and release as a machine's.
func TestImportIsRecovered(t *testing.T) {
	s := newSite(t)
	adam, bob, alice := s.person("adam", "admin"), s.person("bob", "helpdesk"), s.person("alice", "approver")
	h := newHost(s, "old")
	h.packet = s.carried("old", siteVolume)
	if _, err := adam.bring(h.packet, false); err != nil {
		t.Fatal(err)
	}
	a := newAsk(bob, h, escrow.ForVolumeKey, time.Hour, s.now())
	if err := bob.Call(t.Context(), "POST", "/v1/requests", api.Signed{Signed: a.signed}, nil); err != nil {
		t.Fatal(err)
	}
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	out, err := bob.collect(a)
	if err != nil {
		t.Fatal(err)
	}
	share := must(recovery.OpenResealed(out.Approvals[0].Share, a.oneOff, recovery.Digest(a.signed)))
	opened, err := must(escrow.Parse(out.Packet)).Open(escrow.ForVolumeKey, []*escrow.Share{share})
	if err != nil || !bytes.Equal(opened.VolumeKey.Key, siteVolumeKey) || opened.VolumeKey.DataOffset != escrow.NoOffset {
		t.Errorf("%+v, %v", opened, err)
	}
}

func TestImportsOfOneVolume(t *testing.T) {
	s := newSite(t)
	adam := s.person("adam", "admin")
	if err := s.server.store.Update(func(tx *store.Tx) error {
		for n := range escrow.MaxPackets {
			data := fmt.Appendf(nil, "import %d", n)
			sum := sha256.Sum256(data)
			e := escrow.Entry{
				ID: fmt.Sprintf("%032x", n), KeyID: identity.KeyID(fmt.Sprintf("%064x", n)), Imported: true, State: escrow.Obsolete,
				Volume: escrow.Volume{UUID: siteVolume}, Size: len(data), Digest: hex.EncodeToString(sum[:]),
			}
			if err := tx.PutPacket(e, data); err != nil {
				return err
			}
		}
		return tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "packet.import"})
	}); err != nil {
		t.Fatal(err)
	}
	_, err := adam.bring(s.carried("old", siteVolume), false)
	wantCode(t, "the 1,001st", err, api.CodeLimit)
	if _, err := adam.bring(s.carried("old", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"), false); err != nil {
		t.Errorf("of another volume: %v", err)
	}
	s.enroll("laptop7", siteVolume) // which no import hinders
}

// Whoever made a packet that an administrator brings may have kept its one-off key.
// A machine with that key could say that the packet was proved, so there is none.
func TestImportsOneOffKeyIsNoMachine(t *testing.T) {
	s := newSite(t)
	adam := s.person("adam", "admin")
	master, _ := siteMaster()
	oneOff := must(identity.Generate())
	header := escrow.Header{Machine: "old", KeyID: oneOff.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: siteVolume}}
	payload := &escrow.VolumeKeyPayload{Key: siteVolumeKey, Cipher: "aes-xts-plain64", KeyBits: 512, DataOffset: escrow.NoOffset}
	data := must(escrow.Make(header, s.policy(), []*seal.PublicKey{master.Public()}, []escrow.Payload{payload}, oneOff, time.Now()))
	brought, err := adam.bring(data, false)
	if err != nil {
		t.Fatal(err)
	}
	mallory := newHost(s, "mallory")
	mallory.boot = oneOff
	wantCode(t, "enrols", mallory.register(s.token(1)), api.CodeRefused)
	err = mallory.Call(t.Context(), "POST", "/v1/self/volumes/"+siteVolume+"/commit", api.Commit{Packet: brought.ID}, nil)
	wantCode(t, "says that it is proved", err, api.CodeRefused)
	if p := s.packetNow(brought.ID); p.State != escrow.Pending || p.Verified {
		t.Errorf("it is %s", p.State)
	}
}
