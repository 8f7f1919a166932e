package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

func fillLog(t *testing.T, s *Store, count int) []Event {
	t.Helper()
	change := func(tx *Tx) error {
		for n := range count {
			event := Event{
				Time: testNow.Add(time.Duration(n) * time.Second), Actor: "anna", Action: "look",
				Request: "r", Machine: "m", Packet: "p", Volume: "v", Detail: fmt.Sprint("number ", n),
			}
			if err := tx.Audit(event); err != nil {
				return err
			}
		}
		return nil
	}
	if err := s.Update(change); err != nil {
		t.Fatal(err)
	}
	var events []Event
	view(t, s, func(tx *Tx) (err error) {
		events, err = tx.AuditFrom(1, count)
		return err
	})
	if len(events) != count {
		t.Fatalf("%d events", len(events))
	}
	return events
}

func TestAudit(t *testing.T) {
	s := newStore(t)
	events := fillLog(t, s, 5)
	view(t, s, func(tx *Tx) error {
		head, err := tx.AuditHead()
		equal(t, head, err, Head{Seq: 5, Hash: events[4].Hash})
		verified, err := tx.VerifyAudit()
		equal(t, verified, err, head)
		middle, err := tx.AuditFrom(2, 2)
		equal(t, middle, err, events[1:3])
		for _, c := range []struct {
			head Head
			has  bool
		}{
			{Head{}, true},
			{Head{Hash: Hash{1}}, false},
			{Head{Seq: 3, Hash: events[2].Hash, Epoch: 9}, true},
			{Head{Seq: 3, Hash: events[3].Hash}, false},
			{Head{Seq: 6, Hash: events[4].Hash}, false},
		} {
			has, err := tx.AuditHas(c.head)
			equal(t, has, err, c.has)
		}
		return nil
	})
	reached, err := VerifyChain(events[:2], Head{Epoch: 4})
	equal(t, reached, err, Head{Epoch: 4, Seq: 2, Hash: events[1].Hash})
	_, err = VerifyChain(events[2:], reached)
	want(t, err, nil)
}

// The hash of an event must stay what it is for as long as logs are kept.
func TestAuditHashIsFrozen(t *testing.T) {
	event := Event{Seq: 1, Time: testNow, Actor: "anna", Action: "approve", Request: "r1", Detail: "x"}
	hash, err := event.digest()
	want(t, err, nil)
	// printf 'mandos-escrow-audit: 1\nseq: 1\ntime: 2026-03-01T12:00:00Z\nactor: anna\naction: approve\n
	// request: r1\ndetail: x\nprevious: %064d\n' 0 | sha256sum
	const frozen = "f7ff01003b2729597c952aa4fabc52f29594390b3ae62362407b3c55f5469370"
	if hash.String() != frozen {
		t.Fatalf("hash %s", hash)
	}
}

func TestAuditRefuses(t *testing.T) {
	s := newStore(t)
	for _, event := range []Event{
		{Actor: "a", Action: "b"},
		{Time: testNow, Action: "b"},
		{Time: testNow, Actor: "a"},
	} {
		if err := s.Update(func(tx *Tx) error { return tx.Audit(event) }); err == nil {
			t.Errorf("%+v was taken", event)
		}
	}
}

func TestAuditTexts(t *testing.T) {
	s := newStore(t)
	for text, shown := range map[string]string{
		"plain ünïcode":           "plain ünïcode",
		"two\nlines":              `"two\nlines"`,
		"\x1b[2Jclear":            `"\x1b[2Jclear"`,
		"right\u202eleft":         `"right\u202eleft"`,
		" space":                  `" space"`,
		"\xff":                    `"\xff"`,
		`"two\nlines"`:            `"\"two\\nlines\""`,
		strings.Repeat("x", 2000): strings.Repeat("x", 1024),
	} {
		event := Event{Time: testNow.Add(999 * time.Millisecond).In(time.FixedZone("x", 3600)), Actor: text, Action: "a", Detail: text}
		if err := s.Update(func(tx *Tx) error { return tx.Audit(event) }); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		view(t, s, func(tx *Tx) error {
			head, err := tx.AuditHead()
			want(t, err, nil)
			events, err := tx.AuditFrom(head.Seq, 1)
			want(t, err, nil)
			if events[0].Detail != shown || events[0].Actor != shown || !events[0].Time.Equal(testNow) {
				t.Errorf("%q became %q at %v", text, events[0].Detail, events[0].Time)
			}
			return nil
		})
	}
	view(t, s, func(tx *Tx) error { _, err := tx.VerifyAudit(); return err })
}

func TestVerifyChainNamesFirstBadEntry(t *testing.T) {
	events := fillLog(t, newStore(t), 6)
	end, err := VerifyChain(events, Head{})
	want(t, err, nil)
	for name, c := range map[string]struct {
		tamper func([]Event) []Event
		bad    int
	}{
		"seq":         {func(e []Event) []Event { e[2].Seq = 9; return e }, 9},
		"time":        {func(e []Event) []Event { e[2].Time = e[2].Time.Add(time.Second); return e }, 3},
		"parts of it": {func(e []Event) []Event { e[2].Time = e[2].Time.Add(time.Nanosecond); return e }, 3},
		"actor":       {func(e []Event) []Event { e[2].Actor = "bert"; return e }, 3},
		"action":      {func(e []Event) []Event { e[2].Action = "x"; return e }, 3},
		"request":     {func(e []Event) []Event { e[2].Request = ""; return e }, 3},
		"machine":     {func(e []Event) []Event { e[2].Machine = "x"; return e }, 3},
		"packet":      {func(e []Event) []Event { e[2].Packet = "x"; return e }, 3},
		"volume":      {func(e []Event) []Event { e[2].Volume = "x"; return e }, 3},
		"detail":      {func(e []Event) []Event { e[2].Detail += "\nseq: 4"; return e }, 3},
		"hash":        {func(e []Event) []Event { e[2].Hash[0] ^= 1; return e }, 3},
		"previous":    {func(e []Event) []Event { e[2].Previous[0] ^= 1; return e }, 3},
		"fields swap": {func(e []Event) []Event { e[2].Machine, e[2].Packet = e[2].Packet, e[2].Machine; return e }, 3},
		"rehashed":    {func(e []Event) []Event { e[2].Actor = "x"; e[2].Hash, _ = e[2].digest(); return e }, 4},
		"dropped":     {func(e []Event) []Event { return slices.Delete(e, 2, 3) }, 4},
		"first gone":  {func(e []Event) []Event { return e[1:] }, 2},
		"swapped":     {func(e []Event) []Event { e[2], e[3] = e[3], e[2]; return e }, 4},
		"doubled":     {func(e []Event) []Event { return slices.Insert(e, 2, e[1]) }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := VerifyChain(c.tamper(slices.Clone(events)), Head{})
			want(t, err, ErrAudit)
			if !strings.Contains(err.Error(), fmt.Sprintf("entry %d ", c.bad)) && !strings.Contains(err.Error(), fmt.Sprintf("entry %d:", c.bad)) {
				t.Fatalf("names not entry %d: %v", c.bad, err)
			}
		})
	}
	short, err := VerifyChain(events[:4], Head{})
	if err != nil || short == end {
		t.Fatalf("a truncated log leads to the same head (%v)", err)
	}
}

func TestVerifyAuditSeesTheEnd(t *testing.T) {
	for name, tamper := range map[string]func(*Tx) error{
		"last entry gone": func(tx *Tx) error { return tx.delete(auditBucket, auditKey(3)) },
		"all gone": func(tx *Tx) error {
			for seq := uint64(1); seq <= 3; seq++ {
				if err := tx.delete(auditBucket, auditKey(seq)); err != nil {
					return err
				}
			}
			return nil
		},
		"head put back": func(tx *Tx) error { return auditTop.Put(tx, top{}) },
		"entry moved": func(tx *Tx) error {
			event, err := tx.AuditFrom(3, 1)
			if err != nil {
				return err
			}
			return putJSON(tx, auditBucket, auditKey(2), event[0])
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			fillLog(t, s, 3)
			if err := s.db.Update(func(btx *bolt.Tx) error { return tamper(&Tx{bolt: btx, sealer: s.sealer}) }); err != nil {
				t.Fatal(err)
			}
			view(t, s, func(tx *Tx) error {
				_, err := tx.VerifyAudit()
				want(t, err, ErrAudit)
				return nil
			})
		})
	}
}

// What a command fetched as JSON must verify as it stands.
func TestEventJSON(t *testing.T) {
	events := fillLog(t, newStore(t), 2)
	text, err := json.Marshal(events)
	want(t, err, nil)
	var read []Event
	want(t, json.Unmarshal(text, &read), nil)
	head, err := VerifyChain(read, Head{})
	equal(t, head.Hash, err, events[1].Hash)
	for _, bad := range []string{"", "AB", strings.Repeat("A", 64), strings.Repeat("a", 63)} {
		if new(Hash).UnmarshalText([]byte(bad)) == nil {
			t.Errorf("hash %q was read", bad)
		}
	}
}

func TestHead(t *testing.T) {
	key, err := identity.Generate()
	want(t, err, nil)
	other, err := identity.Generate()
	want(t, err, nil)
	head := Head{Epoch: 2, Seq: 77, Hash: Hash{1, 2, 3}}
	signed, err := head.Sign(key)
	want(t, err, nil)
	got, err := VerifyHead(signed, key.Public())
	equal(t, got, err, head)
	_, err = VerifyHead(signed, other.Public())
	want(t, err, identity.ErrSignature)
	for n := range signed {
		for _, flip := range []byte{1, 0x20, 0x80} {
			bad := bytes.Clone(signed)
			bad[n] ^= flip
			if _, err := VerifyHead(bad, key.Public()); err == nil {
				t.Fatalf("byte %d flipped by %#x was taken", n, flip)
			}
		}
		_, err := VerifyHead(signed[:n], key.Public())
		want(t, err, record.ErrFormat)
	}
	for _, c := range []struct {
		a, b  Head
		newer bool
	}{
		{Head{Epoch: 1, Seq: 5}, Head{Epoch: 1, Seq: 4}, true},
		{Head{Epoch: 1, Seq: 5}, Head{Epoch: 1, Seq: 5}, false},
		{Head{Epoch: 2, Seq: 1}, Head{Epoch: 1, Seq: 9}, true},
		{Head{Epoch: 1, Seq: 9}, Head{Epoch: 2, Seq: 1}, false},
	} {
		if c.a.Newer(c.b) != c.newer {
			t.Errorf("%+v newer than %+v: %v", c.a, c.b, !c.newer)
		}
	}
}
