package initrd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/secret"
)

// agent finds the questions of systemd-cryptsetup by the Password Agents
// protocol (systemd.io/PASSWORD_AGENTS): files ask.* in a folder, each with the
// socket that an answer goes to.
type agent struct {
	dir  string
	proc string
	now  func() uint64 // CLOCK_MONOTONIC in microseconds
}

const (
	maxAsk       = 16 << 10 // bytes of a question; systemd writes some hundreds
	maxQuestions = 64       // files that are looked at
)

func monotonic() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0
	}
	return uint64(now.Nano() / 1000)
}

// watch makes the folder if it is not there, and sends whenever something in it
// changes, until the context ends. A channel that never sends comes with the
// error; looking again and again finds the questions as well, but later.
func (a *agent) watch(ctx context.Context) (<-chan struct{}, error) {
	changed := make(chan struct{}, 1)
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return changed, fmt.Errorf("watch for questions: %w", err)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return changed, fmt.Errorf("watch %s: %w", a.dir, err)
	}
	file := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, a.dir, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
		file.Close()
		return changed, fmt.Errorf("watch %s: %w", a.dir, err)
	}
	context.AfterFunc(ctx, func() { file.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := file.Read(buf); err != nil {
				return
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}()
	return changed, nil
}

// pending leaves out whatever it does not understand: other agents may.
func (a *agent) pending() []question {
	entries, err := os.ReadDir(a.dir)
	if err != nil {
		return nil
	}
	var found []question
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), "ask.") {
			continue
		}
		if q, err := a.question(entry.Name()); err == nil {
			found = append(found, q)
		}
		if len(found) == maxQuestions {
			break
		}
	}
	return found
}

func (a *agent) question(name string) (question, error) {
	path := filepath.Join(a.dir, name)
	text, err := a.read(path)
	if err != nil {
		return question{}, err
	}
	ask, err := parseAsk(text)
	switch {
	case err != nil:
		return question{}, err
	case filepath.Dir(ask.socket) != a.dir || filepath.Clean(ask.socket) != ask.socket:
		return question{}, fmt.Errorf("%s: a socket elsewhere", path)
	case ask.notAfter != 0 && ask.notAfter < a.now():
		return question{}, fmt.Errorf("%s: too late", path)
	case ask.pid != 0 && !lives(a.proc, ask.pid):
		return question{}, fmt.Errorf("%s: nobody asks any more", path)
	}
	return question{
		id:     fmt.Sprintf("%s %d", name, ask.pid),
		device: ask.device,
		answer: func(passphrase []byte) error { return a.answer(path, ask.socket, passphrase) },
	}, nil
}

// read takes a regular file that belongs to us, as root's do in the initramfs.
func (a *agent) read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Size > maxAsk {
		return nil, fmt.Errorf("%s is not a question", path)
	}
	return io.ReadAll(io.LimitReader(f, maxAsk))
}

// ask is what counts of a question's file.
type ask struct {
	pid      int
	notAfter uint64 // microseconds of CLOCK_MONOTONIC; 0: for ever
	socket   string
	device   string
}

var (
	errAsk      = errors.New("not a question for a volume")
	errNoSocket = errors.New("not a socket")
)

// parseAsk reads the section [Ask] of a question's file. Keys that it does not
// know are for others.
func parseAsk(text []byte) (ask, error) {
	var a ask
	section := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
		}
		key, value, ok := strings.Cut(line, "=")
		if section != "[Ask]" || !ok {
			continue
		}
		var err error
		switch key {
		case "PID":
			a.pid, err = strconv.Atoi(value)
		case "NotAfter":
			a.notAfter, err = strconv.ParseUint(value, 10, 64)
		case "Socket":
			a.socket = value
		case "Id":
			a.device, err = deviceOf(value)
		}
		if err != nil {
			return ask{}, fmt.Errorf("%w: %s: %w", errAsk, key, err)
		}
	}
	if a.device == "" || a.socket == "" || a.pid < 0 {
		return ask{}, fmt.Errorf("%w: no device or no socket", errAsk)
	}
	return a, nil
}

// deviceOf reads cryptsetup:DEVICE. The device is escaped as in C, so that it
// is one line.
func deviceOf(id string) (string, error) {
	escaped, ok := strings.CutPrefix(id, "cryptsetup:")
	if !ok {
		return "", errAsk
	}
	var device strings.Builder
	for escaped != "" {
		c, _, rest, err := strconv.UnquoteChar(escaped, '"')
		if err != nil && escaped[0] == '\\' && len(escaped) > 1 && escaped[1] == '\'' { // which Go escapes in characters only
			c, rest, err = '\'', escaped[2:], nil
		}
		if err != nil {
			return "", err
		}
		if c < 0x80 || !strings.HasPrefix(escaped, `\`) {
			device.WriteRune(c)
		} else {
			device.WriteByte(byte(c)) // one byte of a name, in octal or hex
		}
		escaped = rest
	}
	return device.String(), nil
}

// answer sends the passphrase. Who asks takes it from root alone, and removes
// file and socket when it has one.
func (a *agent) answer(file, socket string, passphrase []byte) error {
	if _, err := os.Lstat(file); err != nil {
		return errGone
	}
	st, err := os.Lstat(socket)
	if err != nil {
		return errGone
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%w: %s", errNoSocket, socket)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("answer a question: %w", err)
	}
	defer unix.Close(fd)
	packet := make([]byte, 1+len(passphrase))
	defer secret.Wipe(packet)
	packet[0] = '+'
	copy(packet[1:], passphrase)
	err = unix.Sendto(fd, packet, unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: socket})
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return errGone
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS):
		return errBusy
	case err != nil:
		return fmt.Errorf("send to %s: %w", socket, err)
	}
	return nil
}
