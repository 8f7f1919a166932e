package sheet

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"codeberg.org/go-pdf/fpdf"

	"mandos-escrow/escrow"
)

// errRoom: something is longer than the page has room for. Names are cut, so no
// packet can bring this about.
var errRoom = errors.New("does not fit on one page")

// The page, in mm, and its fonts, in points. They are two of those that every
// reader of PDF has, so nothing is embedded; what they lack is escaped.
const (
	pageWidth, pageHeight = 210.0, 297.0
	margin                = 20 * module
	bottom                = pageHeight - 10
	width                 = pageWidth - 2*margin
	codeSide              = 93 * module // QR version 19: 400 bytes
	nameWidth             = 24.0
	sans, mono            = "Helvetica", "Courier"
	small, tiny           = 9.5, 8.0
	groupSize             = 20.0
)

// PDF is the sheet on one page of A4. The same sheet gives the same bytes: dates
// are the packet's.
func (p Page) PDF() ([]byte, error) {
	d := newDrawing(p)
	d.head(p)
	if p.Usable != nil {
		d.usable(p)
	} else {
		d.box(sealedTitle, sealedWarning)
	}
	if err := d.message(p); err != nil {
		return nil, fmt.Errorf("sheet: %w", err)
	}
	d.steps("For the user", p.userSteps())
	d.steps("For the administrator", p.adminSteps())
	if d.y > bottom {
		return nil, fmt.Errorf("sheet: %w: %.0f mm of %.0f", errRoom, d.y, bottom)
	}
	var out bytes.Buffer
	if err := d.pdf.Output(&out); err != nil {
		return nil, fmt.Errorf("sheet: write PDF: %w", err)
	}
	return out.Bytes(), nil
}

// drawing is a page that is written from top to bottom.
type drawing struct {
	pdf *fpdf.Fpdf
	y   float64 // mm from the top: where the next thing stands
}

func newDrawing(p Page) *drawing {
	pdf := fpdf.New("P", "mm", "A4", "")
	pdf.SetCreationDate(p.Created.UTC())
	pdf.SetModificationDate(p.Created.UTC())
	pdf.SetCatalogSort(true)
	pdf.SetProducer("mandos-escrow", false)
	pdf.SetTitle("Recovery sheet "+p.KeyID(), false)
	pdf.SetAutoPageBreak(false, 0)
	pdf.AddPage()
	return &drawing{pdf: pdf, y: margin}
}

// text writes one line with its base at y.
func (d *drawing) text(x, y float64, font, style string, size float64, text string) {
	d.pdf.SetFont(font, style, size)
	d.pdf.Text(x, y, text)
}

// lineHeight is that of text of a size in points, in mm.
func lineHeight(size float64) float64 { return size * 1.25 * 25.4 / 72 }

func (d *drawing) head(p Page) {
	d.text(margin, d.y+7, sans, "B", 20, "Recovery sheet")
	d.text(margin+100, d.y+7, sans, "", small, "key ID")
	d.text(margin+112, d.y+7, mono, "B", 32, p.KeyID())
	d.y += 13
	for _, f := range p.facts() {
		d.fact(f)
	}
	d.y += 2
}

// fact writes a name and its value in at most two lines.
func (d *drawing) fact(f fact) {
	const size = 9.0
	font := sans
	if f.strong > 0 {
		font = mono
	}
	d.text(margin, d.y+lineHeight(size)*0.8, sans, "", small, f.name)
	d.pdf.SetFont(font, "", size)
	x := margin + nameWidth
	for _, line := range d.clip(latin(f.value), f.value, width-nameWidth) {
		base := d.y + lineHeight(size)*0.8
		plain := line[:len(line)-min(f.strong, len(line))]
		d.text(x, base, font, "", size, plain)
		d.text(x+d.pdf.GetStringWidth(plain), base, font, "B", size, line[len(plain):])
		d.y += lineHeight(size)
	}
}

// clip breaks a name of others, which may be a single word, into at most two
// lines of the current font, and says so where it cuts.
func (d *drawing) clip(text, original string, width float64) []string {
	first, rest := d.take(text, width)
	if rest == "" {
		return []string{first}
	}
	second, rest := d.take(rest, width)
	if rest != "" {
		mark := fmt.Sprintf(" ... (cut: %d bytes in all)", len(original))
		second, _ = d.take(second, width-d.pdf.GetStringWidth(mark))
		second += mark
	}
	return []string{first, second}
}

// take cuts what fits into a width. An escape is not torn.
func (d *drawing) take(text string, width float64) (fits, rest string) {
	n := 0
	for n < len(text) {
		next := n + 1
		if text[n] == '\\' {
			next = n + escapeLength(text[n:])
		}
		if d.pdf.GetStringWidth(text[:next]) > width {
			break
		}
		n = next
	}
	return text[:n], text[n:]
}

// box says in words what the page is worth.
func (d *drawing) box(title, warning string) {
	d.text(margin+3, d.y+6, sans, "B", 13, title)
	d.text(margin+3, d.y+11, sans, "", small, warning)
	d.pdf.SetLineWidth(0.8)
	d.pdf.Rect(margin, d.y, width, 14, "D")
	d.y += 17
}

// usable shows the recovery passphrase, 2 rows of 4 groups.
func (d *drawing) usable(p Page) {
	top := d.y
	d.text(margin+3, d.y+6, sans, "B", 13, usableTitle)
	d.text(margin+3, d.y+11, sans, "", small, usableWarning)
	for i, group := range p.groups() {
		x, y := margin+3+float64(i%4)*44, top+21+float64(i/4)*10
		d.text(x, y, sans, "", small, strconv.Itoa(i+1))
		digits := string(group) // fpdf takes strings, which nobody can wipe
		if i < 7 {
			digits += "-"
		}
		d.text(x+4, y, mono, "B", groupSize, digits)
	}
	d.pdf.SetLineWidth(0.8)
	d.pdf.Rect(margin, top, width, 36, "D")
	d.y = top + 38
	d.text(margin, d.y+2.5, sans, "", small, codeWarning)
	d.y += 5
}

// message is the sealed message twice: as a code, and to be typed.
func (d *drawing) message(p Page) error {
	top := d.y + 1
	picture, size, err := code(p.Message)
	if err != nil {
		return err
	}
	side := float64(size) * module
	if side > codeSide {
		return fmt.Errorf("%w: %d bytes make a QR code of %.0f mm, and there is room for %.0f", escrow.ErrLimit, len(p.Message), side, codeSide)
	}
	options := fpdf.ImageOptions{ImageType: "PNG"}
	d.pdf.RegisterImageOptionsReader("code", options, bytes.NewReader(picture))
	d.pdf.ImageOptions("code", margin, top, side, side, false, options, 0, "")
	lines := escrow.Lines(p.Message)
	x, points := margin+codeSide+4, 9.0
	d.pdf.SetFont(mono, "", points)
	if longest := d.pdf.GetStringWidth(lines[0]); longest > pageWidth-margin-x {
		points *= (pageWidth - margin - x) / longest
	}
	height := codeSide / float64(max(len(lines), 17))
	for i, line := range lines {
		d.text(x, top+height*(float64(i)+0.75), mono, "", points, line)
	}
	d.y = top + codeSide + 3
	return nil
}

func (d *drawing) steps(title string, steps []step) {
	d.y += 1
	d.text(margin, d.y+3.5, sans, "B", 10, title)
	d.y += 5
	for i, s := range steps {
		d.text(margin, d.y+lineHeight(small)*0.8, sans, "", small, strconv.Itoa(i+1)+".")
		d.words(s.text)
		for _, c := range s.commands {
			d.text(margin+5, d.y+lineHeight(tiny)*0.8, mono, "", tiny, c)
			d.y += lineHeight(tiny)
		}
	}
}

// words writes a step's text in as many lines as it takes.
func (d *drawing) words(text string) {
	d.pdf.SetFont(sans, "", small)
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && d.pdf.GetStringWidth(line+" "+word) > width-5 {
			d.line(line)
			line = ""
		}
		line = strings.TrimSpace(line + " " + word)
	}
	d.line(line)
}

func (d *drawing) line(text string) {
	d.text(margin+5, d.y+lineHeight(small)*0.8, sans, "", small, text)
	d.y += lineHeight(small)
}
