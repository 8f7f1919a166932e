package escrow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

func TestRoundTrip(t *testing.T) {
	for _, size := range [][2]int{{1, 1}, {1, 3}, {2, 3}, {5, 5}} {
		f := newFixture(size[0], size[1])
		p := f.packet(volumeKeyPayload(), passphrasePayload())
		if err := p.CheckPolicy(f.policy); err != nil {
			t.Error(err)
		}
		if p.Machine != "alice-laptop" || p.Signer.KeyID() != p.RunningKeyID || p.Created.Nanosecond() != 0 {
			t.Errorf("header: %+v", p.Header)
		}
		indexes := []int{5, 4, 3, 2, 1}[5-size[1]:][:size[0]]
		o, err := p.Open(ForPassphrase, f.shares(t, p, ForPassphrase, indexes...))
		if err != nil {
			t.Fatal(err)
		}
		if string(o.Passphrase.Passphrase) != testPassphrase || o.Passphrase.Slot != 2 || o.VolumeKey != nil {
			t.Errorf("passphrase: %+v", o.Passphrase)
		}
		o, err = p.Open(ForVolumeKey, f.shares(t, p, ForVolumeKey, indexes...))
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%v", *volumeKeyPayload()); fmt.Sprintf("%v", *o.VolumeKey) != want || o.Passphrase != nil {
			t.Errorf("volume key: %+v", o.VolumeKey)
		}
	}
}

func TestPlaintextIsReadable(t *testing.T) {
	f := newFixture(1, 1)
	p := f.packet(passphrasePayload(), volumeKeyPayload())
	o, err := p.Open(ForPassphrase, f.shares(t, p, ForPassphrase, 1))
	if err != nil {
		t.Fatal(err)
	}
	text := string(o.Plain)
	for _, want := range []string{"mandos-escrow-packet: 1\n", "\nvolume-uuid: " + testUUID + "\n", "\nrecovery-passphrase: " + testPassphrase + "\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "volume-key:") {
		t.Error("the passphrase payload names a volume key")
	}
	o.Wipe()
	if bytes.Contains(o.Plain, []byte("0")) || bytes.Contains(o.Passphrase.Passphrase, []byte("0")) {
		t.Error("not wiped")
	}
}

// named reports whether err says what is wrong, in the words callers know.
func named(err error) bool {
	return errors.Is(err, ErrIntegrity) && (errors.Is(err, record.ErrFormat) ||
		errors.Is(err, identity.ErrSignature) || errors.Is(err, identity.ErrKey))
}

func TestEveryFlipIsRefused(t *testing.T) {
	data := newFixture(2, 3).make(passphrasePayload())
	for at := range data {
		for _, bit := range []byte{1 << (at % 8), 0x20, 0x80} {
			wrong := bytes.Clone(data)
			wrong[at] ^= bit
			if p, err := Parse(wrong); p != nil || !named(err) {
				t.Fatalf("byte %d ^ %#x: %v", at, bit, err)
			}
		}
	}
}

func TestEveryTruncationIsRefused(t *testing.T) {
	data := newFixture(1, 1).make(passphrasePayload(), volumeKeyPayload())
	for n := range data {
		if p, err := Parse(data[:n]); p != nil || !named(err) {
			t.Fatalf("first %d bytes: %v", n, err)
		}
		if p, err := Parse(data[n+1:]); p != nil || !named(err) {
			t.Fatalf("without the first %d bytes: %v", n+1, err)
		}
	}
	for _, more := range []string{"\n", " ", "x: y\n", string(data)} {
		if _, err := Parse(append(bytes.Clone(data), more...)); !named(err) {
			t.Errorf("with %.10q after it: %v", more, err)
		}
	}
}

// Lines of two good packets of one machine, mixed in every place.
func TestMixIsRefused(t *testing.T) {
	f := newFixture(1, 2)
	a := bytes.SplitAfter(f.make(passphrasePayload(), volumeKeyPayload()), []byte("\n"))
	b := bytes.SplitAfter(f.make(passphrasePayload(), volumeKeyPayload()), []byte("\n"))
	if len(a) != len(b) {
		t.Fatal("packets differ in lines")
	}
	for i := range a {
		if bytes.Equal(a[i], b[i]) {
			continue
		}
		mixed := append(append(append([][]byte{}, a[:i]...), b[i]), a[i+1:]...)
		if _, err := Parse(bytes.Join(mixed, nil)); !named(err) {
			t.Errorf("line %d of another packet: %v", i+1, err)
		}
	}
}

func TestMakeRefuses(t *testing.T) {
	f := newFixture(2, 3)
	other := testKeys().trustees[4].Public()
	onePayload := []Payload{passphrasePayload()}
	for name, c := range map[string]struct {
		change   func(*Header)
		keys     []*seal.PublicKey
		payloads []Payload
		want     error
	}{
		"key missing":      {nil, f.public[:2], onePayload, ErrOtherPolicy},
		"key twice":        {nil, []*seal.PublicKey{f.public[0], f.public[1], f.public[1]}, onePayload, ErrOtherPolicy},
		"key twice, all":   {nil, append(f.public[:3:3], f.public[2]), onePayload, ErrOtherPolicy},
		"foreign key":      {nil, []*seal.PublicKey{f.public[0], f.public[1], other}, onePayload, ErrOtherPolicy},
		"one key too many": {nil, append(f.public[:3:3], other), onePayload, ErrOtherPolicy},
		"no payload":       {nil, f.public, nil, nil},
		"payload twice":    {nil, f.public, []Payload{passphrasePayload(), passphrasePayload()}, nil},
		"no machine name":  {func(h *Header) { h.Machine = "" }, f.public, onePayload, nil},
		"control in name":  {func(h *Header) { h.Machine = "a\nid: 1" }, f.public, onePayload, nil},
		"long label":       {func(h *Header) { h.Volume.Label = strings.Repeat("x", 256) }, f.public, onePayload, nil},
		"no UUID":          {func(h *Header) { h.Volume.UUID = "../x" }, f.public, onePayload, nil},
		"no key ID":        {func(h *Header) { h.KeyID = "" }, f.public, onePayload, nil},
		"newline in secret": {nil, f.public, []Payload{&PassphrasePayload{
			Passphrase: []byte("a\nb"), LUKSType: "luks2",
		}}, nil},
		"backup too long": {nil, f.public, []Payload{func() Payload {
			p := volumeKeyPayload()
			p.HeaderBackup = make([]byte, MaxHeaderBackup+1)
			return p
		}()}, nil},
	} {
		h := testHeader()
		if c.change != nil {
			c.change(&h)
		}
		data, err := Make(h, f.policy, c.keys, c.payloads, f.machine, now)
		if data != nil || err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Make(testHeader(), Policy{}, nil, onePayload, f.machine, now); !errors.Is(err, ErrPolicy) {
		t.Errorf("no policy: %v", err)
	}
}

func TestCheckPolicy(t *testing.T) {
	p := newFixture(2, 3).packet(passphrasePayload())
	for _, other := range []*fixture{newFixture(1, 3), newFixture(2, 2), newFixture(3, 3), newFixture(1, 1)} {
		if err := p.CheckPolicy(other.policy); !errors.Is(err, ErrOtherPolicy) {
			t.Errorf("%d of %d: %v", other.policy.Threshold, len(other.policy.Trustees), err)
		}
	}
}

func TestLargestPacket(t *testing.T) {
	var trustees []Trustee
	var keys []*seal.PublicKey
	for i := range MaxTrustees {
		k := must(seal.Generate("t", now)).Public()
		keys = append(keys, k)
		trustees = append(trustees, Trustee{k.Fingerprint(), fmt.Sprint(i)})
	}
	long := strings.Repeat("ü", maxName/2)
	h, pass, key := testHeader(), passphrasePayload(), volumeKeyPayload()
	h.Supersedes, h.Machine = strings.Repeat("f", 32), long
	h.Volume.Label, h.Volume.ByID = long, long
	pass.Passphrase = bytes.Repeat([]byte("p"), maxPassphrase)
	key.Key, key.KeyBits = bytes.Repeat([]byte("k"), maxVolumeKey), 8*maxVolumeKey
	key.HeaderBackup = bytes.Repeat([]byte("h"), MaxHeaderBackup)
	data, err := Make(h, must(NewPolicy(1, MaxTrustees, nil, trustees)), keys, []Payload{pass, key}, testKeys().machine, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes of at most %d", len(data), MaxPacketSize)
	if _, err := Parse(append(data, make([]byte, MaxPacketSize-len(data)+1)...)); !named(err) {
		t.Errorf("longer than allowed: %v", err)
	}
}

func TestOffline(t *testing.T) {
	f := newFixture(1, 1)
	p := f.packet(passphrasePayload(), volumeKeyPayload())
	for _, name := range payloadNames {
		o, err := p.Open(name, f.shares(t, p, name, 1))
		if err != nil {
			t.Fatal(err)
		}
		text, err := SealOffline(o, []byte("one-time"), now)
		if err != nil {
			t.Fatal(err)
		}
		again, err := OpenOffline(text, []byte("one-time"))
		if err != nil || !bytes.Equal(again.Plain, o.Plain) || again.payloads()[0].Name() != name || again.Header.ID != p.ID {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := OpenOffline(text, []byte("other")); !errors.Is(err, ErrIntegrity) {
			t.Errorf("%s, wrong password: %v", name, err)
		}
		if _, err := OpenOffline(text[:len(text)/2], []byte("one-time")); !errors.Is(err, ErrIntegrity) {
			t.Errorf("%s, half of it: %v", name, err)
		}
		foreign := must(seal.EncryptPassphrase([]byte("hello\n"), []byte("one-time"), now))
		if _, err := OpenOffline(foreign, []byte("one-time")); !errors.Is(err, ErrIntegrity) {
			t.Errorf("a message that is no packet: %v", err)
		}
	}
}

// A secret must not come out whatever byte of an off-line packet is changed.
func TestOfflineFlips(t *testing.T) {
	f := newFixture(1, 1)
	p := f.packet(passphrasePayload())
	o := must(p.Open(ForPassphrase, f.shares(t, p, ForPassphrase, 1)))
	text := must(SealOffline(o, []byte("one-time"), now))
	step := len(text)/6 + 1 // each try stretches the password, 0.2 s
	for at := int(binary.BigEndian.Uint16(o.Plain)) % step; at < len(text); at += step {
		wrong := bytes.Clone(text)
		wrong[at] ^= 1
		if got, err := OpenOffline(wrong, []byte("one-time")); err == nil && !bytes.Equal(got.Plain, o.Plain) {
			t.Errorf("byte %d: other lines came out", at)
		} else if err != nil && !errors.Is(err, ErrIntegrity) {
			t.Errorf("byte %d: %v", at, err)
		}
	}
}

// TestAccept: whoever pinned a policy takes packets under it, and under one that
// it was merged into; under no weaker and no other one.
func TestAccept(t *testing.T) {
	trustees := newFixture(3, 5).policy.Trustees
	policyOf := func(epoch uint64, threshold int, which ...int) Policy {
		var chosen []Trustee
		for _, i := range which {
			chosen = append(chosen, trustees[i])
		}
		var previous []byte
		if epoch > 1 {
			previous = make([]byte, 32)
		}
		return must(NewPolicy(epoch, threshold, previous, chosen))
	}
	headerOf := func(p Policy) *Header {
		h := testHeader()
		h.setPolicy(p)
		return &h
	}
	for name, c := range map[string]struct {
		pinned, packet Policy
		takes          bool
	}{
		"the same":                     {policyOf(1, 1, 0), policyOf(1, 1, 0), true},
		"merged, 2 of 3":               {policyOf(1, 1, 0), policyOf(1, 2, 0, 1, 2), true},
		"merged, 1 of 2":               {policyOf(1, 1, 0), policyOf(1, 1, 0, 1), true},
		"merged, higher threshold":     {policyOf(1, 2, 0, 1), policyOf(1, 3, 0, 1, 2, 3), true},
		"merged, lower threshold":      {policyOf(1, 2, 0, 1), policyOf(1, 1, 0, 1, 2), false},
		"the same, lower threshold":    {policyOf(1, 2, 0, 1), policyOf(1, 1, 0, 1), false},
		"without the pinned trustee":   {policyOf(1, 1, 0), policyOf(1, 2, 1, 2, 3), false},
		"without one of two":           {policyOf(1, 2, 0, 1), policyOf(1, 2, 0, 2, 3), false},
		"another trustee":              {policyOf(1, 1, 0), policyOf(1, 1, 1), false},
		"a successor that nobody took": {policyOf(1, 1, 0), policyOf(2, 2, 0, 1, 2), false},
		"of a policy before":           {policyOf(2, 1, 0), policyOf(1, 2, 0, 1, 2), false},
	} {
		if err := c.pinned.Accept(headerOf(c.packet)); (err == nil) != c.takes || err != nil && !errors.Is(err, ErrOtherPolicy) {
			t.Errorf("%s: %v", name, err)
		}
	}
	lying := headerOf(policyOf(1, 1, 0)) // the pinned digest, and other trustees
	lying.Trustees = []string{trustees[1].Fingerprint}
	if err := policyOf(1, 1, 0).Accept(lying); !errors.Is(err, ErrOtherPolicy) {
		t.Errorf("the pinned digest over another trustee: %v", err)
	}
}
