package api

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/seal"
	"mandos-escrow/unlock"
)

// ErrMerge: tokens that do not make one token for several servers.
var ErrMerge = errors.New("these tokens cannot be merged")

// FirstPolicy is the policy 1 of the trustees of all servers of a token, and of
// its threshold. Nobody signs it: its digest in a token is its trust. Where several
// must agree each server has one trustee: one that brings more of its own would
// hold as many shares as it takes.
func (t Token) FirstPolicy() (escrow.Policy, error) {
	var trustees []escrow.Trustee
	for _, s := range t.Servers {
		if n := len(s.Trustees); len(t.Servers) > 1 && t.Threshold > 1 && n > 1 {
			return escrow.Policy{}, fmt.Errorf("%w: %s has %d trustees, and of several servers each has one: fewer than %d of them would open a packet",
				escrow.ErrPolicy, s.Name, n, t.Threshold)
		}
		for _, text := range s.Trustees {
			fingerprint, name, _ := strings.Cut(text, " ")
			trustees = append(trustees, escrow.Trustee{Fingerprint: fingerprint, Name: name})
		}
	}
	return escrow.NewPolicy(1, t.Threshold, nil, trustees)
}

// TrusteeKeys are the public keys that a server's part of a token carries. A key
// that is not that of the trustee it stands for is an error.
func (s TokenServer) TrusteeKeys() ([]*seal.PublicKey, error) {
	var keys []*seal.PublicKey
	for i, data := range s.Keys {
		key, err := seal.ParsePublicBinary(data)
		if err != nil {
			return nil, fmt.Errorf("key of trustee %s: %w", s.Trustees[i], err)
		}
		if fingerprint, _, _ := strings.Cut(s.Trustees[i], " "); key.Fingerprint() != fingerprint {
			return nil, fmt.Errorf("%w: key %s in place of trustee %s", ErrTicket, key.Fingerprint(), fingerprint)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// Merge makes one token of tokens of several servers, each with one of its own.
// Their trustees become those of a first policy with this threshold. bootOf is
// how many servers give a boot passphrase back; 0: as many as the threshold.
func Merge(threshold, bootOf int, tokens []*Token) (*Token, error) {
	m := len(tokens)
	switch {
	case m < 2 || m > unlock.MaxServers:
		return nil, fmt.Errorf("%w: %d of them; 2 to %d are possible", ErrMerge, m, unlock.MaxServers)
	case bootOf < 0 || bootOf > m:
		return nil, fmt.Errorf("%w: boot threshold %d of %d servers", ErrMerge, bootOf, m)
	}
	merged := &Token{Threshold: threshold, BootOf: bootOf}
	for i, t := range tokens {
		if err := t.checkOwn(threshold); err != nil {
			return nil, fmt.Errorf("%w: token %d: %w", ErrMerge, i+1, err)
		}
		if j := slices.IndexFunc(merged.Servers, func(s TokenServer) bool { return s.KeyID == t.Servers[0].KeyID }); j >= 0 {
			return nil, fmt.Errorf("%w: tokens %d and %d are of one server, %s", ErrMerge, j+1, i+1, t.Servers[0].Name)
		}
		merged.Servers = append(merged.Servers, t.Servers[0])
	}
	policy, err := merged.FirstPolicy()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMerge, err)
	}
	merged.PolicyDigest = policy.Digest()
	return merged, nil
}

// checkOwn refuses what is not a server's own token of its first policy, or is of
// a policy that the merged one would weaken: that server would take no packet.
func (t Token) checkOwn(threshold int) error {
	if len(t.Servers) != 1 {
		return errors.New("it was merged already: give the tokens that the servers made")
	}
	own, err := t.FirstPolicy()
	switch s := t.Servers[0]; {
	case err != nil:
		return err
	case own.Digest() != t.PolicyDigest:
		return fmt.Errorf("its trustees are not those of a first policy of %s", s.Name)
	case threshold < t.Threshold:
		return fmt.Errorf("%s wants %d trustees to agree, and takes no packet that opens with %d", s.Name, t.Threshold, threshold)
	}
	_, err = t.Servers[0].TrusteeKeys()
	return err
}
