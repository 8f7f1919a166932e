package volumekey

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unicode/utf8"
)

// Types of items: KMIP's draft 0.98, which is not KMIP 1.x.
const (
	typeInt32     = 0x01
	typeEnum      = 0x04
	typeText      = 0x06
	typeBytes     = 0x07
	typeStructure = 0x80
)

const itemHeader = 9 // tag, type and length

// reader takes items off the front of a structure, in the order in which the
// caller asks. The first fault sticks, in all readers of one packet.
type reader struct {
	rest []byte
	err  *error
}

func newReader(data []byte) *reader { return &reader{data, new(error)} }

func (r *reader) fail(format string, args ...any) {
	if *r.err == nil {
		*r.err = fmt.Errorf(format, args...)
	}
}

// next reports whether the next item has this tag.
func (r *reader) next(tag uint32) bool {
	return *r.err == nil && len(r.rest) >= 4 && binary.BigEndian.Uint32(r.rest) == tag
}

func (r *reader) item(tag uint32, kind byte) []byte {
	if *r.err != nil {
		return nil
	}
	if len(r.rest) < itemHeader {
		r.fail("cut off where item %08X belongs", tag)
		return nil
	}
	if !r.next(tag) {
		r.fail("item %08X, where %08X belongs", binary.BigEndian.Uint32(r.rest), tag)
		return nil
	}
	if r.rest[4] != kind {
		r.fail("item %08X is of type %02X, not %02X", tag, r.rest[4], kind)
		return nil
	}
	size := binary.BigEndian.Uint32(r.rest[5:])
	if uint64(size) > uint64(len(r.rest)-itemHeader) {
		r.fail("item %08X of %d bytes is larger than what it stands in", tag, size)
		return nil
	}
	value := r.rest[itemHeader : itemHeader+size]
	r.rest = r.rest[itemHeader+size:]
	return value
}

func (r *reader) structure(tag uint32) *reader {
	return &reader{r.item(tag, typeStructure), r.err}
}

func (r *reader) bytes(tag uint32) []byte { return r.item(tag, typeBytes) }

func (r *reader) text(tag uint32) string {
	value := r.item(tag, typeText)
	if !utf8.Valid(value) || bytes.IndexByte(value, 0) >= 0 {
		r.fail("item %08X is not text", tag)
	}
	return string(value)
}

// enum reads a number from 1 to most; a larger one is not in the specification.
func (r *reader) enum(tag, most uint32) uint32 {
	n := r.number(tag, typeEnum)
	if *r.err == nil && (n < 1 || n > most) {
		r.fail("item %08X has the value %d, which is not known", tag, n)
	}
	return n
}

func (r *reader) int32(tag uint32) int32 { return int32(r.number(tag, typeInt32)) }

func (r *reader) number(tag uint32, kind byte) uint32 {
	value := r.item(tag, kind)
	if *r.err == nil && len(value) != 4 {
		r.fail("item %08X has %d bytes, not 4", tag, len(value))
	}
	if *r.err != nil {
		return 0
	}
	return binary.BigEndian.Uint32(value)
}

// end demands that nothing is left.
func (r *reader) end(what string) {
	if len(r.rest) > 0 {
		r.fail("%d bytes after the end of %s", len(r.rest), what)
	}
}
