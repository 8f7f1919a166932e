package server

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// Version is set by the linker.
var Version = "devel"

func (s *Server) status(c call) (any, error) {
	out := api.Status{
		Name: s.state.Settings.Name, KeyID: s.key.KeyID(), Version: Version, Started: s.started,
		Addresses: s.state.Settings.Addresses, Listen: s.state.Settings.Listen,
	}
	return &out, s.store.View(func(tx *store.Tx) error {
		meta, err := loadMeta(tx)
		if err != nil {
			return err
		}
		policy, err := escrow.ParsePolicy(meta.policy)
		if err != nil {
			return err
		}
		master, err := seal.ParsePublic(meta.masterPublic)
		if err != nil {
			return err
		}
		head, err := tx.AuditHead()
		if err != nil {
			return err
		}
		digest := policy.Digest()
		out.Unconfirmed, out.Epoch = meta.unconfirmed, head.Epoch
		out.AuditSeq, out.AuditHash = head.Seq, hex.EncodeToString(head.Hash[:])
		out.PolicyEpoch, out.PolicyDigest, out.Threshold = policy.Epoch, hex.EncodeToString(digest[:]), policy.Threshold
		for _, t := range policy.Trustees {
			out.Trustees = append(out.Trustees, t.Fingerprint+" "+t.Name)
		}
		out.Master, out.MasterHere, out.MasterSaved = master.Fingerprint(), meta.masterPrivate != nil, meta.masterExported
		if err := countPackets(tx, &out, c.now); err != nil {
			return err
		}
		for r, err := range tx.Requests() {
			if err != nil {
				return err
			}
			if r = r.At(c.now); r.State == recovery.Open || r.State == recovery.Approved {
				out.OpenRequests++
			}
		}
		return nil
	})
}

// countPackets counts machines and packets, and what somebody must look after:
// machines of which nothing opens, and secrets that are due to be replaced.
func countPackets(tx *store.Tx, out *api.Status, now time.Time) error {
	lives, err := store.Lives.Get(tx)
	if err != nil {
		return err
	}
	proved := map[identity.KeyID]bool{}
	for e, err := range tx.Briefs("") {
		if err != nil {
			return err
		}
		if e.State != escrow.Purged {
			out.Packets++
		}
		if e.State != escrow.Verified {
			continue
		}
		proved[e.KeyID] = true
		if e.RotateDue(lives.Of(e.Group), now) {
			out.RotateDue++
		}
		if !e.ReencryptSince.IsZero() {
			out.ReencryptDue++
		}
	}
	for id, err := range tx.MachineIDs() {
		if err != nil {
			return err
		}
		out.Machines++
		if proved[id] {
			continue
		}
		m, err := tx.Machine(id)
		if err != nil {
			return err
		}
		if m.Unenrolled.IsZero() {
			out.Unproved++
		}
	}
	return nil
}

// confirm ends the state in which nothing is served. The epoch grows, so that
// callers who saw a later log know that an administrator took it back.
func (s *Server) confirm(c call) (any, error) {
	return nil, s.store.Update(func(tx *store.Tx) error {
		why, err := store.Unconfirmed.Get(tx)
		if err != nil {
			return err
		}
		if why == "" {
			return api.Errorf(api.CodeConflict, "nothing to confirm: this server serves")
		}
		epoch, err := store.Epoch.Get(tx)
		if err != nil {
			return err
		}
		return errors.Join(
			store.Unconfirmed.Put(tx, ""),
			store.Epoch.Put(tx, epoch+1),
			c.record(tx, store.Event{Action: "server.confirm", Detail: fmt.Sprintf("epoch %d; it was: %s", epoch+1, why)}),
		)
	})
}

func (s *Server) policy(call) (any, error) {
	var out api.Policy
	return &out, s.store.View(func(tx *store.Tx) error {
		var err error
		out, err = currentPolicy(tx)
		return err
	})
}

func currentPolicy(tx *store.Tx) (api.Policy, error) {
	text, err := store.Policy.Get(tx)
	if err != nil {
		return api.Policy{}, err
	}
	keys, err := store.TrusteeKeys.Get(tx)
	out := api.Policy{Policy: string(text)}
	for _, k := range keys {
		out.Keys = append(out.Keys, string(k))
	}
	return out, err
}

// meta is what status and master tell of the values of the whole server.
type meta struct {
	policy, masterPublic, masterPrivate []byte
	unconfirmed                         string
	masterExported                      time.Time
}

func loadMeta(tx *store.Tx) (m meta, err error) {
	var errs [5]error
	m.policy, errs[0] = store.Policy.Get(tx)
	m.masterPublic, errs[1] = store.MasterPublic.Get(tx)
	m.masterPrivate, errs[2] = store.MasterPrivate.Get(tx)
	m.unconfirmed, errs[3] = store.Unconfirmed.Get(tx)
	m.masterExported, errs[4] = store.MasterExported.Get(tx)
	return m, errors.Join(errs[:]...)
}

func (s *Server) master(call) (any, error) {
	var out api.Text
	return &out, s.store.View(func(tx *store.Tx) error {
		key, err := store.MasterPublic.Get(tx)
		out.Text = string(key)
		return err
	})
}

// masterExport gives the protected private half away, to be kept in a safe.
func (s *Server) masterExport(c call) (any, error) {
	var out api.Text
	return &out, s.store.Update(func(tx *store.Tx) error {
		key, err := store.MasterPrivate.Get(tx)
		if err != nil {
			return err
		}
		if key == nil {
			return api.Errorf(api.CodeNotFound, "this server never had its master key's private half: it is where it was made")
		}
		out.Text = string(key)
		return c.record(tx, store.Event{Action: "master.export"})
	})
}

// masterSaved notes that an exported private half is on somebody's disk.
func (s *Server) masterSaved(c call) (any, error) {
	return nil, s.store.Update(func(tx *store.Tx) error {
		return errors.Join(
			store.MasterExported.Put(tx, c.now),
			c.record(tx, store.Event{Action: "master.saved"}),
		)
	})
}

// masterReplace takes the same private half under another passphrase.
func (s *Server) masterReplace(c call) (any, error) {
	in, err := decode[api.Text](c)
	if err != nil {
		return nil, err
	}
	given, err := seal.ParsePublic([]byte(in.Text))
	if err != nil {
		return nil, api.Errorf(api.CodeIntegrity, "%v", err)
	}
	if locked, err := seal.Protected([]byte(in.Text)); err != nil || !locked {
		return nil, api.Errorf(api.CodeUsage, "the key is not a private key under a passphrase")
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		meta, err := loadMeta(tx)
		if err != nil {
			return err
		}
		master, err := seal.ParsePublic(meta.masterPublic)
		if err != nil {
			return err
		}
		if given.Fingerprint() != master.Fingerprint() {
			return api.Errorf(api.CodeRefused, "refused: %s is not this server's master key %s", given.Fingerprint(), master.Fingerprint())
		}
		return errors.Join(
			store.MasterPrivate.Put(tx, []byte(in.Text)),
			c.record(tx, store.Event{Action: "master.passwd"}),
		)
	})
}

// auditPage is how many entries one call returns at most.
const auditPage = 1000

func (s *Server) audit(c call) (any, error) {
	after, err := strconv.ParseUint(c.FormValue("after"), 10, 64)
	if err != nil && c.FormValue("after") != "" {
		return nil, api.Errorf(api.CodeUsage, "after: not a number")
	}
	out := []store.Event{}
	return &out, s.store.View(func(tx *store.Tx) error {
		out, err = tx.AuditFrom(after+1, auditPage)
		return err
	})
}

// backup streams a consistent copy of the store; its values stay sealed. The
// copy is made in a file first, so that a slow reader holds no transaction.
func (s *Server) backup(c call) (any, error) {
	folder, err := os.MkdirTemp(s.state.Dir, snapshotPrefix)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(folder)
	err = s.store.Update(func(tx *store.Tx) error {
		return c.record(tx, store.Event{Action: "backup.create"})
	})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(folder, storeFile)
	if err := s.store.Snapshot(path); err != nil {
		return nil, err
	}
	tmp, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := tmp.Stat()
	if err != nil {
		tmp.Close()
		return nil, err
	}
	return &stream{tmp, info.Size()}, nil
}
