package bootimage

import (
	"bytes"
	"debug/elf"
	"slices"
)

// sameProgram reports whether two files are the same program: the same bytes, or,
// because dracut strips what it installs, the same of all that is loaded to run.
func sameProgram(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	left, right := loaded(a), loaded(b)
	return left != nil && slices.EqualFunc(left, right, segment.equal)
}

// segment is a part of a program that is loaded.
type segment struct {
	header elf.ProgHeader
	data   []byte
}

func (s segment) equal(o segment) bool {
	s.header.Off, o.header.Off = 0, 0
	return s.header == o.header && bytes.Equal(s.data, o.data)
}

// loaded returns the segments of an ELF file, or nil if it is none or damaged.
// What the file's own header says of sections, which nobody reads to run it, is
// cleared: it lies in the first segment.
func loaded(file []byte) []segment {
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		return nil
	}
	file = slices.Clone(file)
	if f.Class == elf.ELFCLASS64 {
		clear(file[40:48]) // e_shoff
		clear(file[58:64]) // e_shentsize, e_shnum, e_shstrndx
	} else {
		clear(file[32:36])
		clear(file[46:52])
	}
	var segments []segment
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD {
			continue
		}
		end := p.Off + p.Filesz
		if end < p.Off || end > uint64(len(file)) {
			return nil
		}
		segments = append(segments, segment{p.ProgHeader, file[p.Off:end]})
	}
	return append(segments, segment{header: elf.ProgHeader{Vaddr: f.Entry}})
}
