package enroll

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
	"mandos-escrow/unlock"
)

// server is whom the token is for.
func (e *enrolment) server() unlock.Server { return e.Token.Servers[0].Server }

func (e *enrolment) policyPath() string { return e.path(RunningFolder, "policy") }

// checkPins compares the token with what an earlier enrolment pinned.
func (e *enrolment) checkPins() error {
	conf, err := e.readBootConfig()
	if err != nil {
		return err
	}
	for _, s := range conf.Servers {
		if mine := e.server(); s.KeyID != mine.KeyID {
			return fmt.Errorf("%w: %s (%s), and the token is for %s (%s)", ErrOther, s.Name, s.KeyID.Short(), mine.Name, mine.KeyID.Short())
		}
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

// register makes the machine known to the server, and takes the policy from it
// only if it is the one that the token names.
func (e *enrolment) register(ctx context.Context) (err error) {
	mine := e.Token.Servers[0]
	if e.client, err = e.dial(mine.Server, e.running.Key); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			e.client.Close()
		}
	}()
	registration, err := api.Registration{
		Name: e.name, MachineIDHash: e.idHash, Boot: e.boot.Key.Public(), Running: e.running.Key.KeyID(),
	}.Sign(e.boot.Key)
	if err != nil {
		return err
	}
	var shown api.Enrolled
	if err := e.client.Call(ctx, "POST", "/v1/enroll", api.Enroll{Secret: mine.Secret, Registration: registration}, &shown); err != nil {
		return err
	}
	if err := e.pin(shown.Policy); err != nil {
		return err
	}
	if err := e.keepName(); err != nil {
		return err
	}
	if err := e.keepServers(e.server()); err != nil {
		return err
	}
	if shown.Namesakes > 0 {
		e.Progress("warning: %s knows %d other machines named %s; tell them apart by key ID, or rename one with `mandos-escrow machine set KEY-ID --name NAME`", mine.Name, shown.Namesakes, e.name)
	}
	if shown.Disabled != "" && !e.NoBoot {
		e.Progress("warning: %s has this machine disabled (%s), and enrolling does not change that: it boots unattended after `mandos-escrow machine enable %s` there", mine.Name, shown.Disabled, e.boot.Key.KeyID())
	}
	e.Progress("registered %s at %s", e.name, mine.Name)
	e.Checkpoint("registered")
	return nil
}

// pin takes the policy and the keys that the token vouches for, and no others.
func (e *enrolment) pin(shown api.Policy) (err error) {
	if e.policy, err = escrow.ParsePolicy([]byte(shown.Policy)); err != nil {
		return err
	}
	if e.policy.Digest() != e.Token.PolicyDigest {
		return ErrPolicy
	}
	if len(shown.Keys) != len(e.policy.Trustees) {
		return fmt.Errorf("%w: %d keys for %d trustees", ErrPolicy, len(shown.Keys), len(e.policy.Trustees))
	}
	for i, text := range shown.Keys {
		key, err := seal.ParsePublic([]byte(text))
		if err != nil {
			return err
		}
		if want := e.policy.Trustees[i].Fingerprint; key.Fingerprint() != want {
			return fmt.Errorf("%w: key %s in place of trustee %s", ErrPolicy, key.Fingerprint(), want)
		}
		e.keys = append(e.keys, key)
	}
	return config.Replace(e.policyPath(), e.policy.Bytes())
}
