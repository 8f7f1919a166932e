package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"path"
	"strconv"
	"sync"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// Server is an opened state folder that serves.
type Server struct {
	// Announce: Run tells the links that it listens on that it is there.
	Announce bool

	state    *State
	store    *store.Store
	key      *identity.Key
	log      *slog.Logger
	now      func() time.Time
	started  time.Time
	refusals refusals
	uploads  allowances
	events   allowances // entries of machines in the audit log
	caps     *caps
	boots    sync.WaitGroup
}

// New makes a server of an opened state folder.
func New(state *State, log *slog.Logger, now func() time.Time) *Server {
	return &Server{
		state: state, store: state.Store, key: state.Key, log: log, now: now, started: now(), caps: newCaps(),
		uploads: allowances{limit: uploadLimit, what: "uploaded packets"},
		events:  allowances{limit: eventLimit, what: "told something for the audit log"},
	}
}

// errStranger is what everybody gets who is not known: one text for every
// reason, so that it tells nothing. Only who shows a secret (login, enroll)
// is told what is wrong with it.
var errStranger = api.Errorf(api.CodeRefused, "refused")

// Handler serves the API. isLocal is for the control socket and for commands
// that serve themselves; actor then names the caller.
func (s *Server) Handler(isLocal bool, actor func(*http.Request) string) http.Handler {
	mux := http.NewServeMux()
	for _, rt := range routes {
		mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, r *http.Request) {
			c := call{Request: r, route: rt, local: isLocal, events: &s.events}
			if isLocal {
				c.actor = actor(r)
			} else if err := s.identify(&c); err != nil {
				s.reply(w, c, nil, err)
				return
			} else if c.known() {
				vouch(r.Context(), c.key)
			}
			result, err := s.readAndServe(w, c)
			s.reply(w, c, result, err)
		})
	}
	nowhere := func(w http.ResponseWriter, r *http.Request) { s.reply(w, call{Request: r}, nil, errStranger) }
	mux.HandleFunc("/", nowhere)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// ServeMux answers these itself, and otherwise than with a refusal.
		if p := r.URL.EscapedPath(); r.RequestURI == "*" || p != path.Clean(p) {
			nowhere(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// readAndServe reads the whole body before it looks who is there and what time
// it is: a body may come slowly, and nobody may do a minute later what they
// might when its first byte came.
func (s *Server) readAndServe(w http.ResponseWriter, c call) (any, error) {
	if !c.known() && c.route.access != anyone {
		c.now = s.now()
		return s.serve(c.route, c)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, c.Body, c.route.bodyLimit()))
	defer secret.Wipe(body)
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		return nil, api.Errorf(api.CodeLimit, "the request is longer than %d bytes", tooLong.Limit)
	case err != nil:
		return nil, api.Errorf(api.CodeUsage, "the request is cut off")
	}
	c.Body, c.now = io.NopCloser(bytes.NewReader(body)), s.now()
	if !c.local {
		c.admin, c.machine = nil, nil
		if err := s.identify(&c); err != nil {
			return nil, err
		}
	}
	return s.serve(c.route, c)
}

// identify finds out whose key the connection has. A stranger is no error yet.
func (s *Server) identify(c *call) error {
	if c.TLS == nil {
		return errStranger
	}
	key, err := identity.PeerKey(*c.TLS)
	if err != nil {
		return errStranger
	}
	c.key, c.actor = key, "stranger:"+key.KeyID().Short()
	return s.store.View(func(tx *store.Tx) error {
		if a, err := tx.AdminByKey(key.KeyID()); err == nil && !a.Removed {
			if a.Rescue != nil && a.Rescue.Over(s.now()) {
				return nil // nobody any more
			}
			c.admin, c.actor = &a, actorOf(a)
			return nil
		}
		if m, err := tx.MachineByRunning(key.KeyID()); err == nil {
			c.machine, c.actor = &m, "machine:"+m.Name
		}
		return nil
	})
}

// serve is a straight list of refusals before the work.
func (s *Server) serve(rt route, c call) (any, error) {
	if err := s.checkWitness(c); err != nil {
		return nil, err
	}
	if !c.known() && rt.access != anyone {
		return nil, errStranger
	}
	if why := s.unconfirmed(); why != "" && (!rt.unconfirmed || !c.local) {
		if !c.known() {
			return nil, errStranger
		}
		return nil, api.Errorf(api.CodeUnconfirmed, "this server serves nothing until it is confirmed: %s; after checking the machines that it lists, run `mandos-escrow server confirm --state DIR` on it", why)
	}
	if !c.may(rt.access) {
		err := s.forbidden(rt, c)
		s.refused(rt, c, err)
		return nil, err
	}
	result, err := rt.handle(s, c)
	err = s.translate(err)
	if code := api.CodeOf(err); code == api.CodeRefused || code == api.CodeNotApproved {
		s.refused(rt, c, err)
	}
	return result, err
}

func (s *Server) forbidden(rt route, c call) error {
	if c.admin == nil || c.rescue() != nil {
		return errStranger
	}
	switch rt.access {
	case local:
		return api.Errorf(api.CodeRefused, "refused: this is done on the server itself, with --state")
	case machines:
		return api.Errorf(api.CodeRefused, "refused: only a machine does this, with its own identity")
	}
	return api.Errorf(api.CodeRefused, "refused: %s has the role %s; this needs the role %s", c.admin.Name, c.admin.Role, roleOf[rt.access])
}

// refused keeps a refusal of somebody who is known, under its own name.
func (s *Server) refused(rt route, c call, why error) {
	s.log.Warn("refused", "route", rt.pattern, "actor", c.actor, "why", why)
	if rt.refusal == "" || !c.known() {
		return
	}
	if (c.machine != nil || c.rescue() != nil) && !s.refusals.due(c.key.KeyID(), rt.refusal, c.now) {
		return
	}
	err := s.store.Update(func(tx *store.Tx) error {
		event := store.Event{Time: c.now, Actor: c.actor, Action: rt.refusal, Detail: why.Error()}
		if id := c.PathValue("id"); id != "" {
			if r, err := tx.Request(id); err == nil {
				event.Request = r.ID
			} else if e, err := tx.Entry(id); err == nil {
				event.Packet = e.ID
			}
		}
		return tx.Audit(event)
	})
	if err != nil {
		s.log.Error("audit of a refusal", "err", err)
	}
}

// translate gives the errors of the rooms their codes.
func (s *Server) translate(err error) error {
	var coded *api.Error
	switch {
	case err == nil || errors.As(err, &coded):
		return err
	case errors.Is(err, escrow.ErrPurged):
		return api.Errorf(api.CodeNotFound, "%v", err)
	case errors.Is(err, escrow.ErrHeld):
		return api.Errorf(api.CodeRefused, "refused: %v: `mandos-escrow packet unhold`, or `policy set --hold=false` for a group, ends a hold", err)
	case errors.Is(err, escrow.ErrNewest):
		return api.Errorf(api.CodeRefused, "refused: %v: without it nothing recovers the volume; if that is meant, say --newest", err)
	case errors.Is(err, escrow.ErrState):
		return api.Errorf(api.CodeConflict, "%v", err)
	case errors.Is(err, store.ErrNotFound):
		return api.Errorf(api.CodeNotFound, "not found: %v", err)
	case errors.Is(err, store.ErrExists):
		return api.Errorf(api.CodeConflict, "%v", err)
	case errors.Is(err, recovery.ErrNotApproved):
		return api.Errorf(api.CodeNotApproved, "%v", err)
	case isAny(err, recovery.ErrOwn, recovery.ErrInvited, recovery.ErrRescueOver, recovery.ErrTwice, recovery.ErrExpired, recovery.ErrOver, recovery.ErrNotYours,
		store.ErrTokenExpired, store.ErrTokenUsed, store.ErrTokenRevoked):
		return api.Errorf(api.CodeRefused, "refused: %v", err)
	case isAny(err, escrow.ErrLimit, store.ErrFull):
		return api.Errorf(api.CodeLimit, "%v", err)
	case isAny(err, escrow.ErrIntegrity, recovery.ErrRequest, recovery.ErrApproval, api.ErrRegistration):
		return api.Errorf(api.CodeIntegrity, "%v", err)
	}
	return err
}

func isAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// reply writes the answer; with the signed head to those who are known, or who
// just became so. Strangers keep no connection.
func (s *Server) reply(w http.ResponseWriter, c call, result any, err error) {
	if !c.known() {
		w.Header().Set("Connection", "close")
	}
	if !c.local && (c.known() || err == nil) {
		s.addHead(w.Header())
	}
	if stream, ok := result.(*stream); ok && err == nil {
		defer stream.Close()
		w.Header().Set(api.HeaderSize, strconv.FormatInt(stream.size, 10))
		if _, err := io.Copy(w, stream); err != nil {
			s.log.Warn("reply cut off", "actor", c.actor, "err", err)
		}
		return
	}
	status := http.StatusOK
	if err != nil {
		var coded *api.Error
		if !errors.As(err, &coded) {
			s.log.Error("internal error", "path", c.URL.Path, "actor", c.actor, "err", err)
			switch {
			case c.local:
				coded = api.Errorf(api.CodeInternal, "%v", err)
			case c.known():
				coded = api.Errorf(api.CodeInternal, "internal error; the server's log has the cause")
			default:
				coded = errStranger
			}
		}
		status, result = coded.Code.Status(), coded
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(result); err != nil {
		s.log.Warn("reply cut off", "actor", c.actor, "err", err)
	}
}

// stream is a reply that is a file.
type stream struct {
	io.ReadCloser
	size int64
}
