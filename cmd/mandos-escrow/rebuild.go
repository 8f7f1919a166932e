package main

import (
	"mandos-escrow/escrow"
	"mandos-escrow/luks/content"
)

// geometry is where a packet says that the data are.
func geometry(p *escrow.VolumeKeyPayload) content.Geometry {
	return content.Geometry{Cipher: p.Cipher, Offset: p.DataOffset, SectorSize: p.SectorSize}
}
