package escrow

import (
	"fmt"
	"time"

	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// SealOffline seals what was opened or newly made under a passphrase or a
// one-time password: one armored OpenPGP message that `gpg -d` reads. Whether a
// chosen passphrase is strong enough, the caller has judged; an empty one is
// secret.ErrWeak.
func SealOffline(o *Opened, passphrase []byte, now time.Time) ([]byte, error) {
	if len(passphrase) == 0 {
		return nil, fmt.Errorf("escrow: seal off-line packet: %w: it is empty", secret.ErrWeak)
	}
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
	return openPlain("off-line packet", plain, err)
}
