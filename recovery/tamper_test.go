package recovery

import (
	"bytes"
	"errors"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/seal"
)

// every calls try with each change of one bit of each byte, and each
// truncation of data.
func every(data []byte, bits []byte, try func(what string, at int, changed []byte)) {
	for i := range data {
		for _, bit := range bits {
			changed := bytes.Clone(data)
			changed[i] ^= bit
			try("flipped", i, changed)
		}
		try("cut", i, data[:i])
	}
}

func TestEveryFlipAndTruncationOfARequest(t *testing.T) {
	signed := must(fixedRequest().Sign(keys().requester))
	every(signed, []byte{1, 0x20, 0x80}, func(what string, at int, changed []byte) {
		if r, err := ParseRequest(changed); !errors.Is(err, ErrRequest) || r != nil {
			t.Errorf("%s at %d of %d: %v", what, at, len(signed), err)
		}
	})
}

func TestEveryFlipAndTruncationOfAnApproval(t *testing.T) {
	share := []byte("a re-sealed share, which is opaque here")
	request := [32]byte{5}
	signed := must(approvalOf(request, share).Sign(keys().approver))
	every(signed, []byte{1, 0x20, 0x80}, func(what string, at int, changed []byte) {
		if a, err := ParseApproval(changed, request, share); !errors.Is(err, ErrApproval) || a != nil {
			t.Errorf("%s at %d of %d: %v", what, at, len(signed), err)
		}
	})
	every(share, []byte{1, 0x80}, func(what string, at int, changed []byte) {
		if _, err := ParseApproval(signed, request, changed); !errors.Is(err, ErrApproval) {
			t.Errorf("share %s at %d: %v", what, at, err)
		}
	})
	if _, err := ParseApproval(signed, request, make([]byte, MaxShare+1)); !errors.Is(err, ErrApproval) {
		t.Errorf("huge share: %v", err)
	}
}

// Bits of an OpenPGP message that mean nothing (the key ID that a session key
// packet names is a hint) may be flipped; what opens then are the same bytes.
func TestEveryFlipAndTruncationOfAResealedShare(t *testing.T) {
	p := testPacket("laptop7")
	request := requestFor(p, escrow.ForPassphrase, idA)
	digest := Digest(must(request.Sign(keys().requester)))
	share := openShare(t, p, escrow.ForPassphrase)
	want := must(share.Bytes())
	message := must(Reseal(share, &request, digest, now))
	harmless := 0
	every(message, []byte{1}, func(what string, at int, changed []byte) {
		got, err := OpenResealed(changed, keys().oneOff, digest)
		switch {
		case err == nil && what == "flipped" && bytes.Equal(must(got.Bytes()), want):
			harmless++
		case !errors.Is(err, ErrShare):
			t.Errorf("%s at %d of %d: %v", what, at, len(message), err)
		}
	})
	if harmless > 16 {
		t.Errorf("%d bytes of %d mean nothing", harmless, len(message))
	}
}

// What is inside is judged too: whoever knows the public one-off key can seal
// anything to it.
func TestResealedShareOfOtherContent(t *testing.T) {
	p := testPacket("laptop7")
	request := requestFor(p, escrow.ForPassphrase, idA)
	digest := Digest(must(request.Sign(keys().requester)))
	body := must(openShare(t, p, escrow.ForPassphrase).Bytes())
	for name, plain := range map[string][]byte{
		"nothing":          nil,
		"the share alone":  body,
		"no share":         []byte("mandos-escrow-resealed-share: 1\nrequest-sha256: " + hexOf(digest) + "\n"),
		"another kind":     []byte("mandos-escrow-request: 1\nrequest-sha256: " + hexOf(digest) + "\n" + string(body)),
		"another request":  []byte("mandos-escrow-resealed-share: 1\nrequest-sha256: " + hexOf([32]byte{}) + "\n" + string(body)),
		"a line in excess": []byte("mandos-escrow-resealed-share: 1\nrequest-sha256: " + hexOf(digest) + "\n" + string(body) + "x: y\n"),
	} {
		message := must(seal.Encrypt(plain, keys().oneOff.Public(), nil, now))
		if share, err := OpenResealed(message, keys().oneOff, digest); err == nil {
			t.Errorf("%s: opened to %v", name, share)
		} else if !errors.Is(err, ErrShare) {
			t.Errorf("%s: %v is not ErrShare", name, err)
		}
	}
}
