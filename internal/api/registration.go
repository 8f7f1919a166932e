package api

import (
	"encoding/hex"
	"errors"
	"fmt"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// ErrRegistration: a registration that its boot identity did not sign, or that
// names another running identity than the one that sent it.
var ErrRegistration = errors.New("not a valid registration of a machine")

// Registration is what a boot identity signs when its machine enrolls, so that
// a server knows that both identities belong to one machine.
type Registration struct {
	Name          string
	MachineIDHash string // 64 hex digits
	Boot          identity.Public
	Running       identity.KeyID
}

// Sign returns the registration, signed by the boot identity.
func (r Registration) Sign(boot *identity.Key) ([]byte, error) {
	w := record.New("mandos-escrow-registration", 1).
		Text("machine-name", r.Name).
		Text("machine-id-sha256", r.MachineIDHash).
		Text("machine-running-key-id", string(r.Running)).
		Base64("boot-key", boot.Public())
	body, err := w.Bytes()
	if err != nil {
		return nil, fmt.Errorf("api: registration: %w", err)
	}
	w.Base64("signature", boot.Sign("registration", body))
	return w.Bytes()
}

// ParseRegistration reads a registration that came over a connection of the
// running identity.
func ParseRegistration(data []byte, running identity.KeyID) (*Registration, error) {
	in := record.Parse(data, "mandos-escrow-registration", 1, 4<<10)
	r := &Registration{
		Name:          in.Text("machine-name"),
		MachineIDHash: hex.EncodeToString(in.Hex("machine-id-sha256", 32)),
		Running:       identity.KeyID(hex.EncodeToString(in.Hex("machine-running-key-id", 32))),
	}
	der := in.Base64("boot-key")
	body := data[:len(data)-len(in.Rest())]
	signature := in.Base64("signature")
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRegistration, err)
	}
	var err error
	if r.Boot, err = identity.ParsePublic(der); err == nil {
		err = r.Boot.Verify("registration", body, signature)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrRegistration, err)
	case r.Running != running:
		return nil, fmt.Errorf("%w: it names another running identity", ErrRegistration)
	case r.Boot.KeyID() == running:
		return nil, fmt.Errorf("%w: boot and running identity are the same key", ErrRegistration)
	case len(r.Name) > MaxName:
		return nil, fmt.Errorf("%w: name is longer than %d bytes", ErrRegistration, MaxName)
	}
	return r, nil
}
