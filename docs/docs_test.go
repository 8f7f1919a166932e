// Package docs holds no code, only the tests of the documents: that what they
// name is there, and that the quick start runs as it stands.
package docs

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func documents(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, path := range append(paths, "../README.md", "../CONTRIBUTING.md") {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[path] = string(data)
	}
	return texts
}

// TestQuickStart runs the commands of README.md, but for the first block, which
// builds.
func TestQuickStart(t *testing.T) {
	out := shell(t, programs(t), quickStart(t)...)
	for _, want := range []string{"boots", "refused, exit code 7", "back in", "consistent, and goes on"} {
		if !strings.Contains(out, want) {
			t.Errorf("the quick start did not say %q:\n%s", want, out)
		}
	}
	if lines := strings.Count(documents(t)["../README.md"], "\n"); lines > 110 {
		t.Errorf("README.md has %d lines; 110 are enough", lines)
	}
}

// TestWithoutServer runs what README.md says about a packet in a file.
func TestWithoutServer(t *testing.T) {
	out := shell(t, programs(t), append([]string{`
truncate -s 32M disk.img
printf %s 'what its user typed' >user.pass
printf %s 'kept in a safe, with a key' >packet.pass
printf %s 'a new passphrase, longer' >new.pass
cryptsetup luksFormat -q disk.img user.pass
`}, append(blocks(section(t, "../README.md", "Without a server")), `
cryptsetup open --test-passphrase --key-file new.pass disk.img && echo "back in"
`)...)...)
	if !strings.Contains(out, "back in") {
		t.Errorf("not back in:\n%s", out)
	}
}

// TestHeaderGone runs what docs/operations.md says about a volume whose header
// is gone, on the machine of the quick start.
func TestHeaderGone(t *testing.T) {
	byHand := blocks(section(t, "operations.md", "11. A volume whose header is gone"))
	if len(byHand) != 1 {
		t.Fatalf("the section has %d blocks", len(byHand))
	}
	bin := programs(t)
	for _, luks := range []string{"luks2", "luks1"} {
		t.Run(luks, func(t *testing.T) {
			start := quickStart(t)
			enrolled := slices.IndexFunc(start, func(block string) bool { return strings.Contains(block, " enroll ") })
			script := append(start[:enrolled+1:enrolled+1], `
mandos-escrow machine enable laptop7 --state srv
mandos-escrow --home bob recover --request --volume laptop7 --for volume-key --reason 'header gone' --json >request.json
mandos-escrow --home alice recover --approve "$(jq -r .id request.json)" --words "$(jq -r .words request.json)" --key-passphrase-file master.pass
mandos-escrow --home bob recover --release "$(jq -r .id request.json)" --out packet.asc --otp-file otp
offset=$(mandos-escrow volume inspect disk.img --json | jq .offset)
head -c 1M /dev/urandom | dd of=disk.img bs=4096 seek=$((offset / 4096)) conv=notrunc status=none
cp disk.img whole.img
dd if=/dev/zero of=disk.img bs=$offset count=1 conv=notrunc status=none
printf %s 'a new passphrase, longer' >new.pass
`, strings.NewReplacer("/dev/sda3", "disk.img", "luksFormat", "luksFormat -q --key-file new.pass").Replace(byHand[0]), `
cryptsetup open --test-passphrase --key-file new.pass disk.img
key() { cryptsetup luksDump -q --dump-volume-key --key-file "$1" "$2" | sed -n '/MK dump:/,$p'; }
[ -n "$(key new.pass disk.img)" ] && [ "$(key new.pass disk.img)" = "$(key user.pass whole.img)" ]
for field in uuid type cipher key_bits offset sector_size; do
	[ "$(mandos-escrow volume inspect disk.img --json | jq .$field)" = "$(mandos-escrow volume inspect whole.img --json | jq .$field)" ]
done
cmp <(tail -c +$((offset + 1)) disk.img) <(tail -c +$((offset + 1)) whole.img)
mandos-escrow-unlock --config root/etc/mandos-escrow --print --once || echo "before: exit code $?"
mandos-escrow token create --state srv >token
mandos-escrow enroll --token-file token --device disk.img --passphrase-file new.pass --root root --name laptop7
mandos-escrow-unlock --config root/etc/mandos-escrow --print | cryptsetup open --test-passphrase --key-file - disk.img && echo "boots again"
`)
			for i := range script {
				script[i] = strings.ReplaceAll(script[i], "--type luks2", "--type "+luks)
			}
			out := shell(t, bin, script...)
			for _, want := range []string{"before: exit code 4", "boots again"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q:\n%s", want, out)
				}
			}
		})
	}
}

// quickStart returns the blocks of README.md's quick start that follow the
// first, which builds.
func quickStart(t *testing.T) []string {
	t.Helper()
	all := blocks(section(t, "../README.md", "Quick start"))
	if len(all) < 3 || !strings.Contains(all[0], "make build") {
		t.Fatalf("the quick start has %d blocks, of which the first builds", len(all))
	}
	return all[1:]
}

func section(t *testing.T, path, title string) string {
	t.Helper()
	_, text, found := strings.Cut(documents(t)[path], "\n## "+title+"\n")
	if !found {
		t.Fatalf("%s has no section %q", path, title)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

// blocks returns the shell blocks of a text.
func blocks(text string) []string {
	var out []string
	for _, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
		out = append(out, m[1])
	}
	return out
}

// programs builds both programs, and returns their folder.
func programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin, "../cmd/...")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

// shell runs blocks as one script in a folder of its own, on another port and
// with a cheaper key derivation: the default costs seconds a try.
func shell(t *testing.T, bin string, blocks ...string) string {
	t.Helper()
	for _, tool := range []string{"cryptsetup", "jq", "bash", "xxd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt-get install cryptsetup-bin jq bash xxd", tool)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	script := strings.NewReplacer(
		"127.0.0.1:7625", fmt.Sprintf("127.0.0.1:%d", port),
		"luksFormat -q", "luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000",
	).Replace(strings.Join(blocks, "\n"))
	cmd := exec.Command("bash", "-c", "set -e -o pipefail; umask 077; trap 'kill $server 2>/dev/null || :' EXIT\n"+script)
	cmd.Dir, cmd.Env = t.TempDir(), append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// TestLinks follows links to files and to sections of other documents.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)
	for path, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			}
		}
	}
}

// TestNames looks for every test, Go file and function that a document names.
func TestNames(t *testing.T) {
	source := map[string]string{}
	for _, pattern := range []string{"*", "*/*", "*/*/*"} {
		paths, err := filepath.Glob("../" + pattern + ".go")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			source[strings.TrimPrefix(path, "../")] = string(data)
		}
	}
	test := regexp.MustCompile("`((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)`")
	function := regexp.MustCompile("`([a-z]+)\\.([A-Z][A-Za-z]+)`")
	file := regexp.MustCompile("`([a-z-]+(?:/[a-z0-9_.-]+)*\\.go)`")
	for path, text := range documents(t) {
		for _, m := range test.FindAllStringSubmatch(text, -1) {
			found := false
			for _, code := range source {
				found = found || strings.Contains(code, "func "+m[1]+"(")
			}
			if !found {
				t.Errorf("%s names the test %s, which is nowhere", path, m[1])
			}
		}
		for _, m := range function.FindAllStringSubmatch(text, -1) {
			found, room := false, false
			for name, code := range source {
				if filepath.Base(filepath.Dir(name)) == m[1] {
					room = true
					found = found || regexp.MustCompile(`(?m)^(func (\([^)]*\) )?|type )`+m[2]+`\b`).MatchString(code)
				}
			}
			if room && !found {
				t.Errorf("%s names %s.%s, which is nowhere", path, m[1], m[2])
			}
		}
		for _, m := range file.FindAllStringSubmatch(text, -1) {
			if _, there := source[m[1]]; !there {
				t.Errorf("%s names the file %s, which is not there", path, m[1])
			}
		}
	}
}
