package escrow

import (
	"bytes"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

// The typed form of a sheet's message: see "Typed lines" in
// docs/packet-format.md.
const (
	lineSize    = 40 // base32 characters
	lineCheck   = 2  // characters of check
	lineModulus = 1021
	maxLines    = 99
	// MaxLineBytes bounds what Lines takes.
	MaxLineBytes = (maxLines*lineSize - 8) * 5 / 8
	maxTyped     = 1 << 20
	minScanned   = 64 // characters; a typed line has fewer in one piece
	alphabet     = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
)

var typed = base32.StdEncoding.WithPadding(base32.NoPadding)

// ErrLine is wrapped by a LineError, with ErrIntegrity.
var ErrLine = errors.New("typed lines are not those that were printed")

// LineError names the line that is wrong, missing or there twice.
type LineError struct {
	Line int // from 1; 0 when there is no line at all
	Why  string
}

func (e *LineError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%v: %s", ErrLine, e.Why)
	}
	return fmt.Sprintf("line %02d %s", e.Line, e.Why)
}

// Unwrap returns ErrLine and ErrIntegrity.
func (e *LineError) Unwrap() []error { return []error{ErrLine, ErrIntegrity} }

// Lines is a message as lines to type, each with its number and its check. More
// than MaxLineBytes have no such form.
func Lines(message []byte) []string {
	if len(message) > MaxLineBytes {
		return nil
	}
	text := QRText(message)
	var lines []string
	for number := 1; ; number++ {
		part := text[:min(lineSize, len(text))]
		text = text[len(part):]
		lines = append(lines, fmt.Sprintf("%02d %s%s", number, inFours(part), checkOf(number, part)))
		if len(part) < lineSize {
			return lines
		}
	}
}

// inFours ends each group with a space.
func inFours(text string) string {
	var out strings.Builder
	for len(text) > 0 {
		group := text[:min(4, len(text))]
		text = text[len(group):]
		out.WriteString(group + " ")
	}
	return out.String()
}

// checkOf is the check of a line: a remainder of a prime, so that one wrong
// character and two swapped ones always change it.
func checkOf(number int, characters string) string {
	c := number
	for i := range len(characters) {
		c = (32*c + strings.IndexByte(alphabet, characters[i])) % lineModulus
	}
	return string([]byte{alphabet[c>>5], alphabet[c&31]})
}

// QRText is a message as a QR code holds it in alphanumeric mode: base32 in one
// piece.
func QRText(message []byte) string { return typed.EncodeToString(message) }

// ParseLines gives back the message of typed lines, or of a scanned code. Lines
// may come in any order, case and spacing, with 0, 1 and 8 for O, I and B, and
// among other text. Errors: a LineError. That the message is the one that was
// sealed, only opening it finds out.
func ParseLines(text []byte) ([]byte, error) {
	if len(text) > maxTyped {
		return nil, &LineError{Why: fmt.Sprintf("a text of %d bytes; at most %d are read", len(text), maxTyped)}
	}
	found, err := findLines(text)
	if err != nil {
		return nil, err
	}
	if len(found.good) == 0 {
		if scanned := scannedText(text); scanned != "" {
			return decodeTyped(scanned, 0)
		}
		if len(found.bad) == 0 {
			return nil, &LineError{Why: "no line with a number, characters and a check was found"}
		}
	}
	return found.join()
}

// hasLines reports whether ParseLines would find something to begin with.
func hasLines(text []byte) bool {
	if len(text) > maxTyped {
		return false
	}
	found, err := findLines(text)
	return err != nil || len(found.good) > 0 || scannedText(text) != ""
}

// foundLines are lines by number: good ones, whose check fits, without number
// and check; and those that only begin with a number.
type foundLines struct {
	good map[int]string
	bad  map[int]bool
}

func findLines(text []byte) (foundLines, error) {
	found := foundLines{map[int]string{}, map[int]bool{}}
	for line := range bytes.Lines(text) {
		number, characters, good := readLine(line)
		switch _, before := found.good[number]; {
		case number == 0:
		case !good:
			found.bad[number] = true
		case before:
			return found, &LineError{number, "is there twice"}
		default:
			found.good[number] = characters
		}
	}
	return found, nil
}

// readLine takes a line apart. number is 0 for text that does not begin with
// one.
func readLine(line []byte) (number int, characters string, good bool) {
	if len(line) > 4*lineSize { // three spaces for each character
		return 0, "", false
	}
	words := strings.Fields(strings.ToUpper(string(line)))
	if len(words) == 0 {
		return 0, "", false
	}
	digits := words[0][:min(2, len(words[0]))]
	rest := confused.Replace(words[0][len(digits):] + strings.Join(words[1:], ""))
	for i := range len(digits) {
		d := strings.IndexByte("0123456789", digits[i])
		if d < 0 && len(rest) == lineSize+lineCheck { // a whole line: a letter may stand for a digit
			d = misread(digits[i])
		}
		if d < 0 {
			return 0, "", false
		}
		number = 10*number + d
	}
	length := len(rest) - lineCheck
	if length < 0 || length > lineSize || strings.Trim(rest, alphabet) != "" {
		return number, "", false
	}
	return number, rest[:length], number > 0 && checkOf(number, rest[:length]) == rest[length:]
}

// confused puts letters for the digits that they are taken for.
var confused = strings.NewReplacer("0", "O", "1", "I", "8", "B")

func misread(letter byte) int {
	switch letter {
	case 'O':
		return 0
	case 'I', 'L':
		return 1
	case 'B':
		return 8
	}
	return -1
}

// join puts the good lines together, from 1 to the short one, which is the last.
func (f foundLines) join() ([]byte, error) {
	var text strings.Builder
	for number := 1; ; number++ {
		characters, there := f.good[number]
		switch {
		case !there && f.bad[number]:
			return nil, &LineError{number, "is mistyped: its check does not fit"}
		case !there:
			return nil, &LineError{number, "is missing"}
		}
		text.WriteString(characters)
		if len(characters) == lineSize {
			continue
		}
		if len(f.good) > number {
			return nil, &LineError{number, "is mistyped: it is too short"}
		}
		return decodeTyped(text.String(), number)
	}
}

func decodeTyped(text string, last int) ([]byte, error) {
	message, err := typed.DecodeString(text)
	if err != nil || QRText(message) != text {
		return nil, &LineError{last, "ends where no message can end"}
	}
	return message, nil
}

// scannedText is the one long piece of base32 in a text, in capitals; "" if
// there is none, or more than one.
func scannedText(text []byte) string {
	found := ""
	for _, piece := range strings.FieldsFunc(strings.ToUpper(string(text)), func(r rune) bool {
		return r > 'Z' || !strings.ContainsRune(alphabet, r)
	}) {
		switch {
		case len(piece) < minScanned || piece == found:
		case found != "":
			return ""
		default:
			found = piece
		}
	}
	return found
}
