package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

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

const usage = `Usage: mandos-escrow-unlock [--config DIR] [--volume UUID] --print [--once]

Asks this machine's servers for the boot passphrase of an encrypted volume, and
tries again until enough of them release it.

  --config DIR   configuration directory (default /etc/mandos-escrow)
  --print        write exactly the passphrase's bytes to standard output
  --once         ask each server one time, then give up
  --volume UUID  the volume, when several are enrolled
  --version      print the version
  --help         print this help

Exit codes: 0 done, 1 failed, 2 usage, 4 the volume is not the one that was
enrolled, 5 damaged configuration or blob, 7 refused by so many servers that
the others cannot make up for it (--once).
`

type options struct {
	config, volume              string
	print, once, help, printVer bool
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
	if err := fetch(ctx, opts, stdout, say); err != nil {
		say("%v", err)
		return exitCode(err)
	}
	return exitDone
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("mandos-escrow-unlock", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.config, "config", "/etc/mandos-escrow", "")
	flags.StringVar(&o.volume, "volume", "", "")
	flags.BoolVar(&o.print, "print", false, "")
	flags.BoolVar(&o.once, "once", false, "")
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
	case !o.print && !o.printVer:
		return o, fmt.Errorf("%w: without --print there is nobody to hand the passphrase to: this build only prints", errUsage)
	}
	return o, nil
}

// fetch compares the volume before it asks and again before it prints: what
// lies there may have been exchanged while an approval was waited for.
func fetch(ctx context.Context, o options, stdout io.Writer, say func(string, ...any)) error {
	config, keys, err := load(o.config)
	if err != nil {
		return err
	}
	volume, err := choose(config.Volumes, o.volume)
	if err != nil {
		return err
	}
	if err := systemDevices.check(volume); errors.Is(err, errNotFound) {
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
	if err := systemDevices.check(volume); err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	if _, err := stdout.Write(result.Passphrases[volume.UUID]); err != nil {
		return fmt.Errorf("write the passphrase: %w", err)
	}
	return nil
}

// load reads the configuration directory.
func load(dir string) (*unlock.Config, unlock.Keys, error) {
	var files [3][]byte
	for i, name := range []string{unlock.ConfigFile, unlock.TLSPrivateKeyFile, unlock.PrivateKeyFile} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, unlock.Keys{}, fmt.Errorf("read configuration: %w", err)
		}
		defer secret.Wipe(data)
		files[i] = data
	}
	config, err := unlock.ParseConfig(files[0])
	if err != nil {
		return nil, unlock.Keys{}, fmt.Errorf("%s: %w", filepath.Join(dir, unlock.ConfigFile), err)
	}
	keys, err := config.ParseKeys(files[1], files[2])
	if err != nil {
		return nil, unlock.Keys{}, fmt.Errorf("%s: %w", dir, err)
	}
	return config, keys, nil
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
		text := brief(err)
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
	case errors.Is(err, errMismatch):
		return exitMismatch
	case errors.Is(err, unlock.ErrConfig), errors.Is(err, unlock.ErrBlob):
		return exitIntegrity
	case errors.Is(err, unlock.ErrRefused):
		return exitRefused
	}
	return exitFailed
}
