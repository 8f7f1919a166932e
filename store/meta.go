package store

import (
	"errors"
	"time"

	"mandos-escrow/escrow"
)

const metaBucket = "meta" // name: a value of the whole server

// Value is a value of the whole server. One that was never put is its type's
// zero value.
type Value[T any] struct{ name string }

// The values of a server.
var (
	ServerName = Value[string]{"server-name"}
	// Policy is the policy record that the server goes by.
	Policy = Value[[]byte]{"policy"}
	// TrusteeKeys are the armored public keys of the policy's trustees, in its order.
	TrusteeKeys = Value[[][]byte]{"trustee-keys"}
	// Epoch is the witness epoch: it stands in every Head.
	Epoch = Value[uint64]{"epoch"}
	// Unconfirmed is why the server serves nothing until `server confirm`;
	// empty: it serves.
	Unconfirmed = Value[string]{"unconfirmed"}
	// MasterPublic is the master key's public half.
	MasterPublic = Value[[]byte]{"master-public"}
	// MasterPrivate is the master key's private half, armored, under its
	// passphrase; empty when the key was made elsewhere.
	MasterPrivate = Value[[]byte]{"master-private"}
	// Lives are how long packets live and are kept, by group.
	Lives = Value[escrow.Lives]{"lives"}
	// MasterExported is when the private half was last put away; zero: never.
	MasterExported = Value[time.Time]{"master-exported"}
)

// auditTop is the newest entry of the audit log.
var auditTop = Value[top]{"audit-head"}

type top struct {
	Seq  uint64 `json:"seq"`
	Hash Hash   `json:"hash"`
}

// Get returns the value.
func (v Value[T]) Get(tx *Tx) (T, error) {
	value, err := getJSON[T](tx, metaBucket, []byte(v.name))
	if errors.Is(err, ErrNotFound) {
		return value, nil
	}
	return value, err
}

// Put sets the value.
func (v Value[T]) Put(tx *Tx, value T) error {
	return putJSON(tx, metaBucket, []byte(v.name), value)
}
