package recovery

import (
	"errors"
	"testing"
	"time"
)

func TestRescueFile(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const volume = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	rescue := Rescue{Volume: volume, Inviter: "bob", Expires: now.Add(time.Hour)}
	request := &Request{ID: "new", VolumeUUID: volume}
	ended := func(state State, by string) *Record {
		return &Record{State: state, DecidedBy: by, Expires: now.Add(time.Hour)}
	}
	for name, x := range map[string]struct {
		request *Request
		last    *Record
		filed   int
		at      time.Time
		over    bool
	}{
		"the first":                  {request, nil, 0, now, false},
		"in the last second":         {request, nil, 0, now.Add(time.Hour - 1), false},
		"when it is over":            {request, nil, 0, now.Add(time.Hour), true},
		"another volume":             {&Request{ID: "new", VolumeUUID: "1" + volume[1:]}, nil, 0, now, true},
		"while one is open":          {request, ended(Open, ""), 1, now, false},
		"while one is approved":      {request, ended(Approved, ""), 1, now, false},
		"after it withdrew":          {request, ended(Denied, "rescue:rescue-1"), 1, now, false},
		"after a denial":             {request, ended(Denied, "admin:alice"), 1, now, true},
		"after a denial on the spot": {request, ended(Denied, "local:0"), 1, now, true},
		"after the release":          {request, ended(Released, "x"), 1, now, true},
		"after one expired":          {request, &Record{State: Approved, Expires: now}, 1, now, false},
		"the tenth":                  {request, ended(Expired, ""), 9, now, false},
		"the eleventh":               {request, ended(Expired, ""), 10, now, true},
	} {
		before := rescue
		before.Filed = x.filed
		after, err := before.File(x.request, x.last, x.at)
		switch {
		case errors.Is(err, ErrRescueOver) != x.over || err != nil && !x.over:
			t.Errorf("%s: %v", name, err)
		case err != nil && after != before:
			t.Errorf("%s: a refusal changed it", name)
		case err == nil && (after.Request != "new" || after.Filed != x.filed+1):
			t.Errorf("%s: %+v", name, after)
		}
	}
	invited := Record{State: Open, Expires: now.Add(time.Hour), Requester: rescue.Requester(), RequesterID: "r", Inviter: "bob", InviterID: "b"}
	if err := invited.MayApprove("bob", "x", now); !errors.Is(err, ErrInvited) {
		t.Errorf("by name: %v", err)
	}
	if err := invited.MayApprove("other", "b", now); !errors.Is(err, ErrInvited) {
		t.Errorf("by key: %v", err)
	}
	if err := invited.MayApprove(rescue.Requester(), "x", now); !errors.Is(err, ErrOwn) {
		t.Errorf("the rescue itself: %v", err)
	}
	if err := invited.MayApprove("alice", "a", now); err != nil {
		t.Errorf("somebody else: %v", err)
	}
}
