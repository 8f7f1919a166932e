package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// Deadlines of the port. A boot that waits for approval keeps its connection
// longer; package unlock has the deadlines of that protocol.
const (
	headerTimeout = 10 * time.Second
	callTimeout   = 60 * time.Second
	idleTimeout   = 60 * time.Second
	stopTimeout   = 5 * time.Second
	sweepInterval = time.Minute
	purgeInterval = time.Hour
)

// Run serves until ctx ends, then lets calls that are under way finish.
func (s *Server) Run(ctx context.Context) error {
	if why := s.unconfirmed(); why != "" {
		s.log.Warn("this server serves nothing until `server confirm`", "why", why)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	port, err := s.network(ctx)
	if err != nil {
		return err
	}
	control, err := s.control()
	if err != nil {
		return err
	}
	listeners, err := listen(s.state.Settings.Listen)
	if err != nil {
		return err
	}
	socket, err := listenControl(s.state.Dir)
	if err != nil {
		closeAll(listeners)
		return err
	}
	defer os.Remove(Socket(s.state.Dir))
	failed := make(chan error, len(listeners)+1)
	for _, l := range listeners {
		s.log.Info("listening", "address", l.Addr().String(), "key_id", string(s.key.KeyID()))
		go func() { failed <- port.ServeTLS(&limited{Listener: l, caps: s.caps}, "", "") }()
	}
	go func() { failed <- control.Serve(socket) }()
	go s.sweep(ctx)
	go s.sweepPackets(ctx)
	var announcer sync.WaitGroup
	if s.Announce {
		announcer.Go(func() { s.announce(ctx, listeners) })
	}
	if err := notify("READY=1"); err != nil {
		s.log.Warn("tell the service manager", "err", err)
	}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	_ = notify("STOPPING=1")
	s.log.Info("stopping")
	cancel() // ends boots that wait
	stop, done := context.WithTimeout(context.Background(), stopTimeout)
	defer done()
	for _, server := range []*http.Server{port, control} {
		if server.Shutdown(stop) != nil {
			server.Close()
		}
	}
	s.boots.Wait()
	announcer.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// network is the one port: ALPN tells the boot protocol from the API.
func (s *Server) network(ctx context.Context) (*http.Server, error) {
	config, err := s.key.ServerTLS(unlock.Protocol, api.Protocol)
	if err != nil {
		return nil, err
	}
	boot := func(_ *http.Server, conn *tls.Conn, _ http.Handler) {
		s.boots.Add(1)
		defer s.boots.Done()
		s.vouchBoot(conn)
		if err := unlock.Serve(ctx, conn, source{s}); err != nil && !errors.Is(err, unlock.ErrRefused) {
			s.log.Warn("boot request failed", "from", conn.RemoteAddr().String(), "err", err)
		}
	}
	return &http.Server{
		Handler:           s.Handler(false, nil),
		TLSConfig:         config,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){unlock.Protocol: boot},
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       callTimeout,
		WriteTimeout:      callTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext:       withCounted,

		DisableGeneralOptionsHandler: true,
	}, nil
}

// control serves the socket of the state folder to whoever may open it, which
// is the server's own user and root.
func (s *Server) control() (*http.Server, error) {
	type peer struct{}
	actor := func(r *http.Request) string {
		if uid, ok := r.Context().Value(peer{}).(uint32); ok {
			return fmt.Sprintf("local:%d", uid)
		}
		return "local:unknown"
	}
	return &http.Server{
		Handler:           s.Handler(true, actor),
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if uid, err := peerUID(conn); err == nil {
				return context.WithValue(ctx, peer{}, uid)
			}
			return ctx
		},
	}, nil
}

func peerUID(conn net.Conn) (uint32, error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, credErr); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// LocalActor is how the audit log names a command that opened the store itself.
func LocalActor() string { return fmt.Sprintf("local:%d", os.Getuid()) }

func listen(addresses []string) ([]net.Listener, error) {
	var out []net.Listener
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			closeAll(out)
			return nil, fmt.Errorf("listen on %s: %w", a, err)
		}
		out = append(out, l)
	}
	return out, nil
}

func closeAll[C io.Closer](list []C) {
	for _, l := range list {
		l.Close()
	}
}

// listenControl makes the control socket. Only the holder of the store's lock
// comes here, so a socket that stands there is a dead one. Its mode is set
// before it has a name, which gives nobody else a moment; a umask would count for
// the whole process. It goes by way of /proc/self/fd, because sun_path has room
// for 108 bytes only (unix(7)).
func listenControl(dir string) (net.Listener, error) {
	if err := os.Remove(Socket(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	private := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, failed)
	}}
	l, err := private.Listen(context.Background(), "unix", filepath.Join(fmt.Sprintf("/proc/self/fd/%d", folder.Fd()), socketFile))
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l, nil
}

// sweep does what is due without anybody asking.
func (s *Server) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		if err := s.expireRequests(s.now()); err != nil {
			s.log.Error("expire requests", "err", err)
		}
		if err := s.expireRescues(s.now()); err != nil {
			s.log.Error("expire rescue invites", "err", err)
		}
		if err := s.expireMachines(s.now()); err != nil {
			s.log.Error("time machines out", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// sweepPackets purges what is due, at the start and every hour: no retention is
// shorter than that.
func (s *Server) sweepPackets(ctx context.Context) {
	ticker := time.NewTicker(purgeInterval)
	defer ticker.Stop()
	for {
		if err := s.purge(s.now()); err != nil {
			s.log.Error("purge packets", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// expireMachines writes down that a timeout has passed, so that no clock that
// is set back revives the machine.
func (s *Server) expireMachines(now time.Time) error {
	var due []unlock.Machine
	err := s.store.View(func(tx *store.Tx) error {
		for m, err := range tx.Machines() {
			if err != nil {
				return err
			}
			if m.Enabled && !m.Expire(now).Enabled {
				due = append(due, m)
			}
		}
		return nil
	})
	if err != nil || len(due) == 0 {
		return err
	}
	return s.store.Update(func(tx *store.Tx) error {
		for _, d := range due {
			m, err := tx.Machine(d.KeyID)
			if err != nil {
				return err
			}
			expired := m.Expire(now)
			if !m.Enabled || expired.Enabled {
				continue
			}
			if err := tx.PutMachine(expired); err != nil {
				return err
			}
			if err := tx.Audit(store.Event{Time: now, Actor: "server", Action: "machine.timeout", Machine: string(m.KeyID), Detail: m.Name}); err != nil {
				return err
			}
		}
		return nil
	})
}

func splitListen(address string) (host, port string, err error) {
	if host, port, err = net.SplitHostPort(address); err != nil || port == "" {
		return "", "", fmt.Errorf("%q is not HOST:PORT or :PORT", address)
	}
	return host, port, nil
}

// notify tells systemd how far the service is (sd_notify(3)).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte(state))
	return err
}
