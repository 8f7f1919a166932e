package sheet

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/secret"
)

const (
	testID   = "4f1d2c3b00112233445566778899aabb"
	testUUID = "6d2f8c1a-0b57-4c7e-9f6e-2a1b3c4d5e6f"
)

var testTime = time.Date(2026, 11, 25, 20, 36, 0, 0, time.UTC)

// largest is a message as long as a sheet may have.
func largest() []byte {
	message := make([]byte, 400)
	for i := range message {
		message[i] = byte(i * i * 7)
	}
	return message
}

func testPage(change func(*Page)) Page {
	p := Page{Sheet: &escrow.Sheet{
		ID: testID, Created: testTime, Machine: "laptop7", Volume: escrow.Volume{UUID: testUUID, Label: "root"},
		Payload: escrow.ForPassphrase, Message: largest(),
	}}
	if change != nil {
		change(&p)
	}
	return p
}

// worst are pages with everything that could push something off the page.
func worst() map[string]Page {
	supersedes := func(p *Page) { p.Supersedes = "0a1b2c3d00112233445566778899aabb" }
	pages := map[string]Page{}
	for name, text := range map[string]string{
		"plain":     "laptop7",
		"one word":  strings.Repeat("W", 255),
		"words":     strings.Repeat("laptop of somebody ", 13) + "laptop",
		"hebrew":    strings.Repeat("מחשב", 31),
		"emoji":     strings.Repeat("\U0001f5dd", 63),
		"accents":   strings.Repeat("é", 127),
		"backslash": strings.Repeat(`\`, 255),
		"percent":   strings.Repeat("%d(){}[]<<>>", 21),
		"bytes":     strings.Repeat("\xff", 255),
	} {
		for kind, change := range map[string]func(*Page){
			"passphrase": func(p *Page) {},
			"volume key": func(p *Page) { p.Payload = escrow.ForVolumeKey },
			"usable":     func(p *Page) { p.Usable = []byte("000000-720887-000002-000014-000037-000049-000061-000073") },
			"usable and volume key": func(p *Page) {
				p.Payload, p.Usable = escrow.ForVolumeKey, escrow.NewRecoveryPassphrase()
			},
		} {
			pages[name+", "+kind] = testPage(func(p *Page) {
				p.Machine, p.Volume.Label = text, text
				supersedes(p)
				change(p)
			})
		}
	}
	return pages
}

func tool(t *testing.T, stdin []byte, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s (apt-get install poppler-utils zbar-tools)", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

func mustPDF(t *testing.T, p Page) []byte {
	t.Helper()
	pdf, err := p.PDF()
	if err != nil {
		t.Fatal(err)
	}
	return pdf
}

// TestOnePage: whatever names a packet has, there is one page, and nothing of it
// lies outside.
func TestOnePage(t *testing.T) {
	for name, page := range worst() {
		t.Run(name, func(t *testing.T) {
			pdf := mustPDF(t, page)
			if n := len(regexp.MustCompile(`/Type /Page\b`).FindAll(pdf, -1)); n != 1 {
				t.Errorf("%d pages", n)
			}
			boxes := tool(t, pdf, "pdftotext", "-bbox", "-", "-")
			words := regexp.MustCompile(`<word xMin="([-0-9.]+)" yMin="([-0-9.]+)" xMax="([-0-9.]+)" yMax="([-0-9.]+)">(.*)</word>`).FindAllStringSubmatch(string(boxes), -1)
			if len(words) < 150 {
				t.Fatalf("%d words on the page", len(words))
			}
			for _, w := range words {
				var at [4]float64
				for i := range at {
					if _, err := fmt.Sscan(w[i+1], &at[i]); err != nil {
						t.Fatal(err)
					}
				}
				// A4 in points, less 5 mm that printers do not reach
				if at[0] < 14 || at[1] < 14 || at[2] > 595-14 || at[3] > 842-14 {
					t.Errorf("%q lies at %v", w[5], at)
				}
			}
			if got, err := escrow.ParseLines(tool(t, pdf, "pdftotext", "-layout", "-", "-")); err != nil || !bytes.Equal(got, page.Message) {
				t.Errorf("typed from the page: %v", err)
			}
			if got, err := escrow.ParseLines(page.Text()); err != nil || !bytes.Equal(got, page.Message) {
				t.Errorf("typed from the text: %v", err)
			}
		})
	}
}

// sealed is a real sheet, as large as its payload can be.
func sealed(t *testing.T, payload string) *escrow.Sheet {
	t.Helper()
	opened, err := escrow.NewStandAlone(escrow.Header{
		ID: testID, Created: testTime, Machine: "laptop7", Volume: escrow.Volume{UUID: testUUID},
	}, &escrow.PassphrasePayload{Passphrase: escrow.NewRecoveryPassphrase(), Slot: 31, LUKSType: "luks2"}, &escrow.VolumeKeyPayload{
		Key: secret.Random(64), KeyBits: 512, LUKSType: "luks2", Cipher: "camellia-xts-plain64", DataOffset: 1 << 40, SectorSize: 4096,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Wipe()
	s, err := escrow.SealSheet(opened, payload, []byte(testPassphrase))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const testPassphrase = "abcd-efgh-ijkm-npqr"

// TestCode renders pages as printers and cameras do, and scans them.
func TestCode(t *testing.T) {
	for name, page := range map[string]Page{
		"400 bytes":  testPage(nil),
		"usable":     testPage(func(p *Page) { p.Usable = escrow.NewRecoveryPassphrase() }),
		"volume key": {Sheet: sealed(t, escrow.ForVolumeKey)},
		"passphrase": {Sheet: sealed(t, escrow.ForPassphrase)},
	} {
		t.Logf("%s: %d bytes", name, len(page.Message))
		pdf := filepath.Join(t.TempDir(), "sheet.pdf")
		if err := os.WriteFile(pdf, mustPDF(t, page), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, dpi := range []string{"100", "150", "200", "300", "600"} {
			t.Run(name+" at "+dpi, func(t *testing.T) {
				picture := filepath.Join(t.TempDir(), "page")
				tool(t, nil, "pdftoppm", "-gray", "-r", dpi, "-singlefile", pdf, picture)
				scanned := tool(t, nil, "zbarimg", "-q", "--raw", picture+".pgm")
				if got, err := escrow.ParseLines(scanned); err != nil || !bytes.Equal(got, page.Message) {
					t.Errorf("scanned %d bytes: %v", len(scanned), err)
				}
			})
		}
	}
}

// TestReadBack: what is typed from a page opens.
func TestReadBack(t *testing.T) {
	for _, payload := range []string{escrow.ForVolumeKey, escrow.ForPassphrase} {
		pdf := mustPDF(t, Page{Sheet: sealed(t, payload)})
		message, err := escrow.ParseLines(tool(t, pdf, "pdftotext", "-layout", "-", "-"))
		if err != nil {
			t.Fatal(err)
		}
		opened, err := escrow.OpenSheet(message, []byte(testPassphrase))
		if err != nil {
			t.Fatal(err)
		}
		if opened.Header.Volume.UUID != testUUID || (opened.VolumeKey != nil) != (payload == escrow.ForVolumeKey) {
			t.Errorf("%s: opened %+v", payload, opened.Header)
		}
		opened.Wipe()
	}
}

// TestStockTools runs the commands that are printed, without this program.
func TestStockTools(t *testing.T) {
	for size := 350; size <= 354; size++ { // every length of padding
		page := testPage(func(p *Page) { p.Message = p.Message[:size] })
		for _, way := range []struct{ command, text string }{
			{page.fromLines(), strings.Join(escrow.Lines(page.Message), "\n") + "\n"},
			{page.fromLines(), strings.ToLower(strings.Join(escrow.Lines(page.Message), "  \n"))},
			{page.fromCode(), escrow.QRText(page.Message) + "\n"},
		} {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "sheet.txt"), []byte(way.text), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sh", "-c", way.command)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", way.command, err, out)
			}
			got, err := os.ReadFile(filepath.Join(dir, "sheet.gpg"))
			if err != nil || !bytes.Equal(got, page.Message) {
				t.Errorf("%d bytes: %s made %d bytes (%v)", size, way.command, len(got), err)
			}
			if !slices.ContainsFunc(page.adminSteps(), func(s step) bool { return slices.Contains(s.commands, way.command) }) {
				t.Errorf("%s is not on the page", way.command)
			}
		}
	}
}

// TestReproducible: printed again, a sheet is the same.
func TestReproducible(t *testing.T) {
	first := mustPDF(t, testPage(nil))
	if !bytes.Equal(first, mustPDF(t, testPage(nil))) {
		t.Error("two PDFs of one sheet differ")
	}
	other := mustPDF(t, testPage(func(p *Page) { p.Created = p.Created.Add(time.Second) }))
	if bytes.Equal(first, other) {
		t.Error("the date of the packet makes no difference")
	}
}

// TestWords: what each kind of sheet says, as PDF and as text.
func TestWords(t *testing.T) {
	for name, c := range map[string]struct {
		page      Page
		has, lack []string
	}{
		"sealed": {
			testPage(func(p *Page) { p.Supersedes = "0a1b2c3d00112233445566778899aabb" }),
			[]string{"USELESS ALONE", "4F1D2C3B", testUUID, "root", "laptop7", "2026-11-25 20:36 UTC", "0A1B2C3D", "gpg -d", "base32 -d", "recovery passphrase", "volume restore"},
			[]string{"USABLE", "volume key", "plain64"},
		},
		"volume key": {
			testPage(func(p *Page) { p.Payload = escrow.ForVolumeKey }),
			[]string{"USELESS ALONE", "volume key", "--volume-key-file", "--type plain"},
			[]string{"USABLE", "supersedes", "recovery-passphrase"},
		},
		"usable": {
			testPage(func(p *Page) { p.Usable = []byte("000000-720887-000002-000014-000037-000049-000061-000073") }),
			[]string{"WHOEVER HAS THIS PAGE CAN OPEN THE DISK", "720887", "000073", "useless alone, without the passphrase"},
			[]string{"USELESS ALONE"},
		},
		"no machine, no label": {
			testPage(func(p *Page) { p.Machine, p.Volume.Label = "", "" }),
			[]string{testUUID},
			[]string{"machine ", "label "},
		},
		"a name of another script": {
			testPage(func(p *Page) { p.Machine = `żółw\` }),
			[]string{testUUID},
			nil,
		},
	} {
		pdf := string(tool(t, mustPDF(t, c.page), "pdftotext", "-layout", "-", "-"))
		for form, text := range map[string]string{"PDF": pdf, "text": string(c.page.Text())} {
			for _, want := range c.has {
				if !strings.Contains(text, want) {
					t.Errorf("%s, %s: lacks %q", name, form, want)
				}
			}
			for _, unwanted := range c.lack {
				if strings.Contains(text, unwanted) {
					t.Errorf("%s, %s: has %q", name, form, unwanted)
				}
			}
		}
	}
	page := testPage(func(p *Page) { p.Machine = `żółw\` })
	if pdf := string(tool(t, mustPDF(t, page), "pdftotext", "-layout", "-", "-")); !strings.Contains(pdf, `\u017có\u0142w\\`) {
		t.Error("the page lacks the escaped name")
	}
	if text := string(page.Text()); !strings.Contains(text, `żółw\`) {
		t.Error("the text lacks the name")
	}
	bidi := testPage(func(p *Page) { p.Machine = "a\u202eb\nc\x1b[2J" })
	if text := bidi.Text(); bytes.ContainsAny(text, "\u202e\x1b") || !bytes.Contains(text, []byte(`\u202eb\nc\x1b[2J`)) {
		t.Error("the text lets a name deceive")
	}
}

// TestGroupSize: the digits in clear are 16 points or larger, in two rows of four.
func TestGroupSize(t *testing.T) {
	if groupSize < 16 {
		t.Errorf("%v points", groupSize)
	}
	usable := []byte("000000-720887-000002-000014-000037-000049-000061-000073")
	lines := strings.Split(string(tool(t, mustPDF(t, testPage(func(p *Page) { p.Usable = usable })), "pdftotext", "-layout", "-", "-")), "\n")
	for _, row := range [][]string{{"000000-", "720887-", "000002-", "000014-"}, {"000037-", "000049-", "000061-", "000073"}} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, row[0]) && strings.Contains(l, row[3]) }) {
			t.Errorf("no row %v", row)
		}
	}
}

// TestTooLarge: more than a code of level Q and its module size allow is refused.
func TestTooLarge(t *testing.T) {
	for _, size := range []int{410, 5000} {
		if _, err := testPage(func(p *Page) { p.Message = make([]byte, size) }).PDF(); err == nil {
			t.Errorf("%d bytes were printed", size)
		}
	}
}

func TestLatin(t *testing.T) {
	for in, want := range map[string]string{
		"laptop7": "laptop7", "é": "\xe9", "€": `\u20ac`, "א": `\u05d0`, "\U0001f5dd": `\U0001f5dd`, `\u05d0`: `\\u05d0`,
		"\xff": `\xff`, "\ufffd": `\ufffd`, "\x1b": `\u001b`, "\u00ad": `\u00ad`, "\u00a0": `\u00a0`, "": "",
	} {
		got := latin(in)
		if got != want {
			t.Errorf("latin(%q) = %q, want %q", in, got, want)
		}
		if got != "" && got[0] == '\\' {
			if n := escapeLength(got); n != len(got) && !(utf8.RuneCountInString(in) > 1 && n == 2) {
				t.Errorf("escapeLength(%q) = %d", got, n)
			}
		}
	}
}

func BenchmarkPDF(b *testing.B) {
	page := testPage(nil)
	for b.Loop() {
		pdf, err := page.PDF()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(pdf)), "bytes")
	}
}
