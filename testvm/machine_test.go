package testvm

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// ended is a machine that wrote text and whose qemu has ended with err.
func ended(text string, err error) *Machine {
	m := &Machine{done: make(chan struct{}), err: err}
	_, _ = fmt.Fprint(&m.Console, text)
	close(m.done)
	return m
}

func TestWaitFor(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       error
	}{
		{"text, then the end", "a marker\r\n", nil},
		{"the end without the text", "nothing\r\n", ErrEnded},
		{"a panic", "[    1.0] Kernel panic - not syncing: no init\r\n", ErrPanic},
		{"qemu cannot go on", "KVM internal error: emulation failure\n", ErrPanic},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := ended(test.text, nil).WaitFor(t.Context(), "marker\n"); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}

func TestWaitForSeesLaterOutput(t *testing.T) {
	m := &Machine{done: make(chan struct{})}
	go func() {
		for _, part := range []string{"ma", "rk", "er"} {
			time.Sleep(time.Millisecond)
			_, _ = fmt.Fprint(&m.Console, part)
		}
	}()
	if err := m.WaitFor(t.Context(), "marker"); err != nil {
		t.Fatal(err)
	}
}

func TestWaitForHasALimit(t *testing.T) {
	m := &Machine{done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := m.WaitFor(ctx, "marker"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestWait(t *testing.T) {
	if err := ended("done\n", nil).Wait(t.Context()); err != nil {
		t.Errorf("a power off: %v", err)
	}
	failure := errors.New("exit status 1")
	if err := ended("", failure).Wait(t.Context()); !errors.Is(err, failure) {
		t.Errorf("qemu that failed: %v", err)
	}
	if err := ended("Kernel panic - not syncing: x\n", nil).Wait(t.Context()); !errors.Is(err, ErrPanic) {
		t.Errorf("a panic: %v", err)
	}
}

func TestConsoleTail(t *testing.T) {
	m := ended("one\r\ntwo\r\nthree", nil)
	if got := m.Console.Tail(2); got != "two\nthree" {
		t.Errorf("got %q", got)
	}
}
