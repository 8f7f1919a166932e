package main

import (
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
)

func newVolumeShow(g *globals) *cobra.Command {
	o, secrets := packetPassphrase(), false
	cmd := &cobra.Command{
		Use:   "show FILE",
		Short: "show what is in a packet in a file, without its secrets unless they are asked for",
		Long: `Opens the packet in FILE and shows of which volume it is and what it holds.
Secrets are shown with --secrets only, as one line each, or in the JSON: send them
nowhere but to a terminal or a file that nobody else can read.

FILE is any packet: of "volume save", "recover --release", "packet export", of the
program volume_key, or a printed sheet that was typed or scanned. What the old format
does not authenticate is named.`,
		Example: `  mandos-escrow volume show laptop7.asc --packet-passphrase-file P
  mandos-escrow volume show laptop7.packet --key escrow-key.pem --secrets --json`,
		Args: exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			opened, err := openFile(g, o, args[0])
			if err != nil {
				return err
			}
			defer opened.Wipe()
			if secrets {
				g.warnReaders()
			}
			shown := newShown(opened, secrets)
			if g.json {
				return g.printJSON(shown)
			}
			shown.print(g.out)
			return nil
		},
	}
	withOpen(cmd, &o)
	cmd.Flags().BoolVar(&secrets, "secrets", false, "show the secrets, too")
	return g.withJSON(cmd)
}

// warnReaders: whoever redirects secrets into a file chooses its mode.
func (g *globals) warnReaders() {
	if g.tty == nil {
		return
	}
	if info, err := g.tty.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		g.warn("the secrets go to a file that others can read; use umask 077")
	}
}

// shown is a packet as it is shown. Secrets are nil where they are not asked for,
// or not there.
type shown struct {
	ID         string        `json:"id"`
	Supersedes string        `json:"supersedes"`
	Created    time.Time     `json:"created"`
	Machine    string        `json:"machine"`
	KeyID      string        `json:"key_id"`
	Volume     escrow.Volume `json:"volume"`
	Payloads   []string      `json:"payloads"`

	LUKSType   string `json:"luks_type"`
	Cipher     string `json:"cipher"`
	KeyBits    int    `json:"key_bits"`
	Offset     int64  `json:"offset"` // -1: not known
	SectorSize int    `json:"sector_size"`
	Slot       int    `json:"slot"` // of the passphrase; -1: not known
	Digest     bool   `json:"digest"`
	Backup     int    `json:"header_backup"`    // bytes
	Places     int    `json:"data_fingerprint"` // places

	Sealing  string   `json:"sealing"`
	Unproved []string `json:"unauthenticated"` // fields that the old format of volume_key does not authenticate

	VolumeKey          *string `json:"volume_key,omitempty"` // hex
	RecoveryPassphrase *string `json:"recovery_passphrase,omitempty"`
	Passphrase         *string `json:"passphrase,omitempty"`
}

func newShown(o *openedFile, secrets bool) shown {
	h := o.Header
	s := shown{
		ID: h.ID, Supersedes: h.Supersedes, Created: h.Created, Machine: h.Machine, KeyID: string(h.KeyID), Volume: h.Volume,
		Payloads: []string{}, Offset: escrow.NoOffset, Slot: escrow.NoSlot,
		Sealing: string(o.sealing), Unproved: o.unproved,
	}
	if p := o.Passphrase; p != nil {
		s.Payloads = append(s.Payloads, escrow.ForPassphrase)
		s.LUKSType, s.Slot = p.LUKSType, p.Slot
		if secrets {
			text := string(p.Passphrase)
			if p.Foreign {
				s.Passphrase = &text
			} else {
				s.RecoveryPassphrase = &text
			}
		}
	}
	if p := o.VolumeKey; p != nil {
		s.Payloads = append(s.Payloads, escrow.ForVolumeKey)
		s.LUKSType, s.Cipher, s.KeyBits, s.Offset, s.SectorSize = p.LUKSType, p.Cipher, p.KeyBits, p.DataOffset, p.SectorSize
		s.Digest, s.Backup, s.Places = p.DigestHash != "", len(p.HeaderBackup), len(p.Fingerprint)
		if secrets {
			text := hex.EncodeToString(p.Key)
			s.VolumeKey = &text
		}
	}
	return s
}

// print shows it line by line; what is not known is left out.
func (s shown) print(w io.Writer) {
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-20s %s\n", name, safe(value))
		}
	}
	number := func(n int64, unit string) string {
		if n <= 0 {
			return ""
		}
		return strconv.FormatInt(n, 10) + unit
	}
	line("packet", s.ID)
	line("supersedes", s.Supersedes)
	line("made", when(s.Created))
	line("machine", s.Machine)
	line("key ID", s.KeyID)
	line("volume", s.Volume.UUID)
	line("label", s.Volume.Label)
	line("by-id", s.Volume.ByID)
	for _, p := range s.Payloads {
		line("holds", map[string]string{escrow.ForPassphrase: "a passphrase", escrow.ForVolumeKey: "the volume key"}[p])
	}
	line("type", s.LUKSType)
	line("cipher", s.Cipher)
	line("key bits", number(int64(s.KeyBits), ""))
	line("offset", number(s.Offset, " bytes"))
	line("sector size", number(int64(s.SectorSize), " bytes"))
	if s.Slot != escrow.NoSlot {
		line("keyslot", strconv.Itoa(s.Slot))
	}
	if len(s.Unproved) > 0 {
		line("not authenticated", strings.Join(s.Unproved, ", "))
	}
	line("header backup", number(int64(s.Backup), " bytes"))
	line("data fingerprint", number(int64(s.Places), " places"))
	for _, secret := range []struct {
		name string
		text *string
	}{{"volume key", s.VolumeKey}, {"recovery passphrase", s.RecoveryPassphrase}, {"passphrase", s.Passphrase}} {
		if secret.text != nil {
			line(secret.name, *secret.text)
		}
	}
}
