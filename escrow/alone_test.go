package escrow

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

var packetPassphrase = []byte("correct horse battery staple")

// foreignPayload and oldVolumeKeyPayload are what volume_key knew.
func foreignPayload() *PassphrasePayload {
	return &PassphrasePayload{Passphrase: []byte("tr0ub4dor & 3"), Slot: NoSlot, Foreign: true}
}

func oldVolumeKeyPayload() *VolumeKeyPayload {
	return &VolumeKeyPayload{
		Key: bytes.Repeat([]byte{0xab, 1}, 16), Cipher: "aes-cbc-essiv:sha256", KeyBits: 256, DataOffset: NoOffset,
	}
}

func fingerprinted() *VolumeKeyPayload {
	p := volumeKeyPayload()
	p.Fingerprint = [][]byte{[]byte("eight by"), []byte("tes each")}
	return p
}

func aloneHeader() Header {
	return Header{
		ID: testHeader().ID, Supersedes: strings.Repeat("ef", 16), Created: now, Machine: "alice-laptop", Volume: testHeader().Volume,
	}
}

func standAlone(payloads ...Payload) *Opened { return must(NewStandAlone(aloneHeader(), payloads...)) }

// contents are all that a stand-alone packet can hold.
func contents() map[string]*Opened {
	foreign := foreignPayload()
	foreign.Passphrase = []byte(" ends with a space and \x01 ")
	inSlot := foreignPayload()
	inSlot.Slot, inSlot.LUKSType = 7, "luks1"
	bare := must(NewStandAlone(Header{Created: now, Volume: Volume{UUID: testUUID}}, passphrasePayload()))
	return map[string]*Opened{
		"passphrase": standAlone(passphrasePayload()), "volume key": standAlone(volumeKeyPayload()),
		"both": standAlone(volumeKeyPayload(), passphrasePayload()), "no name": bare,
		"foreign": standAlone(foreignPayload()), "foreign, any bytes": standAlone(foreign), "foreign, slot": standAlone(inSlot),
		"old volume key": standAlone(oldVolumeKeyPayload()), "fingerprint": standAlone(foreignPayload(), fingerprinted()),
	}
}

// sameContent compares all that was put in.
func sameContent(t *testing.T, got, want *Opened) {
	t.Helper()
	if !bytes.Equal(got.Plain, want.Plain) || !reflect.DeepEqual(got.Header, want.Header) ||
		!reflect.DeepEqual(got.Passphrase, want.Passphrase) || !reflect.DeepEqual(got.VolumeKey, want.VolumeKey) {
		t.Errorf("got %q, want %q", got.Plain, want.Plain)
	}
}

// Under a passphrase, to a key, and to certificates, one after the other: what
// comes out at the end is byte for byte what went in.
func TestRoundTripOverAllForms(t *testing.T) {
	recipient := testKeys().trustees[0]
	for name, want := range contents() {
		t.Run(name, func(t *testing.T) {
			got, err := OpenOffline(must(SealOffline(want, packetPassphrase, now)), packetPassphrase)
			if err != nil {
				t.Fatal(err)
			}
			sameContent(t, got, want)
			if got, err = OpenRecipient(must(SealRecipient(got, recipient.Public(), now)), recipient); err != nil {
				t.Fatal(err)
			}
			sameContent(t, got, want)
			for _, holder := range certificateHolders() {
				if got, err = OpenCertificate(must(SealCertificate(got, holder.certificate, now)), holder.key); err != nil {
					t.Fatal(err)
				}
				sameContent(t, got, want)
			}
		})
	}
}

// What was in a packet of a machine, and on a sheet, goes through the same forms.
func TestRoundTripOfOtherPlaintexts(t *testing.T) {
	f := newFixture(1, 1)
	p := f.packet(passphrasePayload(), fingerprinted())
	for _, name := range payloadNames {
		opened := must(p.Open(name, f.shares(t, p, name, 1)))
		sheet := must(SealSheet(opened, name, packetPassphrase))
		for _, want := range []*Opened{opened, must(OpenSheet(sheet.Message, packetPassphrase))} {
			holder := certificateHolders()["P-256"]
			got := must(OpenCertificate(must(SealCertificate(want, holder.certificate, now)), holder.key))
			got = must(OpenOffline(must(SealOffline(got, packetPassphrase, now)), packetPassphrase))
			sameContent(t, got, want)
		}
	}
}

func TestNewStandAloneRefuses(t *testing.T) {
	noDigest, noSector := volumeKeyPayload(), volumeKeyPayload()
	noDigest.Digest, noSector.SectorSize = nil, 0
	long, short := volumeKeyPayload(), volumeKeyPayload()
	long.Fingerprint = make([][]byte, 17)
	for i := range long.Fingerprint {
		long.Fingerprint[i] = make([]byte, 8)
	}
	short.Fingerprint = [][]byte{{1, 2, 3}}
	noSlot := passphrasePayload()
	noSlot.Slot = NoSlot
	for name, payloads := range map[string][]Payload{
		"none": nil, "twice": {passphrasePayload(), passphrasePayload()}, "three": {passphrasePayload(), volumeKeyPayload(), volumeKeyPayload()},
		"half a digest": {noDigest}, "offset without sector size": {noSector},
		"17 fingerprints": {long}, "short fingerprint": {short}, "recovery passphrase without a slot": {noSlot},
		"empty passphrase": {&PassphrasePayload{Foreign: true, Slot: NoSlot}},
	} {
		if o, err := NewStandAlone(aloneHeader(), payloads...); err == nil || o != nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := NewStandAlone(Header{Created: now}, passphrasePayload()); err == nil {
		t.Error("no volume: no error")
	}
}

// Only a packet of no machine may lack what another system did not know.
func TestMachinePacketIsWhole(t *testing.T) {
	f := newFixture(1, 1)
	noOffset, noDigest, noBackup, noType := volumeKeyPayload(), volumeKeyPayload(), volumeKeyPayload(), volumeKeyPayload()
	noOffset.DataOffset, noOffset.SectorSize = NoOffset, 0
	noDigest.DigestHash, noDigest.DigestIterations, noDigest.DigestSalt, noDigest.Digest = "", 0, nil, nil
	noBackup.HeaderBackup, noType.LUKSType = nil, ""
	for name, payload := range map[string]Payload{
		"foreign": foreignPayload(), "no offset": noOffset, "no digest": noDigest, "no backup": noBackup, "no type": noType,
	} {
		if _, err := Make(testHeader(), f.policy, f.public, []Payload{payload}, f.machine, now); err == nil {
			t.Errorf("%s: made for a machine", name)
		}
		imported := testHeader()
		imported.KeyID = f.machine.KeyID()
		p := must(Parse(must(Make(imported, f.policy, f.public, []Payload{payload}, f.machine, now))))
		o, err := p.Open(payload.Name(), f.shares(t, p, payload.Name(), 1))
		if err != nil || !reflect.DeepEqual(o.payloads()[0], payload) {
			t.Errorf("%s, of no machine: %v", name, err)
		}
	}
}

func TestEmptyPacketPassphrase(t *testing.T) {
	o := standAlone(passphrasePayload())
	if text, err := SealOffline(o, nil, now); text != nil || !errors.Is(err, secret.ErrWeak) {
		t.Errorf("packet: %v", err)
	}
	if s, err := SealSheet(o, ForPassphrase, nil); s != nil || !errors.Is(err, secret.ErrWeak) {
		t.Errorf("sheet: %v", err)
	}
}

// One after the other in one process: nothing remembers the right one.
func TestWrongPassphraseAfterTheRightOne(t *testing.T) {
	o := standAlone(passphrasePayload())
	text, sheet := must(SealOffline(o, packetPassphrase, now)), must(SealSheet(o, ForPassphrase, packetPassphrase))
	for name, open := range map[string]func(passphrase []byte) (*Opened, error){
		"packet": func(p []byte) (*Opened, error) { return OpenOffline(text, p) },
		"sheet":  func(p []byte) (*Opened, error) { return OpenSheet(sheet.Message, p) },
	} {
		if _, err := open(packetPassphrase); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, wrong := range []string{"", "correct horse battery stapl", "correct horse battery staple\n", strings.Repeat("long", 1000)} {
			if got, err := open([]byte(wrong)); got != nil || !errors.Is(err, ErrIntegrity) {
				t.Errorf("%s with %.20q: %v", name, wrong, err)
			}
		}
	}
}

func TestOtherRecipient(t *testing.T) {
	keys := testKeys().trustees
	text := must(SealRecipient(standAlone(passphrasePayload()), keys[0].Public(), now))
	if o, err := OpenRecipient(text, keys[1]); o != nil || !errors.Is(err, seal.ErrRecipient) {
		t.Errorf("another key: %v", err)
	}
	hello := must(seal.EncryptText([]byte("hello\n"), keys[0].Public(), now))
	if o, err := OpenRecipient(hello, keys[0]); o != nil || !errors.Is(err, ErrIntegrity) || !errors.Is(err, record.ErrFormat) {
		t.Errorf("no packet in it: %v", err)
	}
}

func TestSealingOf(t *testing.T) {
	o := standAlone(passphrasePayload())
	sheet := must(SealSheet(o, ForPassphrase, packetPassphrase))
	for name, c := range map[string]struct {
		text []byte
		want Sealing
	}{
		"passphrase":   {must(SealOffline(o, packetPassphrase, now)), ByPassphrase},
		"recipient":    {must(SealRecipient(o, testKeys().trustees[0].Public(), now)), ByRecipient},
		"certificate":  {must(SealCertificate(o, certificateHolders()["P-256"].certificate, now)), ByCertificate},
		"trustees":     {newFixture(1, 1).make(passphrasePayload()), ByTrustees},
		"volume_key":   {[]byte("\x00volume_key\x02\x8c"), ByVolumeKey},
		"sheet":        {sheet.Message, BySheet},
		"typed":        {[]byte("Recovery sheet\n" + strings.Join(Lines(sheet.Message), "\n")), BySheet},
		"scanned":      {[]byte("QR-Code:" + QRText(sheet.Message) + "\n"), BySheet},
		"LUKS":         {[]byte("LUKS\xba\xbe\x00\x02"), ""},
		"text":         {[]byte("1. Start the machine\n2. Wait\n"), ""},
		"empty":        {nil, ""},
		"public key":   {must(testKeys().trustees[0].Public().Armor()), ""},
		"a plain text": {o.Plain, ""},
	} {
		if got := SealingOf(c.text); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
