package escrow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestSheet(t *testing.T) {
	o := standAlone(passphrasePayload(), fingerprinted())
	for _, name := range payloadNames {
		s := must(SealSheet(o, name, packetPassphrase))
		again := must(SealSheet(o, name, packetPassphrase))
		if !bytes.Equal(s.Message, again.Message) {
			t.Errorf("%s: sealed again it differs", name)
		}
		other := must(SealSheet(o, name, []byte("another long passphrase")))
		if bytes.Equal(s.Message[15:], other.Message[15:]) {
			t.Errorf("%s: another passphrase, the same message", name)
		}
		t.Logf("%s: %d bytes", name, len(s.Message))
		if s.ID != o.Header.ID || s.Supersedes != o.Header.Supersedes || s.Machine != "alice-laptop" || s.Payload != name {
			t.Errorf("%s: %+v", name, s)
		}
		got := must(OpenSheet(s.Message, packetPassphrase))
		if got.Header.ID != o.Header.ID || !got.Header.Created.Equal(o.Header.Created) || got.Header.Volume.UUID != testUUID || len(got.payloads()) != 1 {
			t.Errorf("%s: %+v", name, got.Header)
		}
		if p := got.Passphrase; name == ForPassphrase && (string(p.Passphrase) != testPassphrase || p.Slot != 2 || p.LUKSType != "luks2") {
			t.Errorf("%+v", p)
		}
		if p := got.VolumeKey; name == ForVolumeKey && (!bytes.Equal(p.Key, volumeKeyPayload().Key) || p.KeyBits != 512 ||
			p.Cipher != "aes-xts-plain64" || p.DataOffset != 16<<20 || p.SectorSize != 4096) {
			t.Errorf("%+v", p)
		}
	}
}

func TestSheetRefuses(t *testing.T) {
	long := volumeKeyPayload()
	long.Key, long.KeyBits = bytes.Repeat([]byte{1}, 128), 1024
	short := volumeKeyPayload()
	short.Key, short.KeyBits = []byte("8 bytes."), 64
	chosen := passphrasePayload()
	chosen.Passphrase = []byte("a passphrase of a person")
	for name, c := range map[string]struct {
		o       *Opened
		payload string
		want    error
	}{
		"too long": {standAlone(long), ForVolumeKey, ErrLimit}, "not there": {standAlone(long), ForPassphrase, ErrNoPayload},
		"no such": {standAlone(long), "both", ErrNoPayload}, "a key to guess": {standAlone(short), ForVolumeKey, nil},
		"foreign": {standAlone(foreignPayload()), ForPassphrase, nil}, "chosen": {standAlone(chosen), ForPassphrase, nil},
	} {
		if s, err := SealSheet(c.o, c.payload, packetPassphrase); s != nil || err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func message(n int) []byte {
	data := make([]byte, n)
	random := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	return data
}

func TestLines(t *testing.T) {
	for n := range MaxLineBytes + 1 {
		want := message(n)
		lines := Lines(want)
		if last := lines[len(lines)-1]; len(last) >= len("01 ")+lineSize+10+lineCheck {
			t.Fatalf("%d bytes: the last line is not shorter: %q", n, last)
		}
		got, err := ParseLines([]byte(strings.Join(lines, "\n")))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if n < 40 {
			continue
		}
		if got, err := ParseLines([]byte("QR-Code:" + QRText(want) + "\n")); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, scanned: %v", n, err)
		}
	}
	if Lines(make([]byte, MaxLineBytes+1)) != nil {
		t.Error("more than 99 lines")
	}
}

func TestLinesAsPeopleTypeThem(t *testing.T) {
	want := message(391)
	lines := Lines(want)
	if !strings.HasPrefix(lines[0], "01 ") || len(lines) != 16 {
		t.Fatalf("%q", lines)
	}
	turned := slices.Clone(lines)
	slices.Reverse(turned)
	each := func(f func(string) string) []string {
		var out []string
		for _, line := range lines {
			out = append(out, f(line))
		}
		return out
	}
	digits := strings.NewReplacer("O", "0", "I", "1", "B", "8")
	around := append([]string{
		"Recovery sheet of alice-laptop", "1. Start the machine.", "2 Wait for the prompt", "01", "2026-01-02 03:04",
		"10 characters are not enough", testUUID, "", "key ID 0011 2233",
	}, lines...)
	for name, typed := range map[string][]string{
		"as printed": lines, "other order": turned, "among text": append(around, "16. Call the helpdesk", "page 1 of 1"),
		"small":         each(strings.ToLower),
		"no spaces":     each(func(l string) string { return strings.ReplaceAll(l, " ", "") }),
		"two words":     each(func(l string) string { return l[:2] + "   " + strings.ReplaceAll(l[2:], " ", "") + "\r" }),
		"tabs":          each(func(l string) string { return "\t" + strings.ReplaceAll(l, " ", "\t") }),
		"digits":        each(func(l string) string { return l[:3] + digits.Replace(l[3:]) }),
		"no zero":       each(func(l string) string { return strings.TrimPrefix(l, "0") }),
		"letters as 01": append([]string{"OI" + lines[0][2:], "L0" + lines[9][2:]}, append(slices.Clone(lines[1:9]), lines[10:]...)...),
	} {
		got, err := ParseLines([]byte(strings.Join(typed, "\n")))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// wantLine wants an error that names a line.
func wantLine(t *testing.T, lines []string, number int, why string) {
	t.Helper()
	got, err := ParseLines([]byte(strings.Join(lines, "\n")))
	var bad *LineError
	if got != nil || !errors.As(err, &bad) || bad.Line != number || !strings.Contains(bad.Error(), why) ||
		!errors.Is(err, ErrLine) || !errors.Is(err, ErrIntegrity) {
		t.Fatalf("%v; want line %d %s", err, number, why)
	}
}

func TestEveryWrongCharacterIsNamed(t *testing.T) {
	lines := Lines(message(91))
	for i, line := range lines {
		for at := 3; at < len(line); at++ {
			for _, c := range alphabet {
				if wrong := line[:at] + string(c) + line[at+1:]; line[at] != ' ' && line[at] != byte(c) {
					wantLine(t, append(append(slices.Clone(lines[:i]), wrong), lines[i+1:]...), i+1, "mistyped")
				}
			}
			for other := at + 1; other < len(line); other++ {
				swapped := []byte(line)
				swapped[at], swapped[other] = swapped[other], swapped[at]
				if line[at] != ' ' && line[other] != ' ' && line[at] != line[other] && other < len(line)-lineCheck {
					wantLine(t, append(append(slices.Clone(lines[:i]), string(swapped)), lines[i+1:]...), i+1, "mistyped")
				}
			}
		}
	}
}

func TestLinesMissingAndTwice(t *testing.T) {
	for _, n := range []int{91, 100} { // the last line of 100 bytes is an empty one
		lines := Lines(message(n))
		for i := range lines {
			without := append(slices.Clone(lines[:i]), lines[i+1:]...)
			wantLine(t, without, i+1, "missing")
			wantLine(t, append(slices.Clone(lines), lines[i]), i+1, "twice")
			for number := range maxLines {
				if number != i+1 {
					other := fmt.Sprintf("%02d%s", number, lines[i][2:])
					wantLine(t, append(slices.Clone(without), other), i+1, "missing")
				}
			}
		}
	}
	if got, err := ParseLines([]byte("nothing\n")); got != nil || !errors.Is(err, ErrLine) {
		t.Errorf("no line: %v", err)
	}
}
