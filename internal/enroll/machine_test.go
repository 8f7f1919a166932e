package enroll

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

var (
	tool      = cryptsetup.Tool{}
	user      = []byte("the user's own passphrase 7421")
	colleague = []byte("a colleague's passphrase 9913")
	types     = []string{luks.Type1, luks.Type2}
)

// Keyslots of a new volume.
const (
	userSlot      = 0
	colleagueSlot = 2
)

func hash(b []byte) [32]byte { return sha256.Sum256(b) }

// machine is a root folder and its volumes.
type machine struct {
	site  *site
	root  string
	token string
	disks []string
	uuids []string
}

func newMachine(t *testing.T, s *site, types ...string) *machine {
	t.Helper()
	m := &machine{site: s, root: t.TempDir(), token: s.token(t)}
	if err := os.MkdirAll(filepath.Join(m.root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, typ := range types {
		dev := disk(t, typ, user)
		m.disks, m.uuids = append(m.disks, dev), append(m.uuids, header(t, dev).UUID)
	}
	return m
}

func cryptsetupRun(t *testing.T, stdin []byte, args ...string) {
	t.Helper()
	cmd := exec.Command("cryptsetup", args...)
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %s (apt install cryptsetup-bin): %v: %s", args[0], err, out)
	}
}

// disk makes a volume that a user opens in keyslot 0 and a colleague in
// keyslot 2, which on LUKS2 has a token of somebody else.
func disk(t *testing.T, typ string, passphrase []byte, options ...string) string {
	t.Helper()
	dev := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(dev, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dev, 24<<20); err != nil {
		t.Fatal(err)
	}
	args := []string{"luksFormat", "-q", "--type", typ, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file=-"}
	cryptsetupRun(t, passphrase, append(append(args, options...), dev)...)
	if slices.Contains(options, "--key-slot") {
		return dev
	}
	addKey(t, dev, passphrase, colleague, colleagueSlot)
	if typ == luks.Type2 {
		if _, err := tool.ImportToken(t.Context(), dev, []byte(`{"type":"somebody-else","keyslots":["2"]}`)); err != nil {
			t.Fatal(err)
		}
	}
	return dev
}

func addKey(t *testing.T, dev string, with, passphrase []byte, slot int) {
	t.Helper()
	if err := tool.AddKey(t.Context(), dev, cryptsetup.Key{Passphrase: with}, passphrase, slot, true); err != nil {
		t.Fatal(err)
	}
}

func killSlot(t *testing.T, dev string, with []byte, slot int) {
	t.Helper()
	if err := tool.KillSlot(t.Context(), dev, slot, cryptsetup.Key{Passphrase: with}); err != nil {
		t.Fatal(err)
	}
}

func header(t *testing.T, dev string) *luks.Header {
	t.Helper()
	h, err := luks.ReadFileWithin(dev, luks.AnyMemory)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func opens(t *testing.T, dev string, passphrase []byte, slot int) bool {
	t.Helper()
	_, err := tool.Test(t.Context(), dev, passphrase, slot)
	return err == nil
}

func image(t *testing.T, dev string) [32]byte {
	t.Helper()
	data, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	return hash(data)
}

func (m *machine) job() job {
	return job{Token: m.token, Root: m.root, Devices: m.disks, Passphrase: user, Name: "laptop"}
}

func (m *machine) boot() string    { return filepath.Join(m.root, BootFolder) }
func (m *machine) running() string { return filepath.Join(m.root, RunningFolder) }

func (m *machine) journalPath(i int) string {
	return filepath.Join(m.running(), "volume-"+m.uuids[i]+".journal")
}

// secrets are what is escrowed of one volume, as boot and recovery find them.
type secrets struct {
	slots          []int // ours
	boot, recovery []byte
	volumeKey      []byte
	packet         string
}

// check sees to it that all volumes are enrolled as they ought to be, with the
// given keyslots of others and no more.
func (m *machine) check(t *testing.T, boots bool, others ...int) []secrets {
	t.Helper()
	var all []secrets
	for i := range m.disks {
		all = append(all, m.checkVolume(t, i, boots, others))
	}
	for _, dir := range []string{m.boot(), m.running()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name()[0] == '.' {
				t.Errorf("%s was left in %s", e.Name(), dir)
			}
		}
	}
	return all
}

func (m *machine) checkVolume(t *testing.T, i int, boots bool, others []int) secrets {
	t.Helper()
	dev, h := m.disks[i], header(t, m.disks[i])
	j := m.journal(t, i)
	if j == nil || !j.committed || j.sealed != nil || j.old != nil || j.boots() != boots {
		t.Fatalf("journal is not that of a finished enrolment: %+v", j)
	}
	out := secrets{packet: j.packet}
	for _, s := range j.planned() {
		out.slots = append(out.slots, s.number)
	}
	want := slices.Concat(out.slots, others)
	slices.Sort(want)
	var active []int
	for _, s := range h.Slots {
		active = append(active, s.Number)
	}
	if !slices.Equal(active, want) {
		t.Fatalf("keyslots %v are active, want ours %v and others' %v", active, out.slots, others)
	}
	if slices.Contains(others, colleagueSlot) && !opens(t, dev, colleague, colleagueSlot) {
		t.Error("the colleague's passphrase opens no more")
	}
	m.checkMarks(t, h, j)
	m.checkServer(t, i, j, &out)
	if boots {
		out.boot = m.fetch(t, i)
		if !opens(t, dev, out.boot, j.boot.number) {
			t.Error("the released boot passphrase does not open its keyslot")
		}
	}
	return out
}

func (m *machine) journal(t *testing.T, i int) *journal {
	t.Helper()
	j, err := (&enrolment{Options: Options{Root: m.root}}).readJournal(m.uuids[i])
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// checkMarks: on LUKS2 each of our keyslots has one token, and the boot
// keyslot is tried first.
func (m *machine) checkMarks(t *testing.T, h *luks.Header, j *journal) {
	t.Helper()
	if h.Type == luks.Type1 {
		return
	}
	marked := map[string]int{}
	for _, token := range h.Tokens {
		var body struct{ Purpose, Packet string }
		if err := json.Unmarshal(token.JSON, &body); err != nil {
			t.Fatal(err)
		}
		switch {
		case token.Type == "somebody-else":
			continue
		case token.Type != "mandos-escrow" || len(token.Keyslots) != 1 || body.Packet != j.packet || marked[body.Purpose] != 0:
			t.Errorf("token %s", token.JSON)
			continue
		}
		marked[body.Purpose] = token.Keyslots[0]
	}
	want := map[string]int{"recovery": j.recovery.number}
	if j.boots() {
		want["boot"] = j.boot.number
	}
	for purpose, slot := range want {
		if marked[purpose] != slot {
			t.Errorf("keyslot %d is not marked for %s: %v", slot, purpose, marked)
		}
	}
	if len(marked) != len(want) {
		t.Errorf("tokens mark %v", marked)
	}
	for _, s := range h.Slots {
		if (s.Priority == luks.Prefer) != (s.Number == j.boot.number) {
			t.Errorf("keyslot %d has priority %s", s.Number, s.Priority)
		}
	}
}

// checkServer opens what the server holds, and tries it on the volume.
func (m *machine) checkServer(t *testing.T, i int, j *journal, out *secrets) {
	t.Helper()
	dev := m.disks[i]
	entries := m.site.entries(t, identityOf(t, m.boot()).Key.KeyID(), m.uuids[i])
	verified := entries[escrow.Verified]
	if len(verified) != 1 || verified[0].ID != j.packet || len(entries[escrow.Pending]) != 0 {
		t.Fatalf("the server holds %d verified and %d pending packets", len(verified), len(entries[escrow.Pending]))
	}
	words := m.site.open(t, j.packet, escrow.ForPassphrase).Passphrase
	out.recovery = words.Passphrase
	if len(out.recovery) != 55 || escrow.CheckRecoveryPassphrase(out.recovery) != nil || words.Slot != j.recovery.number {
		t.Errorf("recovery passphrase of %d characters for keyslot %d", len(out.recovery), words.Slot)
	}
	if !opens(t, dev, out.recovery, j.recovery.number) {
		t.Error("the escrowed recovery passphrase does not open its keyslot")
	}
	out.volumeKey = m.site.open(t, j.packet, escrow.ForVolumeKey).VolumeKey.Key
	if err := header(t, dev).VerifyVolumeKey(out.volumeKey); err != nil {
		t.Error(err)
	}
}

// client is the boot program.
func (m *machine) client(t *testing.T, i int) *unlock.Client {
	t.Helper()
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(m.boot(), name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	conf, err := unlock.ParseConfig(read(unlock.ConfigFile))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := conf.ParseKeys(read(unlock.TLSPrivateKeyFile), read(unlock.PrivateKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(conf.Volumes, func(v unlock.Volume) bool { return v.UUID == m.uuids[i] && v.Path == m.disks[i] }) {
		t.Errorf("unlock.conf does not name %s", m.disks[i])
	}
	return &unlock.Client{Config: conf, Keys: keys, Volumes: []string{m.uuids[i]}}
}

func (m *machine) fetch(t *testing.T, i int) []byte {
	t.Helper()
	result, err := m.client(t, i).Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return result.Passphrases[m.uuids[i]]
}

// record is what the server knows of the machine.
func (m *machine) record(t *testing.T) (r unlock.Machine) {
	t.Helper()
	err := m.site.state.Store.View(func(tx *store.Tx) (err error) {
		r, err = tx.Machine(identityOf(t, m.boot()).Key.KeyID())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// audit are the actions in the audit log that name the machine.
func (m *machine) audit(t *testing.T) (actions []string) {
	t.Helper()
	id := string(identityOf(t, m.boot()).Key.KeyID())
	err := m.site.state.Store.View(func(tx *store.Tx) error {
		events, err := tx.AuditFrom(1, 1<<20)
		for _, e := range events {
			if e.Machine == id {
				actions = append(actions, e.Action)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return actions
}

// asked reports whether anybody enrolled with the machine's token.
func (m *machine) asked(t *testing.T) (used bool) {
	t.Helper()
	m.site.changeToken(t, m.token, func(token *store.Token) { used = len(token.UsedBy) != 0 })
	return used
}

func (m *machine) change(t *testing.T, change api.Change) {
	t.Helper()
	change.Machines = []string{string(identityOf(t, m.boot()).Key.KeyID())}
	m.site.local(t, "POST", "/v1/machines", change, nil)
}

// spill looks for secrets in every file of a folder, and in texts.
func spill(t *testing.T, secrets map[string][]byte, folders []string, texts ...[]byte) {
	t.Helper()
	for _, folder := range folders {
		err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			texts = append(texts, data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, s := range secrets {
		if len(s) < 16 {
			t.Fatalf("%s has %d bytes", name, len(s))
		}
		for form, bytesOf := range forms(s) {
			for _, text := range texts {
				if bytes.Contains(text, bytesOf) {
					t.Errorf("%s lies about, as %s", name, form)
				}
			}
		}
	}
}

// wait polls until a condition holds.
func wait(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for range 1000 {
		if holds() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited for %s", what)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
