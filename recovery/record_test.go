package recovery

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
)

const (
	bobKey   = identity.KeyID("bob-key")
	aliceKey = identity.KeyID("alice-key")
)

func open(threshold int) Record {
	return Record{ID: idA, Requester: "bob", RequesterID: bobKey, Threshold: threshold, Expires: now.Add(time.Hour), State: Open}
}

func approvalBy(name string, id identity.KeyID, trustee string) StoredApproval {
	return StoredApproval{Approver: name, ApproverID: id, Trustee: trustee, Signed: []byte("signed"), Share: []byte("share of " + trustee), Time: now}
}

var alices = approvalBy("alice", aliceKey, "T1")

func approved() Record { return must(open(1).Approve(alices, now)) }

// after returns the record as it is in a state.
func after(t *testing.T, state State) Record {
	t.Helper()
	switch state {
	case Open:
		return open(1)
	case Approved:
		return approved()
	case Denied:
		return must(approved().Deny("carol", "no", now))
	case Released:
		r, _, err := approved().Release(bobKey, now)
		return must(r, err)
	case Expired:
		return approved().At(now.Add(time.Hour))
	}
	t.Fatal(state)
	return Record{}
}

// Every action in every state, before and at the end of the request's time.
func TestTransitions(t *testing.T) {
	end := now.Add(time.Hour)
	carols := approvalBy("carol", "carol-key", "T2")
	for _, c := range []struct {
		from                           State
		at                             time.Time
		approve, deny, release         error
		approveTo, denyTo, releasedNow State
	}{
		{Open, now, nil, nil, ErrNotApproved, Approved, Denied, ""},
		{Open, end.Add(-1), nil, nil, ErrNotApproved, Approved, Denied, ""},
		{Open, end, ErrExpired, ErrExpired, ErrExpired, "", "", ""},
		{Approved, now, nil, nil, nil, Approved, Denied, Released},
		{Approved, end.Add(-1), nil, nil, nil, Approved, Denied, Released},
		{Approved, end, ErrExpired, ErrExpired, ErrExpired, "", "", ""},
		{Denied, now, ErrOver, ErrOver, ErrOver, "", "", ""},
		{Denied, end, ErrOver, ErrOver, ErrOver, "", "", ""},
		{Released, now, ErrOver, ErrOver, ErrOver, "", "", ""},
		{Expired, now, ErrExpired, ErrExpired, ErrExpired, "", "", ""}, // also when the clock was set back
	} {
		r := after(t, c.from)
		before := r
		got, err := r.Approve(carols, c.at)
		check(t, c.from, "approve", before, got, err, c.approve, c.approveTo)
		got, err = r.Deny("dave", "no", c.at)
		check(t, c.from, "deny", before, got, err, c.deny, c.denyTo)
		got, shares, err := r.Release(bobKey, c.at)
		check(t, c.from, "release", before, got, err, c.release, c.releasedNow)
		if (err == nil) != (len(shares) == 1 && string(shares[0].Share) == "share of T1") {
			t.Errorf("%s: release gave %v, %v", c.from, shares, err)
		}
		if !reflect.DeepEqual(r, before) {
			t.Errorf("%s: the record it was called on changed", c.from)
		}
	}
}

func check(t *testing.T, from State, what string, before, got Record, err, want error, to State) {
	t.Helper()
	switch {
	case !errors.Is(err, want):
		t.Errorf("%s, %s: %v, want %v", from, what, err, want)
	case err != nil && !reflect.DeepEqual(got, before):
		t.Errorf("%s, %s: refused, and changed to %+v", from, what, got)
	case err == nil && got.State != to:
		t.Errorf("%s, %s: now %s, want %s", from, what, got.State, to)
	}
}

func TestNobodyApprovesTheirOwn(t *testing.T) {
	for name, a := range map[string]StoredApproval{
		"name and key":           approvalBy("bob", bobKey, "T1"),
		"key under another name": approvalBy("robert", bobKey, "T1"),
		"name with another key":  approvalBy("bob", aliceKey, "T1"),
	} {
		if _, err := open(1).Approve(a, now); !errors.Is(err, ErrOwn) {
			t.Errorf("%s: %v", name, err)
		}
		if err := open(1).MayApprove(a.Approver, a.ApproverID, now); !errors.Is(err, ErrOwn) {
			t.Errorf("%s may approve: %v", name, err)
		}
	}
}

func TestNobodyApprovesTwice(t *testing.T) {
	r := must(open(3).Approve(alices, now))
	for name, a := range map[string]StoredApproval{
		"the same":                    alices,
		"name, other key and trustee": approvalBy("alice", "k", "T2"),
		"key, other name and trustee": approvalBy("eve", aliceKey, "T2"),
		"trustee, other name and key": approvalBy("carol", "k", "T1"),
	} {
		if got, err := r.Approve(a, now); !errors.Is(err, ErrTwice) || len(got.Approvals) != 1 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestThreshold(t *testing.T) {
	r := open(2)
	r = must(r.Approve(alices, now))
	if r.State != Open {
		t.Fatalf("after 1 of 2: %s", r.State)
	}
	if _, shares, err := r.Release(bobKey, now); !errors.Is(err, ErrNotApproved) || shares != nil {
		t.Fatalf("released with 1 of 2: %v", err)
	}
	r = must(r.Approve(approvalBy("carol", "carol-key", "T2"), now))
	released, shares, err := r.Release(bobKey, now)
	if err != nil || len(shares) != 2 || released.State != Released {
		t.Fatalf("after 2 of 2: %v, %d shares", err, len(shares))
	}
}

func TestOnlyTheRequesterIsGivenTheRelease(t *testing.T) {
	for _, id := range []identity.KeyID{aliceKey, "", "eve"} {
		if got, shares, err := approved().Release(id, now); !errors.Is(err, ErrNotYours) || shares != nil || got.State != Approved {
			t.Errorf("%q: %v, %v", id, shares, err)
		}
	}
}

func TestSharesAreDeletedAtTheEnd(t *testing.T) {
	for _, state := range []State{Denied, Released, Expired} {
		r := after(t, state)
		if r.State != state || len(r.Approvals) != 1 {
			t.Fatalf("%s: %+v", state, r)
		}
		a := r.Approvals[0]
		if a.Share != nil || a.Approver != "alice" || len(a.Signed) == 0 {
			t.Errorf("%s: kept %+v", state, a)
		}
		if r.Decided.IsZero() {
			t.Errorf("%s: no time", state)
		}
	}
	if r := approved().At(now); r.State != Approved || r.Approvals[0].Share == nil {
		t.Error("a share of an open request is gone")
	}
}

// Appending must not write into a list that another copy shares.
func TestApproveCopies(t *testing.T) {
	r := open(3)
	r.Approvals = append(make([]StoredApproval, 0, 8), alices)
	a := must(r.Approve(approvalBy("carol", "c", "T2"), now))
	b := must(r.Approve(approvalBy("dave", "d", "T3"), now))
	if a.Approvals[1].Approver != "carol" || b.Approvals[1].Approver != "dave" {
		t.Errorf("%s, %s", a.Approvals[1].Approver, b.Approvals[1].Approver)
	}
}

func TestDenyTellsWhoAndWhy(t *testing.T) {
	r := must(open(1).Deny("admin:carol", "not on the phone", now))
	if r.DecidedBy != "admin:carol" || r.Note != "not on the phone" || !r.Decided.Equal(now) {
		t.Errorf("%+v", r)
	}
}

func TestWithdrawTakesAnApprovalBack(t *testing.T) {
	r, changed := approved().Withdraw(aliceKey, now)
	if !changed || r.State != Open || len(r.Approvals) != 0 {
		t.Fatalf("changed %t, %s, %d approvals", changed, r.State, len(r.Approvals))
	}
	if _, shares, err := r.Release(bobKey, now); !errors.Is(err, ErrNotApproved) || shares != nil {
		t.Errorf("released all the same: %v", err)
	}
	if _, changed := approved().Withdraw("another-key", now); changed {
		t.Error("who approved nothing has nothing to take back")
	}
	for _, state := range []State{Denied, Released, Expired} {
		if _, changed := after(t, state).Withdraw(aliceKey, now.Add(2*time.Hour)); changed {
			t.Errorf("%s: over, and changed", state)
		}
	}
}
