package store

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"mandos-escrow/internal/record"
)

const auditBucket = "audit" // sequence number, 8 bytes big-endian: Event

// maxText bounds one text of an event, in bytes; what is longer is cut.
const maxText = 1024

// Event is one entry of the audit log. The caller sets who did what, to what
// and when; Audit sets Seq, Previous and Hash.
type Event struct {
	Seq      uint64    `json:"seq"`  // 1, 2, 3 ...
	Time     time.Time `json:"time"` // UTC, whole seconds
	Actor    string    `json:"actor"`
	Action   string    `json:"action"`
	Request  string    `json:"request,omitempty"`
	Machine  string    `json:"machine,omitempty"`
	Packet   string    `json:"packet,omitempty"`
	Volume   string    `json:"volume,omitempty"`
	Detail   string    `json:"detail,omitempty"`
	Hash     Hash      `json:"hash"`
	Previous Hash      `json:"previous"` // Hash of the entry before; zero for the first
}

// digest is what Hash must be: SHA-256 of the record
// `mandos-escrow-audit: 1` with everything else that the event has.
func (e Event) digest() (Hash, error) {
	if e.Time.Nanosecond() != 0 {
		return Hash{}, errors.New("time is not in whole seconds")
	}
	data, err := record.New("mandos-escrow-audit", 1).
		Uint("seq", e.Seq).
		Time("time", e.Time).
		Text("actor", e.Actor).
		Text("action", e.Action).
		OptionalText("request", e.Request).
		OptionalText("machine", e.Machine).
		OptionalText("packet", e.Packet).
		OptionalText("volume", e.Volume).
		OptionalText("detail", e.Detail).
		Hex("previous", e.Previous[:]).
		Bytes()
	if err != nil {
		return Hash{}, err
	}
	return sha256.Sum256(data), nil
}

// Audit appends an event. Texts may come from anybody: one that could forge a
// line or hide on a terminal, or looks as if quoted, is quoted as Go does it;
// one over 1024 bytes is cut. Time, Actor and Action must be set.
func (tx *Tx) Audit(event Event) error {
	newest, err := auditTop.Get(tx)
	if err != nil {
		return err
	}
	if event.Time.IsZero() {
		return errors.New("store: audit: an event needs its time")
	}
	event.Seq, event.Previous = newest.Seq+1, newest.Hash
	event.Time = event.Time.UTC().Truncate(time.Second)
	for _, text := range []*string{
		&event.Actor, &event.Action, &event.Request, &event.Machine, &event.Packet, &event.Volume, &event.Detail,
	} {
		*text = harmless(*text)
	}
	if event.Hash, err = event.digest(); err != nil {
		return fmt.Errorf("store: audit: %w", err)
	}
	return tx.append(event)
}

// append writes past the rule that a change needs an event: it is the event.
func (tx *Tx) append(event Event) error {
	entry, err := json.Marshal(event)
	if err != nil {
		return fmt.Errorf("store: audit: %w", err)
	}
	newest, err := json.Marshal(top{event.Seq, event.Hash})
	if err != nil {
		return fmt.Errorf("store: audit: %w", err)
	}
	if err := tx.write(auditBucket, auditKey(event.Seq), entry); err != nil {
		return err
	}
	tx.audited = true
	return tx.write(metaBucket, []byte(auditTop.name), newest)
}

func auditKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

func harmless(text string) string {
	if len(text) > maxText {
		text = text[:maxText]
	}
	if text == "" || record.Printable(text) == nil && !strings.HasPrefix(text, `"`) {
		return text
	}
	return strconv.Quote(text)
}

// AuditHead returns the newest entry of the log, with the epoch; a log without
// entries has Seq 0.
func (tx *Tx) AuditHead() (Head, error) {
	newest, err := auditTop.Get(tx)
	if err != nil {
		return Head{}, err
	}
	epoch, err := Epoch.Get(tx)
	if err != nil {
		return Head{}, err
	}
	return Head{Epoch: epoch, Seq: newest.Seq, Hash: newest.Hash}, nil
}

// AuditFrom returns at most limit events, from number seq on.
func (tx *Tx) AuditFrom(seq uint64, limit int) ([]Event, error) {
	var events []Event
	cursor := tx.bolt.Bucket([]byte(auditBucket)).Cursor()
	for key, _ := cursor.Seek(auditKey(seq)); key != nil && len(events) < limit; key, _ = cursor.Next() {
		event, err := getJSON[Event](tx, auditBucket, key)
		if err != nil {
			return nil, err
		}
		events = append(events, event)
	}
	return events, nil
}

// AuditHas reports whether head is in the log: the entry Seq has this Hash.
// The epoch is not looked at.
func (tx *Tx) AuditHas(head Head) (bool, error) {
	if head.Seq == 0 {
		return head.Hash == Hash{}, nil
	}
	event, err := getJSON[Event](tx, auditBucket, auditKey(head.Seq))
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil && event.Hash == head.Hash, err
}

// VerifyAudit checks the whole log, up to the head that the store keeps of it,
// and returns that head. The error is ErrAudit and names the first bad entry.
func (tx *Tx) VerifyAudit() (Head, error) {
	kept, err := tx.AuditHead()
	if err != nil {
		return Head{}, err
	}
	const page = 1000
	reached := Head{Epoch: kept.Epoch}
	for {
		events, err := tx.AuditFrom(reached.Seq+1, page)
		if err != nil {
			return Head{}, err
		}
		if reached, err = VerifyChain(events, reached); err != nil {
			return Head{}, err
		}
		if len(events) < page {
			break
		}
	}
	if reached != kept {
		return Head{}, fmt.Errorf("%w: it ends at entry %d, and entry %d was written", ErrAudit, reached.Seq, kept.Seq)
	}
	return kept, nil
}

// VerifyChain checks that events follow one another and the entry after (the
// zero Head: from the first on), and returns the head that they lead to. The
// error is ErrAudit and names the first bad entry. That nothing is cut off at
// the end shows only when the result is compared with a head known otherwise.
func VerifyChain(events []Event, after Head) (Head, error) {
	head := after
	for _, event := range events {
		if event.Seq != head.Seq+1 {
			return Head{}, fmt.Errorf("%w: entry %d stands where entry %d belongs", ErrAudit, event.Seq, head.Seq+1)
		}
		if event.Previous != head.Hash {
			return Head{}, fmt.Errorf("%w: entry %d does not follow the entry before it", ErrAudit, event.Seq)
		}
		hash, err := event.digest()
		if err != nil {
			return Head{}, fmt.Errorf("%w: entry %d: %w", ErrAudit, event.Seq, err)
		}
		if event.Hash != hash {
			return Head{}, fmt.Errorf("%w: entry %d was changed", ErrAudit, event.Seq)
		}
		head.Seq, head.Hash = event.Seq, event.Hash
	}
	return head, nil
}
