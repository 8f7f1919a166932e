package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

const (
	corruptVolume     = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	corruptRecovery   = "011000-012002-013004-014006-015008-016010-017012-018014"
	corruptPassphrase = "correct-horse-battery-staple-7719"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// corruptKeys are made once: a protected key takes a while.
var corruptKeys = sync.OnceValue(func() (k struct {
	master, foreign                    *seal.PrivateKey
	protected, foreignProtected        []byte
	machine, thief                     *identity.Key
	policy, otherPolicy                escrow.Policy
	packet, otherPacket, strangePacket *escrow.Packet
	raw                                map[*escrow.Packet][]byte
},
) {
	made := time.Now().Add(-time.Hour)
	k.master, k.foreign = must(seal.Generate("master", made)), must(seal.Generate("foreign", made))
	k.protected, k.foreignProtected = must(k.master.ArmorProtected([]byte(corruptPassphrase))), must(k.foreign.ArmorProtected([]byte(corruptPassphrase)))
	k.machine, k.thief = must(identity.Generate()), must(identity.Generate())
	policyOf := func(key *seal.PrivateKey) escrow.Policy {
		return must(escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: key.Public().Fingerprint(), Name: "srv"}}))
	}
	k.policy, k.otherPolicy, k.raw = policyOf(k.master), policyOf(k.foreign), map[*escrow.Packet][]byte{}
	packet := func(machine string, policy escrow.Policy, key *seal.PrivateKey) *escrow.Packet {
		header := escrow.Header{Machine: machine, KeyID: k.machine.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: corruptVolume}}
		payload := &escrow.PassphrasePayload{Passphrase: []byte(corruptRecovery), Slot: 1, LUKSType: "luks2"}
		data := must(escrow.Make(header, policy, []*seal.PublicKey{key.Public()}, []escrow.Payload{payload}, k.machine, made))
		p := must(escrow.Parse(data))
		k.raw[p] = data
		return p
	}
	k.packet, k.otherPacket = packet("laptop7", k.policy, k.master), packet("laptop8", k.policy, k.master)
	k.strangePacket = packet("laptop7", k.otherPolicy, k.foreign)
	return k
})

// corrupt is a server that does its work, but for what a test changes. It has
// all that a server has, and a trustee's passphrase it has not.
type corrupt struct {
	t      *testing.T
	dir    string
	key    *identity.Key
	packet *escrow.Packet
	head   []byte // signed, if replies have one
	text   string // of a token or an invite

	material func(*api.Material)
	released func(*api.Release)
	lists    func(*api.Request)
	login    func(*api.LoginReply) // of a rescue
	machines []api.Machine

	filed    []byte
	approved []api.Approve
	calls    []string
}

// newCorrupt starts one, with the homes of bob, who asks, and alice, who
// approves.
func newCorrupt(t *testing.T) *corrupt {
	t.Helper()
	c := &corrupt{
		t: t, dir: t.TempDir(), key: must(identity.Generate()), packet: corruptKeys().packet,
		material: func(*api.Material) {}, released: func(*api.Release) {}, lists: func(*api.Request) {}, login: func(*api.LoginReply) {},
	}
	listener := must(tls.Listen("tcp", "127.0.0.1:0", must(c.key.ServerTLS(api.Protocol))))
	server := &http.Server{Handler: c}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	here := unlock.Server{Name: "srv", KeyID: c.key.KeyID(), Addresses: []string{listener.Addr().(*net.TCPAddr).String()}}
	for _, name := range []string{"alice", "bob"} {
		home := config.Home{Dir: c.home(name)}
		must(home.Make())
		if err := home.Join(config.Membership{Server: here, Name: name, Policy: corruptKeys().policy}); err != nil {
			t.Fatal(err)
		}
	}
	c.write("master.pass", corruptPassphrase)
	return c
}

func (c *corrupt) home(name string) string { return filepath.Join(c.dir, name) }

func (c *corrupt) write(name, text string) {
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *corrupt) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.calls = append(c.calls, r.Method+" "+r.URL.Path)
	if c.head != nil {
		w.Header().Set(api.HeaderHead, base64.StdEncoding.EncodeToString(c.head))
	}
	var out any
	switch path := r.URL.Path; {
	case path == "/v1/login":
		reply := api.LoginReply{
			Name: recovery.RescueName(corruptVolume, "bob"), Role: string(store.Rescuer),
			Policy: api.Policy{Policy: string(corruptKeys().policy.Bytes())}, Expires: time.Now().Add(time.Hour),
		}
		c.login(&reply)
		out = reply
	case path == "/v1/recoverable":
		out = api.PacketHead{
			Header: c.packet.HeaderBytes, Digest: hex.EncodeToString(c.packet.Digest[:]),
			PayloadDigests: map[string]string{escrow.ForPassphrase: hexSum(c.packet.Payloads[0].Message)},
		}
	case path == "/v1/requests" && r.Method == "GET":
		out = []api.Request{}
		if c.filed != nil {
			listed := c.described()
			c.lists(&listed)
			out = []api.Request{listed}
		}
	case path == "/v1/requests":
		var in api.Signed
		_ = json.NewDecoder(r.Body).Decode(&in)
		c.filed = in.Signed
		out = api.Request{ID: must(recovery.ParseRequest(in.Signed)).ID, State: recovery.Open, Approvers: []string{}}
	case r.Method == "GET" && path == "/v1/requests/"+c.filedID():
		listed := c.described()
		c.lists(&listed)
		out = listed
	case strings.HasSuffix(path, "/material"):
		m := c.honestMaterial(c.packet)
		c.material(&m)
		out = m
	case strings.HasSuffix(path, "/approve"):
		var in api.Approve
		_ = json.NewDecoder(r.Body).Decode(&in)
		c.approved = append(c.approved, in)
		out = api.Request{Approvers: []string{"alice"}, Threshold: 1}
	case strings.HasSuffix(path, "/release"):
		release := api.Release{Request: c.filed, Packet: corruptKeys().raw[c.packet], Approvals: c.approved}
		c.released(&release)
		out = release
	case path == "/v1/tokens" || path == "/v1/admins":
		out = api.Text{Text: c.text}
	case path == "/v1/machines" && r.Method == "POST":
		out = []string{"laptop7"}
	case path == "/v1/machines":
		out = append([]api.Machine{}, c.machines...)
	case path == "/v1/policy":
		out = api.Policy{Policy: "\x1b]0;evil\a"}
	default:
		w.WriteHeader(http.StatusNotFound)
		out = api.Errorf(api.CodeNotFound, "not here")
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (c *corrupt) filedID() string {
	if c.filed == nil {
		return "none"
	}
	return must(recovery.ParseRequest(c.filed)).ID
}

// described is the request as the server lists it.
func (c *corrupt) described() api.Request {
	r := api.Request{ID: c.filedID(), State: recovery.Open, Approvers: []string{}, Approved: []string{}, Threshold: c.packet.Threshold}
	for _, a := range c.approved {
		approval := must(recovery.ParseApproval(a.Approval, recovery.Digest(c.filed), a.Share))
		r.Approvers, r.Approved = append(r.Approvers, approval.Approver), append(r.Approved, approval.Trustee)
	}
	return r
}

func hexSum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (c *corrupt) honestMaterial(p *escrow.Packet) api.Material {
	sealed := p.Payloads[0]
	return api.Material{
		Request: c.filed, Header: p.HeaderBytes, Set: sealed.Set, Trustee: string(corruptKeys().protected),
		Shares: map[string][]byte{p.Trustees[0]: sealed.Shares[0]},
	}
}

// command runs one as somebody, in the test's folder, and demands its exit
// code and a part of what it says.
func (c *corrupt) command(as string, exit int, part string, args ...string) string {
	c.t.Helper()
	var out, errOut bytes.Buffer
	got := run(append([]string{"--home", c.home(as)}, args...), strings.NewReader(""), &out, &errOut)
	if got != exit || !strings.Contains(errOut.String(), part) {
		c.t.Errorf("%v: exit %d, want %d with %q\n%s", args, got, exit, part, errOut.String())
	}
	if text := out.String() + errOut.String(); strings.Contains(text, corruptRecovery) || strings.Contains(text, corruptPassphrase) {
		c.t.Errorf("%v: shows a secret: %s", args, text)
	}
	return out.String()
}

// request makes bob ask, and returns the id and the words.
func (c *corrupt) request() (id, words string) {
	c.t.Helper()
	var out api.Request
	text := c.command("bob", exitDone, "", "recover", "--request", "--volume", "laptop7", "--reason", "forgot it", "--json")
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		c.t.Fatalf("%v: %s", err, text)
	}
	return must(recovery.ParseRequest(c.filed)).ID, out.Words
}

func (c *corrupt) approve(exit int, part, id, words, passphraseFile string) {
	c.t.Helper()
	c.command("alice", exit, part, "recover", "--approve", id, "--words", words, "--key-passphrase-file", filepath.Join(c.dir, passphraseFile))
}

func (c *corrupt) release(exit int, part, id string) {
	c.t.Helper()
	c.command("bob", exit, part, "recover", "--release", id, "--out", filepath.Join(c.dir, "packet.asc"), "--otp-file", filepath.Join(c.dir, "otp"))
}

// filesIn lists what a folder holds, below it too.
func filesIn(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, filepath.Base(path))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

// The same steps with an honest server, so that what is refused below is
// refused for what was changed.
func TestHonestServer(t *testing.T) {
	c := newCorrupt(t)
	id, words := c.request()
	if n := filesIn(t, c.home("bob")+"/requests"); n != id+".key "+id+".request" {
		t.Errorf("bob's home has %s", n)
	}
	c.approve(exitFailed, "no such file", id, words, "missing.pass")
	c.approve(exitDone, "approved: 1 of 1", id, words, "master.pass")
	c.release(exitDone, "one-time password", id)
	if n := filesIn(t, c.home("bob")+"/requests"); n != "" {
		t.Errorf("bob's home still has %s", n)
	}
	opened, err := escrow.OpenOffline(must(os.ReadFile(filepath.Join(c.dir, "packet.asc"))), must(os.ReadFile(filepath.Join(c.dir, "otp"))))
	if err != nil || string(opened.Passphrase.Passphrase) != corruptRecovery {
		t.Fatal(err)
	}
	share, err := escrow.OpenShare(c.packet.Payloads[0].Shares[0], corruptKeys().master, c.packet, escrow.ForPassphrase)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"alice", "bob"} {
		for _, secret := range [][]byte{[]byte(corruptRecovery), []byte(corruptPassphrase), share.Data, []byte(hex.EncodeToString(share.Data))} {
			if err := filepath.WalkDir(c.home(name), func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() && bytes.Contains(must(os.ReadFile(path)), secret) {
					t.Errorf("%s holds a secret", path)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// forge signs a request as the server would like it, with a key of its own.
func (c *corrupt) forge(change func(*recovery.Request), by *identity.Key) []byte {
	r := *must(recovery.ParseRequest(c.filed))
	r.RequesterID = by.KeyID()
	change(&r)
	return must(r.Sign(by))
}

// What a corrupt server serves to an approver is refused before the passphrase
// of the trustee's key is read: the file does not exist, which would be exit 1.
func TestCorruptServerTowardsAnApprover(t *testing.T) {
	k := corruptKeys()
	own := func(r *recovery.Request) { r.Recipient = k.foreign.Public() }
	for name, x := range map[string]struct {
		change func(*corrupt, *api.Material)
		exit   int
		part   string
	}{
		"request with the server's key": {func(c *corrupt, m *api.Material) { m.Request = c.forge(own, k.thief) }, exitRefused, "six words"},
		"request key swapped under the signature": {func(c *corrupt, m *api.Material) {
			theirs := string(c.forge(own, k.thief))
			_, mine, _ := strings.Cut(string(c.filed), "recipient: ")
			_, swapped, _ := strings.Cut(theirs, "recipient: ")
			m.Request = []byte(strings.Replace(string(c.filed), mine, swapped, 1))
		}, exitIntegrity, "signature"},
		"request with another reason": {func(c *corrupt, m *api.Material) {
			m.Request = c.forge(func(r *recovery.Request) { r.Reason = "the boss wants it" }, k.thief)
		}, exitRefused, "six words"},
		"request of another id": {func(c *corrupt, m *api.Material) {
			m.Request = c.forge(func(r *recovery.Request) { r.ID = strings.Repeat("0e", 16) }, k.thief)
		}, exitIntegrity, "asked for"},
		"flipped byte":      {func(_ *corrupt, m *api.Material) { m.Request = bytes.Clone(m.Request); m.Request[99] ^= 1 }, exitIntegrity, "request"},
		"no request":        {func(_ *corrupt, m *api.Material) { m.Request = nil }, exitIntegrity, "request"},
		"header of another": {func(_ *corrupt, m *api.Material) { m.Header = k.otherPacket.HeaderBytes }, exitIntegrity, "another packet"},
		"header changed": {func(_ *corrupt, m *api.Material) {
			m.Header = bytes.Replace(m.Header, []byte("laptop7"), []byte("laptop9"), 1)
		}, exitIntegrity, "another packet"},
		"header of another day": {func(_ *corrupt, m *api.Material) {
			m.Header = bytes.Replace(m.Header, []byte("\ncreated: 20"), []byte("\ncreated: 21"), 1)
		}, exitIntegrity, "another packet"},
		"header cut":            {func(_ *corrupt, m *api.Material) { m.Header = m.Header[:50] }, exitIntegrity, "clear header"},
		"foreign trustee's key": {func(_ *corrupt, m *api.Material) { m.Trustee = string(k.foreignProtected) }, exitRefused, "was not asked for"},
		"foreign key, with a share for it": {func(_ *corrupt, m *api.Material) {
			m.Trustee = string(k.foreignProtected)
			m.Shares[k.foreign.Public().Fingerprint()] = k.strangePacket.Payloads[0].Shares[0]
		}, exitRefused, "was not asked for"},
		"no key":          {func(_ *corrupt, m *api.Material) { m.Trustee = "" }, exitUsage, "--key"},
		"no share at all": {func(_ *corrupt, m *api.Material) { m.Shares = nil }, exitRefused, "was not asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCorrupt(t)
			id, words := c.request()
			c.material = func(m *api.Material) { x.change(c, m) }
			c.approve(x.exit, x.part, id, words, "missing.pass")
			if len(c.approved) != 0 {
				t.Error("something was approved")
			}
		})
	}
}

// With the passphrase given, the shares themselves are judged.
func TestCorruptSharesTowardsAnApprover(t *testing.T) {
	k := corruptKeys()
	fingerprint := k.master.Public().Fingerprint()
	for name, x := range map[string]struct {
		change func(*api.Material)
		exit   int
	}{
		"share of another packet": {func(m *api.Material) { m.Shares[fingerprint] = k.otherPacket.Payloads[0].Shares[0] }, exitIntegrity},
		"with its set, too": {func(m *api.Material) {
			m.Shares[fingerprint], m.Set = k.otherPacket.Payloads[0].Shares[0], k.otherPacket.Payloads[0].Set
		}, exitIntegrity},
		"another set":      {func(m *api.Material) { m.Set = k.otherPacket.Payloads[0].Set }, exitIntegrity},
		"no set":           {func(m *api.Material) { m.Set = nil }, exitIntegrity},
		"share to another": {func(m *api.Material) { m.Shares[fingerprint] = k.strangePacket.Payloads[0].Shares[0] }, exitIntegrity},
		"share cut":        {func(m *api.Material) { m.Shares[fingerprint] = m.Shares[fingerprint][:100] }, exitIntegrity},
		"share made up": {func(m *api.Material) {
			m.Shares[fingerprint] = must(seal.Encrypt([]byte("open sesame"), k.master.Public(), nil, time.Now()))
		}, exitIntegrity},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCorrupt(t)
			id, words := c.request()
			c.material = x.change
			c.approve(x.exit, "", id, words, "master.pass")
			if len(c.approved) != 0 {
				t.Error("something was approved")
			}
		})
	}
}

// A packet under another policy is refused by who asks and by who approves,
// also when the asker did not look.
func TestCorruptPolicy(t *testing.T) {
	k := corruptKeys()
	c := newCorrupt(t)
	c.packet = k.strangePacket
	c.command("bob", exitRefused, "another policy", "recover", "--request", "--volume", "laptop7", "--reason", "forgot it")
	if n := filesIn(t, c.home("bob")+"/requests"); n != "" || c.filed != nil {
		t.Errorf("bob's home has %s", n)
	}
	bob := config.Home{Dir: c.home("bob")}
	p := k.strangePacket
	c.filed = must(recovery.Request{
		ID: strings.Repeat("0d", 16), PacketID: p.ID, PacketDigest: p.Digest, HeaderDigest: p.HeaderDigest, Payload: escrow.ForPassphrase,
		PayloadDigest: sha256.Sum256(p.Payloads[0].Message), VolumeUUID: p.Volume.UUID, Machine: p.Machine, Requester: "bob",
		RequesterID: must(bob.Key()).KeyID(), Reason: "r", Created: time.Now(), Expires: time.Now().Add(time.Hour), Recipient: k.foreign.Public(),
	}.Sign(must(bob.Key())))
	c.material = func(m *api.Material) { m.Trustee = string(k.foreignProtected) }
	c.approve(exitRefused, "another policy", strings.Repeat("0d", 16), recovery.Words(recovery.Digest(c.filed)), "missing.pass")
	if len(c.approved) != 0 {
		t.Error("something was approved")
	}
}

func TestWrongWordsAndOwnRequest(t *testing.T) {
	c := newCorrupt(t)
	id, words := c.request()
	c.approve(exitRefused, "six words", id, recovery.Words([32]byte{1}), "missing.pass")
	c.command("bob", exitRefused, "own request", "recover", "--approve", id, "--words", words, "--key-passphrase-file", "missing.pass")
	if len(c.approved) != 0 {
		t.Error("something was approved")
	}
}

// Whatever a corrupt server releases, nothing is written, and the request can
// still be collected from an honest one.
func TestCorruptServerTowardsTheRequester(t *testing.T) {
	k := corruptKeys()
	resealed := func(c *corrupt, p *escrow.Packet, digest [32]byte) []byte {
		share := must(escrow.OpenShare(p.Payloads[0].Shares[0], k.master, p, escrow.ForPassphrase)) // a trustee conspires
		return must(recovery.Reseal(share, must(recovery.ParseRequest(c.filed)), digest, time.Now()))
	}
	forged := func(digest [32]byte, share []byte) api.Approve {
		return api.Approve{Share: share, Approval: must(recovery.Approval{
			RequestDigest: digest, Trustee: k.master.Public().Fingerprint(), ShareDigest: sha256.Sum256(share),
			Approver: "alice", ApproverID: k.thief.KeyID(), Created: time.Now(),
		}.Sign(k.thief))}
	}
	for name, x := range map[string]struct {
		change func(*corrupt, *api.Release)
		part   string
	}{
		"another request":            {func(c *corrupt, r *api.Release) { r.Request = c.forge(func(*recovery.Request) {}, k.thief) }, "another request"},
		"another packet":             {func(_ *corrupt, r *api.Release) { r.Packet = k.raw[k.otherPacket] }, "another packet"},
		"packet of another policy":   {func(_ *corrupt, r *api.Release) { r.Packet = k.raw[k.strangePacket] }, "another packet"},
		"packet with a flipped byte": {func(_ *corrupt, r *api.Release) { r.Packet = bytes.Clone(r.Packet); r.Packet[len(r.Packet)/2] ^= 1 }, "packet"},
		"no packet":                  {func(_ *corrupt, r *api.Release) { r.Packet = nil }, "packet"},
		"no approval":                {func(_ *corrupt, r *api.Release) { r.Approvals = nil }, "too few shares"},
		"approval twice":             {func(_ *corrupt, r *api.Release) { r.Approvals = append(r.Approvals, r.Approvals[0]) }, "twice"},
		"approval of another request": {func(c *corrupt, r *api.Release) {
			r.Approvals = []api.Approve{forged([32]byte{7}, resealed(c, c.packet, [32]byte{7}))}
		}, "approves another request"},
		"share re-sealed for another request": {func(c *corrupt, r *api.Release) {
			r.Approvals = []api.Approve{forged(recovery.Digest(c.filed), resealed(c, c.packet, [32]byte{7}))}
		}, "re-sealed for another request"},
		"share of another packet": {func(c *corrupt, r *api.Release) {
			digest := recovery.Digest(c.filed)
			r.Approvals = []api.Approve{forged(digest, resealed(c, k.otherPacket, digest))}
		}, "another packet"},
		"share made up": {func(c *corrupt, r *api.Release) {
			recipient := must(recovery.ParseRequest(c.filed)).Recipient
			r.Approvals = []api.Approve{forged(recovery.Digest(c.filed), must(seal.Encrypt([]byte("x"), recipient, nil, time.Now())))}
		}, "share"},
		"share beside another approval": {func(_ *corrupt, r *api.Release) {
			r.Approvals = []api.Approve{{Approval: r.Approvals[0].Approval, Share: append(bytes.Clone(r.Approvals[0].Share), 0)}}
		}, "is another one"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCorrupt(t)
			id, _ := c.request()
			digest := recovery.Digest(c.filed)
			c.approved = []api.Approve{forged(digest, resealed(c, c.packet, digest))}
			c.released = func(r *api.Release) { x.change(c, r) }
			c.release(exitIntegrity, x.part, id)
			if n := filesIn(t, c.dir); strings.Contains(n, "packet.asc") || strings.Contains(n, "otp") || strings.Contains(n, ".release") {
				t.Errorf("written: %s", n)
			}
			c.released = func(*api.Release) {}
			c.release(exitDone, "one-time password", id)
		})
	}
}

// A delivery that fails after the release costs no second approval: the server
// is not asked again.
func TestReleaseIsKeptUntilDelivered(t *testing.T) {
	c := newCorrupt(t)
	id, words := c.request()
	c.approve(exitDone, "approved", id, words, "master.pass")
	image := filepath.Join(c.dir, "disk.img")
	c.write("disk.img", "not LUKS")
	c.command("bob", exitIntegrity, "LUKS", "recover", "--release", id, "--device", image, "--new-passphrase-file", filepath.Join(c.dir, "master.pass"))
	if got := strings.Join(c.calls, " "); strings.Contains(got, "/release") {
		t.Error("released before it was clear that there is a device")
	}
	c.released = func(*api.Release) { // somebody puts a file there meanwhile
		c.write("packet.asc", "in the way")
	}
	c.release(exitFailed, "exists already", id)
	if err := os.Remove(filepath.Join(c.dir, "packet.asc")); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(c.dir, "otp"))
	c.released = func(r *api.Release) { *r = api.Release{} }
	c.release(exitDone, "one-time password", id)
}

// A server that shows an older log than before is not dealt with any further.
func TestCorruptHead(t *testing.T) {
	for name, head := range map[string]store.Head{
		"lower epoch": {Epoch: 2, Seq: 99, Hash: store.Hash{1}}, "shorter log": {Epoch: 3, Seq: 49, Hash: store.Hash{1}},
		"another log": {Epoch: 3, Seq: 50, Hash: store.Hash{2}},
	} {
		c := newCorrupt(t)
		id, words := c.request()
		seen := must(store.Head{Epoch: 3, Seq: 50, Hash: store.Hash{1}}.Sign(c.key))
		for _, who := range []string{"alice", "bob"} {
			if err := os.WriteFile(config.Home{Dir: c.home(who)}.HeadFile(c.key.KeyID()), seen, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c.head = must(head.Sign(c.key))
		c.approve(exitRefused, "older audit log", id, words, "missing.pass")
		c.release(exitRefused, "older audit log", id)
		c.command("bob", exitRefused, "older audit log", "packet", "list")
		if n := filesIn(t, c.dir); len(c.approved) != 0 || strings.Contains(n, "packet.asc") {
			t.Errorf("%s: %d approvals, %s", name, len(c.approved), n)
		}
		c.head = nil
		c.approve(exitRefused, "shows none at all", id, words, "missing.pass")
	}
}

// Somebody else at the server's address is not talked to.
func TestOtherServerKey(t *testing.T) {
	c := newCorrupt(t)
	id, words := c.request()
	calls := len(c.calls)
	listener := must(tls.Listen("tcp", "127.0.0.1:0", must(corruptKeys().thief.ServerTLS(api.Protocol))))
	defer listener.Close()
	go func() { _ = http.Serve(listener, c) }()
	home := config.Home{Dir: c.home("alice")}
	m := must(home.Memberships())[0]
	m.Server.Addresses = []string{listener.Addr().String()}
	if err := home.Join(m); err != nil {
		t.Fatal(err)
	}
	c.approve(exitRefused, "another key than the pinned one", id, words, "missing.pass")
	if len(c.calls) != calls {
		t.Errorf("it was asked: %v", c.calls[calls:])
	}
}

// A token made through a home vouches for what that home has pinned.
func TestCorruptTokensAndInvites(t *testing.T) {
	k := corruptKeys()
	c := newCorrupt(t)
	secret := make([]byte, 16)
	here := unlock.Server{Name: "srv", KeyID: c.key.KeyID(), Addresses: []string{"127.0.0.1:1"}}
	elsewhere := unlock.Server{Name: "srv", KeyID: k.thief.KeyID(), Addresses: []string{"127.0.0.1:1"}}
	token := func(p escrow.Policy, servers ...unlock.Server) string {
		tok := api.Token{PolicyDigest: p.Digest(), Threshold: p.Threshold}
		for _, s := range servers {
			tok.Servers = append(tok.Servers, api.TokenServer{Server: s, Secret: secret})
		}
		return must(tok.Text())
	}
	invite := func(p escrow.Policy, s unlock.Server, name string) string {
		return must(api.Invite{PolicyDigest: p.Digest(), Server: s, Name: name, Secret: secret}.Text())
	}
	for name, text := range map[string]string{
		"policy": token(k.otherPolicy, here), "server": token(k.policy, elsewhere), "one more server": token(k.policy, here, elsewhere),
	} {
		c.text = text
		if out := c.command("alice", exitRefused, "another policy or another server", "token", "create"); out != "" {
			t.Errorf("%s: printed %q", name, out)
		}
	}
	for name, text := range map[string]string{
		"policy": invite(k.otherPolicy, here, "eve"), "server": invite(k.policy, elsewhere, "eve"), "person": invite(k.policy, here, "mallory"),
	} {
		c.text = text
		if out := c.command("alice", exitRefused, "another policy, server or person", "admin", "add", "eve", "--role", "viewer"); out != "" {
			t.Errorf("%s: printed %q", name, out)
		}
	}
	c.text = "\x1b[2Jmet1.junk"
	c.command("alice", exitIntegrity, "", "token", "create")
	c.text = token(k.policy, here)
	if out := c.command("alice", exitDone, "", "token", "create"); out != c.text+"\n" {
		t.Errorf("an honest token: %q", out)
	}
}

func TestCorruptAnswersWithAnotherVolume(t *testing.T) {
	c := newCorrupt(t)
	c.packet = corruptKeys().otherPacket
	c.command("bob", exitRefused, "asked for", "recover", "--request", "--volume", "laptop7", "--reason", "forgot it")
	if c.filed != nil {
		t.Error("a request was filed")
	}
}

func TestCorruptListsAndTexts(t *testing.T) {
	c := newCorrupt(t)
	c.command("alice", exitFailed, "0 machines", "machine", "show", "laptop7")
	if out := c.command("alice", exitIntegrity, "", "policy", "show"); out != "" {
		t.Errorf("printed %q", out)
	}
}

// What cannot be told was not done.
func TestFullStandardOutput(t *testing.T) {
	c := newCorrupt(t)
	k := corruptKeys()
	c.text = must(api.Token{
		PolicyDigest: k.policy.Digest(), Threshold: 1,
		Servers: []api.TokenServer{{Server: unlock.Server{Name: "srv", KeyID: c.key.KeyID(), Addresses: []string{"127.0.0.1:1"}}, Secret: make([]byte, 16)}},
	}.Text())
	full := must(os.OpenFile("/dev/full", os.O_WRONLY, 0))
	defer full.Close()
	var errOut bytes.Buffer
	for _, args := range [][]string{{"token", "create"}, {"recover", "--request", "--volume", "laptop7", "--reason", "r"}} {
		if got := run(append([]string{"--home", c.home("bob")}, args...), strings.NewReader(""), full, &errOut); got != exitFailed {
			t.Errorf("%v: exit %d", args, got)
		}
	}
}

// A server that answers with the packet of a machine that calls itself by another
// volume's UUID answers with another packet than was asked for.
func TestNamesOfOthers(t *testing.T) {
	const uuid, other = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	brief := func(machine, volume string) *escrow.Brief {
		return &escrow.Brief{Header: escrow.Header{Machine: machine, Volume: escrow.Volume{UUID: volume}}}
	}
	for _, c := range []struct {
		word string
		b    *escrow.Brief
		want bool
	}{
		{uuid, brief("laptop7", uuid), true},
		{strings.ToUpper(uuid), brief("laptop7", uuid), true},
		{uuid[:8], brief("laptop7", uuid), true},
		{"laptop7", brief("laptop7", uuid), true},
		{uuid, brief(uuid, other), false},
		{uuid, brief("laptop7", other), false},
	} {
		if got := names(c.word, c.b); got != c.want {
			t.Errorf("%s for %+v: %v", c.word, c.b.Header, got)
		}
	}
}
