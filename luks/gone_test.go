package luks

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestGone: what may be written over, and what somebody could still use.
func TestGone(t *testing.T) {
	const (
		uuid  = "6b0a5ad5-3c2f-4f6b-9d3c-0d1d5c1f7c11"
		other = "11111111-2222-4333-8444-555555555555"
	)
	bin, text := parts(t)
	image := image2(bin, text)
	half := len(image) / 2
	with := func(edit func(b []byte)) []byte {
		b := slices.Clone(image)
		edit(b)
		return b
	}
	newer := edited(t, map[string]any{"keyslots.0.future": "1"})
	bin.SeqID++
	conflict := slices.Concat(image[:half], image2(bin, text)[half:])
	one := seed1(t, func(*phdr) {})
	uuid1 := string(one[uuidAt : uuidAt+36])
	for name, c := range map[string]struct {
		image []byte
		uuid  string
		want  error
	}{
		"nothing":                            {make([]byte, len(image)), uuid, nil},
		"noise":                              {with(func(b []byte) { rand.Read(b) }), uuid, nil},
		"both copies damaged":                {with(func(b []byte) { flip(b, 300); flip(b, half+300) }), uuid, nil},
		"both copies damaged, who knows":     {with(func(b []byte) { flip(b, 300); flip(b, half+300) }), "", nil},
		"both copies damaged, another's":     {with(func(b []byte) { flip(b, 300); flip(b, half+300) }), other, ErrMismatch},
		"the second damaged, another's":      {with(func(b []byte) { rand.Read(b[:binSize]); flip(b, half+300) }), other, ErrMismatch},
		"intact":                             {image, uuid, ErrIntact},
		"first copy overwritten":             {with(func(b []byte) { rand.Read(b[:binSize]) }), uuid, ErrIntact},
		"first copy overwritten, another's":  {with(func(b []byte) { rand.Read(b[:binSize]) }), other, ErrMismatch},
		"of a later cryptsetup":              {newer, uuid, ErrIntact},
		"of a later cryptsetup, second only": {slices.Concat(make([]byte, half), newer[half:]), uuid, ErrIntact},
		"one copy newer":                     {conflict, uuid, ErrIntact},
		"LUKS1":                              {one, uuid1, ErrIntact},
		"LUKS1, a keyslot damaged":           {seed1(t, func(p *phdr) { p.Slots[7].Active = 1 }), uuid1, ErrIntact},
		"LUKS1, digest damaged":              {seed1(t, func(p *phdr) { p.DigestIter = 0 }), uuid1, nil},
		"LUKS1, another's":                   {seed1(t, func(p *phdr) { p.DigestIter = 0 }), other, ErrMismatch},
		"LUKS1, all keyslots damaged": {seed1(t, func(p *phdr) {
			for i := range p.Slots {
				p.Slots[i].Stripes = 7
			}
		}), uuid1, nil},
		"another version": {with(func(b []byte) { b[7] = 3 }), uuid, ErrUnsupported},
	} {
		err := Gone(volume{c.image}, seedSize, c.uuid)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		file := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(file, c.image, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, seedSize); err != nil {
			t.Fatal(err)
		}
		if err := GoneFile(file, c.uuid); !errors.Is(err, c.want) {
			t.Errorf("%s, in a file: %v, want %v", name, err, c.want)
		}
	}
	if err := Gone(failing{}, seedSize, uuid); !errors.Is(err, errDisk) {
		t.Errorf("a device that cannot be read: %v", err)
	}
}
