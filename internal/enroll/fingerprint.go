package enroll

import (
	"errors"
	"fmt"
	"io"
	"os"

	"mandos-escrow/escrow"
	"mandos-escrow/luks/content"
)

// Geometry is where a packet says that the data of its volume are.
func Geometry(p *escrow.VolumeKeyPayload) content.Geometry {
	return content.Geometry{Cipher: p.Cipher, Offset: p.DataOffset, SectorSize: p.SectorSize}
}

var errBlank = errors.New("nothing was written yet where data would be known by it")

// AddFingerprint adds to a payload what the data on a device will be known by, when its header is gone. Without is why there
// is none: a cipher that is not known here, a volume without room for data, or without data.
func AddFingerprint(p *escrow.VolumeKeyPayload, device string) (without, err error) {
	f, err := os.Open(device)
	if err != nil {
		return nil, fmt.Errorf("fingerprint of the data: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("fingerprint of the data: size of %s: %w", device, err)
	}
	p.Fingerprint, err = content.Fingerprint(f, size, Geometry(p), p.Key)
	if errors.Is(err, content.ErrCipher) || errors.Is(err, content.ErrGeometry) {
		return err, nil
	}
	if err == nil && len(p.Fingerprint) == 0 {
		return errBlank, nil
	}
	return nil, err
}
