package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/certkey"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

type saveOptions struct {
	passphraseFile, volumeKeyFile string // what opens the volume
	recoveryPassphrase            bool
	noVolumeKey                   bool
	supersedes                    string

	packetPassphraseFile, certificate, recipient, tokenFile string // to whom
}

func newVolumeSave(g *globals) *cobra.Command {
	var o saveOptions
	cmd := &cobra.Command{
		Use:   "save DEV FILE",
		Short: "save a volume's key to a packet in a file, without any server",
		Long: `Saves the volume key of DEV, with all that writes its header anew, to a packet in
FILE. It is never in plaintext: the packet is sealed to one of

  --packet-passphrase-file  a passphrase (asked for if none of the four is given); "gpg -d" opens it
  --certificate             whoever has the private key of a certificate: RSA, ECDSA or X25519
  --recipient               an OpenPGP key; "gpg -d" opens it
  --token-file              the trustees that a token names, N of M of them; for a machine that
                            reaches no server, so that an administrator carries the packet there

--recovery-passphrase also makes a recovery passphrase, which gets a keyslot of its
own. The packet is on disk before the keyslot is there: if that is interrupted, the
packet names a keyslot that does not exist, and "volume restore" says so.

DEV may also be a file that "cryptsetup luksHeaderBackup" wrote. Nothing is changed
on DEV without --recovery-passphrase.`,
		Example: `  mandos-escrow volume save /dev/sda3 laptop7.asc --packet-passphrase-file P
  mandos-escrow volume save /dev/sda3 laptop7.packet --certificate escrow.pem --recovery-passphrase`,
		Args: exactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runSave(cmd.Context(), g, o, args[0], args[1])
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.passphraseFile, "passphrase-file", "", "file with a passphrase of the volume (asked for otherwise)")
	f.StringVar(&o.volumeKeyFile, "volume-key-file", "", "file with the volume key itself, byte for byte, instead of a passphrase")
	f.BoolVar(&o.recoveryPassphrase, "recovery-passphrase", false, "add a keyslot with a new recovery passphrase, and save that too")
	f.BoolVar(&o.noVolumeKey, "no-volume-key", false, "save the recovery passphrase only")
	f.StringVar(&o.supersedes, "supersedes", "", "`ID` of the packet that this one replaces")
	f.StringVar(&o.packetPassphraseFile, "packet-passphrase-file", "", "seal under the passphrase in this file")
	f.StringVar(&o.certificate, "certificate", "", "seal to this certificate (PEM)")
	f.StringVar(&o.recipient, "recipient", "", "seal to this OpenPGP key (armored)")
	f.StringVar(&o.tokenFile, "token-file", "", "seal to the trustees of this token")
	return g.withJSON(cmd)
}

// saved is what a save did.
type saved struct {
	Packet     string        `json:"packet"`
	File       string        `json:"file"`
	Sealing    string        `json:"sealing"`
	Volume     escrow.Volume `json:"volume"`
	VolumeKey  bool          `json:"volume_key"`
	Slot       int           `json:"recovery_slot"` // -1: none
	Places     int           `json:"data_fingerprint"`
	HeaderOnly bool          `json:"header_only"`
}

// save is a volume on its way into a packet.
type save struct {
	device string
	header *luks.Header
	key    []byte // the volume key; proved
	unlock cryptsetup.Key
	slot   int // that the recovery passphrase will have
}

func (s *save) wipe() {
	secret.Wipe(s.key)
	secret.Wipe(s.unlock.Passphrase)
}

// runSave does all that can fail before anything is changed: the packet stands
// complete on disk before its keyslot does.
func runSave(ctx context.Context, g *globals, o saveOptions, device, path string) error {
	if err := o.check(path); err != nil {
		return err
	}
	s := &save{device: device, slot: escrow.NoSlot}
	defer s.wipe()
	var err error
	if s.header, err = luks.ReadHeaderFile(device); err != nil {
		return err
	}
	if o.recoveryPassphrase {
		if err := s.findSlot(); err != nil {
			return err
		}
	}
	to, err := g.sealer(o)
	if err != nil {
		return err
	}
	defer to.wipe()
	out, err := newTarget(g, path)
	if err != nil {
		return err
	}
	defer out.Discard()
	if err := s.unlockVolume(ctx, g, o); err != nil {
		return err
	}
	payloads, places, err := s.payloads(g, o)
	defer func() {
		for _, p := range payloads {
			p.Wipe()
		}
	}()
	if err != nil {
		return err
	}
	now := time.Now()
	header := escrow.Header{ID: secret.ID(), Supersedes: o.supersedes, Created: now, Machine: hostName(), Volume: s.volume()}
	packet, err := to.seal(header, payloads, now)
	if err != nil {
		return err
	}
	if _, err := out.Write(packet); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	checkpoint("written")
	if err := out.Commit(); err != nil {
		return err
	}
	checkpoint("committed")
	if o.recoveryPassphrase {
		if err := s.addSlot(ctx, payloads, path); err != nil {
			return err
		}
	}
	return s.report(g, saved{header.ID, path, to.name, header.Volume, !o.noVolumeKey, s.slot, places, s.header.Alone})
}

func (o saveOptions) check(path string) error {
	targets := 0
	for _, t := range []string{o.packetPassphraseFile, o.certificate, o.recipient, o.tokenFile} {
		if t != "" {
			targets++
		}
	}
	switch {
	case targets > 1:
		return usage("a packet is sealed to one of --packet-passphrase-file, --certificate, --recipient, --token-file")
	case o.passphraseFile != "" && o.volumeKeyFile != "":
		return usage("give either --passphrase-file or --volume-key-file")
	case o.noVolumeKey && !o.recoveryPassphrase:
		return usage("--no-volume-key leaves nothing to save: add --recovery-passphrase")
	case o.recoveryPassphrase && path == "-":
		return usage("with --recovery-passphrase FILE is a name: the packet must be on disk before its keyslot is added")
	}
	return nil
}

// findSlot is asked before anything else: a full volume needs no secret to be
// found out.
func (s *save) findSlot() error {
	if s.header.Alone {
		return usage("%s is a header without its data: a keyslot that is added to it is not on the volume; leave --recovery-passphrase out", s.device)
	}
	if err := hasRoom(s.header, s.device); err != nil {
		return err
	}
	s.slot = s.header.Free()[0]
	return nil
}

// unlockVolume reads the volume key. One that is given is proved by the header's
// digest.
func (s *save) unlockVolume(ctx context.Context, g *globals, o saveOptions) (err error) {
	if o.volumeKeyFile != "" {
		if s.key, err = g.input(o.volumeKeyFile); err != nil {
			return err
		}
		if err := s.header.VerifyVolumeKey(s.key); err != nil {
			return fmt.Errorf("%s: %w", o.volumeKeyFile, err)
		}
		s.unlock.VolumeKey = s.key
		return nil
	}
	var given []byte
	if o.passphraseFile != "" {
		given, err = g.input(o.passphraseFile)
	} else {
		given, err = g.ask("Passphrase of the volume: ", "--passphrase-file")
	}
	if err != nil {
		return err
	}
	defer secret.Wipe(given)
	if len(given) == 0 {
		return usage("the passphrase of the volume is empty")
	}
	for _, passphrase := range spellings(given) {
		s.key, err = cryptsetup.Tool{}.VolumeKey(ctx, s.device, passphrase)
		if err == nil { // of the header that is packed, whatever was under the name meanwhile
			s.unlock.Passphrase = append([]byte(nil), passphrase...)
			return s.header.VerifyVolumeKey(s.key)
		}
		if !errors.Is(err, cryptsetup.ErrPassphrase) {
			return err
		}
	}
	return err
}

// spellings are a passphrase exactly as it was read, and without its last newline.
func spellings(passphrase []byte) [][]byte {
	all := [][]byte{passphrase}
	if trimmed := config.TrimNewline(passphrase); len(trimmed) > 0 && len(trimmed) < len(passphrase) {
		all = append(all, trimmed)
	}
	return all
}

// payloads are what the packet will hold, and how many places of the data it
// knows again.
func (s *save) payloads(g *globals, o saveOptions) ([]escrow.Payload, int, error) {
	var all []escrow.Payload
	if o.recoveryPassphrase {
		all = append(all, &escrow.PassphrasePayload{Passphrase: escrow.NewRecoveryPassphrase(), Slot: s.slot, LUKSType: s.header.Type})
	}
	if o.noVolumeKey {
		return all, 0, nil
	}
	p := volumeKeyPayload(s.header, s.key)
	all = append(all, p)
	err := addFingerprint(g, p, s.header, s.device)
	return all, len(p.Fingerprint), err
}

// volumeKeyPayload is a volume key with all that a header says of it. The key is
// a copy: payloads are wiped by themselves.
func volumeKeyPayload(h *luks.Header, key []byte) *escrow.VolumeKeyPayload {
	return &escrow.VolumeKeyPayload{
		Key: append([]byte(nil), key...), LUKSType: h.Type, Cipher: h.Cipher, KeyBits: 8 * len(key), DataOffset: h.Offset, SectorSize: h.SectorSize,
		DigestHash: h.Digest.Hash, DigestIterations: h.Digest.Iterations, DigestSalt: h.Digest.Salt, Digest: h.Digest.Value,
		HeaderBackup: h.Backup(),
	}
}

// addFingerprint adds what the data are known by, if they are there, and their
// cipher is known here.
func addFingerprint(g *globals, p *escrow.VolumeKeyPayload, header *luks.Header, device string) error {
	if header.Alone {
		return nil
	}
	without, err := enroll.AddFingerprint(p, device)
	if without != nil {
		g.warn(fmt.Sprintf("no fingerprint of the data: %v", without))
	}
	return err
}

func (s *save) volume() escrow.Volume {
	return escrow.Volume{UUID: s.header.UUID, Label: safe(s.header.Label), ByID: enroll.ByID(s.device)}
}

// addSlot adds the keyslot that the packet at path names already, and proves it.
// If the keyslot did not come into being the packet is removed again; if it did, the
// packet stays, whatever went wrong afterwards.
func (s *save) addSlot(ctx context.Context, payloads []escrow.Payload, path string) error {
	p, ok := payloads[0].(*escrow.PassphrasePayload)
	if !ok {
		return errors.New("the first payload is no recovery passphrase")
	}
	var tool cryptsetup.Tool
	err := tool.AddKey(ctx, s.device, s.unlock, p.Passphrase, s.slot, true)
	checkpoint("added")
	if err == nil {
		if _, err = tool.Test(ctx, s.device, p.Passphrase, s.slot); err == nil {
			return nil
		}
	}
	err = fmt.Errorf("add a keyslot: %w", err)
	switch header, readErr := luks.ReadFileWithin(s.device, luks.AnyMemory); {
	case readErr != nil:
		return errors.Join(err, readErr, fmt.Errorf("%s is kept: whether keyslot %d was added is not known", path, s.slot))
	case s.added(header):
		_, testErr := tool.Test(context.WithoutCancel(ctx), s.device, p.Passphrase, s.slot)
		if !errors.Is(testErr, cryptsetup.ErrPassphrase) { // else somebody else's, who was faster
			return errors.Join(err, fmt.Errorf("%s is kept: keyslot %d is there", path, s.slot))
		}
	}
	return errors.Join(err, config.Remove(path))
}

func (s *save) added(header *luks.Header) bool {
	_, active := header.Slot(s.slot)
	return active
}

func (s *save) report(g *globals, r saved) error {
	if r.HeaderOnly {
		g.warn(s.device + " is a header without its data: neither that it is of the data it belongs to, nor that they can be read, was checked")
	}
	if g.json {
		return g.printJSON(r)
	}
	if r.File == "-" {
		return nil // it went to standard output
	}
	what := "volume key"
	if r.Slot != escrow.NoSlot {
		what = fmt.Sprintf("recovery passphrase in keyslot %d, proved", r.Slot)
		if r.VolumeKey {
			what = "volume key; " + what
		}
	}
	fmt.Fprintf(g.out, "%s: packet %s of volume %s: %s\n", r.File, r.Packet, r.Volume.UUID, what)
	return nil
}

// hostName is the machine's name as a packet can carry it, or "".
func hostName() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return safe(name)
}

// target is where a packet is written: a new file, or standard output.
type target interface {
	io.Writer
	Commit() error
	Discard()
}

func newTarget(g *globals, path string) (target, error) {
	if path == "-" {
		return standardOutput{g.out}, nil
	}
	return config.NewOutput(path)
}

type standardOutput struct{ io.Writer }

func (standardOutput) Commit() error { return nil }
func (standardOutput) Discard()      {}

// checkpoint is called between the steps of a save; tests end the process there.
var checkpoint = func(string) {}

// sealer seals a new packet in one of the four ways.
type sealer struct {
	name string
	seal func(h escrow.Header, payloads []escrow.Payload, now time.Time) ([]byte, error)
	wipe func()
}

// sealer reads to whom a packet goes, and refuses what nothing may be sealed to.
func (g *globals) sealer(o saveOptions) (sealer, error) {
	switch {
	case o.certificate != "":
		return g.certificateSealer(o.certificate)
	case o.recipient != "":
		return g.recipientSealer(o.recipient)
	case o.tokenFile != "":
		return g.tokenSealer(o.tokenFile)
	}
	passphrase, err := g.newSecret(o.packetPassphraseFile, "--packet-passphrase-file", "Packet passphrase: ")
	if err != nil {
		return sealer{}, err
	}
	return standAlone("passphrase", func(opened *escrow.Opened, now time.Time) ([]byte, error) {
		return escrow.SealOffline(opened, passphrase, now)
	}, func() { secret.Wipe(passphrase) }), nil
}

func standAlone(name string, seal func(*escrow.Opened, time.Time) ([]byte, error), wipe func()) sealer {
	return sealer{name, func(h escrow.Header, payloads []escrow.Payload, now time.Time) ([]byte, error) {
		opened, err := escrow.NewStandAlone(h, payloads...)
		if err != nil {
			return nil, err
		}
		defer secret.Wipe(opened.Plain)
		return seal(opened, now)
	}, wipe}
}

func nothing() {}

func (g *globals) certificateSealer(path string) (sealer, error) {
	data, err := config.ReadInput(path, g.in, nil)
	if err != nil {
		return sealer{}, err
	}
	certificate, err := certkey.ParseCertificate(data)
	if err == nil {
		err = escrow.CheckCertificate(certificate, time.Now())
	}
	if err != nil {
		return sealer{}, fmt.Errorf("%s: %w", path, err)
	}
	return standAlone("certificate", func(opened *escrow.Opened, now time.Time) ([]byte, error) {
		return escrow.SealCertificate(opened, certificate, now)
	}, nothing), nil
}

func (g *globals) recipientSealer(path string) (sealer, error) {
	data, err := config.ReadInput(path, g.in, nil)
	if err != nil {
		return sealer{}, err
	}
	key, err := seal.ParseRecipient(data, time.Now())
	if err != nil {
		return sealer{}, fmt.Errorf("%s: %w", path, err)
	}
	return standAlone("recipient", func(opened *escrow.Opened, now time.Time) ([]byte, error) {
		return escrow.SealRecipient(opened, key, now)
	}, nothing), nil
}

func (g *globals) tokenSealer(path string) (sealer, error) {
	text, err := g.input(path)
	if err != nil {
		return sealer{}, err
	}
	token, err := api.ParseToken(text)
	if err != nil {
		return sealer{}, fmt.Errorf("%s: %w", path, err)
	}
	policy, keys, err := tokenTrustees(token)
	if err != nil {
		return sealer{}, fmt.Errorf("%s: %w", path, err)
	}
	return sealer{"trustees", func(h escrow.Header, payloads []escrow.Payload, now time.Time) ([]byte, error) {
		return sealToTrustees(h, policy, keys, payloads, now)
	}, nothing}, nil
}

// tokenTrustees are the policy that a token vouches for, and the keys of its
// trustees, without asking any server.
func tokenTrustees(token *api.Token) (escrow.Policy, []*seal.PublicKey, error) {
	policy, err := token.FirstPolicy()
	if err != nil {
		return policy, nil, err
	}
	if policy.Digest() != token.PolicyDigest {
		return policy, nil, fmt.Errorf("%w: the token is of a later policy than the first, which it does not carry: enroll, or seal to --certificate or --recipient", enroll.ErrPolicy)
	}
	var keys []*seal.PublicKey
	for _, server := range token.Servers {
		part, err := server.TrusteeKeys()
		if err != nil {
			return policy, nil, err
		}
		keys = append(keys, part...)
	}
	if len(keys) != len(policy.Trustees) {
		return policy, nil, fmt.Errorf("%w: it does not carry the keys of its trustees: make a new one", api.ErrTicket)
	}
	return policy, keys, nil
}

// sealToTrustees makes an ordinary packet that no machine has: its identity is a
// one-off, whose private half is dropped.
func sealToTrustees(h escrow.Header, policy escrow.Policy, keys []*seal.PublicKey, payloads []escrow.Payload, now time.Time) ([]byte, error) {
	oneOff, err := identity.Generate()
	if err != nil {
		return nil, err
	}
	h.KeyID = oneOff.KeyID()
	if h.MachineIDHash, err = machineIDHash(); err != nil {
		return nil, err
	}
	if h.Machine == "" {
		h.Machine = "unnamed"
	}
	return escrow.Make(h, policy, keys, payloads, oneOff, now)
}

// machineIDHash is that of this machine, or of none.
func machineIDHash() (string, error) {
	text, err := os.ReadFile("/etc/machine-id")
	id := strings.TrimSpace(string(text))
	if errors.Is(err, fs.ErrNotExist) || err == nil && (id == "" || id == "uninitialized") {
		return enroll.HashMachineID(secret.ID()), nil
	}
	return enroll.HashMachineID(id), err
}
