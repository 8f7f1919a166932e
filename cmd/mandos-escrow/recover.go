package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/recovery"
)

type recoverOptions struct {
	// what to do: exactly one; invite with request is a rescue
	request, list, invite                     bool
	approve, deny, release, restore, openFile string

	volume, reason, payload                 string
	lifetime                                time.Duration
	words, key, keyPassphraseFile           string
	out, otpFile, device, newPassphraseFile string
	keys, keyPassphraseFiles                []string // all that were given; key and keyPassphraseFile are the first
	phone                                   bool
	how                                     restoreOptions

	inviteFile string // of a rescue
	text       bool
	noWait     bool
	wait       time.Duration
}

func newRecover(g *globals) *cobra.Command {
	var o recoverOptions
	cmd := &cobra.Command{
		Use:   "recover --request | --list | --approve ID | --deny ID | --release ID | --restore FILE | --open FILE | --invite [FILE]",
		Short: "get back into a volume, with other people's approval",
		Long: `Gets back into a volume whose passphrase is lost:

  --request   asks, with a reason, and prints six words
  --approve   somebody else approves, who was told the six words by telephone or
              in person, and who knows the passphrase of the master key
  --deny      or denies; who asked may so withdraw the request
  --release   who asked collects what was approved: as a packet under a one-time
              password (--out, --otp-file), read out (--phone), or straight onto
              the volume (--device)
  --restore   puts a new passphrase on the volume from such a packet, or one from "packet export"
  --open      writes what is in such a packet to a file or the terminal

Once somebody is back in, "mandos-escrow rotate --passphrase-file F" on the machine, with
the new passphrase in F, replaces what was revealed; no token is needed.

With several servers, and a packet that N of them open, log in at each with one
home: the request goes to all, with one id and the same six words; approvers know
one server each; --release collects when N have approved, and exits with 3 before.

A rescue system has no identity. --invite makes a one-use invite for one volume,
in a file for a stick (--out) or as lines to type (--text). On the rescue system
--request --device DEV --invite FILE does the rest: asks, prints the six words to be
read to the helpdesk, waits until others approved, and puts a new passphrase on the
volume. No key is shown. FILE may hold the typed lines, or be - to type them.
Nobody approves what a rescue asks by their own invite. When it is interrupted, run
the same command again: it goes on, until the system is switched off, or with --home
for as long as that folder is there.

The server cannot read any of it, and needs nobody's trust for it: the words are
of the request as the requester signed it.

--phone shows the recovery passphrase on the terminal, one group of six digits at a
time. Read it out, and type what the other end reads back: it says whether that is
right, mistyped, or another group. Enter goes on, r shows the group once more, a
number from 1 to 8 goes to that group, and q leaves: what was released is kept, and
the same command goes on with it, until you say that the disk was opened. --open FILE
--phone does the same with a packet in a file. Groups are
taken off the screen, on a screen of their own that keeps no lines; a terminal that
cannot do that (TERM=dumb) keeps them, and says so.`,
		Example: `  mandos-escrow recover --request --volume laptop7 --reason 'forgot it'
  mandos-escrow recover --approve 3f9c --words 'able cane dust echo fuel gate'
  mandos-escrow recover --release 3f9c --out packet.asc --otp-file otp
  mandos-escrow recover --restore packet.asc --otp-file otp --device /dev/sda3 --new-passphrase-file new
  mandos-escrow recover --invite --volume laptop7 --reason 'ticket 4711' --text
  mandos-escrow recover --request --device /dev/sda3 --invite - --reason 'forgot it'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if o.request && o.invite && len(args) == 1 { // --invite is a verb, and with --request takes a file
				o.inviteFile = args[0]
				return nil
			}
			return noArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return runRecover(cmd.Context(), g, o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.request, "request", false, "ask for a recovery")
	f.BoolVar(&o.list, "list", false, "list requests")
	f.BoolVar(&o.invite, "invite", false, "invite a rescue system; with --request and a FILE, ask by that invite")
	f.StringVar(&o.approve, "approve", "", "approve the request `ID`")
	f.StringVar(&o.deny, "deny", "", "deny the request `ID`, or withdraw one's own")
	f.StringVar(&o.release, "release", "", "collect the approved request `ID`")
	f.StringVar(&o.restore, "restore", "", "put a new passphrase on a volume from the packet `FILE`")
	f.StringVar(&o.openFile, "open", "", "show what is in the packet `FILE`")
	f.StringVar(&o.volume, "volume", "", "volume: UUID or its beginning, machine name, key ID, or packet ID")
	f.StringVar(&o.reason, "reason", "", "why, for those who approve and for the audit log")
	f.StringVar(&o.payload, "for", escrow.ForPassphrase, "what to ask for: passphrase or volume-key")
	f.DurationVar(&o.lifetime, "lifetime", recovery.Lifetime, "how long the request lives")
	f.StringVar(&o.words, "words", "", "the six words, as the requester read them (asked for on a terminal)")
	f.StringArrayVar(&o.keys, "key", nil, "file with the trustee's private key, if the server does not keep it; --restore and --open of a packet that several trustees open take it once for each")
	f.StringArrayVar(&o.keyPassphraseFiles, "key-passphrase-file", nil, "file with the passphrase of the trustee's key (asked for otherwise); as often as --key, or once for all")
	f.StringVar(&o.out, "out", "", "file to write")
	f.StringVar(&o.otpFile, "otp-file", "", "file for, or with, the one-time password")
	f.BoolVar(&o.phone, "phone", false, "read the recovery passphrase out on the terminal, group by group")
	f.StringVar(&o.device, "device", "", "LUKS device or image file to restore")
	f.StringVar(&o.newPassphraseFile, "new-passphrase-file", "", "file with the passphrase that the volume gets (asked for otherwise)")
	withRebuild(cmd, &o.how)
	f.BoolVar(&o.text, "text", false, "print the rescue invite as lines to type")
	f.BoolVar(&o.noWait, "no-wait", false, "on a rescue system: ask, or look once whether it was approved, and do not wait")
	f.DurationVar(&o.wait, "wait", 0, "on a rescue system: how long to wait for approval (default: as long as the request lives)")
	f.StringVar(&g.state, "state", "", "")
	_ = f.MarkHidden("state")
	return g.withJSON(cmd)
}

func runRecover(ctx context.Context, g *globals, o recoverOptions) error {
	if g.state != "" {
		return usage("recover opens secrets, which a server never does: use --home, with your own identity, not --state")
	}
	if err := o.firstKey(); err != nil {
		return err
	}
	verbs := map[string]func() error{}
	switch {
	case o.request && o.invite:
		verbs["--request"] = func() error { return runRescue(ctx, g, o) }
	case o.request:
		verbs["--request"] = func() error { return runRequest(ctx, g, o) }
	case o.invite:
		verbs["--invite"] = func() error { return runInvite(ctx, g, o) }
	}
	if o.list {
		verbs["--list"] = func() error { return runRequests(ctx, g) }
	}
	for flag, v := range map[string]struct {
		arg string
		run func(context.Context, *globals, recoverOptions) error
	}{
		"--approve": {o.approve, runApprove},
		"--deny":    {o.deny, runDeny},
		"--release": {o.release, runRelease},
		"--restore": {o.restore, runRestore},
		"--open":    {o.openFile, runOpen},
	} {
		if v.arg != "" {
			verbs[flag] = func() error { return v.run(ctx, g, o) }
		}
	}
	if len(verbs) != 1 {
		return usage("recover needs exactly one of --request, --list, --approve, --deny, --release, --restore, --open, --invite")
	}
	for _, run := range verbs {
		return run()
	}
	return nil
}

// firstKey is for approving, which is done with one trustee's key at a time.
func (o *recoverOptions) firstKey() error {
	if o.restore == "" && o.openFile == "" && max(len(o.keys), len(o.keyPassphraseFiles)) > 1 {
		return usage("--key and --key-passphrase-file are given once, except with --restore and --open")
	}
	if len(o.keys) > 0 {
		o.key = o.keys[0]
	}
	if len(o.keyPassphraseFiles) > 0 {
		o.keyPassphraseFile = o.keyPassphraseFiles[0]
	}
	return nil
}

// openOptions are what --restore and --open open a packet with.
func (o recoverOptions) openOptions() openOptions {
	open := oneTime(o.otpFile)
	open.keys, open.keyPassphraseFiles, open.payload = o.keys, o.keyPassphraseFiles, o.payload
	if o.how.rebuild {
		open.payload = "" // the volume key, if it is there
	}
	return open
}

func runRequest(ctx context.Context, g *globals, o recoverOptions) error {
	if o.volume == "" || strings.TrimSpace(o.reason) == "" {
		return usage("recover --request needs --volume and --reason")
	}
	if err := o.checkRequest(); err != nil {
		return err
	}
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	filed, err := c.ask(ctx, g, o)
	if err != nil {
		return err
	}
	if g.json {
		return g.printJSON(filed)
	}
	g.showFiled(filed)
	g.say("read the six words to %s, by telephone or in person; then: mandos-escrow recover --release %s", whoApproves(filed), filed.ID[:8])
	return nil
}

// checkRequest refuses what no request can say.
func (o recoverOptions) checkRequest() error {
	if o.payload != escrow.ForPassphrase && o.payload != escrow.ForVolumeKey {
		return usage("--for %s: it is %s or %s", o.payload, escrow.ForPassphrase, escrow.ForVolumeKey)
	}
	if len(o.reason) > recovery.MaxReason {
		return usage("--reason: longer than %d bytes", recovery.MaxReason)
	}
	if err := checkPrintable("--reason", o.reason); err != nil {
		return err
	}
	if o.lifetime < time.Minute || o.lifetime > recovery.MaxLifetime {
		return usage("--lifetime %s: from 1m to %s", o.lifetime, recovery.MaxLifetime)
	}
	return nil
}

// ask makes a one-off key, signs a request that binds it to the packet, keeps its
// private half in the home until the release, and files the request.
func (c circle) ask(ctx context.Context, g *globals, o recoverOptions) (filed api.Request, err error) {
	found, err := c.findPacket(ctx, g, o)
	if err != nil {
		return filed, err
	}
	request := found.request
	now := time.Now().Truncate(time.Second)
	oneOff, err := seal.Generate("one-off key of a recovery request", now)
	if err != nil {
		return filed, err
	}
	request.ID, request.Recipient = secret.ID(), oneOff.Public()
	request.Created, request.Expires = now, now.Add(o.lifetime)
	signed, err := request.Sign(c[0].key)
	if err != nil {
		return filed, err
	}
	keyText, err := oneOff.Armor()
	if err != nil {
		return filed, err
	}
	defer secret.Wipe(keyText)
	home := c[0].home
	if err := home.KeepRequest(request.ID, signed, keyText); err != nil {
		return filed, err
	}
	filed, err = found.file(ctx, g, request.ID, signed)
	if err != nil {
		_ = home.ForgetRequest(request.ID)
		return filed, err
	}
	filed.ID, filed.Volume, filed.Machine = request.ID, request.VolumeUUID, request.Machine // as they were signed
	filed.Words, filed.Expires = recovery.Words(recovery.Digest(signed)), request.Expires
	return filed, nil
}

// showFiled prints what a request is known by.
func (g *globals) showFiled(r api.Request) {
	fmt.Fprintf(g.out, "request  %s\nvolume   %s of %s\nwords    %s\n", r.ID, safe(r.Volume), safe(r.Machine), r.Words)
}

func whoApproves(r api.Request) string {
	if r.Threshold > 1 {
		return fmt.Sprintf("people who may approve it, with the keys of %d trustees", r.Threshold)
	}
	return "somebody who may approve it"
}

// bind fills a request with what the server says about the packet. Should that
// be a lie, the release does not open: the shares and the packet are checked
// against it.
func (s *session) bind(head api.PacketHead, o recoverOptions) (r recovery.Request, b *escrow.Brief, err error) {
	payloadDigest, ok := head.PayloadDigests[o.payload]
	if !ok {
		return r, nil, fmt.Errorf("the packet has no payload %q", o.payload)
	}
	for _, d := range []struct {
		text string
		to   *[32]byte
	}{{head.Digest, &r.PacketDigest}, {payloadDigest, &r.PayloadDigest}} {
		raw, err := hex.DecodeString(d.text)
		if err != nil || len(raw) != 32 {
			return r, nil, fmt.Errorf("%w: digest of a packet", recovery.ErrRequest)
		}
		copy(d.to[:], raw)
	}
	if b, err = escrow.ParseBrief(head.Header, o.payload, r.PayloadDigest, nil); err != nil {
		return r, nil, err
	}
	if err := s.membership.Policy.Accept(&b.Header); err != nil {
		return r, nil, fmt.Errorf("%w: packet %s is sealed under another policy: %w", errForeign, b.ID, err)
	}
	if !names(o.volume, b) {
		return r, nil, fmt.Errorf("%w: asked for %q, the server answered with volume %s of machine %s", errForeign, o.volume, b.Volume.UUID, safe(b.Machine))
	}
	r.PacketID, r.HeaderDigest, r.Payload = b.ID, b.HeaderDigest, o.payload
	r.VolumeUUID, r.Machine = b.Volume.UUID, b.Machine
	r.Requester, r.RequesterID, r.Reason = s.membership.Name, s.key.KeyID(), o.reason
	return r, b, nil
}

// names reports whether a packet is what somebody asked for by a word. A UUID is
// a volume's, whatever a machine calls itself.
func names(word string, b *escrow.Brief) bool {
	if record.IsUUID(word) {
		return strings.EqualFold(word, b.Volume.UUID)
	}
	if word == b.Machine {
		return true
	}
	for _, id := range []string{b.Volume.UUID, string(b.KeyID), b.ID} {
		if strings.HasPrefix(strings.ToLower(id), strings.ToLower(word)) {
			return true
		}
	}
	return false
}

func runRequests(ctx context.Context, g *globals) error {
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	answers, err := good(g, callAll[[]api.Request](ctx, c, "GET", "/v1/requests", nil))
	if err != nil {
		return err
	}
	requests := mergeRequests(answers)
	for _, r := range requests {
		if r.State == recovery.Denied && max(1, len(r.At)) == len(c) { // one alone may lie
			if err := c[0].home.ForgetUncollected(r.ID); err != nil {
				return err
			}
		}
	}
	return list(g, requests, []string{"ID", "STATE", "VOLUME", "MACHINE", "FOR", "BY", "APPROVED", "CAN STILL", "EXPIRES", "REASON"}, func(r requestAt) []string {
		return []string{
			r.ID[:min(8, len(r.ID))], string(r.State), r.Volume, r.Machine, r.Payload, r.Requester,
			strings.TrimSpace(fmt.Sprintf("%d of %d %s", len(r.Approved), r.Threshold, strings.Join(r.Approvers, ","))), c.trusteeNames(r.CanStill), when(r.Expires), r.Reason,
		}
	})
}

// runApprove opens one share with a trustee's key and seals it to the request's
// key. It asks for that key's passphrase last: after the words, the packet, the
// policy and the key itself are found to be what they must be.
func runApprove(ctx context.Context, g *globals, o recoverOptions) error {
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	s, m, err := c.material(ctx, g, o)
	if err != nil {
		return err
	}
	request, err := recovery.ParseRequest(m.Request)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(request.ID, strings.ToLower(o.approve)) {
		return fmt.Errorf("%w: asked for %s, the server gave %s", recovery.ErrRequest, o.approve, request.ID)
	}
	digest := recovery.Digest(m.Request)
	brief, err := s.checkMaterial(request, m)
	if err != nil {
		return err
	}
	showRequest(g, request, brief)
	if o.words == "" {
		if o.words, err = g.askLine("The six words that "+safe(request.Requester)+" reads to you: ", "--words"); err != nil {
			return err
		}
	}
	if err := recovery.CheckWords(o.words, digest); err != nil {
		return err
	}
	trustee, err := openTrustee(g, o, s, brief, m)
	if err != nil {
		return err
	}
	share, err := brief.OpenShare(m.Shares[trustee.Public().Fingerprint()], trustee)
	if err != nil {
		return err
	}
	defer share.Wipe()
	now := time.Now()
	resealed, err := recovery.Reseal(share, request, digest, now)
	if err != nil {
		return err
	}
	approval, err := recovery.Approval{
		RequestDigest: digest, Trustee: trustee.Public().Fingerprint(), ShareDigest: sha256.Sum256(resealed),
		Approver: s.membership.Name, ApproverID: s.key.KeyID(), Created: now,
	}.Sign(s.key)
	if err != nil {
		return err
	}
	var after api.Request
	if err := s.Call(ctx, "POST", "/v1/requests/"+request.ID+"/approve", api.Approve{Approval: approval, Share: resealed}, &after); err != nil {
		return err
	}
	g.say("approved: %d of %d", len(after.Approvers), after.Threshold)
	if brief.Threshold > len(after.Approvers) {
		g.say("%d of these %d trustees must agree: %s; who has another one's key approves where they are known", brief.Threshold, len(brief.Trustees), c.trusteeNames(brief.Trustees))
	}
	return nil
}

// checkMaterial compares what a server served with what the requester signed
// and what this home has pinned.
func (s *session) checkMaterial(request *recovery.Request, m api.Material) (*escrow.Brief, error) {
	brief, err := escrow.ParseBrief(m.Header, request.Payload, request.PayloadDigest, m.Set)
	switch {
	case err != nil:
		return nil, err
	case brief.HeaderDigest != request.HeaderDigest || brief.ID != request.PacketID || brief.Volume.UUID != request.VolumeUUID || brief.Machine != request.Machine:
		return nil, fmt.Errorf("%w: the server served another packet than the one that was asked for", recovery.ErrRequest)
	case s.membership.Policy.Accept(&brief.Header) != nil:
		return nil, fmt.Errorf("%w: the packet is sealed under another policy", errForeign)
	case !time.Now().Before(request.Expires):
		return nil, recovery.ErrExpired
	case request.RequesterID == s.key.KeyID() || request.Requester == s.membership.Name:
		return nil, recovery.ErrOwn
	case request.Requester == recovery.RescueName(request.VolumeUUID, s.membership.Name):
		return nil, recovery.ErrInvited
	}
	return brief, nil
}

func showRequest(g *globals, r *recovery.Request, b *escrow.Brief) {
	g.say("request   %s by %s, expires %s", r.ID, quoted(r.Requester), when(r.Expires))
	if strings.HasPrefix(r.Requester, recovery.RescuePrefix) {
		g.say("          a rescue system without an identity: whoever holds the invite; that the voice is known counts all the more")
	}
	g.say("asks for  the %s of volume %s of machine %s", safe(r.Payload), safe(b.Volume.UUID), quoted(b.Machine))
	g.say("packet    %s, made %s, opens with the shares of %d of %d trustees", b.ID, when(b.Created), b.Threshold, len(b.Trustees))
	g.say("reason    %s", quoted(r.Reason))
}

// openTrustee unlocks a trustee's key, after checking that it is one.
func openTrustee(g *globals, o recoverOptions, s *session, brief *escrow.Brief, m api.Material) (*seal.PrivateKey, error) {
	text := []byte(m.Trustee)
	if o.key != "" {
		var err error
		if text, err = g.input(o.key); err != nil {
			return nil, err
		}
	}
	if len(text) == 0 {
		return nil, usage("the server does not keep the trustee's key: give --key FILE")
	}
	public, err := seal.ParsePublic(text)
	if err != nil {
		return nil, fmt.Errorf("trustee's key: %w", err)
	}
	fingerprint := public.Fingerprint()
	if _, pinned := s.membership.Policy.Trustee(fingerprint); !pinned || m.Shares[fingerprint] == nil {
		return nil, fmt.Errorf("%w: key %s is no trustee of packet %s; its passphrase was not asked for", errForeign, fingerprint, brief.ID)
	}
	passphrase, err := g.secretInput(o.keyPassphraseFile, "--key-passphrase-file", "Passphrase of key "+fingerprint+": ")
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(passphrase)
	return seal.ParsePrivate(text, passphrase)
}

func runDeny(ctx context.Context, g *globals, o recoverOptions) error {
	if err := checkPrintable("--reason", o.reason); o.reason != "" && err != nil {
		return err
	}
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	denied, err := everywhere(callAll[api.Request](ctx, c, "POST", "/v1/requests/"+url.PathEscape(o.deny)+"/deny", api.Deny{Reason: o.reason}))
	for _, after := range denied {
		if err := after.home.ForgetUncollected(after.value.ID); err != nil { // if it was one's own
			return err
		}
		where := ""
		if len(c) > 1 {
			where = " at " + safe(after.Name)
		}
		g.say("request %s is %s%s", safe(after.value.ID), safe(string(after.value.State)), where)
	}
	return err
}
