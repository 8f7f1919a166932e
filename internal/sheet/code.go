package sheet

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/png"

	"github.com/boombuler/barcode/qr"

	"mandos-escrow/escrow"
)

// module is the side of a code's smallest square, in mm: 0.03 inches, a whole
// number of dots of common printers. A telephone reads 0.6 mm from paper.
const module = 0.762

// dots are the pixels along a module. With one, renderers smear; squares drawn
// as rectangles they round one by one. Either way some scanners then read one
// code and not the next.
const dots = 4

// code is the sealed message as a picture of a QR code of level Q, which survives
// a quarter of its code words being lost. The white around it, four modules, is
// the caller's. size is its side, in modules.
func code(message []byte) (picture []byte, size int, err error) {
	matrix, err := qr.Encode(escrow.QRText(message), qr.Q, qr.AlphaNumeric)
	if err != nil {
		return nil, 0, fmt.Errorf("QR code of %d bytes: %w", len(message), err)
	}
	size = matrix.Bounds().Dx()
	drawn := image.NewPaletted(image.Rect(0, 0, size*dots, size*dots), color.Palette{color.White, color.Black})
	for y := range size * dots {
		for x := range size * dots {
			if matrix.At(x/dots, y/dots) == color.Black {
				drawn.SetColorIndex(x, y, 1)
			}
		}
	}
	var out bytes.Buffer
	if err := png.Encode(&out, drawn); err != nil {
		return nil, 0, fmt.Errorf("QR code of %d bytes: %w", len(message), err)
	}
	return out.Bytes(), size, nil
}
