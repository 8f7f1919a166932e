package enroll

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

// peer is one of the token's servers on its way through the transaction.
type peer struct {
	api.TokenServer
	client *api.Client
	away   error             // why it is left out of the rest of this run; nil: it answers
	held   api.MachineVolume // what it holds of the volume that is enrolled now
}

// has reports whether the server holds all that a finished enrolment gave it.
func (p *peer) has(j *journal) bool { return p.held.PacketID == j.packet && p.held.Boot == j.boots() }

// meet takes the servers from the token. A token of several servers must be one
// whole: its digest is that of the policy that its servers' trustees make.
func (e *enrolment) meet() error {
	for _, s := range e.Token.Servers {
		if slices.ContainsFunc(e.peers, func(p *peer) bool { return p.KeyID == s.KeyID }) {
			return fmt.Errorf("the token names server %s twice", s.Name)
		}
		e.peers = append(e.peers, &peer{TokenServer: s})
	}
	if m := len(e.peers); m > unlock.MaxServers {
		return fmt.Errorf("the token names %d servers; 1 to %d are possible", m, unlock.MaxServers)
	}
	if !e.merged() {
		return nil
	}
	policy, err := e.Token.FirstPolicy()
	if err != nil {
		return err
	}
	if policy.Digest() != e.Token.PolicyDigest {
		return fmt.Errorf("%w: the digest is not that of its servers' trustees", ErrPolicy)
	}
	e.policy = policy
	return nil
}

// merged reports whether the token is of several servers.
func (e *enrolment) merged() bool { return len(e.peers) > 1 }

func (e *enrolment) servers() (all []unlock.Server) {
	for _, p := range e.peers {
		all = append(all, p.Server)
	}
	return all
}

// holders are the servers as each of them is told.
func (e *enrolment) holders() unlock.Holders {
	h := unlock.Holders{Threshold: e.Token.BootThreshold()}
	for _, p := range e.peers {
		h.Servers = append(h.Servers, unlock.Holder{Name: p.Name, KeyID: p.KeyID})
	}
	return h
}

func (e *enrolment) hangUp() {
	for _, p := range e.peers {
		if p.client != nil {
			p.client.Close()
		}
	}
}

// present are the servers that answer.
func (e *enrolment) present() []*peer {
	return slices.DeleteFunc(slices.Clone(e.peers), func(p *peer) bool { return p.away != nil })
}

// all reports whether something holds for every server that answers.
func (e *enrolment) all(holds func(*peer) bool) bool {
	return !slices.ContainsFunc(e.present(), func(p *peer) bool { return !holds(p) })
}

// needed is how many servers must hold a packet, and a blob if the volume boots,
// before any of it counts: those that give the packet back, and the boot
// passphrase.
func (e *enrolment) needed() int {
	n := min(e.Token.Threshold, len(e.peers))
	if !e.NoBoot {
		n = max(n, e.Token.BootThreshold())
	}
	return n
}

// each does something at every server that answers. One that stops to answer is
// left out from then on, as long as enough are there; any other error ends the
// run: a server that refuses, or shows what it must not, is not gone.
func (e *enrolment) each(ctx context.Context, do func(*peer) error) error {
	for _, p := range e.present() {
		err := do(p)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case gone(err) && e.merged():
			p.away = err
			e.Progress("warning: %s is left out of this run: %v", p.Name, err)
		case e.merged():
			return fmt.Errorf("%s: %w", p.Name, err)
		default:
			return err
		}
	}
	return e.enough()
}

// gone reports whether an error means that a server does not serve now.
func gone(err error) bool {
	code := api.CodeOf(err)
	return errors.Is(err, api.ErrUnreachable) || code == api.CodeUnconfirmed || code == api.CodeInternal
}

// enough refuses to go on with fewer servers than what is made would need.
func (e *enrolment) enough() error {
	if len(e.present()) >= e.needed() {
		return nil
	}
	errs := []error{}
	for _, p := range e.peers {
		if p.away != nil {
			errs = append(errs, p.away)
		}
	}
	return fmt.Errorf("%d of %d servers answer, and %d are needed: %w", len(e.present()), len(e.peers), e.needed(), errors.Join(errs...))
}
