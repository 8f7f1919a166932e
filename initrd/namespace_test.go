package initrd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// namespaceOf names, in the environment, the test that runs in a namespace.
const namespaceOf = "INITRD_TEST_NAMESPACE"

// inNamespace runs the calling test once more in a network namespace of its own, with a process that is root in it and nowhere else, so that it
// needs no rights. It is true in that process; elsewhere the test is over when it returns.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceOf) == t.Name() {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), namespaceOf+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("in a user and network namespace (user.max_user_namespaces, iproute2): %v\n%s", err, out)
	}
	return false
}

// ip runs ip(8), which comes with iproute2.
func ip(t *testing.T, command string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", command, err, out)
	}
}

// elsewhere is a second network namespace: the other end of a cable. Its thread lives in it.
type elsewhere struct {
	do     chan func()
	thread int
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	e := &elsewhere{do: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		e.thread = unix.Gettid()
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range e.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(e.do) })
	return e
}

// run runs f there.
func (e *elsewhere) run(f func()) {
	done := make(chan struct{})
	e.do <- func() { defer close(done); f() }
	<-done
}

func (e *elsewhere) ip(t *testing.T, command string) {
	t.Helper()
	e.run(func() { ip(t, command) })
}

// cable makes a link, down and without anything, whose other end is elsewhere and up.
func (e *elsewhere) cable(t *testing.T, name, other string) {
	t.Helper()
	ip(t, fmt.Sprintf("link add %s type veth peer name %s", name, other))
	ip(t, fmt.Sprintf("link set %s netns %d", other, e.thread))
	e.ip(t, "link set "+other+" up")
}

// index is that of a link here.
func index(t *testing.T, name string) int {
	t.Helper()
	links, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	l, ok := find(links, name)
	if !ok {
		t.Fatalf("no link %s", name)
	}
	return l.index
}

// state is what is to be left as it was: links, addresses, routes, and the sysctls that we set. What the kernel counts or picks by itself, such
// as a queueing discipline that is attached when a link first comes up, is left out.
func state(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	for _, command := range []string{"-j addr", "-j route show table all", "-j -6 route show table all"} {
		out, err := exec.Command("ip", strings.Fields(command)...).Output()
		if err != nil {
			t.Fatalf("ip %s: %v", command, err)
		}
		var list []map[string]any
		if err := json.Unmarshal(bytes.TrimSpace(out), &list); len(bytes.TrimSpace(out)) > 0 && err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
		for _, item := range list {
			for _, key := range []string{"qdisc", "operstate", "expires", "link_index"} {
				delete(item, key)
			}
			line, _ := json.Marshal(item)
			fmt.Fprintf(&text, "%s\n", line)
		}
	}
	links, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		value, _ := os.ReadFile("/proc/sys/net/ipv6/conf/" + l.name + "/accept_dad")
		fmt.Fprintf(&text, "%s accept_dad %s", l.name, value)
	}
	return text.String()
}

// trial is a network that is brought up in a test, and what it reported.
type trial struct {
	*Network
	mu      sync.Mutex
	reports []string
}

func testSystem(t *testing.T) system {
	t.Helper()
	s := realSystem
	s.udev = t.TempDir()
	s.resolv = t.TempDir() + "/resolv.conf"
	return s
}

func start(t *testing.T, s system, o NetworkOptions) *trial {
	t.Helper()
	n := &trial{}
	o.Report = func(format string, a ...any) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.reports = append(n.reports, fmt.Sprintf(format, a...))
	}
	n.Network = startNetwork(t.Context(), o, s)
	return n
}

func (n *trial) reported(part string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.reports, func(r string) bool { return strings.Contains(r, part) })
}

// until waits for something that the network brings about; it looks again whenever that changes.
func (n *trial) until(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(90 * time.Second)
	for {
		changed := n.Changed()
		if done() {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // not all that is waited for is a change of links
		case <-deadline:
			n.mu.Lock()
			defer n.mu.Unlock()
			out, _ := exec.Command("ip", "addr").CombinedOutput()
			t.Fatalf("not in time: %s\n%s\n%s", what, strings.Join(n.reports, "\n"), out)
		}
	}
}

// end stops the network, and wants everything as it was before.
func (n *trial) end(t *testing.T, before string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
	if after := state(t); after != before {
		t.Errorf("not left as it was found; before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Lstat(n.system.resolv); err == nil {
		t.Error("resolv.conf is still there")
	}
}

// has says whether a link has a usable address that begins so.
func has(t *testing.T, name, prefix string) bool {
	t.Helper()
	addresses, err := listAddresses()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(of(addresses, index(t, name)), func(a address) bool {
		return a.usable() && strings.HasPrefix(a.prefix.String(), prefix)
	})
}

func isUp(t *testing.T, name string) bool {
	t.Helper()
	links, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	l, ok := find(links, name)
	return ok && l.up()
}
