package recovery

import (
	"bytes"
	"errors"
	"testing"

	"mandos-escrow/escrow"
)

// Whatever is read is whole: signed again it would be the same bytes, but for
// the signature of a key that the fuzzer does not have.
func FuzzParseRequest(f *testing.F) {
	for _, v := range makeVectors() {
		if v.input == "request" {
			f.Add(v.data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRequest(data)
		if err != nil {
			if !errors.Is(err, ErrRequest) || r != nil {
				t.Fatalf("%v, %v", r, err)
			}
			return
		}
		if again, err := r.Sign(keys().requester); err == nil && !bytes.Equal(again, data) {
			t.Fatalf("another spelling was read:\n%q\n%q", data, again)
		}
	})
}

func FuzzParseApproval(f *testing.F) {
	for _, v := range makeVectors() {
		if v.input == "approval" {
			f.Add(v.data, v.request[:], v.share)
		}
	}
	f.Fuzz(func(t *testing.T, data, request, share []byte) {
		var digest [32]byte
		copy(digest[:], request)
		a, err := ParseApproval(data, digest, share)
		if err != nil && (!errors.Is(err, ErrApproval) || a != nil) {
			t.Fatalf("%v, %v", a, err)
		}
		if err == nil && a.RequestDigest != digest {
			t.Fatal("it is about another request")
		}
	})
}

func FuzzOpenResealed(f *testing.F) {
	p := testPacket("laptop7")
	request := requestFor(p, escrow.ForPassphrase, idA)
	digest := Digest(must(request.Sign(keys().requester)))
	share := openShare(f, p, escrow.ForPassphrase)
	want := must(share.Bytes())
	f.Add(must(Reseal(share, &request, digest, now)))
	f.Fuzz(func(t *testing.T, message []byte) {
		got, err := OpenResealed(message, keys().oneOff, digest)
		if err != nil && !errors.Is(err, ErrShare) {
			t.Fatal(err)
		}
		if err == nil && !bytes.Equal(must(got.Bytes()), want) {
			t.Fatal("a share that nobody re-sealed")
		}
	})
}

func FuzzCheckWords(f *testing.F) {
	f.Add("abandon abandon abandon abandon abandon abandon")
	f.Add("ABANDON-abandon, abandon\nabandon\tabandon abandon.")
	f.Fuzz(func(t *testing.T, typed string) {
		if err := CheckWords(typed, [32]byte{0xff}); err == nil && CheckWords(typed, [32]byte{}) == nil {
			t.Fatalf("%q fits two requests", typed)
		}
	})
}
