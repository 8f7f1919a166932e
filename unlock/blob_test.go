package unlock

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

func pgpKey(t testing.TB) *seal.PrivateKey {
	t.Helper()
	key, err := seal.Generate("machine", epoch)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func makeBlobs(t testing.TB, set BlobSet, passphrase []byte, key *seal.PrivateKey) [][]byte {
	t.Helper()
	blobs, err := MakeBlobs(set, passphrase, key, epoch)
	if err != nil {
		t.Fatal(err)
	}
	return blobs
}

func serverID(i int) identity.KeyID {
	return identity.KeyID(strings.Repeat(fmt.Sprintf("%02x", i+1), 32))
}

// answers gives server i the blob i.
func answersOf(blobs [][]byte, servers ...int) []Answer {
	var list []Answer
	for _, i := range servers {
		list = append(list, Answer{Server: serverID(i), Blobs: [][]byte{blobs[i]}})
	}
	return list
}

func TestBlobsNofM(t *testing.T) {
	key, passphrase := pgpKey(t), secret.BootPassphrase()
	for _, c := range []struct{ n, m int }{{1, 1}, {1, 3}, {2, 2}, {2, 3}, {3, 5}, {5, 5}} {
		t.Run(fmt.Sprintf("%d of %d", c.n, c.m), func(t *testing.T) {
			blobs := makeBlobs(t, BlobSet{testKeyID, testUUID, 1, c.n, c.m}, passphrase, key)
			for subset := range 1 << c.m {
				var servers []int
				for i := range c.m {
					if subset>>i&1 == 1 {
						servers = append(servers, i)
					}
				}
				got, err := OpenBlobs(answersOf(blobs, servers...), testKeyID, testUUID, key)
				switch enough := len(servers) >= c.n; {
				case enough && (err != nil || !bytes.Equal(got, passphrase)):
					t.Errorf("servers %v: %v", servers, err)
				case !enough && (got != nil || !errors.Is(err, escrow.ErrTooFew)):
					t.Errorf("servers %v: %q, %v", servers, got, err)
				}
			}
		})
	}
}

func TestBlobsThatAreNotOurs(t *testing.T) {
	key, thief, passphrase := pgpKey(t), pgpKey(t), secret.BootPassphrase()
	set := BlobSet{testKeyID, testUUID, 1, 2, 3}
	good := makeBlobs(t, set, passphrase, key)
	notSigned, err := seal.Encrypt(goodBlob(), key.Public(), nil, epoch)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := seal.Encrypt(goodBlob(), key.Public(), thief, epoch)
	if err != nil {
		t.Fatal(err)
	}
	noBlob, err := seal.Encrypt([]byte("mandos-escrow-boot: 1\n"), key.Public(), key, epoch)
	if err != nil {
		t.Fatal(err)
	}
	other := set
	other.Machine = serverID(9)
	for name, bad := range map[string][]byte{
		"empty":           {},
		"garbage":         bytes.Repeat([]byte("garbage"), 100),
		"another key's":   makeBlobs(t, set, passphrase, thief)[1],
		"another machine": makeBlobs(t, other, passphrase, key)[1],
		"not signed":      notSigned,
		"forged":          forged,
		"another record":  noBlob,
		"too long":        append(bytes.Clone(good[1]), make([]byte, MaxBlob)...),
	} {
		t.Run(name, func(t *testing.T) {
			lie := Answer{Server: serverID(1), Blobs: [][]byte{bad}}
			got, err := OpenBlobs(append(answersOf(good, 0), lie), testKeyID, testUUID, key)
			if got != nil || !errors.Is(err, ErrBlob) || !strings.Contains(err.Error(), serverID(1).Short()) {
				t.Errorf("%q, %v; the liar is not named", got, err)
			}
			if strings.Contains(err.Error(), serverID(0).Short()) {
				t.Errorf("an honest server is named: %v", err)
			}
			got, err = OpenBlobs(append(answersOf(good, 0, 2), lie), testKeyID, testUUID, key)
			if err != nil || !bytes.Equal(got, passphrase) {
				t.Errorf("two honest servers and the liar: %v", err)
			}
		})
	}
}

func TestBlobFlipsAndCuts(t *testing.T) {
	key, passphrase := pgpKey(t), secret.BootPassphrase()
	sealed := makeBlobs(t, BlobSet{testKeyID, testUUID, 1, 1, 1}, passphrase, key)[0]
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1 << (i % 8)
		if got, err := OpenBlobs(answersOf([][]byte{changed}, 0), testKeyID, testUUID, key); err == nil && !bytes.Equal(got, passphrase) {
			t.Fatalf("byte %d: another passphrase", i)
		} else if err != nil && !errors.Is(err, ErrBlob) {
			t.Fatalf("byte %d: %v", i, err)
		}
		if _, err := OpenBlobs(answersOf([][]byte{sealed[:i]}, 0), testKeyID, testUUID, key); !errors.Is(err, ErrBlob) {
			t.Fatalf("cut to %d: %v", i, err)
		}
	}
}

func TestBlobsOfSeveralSets(t *testing.T) {
	key := pgpKey(t)
	old, current := secret.BootPassphrase(), secret.BootPassphrase()
	first := makeBlobs(t, BlobSet{testKeyID, testUUID, 1, 2, 3}, old, key)
	second := makeBlobs(t, BlobSet{testKeyID, testUUID, 2, 2, 3}, current, key)
	twin := makeBlobs(t, BlobSet{testKeyID, testUUID, 2, 2, 3}, old, key)
	elsewhere := makeBlobs(t, BlobSet{testKeyID, otherUUID, 9, 2, 3}, old, key)
	for name, c := range map[string]struct {
		answers []Answer
		want    []byte
	}{
		"the highest epoch wins":          {append(answersOf(first, 0, 1, 2), answersOf(second, 0, 2)...), current},
		"unless it is not complete":       {append(answersOf(first, 0, 1), answersOf(second, 2)...), old},
		"two epochs, none complete":       {append(answersOf(first, 0), answersOf(second, 1)...), nil},
		"two sets of one epoch":           {append(answersOf(second, 0), answersOf(twin, 1)...), nil},
		"two sets of one epoch and third": {append(answersOf(second, 0, 2), answersOf(twin, 1)...), current},
		"the same share twice":            {append(answersOf(second, 1), answersOf(second, 1)...), nil},
		"another volume":                  {append(answersOf(second, 1), answersOf(elsewhere, 0, 2)...), nil},
		"nothing":                         {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := OpenBlobs(c.answers, testKeyID, testUUID, key)
			if !bytes.Equal(got, c.want) || (c.want == nil) != errors.Is(err, escrow.ErrTooFew) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestMakeBlobsRefuses(t *testing.T) {
	key := pgpKey(t)
	for name, c := range map[string]struct {
		set        BlobSet
		passphrase []byte
	}{
		"no server":        {BlobSet{testKeyID, testUUID, 1, 1, 0}, []byte("x")},
		"too many servers": {BlobSet{testKeyID, testUUID, 1, 1, MaxServers + 1}, []byte("x")},
		"threshold 0":      {BlobSet{testKeyID, testUUID, 1, 0, 1}, []byte("x")},
		"threshold":        {BlobSet{testKeyID, testUUID, 1, 3, 2}, []byte("x")},
		"empty":            {BlobSet{testKeyID, testUUID, 1, 1, 1}, nil},
		"no machine":       {BlobSet{"", testUUID, 1, 1, 1}, []byte("x")},
	} {
		if blobs, err := MakeBlobs(c.set, c.passphrase, key, epoch); err == nil {
			t.Errorf("%s: %d blobs", name, len(blobs))
		}
	}
	largest := makeBlobs(t, BlobSet{testKeyID, testUUID, 1<<63 - 1, MaxServers, MaxServers}, bytes.Repeat([]byte{0xff}, 512), key)
	if n := len(largest[0]); n > MaxBlob {
		t.Errorf("largest blob: %d bytes", n)
	}
	var all [][]byte
	for range MaxBlobs {
		all = append(all, make([]byte, MaxBlob))
	}
	reply, err := Reply{Released: true, Nonce: secret.ID(), Blobs: all}.Bytes()
	if err != nil || len(reply) > MaxReply {
		t.Errorf("largest reply: %d bytes, %v", len(reply), err)
	}
	if _, err := (Reply{Released: true, Nonce: secret.ID(), Blobs: append(all, nil)}).Bytes(); err == nil {
		t.Error("17 blobs fit in a reply")
	}
	if _, err := (Reply{Released: true, Nonce: secret.ID(), Blobs: [][]byte{make([]byte, MaxBlob+1)}}).Bytes(); err == nil {
		t.Error("a blob that is too long fits in a reply")
	}
}

// TestBlobIsReadable: what gpg shows is the documented record.
func TestBlobIsReadable(t *testing.T) {
	key, passphrase := pgpKey(t), secret.BootPassphrase()
	sealed := makeBlobs(t, BlobSet{testKeyID, testUUID, 4, 1, 2}, passphrase, key)[1]
	plain, err := seal.Decrypt(sealed, key, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if record.Kind(plain) != blobKind {
		t.Errorf("kind %q", record.Kind(plain))
	}
	for _, line := range []string{
		"volume-uuid: " + testUUID, "epoch: 4", "index: 2", "threshold: 1", fmt.Sprintf("share: %x", passphrase),
	} {
		if !strings.Contains(string(plain), line+"\n") {
			t.Errorf("no line %q in\n%s", line, plain)
		}
	}
}
