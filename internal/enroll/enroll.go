// Package enroll is the transaction that registers a machine, escrows its
// volumes and prepares their unattended boot. Killed at any point and run
// again, it ends with exactly one boot and one recovery keyslot of ours on each
// volume, both escrowed, and with nothing that it did not make removed.
//
// It is not the command line and not the format of what it sends. It may
// import the rooms, luks/cryptsetup, internal/api and internal/config.
package enroll

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// Folders, below the root.
const (
	BootFolder    = "etc/mandos-escrow"
	RunningFolder = "var/lib/mandos-escrow-agent"
)

// Errors that callers decide on.
var (
	// ErrPolicy: what the server shows is not the policy that the token names.
	ErrPolicy = errors.New("the server shows another policy than the token names")
	// ErrFull: no free keyslot; nothing was changed.
	ErrFull = errors.New("no free keyslot")
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
}

// enrolment is one run.
type enrolment struct {
	Options
	lock    *os.File
	boot    *config.Identity
	running *config.Identity
	name    string
	idHash  string // of the machine-id
	client  *api.Client
	server  unlock.Server
	policy  escrow.Policy
	keys    []*seal.PublicKey
	volumes []*volume
}

// Run enrolls. What can be refused without changing anything is refused first.
func Run(ctx context.Context, o Options) ([]Result, error) {
	e := &enrolment{Options: o}
	if e.Checkpoint == nil {
		e.Checkpoint = func(string) {}
	}
	if info, err := os.Stat(o.Root); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("enroll: --root %s is not a folder", o.Root)
	}
	if len(o.Token.Servers) != 1 {
		return nil, fmt.Errorf("enroll: the token names %d servers; this version enrolls with one", len(o.Token.Servers))
	}
	if _, err := o.Tool.Version(ctx); err != nil {
		return nil, fmt.Errorf("enroll: %w", err)
	}
	for _, device := range o.Devices {
		v, err := inspect(device)
		if err != nil {
			return nil, fmt.Errorf("enroll: %s: %w", device, err)
		}
		if slices.ContainsFunc(e.volumes, func(other *volume) bool { return other.header.UUID == v.header.UUID }) {
			return nil, fmt.Errorf("enroll: %s: volume %s is named twice", device, v.header.UUID)
		}
		e.volumes = append(e.volumes, v)
	}
	if err := e.prepare(); err != nil {
		return nil, fmt.Errorf("enroll: %w", err)
	}
	defer e.lock.Close()
	for _, v := range e.volumes {
		if err := e.examine(ctx, v); err != nil {
			return nil, fmt.Errorf("enroll: %s: %w", v.device, err)
		}
		defer v.wipe()
	}
	if err := e.register(ctx); err != nil {
		return nil, fmt.Errorf("enroll: %w", err)
	}
	defer e.client.Close()
	var results []Result
	for _, v := range e.volumes {
		r, err := e.enrollVolume(ctx, v)
		if err != nil {
			return results, fmt.Errorf("enroll: %s: %w", v.device, err)
		}
		results = append(results, r)
	}
	return results, nil
}

func (e *enrolment) path(parts ...string) string {
	return filepath.Join(append([]string{e.Root}, parts...)...)
}

// prepare makes the folders, takes the lock, and reads or makes what tells
// this machine from others.
func (e *enrolment) prepare() (err error) {
	for _, dir := range []string{BootFolder, RunningFolder} {
		if err := os.MkdirAll(e.path(filepath.Dir(dir)), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(e.path(dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if e.lock, err = config.Lock(e.path(RunningFolder, "lock")); err != nil {
		return err
	}
	e.Tool.Hold = e.lock
	defer func() {
		if err != nil {
			e.lock.Close()
		}
	}()
	if e.name = e.Name; e.name == "" {
		e.name = hostname(e.Root)
	}
	if err := record.Printable(e.name); err != nil {
		return fmt.Errorf("machine name %q: %w; give another with --name", e.name, err)
	}
	if e.idHash, err = machineID(e.path("etc/machine-id")); err != nil {
		return err
	}
	now := e.Now()
	if e.boot, err = config.MakeIdentity(e.path(BootFolder), e.name+" boot", now); err != nil {
		return err
	}
	e.running, err = config.MakeIdentity(e.path(RunningFolder), e.name+" running", now)
	e.Checkpoint("identities")
	return err
}

// hostname prefers the name that the new system will have: in %post the kernel
// still has the installer's.
func hostname(root string) string {
	if text, err := os.ReadFile(filepath.Join(root, "etc/hostname")); err == nil {
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				return line
			}
		}
	}
	if name, err := os.Hostname(); err == nil && name != "" {
		return name
	}
	return "unnamed"
}

// machineID returns the hash of machine-id(5), and makes one where none is.
func machineID(path string) (string, error) {
	text, err := os.ReadFile(path)
	id := strings.TrimSpace(string(text))
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && (id == "" || id == "uninitialized"):
		id = secret.ID()
		if err := config.Replace(path, []byte(id+"\n")); err != nil {
			return "", err
		}
		if err := os.Chmod(path, 0o444); err != nil {
			return "", err
		}
	case err != nil:
		return "", err
	}
	sum := sha256.Sum256([]byte("mandos-escrow machine-id " + id))
	return hex.EncodeToString(sum[:]), nil
}

// register makes the machine known to the server, and takes the policy from it
// only if it is the one that the token names.
func (e *enrolment) register(ctx context.Context) error {
	mine := e.Token.Servers[0]
	e.server = mine.Server
	if err := e.sameServers(); err != nil {
		return err
	}
	var err error
	witness := api.NewWitness(e.path(RunningFolder, string(mine.KeyID)+".head"), mine.KeyID)
	if e.client, err = api.Dial(mine.Server, e.running.Key, witness); err != nil {
		return err
	}
	registration, err := api.Registration{
		Name: e.name, MachineIDHash: e.idHash, Boot: e.boot.Key.Public(), Running: e.running.Key.KeyID(),
	}.Sign(e.boot.Key)
	if err != nil {
		return err
	}
	var shown api.Policy
	if err := e.client.Call(ctx, "POST", "/v1/enroll", api.Enroll{Secret: mine.Secret, Registration: registration}, &shown); err != nil {
		return err
	}
	if err := e.pin(shown); err != nil {
		return err
	}
	e.Progress("registered %s at %s", e.name, e.server.Name)
	e.Checkpoint("registered")
	return nil
}

func (e *enrolment) sameServers() error {
	data, err := os.ReadFile(e.path(BootFolder, unlock.ConfigFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	conf, err := unlock.ParseConfig(data)
	if err != nil {
		return fmt.Errorf("%s: %w", e.path(BootFolder, unlock.ConfigFile), err)
	}
	for _, s := range conf.Servers {
		if s.KeyID != e.server.KeyID {
			return fmt.Errorf("%w: %s (%s), and the token is for %s (%s)", ErrOther, s.Name, s.KeyID.Short(), e.server.Name, e.server.KeyID.Short())
		}
	}
	return nil
}

// pin checks policy and keys against the token, and against what an earlier
// enrolment pinned.
func (e *enrolment) pin(shown api.Policy) error {
	policy, err := escrow.ParsePolicy([]byte(shown.Policy))
	if err != nil {
		return err
	}
	if policy.Digest() != e.Token.PolicyDigest {
		return ErrPolicy
	}
	path := e.path(RunningFolder, "policy")
	pinned, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := config.Replace(path, policy.Bytes()); err != nil {
			return err
		}
	case err != nil:
		return err
	case sha256.Sum256(pinned) != policy.Digest():
		return fmt.Errorf("%w: this machine has pinned another one in %s", ErrPolicy, path)
	}
	if len(shown.Keys) != len(policy.Trustees) {
		return fmt.Errorf("%w: %d keys for %d trustees", ErrPolicy, len(shown.Keys), len(policy.Trustees))
	}
	for i, text := range shown.Keys {
		key, err := seal.ParsePublic([]byte(text))
		if err != nil {
			return err
		}
		if key.Fingerprint() != policy.Trustees[i].Fingerprint {
			return fmt.Errorf("%w: key %s in place of trustee %s", ErrPolicy, key.Fingerprint(), policy.Trustees[i].Fingerprint)
		}
		e.keys = append(e.keys, key)
	}
	e.policy = policy
	return nil
}

// inspect reads a volume's header strictly.
func inspect(device string) (*volume, error) {
	header, err := luks.ReadFile(device)
	if err != nil {
		return nil, err
	}
	absolute, err := filepath.Abs(device)
	if err != nil {
		return nil, err
	}
	return &volume{device: device, path: absolute, header: header}, nil
}
