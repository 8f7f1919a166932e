package cryptsetup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	maxOutput = 64 << 10
	maxSecret = 64 << 10 // what a pipe takes before anyone reads it
	killAfter = 5 * time.Second
)

// fd is the /dev/fd path under which cryptsetup finds the n-th secret of a call.
func fd(n int) string { return fmt.Sprintf("/dev/fd/%d", 3+n) }

// run runs one command and returns its standard output, which the caller wipes if it is secret. Op names the command in
// errors. Each secret is readable for the child at fd(0), fd(1), and so on.
func (t Tool) run(ctx context.Context, op string, secrets [][]byte, args ...string) ([]byte, error) {
	pipes := make([]*os.File, 0, len(secrets))
	defer func() {
		for _, p := range pipes {
			p.Close()
		}
	}()
	for _, s := range secrets {
		r, err := filledPipe(s)
		if err != nil {
			return nil, fmt.Errorf("cryptsetup: %s: %w", op, err)
		}
		pipes = append(pipes, r)
	}
	return t.runWith(ctx, op, pipes, args...)
}

// runWith is run with files that are open already.
func (t Tool) runWith(ctx context.Context, op string, files []*os.File, args ...string) ([]byte, error) {
	path, err := t.path()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	// cryptsetup ends cleanly on SIGTERM; a header is never left half written.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = killAfter
	stderr := &limited{}
	cmd.Stderr = stderr
	cmd.ExtraFiles = files
	if t.Hold != nil {
		cmd.ExtraFiles = append(files[:len(files):len(files)], t.Hold)
	}
	out, err := capture(cmd)
	if err != nil {
		clear(out)
		return nil, failed(ctx, op, err, stderr.text)
	}
	return out, nil
}

// capture runs a command and reads its standard output straight into one buffer, so that a secret in it has no copies.
func capture(cmd *exec.Cmd) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd.Stdout = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, maxOutput)
	n, readErr := io.ReadFull(r, buf)
	if readErr == nil {
		_ = cmd.Cancel() // it may have ended by itself
		r.Close()
		readErr = fmt.Errorf("more than %d bytes of output", maxOutput)
	} else if errors.Is(readErr, io.ErrUnexpectedEOF) || errors.Is(readErr, io.EOF) {
		readErr = nil
	}
	if err := cmd.Wait(); err != nil {
		readErr = err
	}
	return buf[:n], readErr
}

// filledPipe returns the reading end of a pipe that holds the secret, and ends there.
func filledPipe(secret []byte) (*os.File, error) {
	if len(secret) == 0 {
		return nil, errors.New("empty passphrase or key")
	}
	if len(secret) > maxSecret {
		return nil, fmt.Errorf("passphrase or key of %d bytes, at most %d are possible", len(secret), maxSecret)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	// The kernel may give a user with many pipes smaller ones: then writing would wait for ever.
	if err := w.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		r.Close()
		return nil, err
	}
	if _, err := w.Write(secret); err != nil {
		r.Close()
		return nil, fmt.Errorf("fill pipe: %w", err)
	}
	return r, nil
}

// limited keeps the first bytes written to it, and drops the rest.
type limited struct{ text []byte }

func (l *limited) Write(p []byte) (int, error) {
	const most = 4096
	l.text = append(l.text, p[:min(len(p), most-len(l.text))]...)
	return len(p), nil
}

// operation names a command and its device in errors.
func operation(dev string, words ...string) string {
	return fmt.Sprintf("%s %q", strings.Join(words, " "), dev)
}
