//go:build vm

package testvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Made once by TestMain, for all tests.
var (
	programs string // folder with the programs under test and the guests' two
	kernel   *Kernel
)

func TestMain(m *testing.M) {
	// Where root's shell lacks them, the tools are still there.
	code, err := 1, os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	if err == nil {
		code, err = prepareAndRun(m)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

func prepareAndRun(m *testing.M) (int, error) {
	if err := CheckHost(); err != nil {
		return 1, err
	}
	cache, err := CacheDir()
	if err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if kernel, err = FindKernel(ctx, cache); err != nil {
		return 1, err
	}
	removeLeftovers(filepath.Join(os.TempDir(), "testvm-*"), os.Geteuid(), time.Now().Add(-leftoverAge))
	if programs, err = os.MkdirTemp("", "testvm-"); err != nil {
		return 1, err
	}
	defer func() { _ = os.RemoveAll(programs) }()
	// The tests' own folders go there too, so that a killed run leaves only this.
	if err := os.Setenv("TMPDIR", programs); err != nil {
		return 1, err
	}
	for _, pkg := range []string{"cmd/mandos-escrow", "cmd/mandos-escrow-unlock", "testvm/init", "testvm/rootinit"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", programs, "mandos-escrow/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	return m.Run(), nil
}
