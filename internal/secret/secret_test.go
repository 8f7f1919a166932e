package secret

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestGenerated(t *testing.T) {
	for name, c := range map[string]struct {
		form string
		make func() string
	}{
		"boot passphrase":   {`^[A-Za-z0-9_-]{43}$`, func() string { return string(BootPassphrase()) }},
		"one-time password": {`^([a-km-np-z2-9]{4}-){3}[a-km-np-z2-9]{4}$`, func() string { return string(OneTimePassword()) }},
		"id":                {`^[0-9a-f]{32}$`, ID},
	} {
		form, seen := regexp.MustCompile(c.form), map[string]bool{}
		used := map[rune]bool{}
		for range 2000 {
			text := c.make()
			if !form.MatchString(text) || seen[text] {
				t.Fatalf("%s: %q", name, text)
			}
			seen[text] = true
			for _, r := range text {
				used[r] = true
			}
		}
		if want := map[string]int{"boot passphrase": 64, "one-time password": 33, "id": 16}[name]; len(used) != want {
			t.Errorf("%s uses %d characters, not %d", name, len(used), want)
		}
	}
	if a, b := Random(32), Random(32); len(a) != 32 || bytes.Equal(a, b) {
		t.Error("Random")
	}
}

func TestWipe(t *testing.T) {
	b := []byte("secret")
	Wipe(b)
	if !bytes.Equal(b, make([]byte, 6)) {
		t.Errorf("%q", b)
	}
	Wipe(nil)
}

func TestStrong(t *testing.T) {
	for passphrase, strong := range map[string]bool{
		"correct-horse-battery-staple-7719": true,
		"able cane dust echo":               true,
		"Tr0ub4dor&3xyz":                    true,
		"38571940286371940582":              true,
		"ünïcödé pässwörd":                  true,
		strings.Repeat("x7Kq2p", 85):        true,

		"":                           false,
		"short":                      false,
		"elevenchars":                false,
		"3857194028637194058":        false, // 19 digits
		"123456789012":               false,
		"aaaaaaaaaaaa":               false,
		"abababababab":               false,
		"abcabcabcabc":               false,
		"abcdefghijklmnop":           false,
		"zyxwvutsrqponm":             false,
		"1234567890abcdef":           false,
		"aaaabbbbccccddddeeeeffff":   false,
		strings.Repeat("x7Kq2p", 86): false, // longer than cryptsetup takes
	} {
		err := Strong([]byte(passphrase))
		if (err == nil) != strong || err != nil && !errors.Is(err, ErrWeak) {
			t.Errorf("%q: %v", passphrase, err)
		}
		if err != nil && len(passphrase) > 4 && strings.Contains(err.Error(), passphrase) {
			t.Errorf("the error shows the passphrase: %v", err)
		}
	}
}

// TestHarden runs itself as a child, because nothing takes it back.
func TestHarden(t *testing.T) {
	if os.Getenv("SECRET_TEST_HARDEN") == "" {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		child := exec.Command(self, "-test.run=^TestHarden$", "-test.count=1")
		child.Env = append(os.Environ(), "SECRET_TEST_HARDEN=1")
		if out, err := child.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	if err := Harden(); err != nil {
		t.Fatal(err)
	}
	limits, err := os.ReadFile("/proc/thread-self/limits")
	if err != nil || !regexp.MustCompile(`Max core file size +0 +0`).Match(limits) {
		t.Errorf("%v\n%s", err, limits)
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || n != 0 {
		t.Errorf("the process can be dumped: %d, %v", n, err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if locked := !regexp.MustCompile(`VmLck:\s+0 kB`).Match(status); mayLockAll() && !locked {
		t.Errorf("nothing is locked:\n%s", status)
	}
	if n := len(bytes.Repeat([]byte("x"), 64<<20)); n != 64<<20 { // a locked heap still grows
		t.Error(n)
	}
}
