package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// BenchmarkBoot is from exec to the passphrase, over loopback, with the
// program as it is shipped.
func BenchmarkBoot(b *testing.B) {
	f := newFixture(b)
	program := filepath.Join(b.TempDir(), "mandos-escrow-unlock")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	for b.Loop() {
		out, err := exec.Command(program, "--config", f.dir, "--print", "--once").Output()
		if err != nil || string(out) != f.passphrase {
			b.Fatalf("%q, %v", out, err)
		}
	}
	info, err := os.Stat(program)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(info.Size()), "bytes")
}
