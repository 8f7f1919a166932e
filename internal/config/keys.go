package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/unlock"
)

// A machine's folders, below the root.
const (
	BootFolder    = "etc/mandos-escrow"           // what goes into the boot image
	RunningFolder = "var/lib/mandos-escrow-agent" // what never does
)

// Identity is a TLS and signing key and, for a machine, an OpenPGP key: one
// folder of files.
type Identity struct {
	Key  *identity.Key
	Seal *seal.PrivateKey
}

// LoadIdentity reads an identity from its folder.
func LoadIdentity(dir string) (*Identity, error) {
	key, err := LoadKey(dir)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, unlock.PrivateKeyFile))
	if err != nil {
		return nil, err
	}
	defer clear(text)
	private, err := seal.ParsePrivate(text, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, unlock.PrivateKeyFile), err)
	}
	return &Identity{key, private}, nil
}

// LoadKey reads the TLS and signing key of a folder.
func LoadKey(dir string) (*identity.Key, error) {
	path := filepath.Join(dir, unlock.TLSPrivateKeyFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	key, err := identity.ParsePrivatePEM(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// MakeIdentity reads an identity, or makes one where there is none. The TLS
// key is written last: where it stands, the identity is whole.
func MakeIdentity(dir, name string, now time.Time) (*Identity, error) {
	if id, err := LoadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	if _, err := LoadKey(dir); !errors.Is(err, fs.ErrNotExist) {
		// Another OpenPGP key would not open what was sealed to the one that is gone.
		return nil, errors.Join(fmt.Errorf("identity in %s is not whole: restore its files, or move the folder away to become another machine", dir), err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	private, err := seal.Generate(name, now)
	if err != nil {
		return nil, err
	}
	secretText, err := private.Armor()
	if err != nil {
		return nil, err
	}
	defer clear(secretText)
	publicText, err := private.Public().Armor()
	if err != nil {
		return nil, err
	}
	if err := Replace(filepath.Join(dir, unlock.PrivateKeyFile), secretText); err != nil {
		return nil, err
	}
	if err := Replace(filepath.Join(dir, unlock.PublicKeyFile), publicText); err != nil {
		return nil, err
	}
	key, err := MakeKey(dir)
	if err != nil {
		return nil, err
	}
	return &Identity{key, private}, nil
}

// MakeKey reads a TLS and signing key, or makes one where there is none.
func MakeKey(dir string) (*identity.Key, error) {
	if key, err := LoadKey(dir); !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := identity.Generate()
	if err != nil {
		return nil, err
	}
	text, err := key.PrivatePEM()
	if err != nil {
		return nil, err
	}
	defer clear(text)
	if err := Replace(filepath.Join(dir, unlock.TLSPublicKeyFile), key.PublicPEM()); err != nil {
		return nil, err
	}
	return key, Replace(filepath.Join(dir, unlock.TLSPrivateKeyFile), text)
}
