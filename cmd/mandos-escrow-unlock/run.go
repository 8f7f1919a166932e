package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// Version is set by the linker.
var Version = "devel"

// Exit codes.
const (
	exitDone      = 0
	exitFailed    = 1
	exitUsage     = 2
	exitMismatch  = 4
	exitIntegrity = 5
	exitRefused   = 7
)

const usage = `Usage: mandos-escrow-unlock [--config DIR]
       mandos-escrow-unlock [--config DIR] --check-mapped
       mandos-escrow-unlock [--config DIR] [--volume UUID] --print [--once]

In the initramfs, beside the prompt: waits until somebody asks for the passphrase
of an enrolled volume (cryptsetup-initramfs, or systemd-cryptsetup), asks this
machine's servers for it, again and again until enough of them release it, and
answers. Ends when all enrolled volumes are open.

  --config DIR    configuration directory (default /etc/mandos-escrow)
  --check-mapped  compare what was opened with what was enrolled; remove what differs
  --print         only ask the servers, and write exactly the passphrase's bytes to
                  standard output
  --once          with --print: ask each server one time, then give up
  --volume UUID   with --print: the volume, when several are enrolled
  --version       print the version
  --help          print this help

Exit codes: 0 done, 1 failed, 2 usage, 4 the volume is not the one that was
enrolled, 5 damaged configuration or blob, 7 refused by so many servers that
the others cannot make up for it (--once). mandos-escrow=off on the kernel
command line: does nothing, exit code 0 (but with --print).
`

type options struct {
	config, volume                           string
	print, once, checkMapped, help, printVer bool
}

var errUsage = errors.New("usage")

// run is the whole program but the process; its result is the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	say := func(format string, a ...any) { fmt.Fprintf(stderr, "mandos-escrow-unlock: "+format+"\n", a...) }
	if err := secret.Harden(); err != nil {
		say("%v", err)
		return exitFailed
	}
	opts, err := parse(args)
	switch {
	case err != nil:
		say("%v; see --help", err)
		return exitUsage
	case opts.help:
		fmt.Fprint(stdout, usage)
		return exitDone
	case opts.printVer:
		fmt.Fprintln(stdout, "mandos-escrow-unlock", Version)
		return exitDone
	}
	if err := act(ctx, opts, stdout, say); err != nil {
		say("%v", err)
		return exitCode(err)
	}
	return exitDone
}

func act(ctx context.Context, o options, stdout io.Writer, say func(string, ...any)) error {
	boot := initrd.Options{Config: o.config, Say: say, Failed: reporter(say)}
	switch {
	case o.print:
		return fetch(ctx, o, stdout, say)
	case o.checkMapped:
		return initrd.CheckMapped(boot)
	}
	return initrd.Run(ctx, boot)
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("mandos-escrow-unlock", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.config, "config", "/etc/mandos-escrow", "")
	flags.StringVar(&o.volume, "volume", "", "")
	flags.BoolVar(&o.print, "print", false, "")
	flags.BoolVar(&o.once, "once", false, "")
	flags.BoolVar(&o.checkMapped, "check-mapped", false, "")
	flags.BoolVar(&o.printVer, "version", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		o.help = true
		return o, nil
	case err != nil:
		return o, fmt.Errorf("%w: %w", errUsage, err)
	case flags.NArg() > 0:
		return o, fmt.Errorf("%w: unexpected argument %q", errUsage, flags.Arg(0))
	case o.print && o.checkMapped:
		return o, fmt.Errorf("%w: --print and --check-mapped are two things to do", errUsage)
	case !o.print && (o.once || o.volume != ""):
		return o, fmt.Errorf("%w: --once and --volume go with --print", errUsage)
	}
	return o, nil
}

// fetch compares the volume before it asks and again before it prints: what
// lies there may have been exchanged while an approval was waited for.
func fetch(ctx context.Context, o options, stdout io.Writer, say func(string, ...any)) error {
	config, keys, err := initrd.Load(o.config)
	if err != nil {
		return err
	}
	volume, err := choose(config.Volumes, o.volume)
	if err != nil {
		return err
	}
	if err := initrd.CheckVolume(volume); errors.Is(err, initrd.ErrNotFound) {
		say("warning: %v, so its header was not compared with what was enrolled", err)
	} else if err != nil {
		return err
	}
	client := &unlock.Client{Config: config, Keys: keys, Volumes: []string{volume.UUID}, Report: reporter(say)}
	ask := client.Run
	if o.once {
		ask = client.Fetch
	}
	result, err := ask(ctx)
	if err != nil {
		return fmt.Errorf("volume %s: %w", volume.UUID, err)
	}
	defer result.Wipe()
	if err := initrd.CheckVolume(volume); err != nil && !errors.Is(err, initrd.ErrNotFound) {
		return err
	}
	if _, err := stdout.Write(result.Passphrases[volume.UUID]); err != nil {
		return fmt.Errorf("write the passphrase: %w", err)
	}
	return nil
}

func choose(volumes []unlock.Volume, uuid string) (unlock.Volume, error) {
	if uuid == "" && len(volumes) == 1 {
		return volumes[0], nil
	}
	var enrolled []string
	for _, v := range volumes {
		if v.UUID == uuid {
			return v, nil
		}
		enrolled = append(enrolled, v.UUID)
	}
	list := strings.Join(enrolled, ", ")
	if uuid == "" {
		return unlock.Volume{}, fmt.Errorf("%w: several volumes are enrolled, name one with --volume: %s", errUsage, list)
	}
	return unlock.Volume{}, fmt.Errorf("%w: volume %s is not enrolled here, only %s", errUsage, uuid, list)
}

// reporter says what each server did, and not again until that changes.
func reporter(say func(string, ...any)) func(unlock.Server, error) {
	last := map[string]string{}
	return func(s unlock.Server, err error) {
		text := initrd.Brief(err)
		if last[string(s.KeyID)] != text {
			last[string(s.KeyID)] = text
			say("server %s: %s", s.Name, text)
		}
	}
}

func exitCode(err error) int {
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, initrd.ErrMismatch):
		return exitMismatch
	case errors.Is(err, unlock.ErrConfig), errors.Is(err, unlock.ErrBlob):
		return exitIntegrity
	case errors.Is(err, unlock.ErrRefused):
		return exitRefused
	}
	return exitFailed
}
