package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// right passes every check, and differs from another that does.
const rightDigits = "000011-000001-000002-000014-000037-000049-000061-000073"

// talk runs a reading with the lines that are typed, and returns what stood on
// the screen before each of them.
func talk(t *testing.T, clears bool, lines ...string) (screens []string, typed [][]byte, err error) {
	t.Helper()
	var screen bytes.Buffer
	p := phone{screen: &screen, clears: clears, title: "title", groups: bytes.Split([]byte(rightDigits), []byte("-"))}
	p.ask = func(prompt string) ([]byte, error) {
		screens = append(screens, screen.String()+prompt)
		screen.Reset()
		if len(typed) == len(lines) {
			return nil, errors.New("hung up")
		}
		typed = append(typed, []byte(lines[len(typed)]))
		return typed[len(typed)-1], nil
	}
	err = p.run()
	return append(screens, screen.String()), typed, err
}

func TestPhone(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  []string // what the screen says after each line, and at the beginning
		left  bool
	}{
		"read through": {
			[]string{"", "", "", "", "", "", "", "", "y"},
			[]string{"group 1 of 8:   000011", "group 2 of 8", "group 3", "group 4", "group 5", "group 6", "group 7", "group 8 of 8:   000073", "Did it open", ""},
			false,
		},
		"read back": {
			[]string{"000011", "0000 01 ", "", "", "", "", "", "000073", "yes"},
			[]string{"group 1", "Group 1 is right.\n\n  group 2", "Group 2 is right.\n\n  group 3", "group 4", "group 5", "group 6", "group 7", "group 8", "Group 8 is right.", ""},
			false,
		},
		"a wrong digit": {[]string{"000012", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"two swapped":   {[]string{"000101", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"other groups":  {[]string{"000001", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"a possible one, but not this one": {
			[]string{"000022", "q"}, []string{"group 1", "What was read back is not group 1. Read it out again:\n\n  group 1", ""}, true,
		},
		"too short":         {[]string{"00001", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"something else":    {[]string{"what?", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"once more":         {[]string{"", "r", "q"}, []string{"group 1", "group 2", "Once more, group 2:\n\n  group 2", ""}, true},
		"a group by number": {[]string{"6", "1", "q"}, []string{"group 1", "group 6 of 8", "group 1 of 8", ""}, true},
		"no such group":     {[]string{"9", "q"}, []string{"group 1", "group 1 is mistyped", ""}, true},
		"not done yet":      {[]string{"8", "", "no", "", "8", "q"}, []string{"group 1", "group 8", "Did it", "Did it", "Did it", "group 8", ""}, true},
		"hung up":           {[]string{""}, []string{"group 1", "group 2", ""}, true},
	} {
		t.Run(name, func(t *testing.T) {
			screens, typed, err := talk(t, true, c.lines...)
			if (err != nil) != c.left || c.left && !errors.Is(err, errLeft) {
				t.Errorf("ended with %v", err)
			}
			if len(screens) != len(c.want) {
				t.Fatalf("%d screens: %q", len(screens), screens)
			}
			for i, want := range c.want {
				if !strings.Contains(screens[i], want) {
					t.Errorf("screen %d is %q, without %q", i, screens[i], want)
				}
				if strings.Count(screens[i], " of 8:") > 1 {
					t.Errorf("screen %d shows several groups: %q", i, screens[i])
				}
			}
			for i, line := range typed {
				if len(bytes.Trim(line, "\x00")) != 0 {
					t.Errorf("typed line %d was not wiped: %q", i, line)
				}
			}
			// each screen begins with an empty one, and the last is left
			for i, s := range screens[:len(screens)-1] {
				if !strings.HasPrefix(strings.TrimPrefix(s, otherScreen), emptyScreen) {
					t.Errorf("screen %d keeps what was before: %q", i, s)
				}
			}
			if last := screens[len(screens)-1]; !strings.HasSuffix(last, emptyScreen+firstScreen) || strings.ContainsAny(last, "0") && regexp.MustCompile(`\d{6}`).MatchString(last) {
				t.Errorf("what is left is %q", last)
			}
		})
	}
}

func TestPhoneDumb(t *testing.T) {
	screens, _, err := talk(t, false, "q")
	if all := strings.Join(screens, ""); !errors.Is(err, errLeft) || strings.Contains(all, "\x1b") || !strings.Contains(all, "keeps what it showed") {
		t.Errorf("%v: %q", err, all)
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no room") }

// TestPhoneUnseen: what could not be shown was not read out.
func TestPhoneUnseen(t *testing.T) {
	p := phone{screen: fullDisk{}, groups: bytes.Split([]byte(rightDigits), []byte("-")), ask: func(string) ([]byte, error) { return []byte("y"), nil }}
	if err := p.run(); err == nil {
		t.Error("done, and nothing was seen")
	}
}

// cmdPhone: `phone CODE ANSWERS COMMAND...` runs a command on a terminal of its
// own and answers each prompt: `right` types the group that is shown, `wrong`
// another one, `next` nothing, and what else stands there is typed. All that it
// read, in the order of the groups, is put in the file phone.read; the
// screen in phone.screen.
func cmdPhone(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: phone CODE ANSWERS COMMAND...")
	}
	code, err := strconv.Atoi(args[0])
	ts.Check(err)
	program, err := exec.LookPath(args[2])
	ts.Check(err)
	master, slave := openTerminal(ts)
	defer master.Close()
	cmd := exec.Command(program, args[3:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "HOME="+ts.Getenv("HOME"), "XDG_CONFIG_HOME="+ts.Getenv("XDG_CONFIG_HOME"), "TERM=xterm", "PATH="+ts.Getenv("PATH"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	ts.Check(cmd.Start())
	ts.Check(slave.Close())
	overdue := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	screen, groups := converse(master, strings.Fields(args[1]))
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != code {
		ts.Fatalf("exit %d, wanted %d: %v\n%q", cmd.ProcessState.ExitCode(), code, err, screen)
	}
	ts.Check(os.WriteFile(ts.MkAbs("phone.screen"), screen, 0o600))
	ts.Check(os.WriteFile(ts.MkAbs("phone.read"), []byte(strings.Join(groups, "-")), 0o600))
}

var shownGroup = regexp.MustCompile(`group (\d) of 8:   (\d{6})`)

// converse answers prompts until the other end closes.
func converse(terminal *os.File, answers []string) (screen []byte, groups []string) {
	var since []byte
	for buf := make([]byte, 1024); ; {
		n, err := terminal.Read(buf)
		screen, since = append(screen, buf[:n]...), append(since, buf[:n]...)
		if err != nil { // EIO: the program ended
			return screen, groups
		}
		if !bytes.HasSuffix(since, []byte("> ")) || len(answers) == 0 {
			continue
		}
		digits := ""
		if m := shownGroup.FindSubmatch(since); m != nil {
			digits = string(m[2])
			if number := int(m[1][0] - '0'); number == len(groups)+1 {
				groups = append(groups, digits)
			}
		}
		answer := answers[0]
		switch answer {
		case "right":
			answer = digits
		case "wrong":
			answer = digits[1:] + digits[:1] + "1"
		case "next":
			answer = ""
		}
		answers, since = answers[1:], nil
		fmt.Fprintf(terminal, "%s\n", answer)
	}
}

func openTerminal(ts *testscript.TestScript) (master, slave *os.File) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	ts.Check(err)
	ts.Check(unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	ts.Check(err)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	ts.Check(err)
	return master, slave
}
