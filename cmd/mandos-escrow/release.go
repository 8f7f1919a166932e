package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/recovery"
)

// runRelease collects an approved request. Where the result goes is made ready
// first: what was released cannot be collected twice.
func runRelease(ctx context.Context, g *globals, o recoverOptions) error {
	deliver, cleanup, err := delivery(ctx, g, o)
	if err != nil {
		return err
	}
	defer cleanup()
	c, err := g.connectHome()
	if err != nil {
		return err
	}
	defer c.close()
	home := c[0].home
	id, err := home.FindRequest(o.release)
	if err != nil {
		return err
	}
	r, err := newRelease(home, id)
	if err != nil {
		return err
	}
	defer r.wipe()
	if o.device != "" {
		if err := o.how.enough(r.request.Payload, o.device); err != nil {
			return err
		}
	}
	opened, err := r.collect(ctx, g, c)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if err := r.keep(); err != nil {
		return err
	}
	if err := deliver(opened); err != nil {
		return err
	}
	return home.ForgetRequest(id)
}

// release is what was collected of a request: the packet, and re-sealed shares,
// which only the request's one-off key opens. What a server gave it gives once, so
// all is kept until it was delivered: neither a full disk or a wrong device
// afterwards costs another approval, nor a server that does not answer.
type release struct {
	home    config.Home
	id      string
	signed  []byte
	request *recovery.Request
	digest  [32]byte
	oneOff  *seal.PrivateKey
	kept    api.Release
	packet  *escrow.Packet
	shares  []*escrow.Share
	idle    circle // servers where the request is open, and nothing is to be collected
}

// newRelease takes up what an earlier run has kept.
func newRelease(home config.Home, id string) (*release, error) {
	signed, keyText, err := home.Request(id)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(keyText)
	r := &release{home: home, id: id, signed: signed, digest: recovery.Digest(signed)}
	if r.request, err = recovery.ParseRequest(signed); err != nil {
		return nil, err
	}
	if r.oneOff, err = seal.ParsePrivate(keyText, nil); err != nil {
		return nil, err
	}
	data, err := home.Release(id)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	var kept api.Release
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if err == nil {
		err = r.add(kept, nil)
	}
	return r, err
}

func (r *release) wipe() {
	for _, share := range r.shares {
		share.Wipe()
	}
}

func (r *release) keep() error {
	data, err := json.Marshal(r.kept)
	if err != nil {
		return err
	}
	return r.home.KeepRelease(r.id, data)
}

// complete reports whether there are as many shares as the packet needs.
func (r *release) complete() bool { return r.packet != nil && len(r.shares) >= r.packet.Threshold }

// has reports whether the share of a trustee is there.
func (r *release) has(trustee string) bool {
	return slices.ContainsFunc(r.shares, func(s *escrow.Share) bool { return r.packet.Trustees[s.Index-1] == trustee })
}

// add takes what one server released. Everything is checked against the request
// as this home signed it, and each share against the packet that the request
// binds, before any of it is taken. pinned is the server's policy; nil for what
// this home has kept, which was compared with it then.
func (r *release) add(released api.Release, pinned *escrow.Policy) error {
	if !bytes.Equal(r.signed, released.Request) {
		return fmt.Errorf("%w: the server released another request", recovery.ErrRequest)
	}
	packet, err := escrow.Parse(released.Packet)
	if err != nil {
		return err
	}
	if packet.Digest != r.request.PacketDigest || packet.HeaderDigest != r.request.HeaderDigest || packet.Volume.UUID != r.request.VolumeUUID {
		return fmt.Errorf("%w: the server released another packet", recovery.ErrRequest)
	}
	if pinned != nil {
		if err := pinned.Accept(&packet.Header); err != nil {
			return fmt.Errorf("%w: %w", errForeign, err)
		}
	}
	var shares []*escrow.Share
	var approvals []api.Approve
	for _, a := range released.Approvals {
		share, err := r.openShare(packet, a, shares)
		if err != nil {
			for _, s := range shares {
				s.Wipe()
			}
			return err
		}
		shares, approvals = append(shares, share), append(approvals, a)
	}
	r.packet, r.kept.Request, r.kept.Packet = packet, released.Request, released.Packet
	for i, share := range shares {
		if r.has(packet.Trustees[share.Index-1]) { // another server has it too
			share.Wipe()
			continue
		}
		r.shares, r.kept.Approvals = append(r.shares, share), append(r.kept.Approvals, approvals[i])
	}
	return nil
}

func (r *release) openShare(packet *escrow.Packet, a api.Approve, before []*escrow.Share) (*escrow.Share, error) {
	if _, err := recovery.ParseApproval(a.Approval, r.digest, a.Share); err != nil {
		return nil, err
	}
	share, err := recovery.OpenResealed(a.Share, r.oneOff, r.digest)
	if err != nil {
		return nil, err
	}
	err = packet.CheckShare(r.request.Payload, share)
	if err == nil && slices.ContainsFunc(before, func(s *escrow.Share) bool { return s.Index == share.Index }) {
		err = &escrow.ShareError{Index: share.Index, Trustee: packet.Trustees[share.Index-1], Err: escrow.ErrDuplicateShare}
	}
	if err != nil {
		share.Wipe()
		return nil, err
	}
	return share, nil
}

// collect gathers shares until they open the packet. Of several servers none is
// made to give out what it has, which it does once, before there are enough at all.
func (r *release) collect(ctx context.Context, g *globals, c circle) (*escrow.Opened, error) {
	var errs []error
	if !r.complete() {
		giving := c
		if len(c) > 1 {
			var err error
			if giving, err = r.whoCan(ctx, g, c); err != nil {
				return nil, err
			}
		}
		for _, s := range giving {
			if r.complete() {
				r.idle = append(r.idle, s)
				continue
			}
			err := r.from(ctx, s)
			if err != nil && len(c) == 1 {
				return nil, err
			}
			if err != nil {
				errs = append(errs, answer[any]{session: s, err: err}.fault())
			}
		}
		if len(c) > 1 && !r.complete() {
			if len(errs) == 0 {
				errs = append(errs, fmt.Errorf("%w: a server gave fewer shares than it said", api.ErrReply))
			}
			return nil, fmt.Errorf("%d shares were collected, and kept; run this again for the rest: %w", len(r.shares), errors.Join(errs...))
		}
	}
	for _, err := range errs {
		g.warn(err.Error())
	}
	opened, err := r.packet.Open(r.request.Payload, r.shares)
	if err == nil {
		r.end(ctx)
	}
	return opened, err
}

// from collects what one server has. What does not make up the packet yet is kept
// at once.
func (r *release) from(ctx context.Context, s *session) error {
	var released api.Release
	if err := s.Call(ctx, "POST", "/v1/requests/"+url.PathEscape(r.id)+"/release", nil, &released); err != nil {
		return err
	}
	if err := r.add(released, &s.membership.Policy); err != nil {
		return err
	}
	if len(r.shares) == 0 || r.complete() {
		return nil
	}
	return r.keep()
}

// threshold is how many shares the packet needs: from its clear header, which the
// request binds, because a server may say any number.
func (r *release) threshold(ctx context.Context, c circle) (int, error) {
	if r.packet != nil {
		return r.packet.Threshold, nil
	}
	answers := askAll(c, func(s *session) (n int, err error) {
		var head api.PacketHead
		if err := s.Call(ctx, "GET", "/v1/recoverable?volume="+url.QueryEscape(r.request.PacketID), nil, &head); err != nil {
			return 0, err
		}
		brief, err := escrow.ParseBrief(head.Header, r.request.Payload, r.request.PayloadDigest, nil)
		if err == nil && brief.HeaderDigest != r.request.HeaderDigest {
			err = fmt.Errorf("%w: the server shows another packet", recovery.ErrRequest)
		}
		if err != nil {
			return 0, err
		}
		return brief.Threshold, nil
	})
	for _, a := range answers {
		if a.err == nil {
			return a.value, nil
		}
	}
	return 0, worst(answers)
}

// whoCan finds the servers that have a share which is not here yet. With those
// that are here they must be enough. Of what a server says only the shares of its
// own trustees count, so that none hides what another has. A server that the
// request did not reach, being down then, gets it now.
func (r *release) whoCan(ctx context.Context, g *globals, c circle) (circle, error) {
	needed, err := r.threshold(ctx, c)
	if err != nil {
		return nil, err
	}
	answers := callAll[api.Request](ctx, c, "GET", "/v1/requests/"+url.PathEscape(r.id), nil)
	var giving circle
	var faults, approved []string
	for _, share := range r.shares {
		approved = append(approved, r.packet.Trustees[share.Index-1])
	}
	for _, a := range answers {
		switch {
		case api.CodeOf(a.err) == api.CodeNotFound:
			if err := a.Call(ctx, "POST", "/v1/requests", api.Signed{Signed: r.signed}, nil); err == nil {
				faults = append(faults, safe(a.Name)+" has the request only now")
			}
			continue
		case a.err != nil:
			faults = append(faults, a.fault().Error())
			continue
		case a.value.State != recovery.Open && a.value.State != recovery.Approved:
			faults = append(faults, fmt.Sprintf("at %s it is %s", safe(a.Name), safe(string(a.value.State))))
			continue
		}
		fresh := false
		for _, trustee := range a.value.Approved {
			if _, own := a.membership.Policy.Trustee(trustee); own && !slices.Contains(approved, trustee) {
				approved, fresh = append(approved, trustee), true
			}
		}
		if fresh {
			giving = append(giving, a.session)
		} else {
			r.idle = append(r.idle, a.session)
		}
	}
	if len(approved) < needed {
		return nil, fmt.Errorf("%w: %d of the %d trustees that are needed (%s); %s", recovery.ErrNotApproved, len(approved), needed,
			cmp.Or(c.trusteeNames(approved), "none"), cmp.Or(strings.Join(faults, "; "), "every server answered"))
	}
	for _, fault := range faults {
		g.warn(fault)
	}
	return giving, nil
}

// end withdraws the request where nothing was collected: it has served. A server
// that does not take that lets it expire.
func (r *release) end(ctx context.Context) {
	askAll(r.idle, func(s *session) (out api.Request, err error) {
		return out, s.Call(ctx, "POST", "/v1/requests/"+url.PathEscape(r.id)+"/deny", api.Deny{Reason: "collected from other servers"}, &out)
	})
}

// delivery makes ready where a release goes, and refuses what cannot work
// before anything is asked for.
func delivery(ctx context.Context, g *globals, o recoverOptions) (deliver func(*escrow.Opened) error, cleanup func(), err error) {
	ways := 0
	for _, chosen := range []bool{o.out != "", o.phone, o.device != ""} {
		if chosen {
			ways++
		}
	}
	if ways != 1 {
		return nil, nil, usage("recover --release needs one of --out FILE, --phone, --device DEV")
	}
	switch {
	case o.phone:
		tty, err := terminal(g)
		if err != nil {
			return nil, nil, err
		}
		return func(opened *escrow.Opened) error { return readOut(g, tty, opened) }, func() {}, nil
	case o.device != "":
		passphrase, err := g.newSecret(o.newPassphraseFile, "--new-passphrase-file", "New passphrase of the volume: ")
		if err != nil {
			return nil, nil, err
		}
		if err := o.how.ready(o.device); err != nil {
			secret.Wipe(passphrase)
			return nil, nil, err
		}
		deliver := func(opened *escrow.Opened) error {
			return restore(ctx, g, opened, o.device, passphrase, o.how)
		}
		return deliver, func() { secret.Wipe(passphrase) }, nil
	}
	return packetDelivery(g, o)
}

// packetDelivery writes a packet under a one-time password, and the password
// to a file of its own or the terminal, both or none.
func packetDelivery(g *globals, o recoverOptions) (func(*escrow.Opened) error, func(), error) {
	if filepath.Clean(o.out) == filepath.Clean(o.otpFile) {
		return nil, nil, usage("--out and --otp-file are the same file: a packet and its password go different ways")
	}
	packet, err := config.NewOutput(o.out)
	if err != nil {
		return nil, nil, err
	}
	var otp *config.Output
	var tty *os.File
	if o.otpFile != "" {
		otp, err = config.NewOutput(o.otpFile)
	} else {
		tty, err = terminal(g)
	}
	if err != nil {
		packet.Discard()
		return nil, nil, err
	}
	cleanup := func() {
		packet.Discard()
		if otp != nil {
			otp.Discard()
		}
	}
	deliver := func(opened *escrow.Opened) error {
		password := secret.OneTimePassword()
		defer secret.Wipe(password)
		text, err := escrow.SealOffline(opened, password, time.Now())
		if err != nil {
			return err
		}
		if _, err := packet.Write(text); err != nil {
			return fmt.Errorf("write %s: %w", o.out, err)
		}
		if otp == nil {
			if _, err := fmt.Fprintf(tty, "one-time password of %s: %s\n", o.out, password); err != nil {
				return fmt.Errorf("show the one-time password: %w", err)
			}
			return packet.Commit()
		}
		if _, err := otp.Write(password); err != nil {
			return fmt.Errorf("write %s: %w", o.otpFile, err)
		}
		if err := otp.Commit(); err != nil {
			return err
		}
		if err := packet.Commit(); err != nil {
			return errors.Join(err, config.Remove(o.otpFile)) // a password of nothing
		}
		g.say("wrote %s and its one-time password %s; send them by different ways", o.out, o.otpFile)
		return nil
	}
	return deliver, cleanup, nil
}

// terminal returns standard output if it is a terminal: secrets go nowhere else
// but into files of mode 0600.
func terminal(g *globals) (*os.File, error) {
	if g.tty != nil && term.IsTerminal(int(g.tty.Fd())) {
		return g.tty, nil
	}
	return nil, usage("secrets are shown on a terminal only: give --out FILE and --otp-file FILE, or --device DEV")
}
