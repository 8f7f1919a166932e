package enroll

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// enrollVolume brings one volume to its end.
func (e *enrolment) enrollVolume(ctx context.Context, v *volume) (Result, error) {
	if err := e.askHeld(ctx, v); err != nil {
		return Result{}, err
	}
	if j := v.journal; j != nil {
		owed, err := e.readUploads(j.uuid, j.packet)
		if err != nil {
			return Result{}, err
		}
		done := func(p *peer) bool { return p.has(j) }
		finished, begun := e.all(done), slices.ContainsFunc(e.present(), done)
		switch sameKind := j.boots() != e.NoBoot; {
		case e.settled(v) && e.all(func(p *peer) bool { return p.has(j) || owed.owes(p.KeyID) }):
			r, err := e.again(ctx, v, owed)
			if err != nil || !e.revealed() || v.opener == nil {
				return r, err
			}
			e.Progress("%s: its recovery passphrase was revealed, or expired, so it gets a new one", v.device)
		case v.complete() && (finished && sameKind || begun && !finished || e.merged() || !v.users):
			r, err := e.resume(ctx, v, owed)
			if err != nil || sameKind {
				return r, err
			}
			v.added = nil // whole, but of the other kind: replaced now
			if err := e.askHeld(ctx, v); err != nil {
				return Result{}, err
			}
		}
	}
	if v.opener == nil {
		return Result{}, errors.New("it is enrolled, but the server does not hold all of it any more: give --passphrase-file to enroll it anew")
	}
	if err := e.catchUp(ctx, v); err != nil {
		return Result{}, err
	}
	if err := e.rollBack(ctx, v); err != nil {
		return Result{}, err
	}
	return e.fresh(ctx, v)
}

// askHeld asks the servers what they hold of a volume.
func (e *enrolment) askHeld(ctx context.Context, v *volume) error {
	return e.each(ctx, func(p *peer) error {
		var all []api.MachineVolume
		p.held = api.MachineVolume{}
		if err := p.client.Call(ctx, "GET", "/v1/self", nil, &all); err != nil {
			return err
		}
		p.held = heldOf(all, v.header.UUID)
		return nil
	})
}

func heldOf(all []api.MachineVolume, uuid string) api.MachineVolume {
	for _, held := range all {
		if held.UUID == uuid {
			return held
		}
	}
	return api.MachineVolume{}
}

// newestHeld is the packet that the servers hold: the journal's, if one does.
func (e *enrolment) newestHeld(j *journal) (packet string) {
	for _, p := range e.present() {
		if j != nil && p.held.PacketID == j.packet {
			return j.packet
		}
		packet = cmp.Or(packet, p.held.PacketID)
	}
	return packet
}

func (e *enrolment) revealed() bool {
	return slices.ContainsFunc(e.present(), func(p *peer) bool { return p.held.RotateDue() })
}

// digestOf is a packet's, as its journal has it.
func digestOf(packet []byte) string {
	sum := sha256.Sum256(packet)
	return hex.EncodeToString(sum[:])
}

// again tells the servers once more what stands: they may have removed the
// machine, but not its packets, since then. One that did not answer before gets
// what it is owed.
func (e *enrolment) again(ctx context.Context, v *volume, owed *uploads) (Result, error) {
	j := v.journal
	if err := e.writeBootConfig(j.boots(), v); err != nil {
		return Result{}, err
	}
	if err := e.send(ctx, v, j, owed, func(p *peer) bool { return !p.has(j) }); err != nil {
		return Result{}, err
	}
	if err := e.commit(ctx, j, owed, everyone); err != nil {
		return Result{}, err
	}
	return e.result(v, j, owed, true), e.keepUploads(j.uuid, owed)
}

// catchUp gives servers what they are owed of a finished enrolment that is going
// to be replaced: they would take the next packet, which names this one, for that
// of a copy of the machine.
func (e *enrolment) catchUp(ctx context.Context, v *volume) error {
	j := v.journal
	if j == nil || !j.committed {
		return nil
	}
	owed, err := e.readUploads(j.uuid, j.packet)
	if err != nil || owed == nil {
		return err
	}
	late := func(p *peer) bool { return !p.has(j) && owed.owes(p.KeyID) }
	for _, p := range slices.DeleteFunc(e.present(), func(p *peer) bool { return !late(p) }) {
		this := func(other *peer) bool { return other == p }
		if err := e.send(ctx, v, j, owed, this); err != nil {
			return err
		}
		if err := e.commit(ctx, j, owed, this); err != nil {
			return err
		}
	}
	return e.keepUploads(j.uuid, owed)
}

func everyone(*peer) bool { return true }

// resume ends an interrupted run whose keyslots are there, and were just
// proved. A server may have lost what it was sent, or never got it: then it is
// sent again, because the given passphrase may be gone already.
func (e *enrolment) resume(ctx context.Context, v *volume, owed *uploads) (Result, error) {
	j := v.journal
	lacks := func(p *peer) bool { return p.held.PacketID != j.packet && p.held.Pending != j.packet }
	if owed == nil && e.all(lacks) { // nobody has it, so it may be made of other bytes
		var err error
		if owed, err = e.makeUploads(ctx, v, j, v.earlier); err != nil {
			return Result{}, err
		}
		if err := e.keepUploads(j.uuid, owed); err != nil {
			return Result{}, err
		}
	}
	if err := e.send(ctx, v, j, owed, lacks); err != nil {
		return Result{}, err
	}
	if owed != nil { // a journal of before it was kept
		j.digest = digestOf(owed.data)
	}
	if err := e.markMissing(ctx, v, j); err != nil {
		return Result{}, err
	}
	return e.finish(ctx, v, j, v.earlier, owed)
}

// fresh makes new passphrases and takes them all the way.
func (e *enrolment) fresh(ctx context.Context, v *volume) (Result, error) {
	j := &journal{
		uuid: v.header.UUID, path: writable(v.path), packet: secret.ID(), supersedes: v.journal.successor(e.newestHeld(v.journal)),
		boot: slot{number: -1}, old: v.journal.ours(), newKey: e.newKey || v.journal != nil && !v.journal.committed && v.journal.newKey,
	}
	if v.journal != nil {
		j.causes = v.journal.causes
	}
	j.causes = j.causes.and(e.causes, e.Now())
	pins := v.header.Enrolled()
	j.pins = &pins
	p := &passphrases{recovery: escrow.NewRecoveryPassphrase()}
	defer p.wipe()
	free := v.header.Free()
	if !e.NoBoot {
		p.boot = secret.BootPassphrase()
		if len(free) > 0 {
			j.boot.number, free = free[0], free[1:]
		}
	}
	if len(free) == 0 {
		return Result{}, ErrFull
	}
	j.recovery.number = free[0]
	owed, err := e.makeUploads(ctx, v, j, p)
	if err != nil {
		return Result{}, err
	}
	if err := j.seal(p, e.running.Seal, e.Now()); err != nil {
		return Result{}, err
	}
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	if err := e.keepUploads(j.uuid, owed); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal")
	if err := e.send(ctx, v, j, owed, everyone); err != nil {
		return Result{}, err
	}
	if err := e.addSlots(ctx, v, j, p); err != nil {
		return Result{}, err
	}
	return e.finish(ctx, v, j, p, owed)
}

// errOwed: what a server must be sent is not here any more.
var errOwed = errors.New("it lacks the packet, and what it must be sent is gone: run this again with --passphrase-file")

// send gives each server that is wanted its part. One that cannot be given it is
// left out, as one that does not answer.
func (e *enrolment) send(ctx context.Context, v *volume, j *journal, owed *uploads, wanted func(*peer) bool) error {
	return e.each(ctx, func(p *peer) error {
		if !wanted(p) {
			return nil
		}
		if !owed.owes(p.KeyID) {
			p.away = fmt.Errorf("%s: %w", p.Name, errOwed)
			return nil
		}
		upload := api.Upload{Packet: owed.data, Blob: owed.blobs[p.KeyID]}
		if upload.Blob != nil {
			upload.Boot = e.holders()
		}
		if err := p.client.Call(ctx, "PUT", "/v1/self/volumes/"+j.uuid, upload, nil); err != nil {
			return err
		}
		e.Progress("%s: packet %s stored at %s", v.device, j.packet, p.Name)
		e.Checkpoint("uploaded")
		return nil
	})
}

// makeUploads reads the volume key, and seals it and the passphrases: one packet
// for all servers, and a share of the boot passphrase for each.
func (e *enrolment) makeUploads(ctx context.Context, v *volume, j *journal, p *passphrases) (*uploads, error) {
	key, err := e.Tool.VolumeKey(ctx, v.device, v.opener)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(key)
	h, now := v.header, e.Now()
	escrowed := &escrow.VolumeKeyPayload{
		Key: key, LUKSType: h.Type, Cipher: h.Cipher, KeyBits: 8 * len(key), DataOffset: h.Offset, SectorSize: h.SectorSize,
		DigestHash: h.Digest.Hash, DigestIterations: h.Digest.Iterations, DigestSalt: h.Digest.Salt, Digest: h.Digest.Value,
		HeaderBackup: h.Backup(),
	}
	without, err := AddFingerprint(escrowed, v.device)
	if err != nil {
		return nil, err
	}
	if without != nil {
		e.Progress("%s: no fingerprint of the data: %v", v.device, without)
	}
	packet, err := escrow.Make(escrow.Header{
		ID: j.packet, Supersedes: j.supersedes, Machine: e.name, KeyID: e.boot.Key.KeyID(), MachineIDHash: e.idHash,
		Volume: escrow.Volume{UUID: h.UUID, Label: printable(h.Label), ByID: ByID(v.path)},
	}, e.policy, e.trusteeKeys(), []escrow.Payload{
		&escrow.PassphrasePayload{Passphrase: p.recovery, Slot: j.recovery.number, LUKSType: h.Type},
		escrowed,
	}, e.running.Key, now)
	if err != nil {
		return nil, err
	}
	j.digest = digestOf(packet)
	owed := &uploads{packet: j.packet, data: packet, blobs: map[identity.KeyID][]byte{}}
	blobs := make([][]byte, len(e.peers)) // none
	if j.boots() {
		blobs, err = unlock.MakeBlobs(unlock.BlobSet{
			Machine: e.boot.Key.KeyID(), Volume: h.UUID, Epoch: uint64(max(now.Unix(), 1)),
			Threshold: e.Token.BootThreshold(), Servers: len(e.peers),
		}, p.boot, e.boot.Seal, now)
		if err != nil {
			return nil, err
		}
	}
	for i, p := range e.peers {
		owed.blobs[p.KeyID] = blobs[i]
	}
	return owed, nil
}

// finish makes a proved volume count: in the boot program's configuration, at as
// many servers as it needs, in the journal. Until the journal says so, the
// passphrases stay in it, and every step can be done again. Nothing that was
// there before is removed earlier.
func (e *enrolment) finish(ctx context.Context, v *volume, j *journal, p *passphrases, owed *uploads) (Result, error) {
	if err := e.writeBootConfig(j.boots(), v); err != nil {
		return Result{}, err
	}
	e.Checkpoint("boot configuration")
	if err := e.commit(ctx, j, owed, everyone); err != nil {
		return Result{}, err
	}
	if err := e.dropOldSlots(ctx, v, j, p); err != nil {
		return Result{}, err
	}
	if e.RemovePassphrase && v.users {
		if err := e.removePassphrase(ctx, v, j, p); err != nil {
			return Result{}, err
		}
	}
	for _, s := range j.planned() {
		var err error
		if s.material, err = v.material(s.number); err != nil {
			return Result{}, err
		}
	}
	if j.pins == nil { // of before they were kept
		pins := v.header.Enrolled()
		j.pins = &pins
	}
	j.committed, j.sealed, j.old = true, nil, nil
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	if err := e.keepUploads(j.uuid, owed); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal committed")
	return e.result(v, j, owed, false), nil
}

// commit makes packet and blob count at each server that is wanted and answers;
// from then on it is owed nothing.
func (e *enrolment) commit(ctx context.Context, j *journal, owed *uploads, wanted func(*peer) bool) error {
	return e.each(ctx, func(p *peer) error {
		if !wanted(p) {
			return nil
		}
		err := p.client.Call(ctx, "POST", "/v1/self/volumes/"+j.uuid+"/commit", api.Commit{Packet: j.packet, Boot: j.boots(), NewVolumeKey: j.newKey}, nil)
		if err != nil {
			return err
		}
		if owed != nil {
			delete(owed.blobs, p.KeyID)
		}
		e.Checkpoint("committed at the server")
		return nil
	})
}

func (e *enrolment) result(v *volume, j *journal, owed *uploads, already bool) Result {
	r := Result{Device: v.device, UUID: j.uuid, Packet: j.packet, BootSlot: j.boot.number, RecoverySlot: j.recovery.number, Already: already}
	if r.Behind = e.behind(owed); len(r.Behind) > 0 {
		e.Progress("%s: enrolled without %s, which did not answer and follows: run the same command again, with a token that is still valid there", v.device, strings.Join(r.Behind, ", "))
	}
	return r
}

// printable is a label as a packet can carry it: any disk can have any label.
func printable(label string) string {
	if label != "" && record.Printable(label) != nil {
		return strconv.Quote(label)
	}
	return label
}

// writable is a path as a record can carry it, or "".
func writable(path string) string {
	if record.Printable(path) != nil {
		return ""
	}
	return path
}

// ByID is the name of a block device under /dev/disk/by-id, or "".
func ByID(path string) string {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return ""
	}
	names, err := filepath.Glob("/dev/disk/by-id/*")
	if err != nil {
		return ""
	}
	for _, name := range names {
		if target, err := filepath.EvalSymlinks(name); err == nil && target == real {
			return printable(filepath.Base(name))
		}
	}
	return ""
}
