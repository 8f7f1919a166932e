package initrd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestHooks: they run before the links and after, in their order, with the environment of Mandos's, and one that hangs is killed with all that it
// started, while the links come up.
func TestHooks(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	dir := t.TempDir()
	log := filepath.Join(t.TempDir(), "log")
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	note := "#!/bin/sh\necho \"$(basename $0) $1 $MODE $DEVICE $VERBOSITY $DELAY $CONNECT $MANDOSNETHOOKDIR $(ip -o link show up dev eth0 | wc -l)\" >>" + log + "\n"
	write("10-first", note, 0o700)
	write("20-hangs", "#!/bin/sh\nif [ $1 = start ]; then sleep 1000 & wait; fi\n", 0o700)
	write("30-fails", note+"exit 3\n", 0o700)
	write("40-no-program", "neither ELF nor script", 0o700)
	write("50-configuration", note, 0o600)
	write("60 backup~", note, 0o700)
	if err := os.Mkdir(filepath.Join(dir, "70-folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := testSystem(t)
	s.hookWait, s.hookLimit, s.stopLimit = 3*time.Second, 6*time.Second, 10*time.Second
	n := start(t, s, NetworkOptions{Hooks: dir, Connect: "10.0.0.2:7625", Words: []string{"ip=eth0:dhcp", "ip=eth9:dhcp"}})
	n.until(t, "the link, in spite of the hook that hangs", func() bool { return has(t, "eth0", "fe80:") })
	n.until(t, "the hook that hangs killed, and the ones after it started", func() bool {
		return n.reported("20-hangs start: killed") && n.reported("30-fails start: exit status 3") && n.reported("40-no-program start:")
	})
	n.end(t, before)
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	rest := " eth0,eth9 0 2.5 10.0.0.2:7625 " + dir + " "
	want := "10-first start start" + rest + "0\n30-fails start start" + rest + "1\n10-first stop stop" + rest + "0\n30-fails stop stop" + rest + "0\n"
	if string(data) != want {
		t.Errorf("%s; want\n%s", data, want)
	}
	if left := processes(t, "sleep\x001000"); left != 0 {
		t.Errorf("%d processes of the killed hook live on", left)
	}
}

// TestHookHangsAtTheEnd: what hangs at the end is killed, too, and the network has been put back by then.
func TestHookHangsAtTheEnd(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hangs"), []byte("#!/bin/sh\n[ $1 = start ] || sleep 1001\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := testSystem(t)
	s.stopLimit = 3 * time.Second
	n := start(t, s, NetworkOptions{Hooks: dir})
	n.until(t, "the link", func() bool { return has(t, "eth0", "fe80:") })
	n.end(t, before)
	if !n.reported("hangs stop: killed") || processes(t, "sleep\x001001") != 0 {
		t.Errorf("reports %q", n.reports)
	}
}

// processes counts those whose command line begins so.
func processes(t *testing.T, begin string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d processes, %v", len(files), err)
	}
	count := 0
	for _, file := range files {
		data, _ := os.ReadFile(file)
		if strings.HasPrefix(string(data), begin+"\x00") {
			count++
		}
	}
	return count
}
