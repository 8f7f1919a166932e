package bootimage

import (
	"bytes"
	"debug/elf"
	"slices"
)

// sameProgram reports whether what was found in an image is the program that is
// installed: the same bytes, or, because dracut strips what it installs, the same
// of all that is loaded to run.
func sameProgram(found, program []byte) bool {
	if bytes.Equal(found, program) {
		return true
	}
	left, right := loaded(found), loaded(program)
	if left == nil || right == nil {
		return false
	}
	// Go's linker puts the table of sections, which nobody reads to run a
	// program, into the first segment; strip moves it out of there. Where the
	// table of what was found lies counts for nothing: it could lie over anything.
	for _, p := range []*image{left, right} {
		for i := range p.segments {
			p.segments[i].clear(right.table)
		}
	}
	return left.entry == right.entry && slices.EqualFunc(left.segments, right.segments, segment.equal)
}

// image is what is loaded of an ELF file.
type image struct {
	entry    uint64
	table    extent // of its section headers, in the file
	segments []segment
}

type extent struct{ start, end uint64 }

// segment is a part of a file that is loaded.
type segment struct {
	header elf.ProgHeader
	data   []byte
}

// clear clears those bytes of the segment that lie in an extent of its file.
func (s segment) clear(e extent) {
	from, to := max(e.start, s.header.Off), min(e.end, s.header.Off+uint64(len(s.data)))
	if from < to {
		clear(s.data[from-s.header.Off : to-s.header.Off])
	}
}

// equal compares what is in memory afterwards, where zeros at the end need not
// stand in the file.
func (s segment) equal(o segment) bool {
	same := s.header.Flags == o.header.Flags && s.header.Vaddr == o.header.Vaddr && s.header.Memsz == o.header.Memsz
	return same && bytes.Equal(bytes.TrimRight(s.data, "\x00"), bytes.TrimRight(o.data, "\x00"))
}

// loaded returns nil if the file is no ELF file, or damaged. What its header and
// its program headers say of where things lie in the file is cleared.
func loaded(file []byte) *image {
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil || f.Class != elf.ELFCLASS64 {
		return nil
	}
	file = slices.Clone(file)
	order := f.ByteOrder
	p := &image{entry: f.Entry}
	p.table.start = order.Uint64(file[40:])                                                       // e_shoff
	p.table.end = p.table.start + uint64(order.Uint16(file[58:]))*uint64(order.Uint16(file[60:])) // e_shentsize, e_shnum
	clear(file[40:48])
	clear(file[58:64])
	headers, size, count := order.Uint64(file[32:]), uint64(order.Uint16(file[54:])), uint64(order.Uint16(file[56:]))
	for i := range count { // elf.NewFile read them: they are there
		at := headers + i*size
		clear(file[at+8 : at+16])  // p_offset
		clear(file[at+32 : at+40]) // p_filesz
	}
	for _, prog := range f.Progs {
		if prog.Type != elf.PT_LOAD {
			continue
		}
		end := prog.Off + prog.Filesz
		if end < prog.Off || end > uint64(len(file)) {
			return nil
		}
		p.segments = append(p.segments, segment{prog.ProgHeader, file[prog.Off:end]})
	}
	return p
}
