package volumekey

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
)

var update = flag.Bool("update", false, "write testdata again")

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

var wrappingKey = bytes.Repeat([]byte{0x5a, 3}, 16)

func TestClear(t *testing.T) {
	p := must(Parse(packet(Clear, volumeKeyTree().bytes())))
	want := Facts{Payload: escrow.ForVolumeKey, Host: testHost, UUID: testUUID, Label: testLabel, Path: testPath, Cipher: "aes-cbc-essiv:sha256", KeyBits: 256, Slot: escrow.NoSlot}
	if *p.Facts != want || p.Recipient != nil {
		t.Errorf("%+v, %v", p.Facts, p.Recipient)
	}
	o := must(p.Open(Keys{}, now))
	defer o.Wipe()
	if o.VolumeKey == nil || !bytes.Equal(o.VolumeKey.Key, testKey) || o.VolumeKey.DataOffset != escrow.NoOffset || o.VolumeKey.Cipher != want.Cipher {
		t.Errorf("%+v", o.VolumeKey)
	}
	if h := o.Header; h.Machine != testHost || h.Volume != (escrow.Volume{UUID: testUUID, Label: testLabel, ByID: testPath}) || h.Created != now || h.KeyID != "" {
		t.Errorf("%+v", h)
	}
	if p.Facts.Host = "x"; bytes.Contains(o.Plain, []byte("machine-name: x")) {
		t.Error("what was opened changed with the packet")
	}
}

func TestPassphraseIsForeign(t *testing.T) {
	o := must(must(Parse(packet(Clear, passphraseTree("öffne dich").bytes()))).Open(Keys{}, now))
	if o.Passphrase == nil || string(o.Passphrase.Passphrase) != "öffne dich" || !o.Passphrase.Foreign || o.Passphrase.Slot != 4 || o.VolumeKey != nil {
		t.Errorf("%+v", o.Passphrase)
	}
	tree := passphraseTree("x")
	value := tree.find(tagKeyValue)
	value.parts = value.parts[:len(value.parts)-1]
	o = must(must(Parse(packet(Clear, tree.bytes()))).Open(Keys{}, now))
	if o.Passphrase.Slot != escrow.NoSlot {
		t.Errorf("slot %d, where none is said", o.Passphrase.Slot)
	}
}

// TestSymmetric: fixtures, as no volume_key of Debian's can be told to write them.
func TestSymmetric(t *testing.T) {
	for name, tree := range map[string]*node{
		"symmetric-volume-key.pkt":             wrapAES(volumeKeyTree(), wrappingKey, paddingPKCS5),
		"symmetric-volume-key-unpadded.pkt":    wrapAES(volumeKeyTree(), wrappingKey, paddingNone),
		"symmetric-passphrase.pkt":             wrapAES(passphraseTree("correct horse"), wrappingKey, paddingPKCS5),
		"symmetric-passphrase-zero-filled.pkt": wrapAES(passphraseTree("correct horse"), wrappingKey, paddingNone),
	} {
		file := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(file, packet(SymmetricWrap, tree.bytes()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		p := must(Parse(must(os.ReadFile(file))))
		if p.Format != SymmetricWrap || p.Facts.UUID != testUUID || p.Recipient != nil {
			t.Errorf("%s: %+v", name, p)
		}
		o, err := p.Open(Keys{Symmetric: wrappingKey}, now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if o.VolumeKey != nil && !bytes.Equal(o.VolumeKey.Key, testKey) || o.Passphrase != nil && string(o.Passphrase.Passphrase) != "correct horse" {
			t.Errorf("%s: %s", name, o.Plain)
		}
		for _, k := range []Keys{{}, {Symmetric: wrappingKey[:31]}, {Passphrase: wrappingKey}} {
			if _, err := p.Open(k, now); !errors.Is(err, ErrKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := p.Open(Keys{Symmetric: bytes.Repeat([]byte{1}, 32)}, now); strings.Contains(name, "passphrase.pkt") && !errors.Is(err, escrow.ErrIntegrity) {
			t.Errorf("%s: another key: %v", name, err)
		}
	}
}

// TestRefused: each with what it must say, so that it is refused for that.
func TestRefused(t *testing.T) {
	volumeKey := func(spoil func(*node)) []byte {
		tree := volumeKeyTree()
		spoil(tree)
		return packet(Clear, tree.bytes())
	}
	passphrase := func(spoil func(*node)) []byte {
		tree := passphraseTree("x")
		spoil(tree)
		return packet(Clear, tree.bytes())
	}
	without := func(space string) []byte {
		return volumeKey(func(n *node) {
			value := n.find(tagKeyValue)
			for i, part := range value.parts {
				if name := part.find(tagNameSpace); name != nil && string(name.value) == space {
					value.parts = append(value.parts[:i:i], value.parts[i+1:]...)
					return
				}
			}
		})
	}
	slot := func(value string) []byte {
		return passphrase(func(n *node) {
			parts := n.find(tagKeyValue).parts
			parts[len(parts)-1].find(tagNameID).value = []byte(value)
		})
	}
	bits := func(bits uint32) []byte {
		return volumeKey(func(n *node) {
			for _, part := range n.find(tagKeyValue).parts {
				if name := part.find(tagAttributeName); name != nil && string(name.value) == attributeLength {
					part.parts[1] = number(tagAttributeValue, typeInt32, bits)
				}
			}
		})
	}
	good := packet(Clear, volumeKeyTree().bytes())
	larger := bytes.Clone(good)
	larger[len(magic)+1+itemHeader+8]++ // the version's length
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"nothing":                       {nil, "does not begin"},
		"too short":                     {good[:len(magic)], "too short"},
		"too long":                      {append(bytes.Clone(good), make([]byte, MaxSize)...), "longer than"},
		"bad magic":                     {append([]byte("\x00volume_kez"), good[len(magic):]...), "does not begin"},
		"unknown format":                {packet(5, volumeKeyTree().bytes()), "format 5"},
		"empty":                         {packet(Clear, nil), "cut off"},
		"unexpected tag":                {volumeKey(func(n *node) { n.find(tagVersion).tag = tagKey }), "item 4200003B, where 42000065"},
		"unexpected type":               {volumeKey(func(n *node) { n.find(tagMajor).kind = typeEnum }), "of type 04, not 01"},
		"unexpected size":               {volumeKey(func(n *node) { n.find(tagMajor).value = make([]byte, 5) }), "5 bytes, not 4"},
		"trailing data":                 {append(bytes.Clone(good), 0), "1 bytes after the end of the packet"},
		"trailing data in a structure":  {volumeKey(func(n *node) { v := n.find(tagVersion); v.parts = append(v.parts, number(tagMajor, typeInt32, 0)) }), "after the end of the version"},
		"larger than its container":     {packet(Clear, volumeKeyTree().bytes()[:100]), "larger than what it stands in"},
		"structure into the next":       {larger, "after the end of the version"},
		"enum out of range":             {volumeKey(func(n *node) { n.find(tagObjectType).value = []byte{0, 0, 0, 9} }), "the value 9"},
		"enum of zero":                  {volumeKey(func(n *node) { n.find(tagKeyValueType).value = make([]byte, 4) }), "the value 0"},
		"another object":                {volumeKey(func(n *node) { n.find(tagObjectType).value = []byte{0, 0, 0, 1} }), "neither a key nor a passphrase"},
		"another secret than passwords": {passphrase(func(n *node) { n.find(tagSecretType).value = []byte{0, 0, 0, 2} }), "the value 2"},
		"key as raw":                    {volumeKey(func(n *node) { n.find(tagKeyValueType).value = []byte{0, 0, 0, 1} }), "key value of type 1"},
		"key as opaque":                 {volumeKey(func(n *node) { n.find(tagKeyValueType).value = []byte{0, 0, 0, 2} }), "is of type 80"},
		"unsupported version":           {volumeKey(func(n *node) { n.find(tagMinor).value = []byte{0, 0, 0, 99} }), "version 0.99"},
		"NUL in a passphrase":           {packet(Clear, passphraseTree("a\x00b").bytes()), "contains a NUL"},
		"NUL in a text":                 {volumeKey(func(n *node) { n.find(tagNameID).value = []byte("a\x00") }), "is not text"},
		"text that is not UTF-8":        {volumeKey(func(n *node) { n.find(tagNameID).value = []byte{0xff} }), "is not text"},
		"key bits not of whole bytes":   {bits(255), "number of key bits 255"},
		"key of another length":         {bits(248), "and not the 248 bits"},
		"negative key bits":             {bits(1<<32 - 8), "number of key bits -8"},
		"negative slot":                 {slot("-1"), `slot "-1"`},
		"no slot number":                {slot("1x"), `slot "1x"`},
		"unknown volume format":         {volumeKey(func(n *node) { n.find(tagKeyValue).parts[5].find(tagNameID).value = []byte("crypt_LVM") }), `"crypt_LVM"`},
		"no host":                       {without(nameHost), `"Host Name" is missing`},
		"no file":                       {without(nameFile), `"Volume File" is missing`},
		"no volume format":              {without(nameFormat), `"Volume Format" is missing`},
		"no cipher":                     {without(nameCipher), `"LUKS Cipher Name" is missing`},
		"no mode":                       {without(nameMode), `"LUKS Cipher Mode" is missing`},
		"unknown attribute":             {volumeKey(func(n *node) { n.find(tagAttributeName).value = []byte("x") }), `attribute "x"`},
		"attribute twice":               {volumeKey(func(n *node) { v := n.find(tagKeyValue); v.parts = append(v.parts, common()[0]) }), "stands twice"},
		"cipher as another attribute":   {volumeKey(func(n *node) { n.find(tagNameSpace).value = []byte(nameCipher) }), "stands twice, or in"},
		"wrapped, said to be clear":     {packet(Clear, wrapAES(volumeKeyTree(), wrappingKey, paddingNone).bytes()), "is wrapped: true"},
		"clear, said to be wrapped":     {packet(SymmetricWrap, volumeKeyTree().bytes()), "is wrapped: false"},
		"wrapped by another method": {packet(SymmetricWrap, func() []byte {
			tree := wrapAES(volumeKeyTree(), wrappingKey, paddingNone)
			tree.find(tagWrappingMethod).value = []byte{0, 0, 0, 1}
			return tree.bytes()
		}()), "wrapping method 00000001"},
		"no certificate's name": {packet(CertificateWrap, wrapAES(volumeKeyTree(), wrappingKey, paddingNone).bytes()), "does not name the certificate"},
		"CMS of garbage":        {packet(Certificate, bytes.Repeat([]byte("garbage"), 100)), "CMS"},
		"CMS too deep":          {packet(Certificate, bytes.Repeat([]byte{0x30, 0x80}, 30000)), "deeper than"},
	} {
		p, err := Parse(c.data)
		if !errors.Is(err, escrow.ErrIntegrity) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}

// TestWithoutUUID: a packet without UUID can be shown.
func TestWithoutUUID(t *testing.T) {
	tree := volumeKeyTree()
	value := tree.find(tagKeyValue)
	value.parts = append(value.parts[:2:2], value.parts[3:]...)
	p := must(Parse(packet(Clear, tree.bytes())))
	if _, err := p.Open(Keys{}, now); p.Facts.UUID != "" || !errors.Is(err, escrow.ErrIntegrity) || !strings.Contains(err.Error(), "UUID") {
		t.Errorf("%v", err)
	}
}

// TestTruncatedAndFlipped: at every length, and every bit of a whole packet: an
// error, or what was said in clear changed, but never a panic and never a longer
// key. The format itself finds no more.
func TestTruncatedAndFlipped(t *testing.T) {
	good := packet(Clear, volumeKeyTree().bytes())
	for i := range good {
		if _, err := Parse(good[:i]); !errors.Is(err, escrow.ErrIntegrity) {
			t.Fatalf("cut to %d: %v", i, err)
		}
	}
	for i := range 8 * len(good) {
		flipped := bytes.Clone(good)
		flipped[i/8] ^= 1 << (i % 8)
		p, err := Parse(flipped)
		if err != nil {
			continue
		}
		if o, err := p.Open(Keys{}, now); err == nil && len(o.VolumeKey.Key) != len(testKey) {
			t.Errorf("bit %d: a key of %d bytes", i, len(o.VolumeKey.Key))
		}
	}
}

func TestUnauthenticated(t *testing.T) {
	for f := range formatNames {
		fields := (&Packet{Format: Format(f)}).Unauthenticated()
		if fields == nil || (len(fields) == 0) != (Format(f) == Passphrase) {
			t.Errorf("%s: %v", Format(f), fields)
		}
	}
}

func TestKeyOfAnotherKind(t *testing.T) {
	other := must(rsa.GenerateKey(rand.Reader, 2048))
	for _, name := range []string{"certificate.pkt", "certificate-wrap.pkt"} {
		p := must(Parse(must(os.ReadFile(filepath.Join("testdata", name)))))
		for _, k := range []Keys{{}, {Passphrase: []byte("x")}, {Private: must(ecdh.P256().GenerateKey(rand.Reader))}, {Private: other}} {
			if o, err := p.Open(k, now); !errors.Is(err, ErrKey) {
				t.Errorf("%s: %v, %v", name, o, err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, file := range must(filepath.Glob("testdata/*.pkt")) {
		f.Add(must(os.ReadFile(file)))
	}
	f.Add(packet(Clear, volumeKeyTree().bytes()))
	f.Add(packet(Clear, passphraseTree("x").bytes()))
	keys := Keys{Passphrase: []byte("x"), Private: fixtureKey(), Symmetric: wrappingKey}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			if !errors.Is(err, escrow.ErrIntegrity) {
				t.Errorf("%v", err)
			}
			return
		}
		if p.Format == Passphrase {
			return // what it costs is internal/seal's to bound
		}
		o, err := p.Open(keys, now)
		if err == nil && (o.VolumeKey == nil) == (o.Passphrase == nil) {
			t.Errorf("%s", hex.EncodeToString(data))
		}
	})
}
