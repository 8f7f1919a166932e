package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/internal/sheet"
)

// errNotPrintable: what is sealed to trustees, or in a foreign format, makes no
// sheet.
var errNotPrintable = errors.New("nothing was printed")

type printOptions struct {
	openOptions         // its payload is empty: all are opened
	otp          string // file with what opens a released packet
	sheet        string // file with a passphrase for the sheet
	out, print   string // where to, and which payload
	text, usable bool
}

func newPacketPrint(g *globals) *cobra.Command {
	o := printOptions{openOptions: packetPassphrase()}
	cmd := &cobra.Command{
		Use:   "print ID|FILE --out SHEET.pdf | --text",
		Short: "make a recovery sheet of a packet: one page of paper",
		Long: `Makes one A4 page of a packet that can be opened here: what volume save or
recover --release --out wrote, or a sheet as it was typed or scanned. It holds one
secret, the recovery passphrase or the volume key, sealed under the passphrase of the
packet: as a QR code, and as lines to type, each with a check. The page is useless
alone. It says what to do with it, also without this program.

A packet to a certificate or an OpenPGP key is opened with --key, and its sheet gets a
passphrase of its own: --sheet-passphrase-file.

With --usable the recovery passphrase stands on the page in clear as well: whoever has
that page can open the disk. The volume key is never printed in clear.

The same packet and passphrase give the same page, byte for byte. A packet that is
sealed to trustees, here or on a server (ID instead of FILE), makes no sheet: exit
code 7, and the commands that make a printable one.`,
		Example: `  mandos-escrow packet print laptop7.asc --for passphrase --out sheet.pdf
  mandos-escrow packet print laptop7.asc --packet-passphrase-file pass --for volume-key --text
  mandos-escrow packet print packet.asc --otp-file otp --usable --out - | lp`,
		Args: exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return runPrint(g, o, args[0]) },
	}
	withOpen(cmd, &o.openOptions)
	f := cmd.Flags()
	f.StringVar(&o.out, "out", "", "PDF file to write, - for a pipe; with --text, text file")
	f.BoolVar(&o.text, "text", false, "text for a terminal instead of a PDF; it has the lines, not the code")
	f.StringVar(&o.otp, "otp-file", "", "file with the one-time password of a released packet")
	f.StringVar(&o.sheet, "sheet-passphrase-file", "", "file with a new passphrase for the sheet, instead of that of the packet (asked for where a key opens the packet)")
	f.StringVar(&o.print, "for", "", "what to print if the packet has both: passphrase or volume-key")
	f.BoolVar(&o.usable, "usable", false, "print the recovery passphrase in clear, too")
	return cmd
}

// runPrint makes ready where the sheet goes before it asks for a secret.
func runPrint(g *globals, o printOptions, word string) error {
	if err := o.check(); err != nil {
		return err
	}
	text, err := o.read(g, word)
	if err != nil {
		return err
	}
	deliver, cleanup, err := o.delivery(g)
	if err != nil {
		return err
	}
	defer cleanup()
	opened, passphrase, err := o.openFor(g, text)
	if err != nil {
		return fmt.Errorf("%s: %w", word, err)
	}
	defer opened.Wipe()
	defer secret.Wipe(passphrase)
	page, err := o.page(opened, passphrase)
	if err != nil {
		return err
	}
	var made []byte
	if o.text {
		made = page.Text()
	} else if made, err = page.PDF(); err != nil {
		return err
	}
	defer secret.Wipe(made)
	if err := deliver(made); err != nil {
		return err
	}
	if page.Usable != nil {
		g.say("sheet %s of volume %s: whoever has this page can open the disk", page.KeyID(), page.Volume.UUID)
	} else {
		g.say("sheet %s of volume %s: useless without its passphrase; keep them apart", page.KeyID(), page.Volume.UUID)
	}
	return nil
}

func (o *printOptions) check() error {
	switch {
	case o.out == "" && !o.text:
		return usage("packet print needs --out FILE for a PDF, - for a pipe, or --text")
	case o.password != "" && o.otp != "":
		return usage("--packet-passphrase-file and --otp-file both name what opens the packet: give one")
	case o.print != "" && o.print != escrow.ForPassphrase && o.print != escrow.ForVolumeKey:
		return usage("--for %s: it is %s or %s", o.print, escrow.ForPassphrase, escrow.ForVolumeKey)
	}
	return nil
}

// read reads the packet. What is no file and could be an id is a packet on a
// server, which is sealed to trustees: no server needs to be asked.
func (o *printOptions) read(g *globals, word string) ([]byte, error) {
	text, err := config.ReadInput(word, g.in, nil)
	if errors.Is(err, fs.ErrNotExist) && isID(word) {
		return nil, notOfTrustees(word)
	}
	if err != nil {
		return nil, err
	}
	switch escrow.SealingOf(text) {
	case escrow.ByTrustees:
		packet, err := escrow.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", word, err)
		}
		return nil, notOfTrustees(packet.ID)
	case escrow.ByVolumeKey:
		return nil, fmt.Errorf("%w: %s is a packet of volume_key; first: mandos-escrow packet import %s --out packet.asc", errNotPrintable, word, word)
	}
	return text, nil
}

// isID reports whether a word could be a packet's id, or the beginning of one.
func isID(word string) bool {
	return len(word) <= 32 && strings.Trim(strings.ToLower(word), "0123456789abcdef") == ""
}

func notOfTrustees(id string) error {
	return fmt.Errorf(`%w: packet %s is sealed to trustees, and a sheet needs what a passphrase opens. With their approval:
  mandos-escrow recover --request --volume %s --reason 'a sheet'
  mandos-escrow recover --release REQUEST --out packet.asc --otp-file otp
  mandos-escrow packet print packet.asc --otp-file otp --out sheet.pdf
Or on the machine, with a passphrase of the volume:
  mandos-escrow volume save DEVICE packet.asc --recovery-passphrase
  mandos-escrow packet print packet.asc --for passphrase --out sheet.pdf`, errNotPrintable, id, id)
}

// delivery makes ready where a sheet goes. A PDF on a terminal helps nobody; and
// what opens a disk goes to a terminal, a pipe to a printer, or a file that
// nobody else reads.
func (o *printOptions) delivery(g *globals) (deliver func([]byte) error, cleanup func(), err error) {
	if o.out != "" && o.out != "-" {
		out, err := config.NewOutput(o.out)
		if err != nil {
			return nil, nil, err
		}
		return func(made []byte) error {
			if _, err := out.Write(made); err != nil {
				return fmt.Errorf("write %s: %w", o.out, err)
			}
			return out.Commit()
		}, out.Discard, nil
	}
	onTerminal := g.tty != nil && term.IsTerminal(int(g.tty.Fd()))
	switch {
	case !o.text && onTerminal:
		return nil, nil, usage("a PDF is nothing for a terminal: name a file with --out, or give --text")
	case o.usable && o.text && !onTerminal, o.usable && !o.text && !isPipe(g.tty):
		return nil, nil, usage("a usable sheet could be read by others there: name a file with --out")
	}
	return func(made []byte) error {
		_, err := io.Copy(g.out, bytes.NewReader(made))
		return err
	}, func() {}, nil
}

func isPipe(f *os.File) bool {
	if f == nil {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&fs.ModeNamedPipe != 0
}

// openFor opens the packet, and returns the passphrase that the sheet gets: the one
// that opened the packet, unless a key did, or another one is given.
func (o *printOptions) openFor(g *globals, text []byte) (opened *escrow.Opened, passphrase []byte, err error) {
	how := o.openOptions
	if o.otp != "" {
		how = oneTime(o.otp)
	}
	sealing := escrow.SealingOf(text)
	if (sealing == escrow.ByPassphrase || sealing == escrow.BySheet) && len(how.keys) == 0 {
		opened, passphrase, err = openUnder(g, how, text)
	} else {
		opened, err = openText(g, how, sealing, text)
	}
	if err != nil || passphrase != nil && o.sheet == "" {
		return opened, passphrase, err
	}
	secret.Wipe(passphrase)
	if passphrase, err = g.newSecret(o.sheet, "--sheet-passphrase-file", "Passphrase of the sheet: "); err != nil {
		opened.Wipe()
		return nil, nil, err
	}
	return opened, passphrase, nil
}

// page seals what is to be printed.
func (o *printOptions) page(opened *escrow.Opened, passphrase []byte) (sheet.Page, error) {
	payload, err := o.choose(opened)
	if err != nil {
		return sheet.Page{}, err
	}
	sealed, err := escrow.SealSheet(opened, payload, passphrase)
	if err != nil {
		return sheet.Page{}, err
	}
	page := sheet.Page{Sheet: sealed}
	if o.usable {
		page.Usable = opened.Passphrase.Passphrase
	}
	return page, nil
}

// choose is what of a packet goes on the sheet. Beside a passphrase in clear, the
// volume key is what a page can still have.
func (o *printOptions) choose(opened *escrow.Opened) (string, error) {
	has := map[string]bool{escrow.ForPassphrase: opened.Passphrase != nil, escrow.ForVolumeKey: opened.VolumeKey != nil}
	switch {
	case o.usable && (opened.Passphrase == nil || escrow.CheckRecoveryPassphrase(opened.Passphrase.Passphrase) != nil):
		return "", usage("--usable prints a recovery passphrase, which this packet does not have; a volume key is never printed in clear")
	case o.print != "" && !has[o.print]:
		return "", usage("--for %s: the packet does not have it", o.print)
	case o.print != "":
		return o.print, nil
	case has[escrow.ForPassphrase] && has[escrow.ForVolumeKey] && !o.usable:
		return "", usage("the packet has both: say --for %s or --for %s; a sheet has one", escrow.ForPassphrase, escrow.ForVolumeKey)
	case has[escrow.ForVolumeKey]:
		return escrow.ForVolumeKey, nil
	}
	return escrow.ForPassphrase, nil
}
