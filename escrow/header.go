package escrow

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

const (
	packetKind    = "mandos-escrow-packet"
	packetVersion = 1
)

// Header is what a packet says in clear.
type Header struct {
	ID            string // 32 hex digits
	Supersedes    string // ID of the packet that this one replaces, or ""
	Created       time.Time
	Machine       string // its name
	KeyID         identity.KeyID
	RunningKeyID  identity.KeyID
	MachineIDHash string // 64 hex digits
	Volume        Volume
	PolicyEpoch   uint64
	PolicyDigest  [32]byte
	Threshold     int
	Trustees      []string // fingerprints, in the policy's order: share i is for number i, from 1
}

// encode refuses one that parseHeader would refuse.
func (h *Header) encode() ([]byte, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	w := record.New(packetKind, packetVersion)
	w.Text("id", h.ID).OptionalText("supersedes", h.Supersedes).Time("created", h.Created)
	w.Text("machine-name", h.Machine).Text("machine-key-id", string(h.KeyID))
	w.Text("machine-running-key-id", string(h.RunningKeyID)).Text("machine-id-sha256", h.MachineIDHash)
	w.Text("volume-uuid", h.Volume.UUID)
	w.OptionalText("volume-label", h.Volume.Label).OptionalText("volume-by-id", h.Volume.ByID)
	w.Uint("policy-epoch", h.PolicyEpoch).Hex("policy-sha256", h.PolicyDigest[:])
	w.Uint("threshold", uint64(h.Threshold))
	for _, t := range h.Trustees {
		w.Text("trustee", t)
	}
	return w.Bytes()
}

// readHeader reads a header from the start of a record; a fault stays in r.
func readHeader(r *record.Reader) Header {
	h := Header{
		ID: r.Text("id"), Supersedes: r.OptionalText("supersedes"), Created: r.Time("created"),
		Machine: r.Text("machine-name"), KeyID: identity.KeyID(r.Text("machine-key-id")),
		RunningKeyID:  identity.KeyID(r.Text("machine-running-key-id")),
		MachineIDHash: r.Text("machine-id-sha256"),
		Volume: Volume{
			UUID: r.Text("volume-uuid"), Label: r.OptionalText("volume-label"), ByID: r.OptionalText("volume-by-id"),
		},
		PolicyEpoch: r.Uint("policy-epoch"),
	}
	copy(h.PolicyDigest[:], r.Hex("policy-sha256", sha256.Size))
	h.Threshold = int(min(r.Uint("threshold"), MaxTrustees+1))
	h.Trustees = r.Repeated("trustee", MaxTrustees)
	if r.Err() == nil {
		if err := h.check(); err != nil {
			r.Fail("of the header", err.Error())
		}
	}
	return h
}

func (h *Header) check() error {
	if err := errors.Join(
		checkHex("machine-key-id", string(h.KeyID), 32),
		checkHex("machine-running-key-id", string(h.RunningKeyID), 32),
		checkHex("machine-id-sha256", h.MachineIDHash, 32),
		h.checkAlone(),
	); err != nil {
		return err
	}
	if h.PolicyEpoch == 0 {
		return fmt.Errorf("policy-epoch is 0")
	}
	return checkTrustees(h.Trustees, h.Threshold)
}

// checkAlone checks what a header says of the packet and the volume.
func (h *Header) checkAlone() error {
	if h.Supersedes != "" {
		if err := checkHex("supersedes", h.Supersedes, 16); err != nil {
			return err
		}
	}
	switch {
	case h.ID == h.Supersedes:
		return fmt.Errorf("packet %s supersedes itself", h.ID)
	case !record.IsUUID(h.Volume.UUID):
		return fmt.Errorf("volume-uuid %q is not a UUID", h.Volume.UUID)
	case max(len(h.Machine), len(h.Volume.Label), len(h.Volume.ByID)) > maxName:
		return fmt.Errorf("a name is longer than %d bytes", maxName)
	}
	return checkHex("id", h.ID, 16)
}

func checkHex(name, value string, size int) error {
	raw, err := hex.DecodeString(value)
	if err != nil || len(raw) != size || hex.EncodeToString(raw) != value {
		return fmt.Errorf("%s is not %d bytes of lower-case hex", name, size)
	}
	return nil
}

// ofMachine reports whether a machine made the packet, which knows all of its
// volume. One that was carried or imported has a one-off identity for both.
func (h *Header) ofMachine() bool { return h.KeyID != h.RunningKeyID }

// headerOf returns the bytes of a record that are its clear header, given what
// was not read of it yet.
func headerOf(data []byte, r *record.Reader) []byte {
	return bytes.Clone(data[:len(data)-len(r.Rest())])
}
