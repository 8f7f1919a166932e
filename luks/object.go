package luks

import (
	"encoding/base64"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"unicode"
	"unicode/utf8"

	"mandos-escrow/internal/record"
)

// decoder reads members of a JSON document, with numbers in one form only, and keeps the first error.
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
	m    map[string]value
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

// document returns the top object of a whole text.
func (d *decoder) document(text []byte) object {
	v, err := parseJSON(text)
	switch {
	case err != nil:
		d.fail("JSON: %w", err)
	case text[0] != '{':
		d.fail("JSON: not an object, or not at once")
	}
	return d.open(v, "")
}

func (d *decoder) open(v value, path string) object {
	if v.members == nil {
		d.fail("%s: not an object", path)
	}
	return object{d: d, path: path, m: v.members}
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
	for key, v := range outer.m {
		n, ok := canonical(key, int64(most-1))
		if !ok {
			o.d.fail("%s: not a number below %d", outer.at(strconv.Quote(key)), most)
			continue
		}
		s.items = append(s.items, item{object: o.d.open(v, outer.at(key)), number: int(n), raw: v.raw})
	}
	slices.SortFunc(s.items, func(a, b item) int { return a.number - b.number })
	return s
}

func (o object) text(name string) string {
	text := o.m[name].text
	if text == nil {
		o.d.fail("%s: not a string", o.at(name))
		return ""
	}
	return *text
}

// number returns a member that is a JSON number from 0 to 2^32-1.
func (o object) number(name string) int {
	n, ok := canonical(string(o.m[name].raw), math.MaxUint32)
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
	list := o.m[name].list
	out := make([]string, 0, len(list))
	for _, v := range list {
		if v.text != nil {
			out = append(out, *v.text)
		}
	}
	if list == nil || len(out) < len(list) {
		o.d.fail("%s: not an array of strings", o.at(name))
		return nil
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
