package initrd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// asking is a question of systemd-cryptsetup.
type asking struct {
	m            *machine
	file, socket string
	conn         *net.UnixConn
}

var questions int

// systemd asks as systemd does: a socket, then a file under its final name.
func (m *machine) systemd(id string) *asking {
	m.t.Helper()
	questions++
	dir := m.root.path("run/systemd/ask-password")
	a := &asking{m: m, file: filepath.Join(dir, fmt.Sprintf("ask.%06d", questions)), socket: filepath.Join(dir, fmt.Sprintf("sck.%06d", questions))}
	var err error
	if a.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: a.socket, Net: "unixgram"}); err != nil {
		m.t.Fatal(err)
	}
	pid := strconv.Itoa(os.Getpid())
	if err := os.MkdirAll(m.root.path("proc", pid), 0o755); err != nil {
		m.t.Fatal(err)
	}
	text := "[Ask]\nPID=" + pid + "\nSocket=" + a.socket + "\nAcceptCached=1\nEcho=0\nNotAfter=0\nSilent=0\nMessage=Please enter passphrase for disk x:\nIcon=drive-harddisk\nId=" + id + "\n"
	temporary := filepath.Join(dir, "tmp.x")
	if err := errors.Join(os.WriteFile(temporary, []byte(text), 0o644), os.Rename(temporary, a.file)); err != nil {
		m.t.Fatal(err)
	}
	return a
}

// reads waits for an answer, and takes the question away.
func (a *asking) reads() string {
	a.m.t.Helper()
	buf := make([]byte, 4096)
	if err := a.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		a.m.t.Fatal(err)
	}
	n, err := a.conn.Read(buf)
	if err != nil {
		a.m.t.Fatalf("%v; console:\n%s", err, a.m.console())
	}
	a.ends()
	return string(buf[:n])
}

// ends is also what becomes of it when somebody else answers.
func (a *asking) ends() {
	a.m.t.Helper()
	if err := errors.Join(os.Remove(a.file), a.conn.Close(), os.RemoveAll(a.socket)); err != nil {
		a.m.t.Fatal(err)
	}
}

// now is what has been sent so far.
func (a *asking) now() string {
	a.m.t.Helper()
	buf := make([]byte, 4096)
	if err := a.conn.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		a.m.t.Fatal(err)
	}
	n, err := a.conn.Read(buf)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		a.m.t.Fatal(err)
	}
	return string(buf[:n])
}
