package escrow

import (
	"fmt"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
)

// Names of the payloads. They have keys and shares of their own, because who
// may read a passphrase to a user need not be given the volume key.
const (
	ForPassphrase = "passphrase"
	ForVolumeKey  = "volume-key"
)

var payloadNames = []string{ForPassphrase, ForVolumeKey} // in the packet's order

// Limits of a payload's fields.
const (
	maxPassphrase = 512 // cryptsetup's own
	maxSlot       = 31  // LUKS2
	maxVolumeKey  = 128 // aes-xts with a 512-bit HMAC for integrity
	maxDigest     = 64
	// MaxHeaderBackup bounds PayloadVolumeKey.HeaderBackup.
	MaxHeaderBackup = 96 << 10
)

// Payload is a PassphrasePayload or a VolumeKeyPayload.
type Payload interface {
	Name() string
	Wipe()
	check() error
	write(w *record.Writer)
}

// PassphrasePayload opens a volume whose header is intact.
type PassphrasePayload struct {
	Passphrase []byte // recovery passphrase, byte for byte as its keyslot has it
	Slot       int
	LUKSType   string // luks1 or luks2
}

// VolumeKeyPayload is enough to rebuild a volume whose header is gone.
type VolumeKeyPayload struct {
	Key              []byte
	LUKSType         string // luks1 or luks2
	Cipher           string // as in aes-xts-plain64
	KeyBits          int
	DataOffset       int64 // bytes
	SectorSize       int   // bytes
	DigestHash       string
	DigestIterations int
	DigestSalt       []byte
	Digest           []byte // PBKDF2 of Key
	HeaderBackup     []byte // the header without keyslot material
}

// Name returns ForPassphrase.
func (p *PassphrasePayload) Name() string { return ForPassphrase }

// Name returns ForVolumeKey.
func (p *VolumeKeyPayload) Name() string { return ForVolumeKey }

// Wipe clears the passphrase.
func (p *PassphrasePayload) Wipe() { secret.Wipe(p.Passphrase) }

// Wipe clears the key.
func (p *VolumeKeyPayload) Wipe() { secret.Wipe(p.Key) }

func (p *PassphrasePayload) check() error {
	switch {
	case len(p.Passphrase) == 0 || len(p.Passphrase) > maxPassphrase:
		return fmt.Errorf("recovery-passphrase has %d bytes; 1 to %d are possible", len(p.Passphrase), maxPassphrase)
	case p.Slot < 0 || p.Slot > maxSlot:
		return fmt.Errorf("recovery-slot %d", p.Slot)
	}
	return checkType(p.LUKSType)
}

func checkType(text string) error {
	if text != "luks1" && text != "luks2" {
		return fmt.Errorf("luks-type %q", text)
	}
	return nil
}

func (p *VolumeKeyPayload) check() error {
	switch {
	case len(p.Key) == 0 || len(p.Key) > maxVolumeKey:
		return fmt.Errorf("volume-key has %d bytes; 1 to %d are possible", len(p.Key), maxVolumeKey)
	case p.KeyBits != 8*len(p.Key):
		return fmt.Errorf("key-bits %d for a key of %d bytes", p.KeyBits, len(p.Key))
	case max(len(p.Cipher), len(p.DigestHash)) > maxName:
		return fmt.Errorf("cipher or digest-hash is longer than %d bytes", maxName)
	case p.DataOffset < 0 || p.DataOffset%512 != 0:
		return fmt.Errorf("data-offset %d is not a number of sectors", p.DataOffset)
	case p.SectorSize < 512 || p.SectorSize > 4096 || p.SectorSize&(p.SectorSize-1) != 0:
		return fmt.Errorf("sector-size %d", p.SectorSize)
	case p.DigestIterations < 1:
		return fmt.Errorf("digest-iterations %d", p.DigestIterations)
	case len(p.DigestSalt) > maxDigest || len(p.Digest) > maxDigest:
		return fmt.Errorf("digest or its salt is longer than %d bytes", maxDigest)
	case len(p.HeaderBackup) > MaxHeaderBackup:
		return fmt.Errorf("header-backup is longer than %d bytes", MaxHeaderBackup)
	}
	return checkType(p.LUKSType)
}

func (p *PassphrasePayload) write(w *record.Writer) {
	w.Text("payload", ForPassphrase)
	w.Field("recovery-passphrase", p.Passphrase).Uint("recovery-slot", uint64(p.Slot)).Text("luks-type", p.LUKSType)
}

func (p *VolumeKeyPayload) write(w *record.Writer) {
	w.Text("payload", ForVolumeKey).Hex("volume-key", p.Key).Text("luks-type", p.LUKSType)
	w.Text("cipher", p.Cipher).Uint("key-bits", uint64(p.KeyBits))
	w.Uint("data-offset", uint64(p.DataOffset)).Uint("sector-size", uint64(p.SectorSize))
	w.Text("digest-hash", p.DigestHash).Uint("digest-iterations", uint64(p.DigestIterations))
	w.Hex("digest-salt", p.DigestSalt).Hex("digest", p.Digest)
	w.Base64("header-backup", p.HeaderBackup)
}

// readPayload reads what follows the header; a fault stays in r. What it
// returns is the caller's to wipe, also then.
func readPayload(r *record.Reader) Payload {
	var p Payload
	switch name := r.Text("payload"); name {
	case ForPassphrase:
		p = readPassphrase(r)
	case ForVolumeKey:
		p = readVolumeKey(r)
	default:
		r.Fail("payload", "is of a kind that is not known")
		return &PassphrasePayload{}
	}
	if r.Err() == nil {
		if err := p.check(); err != nil {
			r.Fail("of the payload", err.Error())
		}
	}
	return p
}

func readPassphrase(r *record.Reader) *PassphrasePayload {
	return &PassphrasePayload{
		Passphrase: append([]byte(nil), r.Field("recovery-passphrase")...),
		Slot:       smallInt(r, "recovery-slot"),
		LUKSType:   r.Text("luks-type"),
	}
}

func readVolumeKey(r *record.Reader) *VolumeKeyPayload {
	return &VolumeKeyPayload{
		Key: r.Hex("volume-key", -1), LUKSType: r.Text("luks-type"), Cipher: r.Text("cipher"),
		KeyBits: smallInt(r, "key-bits"), DataOffset: int64(r.Uint("data-offset")),
		SectorSize: smallInt(r, "sector-size"), DigestHash: r.Text("digest-hash"),
		DigestIterations: smallInt(r, "digest-iterations"), DigestSalt: r.Hex("digest-salt", -1),
		Digest: r.Hex("digest", -1), HeaderBackup: r.Base64("header-backup"),
	}
}

// smallInt reads a number below 2^31, which an int holds everywhere.
func smallInt(r *record.Reader, name string) int {
	n := r.Uint(name)
	if n > 1<<31-1 {
		r.Fail(name, "is too large")
		return 0
	}
	return int(n)
}
