package unlock

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

var update = flag.Bool("update", false, "write unlock/testdata/vectors anew")

const (
	testUUID  = "01234567-89ab-cdef-0123-456789abcdef"
	otherUUID = "fedcba98-7654-3210-fedc-ba9876543210"
	attemptID = "000102030405060708090a0b0c0d0e0f"
)

var testKeyID = identity.KeyID(strings.Repeat("ab", 32))

type vector struct {
	input, expect string
	data          []byte
}

const (
	goodRequest = "mandos-escrow-boot: 1\nattempt: " + attemptID + "\n"
	goodReply   = "mandos-escrow-boot-reply: 1\nresult: released\nnonce: " + attemptID + "\nblob: AAEC\nblob: /w==\n"
	refusedText = "mandos-escrow-boot-reply: 1\nresult: refused\n"
)

func goodConfig() *Config {
	v := Volume{UUID: testUUID, Type: "luks2", Cipher: "aes-xts-plain64", KeyBits: 512, Offset: 16 << 20, SectorSize: 512, Digest: strings.Repeat("0f", 32)}
	second := v
	second.UUID, second.Path = otherUUID, "/srv/disk.img"
	return &Config{
		Machine: testKeyID, Threshold: 2,
		Servers: []Server{
			{"one", identity.KeyID(strings.Repeat("01", 32)), []string{"192.0.2.1:7625", "[2001:db8::1]:7625"}},
			{"two", identity.KeyID(strings.Repeat("02", 32)), []string{"[fe80::2%eth0]:7625"}},
			{"three", identity.KeyID(strings.Repeat("03", 32)), []string{"keys.example.org:443"}},
		},
		Volumes: []Volume{v, second},
	}
}

// goodBlob is a plaintext with a fixed set ID.
func goodBlob() []byte {
	share := []byte("boot passphrase of a test vector")
	sum := sha256.Sum256(share)
	commitment, err := hkdf.Key(sha256.New, share, nil, commitmentInfo, 32)
	if err != nil {
		panic(err)
	}
	w := record.New(blobKind, 1).Text("machine-key-id", string(testKeyID)).Text("volume-uuid", testUUID).Uint("epoch", 3)
	part := escrow.Part{SetID: bytes.Repeat([]byte{7}, 16), Index: 2, Threshold: 1, Digests: [][]byte{sum[:], sum[:]}, Commitment: commitment, Data: share}
	part.Write(w)
	plain, err := w.Bytes()
	if err != nil {
		panic(err)
	}
	return plain
}

func framed(length int, data string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(length)), data...)
}

func vectors(t *testing.T) map[string]vector {
	configBytes, err := goodConfig().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	config, blobText := string(configBytes), string(goodBlob())
	v := map[string]vector{}
	add := func(name, input, expect, data string) {
		if _, twice := v[name]; twice {
			t.Fatalf("two vectors %s", name)
		}
		v[name] = vector{input, expect, []byte(data)}
	}
	// change replaces the first old, which must be there.
	change := func(text, old, replacement string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("no %q in %q", old, text)
		}
		return strings.Replace(text, old, replacement, 1)
	}
	add("frame-request", "request-frame", "ok", string(framed(len(goodRequest), goodRequest)))
	add("frame-reply-released", "reply-frame", "ok", string(framed(len(goodReply), goodReply)))
	add("frame-reply-refused", "reply-frame", "ok", string(framed(len(refusedText), refusedText)))
	add("frame-empty", "request-frame", "frame of 0 bytes", string(framed(0, "")))
	add("frame-request-too-long", "request-frame", "frame of 1025 bytes", string(framed(1025, goodRequest)))
	add("frame-reply-too-long", "reply-frame", "frame of 262145 bytes", string(framed(262145, goodReply)))
	add("frame-4-GiB", "reply-frame", "frame of 4294967295 bytes", string(framed(-1, goodReply)))
	add("frame-cut", "request-frame", "unexpected EOF", string(framed(len(goodRequest), goodRequest[:40])))
	add("frame-header-cut", "request-frame", "unexpected EOF", "\x00\x00")

	add("request-good", "request", "ok", goodRequest)
	add("request-version", "request", "has version 2", change(goodRequest, "boot: 1", "boot: 2"))
	add("request-no-attempt", "request", "lacks field attempt", "mandos-escrow-boot: 1\n")
	add("request-short-attempt", "request", "not 16 bytes", change(goodRequest, "0001", "01"))
	add("request-upper-case", "request", "lower-case hex", change(goodRequest, "0a0b", "0A0b"))
	add("request-more-fields", "request", "goes on after its last field", goodRequest+"more: 1\n")
	add("request-cut", "request", "cut off", goodRequest[:len(goodRequest)-1])
	add("request-carriage-return", "request", "control character", change(goodRequest, "0f\n", "0f\r\n"))
	add("request-other-record", "request", "lacks field mandos-escrow-boot", refusedText)
	add("request-http", "request", "lacks field mandos-escrow-boot", "GET / HTTP/1.1\r\n\r\n")

	add("reply-released", "reply", "ok", goodReply)
	add("reply-refused", "reply", "ok", refusedText)
	add("reply-unknown-result", "reply", "neither released nor refused", change(refusedText, "refused", "perhaps"))
	add("reply-refused-with-reason", "reply", "goes on after its last field", refusedText+"reason: disabled\n")
	add("reply-no-nonce", "reply", "lacks field nonce", change(goodReply, "nonce: "+attemptID+"\n", ""))
	add("reply-no-blob", "reply", "lacks field blob", change(goodReply, "blob: AAEC\nblob: /w==\n", ""))
	add("reply-17-blobs", "reply", "more than 16", goodReply+strings.Repeat("blob: AA==\n", 15))
	add("reply-long-blob", "reply", "longer than 8192 bytes", change(goodReply, "AAEC", strings.Repeat("AAEC", 2731)))
	add("reply-not-base64", "reply", "not base64", change(goodReply, "/w==", "/x=="))

	add("blob-good", "blob", "ok", blobText)
	add("blob-version", "blob", "has version 9", change(blobText, "blob: 1", "blob: 9"))
	add("blob-key-id", "blob", "key ID is 64", change(blobText, "key-id: ab", "key-id: "))
	add("blob-uuid", "blob", "not a UUID", change(blobText, testUUID, "../../../../etc/passwd"))
	add("blob-epoch", "blob", "epoch is not a number", change(blobText, "epoch: 3", "epoch: 03"))
	add("blob-index-0", "blob", "index 0 of 2", change(blobText, "index: 2", "index: 0"))
	add("blob-index-3", "blob", "index 3 of 2", change(blobText, "index: 2", "index: 3"))
	add("blob-threshold-3", "blob", "threshold 3 of 2", change(blobText, "threshold: 1", "threshold: 3"))
	add("blob-share-changed", "blob", "digest", change(blobText, "share: 62", "share: 63"))
	add("blob-commitment-changed", "blob", escrow.ErrCommitment.Error(), changeCommitment(blobText))

	add("config-good", "config", "ok", config)
	add("config-version", "config", "has version 7", change(config, "unlock: 1", "unlock: 7"))
	add("config-machine", "config", "key ID is 64", change(config, "key-id: ab", "key-id: AB"))
	add("config-threshold-0", "config", "threshold 0 of 3", change(config, "threshold: 2", "threshold: 0"))
	add("config-threshold-4", "config", "threshold 4 of 3", change(config, "threshold: 2", "threshold: 4"))
	add("config-no-server", "config", "0 servers", config[:strings.Index(config, "server:")]+config[strings.Index(config, "volume-uuid:"):])
	add("config-no-address", "config", "a server has none", change(config, "address: [fe80::2%eth0]:7625\n", ""))
	add("config-no-port", "config", "missing port", change(config, "192.0.2.1:7625", "192.0.2.1"))
	add("config-port-0", "config", "is not HOST:PORT", change(config, "192.0.2.1:7625", "192.0.2.1:0"))
	add("config-no-host", "config", "is not HOST:PORT", change(config, "192.0.2.1:7625", ":7625"))
	add("config-9-addresses", "config", "more than 8 fields address", change(config, "address: [fe80::2%eth0]:7625\n", strings.Repeat("address: a:1\n", 9)))
	add("config-server-twice", "config", "stands twice", change(config, strings.Repeat("02", 32), strings.Repeat("01", 32)))
	add("config-volume-twice", "config", "stands twice", change(config, otherUUID, testUUID))
	add("config-no-volume", "config", "0 volumes", config[:strings.Index(config, "volume-uuid:")])
	add("config-uuid", "config", "not a UUID", change(config, testUUID, "..-..-..-..-.."))
	add("config-relative-path", "config", "not an absolute path", change(config, "/srv/disk.img", "srv/disk.img"))
	add("config-crooked-path", "config", "not an absolute path", change(config, "/srv/disk.img", "/srv/../disk.img"))
	add("config-digest", "config", "not 32 bytes", change(config, "digest: 0f", "digest: "))
	add("config-huge-number", "config", "too large", change(config, "key-bits: 512", "key-bits: 2147483648"))
	return v
}

// changeCommitment flips a bit of a plaintext's commitment.
func changeCommitment(text string) string {
	i := strings.Index(text, "commitment: ") + len("commitment: ")
	digit := "0"
	if text[i] == '0' {
		digit = "1"
	}
	return text[:i] + digit + text[i+1:]
}

func (v vector) bytes() []byte {
	return append(fmt.Appendf(nil, "input: %s\nexpect: %s\n\n", v.input, v.expect), v.data...)
}

// outcome reads the input, and writes it again if it was read.
func (v vector) outcome() (again []byte, err error) {
	switch v.input {
	case "request-frame", "reply-frame":
		limit := uint32(MaxRequest)
		if v.input == "reply-frame" {
			limit = MaxReply
		}
		data, err := readFrame(bytes.NewReader(v.data), limit, nil)
		return frame(data), err
	case "request":
		r, err := ParseRequest(v.data)
		if err != nil {
			return nil, err
		}
		return r.Bytes()
	case "reply":
		r, err := ParseReply(v.data)
		if err != nil {
			return nil, err
		}
		return r.Bytes()
	case "blob":
		b, err := parseBlob(v.data)
		if err != nil {
			return nil, err
		}
		w := record.New(blobKind, 1).Text("machine-key-id", string(b.machine)).Text("volume-uuid", b.volume).Uint("epoch", b.epoch)
		b.part.Write(w)
		return w.Bytes()
	case "config":
		c, err := ParseConfig(v.data)
		if err != nil {
			return nil, err
		}
		return c.Bytes()
	}
	return nil, fmt.Errorf("input %q", v.input)
}

func TestVectors(t *testing.T) {
	dir := filepath.Join("testdata", "vectors")
	want := vectors(t)
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, v := range want {
			if err := os.WriteFile(filepath.Join(dir, name), v.bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != len(want) {
		t.Fatalf("%d vectors in %s, want %d; %v", len(files), dir, len(want), err)
	}
	for name, v := range want {
		t.Run(name, func(t *testing.T) {
			file, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(file, v.bytes()) {
				t.Errorf("the file is not the vector any more")
			}
			again, err := v.outcome()
			switch {
			case v.expect == "ok" && (err != nil || !bytes.Equal(again, v.data)):
				t.Errorf("read and written again: %q, %v", again, err)
			case v.expect != "ok" && (err == nil || !strings.Contains(err.Error(), v.expect)):
				t.Errorf("error %v, want %q", err, v.expect)
			}
		})
	}
}
