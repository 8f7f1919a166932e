package enroll

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

const (
	trusteesKind = "mandos-escrow-trustees"
	maxTrustees  = 1 << 20 // bytes
)

// ErrNotKept: the machine enrolled before it kept what makes packets without a
// token.
var ErrNotKept = errors.New("this machine enrolled before the trustees' keys were kept on it")

func (e *enrolment) trusteesPath() string { return e.path(RunningFolder, "trustees") }

// keepTrustees writes the keys of the pinned policy's trustees, in its order, and
// how many servers give a boot passphrase back: what a token says, and no secret.
func (e *enrolment) keepTrustees() error {
	w := record.New(trusteesKind, 1).Uint("boot-threshold", uint64(e.Token.BootThreshold()))
	for _, key := range e.trusteeKeys() {
		data, err := key.Binary()
		if err != nil {
			return err
		}
		w.Base64("trustee-key", data)
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.Replace(e.trusteesPath(), data)
}

// readKept takes servers, policy and keys from what an enrolment kept. No server
// has a say: each key must have the fingerprint in the pinned policy.
func (e *enrolment) readKept() error {
	text, err := os.ReadFile(e.policyPath())
	if err != nil {
		return err
	}
	if e.policy, err = escrow.ParsePolicy(text); err != nil {
		return fmt.Errorf("%s: %w", e.policyPath(), err)
	}
	data, err := os.ReadFile(e.trusteesPath())
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNotKept
	}
	if err != nil {
		return err
	}
	in := record.Parse(data, trusteesKind, 1, maxTrustees)
	boot := int(min(in.Uint("boot-threshold"), 255))
	e.keys = map[string]*seal.PublicKey{}
	for _, t := range e.policy.Trustees {
		key, err := seal.ParsePublicBinary(in.Base64("trustee-key"))
		if err == nil && key.Fingerprint() != t.Fingerprint {
			err = fmt.Errorf("%w: key %s in place of trustee %s", ErrPolicy, key.Fingerprint(), t.Fingerprint)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.trusteesPath(), err)
		}
		e.keys[t.Fingerprint] = key
	}
	if err := in.End(); err != nil {
		return fmt.Errorf("%s: %w", e.trusteesPath(), err)
	}
	servers, err := e.readServers()
	if err != nil {
		return err
	}
	if boot < 1 || boot > len(servers) {
		return fmt.Errorf("%s: %w: %d of %d servers boot the machine", e.trusteesPath(), record.ErrFormat, boot, len(servers))
	}
	e.Token = &api.Token{PolicyDigest: e.policy.Digest(), Threshold: e.policy.Threshold, BootOf: boot}
	for _, s := range servers {
		e.peers = append(e.peers, &peer{TokenServer: api.TokenServer{Server: s}})
	}
	return nil
}

// meetServers takes the servers from what was kept, or from the token.
func (e *enrolment) meetServers() error {
	if e.kept {
		return e.readKept()
	}
	return e.meet()
}

// call makes the machine known with a token; one that is known already only
// calls.
func (e *enrolment) call(ctx context.Context) error {
	if !e.kept {
		return e.register(ctx)
	}
	return e.dialAll()
}

func (e *enrolment) dialAll() (err error) {
	for _, p := range e.peers {
		if p.client, err = e.dial(p.Server, e.running.Key); err != nil {
			return err
		}
	}
	return nil
}
