package enroll

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// enrollVolume brings one volume to its end.
func (e *enrolment) enrollVolume(ctx context.Context, v *volume) (Result, error) {
	held, err := e.heldByServer(ctx, v)
	if err != nil {
		return Result{}, err
	}
	if j := v.journal; j != nil {
		holds := held.PacketID == j.packet && held.Boot == j.boots()
		switch sameKind := j.boots() != e.NoBoot; {
		case e.settled(v) && holds:
			if !held.Revealed || v.opener == nil {
				return e.again(ctx, v)
			}
			e.Progress("%s: its recovery passphrase was revealed, so it gets a new one", v.device)
		case v.complete() && (holds && sameKind || !v.users):
			r, err := e.resume(ctx, v, held)
			if err != nil || sameKind {
				return r, err
			}
			v.added, held.PacketID = nil, j.packet // whole, but of the other kind: replaced now
		}
	}
	if v.opener == nil {
		return Result{}, errors.New("it is enrolled, but the server does not hold all of it any more: give --passphrase-file to enroll it anew")
	}
	if err := e.rollBack(ctx, v); err != nil {
		return Result{}, err
	}
	return e.fresh(ctx, v, held)
}

func (e *enrolment) heldByServer(ctx context.Context, v *volume) (api.MachineVolume, error) {
	var all []api.MachineVolume
	if err := e.client.Call(ctx, "GET", "/v1/self", nil, &all); err != nil {
		return api.MachineVolume{}, err
	}
	for _, held := range all {
		if held.UUID == v.header.UUID {
			return held, nil
		}
	}
	return api.MachineVolume{}, nil
}

// again tells the server once more what stands: it may have removed the
// machine, but not its packets, since then.
func (e *enrolment) again(ctx context.Context, v *volume) (Result, error) {
	if err := e.writeBootConfig(v.journal.boots(), v); err != nil {
		return Result{}, err
	}
	return v.result(v.journal, true), e.commit(ctx, v.journal)
}

// resume ends an interrupted run whose keyslots are there, and were just
// proved. The server may have lost what it was sent: then it is sent again,
// because the given passphrase may be gone already.
func (e *enrolment) resume(ctx context.Context, v *volume, held api.MachineVolume) (Result, error) {
	j := v.journal
	if held.PacketID != j.packet && held.Pending != j.packet {
		upload, err := e.makeUpload(ctx, v, j, v.earlier)
		if err != nil {
			return Result{}, err
		}
		if err := e.send(ctx, v, j, upload); err != nil {
			return Result{}, err
		}
	}
	return e.finish(ctx, v, j, v.earlier)
}

// fresh makes new passphrases and takes them all the way.
func (e *enrolment) fresh(ctx context.Context, v *volume, held api.MachineVolume) (Result, error) {
	j := &journal{
		uuid: v.header.UUID, path: writable(v.path), packet: secret.ID(), supersedes: v.journal.successor(held.PacketID),
		boot: slot{number: -1}, old: v.journal.ours(),
	}
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
	upload, err := e.makeUpload(ctx, v, j, p)
	if err != nil {
		return Result{}, err
	}
	if err := j.seal(p, e.running.Seal, e.Now()); err != nil {
		return Result{}, err
	}
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal")
	if err := e.send(ctx, v, j, upload); err != nil {
		return Result{}, err
	}
	if err := e.addSlots(ctx, v, j, p); err != nil {
		return Result{}, err
	}
	return e.finish(ctx, v, j, p)
}

func (e *enrolment) send(ctx context.Context, v *volume, j *journal, upload api.Upload) error {
	if err := e.client.Call(ctx, "PUT", "/v1/self/volumes/"+j.uuid, upload, nil); err != nil {
		return err
	}
	e.Progress("%s: packet %s stored at %s", v.device, j.packet, e.server().Name)
	e.Checkpoint("uploaded")
	return nil
}

// makeUpload reads the volume key, and seals it and the passphrases.
func (e *enrolment) makeUpload(ctx context.Context, v *volume, j *journal, p *passphrases) (api.Upload, error) {
	key, err := e.Tool.VolumeKey(ctx, v.device, v.opener)
	if err != nil {
		return api.Upload{}, err
	}
	defer secret.Wipe(key)
	h, now := v.header, e.Now()
	packet, err := escrow.Make(escrow.Header{
		ID: j.packet, Supersedes: j.supersedes, Machine: e.name, KeyID: e.boot.Key.KeyID(), MachineIDHash: e.idHash,
		Volume: escrow.Volume{UUID: h.UUID, Label: printable(h.Label), ByID: byID(v.path)},
	}, e.policy, e.keys, []escrow.Payload{
		&escrow.PassphrasePayload{Passphrase: p.recovery, Slot: j.recovery.number, LUKSType: h.Type},
		&escrow.VolumeKeyPayload{
			Key: key, LUKSType: h.Type, Cipher: h.Cipher, KeyBits: 8 * len(key), DataOffset: h.Offset, SectorSize: h.SectorSize,
			DigestHash: h.Digest.Hash, DigestIterations: h.Digest.Iterations, DigestSalt: h.Digest.Salt, Digest: h.Digest.Value,
			HeaderBackup: h.Backup(),
		},
	}, e.running.Key, now)
	if err != nil || !j.boots() {
		return api.Upload{Packet: packet}, err
	}
	blobs, err := unlock.MakeBlobs(unlock.BlobSet{
		Machine: e.boot.Key.KeyID(), Volume: h.UUID, Epoch: uint64(max(now.Unix(), 1)), Threshold: 1, Servers: 1,
	}, p.boot, e.boot.Seal, now)
	if err != nil {
		return api.Upload{}, err
	}
	return api.Upload{Packet: packet, Blob: blobs[0]}, nil
}

// finish makes a proved volume count: in the boot program's configuration, at
// the server, in the journal. Until the journal says so, the passphrases stay
// in it, and every step can be done again.
func (e *enrolment) finish(ctx context.Context, v *volume, j *journal, p *passphrases) (Result, error) {
	if err := e.writeBootConfig(j.boots(), v); err != nil {
		return Result{}, err
	}
	e.Checkpoint("boot configuration")
	if err := e.commit(ctx, j); err != nil {
		return Result{}, err
	}
	e.Checkpoint("committed at the server")
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
	j.committed, j.sealed, j.old = true, nil, nil
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal committed")
	return v.result(j, false), nil
}

func (e *enrolment) commit(ctx context.Context, j *journal) error {
	return e.client.Call(ctx, "POST", "/v1/self/volumes/"+j.uuid+"/commit", api.Commit{Packet: j.packet, Boot: j.boots()}, nil)
}

func (v *volume) result(j *journal, already bool) Result {
	return Result{Device: v.device, UUID: j.uuid, Packet: j.packet, BootSlot: j.boot.number, RecoverySlot: j.recovery.number, Already: already}
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

// byID is the name of a block device under /dev/disk/by-id, or "".
func byID(path string) string {
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
