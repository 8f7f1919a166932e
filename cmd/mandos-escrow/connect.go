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
// otherwise.
func (g *globals) connect(ctx context.Context) (*session, error) {
	switch {
	case g.state != "" && g.home != "":
		return nil, usage("--state acts on the server itself, --home as an administrator: give one of them")
	case g.state != "":
		return g.connectState(ctx)
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

func (g *globals) connectHome() (*session, error) {
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
	switch len(members) {
	case 0:
		return nil, fmt.Errorf("%w: %s is known to no server yet: `mandos-escrow --home %s admin login --invite-file FILE`", config.ErrHome, dir, dir)
	case 1:
	default:
		names := []string{}
		for _, m := range members {
			names = append(names, m.Server.Name)
		}
		return nil, fmt.Errorf("%w: %s is known to %d servers (%s); this version acts on one: use a home for each", config.ErrHome, dir, len(members), strings.Join(names, ", "))
	}
	m := members[0]
	if err := home.ForgetOver(time.Now()); err != nil {
		g.warn(fmt.Sprintf("one-off keys of requests that are over are still in %s: %v", dir, err))
	}
	witness := api.NewWitness(home.HeadFile(m.Server.KeyID), m.Server.KeyID)
	witness.Warn = g.warn
	c, err := api.Dial(m.Server, key, witness)
	if err != nil {
		return nil, err
	}
	return &session{Client: c, close: c.Close, home: home, key: key, membership: m}, nil
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
