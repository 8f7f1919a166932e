package server

import (
	"encoding/base64"
	"net/http"

	"mandos-escrow/internal/api"
	"mandos-escrow/store"
)

// addHead adds the signed head of the log to a reply.
func (s *Server) addHead(h http.Header) {
	var head store.Head
	err := s.store.View(func(tx *store.Tx) (err error) {
		head, err = tx.AuditHead()
		return err
	})
	if err != nil {
		s.log.Error("read audit head", "err", err)
		return
	}
	signed, err := head.Sign(s.key)
	if err != nil {
		s.log.Error("sign audit head", "err", err)
		return
	}
	h.Set(api.HeaderHead, base64.StdEncoding.EncodeToString(signed))
}

// checkWitness looks at the head that a caller has seen. One of our own
// signing that this log does not hold means that the store was set back: from
// then on nothing is served until a person has looked. Whoever shows it: a store
// that was set back may not know an administrator of today.
func (s *Server) checkWitness(c call) error {
	text := c.Header.Get(api.HeaderSeen)
	if text == "" || c.local {
		return nil
	}
	signed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil // not a head of ours: it proves nothing
	}
	seen, err := store.VerifyHead(signed, s.key.Public())
	if err != nil {
		return nil
	}
	lost := false
	err = s.store.View(func(tx *store.Tx) error {
		head, err := tx.AuditHead()
		if err != nil {
			return err
		}
		if seen.Epoch < head.Epoch {
			return nil // from before an administrator confirmed
		}
		has, err := tx.AuditHas(seen)
		lost = seen.Epoch > head.Epoch || !has
		return err
	})
	if err != nil || !lost {
		return err
	}
	const why = "a caller has seen a later audit log than this server has: the store was set back"
	return s.store.Update(func(tx *store.Tx) error {
		before, err := store.Unconfirmed.Get(tx)
		if err != nil {
			return err
		}
		epoch, err := store.Epoch.Get(tx)
		if err != nil || before != "" && seen.Epoch <= epoch {
			return err
		}
		if before == "" {
			if err := store.Unconfirmed.Put(tx, why); err != nil {
				return err
			}
		}
		if seen.Epoch > epoch { // confirm must lead past every epoch that was ever shown
			if err := store.Epoch.Put(tx, seen.Epoch); err != nil {
				return err
			}
		}
		return tx.Audit(store.Event{Time: c.now, Actor: c.actor, Action: "alarm.setback", Detail: why})
	})
}

// unconfirmed says why nothing is served, or "".
func (s *Server) unconfirmed() (why string) {
	err := s.store.View(func(tx *store.Tx) (err error) {
		why, err = store.Unconfirmed.Get(tx)
		return err
	})
	if err != nil {
		return "its store cannot be read: " + err.Error()
	}
	return why
}
