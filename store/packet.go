package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
)

const (
	entryBucket         = "packet"         // packet ID: escrow.Entry
	bytesBucket         = "packet-bytes"   // packet ID: the packet, unchanged
	packetMachineBucket = "packet-machine" // blind key ID, packet ID: empty
	packetVolumeBucket  = "packet-volume"  // blind volume UUID, packet ID: empty
	packetWordBucket    = "packet-word"    // blind word, packet ID: empty
	packetBriefBucket   = "packet-brief"   // packet ID: brief
)

// wordStart is how much of a UUID or a key ID finds a packet: with 4 hex digits
// one word has one or two of 100,000 packets.
const wordStart = 4

// PutPacket adds a packet. entry.Size and entry.Digest must be those of data.
// A packet with this ID that is there already is ErrExists: nothing replaces
// a packet's bytes. One of the same machine and volume is taken again after its
// bytes were purged; whether they are the same is for the caller to say.
func (tx *Tx) PutPacket(entry escrow.Entry, data []byte) error {
	key := []byte(entry.ID)
	if tx.has(entryBucket, key) {
		old, err := tx.Entry(entry.ID)
		if err != nil {
			return err
		}
		if old.State != escrow.Purged || !sameOwner(entry, old) {
			return fmt.Errorf("store: packet %s: %w", entry.ID, ErrExists)
		}
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
	return tx.writeEntry(entry)
}

// writeEntry writes an entry, and the brief of it that lists go through.
func (tx *Tx) writeEntry(entry escrow.Entry) error {
	if err := tx.put(packetBriefBucket, []byte(entry.ID), encodeBrief(entry)); err != nil {
		return err
	}
	return putJSON(tx, entryBucket, []byte(entry.ID), entry)
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

// packetPlaces is where the indexes have a packet. A purged one is no packet of
// its machine any more, but is still found.
func (tx *Tx) packetPlaces(entry escrow.Entry) []place {
	places := []place{{packetVolumeBucket, append(tx.sealer.blind(packetVolumeBucket, entry.Volume.UUID), entry.ID...)}}
	if entry.State != escrow.Purged {
		places = append(places, place{packetMachineBucket, append(tx.sealer.blind(packetMachineBucket, string(entry.KeyID)), entry.ID...)})
	}
	for _, word := range packetWords(entry) {
		places = append(places, place{packetWordBucket, append(tx.sealer.blind(packetWordBucket, word), entry.ID...)})
	}
	return places
}

// packetWords are what a packet is found by: its machine's name, and the
// beginnings of key ID and UUID.
func packetWords(entry escrow.Entry) []string {
	words := []string{entry.Machine, wordOf(string(entry.KeyID)), wordOf(entry.Volume.UUID)}
	slices.Sort(words)
	return slices.Compact(words)
}

func wordOf(text string) string { return strings.ToLower(text[:min(wordStart, len(text))]) }

// Packet returns a packet's entry and its bytes. Those of a purged one are
// escrow.ErrPurged.
func (tx *Tx) Packet(id string) (escrow.Entry, []byte, error) {
	entry, err := tx.Entry(id)
	if err != nil {
		return escrow.Entry{}, nil, err
	}
	if err := entry.Gone(); err != nil {
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
// of which volume and with what bytes, does not change; whether it has any is
// not PutEntry's to say.
func (tx *Tx) PutEntry(entry escrow.Entry) error {
	old, err := tx.Entry(entry.ID)
	if err != nil {
		return err
	}
	if !sameOwner(entry, old) || entry.Digest != old.Digest || entry.Size != old.Size || (entry.State == escrow.Purged) != (old.State == escrow.Purged) {
		return fmt.Errorf("store: packet %s: %w, of another machine, volume or content", entry.ID, ErrExists)
	}
	return tx.writeEntry(entry)
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
	if err := tx.write(packetBriefBucket, []byte(id), encodeBrief(entry)); err != nil {
		return err
	}
	return tx.write(entryBucket, []byte(id), value)
}

func sameOwner(a, b escrow.Entry) bool {
	return a.KeyID == b.KeyID && a.Machine == b.Machine && a.Volume.UUID == b.Volume.UUID
}

// PurgePacket removes a packet's bytes; entry, of state escrow.Purged, stays,
// so that its ID is never another's.
func (tx *Tx) PurgePacket(entry escrow.Entry) error {
	old, err := tx.Entry(entry.ID)
	if err != nil {
		return err
	}
	if entry.State != escrow.Purged || old.State == escrow.Purged {
		return fmt.Errorf("store: purge packet %s: %w", entry.ID, escrow.ErrState)
	}
	for _, place := range append(tx.packetPlaces(old), place{bytesBucket, []byte(entry.ID)}) {
		if err := tx.delete(place.bucket, place.key); err != nil {
			return err
		}
	}
	for _, place := range tx.packetPlaces(entry) {
		if err := tx.put(place.bucket, place.key, nil); err != nil {
			return err
		}
	}
	return tx.writeEntry(entry)
}

// Entries goes through the entries of all packets in the order of their IDs.
// An error is the last thing it gives.
func (tx *Tx) Entries() iter.Seq2[escrow.Entry, error] {
	return allJSON[escrow.Entry](tx, entryBucket)
}

// EntriesFrom goes through the entries of packets whose IDs begin with prefix.
func (tx *Tx) EntriesFrom(prefix string) iter.Seq2[escrow.Entry, error] {
	return func(yield func(escrow.Entry, error) bool) {
		for key, err := range tx.keys(entryBucket, []byte(prefix)) {
			var entry escrow.Entry
			if err == nil {
				entry, err = tx.Entry(string(key))
			}
			if !yield(entry, err) || err != nil {
				return
			}
		}
	}
}

// EntriesByWord goes through the entries of packets that a word may mean: those
// of a machine that had this name when it made them, and those whose key ID or
// volume UUID begins with the first four characters of the word. The caller
// compares the rest.
func (tx *Tx) EntriesByWord(word string) iter.Seq2[escrow.Entry, error] {
	return func(yield func(escrow.Entry, error) bool) {
		seen := map[string]bool{}
		for _, start := range slices.Compact([]string{word, wordOf(word)}) {
			for entry, err := range tx.entriesAt(packetWordBucket, start) {
				if err == nil && seen[entry.ID] {
					continue
				}
				seen[entry.ID] = true
				if !yield(entry, err) || err != nil {
					return
				}
			}
		}
	}
}

// Briefs goes through all packets after the ID that is given, in the order of
// their IDs, and gives of each entry only what rules are about: ID, KeyID,
// Group, State, Hold, Imported, the times, and which payloads were released. It takes a
// tenth of the time that Entries takes.
func (tx *Tx) Briefs(after string) iter.Seq2[escrow.Entry, error] {
	return func(yield func(escrow.Entry, error) bool) {
		cursor := tx.bolt.Bucket([]byte(packetBriefBucket)).Cursor()
		key, sealed := cursor.Seek([]byte(after))
		if after != "" && string(key) == after {
			key, sealed = cursor.Next()
		}
		var here []byte
		for ; key != nil; key, sealed = cursor.Next() {
			var entry escrow.Entry
			value, err := tx.sealer.open(packetBriefBucket, key, sealed)
			if err == nil {
				entry, err = decodeBrief(value)
			}
			if err == nil && here != nil && bytes.Compare(key, here) <= 0 {
				err = ErrDamaged
			}
			if err != nil {
				yield(escrow.Entry{}, fmt.Errorf("store: %s: %w", describe(packetBriefBucket, key), err))
				return
			}
			entry.ID, here = string(key), key
			if !yield(entry, nil) {
				return
			}
		}
	}
}

// EntriesOf goes through the entries of one machine's packets that are not
// purged.
func (tx *Tx) EntriesOf(machine identity.KeyID) iter.Seq2[escrow.Entry, error] {
	return tx.entriesAt(packetMachineBucket, string(machine))
}

// EntriesOfVolume goes through the entries of the packets of one volume,
// whichever machines made them.
func (tx *Tx) EntriesOfVolume(uuid string) iter.Seq2[escrow.Entry, error] {
	return tx.entriesAt(packetVolumeBucket, uuid)
}

// CountPackets returns how many packets a machine has that are not purged,
// without opening any.
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
