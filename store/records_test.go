package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"slices"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

func keyID(n int) identity.KeyID {
	sum := sha256.Sum256(fmt.Append(nil, n))
	return identity.KeyID(hex.EncodeToString(sum[:]))
}

func testMachine(n int) unlock.Machine {
	return unlock.Machine{
		KeyID: keyID(n), RunningKeyID: keyID(-n), Name: fmt.Sprintf("machine-%d", n),
		Created: testNow, Enabled: true, Volumes: []string{"11111111-2222-3333-4444-555555555555"},
	}
}

func testPacket(id string, machine identity.KeyID, uuid, content string) (escrow.Entry, []byte) {
	sum := sha256.Sum256([]byte(content))
	return escrow.Entry{
		ID: id, KeyID: machine, Volume: escrow.Volume{UUID: uuid}, Digest: hex.EncodeToString(sum[:]),
		Size: len(content), Created: testNow, Stored: testNow, State: escrow.Pending,
	}, []byte(content)
}

func testAdmin(n int) Admin {
	public := identity.Public(fmt.Sprintf("public key %d", n))
	return Admin{Name: fmt.Sprintf("admin-%d", n), KeyID: public.KeyID(), Key: public, Role: Approver, Created: testNow}
}

// putEverything puts one record of every kind, each with text in it.
func putEverything(tx *Tx, text string) error {
	machine := testMachine(1)
	machine.Name = text
	entry, data := testPacket("packet-1", machine.KeyID, text, text)
	admin := testAdmin(1)
	admin.Name = text
	secret := Hash(sha256.Sum256([]byte(text)))
	return errors.Join(
		tx.PutMachine(machine), tx.PutBlob(machine.KeyID, text, []byte(text)), tx.PutPendingBlob(machine.KeyID, text, []byte(text)),
		tx.PutPacket(entry, data),
		tx.PutRequest(recovery.Record{ID: "request-1", Requester: text, Signed: []byte(text), State: recovery.Open}),
		tx.PutToken(Token{ID: "token-1", SecretHash: secret, Uses: 1, Expires: testNow.Add(time.Hour), Group: text}),
		tx.PutAdmin(admin), tx.PutAdmin(Admin{Name: text + "-invited", Role: Viewer, InviteHash: secret}),
		ServerName.Put(tx, text), Policy.Put(tx, []byte(text)), MasterPublic.Put(tx, []byte(text)), MasterPrivate.Put(tx, []byte(text)),
		Epoch.Put(tx, 3), Unconfirmed.Put(tx, text), MasterExported.Put(tx, testNow),
		tx.Audit(Event{Time: testNow, Actor: text, Action: "put", Detail: text}),
	)
}

func collect[T any](t testing.TB, all iter.Seq2[T, error]) []T {
	t.Helper()
	var values []T
	for value, err := range all {
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, value)
	}
	return values
}

func equal[T any](t testing.TB, got T, err error, wanted T) {
	t.Helper()
	if err != nil || !reflect.DeepEqual(got, wanted) {
		t.Fatalf("got %+v, %v\nwant %+v", got, err, wanted)
	}
}

func TestMachines(t *testing.T) {
	s := newStore(t)
	one, two := testMachine(1), testMachine(2)
	change(t, s, func(tx *Tx) error { return errors.Join(tx.PutMachine(one), tx.PutMachine(two)) })

	moved := one
	moved.RunningKeyID = keyID(-3)
	change(t, s, func(tx *Tx) error {
		got, err := tx.MachineByRunning(one.RunningKeyID)
		equal(t, got, err, one)
		return tx.PutMachine(moved)
	})
	stolen := two
	stolen.RunningKeyID = moved.RunningKeyID
	want(t, s.Update(audited(func(tx *Tx) error { return tx.PutMachine(stolen) })), ErrExists)

	view(t, s, func(tx *Tx) error {
		got, err := tx.Machine(one.KeyID)
		equal(t, got, err, moved)
		got, err = tx.MachineByRunning(moved.RunningKeyID)
		equal(t, got, err, moved)
		_, err = tx.MachineByRunning(one.RunningKeyID)
		want(t, err, ErrNotFound)
		equal(t, len(collect(t, tx.Machines())), nil, 2)
		return nil
	})
	change(t, s, func(tx *Tx) error { return tx.DeleteMachine(one.KeyID) })
	want(t, s.Update(audited(func(tx *Tx) error { return tx.DeleteMachine(one.KeyID) })), ErrNotFound)
	view(t, s, func(tx *Tx) error {
		_, err := tx.MachineByRunning(moved.RunningKeyID)
		want(t, err, ErrNotFound)
		equal(t, collect(t, tx.Machines()), nil, []unlock.Machine{two})
		return nil
	})
}

func TestBlobs(t *testing.T) {
	s := newStore(t)
	machine, other := testMachine(1), testMachine(2)
	change(t, s, func(tx *Tx) error {
		return errors.Join(
			tx.PutMachine(machine), tx.PutMachine(other), tx.PutBlob(other.KeyID, "u", []byte("other")),
			tx.PutBlob(machine.KeyID, "u", []byte("old")), tx.PutPendingBlob(machine.KeyID, "u", []byte("new")),
			tx.PutPendingBlob(machine.KeyID, "v", []byte("v")),
		)
	})
	change(t, s, func(tx *Tx) error {
		blob, err := tx.Blob(machine.KeyID, "u")
		equal(t, string(blob), err, "old")
		blob, err = tx.PendingBlob(machine.KeyID, "u")
		equal(t, string(blob), err, "new")
		_, err = tx.Blob(machine.KeyID, "v")
		want(t, err, ErrNotFound)
		return tx.ActivateBlob(machine.KeyID, "u")
	})
	want(t, s.Update(audited(func(tx *Tx) error { return tx.ActivateBlob(machine.KeyID, "u") })), ErrNotFound)
	change(t, s, func(tx *Tx) error {
		blob, err := tx.Blob(machine.KeyID, "u")
		equal(t, string(blob), err, "new")
		return tx.DeleteBlob(machine.KeyID, "v")
	})
	change(t, s, func(tx *Tx) error {
		_, err := tx.PendingBlob(machine.KeyID, "v")
		want(t, err, ErrNotFound)
		return tx.DeleteMachine(machine.KeyID)
	})
	view(t, s, func(tx *Tx) error {
		_, err := tx.Blob(machine.KeyID, "u")
		want(t, err, ErrNotFound)
		blob, err := tx.Blob(other.KeyID, "u")
		equal(t, string(blob), err, "other")
		return nil
	})
}

func TestPackets(t *testing.T) {
	s := newStore(t)
	first, data := testPacket("p1", keyID(1), "u1", "packet one")
	second, data2 := testPacket("p2", keyID(1), "u2", "packet two")
	third, data3 := testPacket("p3", keyID(2), "u1", "packet three")
	change(t, s, func(tx *Tx) error {
		return errors.Join(tx.PutPacket(first, data), tx.PutPacket(second, data2), tx.PutPacket(third, data3))
	})
	for name, refused := range map[string]struct {
		do    func(*Tx) error
		error error
	}{
		"same ID":        {func(tx *Tx) error { return tx.PutPacket(first, data) }, ErrExists},
		"other bytes":    {func(tx *Tx) error { e := first; e.ID = "p4"; return tx.PutPacket(e, data2) }, ErrDamaged},
		"unknown entry":  {func(tx *Tx) error { e := first; e.ID = "p4"; return tx.PutEntry(e) }, ErrNotFound},
		"other machine":  {func(tx *Tx) error { e := first; e.KeyID = keyID(9); return tx.PutEntry(e) }, ErrExists},
		"other volume":   {func(tx *Tx) error { e := first; e.Volume.UUID = "u9"; return tx.PutEntry(e) }, ErrExists},
		"other digest":   {func(tx *Tx) error { e := first; e.Digest = second.Digest; return tx.PutEntry(e) }, ErrExists},
		"other name":     {func(tx *Tx) error { e := first; e.Machine = "x"; return tx.PutEntry(e) }, ErrExists},
		"purged by hand": {func(tx *Tx) error { e := first; e.State = escrow.Purged; return tx.PutEntry(e) }, ErrExists},
		"purge unknown":  {func(tx *Tx) error { return tx.PurgePacket(escrow.Entry{ID: "p4", State: escrow.Purged}) }, ErrNotFound},
		"purge in use":   {func(tx *Tx) error { return tx.PurgePacket(first) }, escrow.ErrState},
	} {
		t.Run(name, func(t *testing.T) { want(t, s.Update(audited(refused.do)), refused.error) })
	}

	first.State, first.Hold = escrow.Verified, true
	change(t, s, func(tx *Tx) error { return tx.PutEntry(first) })
	view(t, s, func(tx *Tx) error {
		entry, got, err := tx.Packet("p1")
		equal(t, entry, err, first)
		equal(t, string(got), nil, string(data))
		equal(t, collect(t, tx.Entries()), nil, []escrow.Entry{first, second, third})
		equal(t, collect(t, tx.EntriesOf(keyID(1))), nil, []escrow.Entry{first, second})
		equal(t, collect(t, tx.EntriesOfVolume("u1")), nil, []escrow.Entry{first, third})
		count, err := tx.CountPackets(keyID(1))
		equal(t, count, err, 2)
		count, err = tx.CountPackets(keyID(3))
		equal(t, count, err, 0)
		return nil
	})
	first.State, first.PurgedAt = escrow.Purged, testNow
	change(t, s, func(tx *Tx) error { return tx.PurgePacket(first) })
	want(t, s.Update(audited(func(tx *Tx) error { return tx.PurgePacket(first) })), escrow.ErrState)
	other, otherData := testPacket("p1", keyID(2), "u1", "packet four")
	want(t, s.Update(audited(func(tx *Tx) error { return tx.PutPacket(other, otherData) })), ErrExists)
	view(t, s, func(tx *Tx) error {
		_, _, err := tx.Packet("p1")
		want(t, err, escrow.ErrPurged)
		equal(t, tx.has(bytesBucket, []byte("p1")), nil, false)
		equal(t, collect(t, tx.EntriesOf(keyID(1))), nil, []escrow.Entry{second})
		equal(t, collect(t, tx.EntriesOfVolume("u1")), nil, []escrow.Entry{first, third})
		equal(t, collect(t, tx.EntriesFrom("p1")), nil, []escrow.Entry{first})
		count, err := tx.CountPackets(keyID(1))
		equal(t, count, err, 1)
		return tx.checkPackets()
	})
	first.State, first.PurgedAt = escrow.Pending, time.Time{}
	change(t, s, func(tx *Tx) error { return tx.PutPacket(first, data) })
	view(t, s, func(tx *Tx) error {
		entry, got, err := tx.Packet("p1")
		equal(t, entry, err, first)
		equal(t, string(got), nil, string(data))
		equal(t, collect(t, tx.EntriesOf(keyID(1))), nil, []escrow.Entry{first, second})
		return tx.checkPackets()
	})
}

// What lists go by is what the entry says, whenever it is written.
func TestBriefs(t *testing.T) {
	s := newStore(t)
	var all []escrow.Entry
	for n := range 5 {
		entry, data := testPacket(fmt.Sprint("p", n), keyID(n%2), "u", fmt.Sprint("packet ", n))
		entry.Group, entry.Machine = fmt.Sprint("group ", n), "m"
		change(t, s, func(tx *Tx) error { return tx.PutPacket(entry, data) })
		entry.State, entry.VerifiedAt, entry.CheckedAt = escrow.Verified, testNow, testNow.Add(time.Nanosecond)
		entry.ExpiredAt, entry.ObsoleteAt, entry.PurgedAt, entry.ReencryptSince = testNow.Add(1), testNow.Add(2), testNow.Add(3), testNow.Add(4)
		entry.Hold, entry.Imported = n == 1, n == 3
		if n == 2 {
			entry = entry.Reveal(escrow.ForVolumeKey, testNow)
		}
		change(t, s, func(tx *Tx) error { return tx.PutEntry(entry) })
		if n == 4 {
			entry.CheckedAt, entry.CheckFailed = testNow.Add(time.Hour), "it is gone"
			if err := s.Update(func(tx *Tx) error { return tx.DateEntry(entry.ID, entry.CheckedAt, entry.CheckFailed) }); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, entry)
	}
	view(t, s, func(tx *Tx) error {
		for start := range all {
			after := ""
			if start > 0 {
				after = all[start-1].ID
			}
			briefs := collect(t, tx.Briefs(after))
			equal(t, len(briefs), nil, len(all)-start)
			for n, brief := range briefs {
				entry := all[start+n]
				wanted := escrow.Entry{
					ID: entry.ID, KeyID: entry.KeyID, Group: entry.Group, State: entry.State, Hold: entry.Hold, Imported: entry.Imported, Stored: entry.Stored, VerifiedAt: entry.VerifiedAt,
					CheckedAt: entry.CheckedAt, ExpiredAt: entry.ExpiredAt, ObsoleteAt: entry.ObsoleteAt, PurgedAt: entry.PurgedAt, ReencryptSince: entry.ReencryptSince,
				}
				if entry.CheckFailed != "" {
					wanted.CheckFailed = "its entry says why"
				}
				if len(entry.RevealedAt) > 0 {
					wanted.RevealedAt = map[string]time.Time{escrow.ForVolumeKey: time.Unix(0, 0).UTC()}
				}
				equal(t, brief, nil, wanted)
			}
		}
		equal(t, collect(t, tx.EntriesByWord("m")), nil, all)
		equal(t, len(collect(t, tx.EntriesByWord(string(keyID(1)[:5])))), nil, 2)
		return nil
	})
	if _, err := decodeBrief(make([]byte, briefSize-1)); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if _, err := decodeBrief(bytes.Repeat([]byte{9}, briefSize)); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}

func TestMachineNames(t *testing.T) {
	s := newStore(t)
	one, two := testMachine(1), testMachine(2)
	two.Name = one.Name
	change(t, s, func(tx *Tx) error { return errors.Join(tx.PutMachine(one), tx.PutMachine(two)) })
	named := func(name string, wanted int) {
		t.Helper()
		view(t, s, func(tx *Tx) error {
			ids, err := tx.MachinesNamed(name)
			equal(t, len(ids), err, wanted)
			return nil
		})
	}
	named(one.Name, 2)
	two.Name = "renamed"
	change(t, s, func(tx *Tx) error { return tx.PutMachine(two) })
	named(one.Name, 1)
	named("renamed", 1)
	view(t, s, func(tx *Tx) error {
		all := collect(t, tx.Machines())
		equal(t, collect(t, tx.MachinesAfter(all[0].KeyID)), nil, all[1:])
		equal(t, collect(t, tx.MachineIDs()), nil, []identity.KeyID{all[0].KeyID, all[1].KeyID})
		return nil
	})
	change(t, s, func(tx *Tx) error { return tx.DeleteMachine(two.KeyID) })
	named("renamed", 0)
}

func TestRequests(t *testing.T) {
	s := newStore(t)
	record := recovery.Record{ID: "r1", Requester: "anna", Expires: testNow, State: recovery.Open}
	change(t, s, func(tx *Tx) error { return tx.PutRequest(record) })
	record.State = recovery.Denied
	change(t, s, func(tx *Tx) error { return tx.PutRequest(record) })
	view(t, s, func(tx *Tx) error {
		got, err := tx.Request("r1")
		equal(t, got, err, record)
		equal(t, collect(t, tx.Requests()), nil, []recovery.Record{record})
		return nil
	})
	change(t, s, func(tx *Tx) error { return tx.DeleteRequest("r1") })
	want(t, s.Update(audited(func(tx *Tx) error { return tx.DeleteRequest("r1") })), ErrNotFound)
}

// A sweep changes and deletes records in the very loop that goes through them.
func TestChangeWhileIterating(t *testing.T) {
	s := newStore(t)
	const count = 500
	change(t, s, func(tx *Tx) error {
		for n := range count {
			if err := tx.PutRequest(recovery.Record{ID: fmt.Sprintf("r%04d", n), Requester: "x"}); err != nil {
				return err
			}
		}
		return nil
	})
	var seen []string
	change(t, s, func(tx *Tx) error {
		for request, err := range tx.Requests() {
			if err != nil {
				return err
			}
			seen = append(seen, request.ID)
			request.Note = "expired, and longer than before so that pages split"
			if len(seen)%3 == 0 {
				err = tx.DeleteRequest(request.ID)
			} else {
				err = tx.PutRequest(request)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if len(seen) != count || !slices.IsSorted(seen) {
		t.Fatalf("saw %d of %d, sorted %v", len(seen), count, slices.IsSorted(seen))
	}
	view(t, s, func(tx *Tx) error {
		equal(t, len(collect(t, tx.Requests())), nil, count-count/3)
		return nil
	})
}

func TestAdmins(t *testing.T) {
	s := newStore(t)
	invite := Hash{1, 2, 3}
	anna := Admin{Name: "anna", Role: Helpdesk, Created: testNow, InviteHash: invite, InviteExpires: testNow.Add(time.Hour)}
	change(t, s, func(tx *Tx) error { return tx.PutAdmin(anna) })
	joined := testAdmin(1)
	joined.Name = "anna"
	change(t, s, func(tx *Tx) error {
		got, err := tx.AdminByInvite(invite)
		equal(t, got, err, anna)
		return tx.PutAdmin(joined)
	})
	view(t, s, func(tx *Tx) error {
		_, err := tx.AdminByInvite(invite)
		want(t, err, ErrNotFound)
		got, err := tx.AdminByKey(joined.KeyID)
		equal(t, got, err, joined)
		return nil
	})
	twin := testAdmin(1)
	twin.Name = "bert"
	mixed := testAdmin(2)
	mixed.KeyID = keyID(5)
	for _, refused := range []struct {
		admin Admin
		error error
	}{{twin, ErrExists}, {Admin{Name: "bert", Role: "root"}, ErrRole}, {Admin{Name: "bert"}, ErrRole}} {
		want(t, s.Update(audited(func(tx *Tx) error { return tx.PutAdmin(refused.admin) })), refused.error)
	}
	// A refusal that a closure makes an event of must leave nothing behind.
	change(t, s, func(tx *Tx) error { return tx.PutAdmin(Admin{Name: "carl", Role: Viewer, InviteHash: Hash{9}}) })
	half := testAdmin(7)
	half.InviteHash = Hash{9}
	change(t, s, func(tx *Tx) error {
		want(t, tx.PutAdmin(half), ErrExists)
		return nil
	})
	half.Name, half.InviteHash = "dora", Hash{}
	change(t, s, func(tx *Tx) error { return tx.PutAdmin(half) })
	for _, broken := range []Admin{mixed, {Role: Viewer}} {
		if err := s.Update(audited(func(tx *Tx) error { return tx.PutAdmin(broken) })); err == nil {
			t.Errorf("%+v was taken", broken)
		}
	}
	joined.Removed = true
	change(t, s, func(tx *Tx) error { return tx.PutAdmin(joined) })
	want(t, s.Update(audited(func(tx *Tx) error { return tx.PutAdmin(twin) })), ErrExists) // a removed key comes back under no other name
	view(t, s, func(tx *Tx) error {
		_, err := tx.AdminByKey(joined.KeyID)
		want(t, err, ErrNotFound)
		got, err := tx.AdminByName("anna")
		equal(t, got, err, joined)
		equal(t, len(collect(t, tx.Admins())), nil, 3)
		return nil
	})
}

func TestRoles(t *testing.T) {
	order := []Role{Viewer, Helpdesk, Approver, Administrator}
	for i, has := range order {
		for j, needs := range order {
			if has.Allows(needs) != (i >= j) {
				t.Errorf("%s allows %s: %v", has, needs, has.Allows(needs))
			}
		}
		if Role("").Allows(has) || has.Allows("") || Role("root").Allows("root") {
			t.Error("an unknown role allows or is allowed")
		}
		if role, err := ParseRole(string(has)); role != has || err != nil {
			t.Errorf("ParseRole %s: %v", has, err)
		}
	}
	_, err := ParseRole("Admin")
	want(t, err, ErrRole)
}

func TestValues(t *testing.T) {
	s := newStore(t)
	view(t, s, func(tx *Tx) error {
		policy, err := Policy.Get(tx)
		equal(t, len(policy), err, 0)
		exported, err := MasterExported.Get(tx)
		equal(t, exported.IsZero(), err, true)
		return nil
	})
	change(t, s, func(tx *Tx) error {
		return errors.Join(Epoch.Put(tx, 1<<60), Unconfirmed.Put(tx, "restored"), Policy.Put(tx, []byte{0, 1}))
	})
	view(t, s, func(tx *Tx) error {
		epoch, err := Epoch.Get(tx)
		equal(t, epoch, err, 1<<60)
		reason, err := Unconfirmed.Get(tx)
		equal(t, reason, err, "restored")
		policy, err := Policy.Get(tx)
		equal(t, policy, err, []byte{0, 1})
		return nil
	})
}
