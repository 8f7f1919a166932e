package unlock

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"mandos-escrow/internal/record"
)

// Protocol is the ALPN name of the boot protocol (docs/unlock-protocol.md).
const Protocol = "mandos-escrow-boot/1"

// Limits of the protocol, in bytes where nothing else is said.
const (
	MaxRequest = 1 << 10
	MaxReply   = 256 << 10
	MaxBlobs   = 16 // in a reply: one for each volume
	MaxBlob    = 8 << 10

	frameHeader = 4
	idSize      = 16
)

// ErrProtocol is wrapped by every error about bytes that the other end sent.
var ErrProtocol = errors.New("the other end does not keep to the protocol")

const (
	requestKind = "mandos-escrow-boot"
	replyKind   = "mandos-escrow-boot-reply"
	released    = "released"
	refused     = "refused"
)

// Request asks for the machine's blobs. Attempt is a random ID of 32 hex
// digits, the same for all servers that are asked at once.
type Request struct{ Attempt string }

// Bytes returns the request's record.
func (r Request) Bytes() ([]byte, error) {
	return record.New(requestKind, 1).Text("attempt", r.Attempt).Bytes()
}

// ParseRequest reads what Request.Bytes wrote.
func ParseRequest(data []byte) (Request, error) {
	r := record.Parse(data, requestKind, 1, MaxRequest)
	attempt := r.Hex("attempt", idSize)
	if err := r.End(); err != nil {
		return Request{}, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return Request{Attempt: hex.EncodeToString(attempt)}, nil
}

// Reply is a release, or with Released false a refusal that says nothing else.
type Reply struct {
	Released bool
	Nonce    string   // of this release, 32 hex digits
	Blobs    [][]byte // sealed, one for each volume
}

// Bytes returns the reply's record. All refusals are the same bytes.
func (r Reply) Bytes() ([]byte, error) {
	w := record.New(replyKind, 1)
	if !r.Released {
		return w.Text("result", refused).Bytes()
	}
	if len(r.Blobs) == 0 || len(r.Blobs) > MaxBlobs {
		return nil, fmt.Errorf("unlock: reply with %d blobs; 1 to %d are possible", len(r.Blobs), MaxBlobs)
	}
	w.Text("result", released).Text("nonce", r.Nonce)
	for _, blob := range r.Blobs {
		if len(blob) > MaxBlob {
			return nil, fmt.Errorf("unlock: blob of %d bytes; at most %d are possible", len(blob), MaxBlob)
		}
		w.Base64("blob", blob)
	}
	return w.Bytes()
}

// ParseReply reads what Reply.Bytes wrote.
func ParseReply(data []byte) (Reply, error) {
	r := record.Parse(data, replyKind, 1, MaxReply)
	var reply Reply
	switch result := r.Text("result"); result {
	case released:
		reply = Reply{Released: true, Nonce: hex.EncodeToString(r.Hex("nonce", idSize)), Blobs: parseBlobs(r)}
	case refused:
	default:
		r.Fail("result", "neither released nor refused")
	}
	if err := r.End(); err != nil {
		return Reply{}, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return reply, nil
}

func parseBlobs(r *record.Reader) [][]byte {
	var blobs [][]byte
	for len(blobs) == 0 || r.Next("blob") {
		if len(blobs) == MaxBlobs {
			r.Fail("blob", fmt.Sprintf("more than %d", MaxBlobs))
		}
		blob := r.Base64("blob")
		if len(blob) > MaxBlob {
			r.Fail("blob", fmt.Sprintf("longer than %d bytes", MaxBlob))
		}
		if r.Err() != nil {
			return nil
		}
		blobs = append(blobs, blob)
	}
	return blobs
}

// frame puts a record's length, 4 bytes big-endian, before it.
func frame(data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, frameHeader+len(data)), uint32(len(data))), data...)
}

// readFrame reads one frame of 1 to limit bytes; nothing is allocated for one
// that is too long. started, if not nil, is called when its length is there.
func readFrame(r io.Reader, limit uint32, started func()) ([]byte, error) {
	var head [frameHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("read frame: %w", err)
	}
	if started != nil {
		started()
	}
	length := binary.BigEndian.Uint32(head[:])
	if length == 0 || length > limit {
		return nil, fmt.Errorf("%w: frame of %d bytes; 1 to %d are possible", ErrProtocol, length, limit)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("read frame of %d bytes: %w", length, err)
	}
	return data, nil
}
