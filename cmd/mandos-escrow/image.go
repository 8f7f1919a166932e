package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/unlock"
)

// detectSystem is replaced in tests, whose systems need no chroot.
var detectSystem = bootimage.Detect

// setUpImage installs the boot program into the images of a system. One that is
// unknown is said, and is no error: somebody does it by hand.
func setUpImage(ctx context.Context, g *globals, root string) error {
	s, err := detectSystem(root)
	if errors.Is(err, bootimage.ErrUnknown) {
		g.warn(err.Error())
		return nil
	}
	if err != nil {
		return err
	}
	s.Progress = g.progress
	images, err := s.Apply(ctx)
	if err != nil {
		return fmt.Errorf("the volumes are enrolled and escrowed, but the machine does not boot unattended yet: %w", err)
	}
	for _, image := range images {
		g.say("%s holds the boot program", image.Path)
	}
	return nil
}

// updateImage sees to it that the images hold what is enrolled now: also without
// the boot identity, when the last volume that booted unattended does so no more.
func updateImage(ctx context.Context, g *globals, o enrollOptions) error {
	_, err := os.Lstat(filepath.Join(o.root, config.BootFolder, unlock.ConfigFile))
	if !o.noBoot || err == nil {
		return setUpImage(ctx, g, o.root)
	}
	s, unknown := detectSystem(o.root)
	if _, missing := os.Lstat(filepath.Join(o.root, initrd.Program)); unknown != nil || missing != nil {
		return nil // there is no image of ours
	}
	images, err := s.Inspect(ctx)
	if err != nil {
		g.warn("whether a boot image still holds the boot identity was not found out: " + safe(err.Error()))
		return nil
	}
	if !slices.ContainsFunc(images, func(i bootimage.Image) bool { return errors.Is(i.Err, bootimage.ErrForbidden) }) {
		return nil
	}
	return takeOutOfImages(ctx, g, o.root)
}

// progress tells what is done, or what a program of the system says.
func (g *globals) progress(format string, args ...any) {
	g.say("%s", safe(fmt.Sprintf(format, args...)))
}

// failedTest is a test of which not all checks hold. Their errors give the exit
// code; their texts were printed.
type failedTest struct {
	failed, all int
	errs        []error
}

func (f failedTest) Error() string {
	return fmt.Sprintf("enroll --test: %d of %d checks failed: the next boot will not be unattended", f.failed, f.all)
}

func (f failedTest) Unwrap() []error { return f.errs }

// testBoot does what the next boot does, and looks into the images.
func testBoot(ctx context.Context, g *globals, o enrollOptions, enrolled []enroll.Result) error {
	program, err := bootimage.Program(o.root)
	if err != nil {
		return errors.Join(fmt.Errorf("enroll --test: %w", err), printTest(g, enrolled, nil))
	}
	checks, err := enroll.CheckBoot(ctx, enroll.CheckOptions{Root: o.root, Program: program})
	if err == nil && !o.noImage {
		var images []enroll.Check
		images, err = imageChecks(ctx, g, o.root)
		checks = append(checks, images...)
	}
	if printErr := printTest(g, enrolled, checks); printErr != nil {
		err = errors.Join(err, printErr)
	}
	if err != nil {
		return fmt.Errorf("enroll --test: %w", err)
	}
	result := failedTest{all: len(checks)}
	for _, c := range checks {
		if !c.OK {
			result.failed, result.errs = result.failed+1, append(result.errs, c.Err)
		}
	}
	if result.failed > 0 {
		return result
	}
	return nil
}

// imageChecks makes two checks of each image.
func imageChecks(ctx context.Context, g *globals, root string) ([]enroll.Check, error) {
	s, err := detectSystem(root)
	if errors.Is(err, bootimage.ErrUnknown) {
		return []enroll.Check{enroll.Outcome("image", root, "", fmt.Errorf("%w; --no-image leaves this check out", err))}, nil
	}
	if err != nil {
		return nil, err
	}
	s.Progress = g.progress
	images, err := s.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	var checks []enroll.Check
	for _, image := range images {
		if image.Path == "" {
			checks = append(checks, enroll.Outcome("image", "kernel "+image.Kernel, "", image.Err))
			continue
		}
		var contents, mode []error
		for _, fault := range image.Faults {
			if errors.Is(fault, bootimage.ErrReadable) {
				mode = append(mode, fault)
			} else {
				contents = append(contents, fault)
			}
		}
		checks = append(checks,
			enroll.Outcome("image", image.Path, "it holds the boot program and this machine's boot identity, and no other secret", errors.Join(contents...)),
			enroll.Outcome("mode", image.Path, fmt.Sprintf("only root can read it (mode %04o)", image.Mode), errors.Join(mode...)))
	}
	if len(images) == 0 {
		checks = append(checks, enroll.Outcome("image", root, "", errors.New("no kernel was found below /boot or /lib/modules")))
	}
	return checks, nil
}

// printTest prints a line for each check, or one JSON object.
func printTest(g *globals, enrolled []enroll.Result, checks []enroll.Check) error {
	if g.json {
		return g.printJSON(struct {
			Enrolled []enroll.Result `json:"enrolled,omitempty"`
			Checks   []enroll.Check  `json:"checks"`
		}{enrolled, append([]enroll.Check{}, checks...)})
	}
	for _, r := range enrolled {
		printEnrolled(g, r)
	}
	for _, c := range checks {
		verdict := "ok"
		if !c.OK {
			verdict = "FAILED"
		}
		fmt.Fprintf(g.out, "%-6s %s %s: %s\n", verdict, c.What, safe(c.Subject), safe(c.Detail))
	}
	return nil
}
