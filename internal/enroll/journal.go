package enroll

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
)

// journal says which keyslots of a volume are ours. It is on disk before a
// keyslot is added: until the enrolment commits it also holds the passphrases,
// sealed to the running identity, so that a later run can prove that a slot is
// ours before it removes it. Afterwards it holds no secret.
type journal struct {
	uuid       string
	path       string // where the volume lay; "" if no record can say it
	packet     string
	supersedes string         // the packet that this one replaces, or ""
	digest     string         // SHA-256 of the packet's bytes, hex; "" in journals of before it was kept
	pins       *luks.Enrolled // what the header must still say; nil in journals of before it was kept
	newKey     bool           // a person said that the volume was encrypted anew since the packet before
	causes     causes
	committed  bool
	boot       slot
	recovery   slot
	old        []slot // of the enrolment that this one replaces, still to be removed
	sealed     []byte // the passphrases; none once committed
}

// boots reports whether the volume boots unattended.
func (j *journal) boots() bool { return j.boot.number >= 0 }

// planned are the keyslots of this enrolment.
func (j *journal) planned() []*slot {
	if !j.boots() {
		return []*slot{&j.recovery}
	}
	return []*slot{&j.boot, &j.recovery}
}

// successor is the packet that a new enrolment replaces: the newest that we
// know, or the one before it where that is what the server holds.
func (j *journal) successor(held string) string {
	switch {
	case j == nil:
		return ""
	case held == j.supersedes:
		return held
	}
	return j.packet
}

// ours are the keyslots that are ours until this enrolment is finished: what a
// committed one has, and what it has not removed yet.
func (j *journal) ours() []slot {
	if j == nil {
		return nil
	}
	all := slices.Clone(j.old)
	if j.committed {
		for _, s := range j.planned() {
			all = append(all, *s)
		}
	}
	return all
}

// has reports whether a keyslot stands in the journal, ours or not by now.
func (j *journal) has(number int) bool {
	return slices.ContainsFunc(append(slices.Clone(j.old), j.boot, j.recovery), func(s slot) bool { return s.number == number })
}

// slot is a keyslot of ours; number -1: none.
type slot struct {
	number   int
	material [32]byte // luks.SlotMaterial when it was proved; zero before
}

const maxJournal = 64 << 10

func (e *enrolment) journalPath(uuid string) string {
	return e.path(RunningFolder, "volume-"+uuid+".journal")
}

func (e *enrolment) writeJournal(j *journal) error {
	state := "prepared"
	if j.committed {
		state = "committed"
	}
	w := record.New("mandos-escrow-journal", 1).Text("volume-uuid", j.uuid).OptionalText("volume-path", j.path).Text("state", state).
		Text("packet", j.packet).OptionalText("supersedes", j.supersedes).OptionalText("packet-sha256", j.digest)
	if j.pins != nil {
		w.Text("volume-type", j.pins.Type).Text("volume-cipher", j.pins.Cipher).Uint("volume-key-bits", uint64(j.pins.KeyBits)).
			Uint("volume-offset", uint64(j.pins.Offset)).Uint("volume-sector-size", uint64(j.pins.SectorSize)).Text("volume-digest", j.pins.Digest)
	}
	if j.newKey {
		w.Uint("reencrypted", 1)
	}
	for _, server := range slices.Sorted(maps.Keys(j.causes)) {
		w.Text("rotated-for", string(server)).Time("rotated-at", j.causes[server])
	}
	for _, s := range []struct {
		name string
		slot slot
	}{{"boot", j.boot}, {"recovery", j.recovery}} {
		if s.slot.number >= 0 {
			w.Uint(s.name+"-slot", uint64(s.slot.number)).Hex(s.name+"-material", s.slot.material[:])
		}
	}
	for _, s := range j.old {
		w.Uint("old-slot", uint64(s.number)).Hex("old-material", s.material[:])
	}
	if !j.committed {
		w.Base64("sealed", j.sealed)
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.ReplaceWiped(e.journalPath(j.uuid), data)
}

// readJournal returns nil when there is none.
func (e *enrolment) readJournal(uuid string) (*journal, error) {
	path := e.journalPath(uuid)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	in := record.Parse(data, "mandos-escrow-journal", 1, maxJournal)
	j := &journal{uuid: in.Text("volume-uuid"), path: in.OptionalText("volume-path")}
	state := in.Text("state")
	j.committed = state == "committed"
	j.packet = hex.EncodeToString(in.Hex("packet", 16))
	j.supersedes = in.OptionalText("supersedes")
	j.digest = in.OptionalText("packet-sha256")
	if in.Next("volume-type") {
		j.pins = readPins(in, j.uuid)
	}
	j.newKey = in.Next("reencrypted") && in.Uint("reencrypted") == 1
	j.causes = causes{}
	for in.Next("rotated-for") {
		server, err := identity.ParseKeyID(in.Text("rotated-for"))
		if err != nil {
			in.Fail("rotated-for", err.Error())
		}
		j.causes[server] = in.Time("rotated-at")
	}
	j.boot, j.recovery = readSlot(in, "boot"), readSlot(in, "recovery")
	for in.Next("old-slot") {
		j.old = append(j.old, readSlot(in, "old"))
	}
	if !j.committed {
		j.sealed = in.Base64("sealed")
	}
	err = in.End()
	if err == nil && (j.uuid != uuid || j.recovery.number < 0 || state != "prepared" && state != "committed") {
		err = fmt.Errorf("%w: not the journal of volume %s", record.ErrFormat, uuid)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w; restore it: it tells our keyslots from others; without it (move it away) they stay where they are", path, err)
	}
	return j, nil
}

func readPins(in *record.Reader, uuid string) *luks.Enrolled {
	return &luks.Enrolled{
		UUID: uuid, Type: in.Text("volume-type"), Cipher: in.Text("volume-cipher"), KeyBits: int(min(in.Uint("volume-key-bits"), 1<<16)),
		Offset: int64(in.Uint("volume-offset")), SectorSize: int(min(in.Uint("volume-sector-size"), 1<<16)),
		Digest: hex.EncodeToString(in.Hex("volume-digest", 32)),
	}
}

func readSlot(in *record.Reader, name string) slot {
	s := slot{number: -1}
	if in.Next(name + "-slot") {
		s.number = int(min(in.Uint(name+"-slot"), 1<<16))
		copy(s.material[:], in.Hex(name+"-material", 32))
	}
	return s
}

// passphrases are the secrets of one volume.
type passphrases struct{ boot, recovery []byte }

func (p *passphrases) wipe() {
	secret.Wipe(p.boot)
	secret.Wipe(p.recovery)
}

// seal puts the passphrases into the journal, for the same machine to open.
func (j *journal) seal(p *passphrases, key *seal.PrivateKey, now time.Time) error {
	w := record.New("mandos-escrow-passphrases", 1).Field("recovery", p.recovery)
	defer w.Wipe()
	if p.boot != nil {
		w.Field("boot", p.boot)
	}
	plain, err := w.Bytes()
	if err != nil {
		return err
	}
	j.sealed, err = seal.Encrypt(plain, key.Public(), key, now)
	return err
}

// open returns the passphrases of a journal that is not committed; the caller
// wipes them.
func (j *journal) open(key *seal.PrivateKey) (*passphrases, error) {
	plain, err := seal.Decrypt(j.sealed, key, key.Public())
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(plain)
	in := record.Parse(plain, "mandos-escrow-passphrases", 1, maxJournal)
	p := &passphrases{recovery: slices.Clone(in.Field("recovery"))}
	if in.Next("boot") {
		p.boot = slices.Clone(in.Field("boot"))
	}
	if err := in.End(); err != nil {
		p.wipe()
		return nil, err
	}
	if (p.boot != nil) != j.boots() {
		p.wipe()
		return nil, fmt.Errorf("%w: passphrases of another enrolment", record.ErrFormat)
	}
	return p, nil
}
