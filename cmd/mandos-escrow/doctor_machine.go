package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// examineMachine checks the system below root.
func examineMachine(ctx context.Context, root string) ([]finding, error) {
	s, err := inspectMachine(ctx, root)
	if err != nil {
		return nil, err
	}
	if !s.Enrolled {
		return []finding{{warning, "this machine is not enrolled", "mandos-escrow enroll --token-file FILE --device DEV"}}, nil
	}
	findings := []finding{checkCryptsetup(ctx)}
	if s.boots() {
		findings = append(findings, checkIdentity(root)...)
	}
	for _, v := range s.Volumes {
		findings = append(findings, checkVolume(v)...)
	}
	if s.boots() {
		findings = append(findings, findingsOfImages(s)...)
		findings = append(findings, checkShell(root))
		findings = append(findings, checkCrypttab(root, s)...)
		findings = append(findings, checkLastBoot(s)...)
	}
	return append(findings, checkSwap(root)...), nil
}

func checkCryptsetup(ctx context.Context) finding {
	version, err := (cryptsetup.Tool{}).Version(ctx)
	if err != nil {
		return finding{problem, err.Error(), "install cryptsetup 2.6 or newer: enroll and unenroll need it"}
	}
	return finding{Level: fine, Text: "cryptsetup " + version}
}

func checkVolume(v enroll.VolumeState) (findings []finding) {
	name := "volume " + v.UUID
	if v.Device != "" {
		name = v.Device + " (" + v.UUID + ")"
	}
	const again = "if that was you, run mandos-escrow enroll again, with a new token; if not, find out who did it first"
	switch {
	case v.Problem != "":
		findings = append(findings, finding{problem, name + ": " + strings.ReplaceAll(v.Problem, "\n", "; "), again})
	case !v.Finished:
		findings = append(findings, finding{problem, name + ": its enrolment was not finished", "run the same mandos-escrow enroll again"})
	}
	for _, s := range v.Slots {
		if s.State != enroll.Proved {
			findings = append(findings, finding{problem, fmt.Sprintf("%s: keyslot %d, of the %s passphrase, is %s: that passphrase opens it no more", name, s.Slot, s.Purpose, s.State), again})
		}
	}
	if len(findings) == 0 {
		findings = append(findings, finding{Level: fine, Text: name + ": header and keyslots are those that were proved"})
	}
	if len(v.Behind) > 0 {
		findings = append(findings, finding{
			warning, name + ": " + strings.Join(v.Behind, ", ") + " did not answer when it was enrolled, and still lacks its part",
			"run the same mandos-escrow enroll again, with a token that is valid there",
		})
	}
	if v.Device != "" && len(v.Others) == 0 {
		findings = append(findings, finding{
			warning, name + ": only keyslots of ours open it: without the server nobody gets in but by a recovery",
			"if somebody is to type a passphrase: cryptsetup luksAddKey " + shellWord(v.Device),
		})
	}
	return findings
}

// checkIdentity finds an unenroll that was interrupted: enroll is refused then.
func checkIdentity(root string) []finding {
	name := filepath.Join(root, config.BootFolder, unlock.ConfigFile)
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return []finding{{problem, name + " is gone: an unenroll was interrupted, or somebody removed it", "finish it with mandos-escrow unenroll; after that the machine can enroll again"}}
}

func findingsOfImages(s machineStatus) (findings []finding) {
	const again = "run the same mandos-escrow enroll again: it makes the images anew"
	switch {
	case errors.Is(s.unseen, bootimage.ErrNoProgram):
		findings = append(findings, finding{problem, s.Unseen, "install mandos-escrow-client; " + again})
	case s.unseen != nil:
		findings = append(findings, finding{warning, "the boot images were not looked at: " + s.Unseen, ""})
	}
	for _, image := range s.Images {
		if image.err == nil {
			findings = append(findings, finding{Level: fine, Text: image.Path + " holds what it must, and only root can read it"})
			continue
		}
		do := "make it anew: update-initramfs -u -k all, or dracut --force --regenerate-all"
		switch {
		case errors.Is(image.err, bootimage.ErrWithout):
			do = again
		case errors.Is(image.err, bootimage.ErrReadable):
			do += "; who could read it has the boot identity: mandos-escrow unenroll, then enroll again"
		}
		findings = append(findings, finding{problem, image.Problem, do})
	}
	return findings
}

// checkShell finds out whether failed unlocks end in a root shell, for whoever
// is at the console.
func checkShell(root string) finding {
	system, err := detectSystem(root)
	if err != nil {
		return finding{warning, "whether failed unlocks end in a root shell is not known: it depends on what makes the boot images", ""}
	}
	line, from, err := kernelCommandLine(root)
	if err != nil {
		return finding{warning, "whether failed unlocks end in a root shell is not known: " + err.Error(), ""}
	}
	words := "panic=30"
	if system.Kind == bootimage.Dracut {
		words = "rd.shell=0 rd.emergency=reboot"
	}
	if closesShell(system.Kind, line) {
		return finding{Level: fine, Text: "failed unlocks end in no shell (" + from + ")"}
	}
	return finding{
		problem, "failed unlocks end in a root shell for whoever is at the console: " + from + " lacks " + words,
		fmt.Sprintf("add %s to GRUB_CMDLINE_LINUX in /etc/default/grub, then run update-grub (Fedora: grubby --update-kernel=ALL --args=%q); with systemd-boot: /etc/kernel/cmdline, then kernel-install", words, words),
	}
}

// closesShell: initramfs-tools reboots or halts in place of a shell when panic=
// has any value, dracut when rd.shell is off (then rd.emergency says which) and
// no rd.break asks for a shell.
func closesShell(kind bootimage.Kind, line string) bool {
	last := map[string]string{}
	for _, word := range strings.Fields(line) {
		name, value, _ := strings.Cut(word, "=")
		last[name] = value
	}
	if kind == bootimage.InitramfsTools {
		return last["panic"] != ""
	}
	_, breaks := last["rd.break"]
	return !breaks && slices.Contains([]string{"0", "no", "off"}, last["rd.shell"])
}

// kernelCommandLine is that of the running kernel, or what the next one will
// get as far as the files of a system that is not running say.
func kernelCommandLine(root string) (line, from string, err error) {
	if root == "/" {
		text, err := os.ReadFile("/proc/cmdline")
		return string(text), "/proc/cmdline", err
	}
	if text, err := os.ReadFile(filepath.Join(root, "etc/default/grub")); err == nil {
		var words []string
		for l := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(strings.TrimSpace(l), "=")
			if name == "GRUB_CMDLINE_LINUX" || name == "GRUB_CMDLINE_LINUX_DEFAULT" {
				words = append(words, strings.Trim(value, `"'`))
			}
		}
		return strings.Join(words, " "), "/etc/default/grub", nil
	}
	text, err := os.ReadFile(filepath.Join(root, "etc/kernel/cmdline"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", errors.New("neither /etc/default/grub nor /etc/kernel/cmdline is there")
	}
	return string(text), "/etc/kernel/cmdline", err
}

// crypttabLine is one line of crypttab(5).
type crypttabLine struct {
	name, source, key string
	options           []string
}

func readCrypttab(root string) (lines []crypttabLine, err error) {
	text, err := os.ReadFile(filepath.Join(root, "etc/crypttab"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for l := range strings.Lines(string(text)) {
		f := strings.Fields(l)
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		f = append(f, "none", "")[:4]
		lines = append(lines, crypttabLine{f[0], f[1], f[2], strings.Split(f[3], ",")})
	}
	return lines, nil
}

// uuid is what the line names its volume by, if it is a UUID.
func (l crypttabLine) uuid() string {
	return strings.Trim(strings.TrimPrefix(strings.TrimPrefix(l.source, "UUID="), "/dev/disk/by-uuid/"), `"`)
}

// names reports whether the line is about a volume.
func (l crypttabLine) names(v enroll.VolumeState) bool {
	if strings.EqualFold(l.uuid(), v.UUID) {
		return true
	}
	real, err := filepath.EvalSymlinks(l.source)
	if err != nil {
		return l.source == v.Device
	}
	device, err := filepath.EvalSymlinks(v.Device)
	return err == nil && real == device
}

// has returns the option of that name, or its beginning where it takes a value.
func (l crypttabLine) has(option string) string {
	for _, o := range l.options {
		if o == option || strings.HasSuffix(option, "=") && strings.HasPrefix(o, option) {
			return o
		}
	}
	return ""
}

func checkCrypttab(root string, s machineStatus) (findings []finding) {
	lines, err := readCrypttab(root)
	if err != nil {
		return []finding{{warning, "/etc/crypttab: " + err.Error(), ""}}
	}
	for _, v := range s.Volumes {
		if !v.Boot {
			continue
		}
		i := slices.IndexFunc(lines, func(l crypttabLine) bool { return l.names(v) })
		if i < 0 {
			findings = append(findings, finding{
				warning, "/etc/crypttab does not name volume " + v.UUID + ": nothing asks for its passphrase at boot, unless the kernel command line does",
				"add a line: NAME UUID=" + v.UUID + " none luks",
			})
			continue
		}
		findings = append(findings, checkCrypttabLine(lines[i])...)
		if l := lines[i]; !strings.EqualFold(l.uuid(), v.UUID) {
			findings = append(findings, finding{
				warning, "/etc/crypttab: " + l.name + " is " + l.source + ": another volume that has that name would be opened in its place, and mounted without a comparison",
				"write UUID=" + v.UUID + " in its place, then make the boot image anew",
			})
		}
	}
	return append(findings, checkResume(root, lines, s)...)
}

func checkCrypttabLine(l crypttabLine) (findings []finding) {
	const tell = "take it out of the line in /etc/crypttab, then make the boot image anew"
	if o := l.has("noauto"); o != "" {
		findings = append(findings, finding{warning, "/etc/crypttab: " + l.name + " has noauto: it is not opened at boot", tell})
	}
	if o := l.has("keyscript="); o != "" {
		findings = append(findings, finding{problem, "/etc/crypttab: " + l.name + " has " + o + ": that program is asked for the passphrase, and nobody asks us", tell})
	}
	if l.key != "none" && l.key != "-" && l.key != "" {
		findings = append(findings, finding{warning, "/etc/crypttab: " + l.name + " is opened with the file " + l.key + ": no server is asked", "write none in its place if servers are to decide"})
	}
	return findings
}

// checkResume looks for hibernation to an enrolled volume: the memory that it
// reads back ends the boot before anything is compared.
func checkResume(root string, lines []crypttabLine, s machineStatus) []finding {
	var words []string
	if line, _, err := kernelCommandLine(root); err == nil {
		words = strings.Fields(line)
	}
	if text, err := os.ReadFile(filepath.Join(root, "etc/initramfs-tools/conf.d/resume")); err == nil {
		words = append(words, strings.Fields(strings.ReplaceAll(string(text), "RESUME=", "resume="))...)
	}
	for _, word := range words {
		device, ok := strings.CutPrefix(word, "resume=")
		for _, l := range lines {
			if !ok || device != "/dev/mapper/"+l.name || !slices.ContainsFunc(s.Volumes, func(v enroll.VolumeState) bool { return v.Boot && l.names(v) }) {
				continue
			}
			return []finding{{
				warning, device + " is enrolled, and the machine resumes from it: hibernation writes all memory to it, with the keys of every open volume",
				"turn hibernation off, or unenroll that volume: a machine that resumes unattended gives its memory to whoever has it",
			}}
		}
	}
	return nil
}

func checkLastBoot(s machineStatus) (findings []finding) {
	if s.LastBoot == nil {
		return []finding{{warning, "the boot program left no report of this boot", "did the machine boot since it was enrolled, and without mandos-escrow=off? then look at the images above"}}
	}
	if s.LastBoot.Fault != "" {
		findings = append(findings, finding{problem, "the boot program could not work: " + s.LastBoot.Fault, ""})
	}
	for _, v := range s.LastBoot.Volumes {
		text := "last boot: volume " + v.UUID + " " + string(v.Outcome)
		if v.Reason != "" {
			text += ": " + v.Reason
		}
		switch v.Outcome {
		case unlock.Rejected:
			findings = append(findings, finding{problem, text, "its boot passphrase opens it no more: run mandos-escrow enroll again, with a new token"})
		case unlock.Mismatched:
			findings = append(findings, finding{problem, text, "if nobody re-encrypted or formatted it, somebody exchanged the disk: find out who before you enroll it again"})
		case unlock.Unanswered:
			findings = append(findings, finding{warning, text, "is the server up, the machine enabled there (machine show), and the network of the boot image right (docs/boot.md)"})
		default:
			findings = append(findings, finding{Level: fine, Text: text})
		}
	}
	return findings
}

// checkSwap looks for swap that is not encrypted: memory that could not be
// locked ends there.
func checkSwap(root string) (findings []finding) {
	areas, err := swapAreas(root)
	if err != nil {
		return []finding{{warning, "swap: " + err.Error(), ""}}
	}
	for _, area := range areas {
		if root == "/" && !plainBlock(area) || root != "/" && strings.HasPrefix(area, "/dev/mapper/") {
			continue
		}
		findings = append(findings, finding{
			warning, "swap on " + area + " is not encrypted, as far as can be seen: passphrases in memory may end there",
			"put it on an encrypted volume, or give it a random key: a line with /dev/urandom and swap in /etc/crypttab",
		})
	}
	return findings
}

func swapAreas(root string) (areas []string, err error) {
	path, isSwap := "/proc/swaps", func(f []string) bool { return f[0] != "Filename" && f[1] == "partition" }
	if root != "/" {
		path, isSwap = filepath.Join(root, "etc/fstab"), func(f []string) bool { return len(f) > 2 && f[2] == "swap" && f[0][0] != '#' }
	}
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for l := range strings.Lines(string(text)) {
		if f := strings.Fields(l); len(f) > 1 && isSwap(f) {
			areas = append(areas, f[0])
		}
	}
	return areas, nil
}

// plainBlock reports whether neither a block device nor anything below it is
// dm-crypt; zram is memory.
func plainBlock(device string) bool {
	real, err := filepath.EvalSymlinks(device)
	if err != nil {
		return true
	}
	name := filepath.Base(real)
	if strings.HasPrefix(name, "zram") {
		return false
	}
	if uuid, err := os.ReadFile(filepath.Join("/sys/class/block", name, "dm/uuid")); err == nil && strings.HasPrefix(string(uuid), "CRYPT-") {
		return false
	}
	below, err := os.ReadDir(filepath.Join("/sys/class/block", name, "slaves"))
	if err != nil || len(below) == 0 {
		return true
	}
	return slices.ContainsFunc(below, func(e os.DirEntry) bool { return plainBlock("/dev/" + e.Name()) })
}
