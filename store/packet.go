package store

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
)

const (
	entryBucket         = "packet"         // packet ID: escrow.Entry
	bytesBucket         = "packet-bytes"   // packet ID: the packet, unchanged
	packetMachineBucket = "packet-machine" // blind key ID, packet ID: empty
	packetVolumeBucket  = "packet-volume"  // blind volume UUID, packet ID: empty
)

// PutPacket adds a packet. entry.Size and entry.Digest must be those of data.
// A packet with this ID that is there already is ErrExists: nothing replaces
// a packet's bytes.
func (tx *Tx) PutPacket(entry escrow.Entry, data []byte) error {
	key := []byte(entry.ID)
	if tx.has(entryBucket, key) || tx.has(bytesBucket, key) {
		return fmt.Errorf("store: packet %s: %w", entry.ID, ErrExists)
	}
	if err := checkDigest(entry, data); err != nil {
		return err
	}
	if err := tx.put(bytesBucket, key, data); err != nil {
		return err
	}
	for _, place := range tx.packetPlaces(entry) {
		if err := tx.put(place.bucket, place.key, nil); err != nil {
			return err
		}
	}
	return putJSON(tx, entryBucket, key, entry)
}

func checkDigest(entry escrow.Entry, data []byte) error {
	sum := sha256.Sum256(data)
	if entry.Size != len(data) || entry.Digest != hex.EncodeToString(sum[:]) {
		return fmt.Errorf("store: packet %s: bytes are not those that its entry names: %w", entry.ID, ErrDamaged)
	}
	return nil
}

type place struct {
	bucket string
	key    []byte
}

// packetPlaces is where the indexes have a packet.
func (tx *Tx) packetPlaces(entry escrow.Entry) []place {
	return []place{
		{packetMachineBucket, append(tx.sealer.blind(packetMachineBucket, string(entry.KeyID)), entry.ID...)},
		{packetVolumeBucket, append(tx.sealer.blind(packetVolumeBucket, entry.Volume.UUID), entry.ID...)},
	}
}

// Packet returns a packet's entry and its bytes.
func (tx *Tx) Packet(id string) (escrow.Entry, []byte, error) {
	entry, err := tx.Entry(id)
	if err != nil {
		return escrow.Entry{}, nil, err
	}
	data, err := tx.get(bytesBucket, []byte(id))
	if err != nil {
		return escrow.Entry{}, nil, err
	}
	if err := checkDigest(entry, data); err != nil {
		return escrow.Entry{}, nil, err
	}
	return entry, data, nil
}

// Entry returns a packet's entry.
func (tx *Tx) Entry(id string) (escrow.Entry, error) {
	return getJSON[escrow.Entry](tx, entryBucket, []byte(id))
}

// PutEntry replaces the entry of a packet that is there. Whose packet it is,
// of which volume and with what bytes, does not change.
func (tx *Tx) PutEntry(entry escrow.Entry) error {
	old, err := tx.Entry(entry.ID)
	if err != nil {
		return err
	}
	if entry.KeyID != old.KeyID || entry.Volume.UUID != old.Volume.UUID || entry.Digest != old.Digest || entry.Size != old.Size {
		return fmt.Errorf("store: packet %s: %w, of another machine, volume or content", entry.ID, ErrExists)
	}
	return putJSON(tx, entryBucket, []byte(entry.ID), entry)
}

// DateEntry notes when a packet's machine last compared it with its volume, and what
// was wrong then. It is no event of the audit log: of those that found nothing new
// nobody would see the others.
func (tx *Tx) DateEntry(id string, checked time.Time, failed string) error {
	entry, err := tx.Entry(id)
	if err != nil {
		return err
	}
	entry.CheckedAt, entry.CheckFailed = checked.UTC(), failed
	value, err := json.Marshal(entry)
	if err != nil {
		return fmt.Errorf("store: packet %s: %w", id, err)
	}
	return tx.write(entryBucket, []byte(id), value)
}

// DeletePacket removes a packet and its entry.
func (tx *Tx) DeletePacket(id string) error {
	entry, err := tx.Entry(id)
	if err != nil {
		return err
	}
	places := append(tx.packetPlaces(entry), place{bytesBucket, []byte(id)}, place{entryBucket, []byte(id)})
	for _, place := range places {
		if err := tx.delete(place.bucket, place.key); err != nil {
			return err
		}
	}
	return nil
}

// Entries goes through the entries of all packets in the order of their IDs.
// An error is the last thing it gives.
func (tx *Tx) Entries() iter.Seq2[escrow.Entry, error] {
	return allJSON[escrow.Entry](tx, entryBucket)
}

// EntriesOf goes through the entries of one machine's packets.
func (tx *Tx) EntriesOf(machine identity.KeyID) iter.Seq2[escrow.Entry, error] {
	return tx.entriesAt(packetMachineBucket, string(machine))
}

// EntriesOfVolume goes through the entries of the packets of one volume,
// whichever machines made them.
func (tx *Tx) EntriesOfVolume(uuid string) iter.Seq2[escrow.Entry, error] {
	return tx.entriesAt(packetVolumeBucket, uuid)
}

// CountPackets returns how many packets a machine has, without opening any.
func (tx *Tx) CountPackets(machine identity.KeyID) (int, error) {
	count := 0
	for _, err := range tx.keys(packetMachineBucket, tx.sealer.blind(packetMachineBucket, string(machine))) {
		if err != nil {
			return 0, err
		}
		count++
	}
	return count, nil
}

func (tx *Tx) entriesAt(bucket, text string) iter.Seq2[escrow.Entry, error] {
	return func(yield func(escrow.Entry, error) bool) {
		prefix := tx.sealer.blind(bucket, text)
		for key, err := range tx.keys(bucket, prefix) {
			var entry escrow.Entry
			if err == nil {
				entry, err = tx.Entry(string(key[len(prefix):]))
			}
			if !yield(entry, err) || err != nil {
				return
			}
		}
	}
}
