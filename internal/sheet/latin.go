package sheet

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// latin writes text in the encoding of the page's fonts (Windows-1252, of which
// the part that is Latin-1). What they lack is escaped as in Go, and so is the
// backslash, so that no two names look the same.
func latin(text string) string {
	var out strings.Builder
	for i, r := range text {
		switch {
		case r == '\\':
			out.WriteString(`\\`)
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], string(utf8.RuneError)):
			fmt.Fprintf(&out, `\x%02x`, text[i])
		case r >= 0x20 && r < 0x7f, r > 0xa0 && r <= 0xff && r != 0xad:
			out.WriteByte(byte(r))
		case r <= 0xffff:
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			fmt.Fprintf(&out, `\U%08x`, r)
		}
	}
	return out.String()
}

// escapeLength is how many bytes the escape at the beginning of text has.
func escapeLength(text string) int {
	n := map[byte]int{'x': 4, 'u': 6, 'U': 10}[(text + " ")[1]]
	return min(max(n, 2), len(text))
}
