package api

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"mandos-escrow/internal/seal"
)

// ownToken is a token as a server makes it: of its first policy, 1 of 1.
func ownToken(n byte, key *seal.PrivateKey) *Token {
	t := &Token{Threshold: 1, Servers: []TokenServer{{
		Server: testServer(n), Trustees: []string{key.Public().Fingerprint() + " srv"},
		Keys: [][]byte{must(key.Public().Binary())}, Secret: bytes.Repeat([]byte{n}, 16),
	}}}
	t.PolicyDigest = must(t.FirstPolicy()).Digest()
	return t
}

func masterKey() *seal.PrivateKey { return must(seal.Generate("master", time.Now())) }

func TestMerge(t *testing.T) {
	keys := []*seal.PrivateKey{masterKey(), masterKey(), masterKey()}
	var tokens []*Token
	for i, k := range keys {
		tokens = append(tokens, ownToken(byte(i+1), k))
	}
	merged := must(Merge(2, 0, tokens))
	text := must(merged.Text())
	if len(text) > 8<<10 {
		t.Errorf("%d characters for three servers", len(text))
	}
	again := must(ParseToken([]byte(text)))
	if !reflect.DeepEqual(again, merged) || again.BootThreshold() != 2 {
		t.Errorf("%+v", again)
	}
	policy := must(again.FirstPolicy())
	if policy.Digest() != merged.PolicyDigest || policy.Threshold != 2 || len(policy.Trustees) != 3 || policy.Epoch != 1 {
		t.Errorf("%+v", policy)
	}
	for i, s := range again.Servers {
		if got := must(s.TrusteeKeys()); len(got) != 1 || got[0].Fingerprint() != keys[i].Public().Fingerprint() {
			t.Errorf("server %d: %v", i+1, got)
		}
		if !bytes.Equal(s.Secret, tokens[i].Servers[0].Secret) {
			t.Errorf("server %d has another secret", i+1)
		}
	}
	full := must(ParseToken([]byte(must(must(Merge(2, 1, tokens)).Text()))))
	if full.BootThreshold() != 1 || full.PolicyDigest != merged.PolicyDigest {
		t.Errorf("%+v", full)
	}
	other := must(Merge(2, 0, []*Token{tokens[2], tokens[0], tokens[1]})) // in any order
	if other.PolicyDigest != merged.PolicyDigest {
		t.Error("the order of the tokens changes the policy")
	}
}

func TestWrongMerges(t *testing.T) {
	one, two := masterKey(), masterKey()
	a, b := ownToken(1, one), ownToken(2, two)
	changed := func(change func(*Token)) *Token {
		c := *b
		c.Servers = []TokenServer{b.Servers[0]}
		change(&c)
		return &c
	}
	for name, c := range map[string]struct {
		threshold, boot int
		tokens          []*Token
		part            string
	}{
		"none":                  {1, 0, nil, "0 of them"},
		"one":                   {1, 0, []*Token{a}, "1 of them"},
		"17":                    {1, 0, make([]*Token, 17), "17 of them"},
		"threshold 0":           {0, 0, []*Token{a, b}, "opens with 0"},
		"threshold -1":          {-1, 0, []*Token{a, b}, "opens with -1"},
		"threshold 3 of 2":      {3, 0, []*Token{a, b}, "threshold 3 of 2"},
		"boot threshold 3 of 2": {2, 3, []*Token{a, b}, "boot threshold 3 of 2"},
		"boot threshold -1":     {2, -1, []*Token{a, b}, "boot threshold -1"},
		"one server twice":      {2, 0, []*Token{a, ownToken(1, two)}, "of one server"},
		"one token twice":       {2, 0, []*Token{a, a}, "of one server"},
		"one master key twice":  {2, 0, []*Token{a, ownToken(2, one)}, "stands twice"},
		"merged before":         {2, 0, []*Token{a, must(Merge(1, 0, []*Token{b, ownToken(3, masterKey())}))}, "merged already"},
		"of another policy":     {2, 0, []*Token{a, changed(func(t *Token) { t.PolicyDigest[0] ^= 1 })}, "not those of a first policy"},
		"another trustee":       {2, 0, []*Token{a, changed(func(t *Token) { t.Servers[0].Trustees = []string{strings.Repeat("AB", 20) + " x"} })}, "not those of a first policy"},
		"another trustee's key": {2, 0, []*Token{a, changed(func(t *Token) { t.Servers[0].Keys = a.Servers[0].Keys })}, "in place of trustee"},
		"no key":                {2, 0, []*Token{a, changed(func(t *Token) { t.Servers[0].Keys = [][]byte{{1, 2, 3}} })}, "key of trustee"},
		"no trustee":            {1, 0, []*Token{a, changed(func(t *Token) { t.Servers[0].Trustees = nil })}, "0 trustees"},
	} {
		if got, err := Merge(c.threshold, c.boot, c.tokens); !errors.Is(err, ErrMerge) || !strings.Contains(err.Error(), c.part) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	strict := changed(func(t *Token) {
		t.Threshold = 2
		t.Servers[0].Trustees = append([]string{strings.Repeat("AB", 20) + " x"}, t.Servers[0].Trustees...)
		t.Servers[0].Keys = nil
		t.PolicyDigest = must(t.FirstPolicy()).Digest()
	})
	if _, err := Merge(1, 0, []*Token{a, strict}); !errors.Is(err, ErrMerge) || !strings.Contains(err.Error(), "wants 2 trustees") {
		t.Errorf("a merge that weakens one server's policy: %v", err)
	}
	// with two keys of its own it would open alone what two servers must
	if got, err := Merge(2, 0, []*Token{a, strict}); !errors.Is(err, ErrMerge) || !strings.Contains(err.Error(), "has 2 trustees") {
		t.Errorf("a server that brings two trustees: %+v, %v", got, err)
	}
	greedy := changed(func(t *Token) {
		t.Servers[0].Trustees = append([]string{strings.Repeat("AB", 20) + " x"}, t.Servers[0].Trustees...)
		t.Servers[0].Keys = nil
		t.PolicyDigest = must(t.FirstPolicy()).Digest()
	})
	if got, err := Merge(2, 0, []*Token{a, greedy}); !errors.Is(err, ErrMerge) || !strings.Contains(err.Error(), "has 2 trustees") {
		t.Errorf("a server that brings two trustees: %+v, %v", got, err)
	}
	if _, err := Merge(1, 0, []*Token{a, greedy}); err != nil {
		t.Errorf("where each opens alone, more of them weaken nothing: %v", err)
	}
}
