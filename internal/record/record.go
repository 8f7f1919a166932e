// Package record is the one text form of everything that is signed, sealed or
// pinned: lines `name: value`, in a fixed order, with one spelling for each
// value. It is specified in docs/packet-format.md, section "Records".
//
// It is a codec, not a schema: which fields a record has is written where the
// record lives. It imports no other package of this program.
package record

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// ErrFormat is wrapped by every error of a Reader: the bytes are not the one
// canonical spelling of such a record.
var ErrFormat = errors.New("malformed record")

// TimeFormat is how times are written: UTC, whole seconds (RFC 3339).
const TimeFormat = "2006-01-02T15:04:05Z"

// Writer builds a record. What it wrote may hold secrets: Wipe clears it.
type Writer struct {
	buf []byte
	err error
}

// New starts a record with the line `kind: version`.
func New(kind string, version int) *Writer {
	w := &Writer{buf: make([]byte, 0, 2048)}
	w.Uint(kind, uint64(version))
	return w
}

// Field adds one line. The value is not empty, is valid UTF-8, has no control
// or line-separating characters and no space at its ends.
func (w *Writer) Field(name string, value []byte) *Writer {
	if w.err != nil {
		return w
	}
	if err := checkValue(value); err != nil {
		w.err = fmt.Errorf("record: field %s: %w", name, err)
		return w
	}
	w.append([]byte(name), []byte(": "), value, []byte("\n"))
	return w
}

// Text adds a line with a text value.
func (w *Writer) Text(name, value string) *Writer { return w.Field(name, []byte(value)) }

// OptionalText adds a line, or none when value is empty.
func (w *Writer) OptionalText(name, value string) *Writer {
	if value == "" {
		return w
	}
	return w.Text(name, value)
}

// Uint adds a line with a decimal number.
func (w *Writer) Uint(name string, value uint64) *Writer {
	return w.Text(name, strconv.FormatUint(value, 10))
}

// Time adds a line with a time, cut to whole seconds.
func (w *Writer) Time(name string, value time.Time) *Writer {
	return w.Text(name, value.UTC().Format(TimeFormat))
}

// Hex adds a line with bytes in lower-case hex.
func (w *Writer) Hex(name string, value []byte) *Writer {
	text := hex.AppendEncode(nil, value)
	defer clear(text)
	return w.Field(name, text)
}

// Base64 adds a line with bytes in padded standard base64.
func (w *Writer) Base64(name string, value []byte) *Writer {
	text := base64.StdEncoding.AppendEncode(nil, value)
	defer clear(text)
	return w.Field(name, text)
}

// Raw adds the lines of another record, as they are.
func (w *Writer) Raw(lines []byte) *Writer {
	w.append(lines)
	return w
}

// Bytes returns the record, or the first error of the calls that built it.
// The slice is the Writer's own: what is added later may overwrite it.
func (w *Writer) Bytes() ([]byte, error) {
	if w.err != nil {
		return nil, w.err
	}
	return w.buf, nil
}

// Wipe clears what was written.
func (w *Writer) Wipe() { clear(w.buf[:cap(w.buf)]) }

// append grows by hand, so that no copy of a secret is left in an old array.
func (w *Writer) append(parts ...[]byte) {
	for _, part := range parts {
		if need := len(w.buf) + len(part); need > cap(w.buf) {
			grown := make([]byte, len(w.buf), 2*need)
			copy(grown, w.buf)
			clear(w.buf)
			w.buf = grown
		}
		w.buf = append(w.buf, part...)
	}
}

func checkValue(value []byte) error {
	switch {
	case len(value) == 0:
		return errors.New("empty value")
	case !utf8.Valid(value):
		return errors.New("value is not UTF-8")
	case value[0] == ' ' || value[len(value)-1] == ' ':
		return errors.New("space at an end of the value")
	case bytes.ContainsFunc(value, forbidden):
		return errors.New("control character in the value")
	}
	return nil
}

// forbidden names characters that could forge a line or hide text on a
// terminal: controls, line separators, and bidirectional overrides.
func forbidden(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) || unicode.Is(unicode.Cf, r)
}

// Printable reports whether text can stand as a value: not empty, no control
// characters, no space at its ends.
func Printable(text string) error { return checkValue([]byte(text)) }

// IsUUID reports whether text has the form of a UUID (RFC 9562, section 4), in
// either case. It is written by hand because package regexp would cost the boot
// program 190 KB.
func IsUUID(text string) bool {
	groups := strings.Split(text, "-")
	if len(groups) != 5 {
		return false
	}
	for i, length := range []int{8, 4, 4, 4, 12} {
		if len(groups[i]) != length || strings.Trim(groups[i], "0123456789abcdefABCDEF") != "" {
			return false
		}
	}
	return true
}

// Reader takes a record apart, line by line, in the order in which the caller
// asks. The first fault sticks; End reports it.
type Reader struct {
	kind string
	rest []byte
	err  error
}

// Parse starts to read a record of this kind and version, of at most limit
// bytes. A version that is not known is an error of its own text.
func Parse(data []byte, kind string, version, limit int) *Reader {
	r := &Reader{kind: kind, rest: data}
	switch {
	case len(data) > limit:
		r.fail("is longer than %d bytes", limit)
	case len(data) == 0 || data[len(data)-1] != '\n':
		r.fail("is cut off: its last line has no end")
	default:
		if v := r.Uint(kind); r.err == nil && v != uint64(version) {
			r.fail("has version %d; this program reads version %d", v, version)
		}
	}
	return r
}

// Kind returns the kind that data claims to be, its first word, or "".
func Kind(data []byte) string {
	name, _, found := bytes.Cut(data, []byte(": "))
	if !found || len(name) > 64 || bytes.ContainsAny(name, "\n\r\t ") {
		return ""
	}
	return string(name)
}

func (r *Reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s %s", ErrFormat, r.kind, fmt.Sprintf(format, args...))
	}
}

// Fail records a fault that the caller found in a value it was given.
func (r *Reader) Fail(name, why string) { r.fail("field %s: %s", name, why) }

// Next reports whether the next line is a field of this name.
func (r *Reader) Next(name string) bool {
	return r.err == nil && len(r.rest) > len(name)+1 &&
		string(r.rest[:len(name)]) == name && r.rest[len(name)] == ':' && r.rest[len(name)+1] == ' '
}

// Rest returns the lines that were not read yet.
func (r *Reader) Rest() []byte { return r.rest }

// Field reads the next line, which must have this name. The slice points into
// the data.
func (r *Reader) Field(name string) []byte {
	if r.err != nil {
		return nil
	}
	if !r.Next(name) {
		r.fail("lacks field %s where it belongs", name)
		return nil
	}
	line := r.rest[len(name)+2:]
	end := bytes.IndexByte(line, '\n')
	if end < 0 {
		r.fail("is cut off in field %s", name)
		return nil
	}
	value := line[:end]
	if err := checkValue(value); err != nil {
		r.fail("field %s: %v", name, err)
		return nil
	}
	r.rest = line[end+1:]
	return value
}

// Text reads a text value.
func (r *Reader) Text(name string) string { return string(r.Field(name)) }

// OptionalText reads a text value, or "" when the field is not there.
func (r *Reader) OptionalText(name string) string {
	if !r.Next(name) {
		return ""
	}
	return r.Text(name)
}

// Repeated reads as many lines of this name as follow, at most limit.
func (r *Reader) Repeated(name string, limit int) []string {
	var values []string
	for r.Next(name) {
		if len(values) == limit {
			r.fail("has more than %d fields %s", limit, name)
			return nil
		}
		values = append(values, r.Text(name))
	}
	return values
}

// Uint reads a decimal number without leading zeros.
func (r *Reader) Uint(name string) uint64 {
	text := r.Text(name)
	if r.err != nil {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil || strconv.FormatUint(n, 10) != text {
		r.fail("field %s is not a number", name)
		return 0
	}
	return n
}

// Time reads a time in TimeFormat.
func (r *Reader) Time(name string) time.Time {
	text := r.Text(name)
	if r.err != nil {
		return time.Time{}
	}
	t, err := time.Parse(TimeFormat, text)
	if err != nil || t.Format(TimeFormat) != text {
		r.fail("field %s is not a time such as %s", name, TimeFormat)
		return time.Time{}
	}
	return t.UTC()
}

// Hex reads bytes in lower-case hex; size is their number, -1 for any.
func (r *Reader) Hex(name string, size int) []byte {
	text := r.Field(name)
	if r.err != nil {
		return nil
	}
	data, err := hex.AppendDecode(nil, text)
	if err != nil || bytes.ContainsAny(text, "ABCDEF") || size >= 0 && len(data) != size {
		clear(data)
		r.fail("field %s is not %d bytes of lower-case hex", name, size)
		return nil
	}
	return data
}

// Base64 reads bytes in padded standard base64.
func (r *Reader) Base64(name string) []byte {
	text := r.Field(name)
	if r.err != nil {
		return nil
	}
	data, err := base64.StdEncoding.Strict().AppendDecode(nil, text)
	if err != nil {
		clear(data)
		r.fail("field %s is not base64", name)
		return nil
	}
	return data
}

// Err returns the first fault so far.
func (r *Reader) Err() error { return r.err }

// End reports the first fault; a line that nobody asked for is one.
func (r *Reader) End() error {
	if r.err == nil && len(r.rest) > 0 {
		r.fail("goes on after its last field")
	}
	return r.err
}
