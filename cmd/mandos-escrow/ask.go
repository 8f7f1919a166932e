package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxLine bounds what is typed at a prompt.
const maxLine = 1000

// ask reads a line from the terminal without showing it.
func (g *globals) ask(prompt, flag string) ([]byte, error) { return g.prompt(prompt, flag, false) }

// askLine reads a line from the terminal, shown as it is typed.
func (g *globals) askLine(prompt, flag string) (string, error) {
	line, err := g.prompt(prompt, flag, true)
	return string(line), err
}

// atTerminal reports whether a person is there to be asked.
func atTerminal() bool {
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	return err == nil
}

func (g *globals) prompt(prompt, flag string, show bool) ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, usage("there is no terminal to ask on: give %s", flag)
	}
	defer tty.Close()
	if !show {
		// before the prompt stands there, so that nothing typed early is shown
		before, err := hideTyping(tty)
		if err != nil {
			return nil, fmt.Errorf("terminal: %w", err)
		}
		defer func() {
			_ = unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETSF, before)
			fmt.Fprintln(tty)
		}()
	}
	fmt.Fprint(tty, prompt)
	return readLine(g.ctx, tty)
}

func hideTyping(tty *os.File) (*unix.Termios, error) {
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		return nil, err
	}
	hidden := *before
	hidden.Lflag &^= unix.ECHO
	return before, unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, &hidden)
}

// readLine reads up to a newline, which it drops; Ctrl-C ends it.
func readLine(ctx context.Context, tty io.Reader) ([]byte, error) {
	type answer struct {
		line []byte
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		line := make([]byte, 0, maxLine) // so that it is never copied
		for b := make([]byte, 1); len(line) < maxLine; {
			if _, err := tty.Read(b); err != nil && !(errors.Is(err, io.EOF) && len(line) > 0) {
				done <- answer{nil, fmt.Errorf("read from the terminal: %w", err)}
				return
			} else if err != nil || b[0] == '\n' {
				break
			}
			line = append(line, b[0])
		}
		done <- answer{line, nil}
	}()
	select {
	case a := <-done:
		return a.line, a.err
	case <-ctx.Done():
		return nil, errors.New("interrupted; nothing was changed")
	}
}
