package enroll

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// TokenType is the type of the LUKS2 tokens that mark our keyslots.
const TokenType = "mandos-escrow"

// volume is one device on its way through the transaction.
type volume struct {
	device  string // as typed
	path    string // absolute
	header  *luks.Header
	journal *journal     // of an earlier run
	earlier *passphrases // that an interrupted run had made
	opener  []byte       // a passphrase that opens a slot; proved
	users   bool         // opener is the passphrase that we were given
}

func (v *volume) wipe() {
	secret.Wipe(v.opener)
	if v.earlier != nil {
		v.earlier.wipe()
	}
}

func (v *volume) reread() (err error) {
	v.header, err = luks.ReadFile(v.device)
	return err
}

// examine finds out, without changing anything, where a volume stands, and
// that what will be needed is there.
func (e *enrolment) examine(ctx context.Context, v *volume) (err error) {
	if v.journal, err = e.readJournal(v.header.UUID); err != nil {
		return err
	}
	if v.journal != nil && !v.journal.committed {
		if v.earlier, err = e.openPassphrases(v.journal.secrets); err != nil {
			return fmt.Errorf("open the journal of an interrupted enrolment: %w", err)
		}
	}
	if err := e.findOpener(ctx, v); err != nil {
		return err
	}
	needed := 2
	if e.NoBoot {
		needed = 1
	}
	if free := len(v.header.Free()) + len(e.interrupted(ctx, v)); !e.settled(v) && free < needed {
		return fmt.Errorf("%w: %d of %d are free, %d are needed; remove one that is not used with cryptsetup luksKillSlot", ErrFull, free, v.header.MaxSlots, needed)
	}
	return nil
}

// findOpener proves a passphrase: the given one, exactly as it was read, then
// without its last newline; or that of an interrupted run, which may have
// removed the given one already.
func (e *enrolment) findOpener(ctx context.Context, v *volume) error {
	candidates := [][]byte{e.Passphrase}
	if trimmed := config.TrimNewline(e.Passphrase); len(trimmed) < len(e.Passphrase) {
		candidates = append(candidates, trimmed)
	}
	given := len(candidates)
	if v.earlier != nil {
		candidates = append(candidates, v.earlier.recovery)
	}
	var last error
	for i, candidate := range candidates {
		if len(candidate) == 0 {
			continue
		}
		_, err := e.Tool.Test(ctx, v.device, candidate, cryptsetup.AnySlot)
		if err == nil {
			v.opener, v.users = slices.Clone(candidate), i < given
			return nil
		}
		if last = err; !errors.Is(err, cryptsetup.ErrPassphrase) {
			return err
		}
	}
	if e.intact(v) {
		return nil // enrolled already, and the given passphrase was removed then
	}
	if last == nil {
		return errors.New("needs a passphrase that opens it: give --passphrase-file")
	}
	return last
}

// intact reports whether a finished enrolment still stands on the volume: our
// keyslots have the material that was proved then.
func (e *enrolment) intact(v *volume) bool {
	j := v.journal
	if j == nil || !j.committed || (j.boot.number < 0) != e.NoBoot {
		return false
	}
	return e.unchanged(v, j.recovery) && (j.boot.number < 0 || e.unchanged(v, j.boot))
}

// settled reports whether there is nothing to do on the volume: a finished
// enrolment stands, and the given passphrase is not to be removed. Where it
// is, new keyslots are made, because only those can be proved.
func (e *enrolment) settled(v *volume) bool {
	return e.intact(v) && !(e.RemovePassphrase && v.users)
}

func (e *enrolment) unchanged(v *volume, s slot) bool {
	material, err := materialOf(v, s.number)
	return err == nil && material == s.material
}

func materialOf(v *volume, number int) ([32]byte, error) {
	f, err := os.Open(v.device)
	if err != nil {
		return [32]byte{}, err
	}
	defer f.Close()
	return luks.SlotMaterial(f, v.header, number)
}

// interrupted lists the keyslots that an interrupted run added: those that its
// passphrases open.
func (e *enrolment) interrupted(ctx context.Context, v *volume) []int {
	if v.earlier == nil {
		return nil
	}
	var ours []int
	for _, s := range []struct {
		number     int
		passphrase []byte
	}{{v.journal.boot.number, v.earlier.boot}, {v.journal.recovery.number, v.earlier.recovery}} {
		if _, active := v.header.Slot(s.number); !active || s.passphrase == nil {
			continue
		}
		if _, err := e.Tool.Test(ctx, v.device, s.passphrase, s.number); err == nil {
			ours = append(ours, s.number)
		}
	}
	return ours
}

// enrollVolume brings one volume to its end.
func (e *enrolment) enrollVolume(ctx context.Context, v *volume) (Result, error) {
	held, err := e.heldByServer(ctx, v)
	if err != nil {
		return Result{}, err
	}
	if j := v.journal; j != nil && held.PacketID == j.packet {
		switch {
		case e.settled(v):
			return v.result(j, true), e.writeBootConfig(v)
		case !j.committed && len(e.interrupted(ctx, v)) == j.slots():
			return e.finish(ctx, v, j, v.earlier) // only the last steps were missing
		}
	}
	if v.opener == nil {
		return Result{}, errors.New("it is enrolled, but the server does not hold its packet any more: give --passphrase-file to enroll it anew")
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

func (j *journal) slots() int {
	if j.boot.number < 0 {
		return 1
	}
	return 2
}

// rollBack removes the keyslots of an interrupted run, which its passphrases
// have just opened, so they are ours; the given passphrase has just been
// proved, so another way in remains.
func (e *enrolment) rollBack(ctx context.Context, v *volume) error {
	for _, number := range e.interrupted(ctx, v) {
		if !v.users {
			return errors.New("an interrupted enrolment must be undone, which needs a passphrase that is not ours: give --passphrase-file")
		}
		if err := e.Tool.KillSlot(ctx, v.device, number, cryptsetup.Key{Passphrase: v.opener}); err != nil {
			return err
		}
		e.Progress("%s: removed keyslot %d of an interrupted enrolment", v.device, number)
		e.Checkpoint("rolled back a slot")
	}
	if err := v.reread(); err != nil {
		return err
	}
	return e.dropTokens(ctx, v, v.journal.ours())
}

// dropTokens removes our LUKS2 tokens, but for those of the keyslots kept.
func (e *enrolment) dropTokens(ctx context.Context, v *volume, kept []slot) error {
	for _, t := range v.header.Tokens {
		isKept := slices.ContainsFunc(kept, func(s slot) bool { return slices.Contains(t.Keyslots, s.number) })
		if t.Type != TokenType || isKept {
			continue
		}
		if err := e.Tool.RemoveToken(ctx, v.device, t.ID); err != nil {
			return err
		}
		e.Checkpoint("dropped a token")
	}
	return v.reread()
}

// fresh makes new passphrases and takes them all the way.
func (e *enrolment) fresh(ctx context.Context, v *volume, held api.MachineVolume) (Result, error) {
	j := &journal{uuid: v.header.UUID, packet: secret.ID(), boot: slot{number: -1}, old: v.journal.ours()}
	if before := v.journal; before != nil {
		j.supersedes = before.supersedes
		if before.committed || held.PacketID == before.packet {
			j.supersedes = before.packet
		}
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
	if j.secrets, err = e.sealPassphrases(p, e.Now()); err != nil {
		return Result{}, err
	}
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal")
	if err := e.client.Call(ctx, "PUT", "/v1/self/volumes/"+v.header.UUID, upload, nil); err != nil {
		return Result{}, err
	}
	e.Progress("%s: packet %s stored at %s", v.device, j.packet, e.server.Name)
	e.Checkpoint("uploaded")
	if err := e.addSlots(ctx, v, j, p); err != nil {
		return Result{}, err
	}
	return e.finish(ctx, v, j, p)
}

// makeUpload reads the volume key, and seals it and the passphrases.
func (e *enrolment) makeUpload(ctx context.Context, v *volume, j *journal, p *passphrases) (api.Upload, error) {
	key, err := e.Tool.VolumeKey(ctx, v.device, v.opener)
	if err != nil {
		return api.Upload{}, err
	}
	defer secret.Wipe(key)
	if err := v.header.VerifyVolumeKey(key); err != nil {
		return api.Upload{}, err
	}
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
	if err != nil || p.boot == nil {
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

// printable is a label as a packet can carry it: any disk can have any label.
func printable(label string) string {
	if label != "" && record.Printable(label) != nil {
		return strconv.Quote(label)
	}
	return label
}

// addSlots adds our keyslots and proves that each opens. Their passphrases are
// random, so stretching them would only make boots slow.
func (e *enrolment) addSlots(ctx context.Context, v *volume, j *journal, p *passphrases) error {
	for _, s := range []struct {
		slot       *slot
		purpose    string
		passphrase []byte
	}{{&j.boot, "boot", p.boot}, {&j.recovery, "recovery", p.recovery}} {
		if s.slot.number < 0 {
			continue
		}
		if err := e.Tool.AddKey(ctx, v.device, cryptsetup.Key{Passphrase: v.opener}, s.passphrase, s.slot.number, true); err != nil {
			return err
		}
		e.Checkpoint("added the " + s.purpose + " slot")
		if v.header.Type == luks.Type2 {
			if err := e.mark(ctx, v, s.slot.number, s.purpose, j.packet); err != nil {
				return err
			}
		}
		if _, err := e.Tool.Test(ctx, v.device, s.passphrase, s.slot.number); err != nil {
			return fmt.Errorf("prove the %s passphrase: %w", s.purpose, err)
		}
		e.Progress("%s: %s passphrase in keyslot %d, proved", v.device, s.purpose, s.slot.number)
	}
	return v.reread()
}

// mark makes a LUKS2 keyslot known as ours, and the boot slot the first tried.
func (e *enrolment) mark(ctx context.Context, v *volume, number int, purpose, packet string) error {
	if purpose == "boot" {
		if err := e.Tool.SetPriority(ctx, v.device, number, luks.Prefer); err != nil {
			return err
		}
	}
	token, err := json.Marshal(map[string]any{
		"type": TokenType, "keyslots": []string{strconv.Itoa(number)}, "purpose": purpose, "packet": packet,
	})
	if err != nil {
		return err
	}
	_, err = e.Tool.ImportToken(ctx, v.device, token)
	e.Checkpoint("marked the " + purpose + " slot")
	return err
}

// finish makes a proved volume count: at the server, in the boot program's
// configuration, in the journal. Until the journal says so, the passphrases
// stay in it, and every step can be done again.
func (e *enrolment) finish(ctx context.Context, v *volume, j *journal, p *passphrases) (Result, error) {
	if err := e.writeBootConfig(v); err != nil {
		return Result{}, err
	}
	e.Checkpoint("boot configuration")
	if err := e.client.Call(ctx, "POST", "/v1/self/volumes/"+j.uuid+"/commit", api.Commit{Packet: j.packet, Boot: j.boot.number >= 0}, nil); err != nil {
		return Result{}, err
	}
	e.Checkpoint("committed at the server")
	if err := e.dropOldSlots(ctx, v, j, p); err != nil {
		return Result{}, err
	}
	if e.RemovePassphrase && v.users {
		if err := e.removePassphrase(ctx, v, p); err != nil {
			return Result{}, err
		}
	}
	var err error
	if j.recovery.material, err = materialOf(v, j.recovery.number); err != nil {
		return Result{}, err
	}
	if j.boot.number >= 0 {
		if j.boot.material, err = materialOf(v, j.boot.number); err != nil {
			return Result{}, err
		}
	}
	j.committed, j.secrets, j.old = true, nil, nil
	if err := e.writeJournal(j); err != nil {
		return Result{}, err
	}
	e.Checkpoint("journal committed")
	return v.result(j, false), nil
}

func (v *volume) result(j *journal, already bool) Result {
	return Result{Device: v.device, UUID: j.uuid, Packet: j.packet, BootSlot: j.boot.number, RecoverySlot: j.recovery.number, Already: already}
}

// removePassphrase removes every keyslot that the given passphrase opens. The
// recovery passphrase has just been proved, and is proved again by KillSlot.
func (e *enrolment) removePassphrase(ctx context.Context, v *volume, p *passphrases) error {
	for {
		number, err := e.Tool.Test(ctx, v.device, v.opener, cryptsetup.AnySlot)
		if errors.Is(err, cryptsetup.ErrPassphrase) {
			return v.reread()
		}
		if err != nil {
			return err
		}
		if err := e.Tool.KillSlot(ctx, v.device, number, cryptsetup.Key{Passphrase: p.recovery}); err != nil {
			return err
		}
		e.Progress("%s: removed the given passphrase from keyslot %d", v.device, number)
		e.Checkpoint("removed the passphrase")
	}
}

// dropOldSlots removes the keyslots of an enrolment that this one replaces. A
// slot that changed since then is left alone: it may be somebody else's now.
func (e *enrolment) dropOldSlots(ctx context.Context, v *volume, j *journal, p *passphrases) error {
	for _, s := range j.old {
		if s.number == j.boot.number || s.number == j.recovery.number || !e.unchanged(v, s) {
			continue
		}
		if err := e.Tool.KillSlot(ctx, v.device, s.number, cryptsetup.Key{Passphrase: p.recovery}); err != nil {
			return err
		}
		e.Progress("%s: removed keyslot %d of the enrolment before", v.device, s.number)
		e.Checkpoint("dropped an old slot")
		if err := v.reread(); err != nil {
			return err
		}
	}
	return e.dropTokens(ctx, v, []slot{j.boot, j.recovery})
}

// writeBootConfig writes unlock.conf with the volumes it had, as far as they
// are still enrolled for boot, and the given ones.
func (e *enrolment) writeBootConfig(added ...*volume) error {
	path := e.path(BootFolder, unlock.ConfigFile)
	conf := &unlock.Config{Machine: e.boot.Key.KeyID(), Threshold: 1, Servers: []unlock.Server{e.server}}
	if data, err := os.ReadFile(path); err == nil {
		before, err := unlock.ParseConfig(data)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		conf.Volumes = before.Volumes
	}
	for _, v := range added {
		pins := v.header.Enrolled()
		conf.Volumes = slices.DeleteFunc(conf.Volumes, func(o unlock.Volume) bool { return o.UUID == pins.UUID })
		if !e.NoBoot {
			conf.Volumes = append(conf.Volumes, unlock.Volume{
				UUID: pins.UUID, Path: v.path, Type: pins.Type, Cipher: pins.Cipher, KeyBits: pins.KeyBits,
				Offset: pins.Offset, SectorSize: pins.SectorSize, Digest: pins.Digest,
			})
		}
	}
	if len(conf.Volumes) == 0 {
		return config.Remove(path)
	}
	data, err := conf.Bytes()
	if err != nil {
		return err
	}
	return config.Replace(path, data)
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
			return filepath.Base(name)
		}
	}
	return ""
}
