package escrow

import (
	"fmt"
	"time"

	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// SealOffline seals an opened payload under a passphrase or a one-time password
// instead of trustees: one armored OpenPGP message that `gpg -d` reads.
func SealOffline(o *Opened, passphrase []byte, now time.Time) ([]byte, error) {
	text, err := seal.EncryptPassphrase(o.Plain, passphrase, now)
	if err != nil {
		return nil, fmt.Errorf("escrow: seal off-line packet: %w", err)
	}
	return text, nil
}

// OpenOffline opens what SealOffline made. A wrong passphrase cannot be told
// from a changed message: both are ErrIntegrity.
func OpenOffline(text, passphrase []byte) (*Opened, error) {
	plain, err := seal.DecryptPassphrase(text, passphrase)
	if err != nil {
		return nil, fmt.Errorf("escrow: open off-line packet: %w: %w", ErrIntegrity, err)
	}
	o, err := parsePlain(plain)
	if err != nil {
		secret.Wipe(plain)
		return nil, fmt.Errorf("escrow: open off-line packet: %w: %w", ErrIntegrity, err)
	}
	return o, nil
}
