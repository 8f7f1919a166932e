package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// source is the store as the boot protocol sees it: it implements
// unlock.Source for one server.
type source struct{ *Server }

// Lookup finds the machine of a boot identity.
func (s source) Lookup(id identity.KeyID) (m unlock.Machine, err error) {
	if why := s.unconfirmed(); why != "" {
		s.log.Warn("no boot is served until `server confirm`", "machine", id.Short(), "why", why)
		return m, fmt.Errorf("server is not confirmed: %s", why)
	}
	err = s.store.View(func(tx *store.Tx) error {
		if m, err = tx.Machine(id); isAny(err, store.ErrNotFound) {
			return fmt.Errorf("%w: %w", unlock.ErrUnknown, err)
		}
		return err
	})
	return m, err
}

// Release decides once more inside the transaction that records the release.
func (s source) Release(_ context.Context, id identity.KeyID, requested time.Time, nonce string) (blobs [][]byte, err error) {
	err = s.store.Batch(func(tx *store.Tx) error {
		blobs = nil
		if why, err := store.Unconfirmed.Get(tx); err != nil || why != "" {
			return fmt.Errorf("server is not confirmed: %s (%w)", why, err)
		}
		m, err := tx.Machine(id)
		if err != nil {
			return err
		}
		now := s.now()
		if d := m.Decide(requested, now); d.Action != unlock.Release {
			return fmt.Errorf("%w: %s", unlock.ErrRefused, d.Reason)
		}
		for _, uuid := range m.Volumes {
			blob, err := tx.Blob(id, uuid)
			if err != nil {
				return err
			}
			blobs = append(blobs, blob)
		}
		if len(blobs) == 0 {
			return fmt.Errorf("%w: no sealed blob is here", unlock.ErrRefused)
		}
		if err := tx.PutMachine(m.Released(now, nonce)); err != nil {
			return err
		}
		return tx.Audit(store.Event{Time: now, Actor: "boot:" + m.Name, Action: "boot.release", Machine: string(id), Detail: "nonce " + nonce})
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("released", "machine", id.Short())
	return blobs, nil
}

// Waiting notes that a boot waits for an administrator. A boot that is begun
// again and again is noted as seldom as a refusal is.
func (s source) Waiting(id identity.KeyID, until time.Time) {
	s.log.Info("waiting for approval", "machine", id.Short(), "until", until)
	if !s.refusals.due(id, "boot.wait", s.now()) {
		return
	}
	err := s.store.Update(func(tx *store.Tx) error {
		m, err := tx.Machine(id)
		if err != nil {
			return err
		}
		if err := tx.PutMachine(m.ApprovalRequested(s.now())); err != nil {
			return err
		}
		return tx.Audit(store.Event{Time: s.now(), Actor: "boot:" + m.Name, Action: "boot.wait", Machine: string(id), Detail: "until " + until.UTC().Format(time.RFC3339)})
	})
	if err != nil {
		s.log.Error("note that a boot waits", "machine", id.Short(), "err", err)
	}
}

// Changed is closed at the next change of a machine.
func (s source) Changed(id identity.KeyID) <-chan struct{} { return s.store.Watch(string(id)) }

// refusalPause is how long the same refusal of the same machine, or that it
// waits, is only logged: whoever has its initramfs could fill the audit log
// otherwise.
const refusalPause = 10 * time.Minute

// Refused keeps a refusal of a machine that is known, and makes a timeout that
// has passed final.
func (s source) Refused(id identity.KeyID, reason string) {
	s.log.Warn("boot refused", "machine", id.Short(), "why", reason)
	if reason == unlock.ReasonUnknown || !s.isMachine(id) || !s.refusals.due(id, reason, s.now()) && reason != unlock.ReasonTimedOut {
		return
	}
	err := s.store.Update(func(tx *store.Tx) error {
		m, err := tx.Machine(id)
		if isAny(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if reason == unlock.ReasonTimedOut {
			if err := tx.PutMachine(m.Expire(s.now())); err != nil {
				return err
			}
		}
		return tx.Audit(store.Event{Time: s.now(), Actor: "boot:" + m.Name, Action: "boot.refuse", Machine: string(id), Detail: reason})
	})
	if err != nil {
		s.log.Error("audit of a refused boot", "machine", id.Short(), "err", err)
	}
}

// isMachine is for what strangers can cause too, so it writes nothing.
func (s source) isMachine(id identity.KeyID) bool {
	return s.store.View(func(tx *store.Tx) error {
		_, err := tx.Machine(id)
		return err
	}) == nil
}

// refusals remembers when each refusal of a machine, and that it waits, was last
// written. It holds known machines and constant reasons only, so it stays as
// small as they are.
type refusals struct {
	mu   sync.Mutex
	last map[refusal]time.Time
}

type refusal struct {
	id     identity.KeyID
	reason string
}

func (r *refusals) due(id identity.KeyID, reason string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	this := refusal{id, reason}
	if at, ok := r.last[this]; ok && now.Sub(at) < refusalPause && !now.Before(at) {
		return false
	}
	if r.last == nil {
		r.last = map[refusal]time.Time{}
	}
	r.last[this] = now
	return true
}
