package main

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/escrow/volumekey"
	"mandos-escrow/internal/certkey"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// openOptions are what a packet in a file may be opened with.
type openOptions struct {
	password           string // file with the packet passphrase or one-time password
	passwordFlag       string // that names it
	passwordName       string // what the person who is asked calls it
	keys               []string
	keyPassphraseFiles []string
	payload            string // of a packet that is sealed to trustees; "": all
}

// oneTime and packetPassphrase say how the two families of commands call what
// opens a packet: it is the same.
func oneTime(file string) openOptions {
	return openOptions{password: file, passwordFlag: "--otp-file", passwordName: "one-time password"}
}

func packetPassphrase() openOptions {
	return openOptions{passwordFlag: "--packet-passphrase-file", passwordName: "packet passphrase"}
}

// withOpen adds the flags of a command that opens a packet.
func withOpen(cmd *cobra.Command, o *openOptions) {
	f := cmd.Flags()
	f.StringVar(&o.password, "packet-passphrase-file", "", "file with the packet passphrase (asked for otherwise)")
	f.StringArrayVar(&o.keys, "key", nil, "file with the private key that the packet is sealed to: of a certificate (PEM), or OpenPGP; once for each trustee that is needed")
	f.StringArrayVar(&o.keyPassphraseFiles, "key-passphrase-file", nil, "file with the passphrase of that key (asked for otherwise); as often as --key, or once for all")
}

// sealedTo is what a kind of sealing is called.
var sealedTo = map[escrow.Sealing]string{
	escrow.ByPassphrase: "a passphrase", escrow.BySheet: "a passphrase", escrow.ByRecipient: "an OpenPGP key",
	escrow.ByCertificate: "a certificate", escrow.ByTrustees: "trustees",
}

// openedFile is a packet in a file that was opened.
type openedFile struct {
	*escrow.Opened
	sealing escrow.Sealing
	// unproved are the fields that whoever had the file could have changed.
	unproved []string
}

// doubt: that a secret opens nothing is no sign of its age in a packet that anybody
// could have changed.
func (f *openedFile) doubt(err error) error {
	if len(f.unproved) > 0 && (errors.Is(err, errStaleKey) || errors.Is(err, errStale)) {
		return fmt.Errorf("%w: it is damaged, somebody changed it, or %w", errUnproved, err)
	}
	return err
}

// openFile opens a packet, however it is sealed. Whoever calls it wipes what it
// returns.
func openFile(g *globals, o openOptions, path string) (*openedFile, error) {
	text, err := config.ReadInput(path, g.in, nil)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(text) // volume_key had a format without any sealing
	return openData(g, o, path, text)
}

// openData is openFile for what was read already.
func openData(g *globals, o openOptions, path string, text []byte) (f *openedFile, err error) {
	f = &openedFile{sealing: escrow.SealingOf(text), unproved: []string{}}
	if f.sealing == escrow.ByVolumeKey {
		f.Opened, f.unproved, err = openForeign(g, o, text)
	} else {
		f.Opened, err = openText(g, o, f.sealing, text)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

func openText(g *globals, o openOptions, sealing escrow.Sealing, text []byte) (*escrow.Opened, error) {
	switch sealing {
	case escrow.ByTrustees, escrow.ByCertificate, escrow.ByRecipient:
		if len(o.keys) == 0 {
			return nil, usage("this packet is sealed to %s: give --key FILE with the private key", sealedTo[sealing])
		}
	case escrow.ByPassphrase, escrow.BySheet:
		if len(o.keys) > 0 {
			return nil, usage("this packet is sealed under a passphrase: leave --key out")
		}
	}
	switch sealing {
	case escrow.ByTrustees:
		return openShares(g, o, text)
	case escrow.ByCertificate, escrow.ByRecipient:
		return openWithKey(g, o, sealing, text)
	case escrow.ByPassphrase, escrow.BySheet:
		opened, passphrase, err := openUnder(g, o, text)
		secret.Wipe(passphrase)
		return opened, err
	}
	return nil, fmt.Errorf("%w: neither a packet nor a sheet, or its beginning is damaged", escrow.ErrIntegrity)
}

// openForeign opens a packet of the program volume_key, in all its formats.
func openForeign(g *globals, o openOptions, data []byte) (*escrow.Opened, []string, error) {
	packet, err := volumekey.Parse(data)
	if err != nil {
		return nil, nil, err
	}
	var keys volumekey.Keys
	switch packet.Format {
	case volumekey.Passphrase:
		if keys.Passphrase, err = g.secretInput(o.password, o.passwordFlag, capital(o.passwordName)+": "); err != nil {
			return nil, nil, err
		}
		defer secret.Wipe(keys.Passphrase)
	case volumekey.Certificate, volumekey.CertificateWrap, volumekey.SymmetricWrap:
		if len(o.keys) != 1 {
			return nil, nil, usage("this packet of volume_key is sealed to a %s: give --key FILE once", packet.Format)
		}
		if packet.Format == volumekey.SymmetricWrap {
			keys.Symmetric, err = g.input(o.keys[0])
			defer func() { secret.Wipe(keys.Symmetric) }()
		} else {
			keys.Private, err = certificateKey(g, o)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	opened, err := packet.Open(keys, time.Now())
	if err != nil {
		return nil, nil, err
	}
	unproved := packet.Unauthenticated()
	if len(unproved) > 0 {
		g.warn("this packet of volume_key proves nothing of what it says: only a volume that its key opens does")
	}
	return opened, unproved, nil
}

// sheetMessage is the message of a sheet: itself, or what was typed or scanned.
func sheetMessage(text []byte) ([]byte, error) {
	if seal.MessageKind(text) == seal.UnderPassphraseBinary {
		return text, nil
	}
	return escrow.ParseLines(text)
}

// openUnder opens a packet or a sheet under a passphrase, and returns that one,
// too. It tries it as it was read, then as a one-time password would be with the
// dashes that somebody left out, or in capitals.
func openUnder(g *globals, o openOptions, text []byte) (opened *escrow.Opened, passphrase []byte, err error) {
	message, open := text, escrow.OpenOffline
	if escrow.SealingOf(text) == escrow.BySheet {
		open = escrow.OpenSheet
		if message, err = sheetMessage(text); err != nil {
			return nil, nil, err
		}
	}
	if passphrase, err = g.secretInput(o.password, o.passwordFlag, capital(o.passwordName)+": "); err != nil {
		return nil, nil, err
	}
	opened, err = open(message, passphrase)
	if again := secret.NormalizeOneTime(passphrase); errors.Is(err, escrow.ErrIntegrity) && again != nil && !bytes.Equal(again, passphrase) {
		secret.Wipe(passphrase)
		passphrase = again
		opened, err = open(message, passphrase)
	}
	if err != nil {
		secret.Wipe(passphrase)
		if errors.Is(err, seal.ErrIntegrity) {
			err = notOpened{o.passwordName, err}
		}
		return nil, nil, err
	}
	return opened, passphrase, nil
}

// notOpened is a message that a passphrase does not open. What the layers below say
// of it is left out: each says this again.
type notOpened struct {
	name string // of the passphrase
	err  error
}

func (e notOpened) Error() string {
	return fmt.Sprintf("wrong %s, or a damaged packet (they cannot be told apart)", e.name)
}

func (e notOpened) Unwrap() error { return e.err }

func capital(text string) string { return string(bytes.ToUpper([]byte(text[:1]))) + text[1:] }

// openWithKey opens a packet to one key: that of a certificate, or an OpenPGP
// key.
func openWithKey(g *globals, o openOptions, sealing escrow.Sealing, text []byte) (*escrow.Opened, error) {
	if len(o.keys) != 1 {
		return nil, usage("this packet is sealed to one key: give --key once")
	}
	if sealing == escrow.ByRecipient {
		key, err := openPGPKey(g, o, 0)
		if err != nil {
			return nil, err
		}
		return escrow.OpenRecipient(text, key)
	}
	key, err := certificateKey(g, o)
	if err != nil {
		return nil, err
	}
	return escrow.OpenCertificate(text, key)
}

func certificateKey(g *globals, o openOptions) (crypto.PrivateKey, error) {
	file, err := g.input(o.keys[0])
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(file)
	var passphrase []byte
	if _, locked := certkey.IsPrivate(file); locked {
		if passphrase, err = g.keyPassphrase(o, 0); err != nil {
			return nil, err
		}
		defer secret.Wipe(passphrase)
	}
	key, err := certkey.ParsePrivate(file, passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.keys[0], err)
	}
	return key, nil
}

// openPGPKey reads the n-th key.
func openPGPKey(g *globals, o openOptions, n int) (*seal.PrivateKey, error) {
	file, err := g.input(o.keys[n])
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(file)
	locked, err := seal.Protected(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.keys[n], err)
	}
	var passphrase []byte
	if locked {
		if passphrase, err = g.keyPassphrase(o, n); err != nil {
			return nil, err
		}
		defer secret.Wipe(passphrase)
	}
	key, err := seal.ParsePrivate(file, passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.keys[n], err)
	}
	return key, nil
}

// keyPassphrase is that of the n-th key.
func (g *globals) keyPassphrase(o openOptions, n int) ([]byte, error) {
	file := ""
	switch len(o.keyPassphraseFiles) {
	case 0:
	case 1:
		file = o.keyPassphraseFiles[0]
	case len(o.keys):
		file = o.keyPassphraseFiles[n]
	default:
		return nil, usage("--key-passphrase-file %d times for %d of --key: give it as often, or once for all", len(o.keyPassphraseFiles), len(o.keys))
	}
	return g.secretInput(file, "--key-passphrase-file", "Passphrase of the key "+o.keys[n]+": ")
}

// openShares opens a packet with the keys of as many trustees as it needs,
// off-line.
func openShares(g *globals, o openOptions, text []byte) (*escrow.Opened, error) {
	packet, err := escrow.Parse(text)
	if err != nil {
		return nil, err
	}
	if given := len(o.keys); given < packet.Threshold {
		return nil, usage("this packet opens with the keys of %d of its %d trustees, and --key was given %d times", packet.Threshold, len(packet.Trustees), given)
	}
	keys := make([]*seal.PrivateKey, len(o.keys))
	for i := range o.keys {
		if keys[i], err = openPGPKey(g, o, i); err != nil {
			return nil, err
		}
	}
	var all *escrow.Opened
	for _, p := range packet.Payloads {
		if o.payload != "" && o.payload != p.Name {
			continue
		}
		opened, err := openPayload(packet, p.Name, keys)
		if err != nil {
			if all != nil {
				all.Wipe()
			}
			return nil, err
		}
		all = both(all, opened)
	}
	if all == nil {
		_, err = packet.Payload(o.payload)
		return nil, err
	}
	return all, nil
}

// openPayload names a share that cannot be opened, and goes on to the next: more
// keys than are needed may be given.
func openPayload(packet *escrow.Packet, payload string, keys []*seal.PrivateKey) (*escrow.Opened, error) {
	var shares []*escrow.Share
	defer func() {
		for _, s := range shares {
			s.Wipe()
		}
	}()
	var faults []error
	for _, key := range keys {
		share, err := openShare(packet, payload, key)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		shares = append(shares, share)
	}
	if len(shares) < packet.Threshold {
		return nil, errors.Join(faults...)
	}
	return packet.Open(payload, shares)
}

func openShare(packet *escrow.Packet, payload string, key *seal.PrivateKey) (*escrow.Share, error) {
	_, message, err := packet.Share(payload, key.Public().Fingerprint())
	if err != nil {
		return nil, err
	}
	return escrow.OpenShare(message, key, packet, payload)
}

// both puts the two payloads of one packet together. The lines of the second are
// wiped: they repeat the header.
func both(first, second *escrow.Opened) *escrow.Opened {
	if first == nil {
		return second
	}
	secret.Wipe(second.Plain)
	if second.Passphrase != nil {
		first.Passphrase = second.Passphrase
	}
	if second.VolumeKey != nil {
		first.VolumeKey = second.VolumeKey
	}
	return first
}
