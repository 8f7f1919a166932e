package enroll

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/luks/cryptsetup"
)

// childVariable makes the test binary an enrolling process that can be killed.
const childVariable = "MANDOS_ESCROW_TEST_ENROLL"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	if os.Getenv(bootVariable) != "" {
		os.Exit(bootChild())
	}
	code := m.Run()
	if shared != nil {
		shared.stop()
		os.RemoveAll(filepath.Dir(shared.dir))
	}
	os.Exit(code)
}

// job is one run of the transaction.
type job struct {
	Token      string
	Root       string
	Devices    []string
	Passphrase []byte
	Remove     bool
	NoBoot     bool
	Name       string
	Cryptsetup string // another program in place of cryptsetup
	Kill       int    // at which checkpoint, from 1; 0: never

	Unenroll bool // the other way; of what is above, Root, Passphrase, Cryptsetup and Kill count
	New      []byte
	Offline  bool
	Locate   []string // --device
	Forget   []string

	Rotate      bool // of what is above, all but Remove, NoBoot and Name count; without Token what was kept does
	Due         bool
	Reencrypted bool
	Program     string
}

func (j job) rotating() (RotateOptions, error) {
	o := RotateOptions{
		Root: j.Root, Devices: j.Locate, Passphrase: j.Passphrase, Due: j.Due, Reencrypted: j.Reencrypted, Program: j.Program,
		Tool: cryptsetup.Tool{Path: j.Cryptsetup}, Now: time.Now, Progress: func(string, ...any) {},
	}
	if j.Token == "" {
		return o, nil
	}
	token, err := api.ParseToken([]byte(j.Token))
	o.Token = token
	return o, err
}

func (j job) unenrolling() UnenrollOptions {
	return UnenrollOptions{
		Root: j.Root, Devices: j.Locate, Forget: j.Forget, Passphrase: j.Passphrase, NewPassphrase: j.New, Offline: j.Offline,
		Tool: cryptsetup.Tool{Path: j.Cryptsetup}, Progress: func(string, ...any) {}, Image: j.image,
	}
}

// image stands for the boot image: a file that is there until it is made anew
// without us.
func (j job) image(context.Context) error {
	if _, err := os.Lstat(filepath.Join(j.Root, BootFolder)); err == nil {
		return errors.New("the boot image was made anew too early")
	}
	return os.RemoveAll(filepath.Join(j.Root, "image"))
}

func (j job) options() (Options, error) {
	token, err := api.ParseToken([]byte(j.Token))
	return Options{
		Token: token, Root: j.Root, Devices: j.Devices, Passphrase: j.Passphrase, RemovePassphrase: j.Remove, NoBoot: j.NoBoot,
		Name: j.Name, Tool: cryptsetup.Tool{Path: j.Cryptsetup}, Now: time.Now, Progress: func(string, ...any) {},
	}, err
}

// child reads a job from standard input, and writes each checkpoint that it
// reaches to standard output.
func child() int {
	var j job
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	n := 0
	checkpoint := func(step string) {
		fmt.Println(step)
		if n++; n == j.Kill {
			if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
				panic(err)
			}
			select {}
		}
	}
	if err := j.run(checkpoint); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (j job) run(checkpoint func(string)) error {
	if j.Unenroll {
		o := j.unenrolling()
		o.Checkpoint = checkpoint
		_, err := Unenroll(context.Background(), o)
		return err
	}
	if j.Rotate {
		o, err := j.rotating()
		if err != nil {
			return err
		}
		o.Checkpoint = checkpoint
		_, err = Rotate(context.Background(), o)
		return err
	}
	o, err := j.options()
	if err != nil {
		return err
	}
	o.Checkpoint = checkpoint
	_, err = Run(context.Background(), o)
	return err
}

// spawn starts a job in a process of its own.
func spawn(t *testing.T, j job) (cmd *exec.Cmd, stdout *bytes.Buffer) {
	t.Helper()
	input, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(self)
	cmd.Env = append(os.Environ(), childVariable+"=1")
	stdout = &bytes.Buffer{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, stdout
}

// runKilled runs a job that kills itself, and returns the checkpoints that it
// reached. killed is false when it came to its end before.
func runKilled(t *testing.T, j job) (steps []string, killed bool) {
	t.Helper()
	cmd, stdout := spawn(t, j)
	err := cmd.Wait()
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		steps = append(steps, lines.Text())
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return steps, false
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return steps, true
	}
	t.Fatalf("after %s: %v", strings.Join(steps, ", "), err)
	return nil, false
}

// run runs a job in this process.
func run(t *testing.T, j job) ([]Result, error) {
	t.Helper()
	o, err := j.options()
	if err != nil {
		t.Fatal(err)
	}
	return Run(t.Context(), o)
}

func mustRun(t *testing.T, j job) []Result {
	t.Helper()
	results, err := run(t, j)
	if err != nil {
		t.Fatal(err)
	}
	return results
}
