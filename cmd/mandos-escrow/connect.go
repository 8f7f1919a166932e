package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
	"mandos-escrow/internal/server"
)

// errForeign: a key or a policy that is not the pinned one.
var errForeign = errors.New("not what this home has pinned")

// session is a connection to one server, as somebody.
type session struct {
	*api.Client
	close      func()
	home       config.Home
	key        *identity.Key
	membership config.Membership
}

// connect acts on the server itself with --state, and as an administrator
// otherwise: at one server.
func (g *globals) connect(ctx context.Context) (*session, error) {
	c, err := g.connectAll(ctx)
	if err != nil {
		return nil, err
	}
	if len(c) == 1 {
		return c[0], nil
	}
	defer c.close()
	names := []string{}
	for _, s := range c {
		names = append(names, safe(s.Name))
	}
	return nil, usage("this acts on one server, and the home is known to %d (%s): name one with --server", len(c), strings.Join(names, ", "))
}

// connectAll is connect for what can be done at several servers.
func (g *globals) connectAll(ctx context.Context) (circle, error) {
	switch {
	case g.state != "" && g.home != "":
		return nil, usage("--state acts on the server itself, --home as an administrator: give one of them")
	case g.state != "" && g.server != "":
		return nil, usage("--state acts on the server itself: leave --server out")
	case g.state != "":
		s, err := g.connectState(ctx)
		return circle{s}, err
	}
	return g.connectHome()
}

// connectState reaches the running server through its control socket, and
// opens the store itself only when none runs.
func (g *globals) connectState(ctx context.Context) (*session, error) {
	socket := server.Socket(g.state)
	if conn, err := api.DialUnix(ctx, socket); err == nil {
		conn.Close()
		c := api.DialControl(socket)
		return &session{Client: c, close: c.Close}, nil
	}
	state, err := server.OpenState(g.state)
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(g.err, &slog.HandlerOptions{Level: slog.LevelError}))
	s := server.New(state, log, time.Now)
	c := api.InProcess(s.Handler(true, func(*http.Request) string { return server.LocalActor() }))
	return &session{Client: c, close: func() { state.Close() }}, nil
}

// connectHome makes a session for each server that the home is known to, or for
// the one that --server names.
func (g *globals) connectHome() (circle, error) {
	dir, err := g.homeDir()
	if err != nil {
		return nil, err
	}
	home := config.Home{Dir: dir}
	key, err := home.Key()
	if err != nil {
		return nil, err
	}
	members, err := home.Memberships()
	if err != nil {
		return nil, err
	}
	if len(members) == 0 {
		return nil, fmt.Errorf("%w: %s is known to no server yet: `mandos-escrow --home %s admin login --invite-file FILE`", config.ErrHome, dir, dir)
	}
	if members, err = chosen(members, g.server); err != nil {
		return nil, err
	}
	if err := home.ForgetOver(time.Now()); err != nil {
		g.warn(fmt.Sprintf("one-off keys of requests that are over are still in %s: %v", dir, err))
	}
	var c circle
	for _, m := range members {
		witness := api.NewWitness(home.HeadFile(m.Server.KeyID), m.Server.KeyID)
		witness.Warn = func(text string) { g.warn(safe(m.Server.Name) + ": " + text) }
		client, err := api.Dial(m.Server, key, witness)
		if err != nil {
			return nil, err
		}
		c = append(c, &session{Client: client, close: client.Close, home: home, key: key, membership: m})
	}
	return c, nil
}

// chosen are the memberships that a word means: a server's name, or its key ID or
// the beginning of it; all without a word.
func chosen(members []config.Membership, word string) ([]config.Membership, error) {
	if word == "" {
		return members, nil
	}
	var fits []config.Membership
	names := []string{}
	for _, m := range members {
		if id := string(m.Server.KeyID); m.Server.Name == word || len(word) >= 4 && strings.HasPrefix(id, strings.ToLower(word)) {
			fits = append(fits, m)
		}
		names = append(names, safe(m.Server.Name)+", key ID "+m.Server.KeyID.Short())
	}
	if len(fits) != 1 {
		return nil, usage("--server %s means %d of the servers that this home is known to:\n  %s", word, len(fits), strings.Join(names, "\n  "))
	}
	return fits, nil
}

// serverID is the key ID of the server, which a home has pinned.
func (s *session) serverID(ctx context.Context) (identity.KeyID, error) {
	if s.key != nil {
		return s.membership.Server.KeyID, nil
	}
	var status api.Status
	err := s.Call(ctx, "GET", "/v1/status", nil, &status)
	return status.KeyID, err
}

// call connects, makes one call, and closes.
func (g *globals) call(ctx context.Context, method, path string, in, out any) error {
	s, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return s.Call(ctx, method, path, in, out)
}

// input reads a file that a flag names, "-" for standard input.
func (g *globals) input(path string) ([]byte, error) {
	return config.ReadInput(path, g.in, g.warn)
}

// secretInput reads a secret from the file that a flag names, less one newline
// at its end, or asks for it on the terminal.
func (g *globals) secretInput(path, flag, prompt string) ([]byte, error) {
	if path != "" {
		data, err := g.input(path)
		if err != nil {
			return nil, err
		}
		if data = config.TrimNewline(data); len(data) == 0 {
			return nil, fmt.Errorf("%s is empty", path)
		}
		return data, nil
	}
	return g.ask(prompt, flag)
}

// newSecret reads a chosen passphrase, twice on a terminal, and refuses a weak
// one.
func (g *globals) newSecret(path, flag, prompt string) ([]byte, error) {
	data, err := g.secretInput(path, flag, prompt)
	if err != nil {
		return nil, err
	}
	if err := secret.Strong(data); err != nil {
		secret.Wipe(data)
		return nil, fmt.Errorf("%s: %w", strings.TrimSuffix(prompt, ": "), err)
	}
	if path != "" {
		return data, nil
	}
	again, err := g.ask("Once more: ", flag)
	defer secret.Wipe(again)
	if err != nil {
		return nil, err
	}
	if string(again) != string(data) {
		secret.Wipe(data)
		return nil, errors.New("the two are not the same")
	}
	return data, nil
}
