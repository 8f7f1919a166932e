package luks

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"unicode"
	"unicode/utf8"

	"mandos-escrow/internal/record"
)

const maxDepth = 32 // of nested JSON, as in json-c

// decoder reads JSON more strictly than encoding/json does: member names match exactly, none stands twice, and numbers are
// canonical. Otherwise two readers could see two different headers in the same bytes. It keeps the first error.
type decoder struct{ err error }

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
	}
}

// object is a JSON object at a path such as keyslots.3.kdf.
type object struct {
	d    *decoder
	path string
	m    map[string]json.RawMessage
}

// section is an object whose member names are numbers, in ascending order.
type section struct{ items []item }

type item struct {
	object
	number int
	raw    []byte
}

func (s section) has(number int) bool {
	return slices.ContainsFunc(s.items, func(i item) bool { return i.number == number })
}

// document checks the syntax of the whole text, and returns its top object.
func (d *decoder) document(text []byte) object {
	if !bytes.HasPrefix(text, []byte("{")) || !utf8.Valid(text) || !json.Valid(text) {
		d.fail("JSON: not an object in valid UTF-8")
		return object{d: d}
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := unique(dec, 0); err != nil {
		d.fail("JSON: %w", err)
	}
	return d.open(text, "")
}

// unique reads one value, and refuses an object that has a member twice.
func unique(dec *json.Decoder, depth int) error {
	t, err := dec.Token()
	if err != nil {
		return err
	}
	open, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	if depth == maxDepth {
		return errors.New("nested too deeply")
	}
	seen := map[string]bool{}
	for dec.More() {
		if open == '{' {
			name, err := dec.Token()
			if err != nil {
				return err
			}
			if seen[name.(string)] {
				return fmt.Errorf("member %q stands twice", name)
			}
			seen[name.(string)] = true
		}
		if err := unique(dec, depth+1); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil && err != io.EOF {
		return err
	}
	return nil
}

func (d *decoder) open(raw []byte, path string) object {
	o := object{d: d, path: path}
	if err := json.Unmarshal(raw, &o.m); err != nil || o.m == nil {
		d.fail("%s: not an object", path)
	}
	return o
}

func (o object) at(name string) string {
	if o.path == "" {
		return name
	}
	return o.path + "." + name
}

// only refuses members of other names.
func (o object) only(names ...string) {
	for _, name := range slices.Sorted(maps.Keys(o.m)) {
		if !slices.Contains(names, name) {
			o.d.fail("%s: unknown member", o.at(strconv.Quote(name)))
		}
	}
}

// object returns a member that is an object; with names, no others may stand in it.
func (o object) object(name string, names ...string) object {
	inner := o.d.open(o.m[name], o.at(name))
	if len(names) != 0 {
		inner.only(names...)
	}
	return inner
}

// section returns a member that is an object of objects under numbers below most.
func (o object) section(name string, most int) section {
	var s section
	outer := o.object(name)
	for key, raw := range outer.m {
		n, ok := canonical(key, int64(most-1))
		if !ok {
			o.d.fail("%s: not a number below %d", outer.at(strconv.Quote(key)), most)
			continue
		}
		s.items = append(s.items, item{object: o.d.open(raw, outer.at(key)), number: int(n), raw: raw})
	}
	slices.SortFunc(s.items, func(a, b item) int { return a.number - b.number })
	return s
}

func (o object) text(name string) string {
	var s *string
	if err := json.Unmarshal(o.m[name], &s); err != nil || s == nil {
		o.d.fail("%s: not a string", o.at(name))
		return ""
	}
	return *s
}

// number returns a member that is a JSON number from 0 to 2^32-1.
func (o object) number(name string) int {
	n, ok := canonical(string(o.m[name]), math.MaxUint32)
	if !ok {
		o.d.fail("%s: not an integer of 32 bits", o.at(name))
	}
	return int(n)
}

// decimal returns a member that is a string of digits: JSON numbers are too short for offsets.
func (o object) decimal(name string) int64 {
	n, ok := canonical(o.text(name), math.MaxInt64)
	if !ok {
		o.d.fail("%s: not a decimal number", o.at(name))
	}
	return n
}

// base64 returns a member in standard base64 without line breaks.
func (o object) base64(name string) []byte {
	text := o.text(name)
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(text) != base64.StdEncoding.EncodedLen(len(b)) {
		o.d.fail("%s: not base64", o.at(name))
	}
	return b
}

func (o object) texts(name string) []string {
	var list []*string
	if err := json.Unmarshal(o.m[name], &list); err != nil || list == nil || slices.Contains(list, nil) {
		o.d.fail("%s: not an array of strings", o.at(name))
		return nil
	}
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = *s
	}
	return out
}

// numbers returns a member that is an array of numbers in strings, each of which stands in a section, none twice.
func (o object) numbers(name string, in section) []int {
	out := []int{}
	for _, text := range o.texts(name) {
		n, ok := canonical(text, 31)
		if !ok || !in.has(int(n)) || slices.Contains(out, int(n)) {
			o.d.fail("%s: %q names nothing, or stands twice", o.at(name), text)
			return nil
		}
		out = append(out, int(n))
	}
	return out
}

// checkUUID: UUIDs become parts of paths, so nothing but a UUID will do.
func checkUUID(uuid string) error {
	if !record.IsUUID(uuid) {
		return fmt.Errorf("%w: uuid %q", ErrDamaged, uuid)
	}
	return nil
}

// plain tells whether a text is valid UTF-8 and can be shown without harm to a terminal.
func plain(s string) bool {
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
