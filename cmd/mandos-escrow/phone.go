package main

import (
	"bytes"
	"cmp"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"os"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/secret"
)

// errLeft: somebody left the reading out, or hung up. What was released is kept.
var errLeft = errors.New("not read to its end; nothing is lost: run the same command again to go on")

// phone reads a recovery passphrase out on the terminal, one group at a time,
// and checks what the other end reads back. No group stays on the screen longer
// than it is talked about.
type phone struct {
	screen io.Writer
	clears bool // the screen knows the sequences of a terminal
	title  string
	groups [][]byte
	ask    func(prompt string) ([]byte, error) // what it returns is wiped here

	at     int // group that is shown, from 0; the number of groups: all were
	note   string
	faults error // the first of the screen
}

// What a terminal is told: another screen, which keeps no lines that scrolled
// away, and its end; an empty one.
const (
	otherScreen = "\x1b[?1049h"
	firstScreen = "\x1b[?1049l"
	emptyScreen = "\x1b[H\x1b[2J"
)

const phoneHelp = "Enter: next   digits: as they were read back   r: once more   1-8: that group   q: leave, and go on later"

// phoneFile reads out what is in a packet in a file.
func phoneFile(g *globals, o recoverOptions) error {
	if o.out != "" {
		return usage("--phone and --out are two ways for the same: give one")
	}
	tty, err := terminal(g)
	if err != nil {
		return usage("--phone needs a terminal")
	}
	opened, err := openFile(g, o.openOptions(), o.openFile)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	return readOut(g, tty, opened.Opened)
}

// readOut reads an opened recovery passphrase out.
func readOut(g *globals, tty *os.File, opened *escrow.Opened) error {
	if opened.Passphrase == nil {
		return usage("--phone reads a recovery passphrase; this is the volume key: collect it with --out or --device")
	}
	passphrase := opened.Passphrase.Passphrase
	if escrow.CheckRecoveryPassphrase(passphrase) != nil {
		return usage("--phone reads groups of digits; this is another kind of passphrase: collect it with --out or --device")
	}
	terminal := os.Getenv("TERM")
	p := phone{
		screen: tty, clears: terminal != "" && terminal != "dumb",
		title:  fmt.Sprintf("Recovery passphrase of volume %s of %s: 8 groups of 6 digits. The dashes between them are typed, too.", safe(opened.Header.Volume.UUID), cmp.Or(safe(opened.Header.Machine), "a machine without a name")),
		groups: bytes.Split(passphrase, []byte("-")),
		ask:    func(prompt string) ([]byte, error) { return g.prompt(prompt, "--out FILE", true) },
	}
	return p.run()
}

// run returns nil when whoever reads says that the passphrase has served, and
// errLeft before that.
func (p *phone) run() error {
	p.control(otherScreen)
	defer p.end()
	for {
		p.control(emptyScreen)
		p.write("%s\n%s\n\n", p.title, phoneHelp)
		if p.note != "" {
			p.write("%s\n\n", p.note)
		}
		if p.at < len(p.groups) {
			p.write("  group %d of %d:   %s\n\n", p.at+1, len(p.groups), p.groups[p.at])
		}
		if p.faults != nil {
			return fmt.Errorf("show the recovery passphrase: %w", p.faults)
		}
		done, err := p.answer()
		if done || err != nil {
			return err
		}
	}
}

func (p *phone) write(format string, args ...any) {
	if _, err := fmt.Fprintf(p.screen, format, args...); err != nil && p.faults == nil {
		p.faults = err
	}
}

func (p *phone) control(sequence string) {
	if p.clears {
		p.write("%s", sequence)
	}
}

func (p *phone) end() {
	p.control(emptyScreen + firstScreen)
	if !p.clears {
		p.write("This terminal keeps what it showed: close it.\n")
	}
}

// answer asks for one line and goes where it says.
func (p *phone) answer() (done bool, err error) {
	prompt := "> "
	if p.at == len(p.groups) {
		prompt = "Did it open the disk? y: forget it here, 1-8: that group again, q: leave > "
	}
	line, err := p.ask(prompt)
	defer secret.Wipe(line)
	if err != nil {
		return false, fmt.Errorf("%w: %w", errLeft, err)
	}
	typed := bytes.TrimSpace(line)
	p.note = ""
	switch {
	case string(typed) == "q":
		return false, errLeft
	case len(typed) == 1 && typed[0] >= '1' && int(typed[0]-'0') <= len(p.groups):
		p.at = int(typed[0] - '1')
	case p.at == len(p.groups):
		return string(typed) == "y" || string(typed) == "yes", nil
	case len(typed) == 0:
		p.at++
	case string(typed) == "r":
		p.note = fmt.Sprintf("Once more, group %d:", p.at+1)
	default:
		p.compare(typed)
	}
	return false, nil
}

// compare tells whether what was read back is the group, and no more than that.
func (p *phone) compare(typed []byte) {
	digits := make([]byte, 0, len(typed))
	defer func() { secret.Wipe(digits) }()
	for _, c := range typed {
		if c != ' ' && c != '-' {
			digits = append(digits, c)
		}
	}
	switch {
	case subtle.ConstantTimeCompare(digits, p.groups[p.at]) == 1:
		p.note = fmt.Sprintf("Group %d is right.", p.at+1)
		p.at++
	case escrow.CheckGroup(p.at, digits) != nil:
		p.note = fmt.Sprintf("As it was read back, group %d is mistyped: a wrong digit, two swapped, or another group. Read it out again:", p.at+1)
	default:
		p.note = fmt.Sprintf("What was read back is not group %d. Read it out again:", p.at+1)
	}
}
