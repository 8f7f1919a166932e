package initrd

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// plan is what the words together ask for. Without an ip= word every link gets its addresses by itself.
type plan struct {
	ips     []*ipConfig
	devices []*deviceConfig
	dns     []netip.Addr
}

// readPlan takes the words of the command line, then those of the file, which may be absent. An ip= word on the command line sets those of
// the file aside, so that somebody at the boot loader can overrule it. Errors are reported one by one: the rest is done all the same.
func readPlan(words []string, file string, report func(format string, a ...any)) *plan {
	p := &plan{}
	for _, w := range words {
		if err := p.add(w); err != nil {
			report("%v", err)
		}
	}
	overruled := len(p.ips) > 0
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		report("network: %v", err)
	}
	for line := range strings.Lines(string(data)) {
		line, _, _ = strings.Cut(line, "#")
		for _, w := range strings.Fields(line) {
			if overruled && strings.HasPrefix(w, "ip=") {
				continue
			}
			if err := p.add(w); err != nil {
				report("%s: %v", file, err)
			}
		}
	}
	return p
}

// add takes one word. The error is an ErrWord.
func (p *plan) add(text string) error {
	if len(p.ips)+len(p.devices)+len(p.dns) == maxWords {
		return fmt.Errorf("%w %s: more than %d words", ErrWord, text, maxWords)
	}
	w, err := parseWord(text)
	switch {
	case err != nil:
		return err
	case w.ip != nil:
		p.ips = append(p.ips, w.ip)
	case w.device != nil:
		for _, name := range append([]string{w.device.name}, w.device.ports...) {
			if p.device(name) != nil && name == w.device.name || p.masterOf(name) != nil && name != w.device.name {
				return fmt.Errorf("%w %s: another word has %s already", ErrWord, text, name)
			}
		}
		p.devices = append(p.devices, w.device)
	default:
		p.dns = append(p.dns, w.dns)
	}
	return nil
}

// off: no link is to be touched.
func (p *plan) off() bool {
	return slices.ContainsFunc(p.ips, func(c *ipConfig) bool { return c.device == "" && c.mode == modeOff })
}

func (p *plan) device(name string) *deviceConfig {
	for _, d := range p.devices {
		if d.name == name {
			return d
		}
	}
	return nil
}

// masterOf is the bridge or bond that a link is to be a port of.
func (p *plan) masterOf(name string) *deviceConfig {
	for _, d := range p.devices {
		if slices.Contains(d.ports, name) {
			return d
		}
	}
	return nil
}

func (p *plan) isParent(name string) bool {
	return slices.ContainsFunc(p.devices, func(d *deviceConfig) bool { return d.parent == name })
}

// configs are those for a link: the words that name it, otherwise those for every link. None: it is not wanted.
func (p *plan) configs(name string) []*ipConfig {
	var named, common []*ipConfig
	for _, c := range p.ips {
		switch c.device {
		case name:
			named = append(named, c)
		case "":
			common = append(common, c)
		}
	}
	switch {
	case slices.ContainsFunc(named, func(c *ipConfig) bool { return c.mode == modeOff }):
		return nil
	case len(named) > 0:
		return named
	case len(common) > 0:
		return common
	case len(p.ips) == 0:
		return []*ipConfig{{mode: modeAuto}}
	case p.isParent(name), p.device(name) != nil:
		return []*ipConfig{{mode: modeIPv6}}
	}
	return nil
}

// names are the links that ip= words name, with commas between, for the hooks.
func (p *plan) names() string {
	var names []string
	for _, c := range p.ips {
		if c.device != "" && !slices.Contains(names, c.device) {
			names = append(names, c.device)
		}
	}
	return strings.Join(names, ",")
}
