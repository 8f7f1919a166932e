package enroll

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

// State is what stands of a machine's enrolment.
type State struct {
	Enrolled bool           `json:"enrolled"`
	Machine  string         `json:"machine,omitempty"`
	KeyID    identity.KeyID `json:"key_id,omitempty"`
	Servers  []ServerKnown  `json:"servers"`
	Volumes  []VolumeState  `json:"volumes"`
}

// ServerKnown is a server that the machine enrolled with.
type ServerKnown struct {
	Name      string         `json:"name"`
	KeyID     identity.KeyID `json:"key_id"`
	Addresses []string       `json:"addresses"`
}

// VolumeState is what stands of one volume's enrolment.
type VolumeState struct {
	UUID     string      `json:"uuid"`
	Device   string      `json:"device,omitempty"` // where it lies; "": it was not found
	Boot     bool        `json:"boot"`             // it boots unattended
	Finished bool        `json:"finished"`         // its enrolment is
	Problem  string      `json:"problem,omitempty"`
	Slots    []SlotState `json:"slots"`        // ours, once it is finished
	Others   []int       `json:"others_slots"` // that open it and are not ours
	// Behind names servers that are still to get packet and blob.
	Behind []string `json:"behind,omitempty"`
}

// SlotState is what stands of one of our keyslots.
type SlotState struct {
	Slot    int      `json:"slot"`
	Purpose string   `json:"purpose"` // boot or recovery
	State   Material `json:"state"`
}

// Material says whether a keyslot is still the one that was proved.
type Material string

// What can have become of a keyslot of ours.
const (
	Proved  Material = "as proved"
	Changed Material = "changed"
	Gone    Material = "gone"
)

// Inspect looks at what stands of the enrolment of the system below root, and
// changes nothing. What is wrong with one volume is in its Problem.
func Inspect(root string) (State, error) {
	e := &enrolment{Options: Options{Root: root}}
	s := State{Servers: []ServerKnown{}, Volumes: []VolumeState{}}
	uuids, err := e.journals()
	if err != nil {
		return s, err
	}
	if key, err := config.LoadKey(e.path(BootFolder)); err == nil {
		s.KeyID = key.KeyID()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("the boot identity: %w", err)
	}
	if _, err := os.ReadDir(e.path(RunningFolder)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, err // most likely somebody else than root
	}
	if name, err := os.ReadFile(e.namePath()); err == nil {
		s.Machine = strings.TrimSuffix(string(name), "\n")
	}
	servers, err := e.readServers()
	if err != nil {
		return s, err
	}
	for _, known := range servers {
		s.Servers = append(s.Servers, ServerKnown(known))
	}
	for _, uuid := range uuids {
		s.Volumes = append(s.Volumes, e.volumeState(uuid))
	}
	s.Enrolled = len(s.Volumes) > 0
	return s, nil
}

func (e *enrolment) volumeState(uuid string) VolumeState {
	s := VolumeState{UUID: uuid, Slots: []SlotState{}, Others: []int{}}
	j, err := e.readJournal(uuid)
	if err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Boot, s.Finished = j.boots(), j.committed
	if s.Behind, err = e.owedTo(j); err != nil {
		s.Problem = err.Error()
		return s
	}
	v, err := e.locate(uuid, j, nil)
	if err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Device = v.device
	for _, known := range []struct {
		slot    slot
		purpose string
	}{{j.boot, "boot"}, {j.recovery, "recovery"}} {
		if known.slot.number >= 0 && j.committed {
			s.Slots = append(s.Slots, SlotState{known.slot.number, known.purpose, v.materialOf(known.slot)})
		}
	}
	v.journal = j
	s.Others = append(s.Others, v.others()...)
	if err := e.matchesEnrolled(v.header); err != nil {
		s.Problem = err.Error()
	}
	return s
}

// owedTo names the servers that a finished enrolment has not reached yet.
func (e *enrolment) owedTo(j *journal) (names []string, err error) {
	owed, err := e.readUploads(j.uuid, j.packet)
	if err != nil || owed == nil || !j.committed {
		return nil, err
	}
	servers, err := e.readServers()
	for _, s := range servers {
		if _, ok := owed.blobs[s.KeyID]; ok {
			names = append(names, s.Name)
		}
	}
	return names, err
}

func (v *volume) materialOf(s slot) Material {
	if _, active := v.header.Slot(s.number); !active {
		return Gone
	}
	if v.unchanged(s) {
		return Proved
	}
	return Changed
}

// matchesEnrolled compares a header with what the boot program will compare it
// with, if it does.
func (e *enrolment) matchesEnrolled(h *luks.Header) error {
	conf, err := e.readBootConfig()
	if err != nil {
		return err
	}
	for _, pins := range conf.Volumes {
		if pins.UUID == h.UUID {
			return luks.Match(h, luks.Enrolled{
				UUID: pins.UUID, Type: pins.Type, Cipher: pins.Cipher, KeyBits: pins.KeyBits,
				Offset: pins.Offset, SectorSize: pins.SectorSize, Digest: pins.Digest,
			})
		}
	}
	return nil
}

// TellBoot tells each server, as the running identity, what became of a boot,
// unless this machine remembers that it did. It returns the names of those that
// were told now; an error names those that could not be.
func TellBoot(ctx context.Context, root string, boot unlock.Boot) (told []string, err error) {
	e := &enrolment{Options: Options{Root: root}}
	servers, err := e.readServers()
	if err != nil {
		return nil, err
	}
	var failed []error
	for _, s := range servers {
		remembered := e.path(RunningFolder, string(s.KeyID)+".boot")
		if last, err := os.ReadFile(remembered); err == nil && string(last) == boot.ID+"\n" {
			continue
		}
		err := e.tellBoot(ctx, s, boot)
		if err == nil {
			err = config.Replace(remembered, []byte(boot.ID+"\n"))
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("tell %s of this boot: %w", s.Name, err))
			continue
		}
		told = append(told, s.Name)
	}
	return told, errors.Join(failed...)
}

func (e *enrolment) tellBoot(ctx context.Context, s unlock.Server, boot unlock.Boot) error {
	key, err := config.LoadKey(e.path(RunningFolder))
	if err != nil {
		return fmt.Errorf("the running identity: %w", err)
	}
	client, err := e.dial(s, key)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Call(ctx, "POST", "/v1/self/boot", boot, nil)
}
