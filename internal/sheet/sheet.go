// Package sheet lays out a recovery sheet: one payload of a packet, sealed under
// a passphrase, on one A4 page as PDF, or as text for a terminal.
//
// It seals and opens nothing: what is printed comes from package escrow, and so
// do the lines that people type. It reads no file and writes none. It imports
// escrow and the leaves record and secret, and nothing else imports fpdf and
// barcode.
package sheet

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"mandos-escrow/escrow"
)

// Page is what a sheet shows.
type Page struct {
	*escrow.Sheet
	// Usable is the recovery passphrase in clear, 8 groups of digits; nil on a
	// sheet that is useless alone. It stays the caller's, to be wiped.
	Usable []byte
}

// KeyID is the name of a sheet among people: the beginning of its packet's id.
func (p Page) KeyID() string { return strings.ToUpper(p.ID[:8]) }

// Title and warning: in words what the page is worth.
const (
	sealedTitle   = "USELESS ALONE"
	sealedWarning = "This page opens nothing without its passphrase, which is kept elsewhere. Never keep the two together."
	usableTitle   = "USABLE: WHOEVER HAS THIS PAGE CAN OPEN THE DISK"
	usableWarning = "Nothing else is needed. Keep it where you would keep money, not with the computer. Type the dashes, too:"
	codeWarning   = "The code and the lines are sealed: useless alone, without the passphrase of this sheet."
)

// fact is one line about the sheet. The last bytes of strong text stand out.
type fact struct {
	name, value string
	strong      int
}

func (p Page) facts() []fact {
	holds := "the recovery passphrase"
	if p.Payload == escrow.ForVolumeKey {
		holds = "the volume key: it opens the data even when every passphrase and the header are lost"
	}
	facts := []fact{{"volume", p.Volume.UUID, 8}}
	for _, f := range []fact{
		{"label", p.Volume.Label, 0},
		{"machine", p.Machine, 0},
		{"date", p.Created.UTC().Format("2006-01-02 15:04 UTC"), 0},
		{"packet", p.ID, 0},
		{"supersedes", p.supersedes(), 0},
		{"sealed here", holds, 0},
		{"SHA-256", p.digest() + " ... of the sealed message, " + fmt.Sprint(len(p.Message)) + " bytes", 0},
	} {
		if f.value != "" {
			facts = append(facts, f)
		}
	}
	return facts
}

func (p Page) supersedes() string {
	if p.Supersedes == "" {
		return ""
	}
	return fmt.Sprintf("sheet %s, which is to be destroyed (packet %s)", strings.ToUpper(p.Supersedes[:8]), p.Supersedes)
}

// digest is the beginning of the message's SHA-256, as sha256sum shows it.
func (p Page) digest() string {
	sum := sha256.Sum256(p.Message)
	return hex.EncodeToString(sum[:8])
}

// groups are the digits of the recovery passphrase in clear: parts of Usable.
func (p Page) groups() [][]byte { return bytes.Split(p.Usable, []byte("-")) }

// step is a numbered step, with the commands that belong to it.
type step struct {
	text     string
	commands []string
}

const keyboard = "Where digits need Shift, as on French keyboards, hold it or use the number keypad."

func (p Page) userSteps() []step {
	last := p.Volume.UUID[len(p.Volume.UUID)-8:]
	call := step{text: fmt.Sprintf("Call whoever keeps the passphrase of this sheet, and tell them its key ID, %s, and that the volume ends in %s.", p.KeyID(), last)}
	secrecy := step{text: "Never write that passphrase on this page. Give the page, or a picture of it, to nobody else."}
	switch {
	case p.Usable != nil:
		return []step{
			{text: fmt.Sprintf("Where the computer asks for the passphrase of its disk (volume ...%s), type groups 1 to 8 with a dash between each two, then Enter. %s", last, keyboard)},
			{text: "Once you are in, have a new passphrase set and a new sheet made; then destroy this one."},
		}
	case p.Payload == escrow.ForVolumeKey:
		return []step{call, secrecy, {text: "Nothing here can be typed where the computer asks for a passphrase: an administrator needs the disk, too."}}
	}
	return []step{
		call, secrecy,
		{text: "They read 8 groups of 6 digits to you. Type them where the computer asks for the passphrase of its disk, with a dash between each two, then Enter. " + keyboard},
		{text: "Once you are in, have a new passphrase set and a new sheet made; then destroy this one."},
	}
}

func (p Page) adminSteps() []step {
	steps := []step{
		{text: "Scan the code into sheet.txt, or type the lines into it as they are; capitals and spaces do not matter.", commands: []string{
			"zbarimg -q --raw PICTURE >sheet.txt",
		}},
		{text: "This finds the line that is mistyped, asks for the passphrase of the sheet, and puts a new passphrase on the disk:", commands: []string{
			p.restore(),
		}},
		{text: "Without that program (gpg and coreutils), from the lines, or from the code; the sum begins with " + p.digest() + ":", commands: []string{
			p.fromLines(), p.fromCode(), "sha256sum sheet.gpg; gpg -d sheet.gpg >plain        # into memory: /dev/shm",
		}},
	}
	if p.Payload == escrow.ForVolumeKey {
		return append(steps, step{text: "plain holds the volume key and where the data begins. Header intact: add a passphrase; header gone: open the data as it is.", commands: []string{
			"sed -n 's/^volume-key: //p' plain | base64 -d >key",
			"cryptsetup luksAddKey --volume-key-file key DEVICE",
			"cryptsetup open --type plain --cipher CIPHER --key-size BITS --key-file key --offset DATA-OFFSET/512 \\",
			"  --sector-size SECTOR-SIZE --readonly DEVICE NAME",
		}})
	}
	return append(steps, step{text: "plain holds the recovery passphrase; it adds another one. Check first that the disk is the right one.", commands: []string{
		"cryptsetup luksUUID DEVICE",
		"sed -n 's/^recovery-passphrase: //p' plain | tr -d '\\n' >old; cryptsetup luksAddKey --key-file old DEVICE",
	}})
}

// restore is the command of this program.
func (p Page) restore() string {
	if p.Payload == escrow.ForVolumeKey {
		return "mandos-escrow volume restore DEVICE sheet.txt        # header gone: --rebuild"
	}
	return "mandos-escrow volume restore DEVICE sheet.txt"
}

// fromLines is the command that makes the message of typed lines.
func (p Page) fromLines() string {
	return fmt.Sprintf("(sed 's/^ *[0-9]*//; s/ *[^ ]* *$//' sheet.txt | tr -d ' \\n' | tr a-z A-Z%s) | base32 -d >sheet.gpg", p.padding())
}

// fromCode is the command that makes the message of a scanner's text.
func (p Page) fromCode() string {
	return fmt.Sprintf("(tr -d '\\n' <sheet.txt%s) | base32 -d >sheet.gpg", p.padding())
}

// padding is what base32(1) demands at the end, and nobody should have to type.
func (p Page) padding() string {
	pad := (8 - (len(p.Message)*8+4)/5%8) % 8
	if pad == 0 {
		return ""
	}
	return "; echo " + strings.Repeat("=", pad)
}
