package initrd

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"mandos-escrow/unlock"
)

// FuzzAsk: questions come from the image's own programs, but lie in a folder.
func FuzzAsk(f *testing.F) {
	f.Add([]byte("[Ask]\nPID=1\nSocket=/run/systemd/ask-password/sck.1\nNotAfter=0\nId=cryptsetup:/dev/vda3\n"))
	f.Add([]byte("[Ask]\nSocket=x\nId=cryptsetup:\\303\\244\\x\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		a, err := parseAsk(text)
		if (err == nil) != (a.device != "" && a.socket != "") || a.pid < 0 {
			t.Errorf("%+v, %v", a, err)
		}
	})
}

// FuzzTable: what the kernel says of a mapping is compared, or refused; no
// other target passes for the enrolled one, and no key is shown.
func FuzzTable(f *testing.F) {
	v := unlock.Volume{Cipher: "aes-xts-plain64", KeyBits: 512, Offset: 16 << 20, SectorSize: 512}
	good := reply(target{0, "crypt", []byte("aes-xts-plain64 " + hexKey + " 0 8:3 32768 1 allow_discards")})
	f.Add(good, uint32(1))
	f.Add(good[:50], uint32(2))
	f.Fuzz(func(t *testing.T, data []byte, count uint32) {
		targets, err := parseTargets(data, count)
		if err != nil {
			return
		}
		if len(targets) != int(count) {
			t.Errorf("%d targets of %d", len(targets), count)
		}
		for _, target := range targets {
			_, err := compareTable(target.params, v)
			if err != nil && !errors.Is(err, ErrMismatch) {
				t.Errorf("%v", err)
			}
			fields := bytes.Fields(target.params)
			if err == nil && (string(fields[0]) != v.Cipher || string(fields[4]) != "32768") {
				t.Errorf("%q passes", target.params)
			}
			if len(fields) > 1 {
				fields[1] = []byte(hexKey)
			}
			if _, err := compareTable(bytes.Join(fields, []byte(" ")), v); err != nil && strings.Contains(err.Error(), hexKey) {
				t.Errorf("shows the key: %v", err)
			}
		}
	})
}

// FuzzReport: what is read is written again as it was.
func FuzzReport(f *testing.F) {
	f.Add([]byte(reportText))
	f.Add([]byte(releaseText))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := ParseReport(data); err == nil {
			if again, err := r.Bytes(); err != nil || !bytes.Equal(again, data) {
				t.Errorf("%q, %v", again, err)
			}
		}
		if r, err := ParseRelease(data); err == nil {
			if again, err := r.Bytes(); err != nil || !bytes.Equal(again, data) {
				t.Errorf("%q, %v", again, err)
			}
		}
	})
}
