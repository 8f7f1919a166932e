package initrd

import (
	"path/filepath"
	"strings"
)

// root is where everything lies that the boot program looks at beside the
// devices of questions: / but in tests.
type root string

func (r root) path(elem ...string) string {
	return filepath.Join(append([]string{string(r)}, elem...)...)
}

func (r root) devices() devices {
	return devices{disk: r.path("dev/disk"), block: r.path("sys/class/block"), dev: r.path("dev")}
}

// resolved is a path without links: the form in which /proc names files. A path
// that leads nowhere stays as it is.
func resolved(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return path
}

// printable makes one line of a text that others may have written: nothing in
// it moves a cursor or begins a line, and it has at most limit bytes.
func printable(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return ' '
		case r < ' ' || r > '~':
			return '?'
		}
		return r
	}, text)
	return strings.TrimSpace(text[:min(len(text), limit)])
}
