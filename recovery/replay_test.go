package recovery

import (
	"encoding/hex"
	"errors"
	"testing"

	"mandos-escrow/escrow"
)

func hexOf(digest [32]byte) string { return hex.EncodeToString(digest[:]) }

// collect does what a requester's command does with a release.
func collect(p *escrow.Packet, signed []byte, approval, resealed []byte) (*escrow.Opened, error) {
	request := must(ParseRequest(signed))
	digest := Digest(signed)
	if _, err := ParseApproval(approval, digest, resealed); err != nil {
		return nil, err
	}
	share, err := OpenResealed(resealed, keys().oneOff, digest)
	if err != nil {
		return nil, err
	}
	return p.Open(request.Payload, []*escrow.Share{share})
}

func TestReleaseOpens(t *testing.T) {
	p := testPacket("laptop7")
	for _, payload := range []string{escrow.ForPassphrase, escrow.ForVolumeKey} {
		signed := must(requestFor(p, payload, idA).Sign(keys().requester))
		approval, resealed := approve(t, openShare(t, p, payload), signed)
		opened, err := collect(p, signed, approval, resealed)
		if err != nil {
			t.Fatal(err)
		}
		if (opened.Passphrase != nil) != (payload == escrow.ForPassphrase) || (opened.VolumeKey != nil) != (payload == escrow.ForVolumeKey) {
			t.Errorf("%s opened to %+v", payload, opened)
		}
	}
}

// Nothing that was approved for one thing serves another: an approval, its
// share, and the two mixed, for another request, packet or payload.
func TestReplayMatrix(t *testing.T) {
	p, otherPacket := testPacket("laptop7"), testPacket("laptop8")
	type granted struct{ signed, approval, resealed []byte }
	grant := func(p *escrow.Packet, payload, id string) granted {
		signed := must(requestFor(p, payload, id).Sign(keys().requester))
		approval, resealed := approve(t, openShare(t, p, payload), signed)
		return granted{signed, approval, resealed}
	}
	mine := grant(p, escrow.ForPassphrase, idA)
	for name, other := range map[string]granted{
		"another request for the same": grant(p, escrow.ForPassphrase, idB),
		"another payload":              grant(p, escrow.ForVolumeKey, idA),
		"another packet":               grant(otherPacket, escrow.ForPassphrase, idA),
	} {
		t.Run(name, func(t *testing.T) {
			refused := func(what string, named error, approval, resealed []byte) {
				t.Helper()
				if opened, err := collect(p, mine.signed, approval, resealed); !errors.Is(err, named) {
					t.Errorf("%s: %v, %v", what, opened, err)
				}
			}
			refused("its approval and share", ErrApproval, other.approval, other.resealed)
			refused("its approval with our share", ErrApproval, other.approval, mine.resealed)
			refused("our approval with its share", ErrApproval, mine.approval, other.resealed)
			// an approver who approves what was re-sealed for the other one
			digest := Digest(mine.signed)
			refused("its share under an approval of ours", ErrShare, must(approvalOf(digest, other.resealed).Sign(keys().approver)), other.resealed)
		})
	}
}

// An approver who re-seals a share of another packet or payload for this very
// request gets through to the packet, which names the share.
func TestForeignShareForThisRequest(t *testing.T) {
	p, otherPacket := testPacket("laptop7"), testPacket("laptop8")
	signed := must(requestFor(p, escrow.ForPassphrase, idA).Sign(keys().requester))
	for name, share := range map[string]*escrow.Share{
		"another packet":  openShare(t, otherPacket, escrow.ForPassphrase),
		"another payload": openShare(t, p, escrow.ForVolumeKey),
	} {
		approval, resealed := approve(t, share, signed)
		opened, err := collect(p, signed, approval, resealed)
		var named *escrow.ShareError
		if !errors.As(err, &named) || !errors.Is(err, escrow.ErrForeignShare) || named.Trustee != keys().trustee.Public().Fingerprint() {
			t.Errorf("%s: %v, %v", name, opened, err)
		}
	}
}

// Another one-off key opens nothing.
func TestOnlyTheOneOffKeyOpens(t *testing.T) {
	p := testPacket("laptop7")
	signed := must(requestFor(p, escrow.ForPassphrase, idA).Sign(keys().requester))
	_, resealed := approve(t, openShare(t, p, escrow.ForPassphrase), signed)
	for name, key := range map[string]int{"another one-off key": 0, "the trustee's": 1} {
		opener := keys().other
		if key == 1 {
			opener = keys().trustee
		}
		if share, err := OpenResealed(resealed, opener, Digest(signed)); !errors.Is(err, ErrShare) {
			t.Errorf("%s: %v, %v", name, share, err)
		}
	}
}
