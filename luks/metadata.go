package luks

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// metadata is the JSON of a LUKS2 header, taken apart into its sections.
type metadata struct {
	d                                   *decoder
	keyslots, tokens, segments, digests section
	config                              object
}

// parse fills the header from a copy's JSON. The order matters for what a user is told: a volume in re-encryption has two
// segments, but what is wrong with it is the requirement.
func (h *Header) parse(c *copy2, memory int64) error {
	d := &decoder{}
	top := d.document(c.json)
	m := &metadata{
		d: d, config: top.object("config", "json_size", "keyslots_size", "flags", "requirements"),
		keyslots: top.section("keyslots", h.MaxSlots), tokens: top.section("tokens", 32),
		segments: top.section("segments", 32), digests: top.section("digests", 32),
	}
	top.only("keyslots", "tokens", "segments", "digests", "config")
	for _, step := range []func() error{
		func() error { return h.configuration(m, c.size) },
		func() error { return h.segment(m) },
		func() error { return h.keyslots(m, memory) },
		func() error { return h.digests(m) },
		func() error { return h.tokens(m) },
	} {
		if d.err != nil {
			return d.err
		}
		if err := step(); err != nil {
			return err
		}
	}
	return d.err
}

// configuration checks sizes and refuses every requirement: each stands for something that we cannot do.
func (h *Header) configuration(m *metadata, size int64) error {
	jsonSize, slotsSize := m.config.decimal("json_size"), m.config.decimal("keyslots_size")
	if _, ok := m.config.m["flags"]; ok {
		m.config.texts("flags")
	}
	var required []string
	if v, ok := m.config.m["requirements"]; ok && v.list != nil {
		required = m.config.texts("requirements")
	} else if ok {
		o := m.config.object("requirements", "mandatory")
		if _, ok := o.m["mandatory"]; ok {
			required = o.texts("mandatory")
		}
	}
	if m.d.err != nil {
		return m.d.err
	}
	if len(required) != 0 {
		return fmt.Errorf("%w: %q", ErrRequirement, required)
	}
	if jsonSize != size-binSize {
		return fmt.Errorf("%w: config.json_size %d, the JSON area has %d", ErrDamaged, jsonSize, size-binSize)
	}
	if slotsSize%areaAlign != 0 || slotsSize > 128<<20 {
		return fmt.Errorf("%w: config.keyslots_size %d", ErrDamaged, slotsSize)
	}
	h.areas.end = h.areas.start + slotsSize
	h.room = span{0, h.areas.end}
	return nil
}

func (h *Header) segment(m *metadata) error {
	if len(m.segments.items) != 1 {
		return fmt.Errorf("%w: %d data segments, must be 1", ErrUnsupported, len(m.segments.items))
	}
	s := m.segments.items[0].object
	if kind := s.text("type"); m.d.err == nil && kind != "crypt" {
		return fmt.Errorf("%w: data segment of type %q", ErrUnsupported, kind)
	}
	if _, ok := s.m["integrity"]; ok {
		return fmt.Errorf("%w: data segment with integrity protection (dm-integrity)", ErrUnsupported)
	}
	s.only("type", "offset", "size", "iv_tweak", "encryption", "sector_size", "flags")
	h.Offset, h.Cipher, h.SectorSize = s.decimal("offset"), s.text("encryption"), s.number("sector_size")
	size, tweak := s.text("size"), s.decimal("iv_tweak")
	if m.d.err != nil {
		return m.d.err
	}
	if _, ok := s.m["flags"]; ok {
		return fmt.Errorf("%w: data segment with flags", ErrUnsupported)
	}
	if size != "dynamic" {
		return fmt.Errorf("%w: data segment of fixed size %q, must be dynamic", ErrUnsupported, size)
	}
	if tweak != 0 {
		return fmt.Errorf("%w: data segment with iv_tweak %d", ErrUnsupported, tweak)
	}
	if !slices.Contains([]int{512, 1024, 2048, 4096}, h.SectorSize) {
		return fmt.Errorf("%w: sector_size %d", ErrDamaged, h.SectorSize)
	}
	return checkCipher("data segment", h.Cipher, 0)
}

func (h *Header) keyslots(m *metadata, memory int64) error {
	var names []string
	var areas []span
	for _, item := range m.keyslots.items {
		s, err := readSlot(item, memory)
		if err != nil {
			return err
		}
		h.Slots = append(h.Slots, s)
		names = append(names, item.path)
		areas = append(areas, span{s.Offset, s.Offset + s.Size})
	}
	return checkAreas(h.areas, names, areas)
}

func readSlot(item item, memory int64) (Slot, error) {
	o, d := item.object, item.d
	if kind := o.text("type"); d.err == nil && kind != "luks2" {
		return Slot{}, fmt.Errorf("%w: %s of type %q", ErrUnsupported, o.path, kind)
	}
	o.only("type", "key_size", "af", "area", "kdf", "priority")
	af, area := o.object("af", "type", "stripes", "hash"), o.object("area", "type", "offset", "size", "encryption", "key_size")
	keyBytes, areaBytes, split := o.number("key_size"), area.number("key_size"), af.number("stripes")
	s := Slot{
		Number: item.number, Priority: priority(o), KeyBits: 8 * min(keyBytes, 1<<20), KDF: readKDF(o), AFHash: af.text("hash"),
		Cipher: area.text("encryption"), CipherBits: 8 * min(areaBytes, 1<<20), Offset: area.decimal("offset"), Size: area.decimal("size"),
	}
	kinds := af.text("type") + " " + area.text("type")
	if d.err != nil {
		return s, d.err
	}
	switch {
	case kinds != "luks1 raw" || split != stripes:
		return s, fmt.Errorf("%w: %s: af and area of types %q, %d stripes", ErrUnsupported, o.path, kinds, split)
	case keyBytes < 1 || keyBytes > maxKeyBytes:
		return s, fmt.Errorf("%w: %s: key_size %d", ErrDamaged, o.path, keyBytes)
	case areaBytes == 0:
		return s, fmt.Errorf("%w: %s: area.key_size 0", ErrDamaged, o.path)
	case s.Offset%sector != 0 || s.Offset > math.MaxInt64-s.Size:
		return s, fmt.Errorf("%w: %s: area.offset %d", ErrDamaged, o.path, s.Offset)
	case s.Size < roundUp(int64(keyBytes)*stripes, sector) || s.Size > maxKeyBytes*stripes:
		return s, fmt.Errorf("%w: %s: area.size %d for a key of %d bytes", ErrDamaged, o.path, s.Size, keyBytes)
	}
	if err := checkHash(o.path+".af", s.AFHash); err != nil {
		return s, err
	}
	if err := checkCipher(o.path, s.Cipher, areaBytes); err != nil {
		return s, err
	}
	return s, checkKDF(o.path+".kdf", s.KDF, memory)
}

func readKDF(slot object) KDF {
	k := slot.object("kdf")
	out := KDF{Type: k.text("type"), Salt: k.base64("salt")}
	if out.Type == "pbkdf2" {
		k.only("type", "salt", "hash", "iterations")
		out.Hash, out.Iterations = k.text("hash"), k.number("iterations")
		return out
	}
	if strings.HasPrefix(out.Type, "argon2") {
		k.only("type", "salt", "time", "memory", "cpus")
		out.Time, out.Memory, out.CPUs = k.number("time"), int64(k.number("memory")), k.number("cpus")
	}
	return out
}

// priority reads 0, 1 or 2; absent is 1.
func priority(slot object) string {
	if _, ok := slot.m["priority"]; !ok {
		return Normal
	}
	n := slot.number("priority")
	if n > 2 {
		slot.d.fail("%s.priority: %d", slot.path, n)
		return ""
	}
	return []string{Ignore, Normal, Prefer}[n]
}

// digests finds the one digest of the data segment, and through it the keyslots that hold the volume key. Every keyslot
// belongs to one digest; those of the others are unbound.
func (h *Header) digests(m *metadata) error {
	owner := map[int]int{}
	found := 0
	for _, item := range m.digests.items {
		o := item.object
		o.only("type", "keyslots", "segments", "hash", "iterations", "salt", "digest")
		slots, segments := o.numbers("keyslots", m.keyslots), o.numbers("segments", m.segments)
		digest := Digest{Hash: o.text("hash"), Iterations: o.number("iterations"), Salt: o.base64("salt"), Value: o.base64("digest")}
		if kind := o.text("type"); m.d.err == nil && kind != "pbkdf2" {
			return fmt.Errorf("%w: %s of type %q", ErrUnsupported, o.path, kind)
		}
		if m.d.err != nil {
			return m.d.err
		}
		if err := checkDigest(o.path, digest); err != nil {
			return err
		}
		for _, n := range slots {
			if _, taken := owner[n]; taken {
				return fmt.Errorf("%w: keyslot %d belongs to two digests", ErrDamaged, n)
			}
			owner[n] = len(segments)
		}
		if len(segments) != 0 {
			h.Digest = digest
			found++
		}
	}
	if found != 1 {
		return fmt.Errorf("%w: %d digests for the data segment, must be 1", ErrDamaged, found)
	}
	return h.bind(owner)
}

// bind marks the keyslots that hold the volume key; its length is theirs. Owner says of how many segments.
func (h *Header) bind(owner map[int]int) error {
	for i := range h.Slots {
		s := &h.Slots[i]
		segments, ok := owner[s.Number]
		if !ok {
			return fmt.Errorf("%w: keyslot %d belongs to no digest", ErrDamaged, s.Number)
		}
		s.Bound = segments != 0
		if !s.Bound {
			continue
		}
		if h.KeyBits != 0 && h.KeyBits != s.KeyBits {
			return fmt.Errorf("%w: keyslot %d: key of %d bits, others have %d", ErrDamaged, s.Number, s.KeyBits, h.KeyBits)
		}
		h.KeyBits = s.KeyBits
	}
	return checkCipher("data segment", h.Cipher, h.KeyBits/8)
}

func (h *Header) tokens(m *metadata) error {
	for _, item := range m.tokens.items {
		o := item.object
		t := Token{ID: item.number, Type: o.text("type"), Keyslots: o.numbers("keyslots", m.keyslots), JSON: Raw(item.raw)}
		if m.d.err == nil && !plain(t.Type) {
			return fmt.Errorf("%w: %s: type %q is not plain text", ErrDamaged, o.path, t.Type)
		}
		h.Tokens = append(h.Tokens, t)
	}
	return m.d.err
}

// canonical reads a number of 0 to most without sign, blanks or leading zeros.
func canonical(text string, most int64) (int64, bool) {
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil && n >= 0 && n <= most && strconv.FormatInt(n, 10) == text
}
