package store

import (
	"iter"

	"mandos-escrow/recovery"
)

const requestBucket = "request" // request ID: recovery.Record

// Request returns a recovery request.
func (tx *Tx) Request(id string) (recovery.Record, error) {
	return getJSON[recovery.Record](tx, requestBucket, []byte(id))
}

// PutRequest adds a request, or replaces the one with the same ID.
func (tx *Tx) PutRequest(request recovery.Record) error {
	tx.changed = append(tx.changed, request.ID)
	return putJSON(tx, requestBucket, []byte(request.ID), request)
}

// DeleteRequest removes a request; one that is not there is ErrNotFound.
func (tx *Tx) DeleteRequest(id string) error {
	if _, err := tx.Request(id); err != nil {
		return err
	}
	tx.changed = append(tx.changed, id)
	return tx.delete(requestBucket, []byte(id))
}

// Requests goes through all requests in the order of their IDs. An error is
// the last thing it gives.
func (tx *Tx) Requests() iter.Seq2[recovery.Record, error] {
	return allJSON[recovery.Record](tx, requestBucket)
}
