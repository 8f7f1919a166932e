package luks

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// kernelHeaders are the lines of testdata/kernel.gz: what cryptsetup made where the kernel has every cipher (kernel.sh).
func kernelHeaders(t *testing.T) [][]string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(seed(t, "kernel.gz")))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	var lines [][]string
	for line := range strings.Lines(string(text)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines
}

// TestKernel: headers of all ciphers and modes that are allowed, in both formats, are read, and their volume keys are proved.
// None that is on the list is without one here. What else cryptsetup makes is refused.
func TestKernel(t *testing.T) {
	made := map[string]bool{}
	for _, f := range kernelHeaders(t) {
		refused := f[0] == "refused"
		if refused {
			f = f[1:]
		}
		image, err := hex.DecodeString(f[4])
		if err != nil {
			t.Fatal(err)
		}
		if f[0] == Type2 {
			padded := make([]byte, binSize+seedJSON)
			copy(padded, image[:binUsed])
			copy(padded[binSize:], image[binUsed:])
			image = padded
		}
		name := strings.Join(f[:3], " ")
		h, err := readImage(image)
		if refused {
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("%s: got %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		key, err := hex.DecodeString(f[3])
		if err != nil {
			t.Fatal(err)
		}
		if h.Type != f[0] || h.Cipher != f[1] || fmt.Sprint(h.KeyBits) != f[2] || h.Slots[0].Cipher != f[1] {
			t.Errorf("%s: read %s, %s, %d bits, keyslot %s", name, h.Type, h.Cipher, h.KeyBits, h.Slots[0].Cipher)
		}
		if err := h.VerifyVolumeKey(key); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		key[0] ^= 1
		if err := h.VerifyVolumeKey(key); !errors.Is(err, ErrVolumeKey) {
			t.Errorf("%s: another key: %v", name, err)
		}
		made[f[0]+" "+f[1]] = true
	}
	for _, typ := range []string{Type1, Type2} {
		all := []string{"xchacha12,aes-adiantum-plain64", "xchacha20,aes-adiantum-plain64"}
		for mode := range modes {
			for _, name := range []string{"aes", "serpent", "twofish", "camellia"} {
				all = append(all, name+"-"+mode)
			}
		}
		for _, cipher := range all {
			if !made[typ+" "+cipher] {
				t.Errorf("no header of %s %s", typ, cipher)
			}
		}
	}
}
