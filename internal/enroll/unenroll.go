package enroll

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// Errors that callers decide on.
var (
	// ErrLastWay: nothing but our keyslots opens a volume, and no passphrase was
	// given to put in their place; nothing was removed.
	ErrLastWay = errors.New("only keyslots of ours open it")
	// ErrNotTold: a server does not know yet that the machine leaves; nothing was
	// removed.
	ErrNotTold = errors.New("that this machine leaves")
	// ErrNotThere: a volume that was enrolled is not where it was; nothing was
	// removed.
	ErrNotThere = errors.New("the volume was not found")
	// ErrHeaderGone: where a volume lies there is no header that a passphrase could
	// open.
	ErrHeaderGone = errors.New("its LUKS header is gone or damaged")
)

// UnenrollOptions say how a machine is taken back.
type UnenrollOptions struct {
	Root          string
	Devices       []string // where volumes lie that are not found where they lay
	Forget        []string // UUIDs of volumes that are given up: they are not looked for
	Passphrase    []byte   // opens every volume, if given; as it was read
	NewPassphrase []byte   // for volumes that nothing but our keyslots opens
	Offline       bool     // no server is told
	Tool          cryptsetup.Tool
	Progress      func(format string, args ...any)

	// Image takes us out of the boot images. When it is called, nothing of ours is
	// in /etc/mandos-escrow any more. Done twice it is the same.
	Image func(ctx context.Context) error

	// Checkpoint, in tests, is called between any two steps that last.
	Checkpoint func(step string)
}

// Unenrolled is what became of a machine and its volumes.
type Unenrolled struct {
	Machine string           `json:"machine"`
	KeyID   identity.KeyID   `json:"key_id,omitempty"` // unknown when an earlier run got that far
	Already bool             `json:"already_unenrolled"`
	Servers []ServerTold     `json:"servers"`
	Volumes []VolumeReturned `json:"volumes"`
	Kept    []string         `json:"kept,omitempty"` // files in /etc/mandos-escrow that somebody else put there
}

// ServerTold is a server, and whether it knows that the machine left.
type ServerTold struct {
	Name    string         `json:"name"`
	KeyID   identity.KeyID `json:"key_id"`
	Told    bool           `json:"told"`
	Unknown bool           `json:"unknown,omitempty"` // it does not know the machine any more
	Packets int            `json:"packets"`           // that it keeps, if it was told
}

// VolumeReturned is what became of one volume.
type VolumeReturned struct {
	Device   string  `json:"device"`
	UUID     string  `json:"uuid"`
	Removed  []int   `json:"removed"`  // keyslots of ours
	NewSlot  int     `json:"new_slot"` // where the new passphrase is; -1: none was needed
	Doubtful []Doubt `json:"left,omitempty"`
	Given    bool    `json:"given_up,omitempty"` // it was not looked for
}

// Doubt is a keyslot that was ours and may be somebody else's now: left alone.
type Doubt struct {
	Slot int    `json:"slot"`
	Why  string `json:"why"`
}

// leaving is one volume on its way out.
type leaving struct {
	*volume
	remove []slot // with their material as it is now
	doubts []Doubt
	keep   int // a keyslot that stays, and is not ours or was proved; -1: none yet
	result VolumeReturned
}

// unenrolment is one run. The enrolment in it knows the folders and journals.
type unenrolment struct {
	*enrolment
	o       UnenrollOptions
	leaving []*leaving
	result  Unenrolled
}

// Unenroll takes back what Run did: it tells the servers, removes our keyslots
// and tokens, our files, and us from the boot images. Before anything is
// removed every volume has a way in that is not ours, or was just proved. The
// journals, which know the keyslots, go last: killed at any point and run again,
// it comes to its end. A run that finds nothing is no error.
func Unenroll(ctx context.Context, o UnenrollOptions) (Unenrolled, error) {
	if o.Checkpoint == nil {
		o.Checkpoint = func(string) {}
	}
	u := &unenrolment{o: o, enrolment: &enrolment{Options: Options{
		Root: o.Root, Passphrase: o.Passphrase, Tool: o.Tool, Progress: o.Progress, Checkpoint: o.Checkpoint,
	}}}
	u.result.Servers, u.result.Volumes = []ServerTold{}, []VolumeReturned{}
	if err := u.run(ctx); err != nil {
		return u.result, fmt.Errorf("unenroll: %w", err)
	}
	return u.result, nil
}

func (u *unenrolment) run(ctx context.Context) error {
	if info, err := os.Stat(u.Root); err != nil || !info.IsDir() {
		return fmt.Errorf("--root %s is not a folder", u.Root)
	}
	if _, err := os.Lstat(u.path(RunningFolder)); err == nil {
		lock, err := u.takeLock(ctx)
		if err != nil {
			return err
		}
		defer lock.Close()
		u.Tool.Hold = lock
	}
	if !u.anything() {
		u.result.Already = true
		return u.dropRunningFolder()
	}
	defer u.wipeAll()
	if err := u.look(ctx); err != nil {
		return err
	}
	if err := u.secureWaysIn(ctx); err != nil {
		return err
	}
	if err := u.tell(ctx); err != nil {
		return err
	}
	for _, v := range u.leaving {
		if err := u.giveBack(ctx, v); err != nil {
			return fmt.Errorf("%s: %w", v.device, err)
		}
	}
	if err := u.dropBootFolder(); err != nil {
		return err
	}
	if u.o.Image != nil {
		if err := u.o.Image(ctx); err != nil {
			return fmt.Errorf("take it out of the boot image: %w", err)
		}
		u.Checkpoint("boot image")
	}
	return u.dropRunningFolder()
}

func (u *unenrolment) wipeAll() {
	for _, v := range u.leaving {
		v.wipe()
	}
}

// bootFiles are ours in /etc/mandos-escrow, in the order in which they go:
// without the first one no boot image holds us.
var bootFiles = []string{unlock.ConfigFile, unlock.TLSPrivateKeyFile, unlock.PrivateKeyFile, unlock.TLSPublicKeyFile, unlock.PublicKeyFile}

// anything reports whether there is something to take back.
func (u *unenrolment) anything() bool {
	for _, name := range bootFiles {
		if _, err := os.Lstat(u.path(BootFolder, name)); err == nil {
			return true
		}
	}
	entries, err := os.ReadDir(u.path(RunningFolder))
	return !errors.Is(err, fs.ErrNotExist) && (err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() != lockFile }))
}

// look finds all that will be taken back, and changes nothing.
func (u *unenrolment) look(ctx context.Context) error {
	if name, err := os.ReadFile(u.namePath()); err == nil {
		u.result.Machine = strings.TrimSuffix(string(name), "\n")
	}
	if key, err := config.LoadKey(u.path(BootFolder)); err == nil {
		u.result.KeyID = key.KeyID()
	}
	if err := u.sweep(); err != nil {
		return err
	}
	if _, err := u.Tool.Version(ctx); err != nil {
		return err
	}
	uuids, err := u.journals()
	if err != nil {
		return err
	}
	for _, uuid := range uuids {
		if slices.Contains(u.o.Forget, uuid) {
			u.result.Volumes = append(u.result.Volumes, VolumeReturned{UUID: uuid, NewSlot: -1, Given: true})
			continue
		}
		v, err := u.find(uuid)
		if err == nil {
			err = u.judge(ctx, v)
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", uuid, err)
		}
		u.leaving = append(u.leaving, v)
	}
	return u.checkNames(uuids)
}

// checkNames refuses names that mean no volume, so that a typing error is not
// taken for consent.
func (u *unenrolment) checkNames(uuids []string) error {
	for _, uuid := range u.o.Forget {
		if !slices.Contains(uuids, uuid) {
			return fmt.Errorf("no volume %s is enrolled here", uuid)
		}
	}
	for _, device := range u.o.Devices {
		if !slices.ContainsFunc(u.leaving, func(v *leaving) bool { return v.device == device }) {
			return fmt.Errorf("%s is none of the volumes that were enrolled here", device)
		}
	}
	return nil
}

// journals are the UUIDs of the volumes that have one.
func (e *enrolment) journals() (uuids []string, err error) {
	entries, err := os.ReadDir(e.path(RunningFolder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, entry := range entries {
		name, ok := strings.CutPrefix(entry.Name(), "volume-")
		if uuid, isJournal := strings.CutSuffix(name, ".journal"); ok && isJournal {
			uuids = append(uuids, uuid)
		}
	}
	return uuids, nil
}

// find opens an enrolled volume where it lies now, by what its header says.
func (u *unenrolment) find(uuid string) (*leaving, error) {
	j, err := u.readJournal(uuid)
	if err != nil {
		return nil, err
	}
	v, err := u.locate(uuid, j, u.o.Devices)
	if err != nil {
		return nil, fmt.Errorf("%w; attach it, say where it lies with --device, or give it up with --forget %s: its keyslots stay as they are then", err, uuid)
	}
	v.journal = j
	return &leaving{volume: v, keep: -1, result: VolumeReturned{Device: v.device, UUID: uuid, Removed: []int{}, NewSlot: -1}}, nil
}

// locate looks at the given devices, where the volume lay when it was enrolled,
// and where udev names it.
func (e *enrolment) locate(uuid string, j *journal, devices []string) (*volume, error) {
	places := append(slices.Clone(devices), j.path)
	if conf, err := e.readBootConfig(); err == nil {
		for _, v := range conf.Volumes {
			if v.UUID == uuid {
				places = append(places, v.Path)
			}
		}
	}
	places = append(places, "/dev/disk/by-uuid/"+uuid)
	missing, failures := ErrNotThere, []error{}
	for i, place := range places {
		if place == "" || slices.Contains(places[:i], place) {
			continue
		}
		v, err := newVolume(place)
		if err == nil && v.header.UUID == uuid {
			return v, nil
		}
		if err == nil {
			err = fmt.Errorf("%w: %s is volume %s", luks.ErrMismatch, place, v.header.UUID)
		}
		if i >= len(devices) && (errors.Is(err, luks.ErrNotLUKS) || errors.Is(err, luks.ErrDamaged)) {
			missing, err = nil, fmt.Errorf("%s: %w, or it lies elsewhere now: docs/operations.md, section 11: %w", place, ErrHeaderGone, err)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			failures = append(failures, err)
		}
	}
	return nil, errors.Join(append([]error{missing}, failures...)...)
}

// judge tells the keyslots that are ours from those that may be somebody
// else's by now, and looks for one that stays.
func (u *unenrolment) judge(ctx context.Context, v *leaving) error {
	j := v.journal
	if !j.committed {
		if err := u.examineInterrupted(ctx, v.volume); err != nil {
			return fmt.Errorf("take up an interrupted enrolment: %w", err)
		}
		for _, number := range v.added {
			material, err := v.material(number)
			if err != nil {
				return err
			}
			v.remove = append(v.remove, slot{number, material})
		}
		for _, s := range j.planned() {
			if _, active := v.header.Slot(s.number); active && !slices.Contains(v.added, s.number) {
				v.doubts = append(v.doubts, Doubt{s.number, "the passphrase of the interrupted enrolment does not open it"})
			}
		}
	}
	for _, s := range j.ours() {
		_, active := v.header.Slot(s.number)
		switch {
		case !active || v.removes(s.number):
		case v.unchanged(s):
			v.remove = append(v.remove, s)
		default:
			v.doubts = append(v.doubts, Doubt{s.number, "it is not what was proved when the volume was enrolled"})
		}
	}
	// A keyslot in doubt may be damage as well as somebody's passphrase: it is no way in, unless it is opened.
	if others := v.others(); len(others) > 0 {
		v.keep = others[0]
	}
	return u.proveGiven(ctx, v)
}

// others are the keyslots that open the volume and are not ours: they stand in
// no journal, and no token says that an enrolment made them whose journal is not
// here, such as that of a system that was here before. No person knows the
// passphrase of those.
func (v *volume) others() (numbers []int) {
	marked := func(number int) bool {
		return slices.ContainsFunc(v.header.Tokens, func(t luks.Token) bool { return t.Type == TokenType && slices.Contains(t.Keyslots, number) })
	}
	for _, s := range v.header.Slots {
		if s.Bound && !v.journal.has(s.Number) && !marked(s.Number) {
			numbers = append(numbers, s.Number)
		}
	}
	return numbers
}

func (v *leaving) removes(number int) bool {
	return slices.ContainsFunc(v.remove, func(s slot) bool { return s.number == number })
}

// proveGiven tries the given passphrase, if there is one. What it opens stays,
// if it is not ours.
func (u *unenrolment) proveGiven(ctx context.Context, v *leaving) error {
	if len(u.Passphrase) == 0 {
		return nil
	}
	for _, candidate := range spellings(u.Passphrase) {
		number, err := u.Tool.Test(ctx, v.device, candidate, cryptsetup.AnySlot)
		if errors.Is(err, cryptsetup.ErrPassphrase) {
			continue
		}
		if err != nil {
			return err
		}
		v.opener = slices.Clone(candidate)
		if !v.removes(number) {
			v.keep = number
		}
		return nil
	}
	return fmt.Errorf("%w: the given one does not open %s", cryptsetup.ErrPassphrase, v.device)
}

// secureWaysIn sees to it that every volume that loses a keyslot keeps one that
// is not ours, and adds the new passphrase where there is none.
func (u *unenrolment) secureWaysIn(ctx context.Context) error {
	var locked []*leaving
	for _, v := range u.leaving {
		if len(v.remove) > 0 && v.keep < 0 {
			locked = append(locked, v)
		}
	}
	for _, v := range locked {
		if len(u.o.NewPassphrase) == 0 {
			return fmt.Errorf("%s: %w (%s), so nothing would open it any more: give a passphrase for it with --new-passphrase-file", v.device, ErrLastWay, numbers(v.remove))
		}
	}
	if err := u.fetchOpeners(ctx, locked); err != nil {
		return err
	}
	for _, v := range locked {
		if err := u.addNewPassphrase(ctx, v); err != nil {
			return fmt.Errorf("%s: the new passphrase: %w", v.device, err)
		}
	}
	return nil
}

func numbers(slots []slot) string {
	out := make([]string, len(slots))
	for i, s := range slots {
		out[i] = fmt.Sprint(s.number)
	}
	return strings.Join(out, ", ")
}

// fetchOpeners finds what opens the volumes that get a new passphrase: the given
// passphrase, that of an interrupted enrolment, or the boot passphrase, which is
// asked of the servers as at a boot.
func (u *unenrolment) fetchOpeners(ctx context.Context, volumes []*leaving) error {
	var wanted []*leaving
	for _, v := range volumes {
		switch {
		case v.opener != nil:
		case v.earlier != nil && slices.Contains(v.added, v.journal.recovery.number):
			v.opener = slices.Clone(v.earlier.recovery)
		case u.o.Offline || !v.journal.boots():
			return fmt.Errorf("%s: needs a passphrase that opens it, to add another: give --passphrase-file (the recovery passphrase will do)", v.device)
		default:
			wanted = append(wanted, v)
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	fetched, err := u.fetch(ctx, wanted)
	if err != nil {
		return fmt.Errorf("fetch the boot passphrase, to add another: %w; or give --passphrase-file with one that opens %s (the recovery passphrase will do)", err, wanted[0].device)
	}
	defer fetched.Wipe()
	for _, v := range wanted {
		v.opener = slices.Clone(fetched.Passphrases[v.header.UUID])
	}
	return nil
}

func (u *unenrolment) fetch(ctx context.Context, volumes []*leaving) (*unlock.Result, error) {
	conf, err := u.readBootConfig()
	if err != nil {
		return nil, err
	}
	id, err := config.LoadIdentity(u.path(BootFolder))
	if err != nil {
		return nil, err
	}
	client := &unlock.Client{Config: conf, Keys: unlock.Keys{TLS: id.Key, OpenPGP: id.Seal}}
	for _, v := range volumes {
		client.Volumes = append(client.Volumes, v.header.UUID)
	}
	return client.Fetch(ctx)
}

// addNewPassphrase adds it and proves it. A run before this one may have.
func (u *unenrolment) addNewPassphrase(ctx context.Context, v *leaving) error {
	number, err := u.Tool.Test(ctx, v.device, u.o.NewPassphrase, cryptsetup.AnySlot)
	if err == nil && !v.removes(number) {
		v.keep = number
		return nil
	}
	if err != nil && !errors.Is(err, cryptsetup.ErrPassphrase) {
		return err
	}
	free := v.header.Free()
	if len(free) == 0 {
		return ErrFull
	}
	// not where one of ours was, which the next run would not tell from it
	i := max(0, slices.IndexFunc(free, func(n int) bool { return !v.journal.has(n) }))
	if err := u.Tool.AddKey(ctx, v.device, cryptsetup.Key{Passphrase: v.opener}, u.o.NewPassphrase, free[i], false); err != nil {
		return err
	}
	u.Checkpoint("added the new passphrase")
	if _, err := u.Tool.Test(ctx, v.device, u.o.NewPassphrase, free[i]); err != nil {
		return err
	}
	v.keep, v.result.NewSlot = free[i], free[i]
	u.Progress("%s: new passphrase in keyslot %d, proved", v.device, free[i])
	return v.reread()
}

// tell has every server disable the machine and drop its blobs. One that does
// not know the machine any more has nothing to drop.
func (u *unenrolment) tell(ctx context.Context) error {
	servers, err := u.readServers()
	if err != nil {
		return err
	}
	if _, err := os.Lstat(u.policyPath()); err == nil && len(servers) == 0 && !u.o.Offline {
		return errors.New("it is not known any more which server this machine enrolled with: remove it there by hand, and give --offline")
	}
	var failed []error // one that does not answer keeps nobody from telling the others
	for _, s := range servers {
		told := ServerTold{Name: s.Name, KeyID: s.KeyID}
		if !u.o.Offline {
			if told.Packets, told.Unknown, err = u.tellOne(ctx, s); err != nil {
				failed = append(failed, fmt.Errorf("tell %s %w: %w", s.Name, ErrNotTold, err))
				continue
			}
			told.Told = true
			u.Progress("%s: told", s.Name)
		}
		u.result.Servers = append(u.result.Servers, told)
	}
	if len(failed) > 0 {
		return errors.Join(failed...)
	}
	u.Checkpoint("told the servers")
	return nil
}

func (u *unenrolment) tellOne(ctx context.Context, s unlock.Server) (packets int, unknown bool, err error) {
	key, err := config.LoadKey(u.path(RunningFolder))
	if err != nil {
		return 0, false, fmt.Errorf("the running identity: %w", err)
	}
	client, err := u.dial(s, key)
	if err != nil {
		return 0, false, err
	}
	defer client.Close()
	var kept api.Unenrolled
	err = client.Call(ctx, "DELETE", "/v1/self", nil, &kept)
	if api.CodeOf(err) == api.CodeRefused {
		return 0, true, nil
	}
	return kept.Packets, false, err
}

// giveBack removes our keyslots and tokens from a volume. Each keyslot is looked
// at once more, and goes only while the one that stays is there.
func (u *unenrolment) giveBack(ctx context.Context, v *leaving) error {
	for _, s := range v.remove {
		if err := v.reread(); err != nil {
			return err
		}
		if !v.unchanged(s) {
			return fmt.Errorf("keyslot %d was changed by somebody just now, so it was left alone: run this again", s.number)
		}
		if err := u.Tool.KillSlotBeside(ctx, v.device, s.number, v.keep); err != nil {
			return err
		}
		v.result.Removed = append(v.result.Removed, s.number)
		u.Progress("%s: removed keyslot %d", v.device, s.number)
		u.Checkpoint("removed a keyslot")
	}
	for _, d := range v.doubts {
		u.Progress("%s: keyslot %d was left alone: %s", v.device, d.Slot, d.Why)
	}
	v.result.Doubtful = v.doubts
	if err := u.dropOurTokens(ctx, v); err != nil {
		return err
	}
	u.result.Volumes = append(u.result.Volumes, v.result)
	return nil
}

// dropOurTokens removes our tokens: those that mark nothing any more, and those
// of this enrolment on keyslots that are in doubt.
func (u *unenrolment) dropOurTokens(ctx context.Context, v *leaving) error {
	if err := v.reread(); err != nil {
		return err
	}
	for _, t := range v.header.Tokens {
		if t.Type != TokenType {
			continue
		}
		packet := tokenPacket(t.JSON)
		if len(t.Keyslots) > 0 && (packet == "" || packet != v.journal.packet && packet != v.journal.supersedes) {
			continue // of another system on the same volume
		}
		if err := u.Tool.RemoveToken(ctx, v.device, t.ID); err != nil {
			return err
		}
		u.Checkpoint("dropped a token")
	}
	return nil
}

// dropBootFolder removes our files from /etc/mandos-escrow. What somebody else
// put there, such as hooks for the network, stays.
func (u *unenrolment) dropBootFolder() error {
	folder := u.path(BootFolder)
	if _, err := os.Lstat(folder); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range bootFiles {
		if err := config.RemoveWiped(filepath.Join(folder, name)); err != nil {
			return err
		}
		u.Checkpoint("removed a file")
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		u.result.Kept = append(u.result.Kept, filepath.Join(folder, entry.Name()))
	}
	if len(entries) > 0 {
		return nil
	}
	return removeFolder(folder)
}

// dropRunningFolder removes all that is in the agent's folder: the journals
// after everything else but the identity that may open them, and what says that
// the machine was enrolled.
func (u *unenrolment) dropRunningFolder() error {
	folder := u.path(RunningFolder)
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	last := []string{"servers", "name", unlock.TLSPrivateKeyFile, unlock.PrivateKeyFile, unlock.TLSPublicKeyFile, unlock.PublicKeyFile}
	rank := func(name string) int {
		switch i := slices.Index(last, name); {
		case name == lockFile:
			return len(last) + 2
		case i >= 0:
			return i + 2
		case strings.HasPrefix(name, "volume-"):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(entries, func(a, b os.DirEntry) int { return rank(a.Name()) - rank(b.Name()) })
	for _, entry := range entries {
		path := filepath.Join(folder, entry.Name())
		if entry.IsDir() {
			err = os.RemoveAll(path)
		} else {
			err = config.RemoveWiped(path)
		}
		if err != nil {
			return err
		}
		u.Checkpoint("removed a file")
	}
	return removeFolder(folder)
}

func removeFolder(folder string) error {
	if err := os.Remove(folder); err != nil {
		return err
	}
	return config.SyncFolder(filepath.Dir(folder))
}
