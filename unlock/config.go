package unlock

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path"
	"strconv"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

// The files of a boot program's configuration directory, as mandos-keygen(8)
// names them, and ours.
const (
	ConfigFile        = "unlock.conf"
	TLSPrivateKeyFile = "tls-privkey.pem"
	TLSPublicKeyFile  = "tls-pubkey.pem"
	PrivateKeyFile    = "seckey.txt"
	PublicKeyFile     = "pubkey.txt"
)

// Limits of a configuration.
const (
	MaxConfig    = 64 << 10 // bytes
	MaxServers   = 16
	MaxAddresses = 8 // of one server
	MaxVolumes   = MaxBlobs
)

// ErrConfig is wrapped by every error about unlock.conf and the keys beside it.
var ErrConfig = errors.New("damaged configuration")

const configKind = "mandos-escrow-unlock"

// Config is the file unlock.conf: whom the boot program asks, and for what.
type Config struct {
	Machine   identity.KeyID
	Threshold int // servers that must release
	Servers   []Server
	Volumes   []Volume
}

// Server is a server to ask, under any of its addresses (HOST:PORT).
type Server struct {
	Name      string
	KeyID     identity.KeyID
	Addresses []string
}

// Volume is what was enrolled of a volume, in the terms of package luks. Path
// is where it lay then, if that was not a device that a UUID finds.
type Volume struct {
	UUID       string
	Path       string // absolute, or empty
	Type       string
	Cipher     string
	KeyBits    int
	Offset     int64
	SectorSize int
	Digest     string // hex
}

// Bytes returns the file's content, or ErrConfig.
func (c *Config) Bytes() ([]byte, error) {
	w := record.New(configKind, 1).Text("machine-key-id", string(c.Machine)).Uint("threshold", uint64(c.Threshold))
	for _, s := range c.Servers {
		w.Text("server", s.Name).Text("server-key-id", string(s.KeyID))
		for _, a := range s.Addresses {
			w.Text("address", a)
		}
	}
	for _, v := range c.Volumes {
		w.Text("volume-uuid", v.UUID).OptionalText("volume-path", v.Path)
		w.Text("volume-type", v.Type).Text("volume-cipher", v.Cipher).Uint("volume-key-bits", uint64(v.KeyBits))
		w.Uint("volume-offset", uint64(v.Offset)).Uint("volume-sector-size", uint64(v.SectorSize))
		w.Text("volume-digest", v.Digest)
	}
	data, err := w.Bytes()
	if err == nil {
		_, err = ParseConfig(data)
	}
	if err != nil {
		return nil, fmt.Errorf("unlock: write configuration: %w", err)
	}
	return data, nil
}

// ParseConfig reads the file's content.
func ParseConfig(data []byte) (*Config, error) {
	r := record.Parse(data, configKind, 1, MaxConfig)
	c := &Config{Machine: identity.KeyID(r.Text("machine-key-id")), Threshold: readInt(r, "threshold")}
	checkKeyID(r, "machine-key-id", c.Machine)
	for r.Next("server") {
		c.Servers = append(c.Servers, readServer(r))
	}
	for r.Next("volume-uuid") {
		c.Volumes = append(c.Volumes, readVolume(r))
	}
	if err := r.End(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return c, nil
}

func readServer(r *record.Reader) Server {
	s := Server{Name: r.Text("server"), KeyID: identity.KeyID(r.Text("server-key-id"))}
	checkKeyID(r, "server-key-id", s.KeyID)
	s.Addresses = r.Repeated("address", MaxAddresses)
	if len(s.Addresses) == 0 {
		r.Fail("address", "a server has none")
	}
	for _, a := range s.Addresses {
		if err := CheckAddress(a); err != nil {
			r.Fail("address", err.Error())
		}
	}
	return s
}

func readVolume(r *record.Reader) Volume {
	v := Volume{
		UUID: r.Text("volume-uuid"), Path: r.OptionalText("volume-path"),
		Type: r.Text("volume-type"), Cipher: r.Text("volume-cipher"), KeyBits: readInt(r, "volume-key-bits"),
		Offset: int64(r.Uint("volume-offset")), SectorSize: readInt(r, "volume-sector-size"),
		Digest: hex.EncodeToString(r.Hex("volume-digest", 32)),
	}
	checkUUID(r, v.UUID)
	if v.Path != "" && (!path.IsAbs(v.Path) || path.Clean(v.Path) != v.Path) {
		r.Fail("volume-path", "not an absolute path in its shortest form")
	}
	return v
}

// check judges what stands in several fields.
func (c *Config) check() error {
	switch m := len(c.Servers); {
	case m < 1 || m > MaxServers:
		return fmt.Errorf("%d servers; 1 to %d are possible", m, MaxServers)
	case c.Threshold < 1 || c.Threshold > m:
		return fmt.Errorf("threshold %d of %d servers", c.Threshold, m)
	case len(c.Volumes) < 1 || len(c.Volumes) > MaxVolumes:
		return fmt.Errorf("%d volumes; 1 to %d are possible", len(c.Volumes), MaxVolumes)
	}
	seen := map[string]bool{}
	for _, s := range c.Servers {
		if seen[string(s.KeyID)] {
			return fmt.Errorf("server key %s stands twice", s.KeyID.Short())
		}
		seen[string(s.KeyID)] = true
	}
	for _, v := range c.Volumes {
		if seen[v.UUID] {
			return fmt.Errorf("volume %s stands twice", v.UUID)
		}
		seen[v.UUID] = true
	}
	return nil
}

// CheckAddress checks the form HOST:PORT; an IPv6 address stands in brackets.
func CheckAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return fmt.Errorf("%s is not HOST:PORT", address)
	}
	return nil
}

// readInt reads a number that fits in 31 bits.
func readInt(r *record.Reader, name string) int {
	n := r.Uint(name)
	if n > 1<<31-1 {
		r.Fail(name, "too large")
		return 0
	}
	return int(n)
}

func checkKeyID(r *record.Reader, name string, id identity.KeyID) {
	if _, err := identity.ParseKeyID(string(id)); err != nil {
		r.Fail(name, err.Error())
	}
}

// checkUUID: a UUID becomes part of a path.
func checkUUID(r *record.Reader, uuid string) {
	if !record.IsUUID(uuid) {
		r.Fail("volume-uuid", "not a UUID")
	}
}

// Keys are a machine's boot identity: what proves who it is, and what opens
// its blobs.
type Keys struct {
	TLS     *identity.Key
	OpenPGP *seal.PrivateKey
}

// ParseKeys reads the contents of tls-privkey.pem and seckey.txt, and checks
// that they are the configuration's machine's.
func (c *Config) ParseKeys(tlsPrivateKey, privateKey []byte) (Keys, error) {
	tlsKey, err := identity.ParsePrivatePEM(tlsPrivateKey)
	if err != nil {
		return Keys{}, fmt.Errorf("%w: %s: %w", ErrConfig, TLSPrivateKeyFile, err)
	}
	if tlsKey.KeyID() != c.Machine {
		return Keys{}, fmt.Errorf("%w: %s is key %s, %s is for machine %s",
			ErrConfig, TLSPrivateKeyFile, tlsKey.KeyID().Short(), ConfigFile, c.Machine.Short())
	}
	opener, err := seal.ParsePrivate(privateKey, nil)
	if err != nil {
		return Keys{}, fmt.Errorf("%w: %s: %w", ErrConfig, PrivateKeyFile, err)
	}
	return Keys{TLS: tlsKey, OpenPGP: opener}, nil
}
