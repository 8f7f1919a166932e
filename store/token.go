package store

import (
	"fmt"
	"iter"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
)

const (
	tokenBucket       = "token"        // token ID: Token
	tokenSecretBucket = "token-secret" // blind hash of the secret: token ID
)

// Token lets machines enroll. The server keeps only the hash of its secret.
type Token struct {
	ID         string           `json:"id"`
	SecretHash Hash             `json:"secret_hash"` // SHA-256
	Created    time.Time        `json:"created"`
	Expires    time.Time        `json:"expires"` // the first instant at which it is no more
	Uses       int              `json:"uses"`    // how many machines it is good for
	UsedBy     []identity.KeyID `json:"used_by,omitempty"`
	Group      string           `json:"group,omitempty"`
	Hold       bool             `json:"hold"`
	Revoked    bool             `json:"revoked"`
	By         string           `json:"by"` // who made it
}

// Use returns the token as it is after the machine id used it. A use counts
// once for a machine: an enrolment that was cut off may be run again. Errors:
// ErrTokenRevoked, ErrTokenExpired, ErrTokenUsed, in this order.
func (t Token) Use(id identity.KeyID, now time.Time) (Token, error) {
	switch {
	case t.Revoked:
		return t, ErrTokenRevoked
	case !now.Before(t.Expires):
		return t, fmt.Errorf("%w at %s", ErrTokenExpired, t.Expires.UTC().Format(time.RFC3339))
	case slices.Contains(t.UsedBy, id):
		return t, nil
	case len(t.UsedBy) >= t.Uses:
		return t, fmt.Errorf("%w: %d of %d", ErrTokenUsed, len(t.UsedBy), t.Uses)
	}
	t.UsedBy = append(slices.Clone(t.UsedBy), id)
	return t, nil
}

// Token returns the token with this ID.
func (tx *Tx) Token(id string) (Token, error) {
	return getJSON[Token](tx, tokenBucket, []byte(id))
}

// TokenBySecret returns the token whose secret has this SHA-256.
func (tx *Tx) TokenBySecret(hash Hash) (Token, error) {
	id, err := tx.follow(tokenSecretBucket, hash.String())
	if err != nil {
		return Token{}, err
	}
	return tx.Token(string(id))
}

// PutToken adds a token, or replaces the one with the same ID. The hash of a
// secret that another token has is ErrExists.
func (tx *Tx) PutToken(token Token) error {
	if err := tx.claim(tokenSecretBucket, token.SecretHash.String(), []byte(token.ID)); err != nil {
		return err
	}
	return putJSON(tx, tokenBucket, []byte(token.ID), token)
}

// Tokens goes through all tokens in the order of their IDs. An error is the
// last thing it gives.
func (tx *Tx) Tokens() iter.Seq2[Token, error] {
	return allJSON[Token](tx, tokenBucket)
}
