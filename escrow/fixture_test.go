package escrow

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
)

var update = flag.Bool("update", false, "write testdata/vectors again, with the keys in testdata/keys")

var now = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

const (
	testUUID       = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	testPassphrase = "011000-012002-013004-014006-015008-016010-017012-018014"
)

// testKeys are five trustees and two machines, the same in every run.
var testKeys = sync.OnceValue(func() (k struct {
	trustees           []*seal.PrivateKey
	machine, otherHost *identity.Key
},
) {
	for i := range 5 {
		k.trustees = append(k.trustees, must(seal.ParsePrivate(keyFile(fmt.Sprintf("trustee-%d.asc", i+1), newTrustee), nil)))
	}
	k.machine = must(identity.ParsePrivatePEM(keyFile("machine.pem", newMachine)))
	k.otherHost = must(identity.ParsePrivatePEM(keyFile("other-machine.pem", newMachine)))
	return k
})

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// keyFile reads a key; with -update it makes the one that is not there.
func keyFile(name string, generate func() []byte) []byte {
	file := filepath.Join("testdata", "keys", name)
	data, err := os.ReadFile(file)
	if !errors.Is(err, fs.ErrNotExist) || !*update {
		return must(data, err)
	}
	data = generate()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
		panic(err)
	}
	return data
}

func newTrustee() []byte { return must(must(seal.Generate("trustee", now)).Armor()) }
func newMachine() []byte { return must(must(identity.Generate()).PrivatePEM()) }

// fixture is a policy of n of m and what is sealed to it.
type fixture struct {
	policy  Policy
	keys    map[string]*seal.PrivateKey // by fingerprint
	public  []*seal.PublicKey
	machine *identity.Key
}

func newFixture(n, m int) *fixture {
	f := &fixture{keys: map[string]*seal.PrivateKey{}, machine: testKeys().machine}
	var trustees []Trustee
	for i, k := range testKeys().trustees[:m] {
		fingerprint := k.Public().Fingerprint()
		f.keys[fingerprint] = k
		f.public = append(f.public, k.Public())
		trustees = append(trustees, Trustee{fingerprint, fmt.Sprintf("server %d", i+1)})
	}
	f.policy = must(NewPolicy(1, n, nil, trustees))
	return f
}

func testHeader() Header {
	return Header{
		ID: "000102030405060708090a0b0c0d0e0f", Machine: "alice-laptop",
		KeyID:         testKeys().otherHost.KeyID(),
		MachineIDHash: "00000000000000000000000000000000000000000000000000000000000000aa",
		Volume:        Volume{UUID: testUUID, Label: "root disk", ByID: "/dev/disk/by-id/ata-X_1-part3"},
	}
}

func passphrasePayload() *PassphrasePayload {
	return &PassphrasePayload{Passphrase: []byte(testPassphrase), Slot: 2, LUKSType: "luks2"}
}

func volumeKeyPayload() *VolumeKeyPayload {
	return &VolumeKeyPayload{
		Key: bytes.Repeat([]byte{0xab, 1}, 32), LUKSType: "luks2", Cipher: "aes-xts-plain64", KeyBits: 512,
		DataOffset: 16 << 20, SectorSize: 4096, DigestHash: "sha256", DigestIterations: 1000,
		DigestSalt: bytes.Repeat([]byte{5}, 32), Digest: bytes.Repeat([]byte{6}, 32),
		HeaderBackup: []byte("LUKS\xba\xbe and so on"),
	}
}

func (f *fixture) make(payloads ...Payload) []byte {
	return must(Make(testHeader(), f.policy, f.public, payloads, f.machine, now))
}

func (f *fixture) packet(payloads ...Payload) *Packet { return must(Parse(f.make(payloads...))) }

// shares opens the shares of the trustees with these indexes.
func (f *fixture) shares(t *testing.T, p *Packet, payload string, indexes ...int) []*Share {
	t.Helper()
	var shares []*Share
	for _, i := range indexes {
		fingerprint := p.Trustees[i-1]
		_, message, err := p.Share(payload, fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		s, err := OpenShare(message, f.keys[fingerprint], p, payload)
		if err != nil {
			t.Fatal(err)
		}
		shares = append(shares, s)
	}
	return shares
}
