package enroll

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// journal says which keyslots of a volume are ours. It is on disk before a
// keyslot is added: until the enrolment commits it also holds the passphrases,
// sealed to the running identity, so that a later run can prove that a slot is
// ours before it removes it. Afterwards it holds no secret.
type journal struct {
	uuid       string
	packet     string
	supersedes string // the packet that this one replaces, or ""
	committed  bool
	boot       slot
	recovery   slot
	old        []slot // of the enrolment that this one replaces, still to be removed
	secrets    []byte // sealed; none once committed
}

// ours are the keyslots that are ours until this enrolment is finished: what a
// committed one has, and what it has not removed yet.
func (j *journal) ours() []slot {
	if j == nil {
		return nil
	}
	all := slices.Clone(j.old)
	if j.committed {
		all = append(all, j.boot, j.recovery)
	}
	return slices.DeleteFunc(all, func(s slot) bool { return s.number < 0 })
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
	w := record.New("mandos-escrow-journal", 1).Text("volume-uuid", j.uuid).Text("state", state).
		Text("packet", j.packet).OptionalText("supersedes", j.supersedes)
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
		w.Base64("sealed", j.secrets)
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.Replace(e.journalPath(j.uuid), data)
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
	j := &journal{uuid: in.Text("volume-uuid")}
	state := in.Text("state")
	j.committed = state == "committed"
	j.packet = hex.EncodeToString(in.Hex("packet", 16))
	j.supersedes = in.OptionalText("supersedes")
	j.boot, j.recovery = readSlot(in, "boot"), readSlot(in, "recovery")
	for in.Next("old-slot") {
		j.old = append(j.old, readSlot(in, "old"))
	}
	if !j.committed {
		j.secrets = in.Base64("sealed")
	}
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if j.uuid != uuid || state != "prepared" && state != "committed" {
		return nil, fmt.Errorf("%s: %w: not the journal of volume %s", path, record.ErrFormat, uuid)
	}
	return j, nil
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

func (e *enrolment) sealPassphrases(p *passphrases, now time.Time) ([]byte, error) {
	w := record.New("mandos-escrow-passphrases", 1).Field("recovery", p.recovery)
	defer w.Wipe()
	if p.boot != nil {
		w.Field("boot", p.boot)
	}
	plain, err := w.Bytes()
	if err != nil {
		return nil, err
	}
	return seal.Encrypt(plain, e.running.Seal.Public(), e.running.Seal, now)
}

func (e *enrolment) openPassphrases(sealed []byte) (*passphrases, error) {
	plain, err := seal.Decrypt(sealed, e.running.Seal, e.running.Seal.Public())
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(plain)
	in := record.Parse(plain, "mandos-escrow-passphrases", 1, maxJournal)
	p := &passphrases{recovery: append([]byte(nil), in.Field("recovery")...)}
	if in.Next("boot") {
		p.boot = append([]byte(nil), in.Field("boot")...)
	}
	return p, in.End()
}
