package main

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
)

// candidate is a packet that a request could be about, and the servers that have
// it, bit for bit.
type candidate struct {
	request recovery.Request
	brief   *escrow.Brief
	holders circle
}

// findPacket finds the newest packet of what was asked for that enough trustees'
// servers hold. Servers may disagree: one was down when the machine enrolled
// again, or lies. What is chosen is one packet with one digest; one that opens with
// fewer trustees only where no other can be had, so that a server can neither put one
// of its own in the place of what several hold, nor make a word ambiguous by it.
func (c circle) findPacket(ctx context.Context, g *globals, o recoverOptions) (*candidate, error) {
	heads, err := good(g, askAll(c, func(s *session) (*candidate, error) { return s.head(ctx, o.volume, o) }))
	if err != nil {
		return nil, err
	}
	var found []*candidate
	for _, h := range heads {
		i := slices.IndexFunc(found, func(f *candidate) bool { return f.request.PacketDigest == h.value.request.PacketDigest })
		if i < 0 {
			i = len(found)
			found = append(found, h.value)
		}
		found[i].holders = append(found[i].holders, h.session)
	}
	slices.SortStableFunc(found, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(b.brief.Threshold, a.brief.Threshold), b.brief.Created.Compare(a.brief.Created))
	})
	for _, f := range found {
		if len(found) > 1 {
			f.askOthers(ctx, c, o)
		}
	}
	var reached []*candidate
	for _, f := range found {
		f.holders = f.holders.known(g, f.request.Requester)
		if f.holders.reach(&f.brief.Header) >= f.brief.Threshold && (len(reached) == 0 || f.brief.Threshold == reached[0].brief.Threshold) {
			reached = append(reached, f)
		}
	}
	if volumes := volumesOf(reached); len(volumes) > 1 {
		return nil, api.Errorf(api.CodeAmbiguous, "%q means different volumes at different servers:\n  %s", o.volume, strings.Join(volumes, "\n  "))
	}
	if len(reached) > 0 {
		f := reached[0]
		if len(found) > 1 {
			g.warn(fmt.Sprintf("the servers have different packets for %q; asking for %s, of volume %s, made %s, which is at %s", o.volume, f.brief.ID, safe(f.brief.Volume.UUID), when(f.brief.Created), f.holders.names()))
		}
		return f, nil
	}
	newest := found[0]
	return nil, fmt.Errorf("packet %s opens with %d of %d trustees, and this home reaches the servers of %d that have it (%s): be invited at the others too, or wait for those that do not answer",
		newest.brief.ID, newest.brief.Threshold, len(newest.brief.Trustees), newest.holders.reach(&newest.brief.Header), newest.holders.names())
}

// head asks one server for a packet, and binds it.
func (s *session) head(ctx context.Context, word string, o recoverOptions) (*candidate, error) {
	var head api.PacketHead
	if err := s.Call(ctx, "GET", "/v1/recoverable?volume="+url.QueryEscape(word), nil, &head); err != nil {
		return nil, err
	}
	request, brief, err := s.bind(head, o)
	return &candidate{request: request, brief: brief}, err
}

// askOthers finds the servers that have the packet and another newest one.
func (f *candidate) askOthers(ctx context.Context, c circle, o recoverOptions) {
	o.volume = f.brief.ID
	for _, a := range askAll(c, func(s *session) (*candidate, error) { return s.head(ctx, f.brief.ID, o) }) {
		if a.err == nil && a.value.request.PacketDigest == f.request.PacketDigest && !slices.Contains(f.holders, a.session) {
			f.holders = append(f.holders, a.session)
		}
	}
}

func volumesOf(found []*candidate) (volumes []string) {
	for _, f := range found {
		if line := f.brief.Volume.UUID + "  of " + safe(f.brief.Machine); !slices.Contains(volumes, line) {
			volumes = append(volumes, line)
		}
	}
	return volumes
}

// known are the servers that know this home under one name, which a request
// carries.
func (c circle) known(g *globals, name string) circle {
	var out circle
	for _, s := range c {
		if s.membership.Name != name {
			g.warn(fmt.Sprintf("%s knows this home as %s, not as %s, and takes no request of that name: be invited there under the same one", safe(s.Name), safe(s.membership.Name), safe(name)))
			continue
		}
		out = append(out, s)
	}
	return out
}

// reach is how many of a packet's trustees are those of these servers, where
// approvals can be given.
func (c circle) reach(h *escrow.Header) int {
	var reached []string
	for _, s := range c {
		for _, t := range s.membership.Policy.Trustees {
			if slices.Contains(h.Trustees, t.Fingerprint) && !slices.Contains(reached, t.Fingerprint) {
				reached = append(reached, t.Fingerprint)
			}
		}
	}
	return len(reached)
}

func (c circle) names() string {
	var names []string
	for _, s := range c {
		names = append(names, safe(s.Name))
	}
	return cmp.Or(strings.Join(names, ", "), "none")
}

// trusteeNames are trustees as people know them: by what the pinned policies call
// them, or by the end of their fingerprint.
func (c circle) trusteeNames(fingerprints []string) string {
	var names []string
	for _, fingerprint := range fingerprints {
		name := fingerprint[max(0, len(fingerprint)-16):]
		for _, s := range c {
			if t, ok := s.membership.Policy.Trustee(fingerprint); ok {
				name = t.Name
			}
		}
		names = append(names, safe(name))
	}
	return strings.Join(names, ", ")
}

// file files the signed request at all servers that have the packet. It stands
// when enough trustees' servers took it; otherwise it is withdrawn.
func (f *candidate) file(ctx context.Context, g *globals, id string, signed []byte) (api.Request, error) {
	answers := callAll[api.Request](ctx, f.holders, "POST", "/v1/requests", api.Signed{Signed: signed})
	filed, err := good(g, answers)
	if err != nil {
		return api.Request{}, err
	}
	var at circle
	for _, a := range filed {
		at = append(at, a.session)
	}
	if reached := at.reach(&f.brief.Header); reached < f.brief.Threshold {
		callAll[any](ctx, at, "POST", "/v1/requests/"+url.PathEscape(id)+"/deny", api.Deny{Reason: "too few servers took it"})
		return api.Request{}, fmt.Errorf("the servers of %d trustees took the request, and %d are needed, so it was withdrawn: %w", reached, f.brief.Threshold, worst(answers))
	}
	return filed[0].value, nil
}

// material fetches what an approver needs, from the one server that has it for
// this approver: with --key that of which the key is a trustee, otherwise that
// which keeps a trustee's key.
func (c circle) material(ctx context.Context, g *globals, o recoverOptions) (*session, api.Material, error) {
	answers := callAll[api.Material](ctx, c, "GET", "/v1/requests/"+url.PathEscape(o.approve)+"/material", nil)
	if len(c) == 1 {
		return c[0], answers[0].value, answers[0].err
	}
	fit, err := good(g, answers)
	if err != nil {
		return nil, api.Material{}, err
	}
	if o.key != "" {
		text, err := g.input(o.key)
		if err != nil {
			return nil, api.Material{}, err
		}
		public, err := seal.ParsePublic(text)
		if err != nil {
			return nil, api.Material{}, fmt.Errorf("trustee's key: %w", err)
		}
		fit = slices.DeleteFunc(fit, func(a answer[api.Material]) bool {
			_, pinned := a.membership.Policy.Trustee(public.Fingerprint())
			return !pinned
		})
	}
	switch len(fit) {
	case 0:
		return nil, api.Material{}, fmt.Errorf("%w: the key of --key is no trustee of a server that has this request; its passphrase was not asked for", errForeign)
	case 1:
		return fit[0].session, fit[0].value, nil
	}
	return nil, api.Material{}, usage("%d servers that know you have this request (%s): say with whose key you approve, with --server", len(fit), namesOf(fit))
}

// requestAt is a request with what all servers say of it.
type requestAt struct {
	api.Request
	At []stateAt `json:"at,omitempty"`
}

func mergeRequests(answers []answer[[]api.Request]) []requestAt {
	out := []requestAt{}
	for _, same := range group(answers, func(r api.Request) string { return r.ID }) {
		r := requestAt{Request: same[0].value}
		if len(answers) > 1 {
			for _, a := range same {
				r.At = append(r.At, stateAt{a.Name, string(a.value.State)})
			}
			r.merge(same)
		}
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b requestAt) int { return a.Created.Compare(b.Created) })
	return out
}

// merge puts together what servers have of a request: it is released where one of
// them released it, and over when it is over at all; otherwise the trustees count
// whose shares lie where it is not over.
func (r *requestAt) merge(same []answer[api.Request]) {
	var live []api.Request
	for _, a := range same {
		switch a.value.State {
		case recovery.Open, recovery.Approved:
			live = append(live, a.value)
		case recovery.Released:
			r.Request = a.value
		}
	}
	if r.State == recovery.Released || len(live) == 0 {
		return
	}
	r.Request, r.Approvers, r.Approved, r.CanStill = live[0], []string{}, []string{}, nil
	for _, l := range live {
		for i, trustee := range l.Approved {
			if i < len(l.Approvers) && !slices.Contains(r.Approved, trustee) {
				r.Approved, r.Approvers = append(r.Approved, trustee), append(r.Approvers, l.Approvers[i])
			}
		}
	}
	for _, trustee := range live[0].CanStill {
		if !slices.Contains(r.Approved, trustee) {
			r.CanStill = append(r.CanStill, trustee)
		}
	}
	if r.State = recovery.Open; len(r.Approved) >= r.Threshold {
		r.State, r.CanStill = recovery.Approved, nil
	}
}
