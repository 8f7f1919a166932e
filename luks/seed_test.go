package luks

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"testing"
)

// The seeds are Backup of two volumes that cryptsetup 2.6.1 made; passphrases a (slot 0) and b (slot 1, LUKS1: 5).
const (
	seedSize = 64 << 20
	seedKey1 = "71f9f00f75a7eadaa8f349c55c8b7f786fff5623d940610d8ee221c093b51f3f0c6c01dca041f6d491c10a01a694ddf4b54bb66b2f6b79efb88d40e8f0ca7def"
	seedKey2 = "0cc44fac83cc1c742e717b7e137d9b919de516d7321e71315fc2b5348b01cb3164444b9e89fac6d7ec8d215d9439c5d7ee776aee875484b5440da23357609362"
	seedJSON = 12 << 10 // its JSON area
)

// volume is a volume that begins with head and is NULs from there on.
type volume struct{ head []byte }

func (v volume) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(v.head)) {
		copy(p, v.head[off:])
	}
	return len(p), nil
}

func readImage(head []byte) (*Header, error) { return ReadWithin(volume{head}, seedSize, 1<<30) }

func seed(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seed1 decodes, edits and encodes the LUKS1 seed.
func seed1(t testing.TB, edit func(*phdr)) []byte {
	t.Helper()
	var p phdr
	if _, err := binary.Decode(seed(t, "luks1.hdr"), binary.BigEndian, &p); err != nil {
		t.Fatal(err)
	}
	edit(&p)
	b, err := binary.Append(nil, binary.BigEndian, &p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parts returns the LUKS2 seed's binary header and JSON.
func parts(t testing.TB) (binary2, []byte) {
	t.Helper()
	b := seed(t, "luks2.hdr")
	var bin binary2
	if _, err := binary.Decode(b[:binUsed], binary.BigEndian, &bin); err != nil {
		t.Fatal(err)
	}
	return bin, b[binUsed:]
}

// copyImage makes one LUKS2 header copy with a right checksum: area is its JSON area.
func copyImage(bin binary2, area []byte, secondary bool) []byte {
	if secondary {
		copy(bin.Magic[:], secondaryMagic)
		bin.Offset = bin.Size
	}
	bin.Csum = [csumSize]byte{}
	head, err := binary.Append(nil, binary.BigEndian, &bin)
	if err != nil {
		panic(err)
	}
	head = append(head, make([]byte, binSize-len(head))...)
	sum := checksum(head, area)
	copy(head[csumAt:], sum[:])
	return append(head, area...)
}

// image2 makes both copies from the same parts.
func image2(bin binary2, text []byte) []byte {
	area := make([]byte, max(len(text), seedJSON))
	copy(area, text)
	return append(copyImage(bin, area, false), copyImage(bin, area, true)...)
}

// edited returns the LUKS2 seed with its JSON changed: values by path such as keyslots.0.kdf.time; nil removes a member.
func edited(t testing.TB, changes map[string]any) []byte {
	t.Helper()
	bin, text := parts(t)
	var top map[string]any
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&top); err != nil {
		t.Fatal(err)
	}
	for path, value := range changes {
		set(t, top, strings.Split(path, "."), value)
	}
	out, err := json.Marshal(top)
	if err != nil {
		t.Fatal(err)
	}
	return image2(bin, out)
}

func set(t testing.TB, o map[string]any, path []string, value any) {
	t.Helper()
	if len(path) > 1 {
		inner, ok := o[path[0]].(map[string]any)
		if !ok {
			t.Fatalf("no member %v", path)
		}
		set(t, inner, path[1:], value)
		return
	}
	if value == nil {
		delete(o, path[0])
		return
	}
	o[path[0]] = value
}

// member returns a deep copy of a member of the seed's JSON.
func member(t testing.TB, path string) map[string]any {
	t.Helper()
	_, text := parts(t)
	var top any
	if err := json.Unmarshal(text, &top); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Split(path, ".") {
		top = top.(map[string]any)[name]
	}
	return top.(map[string]any)
}

func dec(n int) string { return strconv.Itoa(n) }
