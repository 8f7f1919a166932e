package store

import (
	"testing"
	"time"

	"mandos-escrow/internal/identity"
)

func TestTokenUse(t *testing.T) {
	token := func(change func(*Token)) Token {
		made := Token{ID: "t", Expires: testNow.Add(time.Hour), Uses: 2, UsedBy: []identity.KeyID{"a"}}
		change(&made)
		return made
	}
	for name, c := range map[string]struct {
		token Token
		id    identity.KeyID
		now   time.Time
		error error
		used  int
	}{
		"second machine":      {token(func(*Token) {}), "b", testNow, nil, 2},
		"same machine again":  {token(func(*Token) {}), "a", testNow, nil, 1},
		"used up":             {token(func(t *Token) { t.Uses = 1 }), "b", testNow, ErrTokenUsed, 1},
		"used up, same again": {token(func(t *Token) { t.Uses = 1 }), "a", testNow, nil, 1},
		"no uses at all":      {token(func(t *Token) { t.Uses = 0; t.UsedBy = nil }), "a", testNow, ErrTokenUsed, 0},
		"last instant":        {token(func(*Token) {}), "b", testNow.Add(time.Hour - 1), nil, 2},
		"expired":             {token(func(*Token) {}), "b", testNow.Add(time.Hour), ErrTokenExpired, 1},
		"expired, same again": {token(func(*Token) {}), "a", testNow.Add(time.Hour), ErrTokenExpired, 1},
		"no expiry is none":   {token(func(t *Token) { t.Expires = time.Time{} }), "b", testNow, ErrTokenExpired, 1},
		"revoked":             {token(func(t *Token) { t.Revoked = true }), "a", testNow.Add(2 * time.Hour), ErrTokenRevoked, 1},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(c.token.UsedBy)
			used, err := c.token.Use(c.id, c.now)
			want(t, err, c.error)
			if len(used.UsedBy) != c.used || len(c.token.UsedBy) != before {
				t.Fatalf("used by %v, before %v", used.UsedBy, c.token.UsedBy)
			}
		})
	}
}

// Two uses of one record must not write into one another's list.
func TestTokenUseCopies(t *testing.T) {
	token := Token{Expires: testNow.Add(time.Hour), Uses: 9, UsedBy: make([]identity.KeyID, 1, 8)}
	b, _ := token.Use("b", testNow)
	c, _ := token.Use("c", testNow)
	if b.UsedBy[1] != "b" || c.UsedBy[1] != "c" {
		t.Fatalf("%v, %v", b.UsedBy, c.UsedBy)
	}
}

func TestTokens(t *testing.T) {
	s := newStore(t)
	token := Token{ID: "t1", SecretHash: Hash{1}, Created: testNow, Expires: testNow.Add(time.Hour), Uses: 1, By: "anna"}
	change(t, s, func(tx *Tx) error { return tx.PutToken(token) })
	token.Revoked = true
	change(t, s, func(tx *Tx) error { return tx.PutToken(token) })
	want(t, s.Update(audited(func(tx *Tx) error { return tx.PutToken(Token{ID: "t2", SecretHash: Hash{1}}) })), ErrExists)
	view(t, s, func(tx *Tx) error {
		got, err := tx.TokenBySecret(Hash{1})
		equal(t, got, err, token)
		_, err = tx.TokenBySecret(Hash{2})
		want(t, err, ErrNotFound)
		equal(t, collect(t, tx.Tokens()), nil, []Token{token})
		return nil
	})
}
