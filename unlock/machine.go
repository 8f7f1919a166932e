// Package unlock is unattended boot: the protocol between a booting machine
// and its servers, the record of a machine, and the decision whether its
// sealed blobs go out.
//
// It is not a server and not an initramfs program: those stand around it. It
// knows no database, HTTP, command line or other process, and imports only
// escrow and the leaves record, seal, secret and identity.
package unlock

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// ErrSettings is wrapped by Settings.Check.
var ErrSettings = errors.New("setting out of bounds")

// TimedOut is DisabledBecause of a machine whose timeout passed. Only such a
// machine, never one that somebody disabled, may be revived by itself.
const TimedOut = "timed out"

// SelfUnenrolled is DisabledBecause of a machine that took itself back.
const SelfUnenrolled = "unenrolled"

// MaxApprovalDelay is as long as a boot program waits on one connection.
const MaxApprovalDelay = 10 * time.Minute

// Machine is what a server knows of an enrolled machine. The settings have the
// names and meanings of mandos-clients.conf(5).
type Machine struct {
	KeyID         identity.KeyID  `json:"key_id"`         // of the boot identity
	RunningKeyID  identity.KeyID  `json:"running_key_id"` // of the running identity
	RunningKey    identity.Public `json:"running_key"`
	Name          string          `json:"name"`
	MachineIDHash string          `json:"machine_id_hash"` // hex SHA-256 of "mandos-escrow machine-id " + machine-id(5)
	Group         string          `json:"group"`
	Host          string          `json:"host"`
	TokenID       string          `json:"token_id"` // the token it enrolled with
	Hold          bool            `json:"hold"`     // its packets are kept whatever happens

	Settings

	Created             time.Time `json:"created"`
	Enabled             bool      `json:"enabled"`
	DisabledBecause     string    `json:"disabled_because,omitempty"`
	LastEnabled         time.Time `json:"last_enabled"`
	LastDisabled        time.Time `json:"last_disabled,omitzero"`
	LastCheckedOK       time.Time `json:"last_checked_ok,omitzero"`
	LastApprovalRequest time.Time `json:"last_approval_request,omitzero"`
	LastReleased        time.Time `json:"last_released,omitzero"`
	Expires             time.Time `json:"expires,omitzero"` // zero: no timeout runs
	Approval            Approval  `json:"approval,omitzero"`
	LastNonce           string    `json:"last_nonce,omitempty"` // of the last release
	Volumes             []string  `json:"volumes"`              // UUIDs that have an active blob
	Unenrolled          time.Time `json:"unenrolled,omitzero"`  // when its running identity took it back
	LastBoot            Boot      `json:"last_boot,omitzero"`
	Boots               Holders   `json:"boots,omitzero"`
	// Checks have, for each volume, what the machine last found when it verified it.
	Checks []VolumeCheck `json:"checks,omitempty"`
}

// Holders are the servers that hold a machine's blobs, as the machine said when
// it enrolled, and how many of them it needs to boot. The zero value is this
// server alone.
type Holders struct {
	Threshold int      `json:"threshold"`
	Servers   []Holder `json:"servers"`
}

// Holder is one of them.
type Holder struct {
	Name  string         `json:"name"`
	KeyID identity.KeyID `json:"key_id"`
}

// ErrHolders is wrapped by Holders.Check.
var ErrHolders = errors.New("not the servers of a machine")

// Check refuses what no machine says: they are 1 to MaxServers, each once, and
// this server is one of them.
func (h Holders) Check(this identity.KeyID) error {
	if m := len(h.Servers); m < 1 || m > MaxServers || h.Threshold < 1 || h.Threshold > m {
		return fmt.Errorf("%w: %d of %d", ErrHolders, h.Threshold, m)
	}
	here := false
	for i, s := range h.Servers {
		if _, err := identity.ParseKeyID(string(s.KeyID)); err != nil {
			return fmt.Errorf("%w: %w", ErrHolders, err)
		}
		if slices.ContainsFunc(h.Servers[:i], func(o Holder) bool { return o.KeyID == s.KeyID }) || record.Printable(s.Name) != nil || len(s.Name) > maxHolderName {
			return fmt.Errorf("%w: %.40q", ErrHolders, s.Name)
		}
		here = here || s.KeyID == this
	}
	if !here {
		return fmt.Errorf("%w: this one is not among them", ErrHolders)
	}
	return nil
}

const maxHolderName = 255 // bytes

// ToDisable is how many servers must refuse so that the others cannot boot the
// machine: M-N+1.
func (h Holders) ToDisable() int { return max(1, len(h.Servers)-h.Threshold+1) }

// Boot is what a machine told, with its running identity, of its last boot.
type Boot struct {
	ID      string       `json:"boot_id"` // the kernel's, which no two boots share
	Told    time.Time    `json:"told"`    // by the server's clock
	Volumes []VolumeBoot `json:"volumes"`
}

// VolumeBoot is what became of one volume in a boot.
type VolumeBoot struct {
	UUID    string  `json:"uuid"`
	Outcome Outcome `json:"outcome"`
	Reason  string  `json:"reason,omitempty"` // in words, for people
}

// Outcome is one of what can become of a volume in a boot.
type Outcome string

// The outcomes.
const (
	Opened     Outcome = "opened"     // by the boot passphrase
	Answered   Outcome = "answered"   // somebody else answered first: a person, a TPM
	Rejected   Outcome = "rejected"   // the boot passphrase opens it no more
	Mismatched Outcome = "mismatch"   // another header than the enrolled one
	Unanswered Outcome = "unanswered" // no server released, or nobody asked for it
)

// MaxReason bounds a VolumeBoot's Reason, in bytes.
const MaxReason = 300

// ErrBoot is wrapped by Boot.Check.
var ErrBoot = errors.New("not a report of a boot")

// Check refuses what no boot program reports.
func (b Boot) Check() error {
	if !record.IsUUID(b.ID) {
		return fmt.Errorf("%w: boot id %.40q", ErrBoot, b.ID)
	}
	if len(b.Volumes) > MaxBlobs {
		return fmt.Errorf("%w: %d volumes, at most %d are possible", ErrBoot, len(b.Volumes), MaxBlobs)
	}
	for i, v := range b.Volumes {
		switch {
		case !record.IsUUID(v.UUID) || slices.ContainsFunc(b.Volumes[:i], func(o VolumeBoot) bool { return o.UUID == v.UUID }):
			return fmt.Errorf("%w: volume %.40q", ErrBoot, v.UUID)
		case !slices.Contains([]Outcome{Opened, Answered, Rejected, Mismatched, Unanswered}, v.Outcome):
			return fmt.Errorf("%w: outcome %.40q", ErrBoot, v.Outcome)
		case len(v.Reason) > MaxReason:
			return fmt.Errorf("%w: a reason of %d bytes, at most %d are possible", ErrBoot, len(v.Reason), MaxReason)
		}
	}
	return nil
}

// Settings are what an administrator may change, with Mandos's meanings.
type Settings struct {
	Timeout           Duration `json:"timeout"` // zero: never
	ExtendedTimeout   Duration `json:"extended_timeout"`
	Interval          Duration `json:"interval"`
	Checker           string   `json:"checker"`
	ApprovedByDefault bool     `json:"approved_by_default"`
	ApprovalDelay     Duration `json:"approval_delay"`
	ApprovalDuration  Duration `json:"approval_duration"`
}

// Approval is an administrator's word about the next boot; it holds from At
// until Until.
type Approval struct {
	Given bool      `json:"given"` // false with a future Until: denied
	At    time.Time `json:"at"`
	Until time.Time `json:"until"`
	By    string    `json:"by"`
}

// Defaults are Mandos's, except that no timeout runs: that needs checkers.
func Defaults() Settings {
	return Settings{
		ExtendedTimeout:   Duration(15 * time.Minute),
		Interval:          Duration(2 * time.Minute),
		Checker:           "fping -q -- %(host)s",
		ApprovedByDefault: true,
		ApprovalDuration:  Duration(time.Second),
	}
}

// Check refuses settings under which a machine could not boot as they say.
func (s Settings) Check() error {
	if d := time.Duration(s.ApprovalDelay); d < 0 || d > MaxApprovalDelay {
		return fmt.Errorf("%w: approval delay %s, at most %s is possible", ErrSettings, s.ApprovalDelay, Duration(MaxApprovalDelay))
	}
	for name, d := range map[string]Duration{
		"timeout": s.Timeout, "extended timeout": s.ExtendedTimeout,
		"interval": s.Interval, "approval duration": s.ApprovalDuration,
	} {
		if _, err := d.MarshalText(); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrSettings, name, err)
		}
	}
	return nil
}

// VolumeCheck is what a machine told of one volume when it verified it.
type VolumeCheck struct {
	UUID   string `json:"uuid"`
	Packet string `json:"packet"`           // the one that its journal names
	Reason string `json:"reason,omitempty"` // what is wrong, in words; "": nothing
	// Checked is when it was told, by the server's clock.
	Checked time.Time `json:"checked,omitzero"`
}

// Limits of what a machine says of its volumes.
const (
	MaxChecks      = 64   // volumes
	MaxCheckReason = 1000 // of a VolumeCheck's Reason, in bytes
)

// ErrCheck is wrapped by CheckVolumes.
var ErrCheck = errors.New("not what a machine finds of its volumes")

// CheckVolumes refuses what no machine tells.
func CheckVolumes(all []VolumeCheck) error {
	if len(all) == 0 || len(all) > MaxChecks {
		return fmt.Errorf("%w: %d volumes, 1 to %d are possible", ErrCheck, len(all), MaxChecks)
	}
	for i, v := range all {
		if !record.IsUUID(v.UUID) || slices.ContainsFunc(all[:i], func(o VolumeCheck) bool { return o.UUID == v.UUID }) {
			return fmt.Errorf("%w: volume %.40q", ErrCheck, v.UUID)
		}
		if len(v.Packet) > 64 || record.Printable(v.Packet) != nil {
			return fmt.Errorf("%w: packet %.40q", ErrCheck, v.Packet)
		}
		if len(v.Reason) > MaxCheckReason || v.Reason != "" && record.Printable(v.Reason) != nil {
			return fmt.Errorf("%w: reason of volume %s", ErrCheck, v.UUID)
		}
	}
	return nil
}

// Checked returns the machine with what was found now; what was found of other
// volumes stays, as long as there is room. changed are those of which something
// else was found than the last time.
func (m Machine) Checked(found []VolumeCheck, now time.Time) (next Machine, changed []VolumeCheck) {
	next = m
	next.Checks = nil
	for _, v := range found {
		v.Checked = now.UTC()
		next.Checks = append(next.Checks, v)
		i := slices.IndexFunc(m.Checks, func(o VolumeCheck) bool { return o.UUID == v.UUID })
		if i < 0 || m.Checks[i].Packet != v.Packet || m.Checks[i].Reason != v.Reason {
			changed = append(changed, v)
		}
	}
	for _, old := range m.Checks {
		again := slices.ContainsFunc(found, func(v VolumeCheck) bool { return v.UUID == old.UUID })
		if !again && len(next.Checks) < MaxChecks {
			next.Checks = append(next.Checks, old)
		}
	}
	return next, changed
}
