package store

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
)

// A brief is what rules need of a packet's entry, in 92 bytes and the group's
// name: to look at 100,000 of them takes a tenth of a second, and as many
// entries a whole one. It says what the entry says, and is written with it.
//
//	1  state, its number in briefStates
//	1  flags
//	32 key ID
//	7 times of 8 bytes: nanoseconds since 1970, 0 for none
//	   group
const (
	briefHold = 1 << iota
	briefPassphrase
	briefVolumeKey
	briefFailed
	briefImported
)

// briefStates must not change their order.
var briefStates = []escrow.PacketState{escrow.Pending, escrow.Verified, escrow.Obsolete, escrow.Purged}

var briefPayloads = map[byte]string{briefPassphrase: escrow.ForPassphrase, briefVolumeKey: escrow.ForVolumeKey}

const briefSize = 2 + 32 + 7*8

func briefTimes(e *escrow.Entry) []*time.Time {
	return []*time.Time{&e.Stored, &e.VerifiedAt, &e.CheckedAt, &e.ExpiredAt, &e.ObsoleteAt, &e.PurgedAt, &e.ReencryptSince}
}

func encodeBrief(e escrow.Entry) []byte {
	out := make([]byte, 2+32, briefSize+len(e.Group))
	for n, state := range briefStates {
		if e.State == state {
			out[0] = byte(n)
		}
	}
	if e.Hold {
		out[1] |= briefHold
	}
	if e.CheckFailed != "" {
		out[1] |= briefFailed
	}
	if e.Imported {
		out[1] |= briefImported
	}
	for flag, payload := range briefPayloads {
		if _, released := e.RevealedAt[payload]; released {
			out[1] |= flag
		}
	}
	if id, err := hex.DecodeString(string(e.KeyID)); err == nil {
		copy(out[2:], id)
	}
	for _, at := range briefTimes(&e) {
		nanoseconds := int64(0)
		if !at.IsZero() {
			nanoseconds = at.UnixNano()
		}
		out = binary.BigEndian.AppendUint64(out, uint64(nanoseconds))
	}
	return append(out, e.Group...)
}

// decodeBrief returns an entry with what a brief has of it. When a payload was
// released is not in it: it says 1970; nor is why a check failed.
func decodeBrief(data []byte) (e escrow.Entry, err error) {
	if len(data) < briefSize || int(data[0]) >= len(briefStates) {
		return e, fmt.Errorf("%w: no brief of a packet", ErrDamaged)
	}
	e.State, e.Hold = briefStates[data[0]], data[1]&briefHold != 0
	if data[1]&briefFailed != 0 {
		e.CheckFailed = "its entry says why"
	}
	e.Imported = data[1]&briefImported != 0
	for flag, payload := range briefPayloads {
		if data[1]&flag != 0 {
			e = e.Reveal(payload, time.Unix(0, 0))
		}
	}
	e.KeyID = identity.KeyID(hex.EncodeToString(data[2:34]))
	for n, at := range briefTimes(&e) {
		*at = time.Time{}
		if nanoseconds := int64(binary.BigEndian.Uint64(data[34+8*n:])); nanoseconds != 0 {
			*at = time.Unix(0, nanoseconds).UTC()
		}
	}
	e.Group = string(data[briefSize:])
	return e, nil
}
