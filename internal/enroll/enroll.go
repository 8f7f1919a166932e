// Package enroll is the transaction that registers a machine, escrows its
// volumes and prepares their unattended boot, and the one that takes all that
// back. Killed at any point and run again, enrolment ends with exactly one boot and one recovery keyslot of ours on each
// volume, both escrowed, and with nothing that it did not make removed.
//
// It is not the command line and not the format of what it sends. It may
// import the rooms, luks/cryptsetup, internal/api and internal/config.
package enroll

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks/cryptsetup"
)

// Folders, below the root.
const (
	BootFolder    = config.BootFolder
	RunningFolder = config.RunningFolder
)

// Errors that callers decide on.
var (
	// ErrPolicy: what the server shows is not the policy that the token names.
	ErrPolicy = errors.New("the server shows another policy than the token names")
	// ErrFull: no free keyslot; nothing was changed.
	ErrFull = errors.New("no free keyslot")
	// ErrName: another name than the one that the machine enrolled with.
	ErrName = errors.New("another name")
	// ErrOther: the machine is enrolled with other servers.
	ErrOther = errors.New("this machine is enrolled with other servers")
)

// Options say what to enroll.
type Options struct {
	Token            *api.Token
	Root             string // prefix of what is written; "/" for the running system
	Devices          []string
	Passphrase       []byte // as it was read: its exact bytes are tried first
	RemovePassphrase bool
	NoBoot           bool   // escrow only
	Name             string // empty: the host name
	Tool             cryptsetup.Tool
	Now              func() time.Time
	Progress         func(format string, args ...any)

	// Checkpoint, in tests, is called between any two steps that last.
	Checkpoint func(step string)
}

// Result is what became of one volume.
type Result struct {
	Device       string `json:"device"`
	UUID         string `json:"uuid"`
	Packet       string `json:"packet"`
	BootSlot     int    `json:"boot_slot"` // -1: none
	RecoverySlot int    `json:"recovery_slot"`
	Already      bool   `json:"already_enrolled"`
	// Behind names servers that do not have all of it yet: they did not answer,
	// and follow when this is run again. It is enrolled without them.
	Behind []string `json:"behind,omitempty"`
}

// enrolment is one run.
type enrolment struct {
	Options
	boot    *config.Identity
	running *config.Identity
	name    string
	idHash  string // of the machine-id
	peers   []*peer
	newKey  bool             // a person says that the volume was encrypted anew
	fetched bool             // Passphrase is not a person's, but the machine's own boot passphrase
	renew   bool             // also what stands gets new passphrases and a new packet
	causes  []identity.KeyID // servers that say that a volume is due
	kept    bool             // servers, policy and keys are those that were kept, and no token is used
	policy  escrow.Policy
	keys    map[string]*seal.PublicKey // of the trustees, by fingerprint
	volumes []*volume
}

// Run enrolls. What can be refused without changing anything is refused first,
// and what can be refused without a server, before one is asked. A volume
// whose result is returned beside an error is done.
func Run(ctx context.Context, o Options) ([]Result, error) {
	e := &enrolment{Options: o}
	if e.Checkpoint == nil {
		e.Checkpoint = func(string) {}
	}
	results, err := e.run(ctx)
	if err != nil {
		return results, fmt.Errorf("enroll: %w", err)
	}
	return results, nil
}

func (e *enrolment) run(ctx context.Context) ([]Result, error) {
	if err := e.inspect(ctx); err != nil {
		return nil, err
	}
	lock, err := e.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	e.Tool.Hold = lock
	defer e.wipe()
	if err := e.prepare(ctx); err != nil {
		return nil, err
	}
	defer e.hangUp()
	if err := e.call(ctx); err != nil {
		return nil, err
	}
	var results []Result
	for _, v := range e.volumes {
		r, err := e.enrollVolume(ctx, v)
		if err != nil {
			return results, fmt.Errorf("%s: %w", v.device, err)
		}
		results = append(results, r)
	}
	return results, nil
}

// inspect refuses what needs no lock, no folder and no key to be refused.
func (e *enrolment) inspect(ctx context.Context) error {
	if info, err := os.Stat(e.Root); err != nil || !info.IsDir() {
		return fmt.Errorf("--root %s is not a folder", e.Root)
	}
	if err := e.meetServers(); err != nil {
		return err
	}
	if err := e.setName(); err != nil {
		return err
	}
	if _, err := e.Tool.Version(ctx); err != nil {
		return err
	}
	for _, device := range e.Devices {
		v, err := newVolume(device)
		if err != nil {
			return fmt.Errorf("%s: %w", device, err)
		}
		if slices.ContainsFunc(e.volumes, func(other *volume) bool { return other.header.UUID == v.header.UUID }) {
			return fmt.Errorf("%s: volume %s is named twice", device, v.header.UUID)
		}
		e.volumes = append(e.volumes, v)
	}
	if e.kept {
		return nil
	}
	return e.checkPins()
}

// prepare finds out where the volumes stand, and reads or makes what tells
// this machine from others. No volume and no server is changed.
func (e *enrolment) prepare(ctx context.Context) error {
	if err := e.sweep(); err != nil {
		return err
	}
	for _, v := range e.volumes {
		if err := e.examine(ctx, v); err != nil {
			return fmt.Errorf("%s: %w", v.device, err)
		}
	}
	if err := e.identify(); err != nil {
		return err
	}
	return e.checkBootConfig()
}

func (e *enrolment) wipe() {
	for _, v := range e.volumes {
		v.wipe()
	}
}

func (e *enrolment) path(parts ...string) string {
	return filepath.Join(append([]string{e.Root}, parts...)...)
}
