package escrow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

func addVectors(f *testing.F, kind string) {
	f.Helper()
	files, err := filepath.Glob("testdata/vectors/*")
	if err != nil || len(files) == 0 {
		f.Fatal("no vectors: ", err)
	}
	for _, file := range files {
		v, err := parseVector(must(os.ReadFile(file)))
		if err != nil {
			f.Fatal(err)
		}
		if v.kind == kind {
			f.Add(v.data)
		}
	}
}

func FuzzParsePacket(f *testing.F) {
	addVectors(f, "packet")
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			if p != nil || !named(err) {
				t.Errorf("%v", err)
			}
			return
		}
		header := must(p.Header.encode())
		if !bytes.Equal(header, p.HeaderBytes) || !bytes.HasPrefix(data, header) {
			t.Error("the header is another one when it is encoded again")
		}
	})
}

func FuzzParsePolicy(f *testing.F) {
	addVectors(f, "policy")
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParsePolicy(data)
		if err == nil && !bytes.Equal(p.Bytes(), data) || err != nil && !errors.Is(err, ErrPolicy) {
			t.Errorf("%+v, %v", p, err)
		}
	})
}

func FuzzParseShare(f *testing.F) {
	addVectors(f, "share")
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseShare(data)
		if err != nil {
			if s != nil || !errors.Is(err, ErrIntegrity) {
				t.Errorf("%v", err)
			}
			return
		}
		if !bytes.Equal(must(s.Bytes()), data) {
			t.Error("not canonical")
		}
		if got, err := Combine([]*Part{&s.Part, &s.Part}, commitmentInfo(s.Payload)); err == nil {
			t.Errorf("the same share twice gave %x", got)
		}
	})
}

func FuzzPayload(f *testing.F) {
	addVectors(f, "payload")
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := parsePlain(bytes.Clone(data))
		if err != nil && !errors.Is(err, record.ErrFormat) {
			t.Errorf("%v", err)
		}
		if err == nil && (!bytes.Equal(o.Plain, data) || len(o.payloads()) == 0 || len(o.payloads()) == 2 && o.Header.KeyID != "") {
			t.Errorf("%+v", o)
		}
	})
}

func FuzzParseCertificate(f *testing.F) {
	addVectors(f, "certificate")
	f.Fuzz(func(t *testing.T, data []byte) {
		s, body, err := parseCertificate(data)
		if err != nil {
			if s != nil || !errors.Is(err, record.ErrFormat) {
				t.Errorf("%v", err)
			}
			return
		}
		if !bytes.Equal(must(s.encode()), data) || !bytes.HasPrefix(data, body) || !bytes.HasPrefix(data[len(body):], []byte("mac: ")) {
			t.Error("not canonical")
		}
	})
}

func FuzzParseLines(f *testing.F) {
	addVectors(f, "lines")
	f.Fuzz(func(t *testing.T, data []byte) {
		message, err := ParseLines(data)
		if err != nil {
			var bad *LineError
			if message != nil || !errors.As(err, &bad) || !errors.Is(err, ErrIntegrity) {
				t.Errorf("%v", err)
			}
			return
		}
		if lines := Lines(message); lines != nil {
			if again, err := ParseLines([]byte(strings.Join(lines, "\n"))); err != nil || !bytes.Equal(again, message) {
				t.Errorf("typed again: %v", err)
			}
		}
	})
}

// FuzzSealingOf: it knows what it names, and so the opener does, too.
func FuzzSealingOf(f *testing.F) {
	for _, kind := range []string{"packet", "certificate", "lines", "payload"} {
		addVectors(f, kind)
	}
	f.Add(must(seal.EncryptKey([]byte("plain"), make([]byte, 32), now)))
	f.Add([]byte("-----BEGIN PGP MESSAGE-----\n\nww0ECQMI\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		switch s := SealingOf(data); s {
		case "", ByPassphrase, ByRecipient, ByCertificate, ByTrustees, ByVolumeKey, BySheet:
		default:
			t.Errorf("%q", s)
		}
	})
}
