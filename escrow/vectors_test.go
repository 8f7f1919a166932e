package escrow

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// A vector is one file: lines `name: value` up to an empty line, then the
// bytes. Names:
//
//	kind     packet, policy, share, payload (a plaintext: of a payload, a
//	         stand-alone packet, a sheet), certificate (a packet to one, opened
//	         with the test key of that name), lines (typed, of any bytes)
//	expect   a name of expectations
//	open     of a packet: also open this payload, by these shares, with the
//	         test keys, as in "passphrase 1 3"; of a certificate: the key
type vector struct {
	kind, expect, open string
	data               []byte
}

var expectations = map[string]error{
	"ok": nil, "malformed": record.ErrFormat, "signature": identity.ErrSignature, "signer": identity.ErrKey,
	"policy": ErrPolicy, "integrity": ErrIntegrity,
	"corrupt share": ErrCorruptShare, "foreign share": ErrForeignShare,
	"too few": ErrTooFew, "commitment": ErrCommitment,
	"other key": ErrOtherKey, "line": ErrLine,
}

func (v vector) encode() []byte {
	text := "kind: " + v.kind + "\nexpect: " + v.expect + "\n"
	if v.open != "" {
		text += "open: " + v.open + "\n"
	}
	return append([]byte(text+"\n"), v.data...)
}

func parseVector(file []byte) (vector, error) {
	head, data, found := bytes.Cut(file, []byte("\n\n"))
	v := vector{data: data}
	if !found {
		return v, errors.New("no empty line")
	}
	for line := range strings.Lines(string(head)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "kind":
			v.kind = value
		case "expect":
			v.expect = value
		case "open":
			v.open = value
		default:
			return v, fmt.Errorf("line %q", line)
		}
	}
	return v, nil
}

func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	files, err := filepath.Glob("testdata/vectors/*")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d vectors, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			v, err := parseVector(data)
			if err != nil {
				t.Fatal(err)
			}
			want, known := expectations[v.expect]
			if !known {
				t.Fatalf("expect: %q", v.expect)
			}
			if err := v.run(t); !errors.Is(err, want) || want != nil && err == nil {
				t.Errorf("%v, want %v", err, want)
			} else if want == nil && err != nil {
				t.Error(err)
			}
		})
	}
}

// run reads the vector; what is read well is encoded again, and must be equal.
func (v vector) run(t *testing.T) error {
	var again []byte
	var err error
	switch v.kind {
	case "packet":
		var p *Packet
		if p, err = Parse(v.data); err != nil {
			return err
		}
		if v.open != "" {
			return openVector(p, v.open)
		}
		signature := v.data[bytes.LastIndex(v.data, []byte("\nsignature: "))+1:]
		again = append(must(p.encode(nil)), signature...)
	case "policy":
		var p Policy
		p, err = ParsePolicy(v.data)
		again = p.Bytes()
	case "share":
		var s *Share
		if s, err = ParseShare(v.data); err == nil {
			again = must(s.Bytes())
		}
	case "payload":
		_, err = parsePlain(bytes.Clone(v.data)) // it compares by itself
		again = v.data
	case "certificate":
		var s *sealedCertificate
		if s, _, err = parseCertificate(v.data); err != nil {
			return err
		}
		again = must(s.encode())
		_, err = OpenCertificate(v.data, testHolder(v.open).key)
	case "lines":
		_, err = ParseLines(v.data)
		again = v.data
	default:
		t.Fatalf("kind: %q", v.kind)
	}
	if err == nil && !bytes.Equal(again, v.data) {
		t.Error("encoded again it differs")
	}
	return err
}

func openVector(p *Packet, how string) error {
	words := strings.Fields(how)
	keys := newFixture(1, 5).keys
	var shares []*Share
	for _, word := range words[1:] {
		index, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		fingerprint := p.Trustees[index-1]
		_, message, err := p.Share(words[0], fingerprint)
		if err != nil {
			return err
		}
		s, err := OpenShare(message, keys[fingerprint], p, words[0])
		if err != nil {
			return err
		}
		shares = append(shares, s)
	}
	_, err := p.Open(words[0], shares)
	return err
}
