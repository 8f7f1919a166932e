package testvm

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/crypto/xts"
)

// Where a volume's data begins, and the units that it is encrypted in, in
// bytes. The first is what cryptsetup takes by itself.
const (
	dataOffset = 16 << 20
	sectorSize = 512
)

// FormatVolume makes an image file with an empty LUKS2 volume of size bytes.
// The keyslot of the passphrase costs next to nothing.
//
// A Debian root is enrolled before there is a file system on its volume:
// enrolling writes into the root (the identities, what is installed) and into
// the volume's header, and the finished root is written behind that header
// after. Encrypting in place, as Root does, would make a new header.
func FormatVolume(ctx context.Context, file string, size int64, passphrase []byte) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("testvm: volume: %w", err)
	}
	if err := errors.Join(f.Truncate(dataOffset+size), f.Close()); err != nil {
		return fmt.Errorf("testvm: volume: %w", err)
	}
	_, err = run(ctx, "", passphrase, "cryptsetup", "luksFormat", "-q", "--type", "luks2",
		"--cipher", "aes-xts-plain64", "--key-size", "512",
		"--offset", fmt.Sprint(dataOffset/512), "--sector-size", fmt.Sprint(sectorSize),
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", file)
	return err
}

// WriteTree makes an ext4 file system of the folder tree on the volume in file,
// which FormatVolume made. The host maps and mounts nothing: the sectors are
// encrypted here, as dm-crypt decrypts them (aes-xts-plain64).
func WriteTree(ctx context.Context, file string, passphrase []byte, tree string) error {
	info, err := os.Stat(file)
	if err != nil {
		return fmt.Errorf("testvm: volume: %w", err)
	}
	clearText := file + ".ext4"
	defer func() { _ = os.Remove(clearText) }()
	if _, err := run(ctx, "", nil, "mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", tree,
		clearText, fmt.Sprintf("%dk", (info.Size()-dataOffset)>>10)); err != nil {
		return err
	}
	key, err := volumeKey(ctx, file, passphrase)
	if err != nil {
		return err
	}
	if err := encryptFile(file, clearText, key); err != nil {
		return fmt.Errorf("testvm: volume: %w", err)
	}
	return nil
}

// volumeKey returns the key that the passphrase opens.
func volumeKey(ctx context.Context, file string, passphrase []byte) ([]byte, error) {
	out, err := run(ctx, "", passphrase, "cryptsetup", "luksDump", "-q", "--dump-volume-key", "--key-file", "-", file)
	if err != nil {
		return nil, err
	}
	_, dump, _ := strings.Cut(string(out), "MK dump:")
	return hex.DecodeString(strings.Join(strings.Fields(dump), ""))
}

// encryptFile writes the content of clearText to volume, behind its header.
func encryptFile(volume, clearText string, key []byte) error {
	cipher, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		return err
	}
	in, err := os.Open(clearText)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(volume, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	buf := make([]byte, 1<<20)
	for sector := uint64(0); ; {
		n, err := io.ReadFull(in, buf)
		for at := 0; at+sectorSize <= n; at += sectorSize {
			cipher.Encrypt(buf[at:at+sectorSize], buf[at:at+sectorSize], sector)
			sector++
		}
		if _, err := out.WriteAt(buf[:n], dataOffset+int64(sector)*sectorSize-int64(n)); err != nil {
			return err
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return out.Close()
		case err != nil:
			return err
		}
	}
}

// NullCipher changes the LUKS2 headers in file so that they open as before, by
// the same keyslots to the same key, but nothing is encrypted: the cipher of the
// data becomes cipher_null-ecb, and the checksums are made right (LUKS2 on-disk
// format 1.1.3, sections 2.1 and 3.3).
func NullCipher(file string) error {
	const before, after = `"encryption":"aes-xts-plain64"`, `"encryption":"cipher_null-ecb"`
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("testvm: null cipher: %w", err)
	}
	defer func() { _ = f.Close() }()
	first := make([]byte, 16)
	if _, err := f.ReadAt(first, 0); err != nil {
		return fmt.Errorf("testvm: null cipher: %w", err)
	}
	size := int64(binary.BigEndian.Uint64(first[8:]))
	for _, at := range []int64{0, size} { // the header and its copy
		header := make([]byte, size)
		if _, err := f.ReadAt(header, at); err != nil {
			return fmt.Errorf("testvm: null cipher: %w", err)
		}
		segments := bytes.Index(header, []byte(`"segments"`))
		if segments < 0 || !bytes.Contains(header[segments:], []byte(before)) {
			return fmt.Errorf("testvm: null cipher: the header at %d is another than was expected", at)
		}
		copy(header[segments:], bytes.Replace(header[segments:], []byte(before), []byte(after), 1))
		checksum := header[448 : 448+64]
		clear(checksum)
		sum := sha256.Sum256(header)
		copy(checksum, sum[:])
		if _, err := f.WriteAt(header, at); err != nil {
			return fmt.Errorf("testvm: null cipher: %w", err)
		}
	}
	return f.Close()
}

// WriteClear writes the ext4 file system of the folder tree behind the header in
// file as it is.
func WriteClear(ctx context.Context, file, tree string) error {
	info, err := os.Stat(file)
	if err != nil {
		return fmt.Errorf("testvm: volume: %w", err)
	}
	_, err = run(ctx, "", nil, "mkfs.ext4", "-q", "-F", "-E", fmt.Sprintf("root_owner=0:0,offset=%d", dataOffset), "-d", tree,
		file, fmt.Sprintf("%dk", (info.Size()-dataOffset)>>10))
	return err
}
