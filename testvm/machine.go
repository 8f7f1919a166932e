package testvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Errors of a machine that will not get to its end.
var (
	ErrPanic = errors.New("testvm: the guest's kernel panicked, or qemu could not run it")
	ErrEnded = errors.New("testvm: the machine ended first")
)

// Machine is one virtual machine: one CPU, disks, a network port, and its
// serial console in a buffer. The fields are set before Start.
type Machine struct {
	Kernel  string   // path of vmlinuz
	Initrd  string   // path of the initramfs
	Disks   []string // paths of the raw images that are /dev/vda, /dev/vdb...
	Memory  int      // MiB
	Port    *Port    // network
	Append  []string // words for the kernel command line
	Console Console
	Started time.Time // set by Start

	cmd  *exec.Cmd
	keys io.WriteCloser // what is typed on the serial line
	done chan struct{}  // closed when qemu has ended
	err  error          // how it ended; read after done
}

// Start starts qemu. $MANDOS_ESCROW_TESTVM_ACCEL names its accelerator. The
// default is tcg, which runs the CPU in software: it is the same everywhere,
// and some kvm devices cannot run a stock kernel.
func (m *Machine) Start() error {
	accel, cpu := os.Getenv("MANDOS_ESCROW_TESTVM_ACCEL"), "host"
	if accel == "" || accel == "tcg" {
		accel, cpu = "tcg", "max"
	}
	// On a busy host a software CPU stands still for seconds, which is no fault.
	words := append([]string{
		"console=ttyS0", "quiet", "panic=-1", "random.trust_cpu=on",
		"nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1",
	}, m.Append...)
	argv := []string{
		"qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-machine", "q35,accel=" + accel, "-cpu", cpu, "-smp", "1", "-m", fmt.Sprint(m.Memory),
		"-kernel", m.Kernel, "-initrd", m.Initrd, "-append", strings.Join(words, " "),
		"-netdev", "tap,id=lan,script=no,downscript=no,ifname=" + m.Port.tap,
		"-device", "virtio-net-pci,netdev=lan,romfile=,mac=" + m.Port.mac,
		"-device", "virtio-rng-pci",
	}
	for n, disk := range m.Disks {
		id := fmt.Sprintf("disk%d", n)
		argv = append(argv, "-drive", "if=none,id="+id+",format=raw,cache=unsafe,file="+strings.ReplaceAll(disk, ",", ",,"),
			"-device", "virtio-blk-pci,drive="+id)
	}
	m.cmd = inNamespace(context.Background(), m.Port.lan.guests, argv...)
	m.cmd.Stdout, m.cmd.Stderr = &m.Console, &m.Console
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	keys, err := m.cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("testvm: start qemu: %w", err)
	}
	m.keys = keys
	if err := m.cmd.Start(); err != nil {
		return fmt.Errorf("testvm: start qemu: %w", err)
	}
	m.Started = time.Now()
	m.done = make(chan struct{})
	go func() {
		m.err = m.cmd.Wait()
		close(m.done)
	}()
	return nil
}

// Type types a line on the serial console, which need not show it.
func (m *Machine) Type(line string) error {
	if _, err := io.WriteString(m.keys, line+"\r"); err != nil {
		return fmt.Errorf("testvm: type on the console: %w", err)
	}
	return nil
}

// WaitFor returns when the console shows one of the texts. A machine that ends
// or panics before that is an error.
func (m *Machine) WaitFor(ctx context.Context, texts ...string) error {
	return m.waitUntil(ctx, fmt.Sprintf("%q", texts), func() bool { return slices.ContainsFunc(texts, m.Console.Contains) })
}

// WaitForCount returns when the console has shown text n times.
func (m *Machine) WaitForCount(ctx context.Context, n int, text string) error {
	return m.waitUntil(ctx, fmt.Sprintf("%q, %d times", text, n), func() bool { return strings.Count(m.Console.String(), text) >= n })
}

// waitUntil returns when the console shows what is wanted.
func (m *Machine) waitUntil(ctx context.Context, want string, shown func() bool) error {
	for {
		changed := m.Console.changed()
		switch {
		case shown():
			return nil
		case m.Console.broken():
			return ErrPanic
		}
		select {
		case <-changed:
		case <-m.done:
			// All output was copied before done was closed.
			if shown() {
				return nil
			}
			return fmt.Errorf("waiting for %s: %w", want, errors.Join(ErrEnded, m.err))
		case <-ctx.Done():
			return fmt.Errorf("testvm: waiting for %s: %w", want, ctx.Err())
		}
	}
}

// Wait returns when the machine has powered itself off.
func (m *Machine) Wait(ctx context.Context) error {
	for {
		changed := m.Console.changed()
		if m.Console.broken() {
			return ErrPanic
		}
		select {
		case <-changed:
		case <-m.done:
			if m.err != nil || m.Console.broken() {
				return fmt.Errorf("testvm: qemu: %w", errors.Join(m.err, ErrPanic))
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("testvm: waiting for power off: %w", ctx.Err())
		}
	}
}

// CPU is the time that a machine which has ended took of the host's processors.
func (m *Machine) CPU() time.Duration {
	<-m.done
	return m.cmd.ProcessState.UserTime() + m.cmd.ProcessState.SystemTime()
}

// Close kills the machine, if it still runs, and waits for its end.
func (m *Machine) Close() {
	if m.done == nil {
		return
	}
	// Fails only when it has ended, which is what is wanted.
	_ = m.cmd.Process.Kill()
	<-m.done
}
