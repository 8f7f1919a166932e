package unlock

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// ErrBlob: a sealed blob is damaged, is not this machine's own, or is of
// another machine or volume than was asked for.
var ErrBlob = errors.New("not a sealed blob of this machine")

const (
	blobKind       = "mandos-escrow-blob"
	commitmentInfo = "mandos-escrow blob 1 commitment"
)

// BlobSet says what the sealed blobs of one volume have in common. A later
// set of the volume has a higher epoch. With threshold N of M servers, N blobs
// give the passphrase; with N = 1 each of them holds it.
type BlobSet struct {
	Machine   identity.KeyID
	Volume    string // UUID
	Epoch     uint64
	Threshold int
	Servers   int
}

// MakeBlobs seals a boot passphrase, or its shares, to the machine's own key
// and signs them with it. The passphrase must be random. Blob i is for the
// server i; the order of the servers is free.
func MakeBlobs(set BlobSet, passphrase []byte, key *seal.PrivateKey, now time.Time) ([][]byte, error) {
	if set.Servers < 1 || set.Servers > MaxServers {
		return nil, fmt.Errorf("unlock: blobs for %d servers; 1 to %d are possible", set.Servers, MaxServers)
	}
	parts, err := escrow.Split(passphrase, set.Threshold, set.Servers, commitmentInfo)
	if err != nil {
		return nil, fmt.Errorf("unlock: make blobs: %w", err)
	}
	blobs := make([][]byte, 0, len(parts))
	for _, part := range parts {
		defer part.Wipe()
		blob, err := set.seal(part, key, now)
		if err != nil {
			return nil, fmt.Errorf("unlock: make blob %d: %w", part.Index, err)
		}
		blobs = append(blobs, blob)
	}
	return blobs, nil
}

func (set BlobSet) seal(part *escrow.Part, key *seal.PrivateKey, now time.Time) ([]byte, error) {
	w := record.New(blobKind, 1)
	defer w.Wipe()
	w.Text("machine-key-id", string(set.Machine)).Text("volume-uuid", set.Volume).Uint("epoch", set.Epoch)
	part.Write(w)
	plain, err := w.Bytes()
	if err != nil {
		return nil, err
	}
	blob, err := seal.Encrypt(plain, key.Public(), key, now)
	if err == nil && len(blob) > MaxBlob {
		err = fmt.Errorf("%d bytes, at most %d are possible", len(blob), MaxBlob)
	}
	return blob, err
}

// blob is a sealed blob that was opened.
type blob struct {
	machine identity.KeyID
	volume  string
	epoch   uint64
	part    *escrow.Part
}

// openBlob takes nothing that the machine did not sign for itself.
func openBlob(sealed []byte, machine identity.KeyID, key *seal.PrivateKey) (*blob, error) {
	if len(sealed) > MaxBlob {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrBlob, MaxBlob)
	}
	plain, err := seal.Decrypt(sealed, key, key.Public())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBlob, err)
	}
	defer secret.Wipe(plain)
	b, err := parseBlob(plain)
	if err != nil {
		return nil, err
	}
	if b.machine != machine {
		b.part.Wipe()
		return nil, fmt.Errorf("%w: it is of machine %s", ErrBlob, b.machine.Short())
	}
	return b, nil
}

// parseBlob reads a blob's plaintext, and checks its share as far as one share
// can be checked.
func parseBlob(plain []byte) (*blob, error) {
	r := record.Parse(plain, blobKind, 1, MaxBlob)
	b := &blob{
		machine: identity.KeyID(r.Text("machine-key-id")),
		volume:  r.Text("volume-uuid"),
		epoch:   r.Uint("epoch"),
		part:    escrow.ReadPart(r),
	}
	checkKeyID(r, "machine-key-id", b.machine)
	checkUUID(r, b.volume)
	err := r.End()
	if err == nil {
		err = checkPart(b.part)
	}
	if err != nil {
		b.part.Wipe()
		return nil, fmt.Errorf("%w: %w", ErrBlob, err)
	}
	return b, nil
}

// checkPart combines a share alone: a sound one is enough, or one too few.
func checkPart(part *escrow.Part) error {
	whole, err := escrow.Combine([]*escrow.Part{part}, commitmentInfo)
	secret.Wipe(whole)
	if errors.Is(err, escrow.ErrTooFew) {
		return nil
	}
	return err
}

// Answer is what one server released.
type Answer struct {
	Server identity.KeyID
	Nonce  string // of the release
	Blobs  [][]byte
}

// open opens an answer's blobs. It returns the good ones also with an error,
// which names the server.
func (a Answer) open(machine identity.KeyID, key *seal.PrivateKey) ([]*blob, error) {
	var blobs []*blob
	var faults []error
	for _, sealed := range a.Blobs {
		b, err := openBlob(sealed, machine, key)
		if err != nil {
			faults = append(faults, fmt.Errorf("server %s: %w", a.Server.Short(), err))
			continue
		}
		blobs = append(blobs, b)
	}
	return blobs, joinErrors(faults...)
}

// OpenBlobs gives back a volume's passphrase from what servers released. When
// they have different sets, the highest epoch of which there are enough wins.
// A bad blob does not hinder it while there are enough others; otherwise the
// error names the servers that gave one (ErrBlob), or is escrow.ErrTooFew.
func OpenBlobs(answers []Answer, machine identity.KeyID, volume string, key *seal.PrivateKey) ([]byte, error) {
	var blobs []*blob
	defer func() { wipeBlobs(blobs) }()
	var faults []error
	for _, a := range answers {
		opened, err := a.open(machine, key)
		if err != nil {
			faults = append(faults, err)
		}
		blobs = append(blobs, opened...)
	}
	passphrase, err := combine(blobs, volume)
	if err != nil {
		return nil, fmt.Errorf("unlock: volume %s: %w", volume, joinErrors(append(faults, err)...))
	}
	return passphrase, nil
}

// combine returns escrow.ErrTooFew while no set of the volume is complete.
func combine(blobs []*blob, volume string) ([]byte, error) {
	type setKey struct {
		epoch uint64
		set   [32]byte
	}
	sets := map[setKey][]*escrow.Part{}
	for _, b := range blobs {
		k := setKey{b.epoch, b.part.SetDigest()}
		if b.volume == volume && !slices.ContainsFunc(sets[k], func(p *escrow.Part) bool { return p.Index == b.part.Index }) {
			sets[k] = append(sets[k], b.part)
		}
	}
	var keys []setKey
	for k := range sets {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b setKey) int { return cmp.Compare(b.epoch, a.epoch) })
	err := fmt.Errorf("%w: none is there", escrow.ErrTooFew)
	for i, k := range keys {
		passphrase, failed := escrow.Combine(sets[k], commitmentInfo)
		if failed == nil {
			return passphrase, nil
		}
		if i == 0 {
			err = failed
		}
	}
	return nil, err
}

func wipeBlobs(blobs []*blob) {
	for _, b := range blobs {
		b.part.Wipe()
	}
}
