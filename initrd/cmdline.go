package initrd

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// ErrWord: a word of the kernel command line, or of the network file, says nothing that can be done.
var ErrWord = errors.New("initrd: bad word")

// Cmdline is what the kernel command line tells the boot program.
type Cmdline struct {
	Off     bool     // mandos-escrow=off: do nothing
	Connect string   // mandos-escrow=connect:HOST:PORT: an address to try first; empty: none
	Words   []string // good network words in their order: ip=..., vlan=...
}

// ParseCmdline reads the text of /proc/cmdline. Errors, all of them ErrWord, name the words; what the others say is returned beside them.
func ParseCmdline(text string) (Cmdline, error) {
	var c Cmdline
	var errs []error
	for _, word := range kernelWords(text) {
		name, value, _ := strings.Cut(word, "=")
		switch {
		case name == "mandos-escrow":
			errs = append(errs, c.own(value))
		case networkWord(name):
			if _, err := parseWord(word); err != nil {
				errs = append(errs, err)
				continue
			}
			c.Words = append(c.Words, word)
		}
	}
	return c, errors.Join(errs...)
}

// own takes the value of mandos-escrow=.
func (c *Cmdline) own(value string) error {
	if value == "off" {
		c.Off = true
		return nil
	}
	address, ok := strings.CutPrefix(value, "connect:")
	if !ok {
		return fmt.Errorf("%w mandos-escrow=%s: neither off nor connect:ADDRESS:PORT", ErrWord, value)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%w mandos-escrow=%s: %w; an IPv6 address stands in brackets", ErrWord, value, err)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return fmt.Errorf("%w mandos-escrow=%s: not an address and a port from 1 to 65535", ErrWord, value)
	}
	c.Connect = address
	return nil
}

// kernelWords splits as the kernel does (parse_args in its lib/cmdline.c): at white space outside double quotes, which are dropped. What
// follows -- is for init.
func kernelWords(text string) []string {
	var words []string
	quoted := false
	for _, word := range strings.FieldsFunc(text, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && strings.ContainsRune(" \t\n", r)
	}) {
		if word == "--" {
			break
		}
		words = append(words, strings.ReplaceAll(word, `"`, ""))
	}
	return words
}
