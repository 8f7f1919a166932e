package server

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

const (
	processState  = "SERVER_TEST_STATE"
	processOffset = "SERVER_TEST_OFFSET"
)

// TestServerProcess is a server of its own when a test started it as one.
func TestServerProcess(t *testing.T) {
	dir := os.Getenv(processState)
	if dir == "" {
		return
	}
	offset := must(time.ParseDuration(os.Getenv(processOffset)))
	state := must(OpenState(dir))
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := New(state, log, func() time.Time { return time.Now().Add(offset) }).Run(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// process is a server in a process that can be killed.
type process struct {
	cmd *exec.Cmd
	log *logs
}

func (s *site) startProcess(offset time.Duration) *process {
	s.t.Helper()
	p := &process{exec.Command(must(os.Executable()), "-test.run=^TestServerProcess$"), &logs{}}
	p.cmd.Env = append(os.Environ(), processState+"="+s.dir, fmt.Sprintf("%s=%s", processOffset, offset))
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(p.kill)
	awaitServer(s.t, s.control)
	return p
}

// kill is kill -9, and waits.
func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// TestNothingRevives: a machine that was disabled, denied, removed or timed
// out gets nothing, after kill -9 and with the clock ten years back or ahead.
func TestNothingRevives(t *testing.T) {
	s := newSite(t)
	volume := func(n int) string { return strings.Replace(siteVolume, "0f1e", fmt.Sprintf("%04x", n), 1) }
	good, disabled, denied := s.enroll("good", volume(1)), s.enroll("disabled", volume(2)), s.enroll("denied", volume(3))
	removed, timedOut := s.enroll("removed", volume(4)), s.enroll("timed out", volume(5))
	s.stop() // from here on a process of its own serves
	p := s.startProcess(0)
	no, hour, second := false, unlock.Duration(time.Hour), unlock.Duration(time.Second)
	for _, h := range []*host{good, disabled, denied, removed, timedOut} {
		if reply, _ := s.boot(h); !reply.Released || string(reply.Blobs[0]) != "a sealed blob of "+h.name {
			t.Fatalf("%s did not boot", h.name)
		}
	}
	s.change(timedOut, api.Change{Set: &api.MachineSettings{Timeout: &second}})
	time.Sleep(1100 * time.Millisecond)
	s.boot(timedOut)
	s.change(disabled, api.Change{Enable: &no})
	s.change(denied, api.Change{Set: &api.MachineSettings{ApprovalDuration: &hour}})
	s.change(denied, api.Change{Approve: &no})
	s.change(removed, api.Change{Remove: true})
	refused := func(p *process) {
		t.Helper()
		for _, h := range []*host{disabled, denied, removed, timedOut} {
			if reply, data := s.boot(h); reply.Released || strings.Contains(string(data), "blob") {
				t.Errorf("%s was given %q", h.name, data)
			}
		}
		for h, why := range map[*host]string{disabled: "why=disabled", denied: "why=denied", removed: `why="unknown key"`, timedOut: "why=disabled"} {
			if line := "machine=" + h.boot.KeyID().Short() + " " + why; !strings.Contains(p.log.String(), line) {
				t.Errorf("%s: no %q in the log", h.name, line)
			}
		}
	}
	p.kill() // the moment that the last call returned
	const decade = 10 * 365 * 24 * time.Hour
	for _, offset := range []time.Duration{0, -decade, 0} {
		p = s.startProcess(offset)
		refused(p)
		if offset == 0 {
			if reply, _ := s.boot(good); !reply.Released {
				t.Error("a machine that nothing happened to does not boot")
			}
		}
		p.kill()
	}
	s.startProcess(decade)
	for _, h := range []*host{disabled, removed, timedOut} {
		if reply, _ := s.boot(h); reply.Released {
			t.Errorf("%s was revived by a clock that is ahead", h.name)
		}
	}
}

// What was answered is on disk, whenever the process dies: all of it, and at
// most the one change that was under way besides.
func TestKilledAtRandom(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	changes := func() int {
		n := 0
		for _, action := range s.actions(string(h.boot.KeyID())) {
			if action == "machine.enable" || action == "machine.disable" {
				n++
			}
		}
		return n
	}
	s.stop()
	enabled, answered := true, 0
	for round := range 6 {
		p := s.startProcess(0)
		timer := time.AfterFunc(time.Duration(1+round*7)*time.Millisecond, func() { _ = p.cmd.Process.Kill() })
		for {
			next := !enabled
			change := api.Change{Machines: []string{string(h.boot.KeyID())}, Enable: &next}
			if err := s.control.Call(t.Context(), "POST", "/v1/machines", change, nil); err != nil {
				break
			}
			enabled, answered = next, answered+1
		}
		timer.Stop()
		p.kill()
		p = s.startProcess(0)
		switch n := changes(); n {
		case answered:
		case answered + 1:
			enabled, answered = !enabled, n
		default:
			t.Fatalf("round %d: %d changes are on disk, %d were answered", round, n, answered)
		}
		if reply, _ := s.boot(h); reply.Released != enabled {
			t.Fatalf("round %d: released %t, enabled %t", round, reply.Released, enabled)
		}
		p.kill()
	}
	if answered == 0 {
		t.Error("nothing was changed at all")
	}
}
