package server

import (
	"errors"
	"fmt"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// selfRemove takes a machine back, on its own word: it gets nothing from now
// on, and its sealed blobs are gone. Its packets stay: only an administrator
// who names one deletes it. Said twice it is the same.
func (s *Server) selfRemove(c call) (any, error) {
	var out api.Unenrolled
	return &out, s.store.Update(func(tx *store.Tx) (err error) {
		if out.Packets, err = tx.CountPackets(c.machine.KeyID); err != nil {
			return err
		}
		m, err := tx.Machine(c.machine.KeyID)
		if err != nil {
			return err
		}
		if !m.Unenrolled.IsZero() {
			return c.authorize(tx)
		}
		if m.DisabledBecause == notEnrolled {
			m.DisabledBecause = unlock.SelfUnenrolled // so that no commit enables it
		}
		if err := tx.DeleteBlobs(m.KeyID); err != nil {
			return err
		}
		if err := tx.PutMachine(m.Unenroll(c.now)); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "machine.unenroll", Machine: string(m.KeyID), Detail: m.Name})
	})
}

// selfBoot keeps what became of a machine's boot, once for each boot. What
// needs a person is an alarm: a boot passphrase that opens its volume no more,
// and a volume with another header than the enrolled one.
func (s *Server) selfBoot(c call) (any, error) {
	in, err := decode[unlock.Boot](c)
	if err != nil {
		return nil, err
	}
	if err := in.Check(); err != nil {
		return nil, api.Errorf(api.CodeUsage, "%v", err)
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		m, err := tx.Machine(c.machine.KeyID)
		if err != nil {
			return err
		}
		if m.LastBoot.ID == in.ID {
			return c.authorize(tx) // its reply was lost
		}
		in.Told = c.now.UTC()
		m.LastBoot = in
		if err := tx.PutMachine(m); err != nil {
			return err
		}
		return s.recordBoot(tx, c, in)
	})
}

func (s *Server) recordBoot(tx *store.Tx, c call, boot unlock.Boot) error {
	id := string(c.machine.KeyID)
	said := []string{"boot " + boot.ID}
	for _, v := range boot.Volumes {
		said = append(said, fmt.Sprintf("%s %s", v.UUID, v.Outcome))
	}
	if err := c.record(tx, store.Event{Action: "machine.boot", Machine: id, Detail: strings.Join(said, ", ")}); err != nil {
		return err
	}
	alarms := map[unlock.Outcome]string{unlock.Rejected: "alarm.rejected", unlock.Mismatched: "alarm.mismatch"}
	for _, v := range boot.Volumes {
		action := alarms[v.Outcome]
		if action == "" {
			continue
		}
		s.log.Error("alarm at a boot", "machine", c.machine.KeyID.Short(), "volume", v.UUID, "outcome", v.Outcome, "why", v.Reason)
		if err := c.record(tx, store.Event{Action: action, Machine: id, Volume: v.UUID, Detail: v.Reason}); err != nil {
			return err
		}
	}
	return nil
}

// unenrolled reports whether the machine that stored a packet took itself back
// since. Then a packet of another machine for the same volume is no sign of a
// copy.
func unenrolled(tx *store.Tx, e escrow.Entry) (bool, error) {
	m, err := tx.Machine(e.KeyID)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	return !m.Unenrolled.IsZero(), err
}
