package server

import (
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// selfVerify keeps what a machine found when it compared its volumes with what was
// enrolled, and with what servers hold. In the log stands only what changed; what
// is wrong is an alarm.
func (s *Server) selfVerify(c call) (any, error) {
	in, err := decode[api.Verify](c)
	if err != nil {
		return nil, err
	}
	if err := unlock.CheckVolumes(in.Volumes); err != nil {
		return nil, api.Errorf(api.CodeUsage, "%v", err)
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		m, err := tx.Machine(c.machine.KeyID)
		if err != nil {
			return err
		}
		m, changed := m.Checked(in.Volumes, c.now)
		if err := tx.DateMachine(m.KeyID, m.Checks); err != nil {
			return err
		}
		for _, v := range in.Volumes {
			if err := dateCheck(tx, c, v); err != nil {
				return err
			}
		}
		for _, v := range changed {
			if err := s.recordCheck(tx, c, v); err != nil {
				return err
			}
		}
		return c.authorize(tx)
	})
}

// dateCheck notes it with the packet, if that is here and the machine's own.
func dateCheck(tx *store.Tx, c call, v unlock.VolumeCheck) error {
	e, err := tx.Entry(v.Packet)
	if err != nil || e.KeyID != c.machine.KeyID || e.Volume.UUID != v.UUID {
		return nil // what is said of it stands in the machine's record
	}
	return tx.DateEntry(e.ID, c.now, v.Reason)
}

func (s *Server) recordCheck(tx *store.Tx, c call, v unlock.VolumeCheck) error {
	event := store.Event{Action: "packet.check", Machine: string(c.machine.KeyID), Packet: v.Packet, Volume: v.UUID, Detail: "ok"}
	if v.Reason != "" {
		event.Detail = v.Reason
	}
	if err := c.record(tx, event); err != nil || v.Reason == "" {
		return err
	}
	s.log.Error("alarm: a volume is not as it was enrolled, or not as it was escrowed", "machine", c.machine.KeyID.Short(), "volume", v.UUID, "why", v.Reason)
	event.Action = "alarm.verify"
	return c.record(tx, event)
}
