package enroll

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
)

func (e *enrolment) policyPath() string { return e.path(RunningFolder, "policy") }

// checkPins compares the token with what an earlier enrolment pinned.
func (e *enrolment) checkPins() error {
	conf, err := e.readBootConfig()
	if err != nil {
		return err
	}
	for _, s := range conf.Servers {
		if !slices.ContainsFunc(e.peers, func(p *peer) bool { return p.KeyID == s.KeyID }) {
			return fmt.Errorf("%w: %s (%s), which the token does not name", ErrOther, s.Name, s.KeyID.Short())
		}
	}
	if was, is := len(conf.Servers), len(e.peers); was > 0 && (was != is || conf.Threshold != e.Token.BootThreshold()) {
		return fmt.Errorf("%w: it boots from %d of %d, and the token is for %d of %d", ErrOther, conf.Threshold, was, e.Token.BootThreshold(), is)
	}
	pinned, err := os.ReadFile(e.policyPath())
	if err == nil && sha256.Sum256(pinned) != e.Token.PolicyDigest {
		err = fmt.Errorf("%w: this machine has pinned another policy than the token's in %s", ErrOther, e.policyPath())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// register makes the machine known to the servers, and takes from each only the
// policy that the token vouches for.
func (e *enrolment) register(ctx context.Context) error {
	registration, err := api.Registration{
		Name: e.name, MachineIDHash: e.idHash, Boot: e.boot.Key.Public(), Running: e.running.Key.KeyID(),
	}.Sign(e.boot.Key)
	if err != nil {
		return err
	}
	if err := e.tokenKeys(); err != nil {
		return err
	}
	if err := e.dialAll(); err != nil {
		return err
	}
	err = e.each(ctx, func(p *peer) error { return e.registerAt(ctx, p, registration) })
	if err != nil {
		return err
	}
	if err := e.pin(); err != nil {
		return err
	}
	if err := e.keepName(); err != nil {
		return err
	}
	if err := e.keepServers(e.servers()...); err != nil {
		return err
	}
	e.Checkpoint("registered")
	return nil
}

func (e *enrolment) registerAt(ctx context.Context, p *peer, registration []byte) error {
	var shown api.Enrolled
	if err := p.client.Call(ctx, "POST", "/v1/enroll", api.Enroll{Secret: p.Secret, Registration: registration}, &shown); err != nil {
		return err
	}
	if err := e.checkShown(p, shown.Policy); err != nil {
		return err
	}
	if shown.Namesakes > 0 {
		e.Progress("warning: %s knows %d other machines named %s; tell them apart by key ID, or rename one with `mandos-escrow machine set KEY-ID --name NAME`", p.Name, shown.Namesakes, e.name)
	}
	if shown.Disabled != "" && !e.NoBoot {
		e.Progress("warning: %s has this machine disabled (%s), and enrolling does not change that: it boots unattended after `mandos-escrow machine enable %s` there", p.Name, shown.Disabled, e.boot.Key.KeyID())
	}
	e.Progress("registered %s at %s", e.name, p.Name)
	return nil
}

// tokenKeys takes the trustees' keys from the token, which vouches for them.
func (e *enrolment) tokenKeys() error {
	e.keys = map[string]*seal.PublicKey{}
	for _, p := range e.peers {
		keys, err := p.TrusteeKeys()
		if err != nil {
			return err
		}
		for _, key := range keys {
			e.keys[key.Fingerprint()] = key
		}
	}
	return nil
}

// checkShown takes a server's policy and keys only if the token vouches for them.
// Of several servers each has a policy of its own, which must be what was merged:
// the same trustees, a first policy, and no higher threshold.
func (e *enrolment) checkShown(p *peer, shown api.Policy) error {
	policy, err := escrow.ParsePolicy([]byte(shown.Policy))
	if err != nil {
		return err
	}
	var trustees []string
	for _, t := range policy.Trustees {
		trustees = append(trustees, t.Fingerprint+" "+t.Name)
	}
	switch {
	case !e.merged() && policy.Digest() != e.Token.PolicyDigest:
		return ErrPolicy
	case !e.merged():
		e.policy = policy
	case policy.Epoch != 1 || policy.Threshold > e.policy.Threshold || !slices.Equal(trustees, p.Trustees):
		return fmt.Errorf("%w: it is not what was merged", ErrPolicy)
	}
	if len(shown.Keys) != len(policy.Trustees) {
		return fmt.Errorf("%w: %d keys for %d trustees", ErrPolicy, len(shown.Keys), len(policy.Trustees))
	}
	for i, text := range shown.Keys {
		key, err := seal.ParsePublic([]byte(text))
		if err != nil {
			return err
		}
		if want := policy.Trustees[i].Fingerprint; key.Fingerprint() != want {
			return fmt.Errorf("%w: key %s in place of trustee %s", ErrPolicy, key.Fingerprint(), want)
		}
		if e.keys[key.Fingerprint()] == nil {
			e.keys[key.Fingerprint()] = key
		}
	}
	return nil
}

// pin keeps the policy, once the keys of all its trustees are here, and before
// it those keys: with them the machine makes packets later, without a token.
func (e *enrolment) pin() error {
	for _, t := range e.policy.Trustees {
		if e.keys[t.Fingerprint] == nil {
			return fmt.Errorf("the key of trustee %s (%s) is not known: its server must answer, or the token be made anew", t.Name, t.Fingerprint)
		}
	}
	if err := e.keepTrustees(); err != nil {
		return err
	}
	return config.Replace(e.policyPath(), e.policy.Bytes())
}

func (e *enrolment) trusteeKeys() (keys []*seal.PublicKey) {
	for _, t := range e.policy.Trustees {
		keys = append(keys, e.keys[t.Fingerprint])
	}
	return keys
}
