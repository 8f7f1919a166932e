package enroll

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

// ErrNothing: no volume is enrolled here.
var ErrNothing = errors.New("no volume of this machine is enrolled")

// RotateOptions say what is to be rotated.
type RotateOptions struct {
	Root       string
	Volumes    []string   // UUIDs or their beginnings; none: all that are enrolled
	Devices    []string   // where volumes lie that are not found where they lay
	Passphrase []byte     // opens them, as it was read; nil: the boot passphrase is fetched
	Token      *api.Token // nil: what was kept at the enrolment
	Due        bool       // only those that were revealed, have expired, are not whole at a server, or are not finished
	// Reencrypted: the person who gave the passphrase says that a volume has
	// another volume key than the enrolled one, and that it is the same volume.
	Reencrypted bool

	// Program is the boot program; "": there is none.
	Program string
	// Ask gets a passphrase from a person; nil: nobody is there.
	Ask func(device string) ([]byte, error)

	Tool       cryptsetup.Tool
	Now        func() time.Time
	Progress   func(format string, args ...any)
	Checkpoint func(step string)

	held []holding // what the servers said, for Due
}

// Rotated is what became of one volume.
type Rotated struct {
	Result
	Rotated bool   `json:"rotated"`
	Why     string `json:"due,omitempty"` // it was due
	// Until: it is due, but was rotated lately for the servers that say so, and
	// is not again before that.
	Until time.Time `json:"not_before,omitzero"`
}

// Rotate gives volumes of an enrolled machine a new boot and a new recovery
// passphrase and a new packet, and removes the keyslots before. It is the
// transaction of Run, without a token: killed at any point and run again, there is
// one boot and one recovery keyslot, both escrowed. A volume whose result is
// returned beside an error is done.
func Rotate(ctx context.Context, o RotateOptions) ([]Rotated, error) {
	if o.Checkpoint == nil {
		o.Checkpoint = func(string) {}
	}
	results := []Rotated{}
	uuids, err := o.chosen()
	if err == nil && o.Due {
		err = o.ask(ctx)
	}
	for _, uuid := range uuids {
		if err != nil {
			break
		}
		var r Rotated
		if r, err = o.rotate(ctx, uuid); err == nil {
			results = append(results, r)
		}
	}
	if err != nil {
		return results, fmt.Errorf("rotate: %w", err)
	}
	return results, nil
}

// chosen are the UUIDs of the volumes that are meant.
func (o *RotateOptions) chosen() ([]string, error) {
	all, err := (&enrolment{Options: Options{Root: o.Root}}).journals()
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: run `mandos-escrow enroll` first", ErrNothing)
	}
	return selectVolumes(all, o.Volumes)
}

// selectVolumes finds each word's volume; no word means all.
func selectVolumes(all, words []string) (uuids []string, err error) {
	if len(words) == 0 {
		return all, nil
	}
	for _, word := range words {
		var found []string
		for _, uuid := range all {
			if word != "" && strings.HasPrefix(uuid, strings.ToLower(word)) {
				found = append(found, uuid)
			}
		}
		if len(found) != 1 {
			return nil, fmt.Errorf("%q means %d of the enrolled volumes: %s", word, len(found), strings.Join(all, ", "))
		}
		if !slices.Contains(uuids, found[0]) {
			uuids = append(uuids, found[0])
		}
	}
	return uuids, nil
}

// enrolment is the transaction on one volume.
func (o *RotateOptions) enrolment(v *volume, j *journal) *enrolment {
	return &enrolment{kept: o.Token == nil, Options: Options{
		Token: o.Token, Root: o.Root, Devices: []string{v.device}, NoBoot: !j.boots(), Tool: o.Tool, Now: o.Now,
		Progress: o.Progress, Checkpoint: o.Checkpoint,
	}}
}

func (o *RotateOptions) rotate(ctx context.Context, uuid string) (Rotated, error) {
	e := &enrolment{Options: Options{Root: o.Root, Tool: o.Tool}}
	j, err := e.readJournal(uuid)
	if err != nil {
		return Rotated{}, err
	}
	v, err := e.locate(uuid, j, o.Devices)
	if err != nil {
		return Rotated{}, fmt.Errorf("volume %s: %w", uuid, err)
	}
	r, err := o.rotateVolume(ctx, v, j)
	if err != nil {
		return r, fmt.Errorf("%s: %w", v.device, err)
	}
	return r, nil
}

func (o *RotateOptions) rotateVolume(ctx context.Context, v *volume, j *journal) (Rotated, error) {
	r := Rotated{Result: Result{Device: v.device, UUID: j.uuid, Packet: j.packet, BootSlot: j.boot.number, RecoverySlot: j.recovery.number, Already: true}}
	e := o.enrolment(v, j)
	e.renew = true
	if err := e.checkEnrolled(v, j); errors.Is(err, luks.ErrMismatch) && o.Reencrypted && o.Passphrase != nil {
		e.newKey = true
		e.Progress("%s: %v; taken as encrypted anew, because you say so", v.device, err)
	} else if errors.Is(err, luks.ErrMismatch) {
		return r, fmt.Errorf("%w; it is another volume, or was encrypted anew: if you did that, give --reencrypted and --passphrase-file", err)
	} else if err != nil {
		return r, err
	}
	if o.Due {
		owed, err := e.readUploads(j.uuid, j.packet)
		if err != nil {
			return r, err
		}
		v := j.judge(o.held, owed, o.Now())
		r.Why, r.Until, e.causes = v.why, v.until, v.by
		if e.renew = v.why != "" && v.until.IsZero(); !e.renew && owed == nil {
			return r, nil
		}
	}
	if e.renew {
		var err error
		if e.Passphrase, e.fetched, err = o.passphrase(ctx, v, j); err != nil {
			return r, err
		}
		defer secret.Wipe(e.Passphrase)
	}
	results, err := e.run(ctx)
	if err != nil {
		return r, err
	}
	r.Result, r.Rotated = results[0], e.renew
	return r, nil
}

// checkEnrolled compares a header with what was enrolled: as the journal has it,
// or the boot program.
func (e *enrolment) checkEnrolled(v *volume, j *journal) error {
	if j.pins != nil {
		return luks.Match(v.header, *j.pins)
	}
	return e.matchesEnrolled(v.header)
}

// ask asks the servers what is due, and refuses to call nothing due when nobody
// answered.
func (o *RotateOptions) ask(ctx context.Context) (err error) {
	o.held, err = (&enrolment{Options: Options{Root: o.Root}}).askServers(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, h := range o.held {
		if h.err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", h.Name, h.err))
		}
	}
	if len(failed) == len(o.held) {
		return errors.Join(failed...)
	}
	for _, err := range failed {
		o.Progress("warning: it is not known what this server says: %v", err)
	}
	return nil
}

// passphrase opens the volume: the given one, that which the boot program
// fetches, or that which a person types. The caller wipes it. An interrupted run
// may not need any, because its journal holds one.
func (o *RotateOptions) passphrase(ctx context.Context, v *volume, j *journal) (text []byte, fetched bool, err error) {
	if o.Passphrase != nil {
		return slices.Clone(o.Passphrase), false, nil
	}
	switch {
	case !j.boots():
		err = errors.New("it does not boot unattended, so no passphrase can be fetched")
	case o.Program == "":
		err = errors.New("the boot program, which fetches the boot passphrase, is not installed")
	default:
		if text, err = (CheckOptions{Root: o.Root, Program: o.Program, Tool: o.Tool}).fetch(ctx, j.uuid); err == nil {
			o.Progress("%s: the boot passphrase was fetched as at a boot", v.device)
			return text, true, nil
		}
		err = fmt.Errorf("fetch the boot passphrase: %w", err)
	}
	switch {
	case ctx.Err() != nil:
		return nil, false, ctx.Err()
	case o.Ask != nil:
		o.Progress("%s: %v", v.device, err)
		text, err = o.Ask(v.device)
		return text, false, err
	case !j.committed: // its journal may have all that is needed
		o.Progress("%s: %v", v.device, err)
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("%w; give --passphrase-file", err)
}

// holding is what a server holds of a machine's volumes.
type holding struct {
	ServerKnown
	volumes []api.MachineVolume
	err     error
}

// askServers asks each server of the machine, as the running identity, what it
// holds.
func (e *enrolment) askServers(ctx context.Context) ([]holding, error) {
	servers, err := e.readServers()
	if err != nil {
		return nil, err
	}
	key, err := config.LoadKey(e.path(RunningFolder))
	if err != nil {
		return nil, fmt.Errorf("the running identity: %w", err)
	}
	var all []holding
	for _, s := range servers {
		h := holding{ServerKnown: ServerKnown(s)}
		client, err := e.dial(s, key)
		if err != nil {
			return nil, err
		}
		h.err = client.Call(ctx, "GET", "/v1/self", nil, &h.volumes)
		client.Close()
		all = append(all, h)
	}
	if len(all) == 0 {
		err = fmt.Errorf("%s: %w", e.serversPath(), os.ErrNotExist)
	}
	return all, err
}
