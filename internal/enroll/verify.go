package enroll

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// Errors of a verification, which callers give exit codes.
var (
	// ErrKeyslot: a keyslot of ours is not what was proved.
	ErrKeyslot = errors.New("a keyslot is not the one that was proved")
	// ErrEscrow: a server holds other bytes than were escrowed, or none.
	ErrEscrow = errors.New("what was escrowed is not there")
)

// VerifyOptions say what is verified.
type VerifyOptions struct {
	Root    string
	Volumes []string // UUIDs or their beginnings; none: all that are enrolled
	Devices []string // where volumes lie that are not found where they lay
	Prove   bool     // also fetch the boot passphrase, and try it
	Program string   // the boot program, for Prove
	Tool    cryptsetup.Tool
	// Progress tells what takes time, and what was learned.
	Progress func(format string, args ...any)
}

// Verified is what was found of one volume.
type Verified struct {
	UUID   string `json:"uuid"`
	Device string `json:"device,omitempty"`
	Packet string `json:"packet,omitempty"`
	OK     bool   `json:"ok"` // also of the servers: each answered
	// Problems are what is wrong, in words.
	Problems []string `json:"problems"`
	// Due is why the volume needs new passphrases (rotate), or encrypting anew.
	Due     []string         `json:"due"`
	Servers []VerifiedServer `json:"servers"`
	Proved  bool             `json:"proved,omitempty"` // the boot passphrase was fetched, and opens its keyslot
	errs    []error
}

// VerifiedServer is one server's part.
type VerifiedServer struct {
	Name    string         `json:"name"`
	KeyID   identity.KeyID `json:"key_id"`
	Problem string         `json:"problem,omitempty"`
	Told    bool           `json:"told"` // it knows the outcome
}

// Errs are what is wrong, in the order of Problems.
func (r *Verified) Errs() []error { return r.errs }

// Verify compares volumes, journals and servers, needs no secret, and tells the
// servers what it found. An error means that there was nothing to compare; what does
// not hold is in the results.
func Verify(ctx context.Context, o VerifyOptions) ([]Verified, error) {
	results, err := verify(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	return results, nil
}

func verify(ctx context.Context, o VerifyOptions) ([]Verified, error) {
	e := &enrolment{Options: Options{Root: o.Root, Tool: o.Tool, Progress: o.Progress}}
	uuids, err := (&RotateOptions{Root: o.Root, Volumes: o.Volumes}).chosen()
	if err != nil {
		return nil, err
	}
	lock, err := e.takeLock(ctx) // nothing is rotated meanwhile
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	held, err := e.askServers(ctx)
	if err != nil {
		return nil, err
	}
	var results []Verified
	var checks []unlock.VolumeCheck
	for _, uuid := range uuids {
		v := e.verifyVolume(ctx, uuid, held, o)
		results, checks = append(results, v), append(checks, v.check())
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	e.tellChecks(ctx, held, checks, results)
	return results, nil
}

// verifyVolume looks at one volume, and changes nothing but what a journal of
// before did not know.
func (e *enrolment) verifyVolume(ctx context.Context, uuid string, held []holding, o VerifyOptions) Verified {
	r := Verified{UUID: uuid, Problems: []string{}, Due: []string{}, Servers: []VerifiedServer{}}
	for _, h := range held {
		r.Servers = append(r.Servers, VerifiedServer{Name: h.Name, KeyID: h.KeyID})
	}
	j, err := e.readJournal(uuid)
	if err != nil {
		r.wrong(err)
		return r
	}
	r.Packet = j.packet
	if !j.committed {
		r.wrong(fmt.Errorf("%w: an enrolment or a rotation was interrupted; run it again", ErrEscrow))
		return r
	}
	learned := e.verifyServers(&r, j, held)
	v, err := e.locate(uuid, j, o.Devices)
	if err != nil {
		r.wrong(err)
		return r
	}
	r.Device = v.device
	intact := e.verifyHeader(&r, v, j)
	if j.pins == nil && intact { // header and keyslots stand as they were proved
		pins := v.header.Enrolled()
		j.pins, learned = &pins, true
	}
	if learned {
		if err := e.writeJournal(j); err != nil {
			r.wrong(err)
		}
	}
	if o.Prove && j.boots() {
		r.prove(e.proveBoot(ctx, v, j, o))
	}
	r.OK = len(r.errs) == 0
	return r
}

func (r *Verified) wrong(err error) {
	r.OK, r.errs = false, append(r.errs, err)
	r.Problems = append(r.Problems, strings.ReplaceAll(err.Error(), "\n", "; "))
}

func (r *Verified) prove(err error) {
	if err != nil {
		r.wrong(fmt.Errorf("prove the boot passphrase: %w", err))
		return
	}
	r.Proved = true
}

// verifyHeader compares header and keyslots with what was proved.
func (e *enrolment) verifyHeader(r *Verified, v *volume, j *journal) (intact bool) {
	before := len(r.errs)
	if err := e.checkEnrolled(v, j); err != nil {
		r.wrong(err)
	}
	for _, s := range []struct {
		slot
		purpose string
	}{{j.boot, "boot"}, {j.recovery, "recovery"}} {
		if s.number < 0 {
			continue
		}
		if state := v.materialOf(s.slot); state != Proved {
			r.wrong(fmt.Errorf("%w: keyslot %d, of the %s passphrase, is %s", ErrKeyslot, s.number, s.purpose, state))
		}
	}
	return len(r.errs) == before
}

func (r *Verified) due(why string) {
	if !slices.Contains(r.Due, why) {
		r.Due = append(r.Due, why)
	}
}

// verifyServers compares what each server holds with the packet that the journal
// names. A journal of before its digest was kept learns it from as many servers as
// open the packet.
func (e *enrolment) verifyServers(r *Verified, j *journal, held []holding) (learned bool) {
	if j.digest == "" {
		j.digest = e.agreed(j, held)
		if learned = j.digest != ""; learned {
			e.Progress("volume %s: the packet's digest was not kept when it was enrolled; from now on it is %s, as the servers say", j.uuid, j.digest)
		}
	}
	for i, h := range held {
		if why := h.due(j, nil); why != "" {
			r.due(why + ": run mandos-escrow rotate")
		}
		err := h.compare(j)
		if err == nil {
			if heldOf(h.volumes, j.uuid).Reencrypt {
				r.due("the volume key may be known to others: encrypt the volume anew")
			}
			continue
		}
		r.Servers[i].Problem = err.Error()
		r.wrong(fmt.Errorf("%s: %w", h.Name, err))
	}
	return learned
}

// compare is what is wrong with a server's copies.
func (h *holding) compare(j *journal) error {
	if h.err != nil {
		return h.err
	}
	v := heldOf(h.volumes, j.uuid)
	switch {
	case v.PacketID == "":
		return fmt.Errorf("%w: it has no verified packet of this volume", ErrEscrow)
	case v.PacketID != j.packet:
		return fmt.Errorf("%w: its packet is %s, and %s was escrowed", ErrEscrow, v.PacketID, j.packet)
	case v.Damaged:
		return fmt.Errorf("%w: its copy of packet %s is damaged", ErrEscrow, j.packet)
	case j.digest != "" && v.Digest != j.digest:
		return fmt.Errorf("%w: its packet %s has other bytes than were escrowed", ErrEscrow, j.packet)
	case j.boots() && !(v.Boot && v.Blob):
		return fmt.Errorf("%w: it has no sealed blob, so the machine does not boot from it", ErrEscrow)
	}
	return nil
}

// agreed is the digest that as many servers name as open the packet, and no server
// another; or "".
func (e *enrolment) agreed(j *journal, held []holding) (digest string) {
	text, err := os.ReadFile(e.policyPath())
	if err != nil {
		return ""
	}
	policy, err := escrow.ParsePolicy(text)
	if err != nil {
		return ""
	}
	n := 0
	for _, h := range held {
		v := heldOf(h.volumes, j.uuid)
		if h.err != nil || v.PacketID != j.packet || len(v.Digest) != 64 {
			continue
		}
		if digest != "" && digest != v.Digest {
			return ""
		}
		digest, n = v.Digest, n+1
	}
	if n < min(policy.Threshold, len(held)) {
		return ""
	}
	return digest
}

// proveBoot does what a boot does: to the server it is one.
func (e *enrolment) proveBoot(ctx context.Context, v *volume, j *journal, o VerifyOptions) error {
	passphrase, err := CheckOptions{Root: o.Root, Program: o.Program, Tool: o.Tool}.fetch(ctx, j.uuid)
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	_, err = e.Tool.Test(ctx, v.device, passphrase, j.boot.number)
	if errors.Is(err, cryptsetup.ErrPassphrase) {
		return fmt.Errorf("%w: what was fetched does not open keyslot %d", ErrKeyslot, j.boot.number)
	}
	return err
}

// check is the result as servers are told it: a server that does not answer is
// nothing that another must know.
func (r *Verified) check() unlock.VolumeCheck {
	var reasons []string
	for i, err := range r.errs {
		if api.CodeOf(err) == "" && !gone(err) {
			reasons = append(reasons, r.Problems[i])
		}
	}
	reason := strings.Join(reasons, "; ")
	if record.Printable(reason) != nil && reason != "" {
		reason = fmt.Sprintf("%q", reason)
	}
	return unlock.VolumeCheck{UUID: r.UUID, Packet: r.Packet, Reason: shorten(reason, unlock.MaxCheckReason)}
}

// shorten cuts a text to at most n bytes, between characters.
func shorten(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.TrimSpace(strings.ToValidUTF8(text[:n], ""))
}

// tellChecks tells each server that answered what was found, as the running
// identity.
func (e *enrolment) tellChecks(ctx context.Context, held []holding, checks []unlock.VolumeCheck, results []Verified) {
	key, err := config.LoadKey(e.path(RunningFolder))
	for i, h := range held {
		if h.err != nil {
			continue
		}
		told := err
		for part := range slices.Chunk(checks, unlock.MaxChecks) {
			if told == nil {
				told = e.tellCheck(ctx, h, key, part)
			}
		}
		for k := range results {
			results[k].Servers[i].Told = told == nil
			if told != nil {
				results[k].wrong(fmt.Errorf("tell %s: %w", h.Name, told))
			}
		}
	}
}

func (e *enrolment) tellCheck(ctx context.Context, h holding, key *identity.Key, checks []unlock.VolumeCheck) error {
	client, err := e.dial(unlock.Server(h.ServerKnown), key)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Call(ctx, "POST", "/v1/self/verify", api.Verify{Volumes: checks}, nil)
}
