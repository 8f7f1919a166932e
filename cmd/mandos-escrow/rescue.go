package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// errDenied: somebody said no to a rescue.
var errDenied = errors.New("the request was denied")

// How often a rescue system asks whether it was approved: soon at first, for who
// reads the words while the other one types.
const (
	firstPoll = time.Second
	lastPoll  = 5 * time.Second
)

// runInvite makes a rescue invite at every server that holds the volume's packet:
// each makes its own part.
func runInvite(ctx context.Context, g *globals, o recoverOptions) error {
	if o.volume == "" || (o.out == "") == !o.text {
		return usage("recover --invite needs --volume, and --out FILE or --text")
	}
	if o.lifetime < time.Minute || o.lifetime > recovery.MaxRescueLifetime {
		return usage("--lifetime %s: from 1m to %s", o.lifetime, recovery.MaxRescueLifetime)
	}
	if o.reason != "" {
		if err := checkPrintable("--reason", o.reason); err != nil {
			return err
		}
	}
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	found, err := c.findPacket(ctx, g, o)
	if err != nil {
		return err
	}
	invite, expires, err := found.invite(ctx, g, o)
	if err != nil {
		return err
	}
	defer invite.Wipe()
	text, err := inviteText(invite, o.text)
	if err != nil {
		return err
	}
	if o.text {
		o.out = "-"
	}
	if err := g.write(o.out, text); err != nil {
		return err
	}
	g.say("for one rescue of volume %s of %s, until %s; whoever uses it first may ask, and you may not approve it", safe(invite.Volume), safe(found.brief.Machine), when(expires))
	g.say("on the rescue system: mandos-escrow recover --request --device DEV --invite FILE --reason WHY (- for FILE: typed)")
	return nil
}

func inviteText(invite *api.RescueInvite, typed bool) ([]byte, error) {
	if !typed {
		text, err := invite.Text()
		return []byte(text + "\n"), err
	}
	data, err := invite.Typed()
	lines := escrow.Lines(data)
	if err == nil && lines == nil {
		err = fmt.Errorf("%w: an invite of %d servers is too long to be typed; use --out, or name one with --server", escrow.ErrLimit, len(invite.Servers))
	}
	return []byte(strings.Join(lines, "\n") + "\n"), err
}

// invite has the servers make their parts, and compares them with what this home
// has pinned. They must be enough to open the packet.
func (f *candidate) invite(ctx context.Context, g *globals, o recoverOptions) (*api.RescueInvite, time.Time, error) {
	in := api.NewRescue{Volume: f.brief.Volume.UUID, Reason: o.reason, Lifetime: o.lifetime}
	answers := askAll(f.holders, func(s *session) (out api.NewRescueInvite, err error) {
		if err := s.Call(ctx, "POST", "/v1/rescues", in, &out); err != nil {
			return out, err
		}
		_, err = s.checkedRescue(out.Text, f.brief.Volume.UUID)
		return out, err
	})
	made, err := good(g, answers)
	if err != nil {
		return nil, time.Time{}, err
	}
	whole := &api.RescueInvite{Volume: f.brief.Volume.UUID}
	var at circle
	var expires time.Time
	for _, a := range made {
		part, err := a.checkedRescue(a.value.Text, whole.Volume)
		if err != nil {
			return nil, expires, err
		}
		whole.Servers, at = append(whole.Servers, part), append(at, a.session)
		if expires.IsZero() || a.value.Expires.Before(expires) {
			expires = a.value.Expires
		}
	}
	if reached := at.reach(&f.brief.Header); reached < f.brief.Threshold {
		return nil, expires, fmt.Errorf("the servers of %d trustees made an invite, and %d are needed: %w", reached, f.brief.Threshold, worst(answers))
	}
	f.warnAlone(ctx, g, at)
	return whole, expires, nil
}

// warnAlone warns of an invite that nobody could approve: who made it may not. A
// server that does not say who its people are is taken for one that has others.
func (f *candidate) warnAlone(ctx context.Context, g *globals, at circle) {
	var able, alone circle
	for _, a := range callAll[[]api.AdminInfo](ctx, at, "GET", "/v1/admins", nil) {
		if a.err == nil && !slices.ContainsFunc(a.value, func(p api.AdminInfo) bool {
			return !p.Removed && p.Name != a.membership.Name && store.Role(p.Role).Allows(store.Approver)
		}) {
			alone = append(alone, a.session)
			continue
		}
		able = append(able, a.session)
	}
	if able.reach(&f.brief.Header) < f.brief.Threshold {
		g.warn(fmt.Sprintf("nobody may approve this rescue at %s: who made its invite may not, and there is no other approver; `mandos-escrow admin add NAME --role approver` there makes one", alone.names()))
	}
}

// checkedRescue is checkedInvite for one server's part of a rescue invite.
func (s *session) checkedRescue(text, volume string) (part api.RescueServer, err error) {
	invite, err := api.ParseRescueInvite([]byte(text))
	if err != nil {
		return part, err
	}
	pinned := s.membership
	if len(invite.Servers) != 1 || invite.Volume != volume || invite.Servers[0].KeyID != pinned.Server.KeyID || invite.Servers[0].PolicyDigest != pinned.Policy.Digest() {
		return part, fmt.Errorf("%w: the server made a rescue invite for another policy, server or volume", errForeign)
	}
	part = invite.Servers[0]
	part.Server = pinned.Server // as this home reaches it
	return part, nil
}

// rescue is one run on a rescue system. Its folder holds what makes the next run
// go on: an identity, the request with its one-off key, and what was collected.
type rescue struct {
	g          *globals
	o          recoverOptions
	invite     *api.RescueInvite
	home       config.Home
	passphrase []byte
	expires    time.Time // of the invite, as the servers say
	warned     map[string]bool
}

// runRescue asks for a volume's packet by a rescue invite, waits, and puts a new
// passphrase on the volume. What can be refused without a server is refused first.
func runRescue(ctx context.Context, g *globals, o recoverOptions) error {
	if o.device == "" || o.inviteFile == "" || strings.TrimSpace(o.reason) == "" {
		return usage("recover --request --invite FILE needs --device DEV and --reason")
	}
	if o.volume != "" || o.out != "" || o.phone {
		return usage("a rescue restores onto --device, of the volume of its invite: leave --volume, --out and --phone out")
	}
	if err := o.checkRequest(); err != nil {
		return err
	}
	invite, err := readRescueInvite(g, o.inviteFile)
	if err != nil {
		return err
	}
	defer invite.Wipe()
	headerGone, err := invitedVolume(invite, o.device, o.how)
	if err != nil {
		return err
	}
	if o.volume = invite.Volume; headerGone {
		o.payload = escrow.ForVolumeKey // nothing else brings it back
	}
	r := &rescue{g: g, o: o, invite: invite, warned: map[string]bool{}}
	defer func() { secret.Wipe(r.passphrase) }()
	if r.passphrase, err = g.newSecret(o.newPassphraseFile, "--new-passphrase-file", "New passphrase of the volume: "); err != nil {
		return err
	}
	if r.home, err = rescueHome(g.home, invite); err != nil {
		return err
	}
	err = r.run(ctx)
	if err == nil || errors.Is(err, errDenied) || errors.Is(err, recovery.ErrRescueOver) {
		return errors.Join(err, r.home.Destroy())
	}
	if ids, listed := r.home.Requests(); listed == nil && len(ids) == 0 { // nothing to go on with
		return errors.Join(err, r.home.Destroy())
	}
	g.say("to go on, run the same command again; what it needs is kept in %s", r.home.Dir)
	return err
}

// readRescueInvite reads an invite as a file has it, or as it was typed.
func readRescueInvite(g *globals, path string) (*api.RescueInvite, error) {
	text, err := config.ReadInput(path, g.in, nil) // of use to one key
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(text)
	if bytes.HasPrefix(bytes.TrimSpace(text), []byte("me")) || bytes.Contains(text, []byte("mer1.")) {
		invite, err := api.ParseRescueInvite(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return invite, nil
	}
	data, err := escrow.ParseLines(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer secret.Wipe(data)
	invite, err := api.ParseTypedRescue(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return invite, nil
}

// invitedVolume refuses a device that cannot be restored, or holds another volume
// than the invite's. Of one whose header is gone, and may be written anew, only the
// invite says which it is; what is on it is compared with the volume key.
func invitedVolume(invite *api.RescueInvite, device string, how restoreOptions) (headerGone bool, err error) {
	header, err := luks.ReadFile(device)
	if err != nil {
		return true, how.gone(device, err)
	}
	if header.UUID != invite.Volume {
		return false, fmt.Errorf("%w: the invite is for volume %s, %s is volume %s", errOtherVolume, invite.Volume, device, header.UUID)
	}
	return false, how.ready(device)
}

// rescueHome makes or finds the folder of a run: below --home, or in memory, where
// nobody else can read it.
func rescueHome(below string, invite *api.RescueInvite) (config.Home, error) {
	data, err := invite.Typed()
	if err != nil {
		return config.Home{}, err
	}
	defer secret.Wipe(data)
	sum := sha256.Sum256(append([]byte("mandos-escrow rescue "), data...))
	if below != "" {
		dir := filepath.Join(below, fmt.Sprintf("rescue-%x", sum[:8]))
		return config.Home{Dir: dir}, os.MkdirAll(dir, 0o700)
	}
	dir := filepath.Join(memoryFolder(os.Getenv("XDG_RUNTIME_DIR"), os.Geteuid()), fmt.Sprintf("mandos-escrow-rescue-%x", sum[:8]))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return config.Home{}, fmt.Errorf("a folder in memory for the rescue: %w; name one with --home", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return config.Home{}, err
	}
	if owner(info) != os.Geteuid() || !info.IsDir() || info.Mode().Perm() != 0o700 {
		return config.Home{}, fmt.Errorf("%s is somebody else's: name a folder with --home", dir)
	}
	return config.Home{Dir: dir}, nil
}

// memoryFolder is where folders in memory are. runtime, of the environment, counts
// only if it is uid's: with su or sudo it may be that of somebody else, who could
// exchange what stands in it.
func memoryFolder(runtime string, uid int) string {
	if info, err := os.Lstat(runtime); err == nil && info.IsDir() && owner(info) == uid {
		return runtime
	}
	if uid == 0 {
		return "/run"
	}
	return "/dev/shm"
}

// owner is a file's owner, or -1.
func owner(info fs.FileInfo) int {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(stat.Uid)
	}
	return -1
}

func (r *rescue) run(ctx context.Context) error {
	opened, err := r.collected(ctx)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if opened.Header.Volume.UUID != r.invite.Volume {
		return fmt.Errorf("%w: the invite is for volume %s, what was released is of volume %s", errOtherVolume, r.invite.Volume, opened.Header.Volume.UUID)
	}
	if err := restore(ctx, r.g, opened, r.o.device, r.passphrase, r.o.how); err != nil {
		return err
	}
	r.g.say("this rescue is over, and its identity is deleted; ask for a new invite if another one is needed")
	return nil
}

// collected goes on where the last run ended, and returns what opens the volume
// once enough people approved.
func (r *rescue) collected(ctx context.Context) (*escrow.Opened, error) {
	if opened, err := r.kept(ctx); opened != nil || err != nil {
		return opened, err
	}
	c, err := r.join(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { c.close() }()
	id, expires, err := r.asked(ctx, c)
	if err != nil {
		return nil, err
	}
	until := expires
	if r.o.wait > 0 && time.Now().Add(r.o.wait).Before(until) {
		until = time.Now().Add(r.o.wait)
	}
	for pause := firstPoll; ; pause = min(pause+firstPoll, lastPoll) {
		opened, err := r.look(ctx, c, id)
		if opened != nil || err != nil && !errors.Is(err, recovery.ErrNotApproved) && !errors.Is(err, api.ErrUnreachable) {
			return opened, err
		}
		switch now := time.Now(); {
		case !now.Before(expires):
			return nil, recovery.ErrExpired
		case r.o.noWait || !now.Add(pause).Before(until):
			return nil, err
		}
		r.tell(err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, errors.New("interrupted")
		}
		if len(c) < len(r.invite.Servers) { // one that did not answer may be back
			if more, err := r.join(ctx); err == nil {
				c.close()
				c = more
			}
		}
	}
}

// tell shows once why it is still waited.
func (r *rescue) tell(err error) {
	if text := err.Error(); !r.warned[text] {
		r.warned[text] = true
		r.g.say("waiting: %s", text)
	}
}

// kept opens what an earlier run collected whole; nil if none did.
func (r *rescue) kept(ctx context.Context) (*escrow.Opened, error) {
	ids, err := r.home.Requests()
	if err != nil || len(ids) != 1 {
		return nil, err
	}
	rel, err := newRelease(r.home, ids[0])
	if err != nil {
		return nil, err
	}
	defer rel.wipe()
	if !rel.complete() {
		return nil, nil
	}
	return rel.collect(ctx, r.g, nil)
}

// join logs in where this was not done yet, and returns a session for each server
// that let it in. One that does not answer is no reason to stop while one does.
func (r *rescue) join(ctx context.Context) (circle, error) {
	key, err := r.home.Make()
	if err != nil {
		return nil, err
	}
	members, err := r.home.Memberships()
	if err != nil {
		return nil, err
	}
	errs := make([]error, len(r.invite.Servers))
	var group sync.WaitGroup
	var replies sync.Mutex
	for i, s := range r.invite.Servers {
		if slices.ContainsFunc(members, func(m config.Membership) bool { return m.Server.KeyID == s.KeyID }) {
			continue
		}
		group.Go(func() {
			witness := api.NewWitness(r.home.HeadFile(s.KeyID), s.KeyID)
			client, err := api.Dial(s.Server, key, witness)
			if err != nil {
				errs[i] = err
				return
			}
			defer client.Close()
			m, expires, err := r.login(ctx, client, s)
			replies.Lock()
			defer replies.Unlock()
			if err == nil {
				err = r.home.Join(m)
			}
			if err == nil && expires.After(r.expires) {
				r.expires = expires
			}
			errs[i] = err
		})
	}
	group.Wait()
	if members, err = r.home.Memberships(); err != nil {
		return nil, err
	}
	if len(members) == 0 {
		return nil, errors.Join(errs...)
	}
	for i, err := range errs {
		if name := r.invite.Servers[i].Name; err != nil && !r.warned[name] {
			r.warned[name] = true
			r.g.warn(fmt.Sprintf("%s: %v", safe(name), err))
		}
	}
	r.g.home = r.home.Dir
	return r.g.connectHome()
}

// login shows the invite's secret to one server, and pins what the invite says.
func (r *rescue) login(ctx context.Context, client *api.Client, s api.RescueServer) (m config.Membership, expires time.Time, err error) {
	var reply api.LoginReply
	if err := client.Call(ctx, "POST", "/v1/login", api.Login{Secret: s.Secret}, &reply); err != nil {
		return m, expires, err
	}
	policy, err := escrow.ParsePolicy([]byte(reply.Policy.Policy))
	switch {
	case err != nil:
		return m, expires, err
	case policy.Digest() != s.PolicyDigest:
		return m, expires, fmt.Errorf("%w: %s shows another policy than the invite names", errForeign, safe(s.Name))
	case reply.Role != string(store.Rescuer) || !strings.HasPrefix(reply.Name, recovery.RescueName(r.invite.Volume, "")):
		return m, expires, fmt.Errorf("%w: %s takes this for %s, and not for a rescue of volume %s", errForeign, safe(s.Name), quoted(reply.Name), r.invite.Volume)
	}
	return config.Membership{Server: s.Server, Name: reply.Name, Policy: policy}, reply.Expires, nil
}

// asked makes the request, or finds the one that an earlier run made, and shows
// its words.
func (r *rescue) asked(ctx context.Context, c circle) (id string, expires time.Time, err error) {
	ids, err := r.home.Requests()
	if err != nil {
		return "", expires, err
	}
	var filed api.Request
	if len(ids) == 1 {
		signed, keyText, err := r.home.Request(ids[0])
		secret.Wipe(keyText)
		if err != nil {
			return "", expires, err
		}
		request, err := recovery.ParseRequest(signed)
		if err != nil {
			return "", expires, err
		}
		filed = api.Request{Approvers: []string{}, Approved: []string{}}
		for _, a := range callAll[api.Request](ctx, c, "GET", "/v1/requests/"+url.PathEscape(request.ID), nil) {
			if a.err == nil { // how far it is only a server knows; what it is, only what was signed
				filed = a.value
				break
			}
		}
		filed.ID, filed.Volume, filed.Machine, filed.Packet, filed.Payload = request.ID, request.VolumeUUID, request.Machine, request.PacketID, request.Payload
		filed.Requester, filed.Reason, filed.Created, filed.Expires = request.Requester, request.Reason, request.Created, request.Expires
		filed.Words = recovery.Words(recovery.Digest(signed))
	} else {
		if left := time.Until(r.expires).Truncate(time.Second); !r.expires.IsZero() && left > 0 {
			r.o.lifetime = min(r.o.lifetime, left)
		}
		if filed, err = c.ask(ctx, r.g, r.o); err != nil {
			return "", expires, err
		}
	}
	if r.g.json {
		if err := r.g.printJSON(filed); err != nil {
			return "", expires, err
		}
	} else {
		r.g.showFiled(filed)
	}
	r.g.say("read the six words to the helpdesk, by telephone or in person, for %s", whoApproves(filed))
	return filed.ID, filed.Expires, nil
}

// look collects once enough people approved: recovery.ErrNotApproved before. From
// one server nothing is asked for that it would refuse, and write down, each time.
func (r *rescue) look(ctx context.Context, c circle, id string) (*escrow.Opened, error) {
	answers := callAll[api.Request](ctx, c, "GET", "/v1/requests/"+url.PathEscape(id), nil)
	var over []string
	for _, a := range answers {
		switch {
		case a.err == nil && a.value.State == recovery.Denied:
			over = append(over, fmt.Sprintf("%s: denied by %s: %s", safe(a.Name), quoted(a.value.DecidedBy), quoted(a.value.Note)))
		case api.CodeOf(a.err) == api.CodeRefused:
			over = append(over, safe(a.Name)+": the invite is over")
		}
	}
	if len(over) == len(r.invite.Servers) { // one alone may lie
		err := recovery.ErrRescueOver
		if answers[0].err == nil {
			err = errDenied
		}
		return nil, fmt.Errorf("%w: %s", err, strings.Join(over, "; "))
	}
	switch first := answers[0]; {
	case len(c) == 1 && first.err != nil:
		return nil, first.err
	case len(c) == 1 && first.value.State == recovery.Open:
		return nil, fmt.Errorf("%w: %d of %d approvals", recovery.ErrNotApproved, len(first.value.Approvers), first.value.Threshold)
	}
	rel, err := newRelease(r.home, id)
	if err != nil {
		return nil, err
	}
	defer rel.wipe()
	opened, err := rel.collect(ctx, r.g, c)
	if err != nil {
		return nil, err
	}
	return opened, rel.keep()
}
