package luks

import (
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// Package encoding/json would read this too, once more than is done here for the
// names that stand twice. But it adds 287 KB to the boot program, a twenty-fifth
// of it, for one document of a few kilobytes. FuzzJSON holds the two together.

// value is one JSON value (RFC 8259), which is one of its last four fields.
type value struct {
	raw     []byte // exactly as it stands
	at      int    // where in the text
	members map[string]value
	list    []value // not nil for an array
	text    *string
	other   bool // a number, true, false or null
}

const maxDepth = 32 // of nested JSON, as in json-c

var errJSON = errors.New("not valid JSON")

// parseJSON reads one value that is the whole text. It is stricter than the
// standard: no name stands twice in an object, and no half of a surrogate pair
// in a string. Otherwise two readers could see two headers in the same bytes.
func parseJSON(text []byte) (value, error) {
	if !utf8.Valid(text) {
		return value{}, fmt.Errorf("%w: not UTF-8", errJSON)
	}
	s := &jsonScanner{text: text}
	v, err := s.value(0)
	if err != nil {
		return value{}, err
	}
	if s.space(); s.at < len(text) {
		return value{}, s.wrong("something follows")
	}
	return v, nil
}

type jsonScanner struct {
	text []byte
	at   int
}

func (s *jsonScanner) wrong(what string) error {
	return fmt.Errorf("%w: %s at byte %d", errJSON, what, s.at)
}

// next is the byte that comes next, 0 at the end: no value has a 0 outside of a
// string, and none may have one inside.
func (s *jsonScanner) next() byte {
	if s.at == len(s.text) {
		return 0
	}
	return s.text[s.at]
}

func (s *jsonScanner) take(c byte) bool {
	if s.next() != c || c == 0 {
		return false
	}
	s.at++
	return true
}

func (s *jsonScanner) space() {
	for s.take(' ') || s.take('\t') || s.take('\n') || s.take('\r') {
	}
}

func (s *jsonScanner) value(depth int) (v value, err error) {
	s.space()
	start := s.at
	switch c := s.next(); {
	case (c == '{' || c == '[') && depth == maxDepth:
		return value{}, errors.New("nested too deeply")
	case c == '{':
		v.members, err = s.object(depth)
	case c == '[':
		v.list, err = s.array(depth)
	case c == '"':
		var text string
		text, err = s.string()
		v.text = &text
	default:
		v.other, err = true, s.other()
	}
	v.raw, v.at = s.text[start:s.at], start
	return v, err
}

func (s *jsonScanner) object(depth int) (map[string]value, error) {
	members := map[string]value{}
	s.at++
	if s.space(); s.take('}') {
		return members, nil
	}
	for {
		s.space()
		name, err := s.string()
		if err != nil {
			return nil, err
		}
		if _, twice := members[name]; twice {
			return nil, fmt.Errorf("member %q stands twice", name)
		}
		if s.space(); !s.take(':') {
			return nil, s.wrong("no colon")
		}
		if members[name], err = s.value(depth + 1); err != nil {
			return nil, err
		}
		if s.space(); s.take('}') {
			return members, nil
		}
		if !s.take(',') {
			return nil, s.wrong("no comma")
		}
	}
}

func (s *jsonScanner) array(depth int) ([]value, error) {
	list := []value{}
	s.at++
	if s.space(); s.take(']') {
		return list, nil
	}
	for {
		v, err := s.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		if s.space(); s.take(']') {
			return list, nil
		}
		if !s.take(',') {
			return nil, s.wrong("no comma")
		}
	}
}

func (s *jsonScanner) string() (string, error) {
	if !s.take('"') {
		return "", s.wrong("no string")
	}
	var out []byte
	for !s.take('"') {
		c := s.next()
		if c < ' ' {
			return "", s.wrong("a control character, or no end of a string")
		}
		s.at++
		if c != '\\' {
			out = append(out, c)
			continue
		}
		r, err := s.escape()
		if err != nil {
			return "", err
		}
		out = utf8.AppendRune(out, r)
	}
	return string(out), nil
}

var escapes = map[byte]rune{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

// escape reads what stands after a backslash.
func (s *jsonScanner) escape() (rune, error) {
	if r, ok := escapes[s.next()]; ok {
		s.at++
		return r, nil
	}
	r, err := s.unit()
	if err != nil || !utf16.IsSurrogate(r) {
		return r, err
	}
	if !s.take('\\') {
		return 0, s.wrong("half of a surrogate pair")
	}
	low, err := s.unit()
	if err == nil {
		r = utf16.DecodeRune(r, low)
	}
	if err == nil && r == utf8.RuneError {
		err = s.wrong("half of a surrogate pair")
	}
	return r, err
}

// unit reads u and four hexadecimal digits.
func (s *jsonScanner) unit() (rune, error) {
	if !s.take('u') || len(s.text)-s.at < 4 {
		return 0, s.wrong("no such escape")
	}
	n, err := strconv.ParseUint(string(s.text[s.at:s.at+4]), 16, 16)
	if err != nil {
		return 0, s.wrong("no such escape")
	}
	s.at += 4
	return rune(n), nil
}

// other reads a number or a word.
func (s *jsonScanner) other() error {
	for _, word := range []string{"true", "false", "null"} {
		if len(s.text)-s.at >= len(word) && string(s.text[s.at:s.at+len(word)]) == word {
			s.at += len(word)
			return nil
		}
	}
	s.take('-')
	if !s.take('0') && s.digits() == 0 {
		return s.wrong("no value")
	}
	if s.take('.') && s.digits() == 0 {
		return s.wrong("no digit")
	}
	if s.take('e') || s.take('E') {
		if !s.take('+') {
			s.take('-')
		}
		if s.digits() == 0 {
			return s.wrong("no digit")
		}
	}
	return nil
}

func (s *jsonScanner) digits() (count int) {
	for c := s.next(); '0' <= c && c <= '9'; c = s.next() {
		s.at++
		count++
	}
	return count
}
