package content

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aead/serpent"
	"github.com/dgryski/go-camellia"
	"golang.org/x/crypto/twofish" //nolint:staticcheck // as cipher.go
	"golang.org/x/crypto/xts"
	"lukechampine.com/adiantum"

	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

const (
	plainSize = 6 << 20
	offset    = 1 << 20
)

// testKey is a key of that many bytes, no two the same.
func testKey(n int) []byte {
	key := make([]byte, n)
	for i := range key {
		key[i] = byte(7*i + 1)
	}
	return key
}

// ext4Image is what mkfs.ext4 makes.
func ext4Image(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs")
	blank(t, path, plainSize)
	run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", path)
	return read(t, path)
}

func blank(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// encrypt is the other direction, from the descriptions of dm-crypt: at the offset, with noise before it.
func encrypt(t *testing.T, plain []byte, g Geometry, key []byte) []byte {
	t.Helper()
	out := make([]byte, g.Offset+int64(len(plain)))
	copy(out, bytes.Repeat([]byte("not data "), int(g.Offset)/9))
	enc := encrypter(t, g.Cipher, key)
	for at := 0; at < len(plain); at += g.SectorSize {
		// Never written: what mkfs left out is not encrypted either.
		if sector := plain[at : at+g.SectorSize]; !bytes.Equal(sector, make([]byte, g.SectorSize)) || at < 3<<20 {
			enc(out[g.Offset+int64(at):][:g.SectorSize], sector, uint64(at/512))
		}
	}
	return out
}

func encrypter(t *testing.T, name string, key []byte) func(dst, src []byte, n uint64) {
	t.Helper()
	algorithm, mode, _ := strings.Cut(name, "-")
	block := map[string]func([]byte) (cipher.Block, error){
		"aes": aes.NewCipher, "serpent": serpent.NewCipher, "camellia": camellia.New,
		"twofish": func(k []byte) (cipher.Block, error) { return twofish.NewCipher(k) },
	}[algorithm]
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	plain := func(n uint64) uint64 {
		if strings.HasSuffix(mode, "-plain") {
			n = uint64(uint32(n))
		}
		return n
	}
	iv := func(n uint64) []byte { return append(binary.LittleEndian.AppendUint64(nil, n), make([]byte, 8)...) }
	switch mode {
	case "xts-plain64", "xts-plain":
		c, err := xts.NewCipher(block, key)
		must(err)
		return func(dst, src []byte, n uint64) { c.Encrypt(dst, src, plain(n)) }
	case "cbc-plain64", "cbc-plain":
		b, err := block(key)
		must(err)
		return func(dst, src []byte, n uint64) { cipher.NewCBCEncrypter(b, iv(plain(n))).CryptBlocks(dst, src) }
	case "cbc-benbi":
		b, err := block(key)
		must(err)
		return func(dst, src []byte, n uint64) {
			v := binary.BigEndian.AppendUint64(make([]byte, 8), n*512/16+1)
			cipher.NewCBCEncrypter(b, v).CryptBlocks(dst, src)
		}
	case "cbc-essiv:sha256":
		b, err := block(key)
		must(err)
		salt := sha256.Sum256(key)
		e, err := block(salt[:])
		must(err)
		return func(dst, src []byte, n uint64) {
			v := iv(n)
			e.Encrypt(v, v)
			cipher.NewCBCEncrypter(b, v).CryptBlocks(dst, src)
		}
	case "adiantum-plain64":
		c := adiantum.New(key)
		if algorithm == "xchacha20,aes" {
			c = adiantum.New20(key)
		}
		return func(dst, src []byte, n uint64) {
			copy(dst, c.Encrypt(bytes.Clone(src), append(iv(n), make([]byte, 16)...)))
		}
	}
	t.Fatalf("no cipher %q", name)
	return nil
}

// ciphers are those that package luks admits and this one knows, each with one of its key lengths in bytes.
var ciphers = map[string]int{
	"aes-xts-plain64": 64, "aes-xts-plain": 32, "aes-cbc-essiv:sha256": 32, "aes-cbc-plain": 16, "aes-cbc-plain64": 24,
	"twofish-xts-plain64": 64, "twofish-cbc-essiv:sha256": 32, "twofish-cbc-plain64": 32, "twofish-cbc-plain": 16, "twofish-xts-plain": 32,
	"serpent-xts-plain64": 64, "serpent-cbc-essiv:sha256": 32, "serpent-cbc-plain64": 24, "serpent-cbc-plain": 16, "serpent-xts-plain": 32,
	"camellia-xts-plain64": 64, "camellia-cbc-essiv:sha256": 32, "camellia-cbc-plain64": 24, "camellia-cbc-plain": 16, "camellia-xts-plain": 32,
	"xchacha12,aes-adiantum-plain64": 32, "xchacha20,aes-adiantum-plain64": 32,
	"aes-cbc-benbi": 32, "twofish-cbc-benbi": 32, "serpent-cbc-benbi": 16, "camellia-cbc-benbi": 24,
}

var sectorSizes = []int{512, 1024, 2048, 4096}

// TestKernel: what dm-crypt itself wrote (luks/testdata/kernel.sh), also beyond sector 2^32, comes out as it went in, and the
// encrypters of these tests write the same.
func TestKernel(t *testing.T) {
	plain := make([]byte, block)
	for i := range plain {
		plain[i] = byte(i/8*11 + i)
	}
	proved := map[string]bool{}
	for line := range strings.Lines(string(read(t, "testdata/kernel.txt"))) {
		var name, want string
		var keyBytes, sectorSize int
		var first uint64
		if _, err := fmt.Sscan(line, &name, &keyBytes, &sectorSize, &first, &want); err != nil {
			t.Fatal(err)
		}
		key := testKey(keyBytes)
		c, err := newCipher(name, key)
		if _, known := ciphers[name]; !known {
			if !errors.Is(err, ErrCipher) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		enc, disk := encrypter(t, name, key), make([]byte, block)
		for at := 0; at < block; at += sectorSize {
			enc(disk[at:at+sectorSize], plain[at:at+sectorSize], first+uint64(at/512))
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(disk)); got != want {
			t.Errorf("%s, sectors of %d, first %d: wrote %s, the kernel %s", name, sectorSize, first, got, want)
		}
		for at := 0; at < block; at += sectorSize {
			c(disk[at:at+sectorSize], first+uint64(at/512))
		}
		if !bytes.Equal(disk, plain) {
			t.Errorf("%s, sectors of %d, first %d: read otherwise", name, sectorSize, first)
		}
		proved[name] = true
	}
	for name := range ciphers {
		if !proved[name] {
			t.Errorf("the kernel wrote nothing with %s", name)
		}
	}
}

// TestCheck: for every cipher and sector size the right geometry is accepted, and no other one ever, by file system or by
// fingerprint.
func TestCheck(t *testing.T) {
	fs := ext4Image(t)
	for name, n := range ciphers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, sector := range sectorSizes {
				g, key := Geometry{name, offset, sector}, testKey(n)
				disk := encrypt(t, fs, g, key)
				size := int64(len(disk))
				prints, err := Fingerprint(bytes.NewReader(disk), size, g, key)
				if err != nil || len(prints) < 5 {
					t.Fatalf("sectors of %d: fingerprint of %d places, %v", sector, len(prints), err)
				}
				if what, err := Find(bytes.NewReader(disk), size, g, key); what != "ext4" || err != nil {
					t.Errorf("sectors of %d: found %q, %v", sector, what, err)
				}
				wrongOnes(t, disk, g, key, prints)
			}
		})
	}
}

func wrongOnes(t *testing.T, disk []byte, right Geometry, key []byte, prints [][]byte) {
	t.Helper()
	other := bytes.Clone(key)
	other[len(other)-1] ^= 1
	refuse := func(why string, g Geometry, key []byte) {
		t.Helper()
		if what, err := Check(bytes.NewReader(disk), int64(len(disk)), g, key, prints); !errors.Is(err, ErrGeometry) {
			t.Errorf("%+v: with %s %+v found %q, %v", right, why, g, what, err)
		}
	}
	refuse("another key", right, other)
	for _, sector := range sectorSizes {
		if g := right; sector != g.SectorSize {
			g.SectorSize = sector
			refuse("another sector size", g, key)
		}
	}
	for _, d := range []int64{-offset, -4096, -512, 512, 1024, 4096, 8192, 1 << 20, 4 << 20} {
		g := right
		g.Offset += d
		refuse("another offset", g, key)
	}
	for name, n := range ciphers {
		g := right
		// The two are the same up to sector 2^32.
		if name = strings.Replace(name, "plain64", "plain", 1); name == strings.Replace(g.Cipher, "plain64", "plain", 1) || n != len(key) {
			continue
		}
		if g.Cipher = name; strings.HasPrefix(name, "xchacha") {
			g.Cipher += "64"
		}
		refuse("another cipher", g, key)
	}
}

// TestFingerprintAlone: what is no known file system is known by its fingerprint, also after most of it was overwritten, and on
// a volume that grew. Two places never written do not tell one offset from another.
func TestFingerprintAlone(t *testing.T) {
	plain := make([]byte, plainSize)
	for i := range plain {
		plain[i] = byte(i >> 9 * 11)
	}
	g, key := Geometry{"aes-xts-plain64", offset, 512}, testKey(64)
	disk := encrypt(t, plain, g, key)
	size := int64(len(disk))
	prints, err := Fingerprint(bytes.NewReader(disk), size, g, key)
	if err != nil {
		t.Fatal(err)
	}
	if what, err := Find(bytes.NewReader(disk), size, g, key); !errors.Is(err, ErrNothing) {
		t.Errorf("found %q, %v", what, err)
	}
	wrongOnes(t, disk, g, key, prints)
	clear(disk[offset+firstPlace*4:]) // only two places are left
	disk = append(disk, make([]byte, 8<<20)...)
	if what, err := Check(bytes.NewReader(disk), int64(len(disk)), g, key, prints); what != KnownData || err != nil {
		t.Errorf("%q, %v", what, err)
	}
	clear(disk[offset+firstPlace*2:]) // one may be a remnant under something else
	if _, err := Check(bytes.NewReader(disk), int64(len(disk)), g, key, prints); !errors.Is(err, ErrGeometry) {
		t.Errorf("a single place: %v", err)
	}
	if what, err := Check(bytes.NewReader(disk), int64(len(disk)), g, key, prints[:2]); what != KnownData || err != nil {
		t.Errorf("one place of two: %q, %v", what, err)
	}
	clear(disk)
	if prints, err = Fingerprint(bytes.NewReader(disk), size, g, key); len(prints) != 0 || err != nil {
		t.Errorf("a volume that was never written has the fingerprint %x, %v", prints, err)
	}
	if _, err := Check(bytes.NewReader(disk), size, g, key, prints); !errors.Is(err, ErrGeometry) {
		t.Errorf("never written: %v", err)
	}
	if _, err := Check(bytes.NewReader(disk), size, g, key, [][]byte{{}, nil, make([]byte, 7)}); !errors.Is(err, ErrGeometry) {
		t.Errorf("empty fingerprints: %v", err)
	}
}

// TestReal: what the real cryptsetup encrypts (reencrypt needs no device-mapper for a file), with its own header before it.
func TestReal(t *testing.T) {
	fs := ext4Image(t)
	for _, c := range []struct{ typ, cipher, sector string }{
		{"luks2", "aes-xts-plain64", "512"},
		{"luks2", "aes-xts-plain64", "4096"},
		{"luks2", "aes-cbc-essiv:sha256", "512"},
		{"luks2", "aes-cbc-essiv:sha256", "4096"},
		{"luks2", "aes-cbc-plain64", "2048"},
		{"luks2", "aes-cbc-plain", "512"},
		{"luks2", "aes-xts-plain", "1024"},
	} {
		t.Run(c.typ+" "+c.cipher+" "+c.sector, func(t *testing.T) {
			dir := t.TempDir()
			dev, pass := filepath.Join(dir, "volume"), filepath.Join(dir, "passphrase")
			for path, data := range map[string][]byte{dev: append(bytes.Clone(fs), make([]byte, 32<<20)...), pass: []byte("real")} {
				if err := os.WriteFile(path, data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			bits := "256"
			run(t, "cryptsetup", "reencrypt", "--encrypt", "--batch-mode", "--type", c.typ, "--reduce-device-size", "32M", "--cipher", c.cipher,
				"--key-size", bits, "--sector-size", c.sector, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", pass, dev)
			h, err := luks.ReadFile(dev)
			if err != nil {
				t.Fatal(err)
			}
			key, err := cryptsetup.Tool{}.VolumeKey(t.Context(), dev, []byte("real"))
			if err != nil {
				t.Fatal(err)
			}
			g := Geometry{h.Cipher, h.Offset, h.SectorSize}
			if fmt.Sprint(g.SectorSize) != c.sector || g.Cipher != c.cipher {
				t.Fatalf("made %+v", g)
			}
			disk := read(t, dev)
			prints, err := Fingerprint(bytes.NewReader(disk), int64(len(disk)), g, key)
			if err != nil || len(prints) == 0 {
				t.Fatalf("fingerprint %x, %v", prints, err)
			}
			if what, err := Check(bytes.NewReader(disk), int64(len(disk)), g, key, nil); what != "ext4" || err != nil {
				t.Errorf("found %q, %v", what, err)
			}
			wrongOnes(t, disk, g, key, prints)
		})
	}
}

// TestFind knows what the tools at hand make, and does not take the remains of one for another.
func TestFind(t *testing.T) {
	g, key := Geometry{"aes-xts-plain64", offset, 4096}, testKey(64)
	swap := filepath.Join(t.TempDir(), "swap")
	blank(t, swap, plainSize)
	run(t, "mkswap", swap)
	small := func(at int, text string, more ...func(b []byte)) []byte {
		b := make([]byte, plainSize)
		copy(b[at:], text)
		for _, m := range more {
			m(b)
		}
		return b
	}
	for name, c := range map[string]struct {
		plain []byte
		want  string
	}{
		"swap": {read(t, swap), "swap"},
		"lvm":  {small(512, "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00LVM2 001"), "LVM2"},
		"xfs": {small(0, "XFSB\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x04\x00", func(b []byte) {
			copy(b[102:], "\x02\x00")
			copy(b[512:], "XAGF\x00\x00\x00\x01\x00\x00\x00\x00")
		}), "XFS"},
		"second group of xfs": {small(0, "XFSB\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x04\x00", func(b []byte) {
			copy(b[102:], "\x02\x00")
			copy(b[512:], "XAGF\x00\x00\x00\x01\x00\x00\x00\x01")
		}), ""},
		"btrfs":         {small(65584, "\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00_BHRfS_M"), "Btrfs"},
		"luks":          {small(0, "LUKS\xba\xbe\x00\x02"), "LUKS"},
		"fat":           {small(82, "FAT32   ", func(b []byte) { copy(b[510:], "\x55\xaa") }), "FAT"},
		"mbr":           {small(446, "\x80\x00\x02\x00\x83\x20\x20\x00\x00\x08\x00\x00\x00\x10\x00\x00", func(b []byte) { copy(b[510:], "\x55\xaa") }), "MBR partitions"},
		"boot code":     {small(446, "\x12\x00\x02\x00\x83\x20\x20\x00\x00\x08\x00\x00\x00\x10\x00\x00", func(b []byte) { copy(b[510:], "\x55\xaa") }), ""},
		"nothing":       {small(82, "FAT32   "), ""},
		"ext4's copy":   {small(1080, "\x53\xef", func(b []byte) { b[1028], b[1064], b[1114] = 1, 1, 1 }), ""},
		"ext4 too long": {small(1080, "\x53\xef", func(b []byte) { b[1031], b[1064] = 1, 1 }), ""},
		"random":        {bytes.Repeat([]byte("0123456789abcdefg"), plainSize/17+1)[:plainSize], ""},
	} {
		disk := encrypt(t, c.plain, g, key)
		what, err := Find(bytes.NewReader(disk), int64(len(disk)), g, key)
		if what != c.want || (c.want == "") != errors.Is(err, ErrNothing) {
			t.Errorf("%s: found %q, %v; want %q", name, what, err, c.want)
		}
	}
	// A name without anything that proves the sector size.
	plain := bytes.Repeat([]byte("0123456789abcdefg"), plainSize/17+1)[:plainSize]
	copy(plain, "LUKS\xba\xbe\x00\x02")
	disk := encrypt(t, plain, g, key)
	if what, err := Find(bytes.NewReader(disk), int64(len(disk)), g, key); !errors.Is(err, ErrNothing) {
		t.Errorf("unproved: %q, %v", what, err)
	}
}

func TestRefused(t *testing.T) {
	disk := make([]byte, 8<<20)
	for name, c := range map[string]struct {
		g   Geometry
		key int
		err error
	}{
		"null cipher":       {Geometry{"cipher_null-ecb", offset, 512}, 32, ErrCipher},
		"unknown mode":      {Geometry{"aes-ctr-plain64", offset, 512}, 32, ErrCipher},
		"unknown cipher":    {Geometry{"cast5-cbc-plain", offset, 512}, 16, ErrCipher},
		"adiantum's key":    {Geometry{"xchacha12,aes-adiantum-plain64", offset, 512}, 16, ErrCipher},
		"sector of 0":       {Geometry{"aes-xts-plain64", offset, 0}, 64, ErrGeometry},
		"sector of 8192":    {Geometry{"aes-xts-plain64", offset, 8192}, 64, ErrGeometry},
		"negative offset":   {Geometry{"aes-xts-plain64", -512, 512}, 64, ErrGeometry},
		"offset at 100":     {Geometry{"aes-xts-plain64", 100, 512}, 64, ErrGeometry},
		"offset at end":     {Geometry{"aes-xts-plain64", 8 << 20, 512}, 64, ErrGeometry},
		"offset far beyond": {Geometry{"aes-xts-plain64", 1 << 62, 512}, 64, ErrGeometry},
	} {
		if what, err := Check(bytes.NewReader(disk), int64(len(disk)), c.g, testKey(c.key), nil); !errors.Is(err, c.err) {
			t.Errorf("%s: %q, %v; want %v", name, what, err, c.err)
		}
	}
	for _, n := range []int{0, 1, 17, 33, 65} {
		for cipher := range ciphers {
			if _, err := Find(bytes.NewReader(disk), int64(len(disk)), Geometry{cipher, 0, 512}, testKey(n)); err == nil || errors.Is(err, ErrNothing) {
				t.Errorf("%s took a key of %d bytes: %v", cipher, n, err)
			}
		}
	}
	// The volume is shorter than said.
	if _, err := Find(bytes.NewReader(disk), 1<<40, Geometry{"aes-xts-plain64", 1 << 30, 512}, testKey(64)); err == nil || errors.Is(err, ErrNothing) {
		t.Errorf("short volume: %v", err)
	}
}

// FuzzFind: whoever holds the disk wrote it.
func FuzzFind(f *testing.F) {
	f.Add([]byte("XFSB"), uint16(0))
	f.Add([]byte("\x53\xef"), uint16(1080))
	f.Add([]byte("hsqs"), uint16(0))
	g, key := Geometry{"aes-cbc-plain64", 0, 4096}, testKey(16)
	c, err := aes.NewCipher(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte, at uint16) {
		plain := make([]byte, 128<<10)
		copy(plain[at:], data)
		for i := 0; i < len(plain); i += 4096 {
			iv := append(binary.LittleEndian.AppendUint64(nil, uint64(i/512)), make([]byte, 8)...)
			cipher.NewCBCEncrypter(c, iv).CryptBlocks(plain[i:i+4096], plain[i:i+4096])
		}
		if what, err := Find(bytes.NewReader(plain), int64(len(plain)), g, key); (what == "") == (err == nil) {
			t.Fatalf("%q, %v", what, err)
		}
	})
}
