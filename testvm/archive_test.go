package testvm

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// entry is what a reader of a newc archive finds; the fields are those that
// the kernel's unpacking looks at.
type entry struct {
	name, data string
	mode, uid  uint64
}

// readArchive is a second, plain reading of the format.
func readArchive(t *testing.T, b []byte) []entry {
	t.Helper()
	var entries []entry
	field := func(n int) uint64 {
		v, err := strconv.ParseUint(string(b[6+8*n:14+8*n]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	take := func(n int) string {
		s := string(b[:n])
		b = b[n:]
		return s
	}
	for len(b) > 0 {
		if !bytes.HasPrefix(b, []byte("070701")) {
			t.Fatalf("no magic at the start of %.20q", b)
		}
		e := entry{mode: field(1), uid: field(2)}
		size, nameSize := int(field(6)), int(field(11))
		take(110)
		e.name = take(nameSize)[:nameSize-1]
		take(-(110 + nameSize) & 3)
		e.data = take(size)
		take(-size & 3)
		entries = append(entries, e)
	}
	return entries
}

func TestArchive(t *testing.T) {
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "key"), []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("key", filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tree, 0o700); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	a := &archive{w: &buf}
	a.add("etc", fs.ModeDir|0o755, nil)
	a.add("init", 0o755, []byte("four"))
	if err := a.addTree("etc/conf", tree); err != nil {
		t.Fatal(err)
	}
	a.close()
	if a.err != nil {
		t.Fatal(a.err)
	}
	want := []entry{
		{name: "etc", mode: 0o040755},
		{name: "init", mode: 0o100755, data: "four"},
		{name: "etc/conf", mode: 0o040700},
		{name: "etc/conf/key", mode: 0o100600, data: "12345"},
		{name: "etc/conf/link", mode: 0o120777, data: "key"},
		{name: "TRAILER!!!", mode: 0o100000},
	}
	got := readArchive(t, buf.Bytes())
	if len(got) != len(want) {
		t.Fatalf("%d entries, want %d: %v", len(got), len(want), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("entry %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

func TestArchiveRefusesSockets(t *testing.T) {
	a := &archive{w: &bytes.Buffer{}}
	a.add("socket", fs.ModeSocket|0o600, nil)
	a.close()
	if a.err == nil {
		t.Fatal("a socket was packed")
	}
}
