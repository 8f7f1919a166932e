package recovery

import (
	"crypto/sha256"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
)

var update = flag.Bool("update", false, "write testdata/vectors again, with the keys in testdata/keys")

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const testUUID = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"

// fixtureKeys are the same in every run.
type fixtureKeys struct {
	requester, approver, machine *identity.Key
	oneOff, other, trustee       *seal.PrivateKey
}

var keys = sync.OnceValue(func() fixtureKeys {
	id := func(name string) *identity.Key {
		return must(identity.ParsePrivatePEM(keyFile(name, func() []byte { return must(must(identity.Generate()).PrivatePEM()) })))
	}
	pgp := func(name string) *seal.PrivateKey {
		return must(seal.ParsePrivate(keyFile(name, func() []byte { return must(must(seal.Generate(name, now)).Armor()) }), nil))
	}
	return fixtureKeys{
		id("requester.pem"), id("approver.pem"), id("machine.pem"),
		pgp("one-off.asc"), pgp("other-one-off.asc"), pgp("trustee.asc"),
	}
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

// testPacket is a packet of one trustee with both payloads.
func testPacket(name string) *escrow.Packet {
	trustee := keys().trustee.Public()
	policy := must(escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: trustee.Fingerprint(), Name: "srv"}}))
	h := escrow.Header{
		Machine: name, KeyID: keys().requester.KeyID(), MachineIDHash: strings.Repeat("ab", 32),
		Volume: escrow.Volume{UUID: testUUID},
	}
	payloads := []escrow.Payload{
		&escrow.PassphrasePayload{Passphrase: []byte("011000-012002"), Slot: 2, LUKSType: "luks2"},
		&escrow.VolumeKeyPayload{
			Key: []byte(strings.Repeat("k", 64)), LUKSType: "luks2", Cipher: "aes-xts-plain64", KeyBits: 512, DataOffset: 16 << 20,
			SectorSize: 512, DigestHash: "sha256", DigestIterations: 1000, DigestSalt: []byte("salt"), Digest: []byte("digest"), HeaderBackup: []byte("header"),
		},
	}
	data := must(escrow.Make(h, policy, []*seal.PublicKey{trustee}, payloads, keys().machine, now))
	return must(escrow.Parse(data))
}

// requestFor is a request for one payload of a packet.
func requestFor(p *escrow.Packet, payload, id string) Request {
	return Request{
		ID: id, PacketID: p.ID, PacketDigest: p.Digest, HeaderDigest: p.HeaderDigest,
		Payload: payload, PayloadDigest: sha256.Sum256(must(p.Payload(payload)).Message),
		VolumeUUID: p.Volume.UUID, Machine: p.Machine, Requester: "bob", RequesterID: keys().requester.KeyID(),
		Reason: "forgot it", Created: now, Expires: now.Add(Lifetime), Recipient: keys().oneOff.Public(),
	}
}

const (
	idA = "000102030405060708090a0b0c0d0e0f"
	idB = "101112131415161718191a1b1c1d1e1f"
)

func openShare(t testing.TB, p *escrow.Packet, payload string) *escrow.Share {
	t.Helper()
	_, message, err := p.Share(payload, keys().trustee.Public().Fingerprint())
	if err != nil {
		t.Fatal(err)
	}
	share, err := escrow.OpenShare(message, keys().trustee, p, payload)
	if err != nil {
		t.Fatal(err)
	}
	return share
}

// approve re-seals a share for a request, and signs the approval.
func approve(t testing.TB, share *escrow.Share, signed []byte) (approval, resealed []byte) {
	t.Helper()
	digest := Digest(signed)
	resealed, err := Reseal(share, must(ParseRequest(signed)), digest, now)
	if err != nil {
		t.Fatal(err)
	}
	return must(approvalOf(digest, resealed).Sign(keys().approver)), resealed
}

func approvalOf(digest [32]byte, resealed []byte) Approval {
	return Approval{
		RequestDigest: digest, Trustee: keys().trustee.Public().Fingerprint(), ShareDigest: sha256.Sum256(resealed),
		Approver: "alice", ApproverID: keys().approver.KeyID(), Created: now,
	}
}
