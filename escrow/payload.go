package escrow

import (
	"errors"
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
	minVolumeKey  = 16  // on a sheet, whose salt must not be guessed
	maxDigest     = 64
	fingerprint   = 8 // bytes of one place
	maxPlaces     = 16
	// MaxHeaderBackup bounds PayloadVolumeKey.HeaderBackup.
	MaxHeaderBackup = 96 << 10
)

// Payload is a PassphrasePayload or a VolumeKeyPayload.
type Payload interface {
	Name() string
	Wipe()
	check() error
	whole() error
	write(w *record.Writer)
}

// NoSlot and NoOffset are for what another system did not know.
const (
	NoSlot   = -1
	NoOffset = -1
)

// PassphrasePayload opens a volume whose header is intact.
type PassphrasePayload struct {
	Passphrase []byte // byte for byte as its keyslot has it
	Slot       int
	LUKSType   string // luks1 or luks2
	// Foreign: not a recovery passphrase of ours, but one that was taken over
	// from another system or a person. Then Slot may be NoSlot, and LUKSType "".
	Foreign bool
}

// VolumeKeyPayload is enough to rebuild a volume whose header is gone. In a
// stand-alone packet, and in one of no machine, what another system did not know
// may be missing: LUKSType (""); DataOffset (NoOffset) and SectorSize (0); the
// four digest fields; HeaderBackup.
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
	Digest           []byte   // PBKDF2 of Key
	HeaderBackup     []byte   // the header without keyslot material
	Fingerprint      [][]byte // of the data in plaintext, 8 bytes a place; may be missing everywhere
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
	lowest, field := 0, "recovery-slot"
	if p.Foreign {
		lowest, field = NoSlot, "slot"
	}
	switch {
	case len(p.Passphrase) == 0 || len(p.Passphrase) > maxPassphrase:
		return fmt.Errorf("a passphrase has %d bytes; 1 to %d are possible", len(p.Passphrase), maxPassphrase)
	case p.Slot < lowest || p.Slot > maxSlot:
		return fmt.Errorf("%s %d", field, p.Slot)
	case p.Foreign && p.LUKSType == "":
		return nil
	}
	return checkType(p.LUKSType)
}

// whole refuses what a packet of a machine may not lack.
func (p *PassphrasePayload) whole() error {
	if p.Foreign {
		return errors.New("it has not the machine's own recovery passphrase")
	}
	return nil
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
	case len(p.HeaderBackup) > MaxHeaderBackup:
		return fmt.Errorf("header-backup is longer than %d bytes", MaxHeaderBackup)
	}
	if err := errors.Join(p.checkGeometry(), p.checkDigest(), p.checkFingerprint()); err != nil || p.LUKSType == "" {
		return err
	}
	return checkType(p.LUKSType)
}

func (p *VolumeKeyPayload) checkGeometry() error {
	switch {
	case p.DataOffset == NoOffset && p.SectorSize == 0:
		return nil
	case p.DataOffset < 0 || p.DataOffset%512 != 0:
		return fmt.Errorf("data-offset %d is not a number of sectors", p.DataOffset)
	case p.SectorSize < 512 || p.SectorSize > 4096 || p.SectorSize&(p.SectorSize-1) != 0:
		return fmt.Errorf("sector-size %d", p.SectorSize)
	}
	return nil
}

func (p *VolumeKeyPayload) checkDigest() error {
	switch {
	case p.DigestHash == "" && p.DigestIterations == 0 && len(p.DigestSalt)+len(p.Digest) == 0:
		return nil
	case p.DigestHash == "" || len(p.DigestSalt) == 0 || len(p.Digest) == 0:
		return errors.New("a part of the digest is missing")
	case p.DigestIterations < 1:
		return fmt.Errorf("digest-iterations %d", p.DigestIterations)
	case len(p.DigestSalt) > maxDigest || len(p.Digest) > maxDigest:
		return fmt.Errorf("digest or its salt is longer than %d bytes", maxDigest)
	}
	return nil
}

func (p *VolumeKeyPayload) checkFingerprint() error {
	if len(p.Fingerprint) > maxPlaces {
		return fmt.Errorf("more than %d of data-fingerprint", maxPlaces)
	}
	for _, place := range p.Fingerprint {
		if len(place) != fingerprint {
			return fmt.Errorf("data-fingerprint of %d bytes, not of %d", len(place), fingerprint)
		}
	}
	return nil
}

// whole refuses what a packet of a machine may not lack.
func (p *VolumeKeyPayload) whole() error {
	switch {
	case p.LUKSType == "":
		return errors.New("it lacks luks-type")
	case p.DataOffset == NoOffset:
		return errors.New("it lacks data-offset and sector-size")
	case p.DigestHash == "":
		return errors.New("it lacks the digest of the volume key")
	case len(p.HeaderBackup) == 0:
		return errors.New("it lacks header-backup")
	}
	return nil
}

func (p *PassphrasePayload) write(w *record.Writer) {
	w.Text("payload", ForPassphrase)
	if !p.Foreign {
		p.writeRecovery(w)
		return
	}
	if record.Printable(string(p.Passphrase)) == nil {
		w.Field("passphrase", p.Passphrase)
	} else {
		w.Base64("passphrase-base64", p.Passphrase)
	}
	if p.Slot != NoSlot {
		w.Uint("slot", uint64(p.Slot))
	}
	w.OptionalText("luks-type", p.LUKSType)
}

func (p *PassphrasePayload) writeRecovery(w *record.Writer) {
	w.Field("recovery-passphrase", p.Passphrase).Uint("recovery-slot", uint64(p.Slot)).Text("luks-type", p.LUKSType)
}

func (p *VolumeKeyPayload) write(w *record.Writer) {
	w.Text("payload", ForVolumeKey).Hex("volume-key", p.Key).OptionalText("luks-type", p.LUKSType)
	w.Text("cipher", p.Cipher).Uint("key-bits", uint64(p.KeyBits))
	p.writeGeometry(w)
	if p.DigestHash != "" {
		w.Text("digest-hash", p.DigestHash).Uint("digest-iterations", uint64(p.DigestIterations))
		w.Hex("digest-salt", p.DigestSalt).Hex("digest", p.Digest)
	}
	if len(p.HeaderBackup) > 0 {
		w.Base64("header-backup", p.HeaderBackup)
	}
	for _, place := range p.Fingerprint {
		w.Hex("data-fingerprint", place)
	}
}

func (p *VolumeKeyPayload) writeGeometry(w *record.Writer) {
	if p.DataOffset != NoOffset {
		w.Uint("data-offset", uint64(p.DataOffset)).Uint("sector-size", uint64(p.SectorSize))
	}
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
	checkRead(r, p)
	return p
}

func checkRead(r *record.Reader, p Payload) {
	if r.Err() == nil {
		if err := p.check(); err != nil {
			r.Fail("of the payload", err.Error())
		}
	}
}

func readPassphrase(r *record.Reader) *PassphrasePayload {
	p := &PassphrasePayload{Slot: NoSlot, Foreign: true}
	switch {
	case r.Next("passphrase"):
		p.Passphrase = append([]byte(nil), r.Field("passphrase")...)
	case r.Next("passphrase-base64"):
		p.Passphrase = r.Base64("passphrase-base64")
	default:
		return readRecovery(r)
	}
	if r.Next("slot") {
		p.Slot = smallInt(r, "slot")
	}
	p.LUKSType = r.OptionalText("luks-type")
	return p
}

func readRecovery(r *record.Reader) *PassphrasePayload {
	return &PassphrasePayload{
		Passphrase: append([]byte(nil), r.Field("recovery-passphrase")...),
		Slot:       smallInt(r, "recovery-slot"),
		LUKSType:   r.Text("luks-type"),
	}
}

func readVolumeKey(r *record.Reader) *VolumeKeyPayload {
	p := &VolumeKeyPayload{
		Key: r.Hex("volume-key", -1), LUKSType: r.OptionalText("luks-type"), Cipher: r.Text("cipher"),
		KeyBits: smallInt(r, "key-bits"),
	}
	p.readGeometry(r)
	if r.Next("digest-hash") {
		p.DigestHash, p.DigestIterations = r.Text("digest-hash"), smallInt(r, "digest-iterations")
		p.DigestSalt, p.Digest = r.Hex("digest-salt", -1), r.Hex("digest", -1)
	}
	if r.Next("header-backup") {
		p.HeaderBackup = r.Base64("header-backup")
	}
	for r.Next("data-fingerprint") && len(p.Fingerprint) <= maxPlaces {
		p.Fingerprint = append(p.Fingerprint, r.Hex("data-fingerprint", fingerprint))
	}
	return p
}

func (p *VolumeKeyPayload) readGeometry(r *record.Reader) {
	p.DataOffset = NoOffset
	if r.Next("data-offset") {
		p.DataOffset, p.SectorSize = int64(r.Uint("data-offset")), smallInt(r, "sector-size")
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
