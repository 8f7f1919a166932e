package main

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/escrow/volumekey"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/certkey"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/internal/server"
	"mandos-escrow/luks"
	"mandos-escrow/luks/content"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// Exit codes, the same for every command.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotApproved = 3
	exitMismatch    = 4 // not this volume
	exitIntegrity   = 5
	exitLimit       = 6
	exitRefused     = 7
)

// errOtherVolume: a packet of another volume than the one it is used on.
var errOtherVolume = errors.New("the packet is of another volume")

// errNotRunning: nobody answers on a state folder's control socket.
var errNotRunning = errors.New("no server runs")

// errStaleKey: the same for its volume key.
var errStaleKey = errors.New("the volume key in this packet is not that of the volume, which has the same UUID: it was re-encrypted or made anew since; nothing was changed")

// errUnproved: a packet whose format authenticates nothing, and whose secret does
// not open the volume that it names.
var errUnproved = errors.New("this packet of volume_key proves nothing of what it says, and does not open its volume")

// errStale: the packet is older than the keyslots of the volume.
var errStale = errors.New("the recovery passphrase in this packet opens the volume no more: it was replaced since, or saving it was interrupted; use a newer packet, or ask for a new recovery")

// exits gives errors their codes; the first that fits counts.
var exits = []struct {
	code int
	errs []error
}{
	{exitUsage, []error{secret.ErrWeak, enroll.ErrName, api.ErrMerge, cryptsetup.ErrMapping, escrow.ErrCertificate}},
	{exitFailed, []error{seal.ErrPassphrase, certkey.ErrPassphrase, volumekey.ErrKey, cryptsetup.ErrPassphrase}},
	{exitMismatch, []error{errOtherVolume, luks.ErrMismatch, luks.ErrVolumeKey, content.ErrGeometry}},
	{exitRefused, []error{
		errNotPrintable, recovery.ErrWords, enroll.ErrPolicy, errForeign, identity.ErrPin, api.ErrSetBack, seal.ErrMismatch,
		recovery.ErrOwn, recovery.ErrInvited, recovery.ErrRescueOver, recovery.ErrTwice, errDenied, recovery.ErrExpired, recovery.ErrOver, recovery.ErrNotYours, unlock.ErrRefused,
	}},
	{exitNotApproved, []error{recovery.ErrNotApproved}},
	{exitLimit, []error{escrow.ErrLimit, store.ErrFull, enroll.ErrFull, cryptsetup.ErrFull}},
	{exitIntegrity, []error{
		enroll.ErrHeaderGone, errUnproved, escrow.ErrIntegrity, escrow.ErrOtherKey, escrow.ErrPolicy, escrow.ErrForeignShare, escrow.ErrCorruptShare, escrow.ErrDuplicateShare, escrow.ErrTooFew,
		escrow.ErrCommitment, seal.ErrIntegrity, seal.ErrRecipient, seal.ErrSigner, record.ErrFormat, api.ErrTicket,
		recovery.ErrRequest, recovery.ErrApproval, recovery.ErrShare, identity.ErrSignature, store.ErrAudit, store.ErrKey, store.ErrDamaged,
		luks.ErrIntact, luks.ErrNotLUKS, luks.ErrDamaged, luks.ErrTooExpensive, luks.ErrUnsupported, luks.ErrRequirement, server.ErrBackup, unlock.ErrConfig, unlock.ErrBlob, enroll.ErrKeyslot, enroll.ErrEscrow,
	}},
}

var apiExits = map[api.Code]int{
	api.CodeRefused: exitRefused, api.CodeUnconfirmed: exitRefused, api.CodeUsage: exitUsage,
	api.CodeNotApproved: exitNotApproved, api.CodeIntegrity: exitIntegrity, api.CodeLimit: exitLimit,
}

func exitCode(err error) int {
	if err == nil {
		return exitDone
	}
	if isUsage(err) {
		return exitUsage
	}
	if code := api.CodeOf(err); code != "" {
		if exit, ok := apiExits[code]; ok {
			return exit
		}
		return exitFailed
	}
	for _, e := range exits {
		for _, target := range e.errs {
			if errors.Is(err, target) {
				return e.code
			}
		}
	}
	return exitFailed
}

// hintFor is the next command to type, where the error alone does not say it.
func hintFor(err error) string {
	if e := (*api.Error)(nil); errors.As(err, &e) && e.Code == api.CodeRefused && e.Message == "refused" {
		return "the server does not know this identity, or it was removed; after a restore from a backup, be invited again"
	}
	if e := (*api.Error)(nil); errors.As(err, &e) && e.Code == api.CodeRefused && strings.HasPrefix(e.Message, "refused: the token ") {
		return "make a new one on the server: `mandos-escrow token create --state DIR`"
	}
	for _, h := range []struct {
		target error
		text   string
	}{
		{api.ErrTicket, "copy the whole line again; it begins with met1. (token), mei1. (invite) or mer1. (rescue invite)"},
		{errNotRunning, "start it with `mandos-escrow server run --state DIR`, or `systemctl start` its unit; DIR is the folder that `server init` made"},
		{enroll.ErrNotTold, "no keyslot of ours was removed; run the same command again when the server answers, or with --offline to go on without it"},
		{api.ErrUnreachable, "is the server running? `mandos-escrow server status --state DIR` on it tells; then run the same command again"},
		{recovery.ErrWords, "ask the requester to read the words again; if they still differ, somebody changed the request: do not approve it"},
		{config.ErrHome, "an invite comes from `mandos-escrow admin add NAME --role ROLE --state DIR` on the server"},
		{seal.ErrPassphrase, "nothing was changed; a copy of a key keeps the passphrase that it had when it was made"},
		{cryptsetup.ErrPassphrase, "nothing was changed; a passphrase file is used byte for byte, with and without its last newline"},
		{enroll.ErrLastWay, "nothing was removed; the new passphrase is added and proved before anything is"},
		{bootimage.ErrRebuild, "the machine boots from its old images, and asks for a passphrase; then run the same command again"},
		{enroll.ErrHeaderGone, "work on a copy if there is any way to have one; with the volume key in a packet, --rebuild writes it anew around the data"},
		{store.ErrInUse, "end the other process first, or let `--state` reach it through its control socket"},
	} {
		if errors.Is(err, h.target) {
			return h.text
		}
	}
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return "run it as root, or as whom the file belongs to"
	}
	return ""
}
