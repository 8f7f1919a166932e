package recovery

import (
	"crypto/sha256"
	"fmt"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

const (
	approvalKind = "mandos-escrow-approval"
	maxApproval  = 4 << 10
	resealedKind = "mandos-escrow-resealed-share"
	maxResealed  = 32 << 10

	// MaxShare bounds a re-sealed share, in bytes.
	MaxShare = 64 << 10
)

// Approval is one approver's signed word that a share may go to the key of one
// request, and to nothing else.
type Approval struct {
	RequestDigest [32]byte
	Trustee       string   // fingerprint of the key that opened the share
	ShareDigest   [32]byte // of the re-sealed share
	Approver      string
	ApproverID    identity.KeyID
	Created       time.Time
}

// Sign returns the approval's bytes, signed by the approver.
func (a Approval) Sign(by *identity.Key) ([]byte, error) {
	w := record.New(approvalKind, 1).
		Hex("request-sha256", a.RequestDigest[:]).
		Text("trustee", a.Trustee).
		Hex("share-sha256", a.ShareDigest[:]).
		Text("approver", a.Approver).
		Text("approver-key-id", string(a.ApproverID)).
		Time("created", a.Created)
	data, err := signRecord(w, "approval", by)
	if err != nil {
		return nil, fmt.Errorf("recovery: sign approval: %w", err)
	}
	return data, nil
}

// ParseApproval reads a signed approval and checks that it is about this
// request and this re-sealed share.
func ParseApproval(data []byte, request [32]byte, share []byte) (*Approval, error) {
	in := record.Parse(data, approvalKind, 1, maxApproval)
	a := &Approval{
		RequestDigest: digestField(in, "request-sha256"),
		Trustee:       in.Text("trustee"),
		ShareDigest:   digestField(in, "share-sha256"),
		Approver:      in.Text("approver"),
		ApproverID:    identity.KeyID(in.Text("approver-key-id")),
		Created:       in.Time("created"),
	}
	signer, err := verifyRecord(in, data, "approval")
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrApproval, err)
	case len(share) > MaxShare:
		return nil, fmt.Errorf("%w: the share beside it is longer than %d bytes", ErrApproval, MaxShare)
	case signer.KeyID() != a.ApproverID:
		return nil, fmt.Errorf("%w: signed by %s, approver is %s", ErrApproval, signer.KeyID().Short(), a.ApproverID.Short())
	case a.RequestDigest != request:
		return nil, fmt.Errorf("%w: it approves another request", ErrApproval)
	case a.ShareDigest != sha256.Sum256(share):
		return nil, fmt.Errorf("%w: the share beside it is another one", ErrApproval)
	}
	return a, nil
}

// Reseal seals an opened share to a request's one-off key, with the request's
// digest inside: it serves this request and no other.
func Reseal(share *escrow.Share, request *Request, digest [32]byte, now time.Time) ([]byte, error) {
	body, err := share.Bytes()
	if err != nil {
		return nil, err
	}
	defer clear(body)
	w := record.New(resealedKind, 1).Hex("request-sha256", digest[:]).Raw(body)
	defer w.Wipe()
	plain, err := w.Bytes()
	if err != nil {
		return nil, fmt.Errorf("recovery: re-seal share: %w", err)
	}
	return seal.Encrypt(plain, request.Recipient, nil, now)
}

// OpenResealed opens a re-sealed share with the request's one-off key.
func OpenResealed(message []byte, oneOff *seal.PrivateKey, digest [32]byte) (*escrow.Share, error) {
	plain, err := seal.Decrypt(message, oneOff, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrShare, err)
	}
	defer clear(plain)
	in := record.Parse(plain, resealedKind, 1, maxResealed)
	of := digestField(in, "request-sha256")
	if err := in.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrShare, err)
	}
	if of != digest {
		return nil, fmt.Errorf("%w: it was re-sealed for another request", ErrShare)
	}
	share, err := escrow.ParseShare(in.Rest())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrShare, err)
	}
	return share, nil
}
