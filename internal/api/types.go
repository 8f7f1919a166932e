// Package api is the HTTPS interface between commands, agents and servers: its
// messages, its error codes, tokens and invites, and the client. The messages
// are specified in docs/api.md.
//
// It is not the server. It may import the rooms whose records it carries.
package api

import (
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

// Protocols of the one port, told apart by ALPN (RFC 7301).
const Protocol = "http/1.1"

// Limits of a request.
const (
	MaxBody = 2 << 20 // of a request
	MaxName = 100     // of a machine, an administrator, a group
	MaxPage = 1000    // items of a list in one reply
)

// Status is what a server says of itself.
type Status struct {
	Name         string         `json:"name"`
	KeyID        identity.KeyID `json:"key_id"`
	Addresses    []string       `json:"addresses"`
	Listen       []string       `json:"listen"`
	Version      string         `json:"version"`
	Started      time.Time      `json:"started"`
	Unconfirmed  string         `json:"unconfirmed,omitempty"` // why it serves nothing
	Epoch        uint64         `json:"epoch"`
	AuditSeq     uint64         `json:"audit_seq"`
	AuditHash    string         `json:"audit_hash"`
	PolicyEpoch  uint64         `json:"policy_epoch"`
	PolicyDigest string         `json:"policy_sha256"`
	Threshold    int            `json:"threshold"`
	Trustees     []string       `json:"trustees"`
	Master       string         `json:"master_key"` // fingerprint
	MasterHere   bool           `json:"master_private_here"`
	MasterSaved  time.Time      `json:"master_exported,omitzero"`
	Machines     int            `json:"machines"`
	Packets      int            `json:"packets"`
	OpenRequests int            `json:"open_requests"`
	Unproved     int            `json:"machines_unverified"` // machines without a verified packet
	RotateDue    int            `json:"rotate_due"`          // packets whose recovery passphrase is to be replaced
	ReencryptDue int            `json:"reencrypt_due"`       // packets of volumes whose volume key is known to others
}

// Policy is the current policy and the keys that it names.
type Policy struct {
	Policy string   `json:"policy"`
	Keys   []string `json:"keys"` // armored, in the policy's order
}

// Login makes an administrator's identity known.
type Login struct {
	Secret []byte `json:"secret"`
}

// LoginReply tells an administrator who they are.
type LoginReply struct {
	Name   string `json:"name"`
	Role   string `json:"role"`
	Policy Policy `json:"policy"`
	// Expires is when a rescue invite is over; of an administrator none.
	Expires time.Time `json:"expires,omitzero"`
}

// Enroll registers a machine: the registration record, signed by the boot
// identity; the connection is that of the running identity.
type Enroll struct {
	Secret       []byte `json:"secret"`
	Registration []byte `json:"registration"`
}

// Enrolled is the reply to Enroll.
type Enrolled struct {
	Policy
	Namesakes int    `json:"namesakes"`          // other machines of the same name
	Disabled  string `json:"disabled,omitempty"` // why it stays disabled: somebody did that, or it took itself back; empty: it does not
}

// MachineVolume is what a server holds of one volume of the calling machine.
type MachineVolume struct {
	UUID     string `json:"uuid"`
	PacketID string `json:"packet_id"` // the newest verified one, "" if none
	Digest   string `json:"digest"`
	Pending  string `json:"pending"` // a packet that was uploaded and not committed
	Boot     bool   `json:"boot"`    // an active sealed blob is there
	// Revealed: the recovery passphrase of that packet was released to somebody.
	Revealed bool `json:"revealed,omitempty"`
	// Expired: that packet expired, so its secrets are to be replaced.
	Expired bool `json:"expired,omitempty"`
	// Reencrypt: the volume key was released or expired, so the volume is due for
	// re-encryption.
	Reencrypt bool `json:"reencrypt,omitempty"`
	// Damaged: the server's copy of that packet is not whole; Digest is "" then.
	Damaged bool `json:"damaged,omitempty"`
	// Blob: the sealed blob itself is there. Boot says that it is to be.
	Blob bool `json:"blob,omitempty"`
}

// RotateDue reports whether the recovery passphrase is to be replaced.
func (v MachineVolume) RotateDue() bool { return v.Revealed || v.Expired }

// Verify is what a machine found when it verified its volumes.
type Verify struct {
	Volumes []unlock.VolumeCheck `json:"volumes"`
}

// Upload is a packet and, unless the volume is for escrow alone, the blob, with
// which servers hold one and how many of those give the passphrase back.
type Upload struct {
	Packet []byte         `json:"packet"`
	Blob   []byte         `json:"blob,omitempty"`
	Boot   unlock.Holders `json:"boot,omitzero"`
}

// Commit says that the secrets of a packet were proved on the volume.
type Commit struct {
	Packet string `json:"packet"`
	Boot   bool   `json:"boot"` // with the sealed blob that came with it; otherwise the volume has none
	// NewVolumeKey: the volume was encrypted anew since the packet that this one
	// replaces.
	NewVolumeKey bool `json:"new_volume_key,omitempty"`
}

// Unenrolled is what a server keeps of a machine that took itself back.
type Unenrolled struct {
	Packets int `json:"packets"` // they stay, and still open the volume key's payload
}

// Machine is a machine as lists show it.
type Machine struct {
	unlock.Machine
	State string `json:"state"` // enabled, disabled, timed out, not enrolled yet
}

// Change changes machines: all of those named, or none.
type Change struct {
	Machines []string         `json:"machines"` // names, key IDs or prefixes, volume UUIDs
	All      bool             `json:"all,omitempty"`
	Enable   *bool            `json:"enable,omitempty"`
	Approve  *bool            `json:"approve,omitempty"`
	Remove   bool             `json:"remove,omitempty"`
	Set      *MachineSettings `json:"set,omitempty"`
}

// MachineSettings are the settings of a change; nil leaves one as it is.
type MachineSettings struct {
	Timeout           *unlock.Duration `json:"timeout,omitempty"`
	ExtendedTimeout   *unlock.Duration `json:"extended_timeout,omitempty"`
	Interval          *unlock.Duration `json:"interval,omitempty"`
	ApprovalDelay     *unlock.Duration `json:"approval_delay,omitempty"`
	ApprovalDuration  *unlock.Duration `json:"approval_duration,omitempty"`
	ApprovedByDefault *bool            `json:"approved_by_default,omitempty"`
	Checker           *string          `json:"checker,omitempty"`
	Host              *string          `json:"host,omitempty"`
	Group             *string          `json:"group,omitempty"`
	Name              *string          `json:"name,omitempty"`
}

// Packet is a packet as lists show it: never a secret, sealed or not.
type Packet struct {
	escrow.Entry          // its State as escrow.Entry.Shown says it
	Verified     bool     `json:"verified"`
	Held         bool     `json:"held"`          // by its own hold or its group's
	Due          []string `json:"due,omitempty"` // DueRotate, DueReencrypt
}

// What a packet may be due for.
const (
	DueRotate    = "rotate"     // a new recovery passphrase, and a packet with it
	DueReencrypt = "re-encrypt" // a new volume key
)

// Life is how long the packets of a group live and are kept; of "", those of
// groups without their own. Zero is for ever.
type Life struct {
	Group     string          `json:"group"`
	Lifetime  unlock.Duration `json:"lifetime"`
	Retention unlock.Duration `json:"retention"`
	Hold      bool            `json:"hold"`
}

// SetLife changes a Life; nil leaves a setting as it is. Inherit removes the
// group's own settings.
type SetLife struct {
	Group     string           `json:"group,omitempty"`
	Lifetime  *unlock.Duration `json:"lifetime,omitempty"`
	Retention *unlock.Duration `json:"retention,omitempty"`
	Hold      *bool            `json:"hold,omitempty"`
	Inherit   bool             `json:"inherit,omitempty"`
}

// Expire names packets whose secrets others may know: one of the three.
type Expire struct {
	Packet  string `json:"packet,omitempty"`
	Machine string `json:"machine,omitempty"`
	Group   string `json:"group,omitempty"`
}

// Expired is how many packets expired.
type Expired struct {
	Packets int `json:"packets"`
}

// Delete names the packet once more.
type Delete struct {
	ID     string `json:"id"`
	Newest bool   `json:"newest,omitempty"` // although it is the newest of its volume
}

// Import is a packet that an administrator brings. Proved: its secrets were
// checked against the volume, on this administrator's word.
type Import struct {
	Packet []byte `json:"packet"`
	Proved bool   `json:"proved"`
}

// PacketHead is what a request binds: the clear header, and digests.
type PacketHead struct {
	Header         []byte            `json:"header"`
	Digest         string            `json:"digest"`
	PayloadDigests map[string]string `json:"payload_digests"`
}

// Request is a recovery request as lists show it.
type Request struct {
	ID        string         `json:"id"`
	Words     string         `json:"words,omitempty"` // only where its requester made it
	State     recovery.State `json:"state"`
	Volume    string         `json:"volume"`
	Machine   string         `json:"machine"`
	Packet    string         `json:"packet"`
	Payload   string         `json:"payload"`
	Requester string         `json:"requester"`
	Reason    string         `json:"reason"`
	Created   time.Time      `json:"created"`
	Expires   time.Time      `json:"expires"`
	Approvers []string       `json:"approvers"`
	Approved  []string       `json:"approved"`            // trustees whose shares are there, as the approvers
	CanStill  []string       `json:"can_still,omitempty"` // trustees who could approve
	Threshold int            `json:"threshold"`
	DecidedBy string         `json:"decided_by,omitempty"`
	Decided   time.Time      `json:"decided,omitzero"`
	Note      string         `json:"note,omitempty"`
}

// Material is what an approver needs: the request, the packet's clear header,
// the sealed shares of the payload, and, where the server keeps it, its master
// key under its passphrase. The payload itself is not in it.
type Material struct {
	Request []byte            `json:"request"`
	Header  []byte            `json:"header"`
	Set     []byte            `json:"set"`     // of the payload's shares, as the packet names it
	Shares  map[string][]byte `json:"shares"`  // by trustee fingerprint
	Trustee string            `json:"trustee"` // armored private key, protected; "" if it is kept elsewhere
}

// Approve is a signed approval and the re-sealed share.
type Approve struct {
	Approval []byte `json:"approval"`
	Share    []byte `json:"share"`
}

// Deny ends a request.
type Deny struct {
	Reason string `json:"reason"`
}

// Release is what the requester collects.
type Release struct {
	Request   []byte    `json:"request"`
	Packet    []byte    `json:"packet"`
	Approvals []Approve `json:"approvals"`
}

// NewToken asks for a token.
type NewToken struct {
	Uses  int           `json:"uses"`
	TTL   time.Duration `json:"ttl"`
	Group string        `json:"group,omitempty"`
	Hold  bool          `json:"hold,omitempty"`
}

// TokenInfo is a token as lists show it, without its secret.
type TokenInfo struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"`
	UsedBy  []string  `json:"used_by"`
	Group   string    `json:"group,omitempty"`
	Hold    bool      `json:"hold,omitempty"`
	Revoked bool      `json:"revoked,omitempty"`
	By      string    `json:"by"`
}

// NewAdmin asks for an invite.
type NewAdmin struct {
	Name string `json:"name"`
	Role string `json:"role"`
}

// Text is a reply of one text: a token, an invite, an armored key.
type Text struct {
	Text string `json:"text"`
}

// AdminInfo is an administrator as lists show them.
type AdminInfo struct {
	Name    string         `json:"name"`
	Role    string         `json:"role"`
	KeyID   identity.KeyID `json:"key_id,omitempty"` // none before the first login
	Created time.Time      `json:"created"`
	Removed bool           `json:"removed,omitempty"`
	Rescue  *RescueInfo    `json:"rescue,omitempty"` // of a rescue invite
}

// RescueInfo is what a rescue invite is for.
type RescueInfo struct {
	Volume    string    `json:"volume"` // UUID
	InvitedBy string    `json:"invited_by"`
	Reason    string    `json:"reason,omitempty"`
	Expires   time.Time `json:"expires"`
}

// NewRescue asks for a rescue invite.
type NewRescue struct {
	Volume   string        `json:"volume"` // UUID or a word that means one volume
	Reason   string        `json:"reason,omitempty"`
	Lifetime time.Duration `json:"lifetime"`
}

// NewRescueInvite is a rescue invite of one server.
type NewRescueInvite struct {
	Text    string    `json:"text"`
	Volume  string    `json:"volume"` // UUID
	Expires time.Time `json:"expires"`
}

// Removed is what is left after an administrator was removed.
type Removed struct {
	Approvers int `json:"approvers"` // who may still approve
}

// Name names one thing.
type Name struct {
	Name string `json:"name"`
}

// Signed is a signed record.
type Signed struct {
	Signed []byte `json:"signed"`
}

// Hold keeps a packet whatever happens, or no longer.
type Hold struct {
	Hold bool `json:"hold"`
}
