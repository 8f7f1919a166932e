package recovery

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// A vector is one input and what becomes of it: `ok`, or a part of the error's
// text. A request is followed by its words; an approval is judged for the
// request digest and the share that stand in its head.
type vector struct {
	input, expect, words string
	request              [32]byte
	share, data          []byte
}

func (v vector) bytes() []byte {
	return append(fmt.Appendf(nil, "input: %s\nexpect: %s\nwords: %s\nrequest: %x\nshare: %x\n\n", v.input, v.expect, v.words, v.request, v.share), v.data...)
}

func parseVector(t *testing.T, file []byte) (v vector) {
	t.Helper()
	head, data, found := bytes.Cut(file, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	if !found || len(lines) != 5 {
		t.Fatalf("head %q", head)
	}
	value := func(i int, name string) string {
		text, ok := strings.CutPrefix(lines[i], name+": ")
		if !ok {
			t.Fatalf("line %q is not %s", lines[i], name)
		}
		return text
	}
	v = vector{input: value(0, "input"), expect: value(1, "expect"), words: value(2, "words"), data: data}
	copy(v.request[:], must(hex.DecodeString(value(3, "request"))))
	v.share = must(hex.DecodeString(value(4, "share")))
	return v
}

// fixedRequest has no packet behind it, so that its bytes never change.
func fixedRequest() Request {
	return Request{
		ID: idA, PacketID: idB, PacketDigest: [32]byte{1}, HeaderDigest: [32]byte{2}, Payload: escrow.ForPassphrase, PayloadDigest: [32]byte{3},
		VolumeUUID: testUUID, Machine: "laptop7", Requester: "bob", RequesterID: keys().requester.KeyID(), Reason: "forgot it",
		Created: now, Expires: now.Add(Lifetime), Recipient: keys().oneOff.Public(),
	}
}

// resign replaces the first old in a signed record, and signs it again.
func resign(signed []byte, context, old, replacement string, by *identity.Key) []byte {
	body := signed[:bytes.Index(signed, []byte("signature: "))]
	if !bytes.Contains(body, []byte(old)) {
		panic("no " + old)
	}
	body = bytes.Replace(body, []byte(old), []byte(replacement), 1)
	var w record.Writer
	return bytes.Clone(must(w.Raw(body).Base64("signature", by.Sign(context, body)).Bytes()))
}

func makeVectors() map[string]vector {
	k, v := keys(), map[string]vector{}
	request := must(fixedRequest().Sign(k.requester))
	req := func(name, expect string, data []byte) {
		v["request-"+name] = vector{input: "request", expect: expect, data: data}
	}
	changed := func(name, expect, old, replacement string) {
		req(name, expect, resign(request, "request", old, replacement, k.requester))
	}
	v["request-ok"] = vector{input: "request", expect: "ok", words: Words(Digest(request)), data: request}
	longest := fixedRequest()
	longest.Reason, longest.Payload, longest.Expires = strings.Repeat("ä", MaxReason/2), escrow.ForVolumeKey, now.Add(MaxLifetime)
	data := must(longest.Sign(k.requester))
	v["request-ok-longest"] = vector{input: "request", expect: "ok", words: Words(Digest(data)), data: data}

	req("empty", "its last line has no end", nil)
	req("cut", "lacks field signature", request[:bytes.Index(request, []byte("signature: "))])
	req("after-signature", "goes on after its last field", append(bytes.Clone(request), "more: x\n"...))
	req("crlf", "control character", bytes.ReplaceAll(request, []byte("\n"), []byte("\r\n")))
	req("not-signed-again", "signature is not by this key", bytes.Replace(request, []byte("forgot it"), []byte("forgot It"), 1))
	req("other-context", "signature is not by this key", resign(request, "approval", "forgot it", "forgot it", k.requester))
	req("other-signer", "requester is", resignAs(request, k.requester, k.approver))
	changed("version-2", "has version 2", "request: 1\n", "request: 2\n")
	changed("id-short", "not 16 bytes", "id: 0001", "id: 01")
	changed("id-upper-case", "not 16 bytes", "0a0b", "0A0b")
	changed("no-packet", "lacks field packet", "packet: "+idB+"\n", "")
	changed("digest-short", "not 32 bytes", "packet-sha256: 01", "packet-sha256: ")
	changed("reason-empty", "empty value", "reason: forgot it", "reason: ")
	changed("reason-control", "control character", "forgot it", "forgot\x1b[2Jit")
	changed("reason-bidi", "control character", "forgot it", "forgot \u202eit")
	changed("reason-long", "reason is longer", "forgot it", strings.Repeat("x", MaxReason+1))
	changed("order-of-fields", "lacks field machine-name", "machine-name: laptop7\nrequester: bob\n", "requester: bob\nmachine-name: laptop7\n")
	changed("created-fraction", "not a time", "created: 2026-01-02T03:04:05Z", "created: 2026-01-02T03:04:05.0Z")
	changed("created-offset", "not a time", "created: 2026-01-02T03:04:05Z", "created: 2026-01-02T03:04:05+00:00")
	changed("expires-at-once", "lives from", "expires: 2026-01-03", "expires: 2026-01-02")
	changed("expires-before", "lives from", "expires: 2026-01-03", "expires: 2025-01-03")
	changed("expires-late", "at most", "expires: 2026-01-03", "expires: 2026-01-10")
	changed("recipient-other", "is not the key that recipient names", k.oneOff.Public().Fingerprint(), k.other.Public().Fingerprint())
	changed("recipient-no-key", "not a usable OpenPGP key", "recipient-key: LS0t", "recipient-key: AAAA")
	changed("signer-no-key", "not a usable key", "signer: MCow", "signer: MCox")

	share := []byte("a re-sealed share")
	digest := Digest(request)
	approval := must(approvalOf(digest, share).Sign(k.approver))
	app := func(name, expect string, data []byte) {
		v["approval-"+name] = vector{input: "approval", expect: expect, request: digest, share: share, data: data}
	}
	app("ok", "ok", approval)
	app("empty", "its last line has no end", nil)
	app("after-signature", "goes on after its last field", append(bytes.Clone(approval), "more: x\n"...))
	app("not-signed-again", "signature is not by this key", bytes.Replace(approval, []byte("alice"), []byte("alicE"), 1))
	app("other-context", "signature is not by this key", resign(approval, "request", "alice", "alice", k.approver))
	app("other-signer", "approver is", resignAs(approval, k.approver, k.requester))
	app("version-2", "has version 2", resign(approval, "approval", "approval: 1\n", "approval: 2\n", k.approver))
	app("no-trustee", "lacks field trustee", resign(approval, "approval", "trustee: "+k.trustee.Public().Fingerprint()+"\n", "", k.approver))
	app("other-request", "approves another request", must(approvalOf([32]byte{9}, share).Sign(k.approver)))
	app("other-share", "the share beside it is another one", must(approvalOf(digest, []byte("another")).Sign(k.approver)))
	return v
}

// resignAs makes another key the signer, and leaves who it says it is.
func resignAs(signed []byte, from, to *identity.Key) []byte {
	var w record.Writer
	old := bytes.Clone(must(w.Base64("signer", from.Public()).Bytes()))
	var again record.Writer
	replacement := must(again.Base64("signer", to.Public()).Bytes())
	context := "request"
	if bytes.HasPrefix(signed, []byte(approvalKind)) {
		context = "approval"
	}
	return resign(signed, context, string(old), string(replacement), to)
}

func TestVectors(t *testing.T) {
	dir := filepath.Join("testdata", "vectors")
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, v := range makeVectors() {
			if err := os.WriteFile(filepath.Join(dir, name), v.bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != len(makeVectors()) {
		t.Fatalf("%d vectors in %s, want %d: %v", len(files), dir, len(makeVectors()), err)
	}
	for _, f := range files {
		t.Run(f.Name(), func(t *testing.T) {
			v := parseVector(t, must(os.ReadFile(filepath.Join(dir, f.Name()))))
			named := ErrRequest
			var again []byte
			var err error
			if v.input == "request" {
				var r *Request
				if r, err = ParseRequest(v.data); err == nil {
					again, err = r.Sign(keys().requester)
				}
			} else {
				named = ErrApproval
				var a *Approval
				if a, err = ParseApproval(v.data, v.request, v.share); err == nil {
					again, err = a.Sign(keys().approver)
				}
			}
			switch {
			case v.expect == "ok" && (err != nil || !bytes.Equal(again, v.data)):
				t.Errorf("read and signed again: %v\n%s", err, again)
			case v.expect == "ok" && v.words != "" && CheckWords(v.words, Digest(v.data)) != nil:
				t.Errorf("words are %s", Words(Digest(v.data)))
			case v.expect != "ok" && (!errors.Is(err, named) || !strings.Contains(err.Error(), v.expect)):
				t.Errorf("error %v, want %q", err, v.expect)
			}
		})
	}
}

// Ed25519 signatures and the armor of a key are deterministic, so the vectors
// are exactly what today's code writes.
func TestVectorsAreWhatIsWritten(t *testing.T) {
	for name, v := range makeVectors() {
		file, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
		if err != nil || !bytes.Equal(file, v.bytes()) {
			t.Errorf("%s: %v, or other bytes", name, err)
		}
	}
}

func TestSignRefusesWhatItCouldNotRead(t *testing.T) {
	for name, change := range map[string]func(*Request){
		"no reason":         func(r *Request) { r.Reason = "" },
		"reason two lines":  func(r *Request) { r.Reason = "a\nsignature: b" },
		"reason too long":   func(r *Request) { r.Reason = strings.Repeat("x", MaxReason+1) },
		"lives too long":    func(r *Request) { r.Expires = now.Add(MaxLifetime + time.Second) },
		"lives not at all":  func(r *Request) { r.Expires = now },
		"other's request":   func(r *Request) { r.RequesterID = keys().approver.KeyID() },
		"id is no id":       func(r *Request) { r.ID = "../../x" },
		"packet is no id":   func(r *Request) { r.PacketID = "" },
		"name with a space": func(r *Request) { r.Requester = " bob" },
	} {
		r := fixedRequest()
		change(&r)
		if data, err := r.Sign(keys().requester); err == nil {
			t.Errorf("%s: signed %q", name, data)
		}
	}
}
