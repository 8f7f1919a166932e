package store

import (
	"encoding/json"
	"fmt"
	"iter"

	"mandos-escrow/internal/identity"
	"mandos-escrow/unlock"
)

const (
	machineBucket = "machine"         // key ID: unlock.Machine
	runningBucket = "machine-running" // blind running key ID: key ID
	nameBucket    = "machine-name"    // blind name, key ID: empty
	blobBucket    = "blob"            // blind key ID, blind volume UUID: sealed blob
	pendingBucket = "blob-pending"    // the same
)

// Machine returns the machine whose boot identity has this key ID.
func (tx *Tx) Machine(id identity.KeyID) (unlock.Machine, error) {
	return getJSON[unlock.Machine](tx, machineBucket, []byte(id))
}

// MachineByRunning returns the machine whose running identity has this key ID.
func (tx *Tx) MachineByRunning(id identity.KeyID) (unlock.Machine, error) {
	key, err := tx.follow(runningBucket, string(id))
	if err != nil {
		return unlock.Machine{}, err
	}
	return tx.Machine(identity.KeyID(key))
}

// PutMachine adds a machine, or replaces the one with the same key ID. A
// running identity that another machine has is ErrExists.
func (tx *Tx) PutMachine(machine unlock.Machine) error {
	if err := tx.moveRunning(machine); err != nil {
		return err
	}
	if err := tx.moveName(machine); err != nil {
		return err
	}
	tx.changed = append(tx.changed, string(machine.KeyID))
	return putJSON(tx, machineBucket, []byte(machine.KeyID), machine)
}

// DateMachine notes what a machine last found of its volumes; as DateEntry it is no
// event of the audit log.
func (tx *Tx) DateMachine(id identity.KeyID, checks []unlock.VolumeCheck) error {
	machine, err := tx.Machine(id)
	if err != nil {
		return err
	}
	machine.Checks = checks
	value, err := json.Marshal(machine)
	if err != nil {
		return fmt.Errorf("store: machine %s: %w", id.Short(), err)
	}
	return tx.write(machineBucket, []byte(id), value)
}

func (tx *Tx) moveRunning(machine unlock.Machine) error {
	if machine.RunningKeyID != "" {
		if err := tx.claim(runningBucket, string(machine.RunningKeyID), []byte(machine.KeyID)); err != nil {
			return fmt.Errorf("running identity %s: %w", machine.RunningKeyID.Short(), err)
		}
	}
	if !tx.has(machineBucket, []byte(machine.KeyID)) {
		return nil
	}
	old, err := tx.Machine(machine.KeyID)
	if err != nil {
		return err
	}
	if old.RunningKeyID == "" || old.RunningKeyID == machine.RunningKeyID {
		return nil
	}
	return tx.unclaim(runningBucket, string(old.RunningKeyID))
}

// moveName takes the name that the machine had out of the index, and puts in
// that which it gets.
func (tx *Tx) moveName(machine unlock.Machine) error {
	if tx.has(machineBucket, []byte(machine.KeyID)) {
		old, err := tx.Machine(machine.KeyID)
		if err != nil {
			return err
		}
		if old.Name == machine.Name {
			return nil
		}
		if err := tx.delete(nameBucket, tx.nameKey(old)); err != nil {
			return err
		}
	}
	return tx.put(nameBucket, tx.nameKey(machine), nil)
}

func (tx *Tx) nameKey(machine unlock.Machine) []byte {
	return append(tx.sealer.blind(nameBucket, machine.Name), machine.KeyID...)
}

// MachinesNamed returns the key IDs of the machines that have a name.
func (tx *Tx) MachinesNamed(name string) ([]identity.KeyID, error) {
	var ids []identity.KeyID
	prefix := tx.sealer.blind(nameBucket, name)
	for key, err := range tx.keys(nameBucket, prefix) {
		if err != nil {
			return nil, err
		}
		ids = append(ids, identity.KeyID(key[len(prefix):]))
	}
	return ids, nil
}

// DeleteMachine removes a machine and its blobs. Its packets stay.
func (tx *Tx) DeleteMachine(id identity.KeyID) error {
	machine, err := tx.Machine(id)
	if err != nil {
		return err
	}
	if machine.RunningKeyID != "" {
		if err := tx.unclaim(runningBucket, string(machine.RunningKeyID)); err != nil {
			return err
		}
	}
	if err := tx.DeleteBlobs(id); err != nil {
		return err
	}
	if err := tx.delete(nameBucket, tx.nameKey(machine)); err != nil {
		return err
	}
	tx.changed = append(tx.changed, string(id))
	return tx.delete(machineBucket, []byte(id))
}

// Machines goes through all machines in the order of their key IDs. An error
// is the last thing it gives.
func (tx *Tx) Machines() iter.Seq2[unlock.Machine, error] { return tx.MachinesAfter("") }

// MachinesAfter is Machines for those after a key ID.
func (tx *Tx) MachinesAfter(after identity.KeyID) iter.Seq2[unlock.Machine, error] {
	return jsonAfter[unlock.Machine](tx, machineBucket, []byte(after))
}

// MachineIDs goes through the key IDs of all machines, without opening any.
func (tx *Tx) MachineIDs() iter.Seq2[identity.KeyID, error] {
	return func(yield func(identity.KeyID, error) bool) {
		for key, err := range tx.keys(machineBucket, nil) {
			if !yield(identity.KeyID(key), err) || err != nil {
				return
			}
		}
	}
}

// A volume of a machine has an active blob, which is what a booting machine is
// given, and, until an enrolment or a rotation commits, a pending one.

// Blob returns the active blob of a volume.
func (tx *Tx) Blob(id identity.KeyID, uuid string) ([]byte, error) {
	return tx.get(blobBucket, tx.blobKey(blobBucket, id, uuid))
}

// PutBlob sets the active blob of a volume.
func (tx *Tx) PutBlob(id identity.KeyID, uuid string, blob []byte) error {
	return tx.put(blobBucket, tx.blobKey(blobBucket, id, uuid), blob)
}

// PendingBlob returns the pending blob of a volume.
func (tx *Tx) PendingBlob(id identity.KeyID, uuid string) ([]byte, error) {
	return tx.get(pendingBucket, tx.blobKey(pendingBucket, id, uuid))
}

// PutPendingBlob sets the pending blob of a volume.
func (tx *Tx) PutPendingBlob(id identity.KeyID, uuid string, blob []byte) error {
	return tx.put(pendingBucket, tx.blobKey(pendingBucket, id, uuid), blob)
}

// ActivateBlob makes the pending blob of a volume its active one; ErrNotFound
// when none is pending.
func (tx *Tx) ActivateBlob(id identity.KeyID, uuid string) error {
	blob, err := tx.PendingBlob(id, uuid)
	if err != nil {
		return err
	}
	if err := tx.PutBlob(id, uuid, blob); err != nil {
		return err
	}
	return tx.delete(pendingBucket, tx.blobKey(pendingBucket, id, uuid))
}

// DeleteBlob removes the blobs of one volume, active and pending.
func (tx *Tx) DeleteBlob(id identity.KeyID, uuid string) error {
	for _, bucket := range []string{blobBucket, pendingBucket} {
		if err := tx.delete(bucket, tx.blobKey(bucket, id, uuid)); err != nil {
			return err
		}
	}
	return nil
}

// DeleteBlobs removes all blobs of a machine, active and pending.
func (tx *Tx) DeleteBlobs(id identity.KeyID) error {
	for _, bucket := range []string{blobBucket, pendingBucket} {
		for key, err := range tx.keys(bucket, tx.sealer.blind(bucket, string(id))) {
			if err != nil {
				return err
			}
			if err := tx.delete(bucket, key); err != nil {
				return err
			}
		}
	}
	return nil
}

func (tx *Tx) blobKey(bucket string, id identity.KeyID, uuid string) []byte {
	return append(tx.sealer.blind(bucket, string(id)), tx.sealer.blind(bucket, uuid)...)
}
