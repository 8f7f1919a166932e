package initrd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// asks is a folder with one question in it, whose socket is there.
func asks(t *testing.T) (a *agent, file, text string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ask")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "sck.1")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	a = &agent{dir: dir, proc: "/proc", now: func() uint64 { return 1000 }}
	text = "[Ask]\nPID=" + strconv.Itoa(os.Getpid()) + "\nSocket=" + socket + "\nNotAfter=0\nId=cryptsetup:/dev/vda3\n"
	return a, filepath.Join(dir, "ask.1"), text
}

// TestQuestions: each change to a good question, and whether it still counts.
func TestQuestions(t *testing.T) {
	for name, c := range map[string]struct {
		old, new string
		device   string // empty: it does not count
	}{
		"good":                   {"", "", "/dev/vda3"},
		"in time":                {"NotAfter=0", "NotAfter=1000", "/dev/vda3"},
		"too late":               {"NotAfter=0", "NotAfter=999", ""},
		"no time":                {"NotAfter=0", "NotAfter=soon", ""},
		"dead process":           {"PID=", "PID=99999999", ""},
		"negative process":       {"PID=", "PID=-", ""},
		"no process":             {"PID=", "Process=", "/dev/vda3"},
		"keys of later versions": {"[Ask]", "[Ask]\nSilent=1\nFlags=0x3", "/dev/vda3"},
		"another section":        {"[Ask]", "[Other]", ""},
		"section ends":           {"Id=", "[Other]\nId=", ""},
		"no socket":              {"Socket=", "Sock=", ""},
		"socket elsewhere":       {"Socket=", "Socket=/run", ""},
		"socket above":           {"/sck.1", "/../sck.1", ""},
		"socket below":           {"/sck.1", "/x/sck.1", ""},
		"socket by a detour":     {"/sck.1", "/./sck.1", ""},
		"not of a volume":        {"cryptsetup:", "keyring:", ""},
		"no device":              {"/dev/vda3", "", ""},
		"no id":                  {"Id=", "Icon=", ""},
		"escaped":                {"/dev/vda3", `/dev/disk/by-label/a\tb\303\244\\\"\'`, "/dev/disk/by-label/a\tb\u00e4\\\"'"},
		"badly escaped":          {"/dev/vda3", `/dev/\9`, ""},
		"cut escape":             {"/dev/vda3", `/dev/\`, ""},
		"empty":                  {"[Ask]", "", ""},
		"huge":                   {"[Ask]", strings.Repeat("#\n", maxAsk/2) + "[Ask]", ""},
		"windows":                {"\n", "\r\n", "/dev/vda3"},
	} {
		t.Run(name, func(t *testing.T) {
			a, file, text := asks(t)
			if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, c.old, c.new)), 0o600); err != nil {
				t.Fatal(err)
			}
			found := a.pending()
			if c.device == "" && len(found) != 0 || c.device != "" && (len(found) != 1 || found[0].device != c.device) {
				t.Errorf("%+v", found)
			}
		})
	}
}

// TestHostileFiles: what is no regular file of ours is not read.
func TestHostileFiles(t *testing.T) {
	for name, place := range map[string]func(file, text string) error{
		"link": func(file, text string) error {
			return errors.Join(os.WriteFile(file+".real", []byte(text), 0o600), os.Rename(file+".real", filepath.Dir(file)+"/real"), os.Symlink("real", file))
		},
		"folder": func(file, _ string) error { return os.Mkdir(file, 0o700) },
		"fifo":   func(file, _ string) error { return unix.Mkfifo(file, 0o600) },
		"another's": func(file, text string) error {
			return errors.Join(os.WriteFile(file, []byte(text), 0o600), os.Chown(file, 65534, 65534))
		},
		"other name": func(file, text string) error { return os.WriteFile(filepath.Dir(file)+"/tmp.1", []byte(text), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			a, file, text := asks(t)
			if err := place(file, text); err != nil {
				t.Fatal(err)
			}
			if found := a.pending(); len(found) != 0 {
				t.Errorf("%+v", found)
			}
		})
	}
	none := &agent{dir: "/nonexistent/ask-password", now: monotonic}
	if found := none.pending(); len(found) != 0 {
		t.Errorf("%+v", found)
	}
}

// TestManyQuestions: a folder full of them costs no more than a bounded time.
func TestManyQuestions(t *testing.T) {
	a, file, text := asks(t)
	for i := range 3 * maxQuestions {
		if err := os.WriteFile(file+strconv.Itoa(i), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(a.pending()); n != maxQuestions {
		t.Errorf("%d", n)
	}
}

// TestQuestionIsGone: each way in which somebody else was first.
func TestQuestionIsGone(t *testing.T) {
	for name, c := range map[string]struct {
		gone func(file, socket string) error
		want error
	}{
		"file":   {func(file, _ string) error { return os.Remove(file) }, errGone},
		"socket": {func(_, socket string) error { return os.Remove(socket) }, errGone},
		"nobody listens": {func(_, socket string) error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
			return errors.Join(err, os.Remove(socket), unix.Bind(fd, &unix.SockaddrUnix{Name: socket}), unix.Close(fd))
		}, errGone},
		"a stream": {func(_, socket string) error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			return errors.Join(err, os.Remove(socket), unix.Bind(fd, &unix.SockaddrUnix{Name: socket}), unix.Listen(fd, 1))
		}, unix.EPROTOTYPE},
		"a link": {func(_, socket string) error {
			return errors.Join(os.Rename(socket, socket+"2"), os.Symlink(socket+"2", socket))
		}, errNoSocket},
	} {
		t.Run(name, func(t *testing.T) {
			a, file, text := asks(t)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			q := a.pending()[0]
			if err := c.gone(file, filepath.Join(a.dir, "sck.1")); err != nil {
				t.Fatal(err)
			}
			if err := q.answer([]byte("secret")); !errors.Is(err, c.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestWatch: it makes the folder, and hears of what is in it.
func TestWatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run/systemd/ask-password")
	a := &agent{dir: dir}
	changed, err := a.watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tmp.1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	<-changed
	if err := os.Rename(filepath.Join(dir, "tmp.1"), filepath.Join(dir, "ask.1")); err != nil {
		t.Fatal(err)
	}
	<-changed
	if _, err := (&agent{dir: "/proc/self/stat/x"}).watch(t.Context()); err == nil {
		t.Error("a folder that cannot be")
	}
}
