package sheet

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/record"
)

// textWidth is that of a terminal, in characters. Commands may be longer: a line
// that is to be typed is not broken.
const textWidth = 80

// Text is the sheet for a terminal, without the code. With a usable secret in
// it, the caller must see to where it goes, and wipe it.
func (p Page) Text() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "RECOVERY SHEET   key ID %s\n\n", p.KeyID())
	for _, f := range p.facts() {
		fmt.Fprintf(&out, "%-12s %s\n", f.name, shown(f.value))
	}
	if p.Usable != nil {
		fmt.Fprintf(&out, "\n%s\n", usableTitle)
		paragraph(&out, "", usableWarning)
		fmt.Fprintln(&out)
		for row := range 2 {
			for i, group := range p.groups()[4*row : 4*row+4] {
				fmt.Fprintf(&out, "   %d: %s", 4*row+i+1, group)
			}
			fmt.Fprintln(&out)
		}
		fmt.Fprintf(&out, "\n%s\n", codeWarning)
	} else {
		fmt.Fprintf(&out, "\n%s\n", sealedTitle)
		paragraph(&out, "", sealedWarning)
	}
	fmt.Fprintln(&out)
	for _, line := range escrow.Lines(p.Message) {
		fmt.Fprintln(&out, line)
	}
	writeSteps(&out, "FOR THE USER", p.userSteps())
	writeSteps(&out, "FOR THE ADMINISTRATOR", p.adminSteps())
	return out.Bytes()
}

func writeSteps(out *bytes.Buffer, title string, steps []step) {
	fmt.Fprintf(out, "\n%s\n", title)
	for i, s := range steps {
		paragraph(out, strconv.Itoa(i+1)+". ", s.text)
		for _, c := range s.commands {
			fmt.Fprintf(out, "     %s\n", c)
		}
	}
}

// paragraph writes words in lines of textWidth, indented below their number.
func paragraph(out *bytes.Buffer, number, text string) {
	line := number
	for _, word := range strings.Fields(text) {
		if len(line)+len(word) > textWidth {
			fmt.Fprintln(out, strings.TrimRight(line, " "))
			line = strings.Repeat(" ", len(number))
		}
		line += word + " "
	}
	fmt.Fprintln(out, strings.TrimRight(line, " "))
}

// shown quotes what could deceive on a terminal.
func shown(text string) string {
	if record.Printable(text) == nil {
		return text
	}
	return strconv.Quote(text)
}
