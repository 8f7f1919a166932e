package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

const (
	siteVolume     = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	sitePassphrase = "011000-012002-013004-014006-015008-016010-017012-018014"
)

var siteVolumeKey = bytes.Repeat([]byte("CanaryVolumeKey!"), 4)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// siteMaster is one master key for all tests: to protect it takes a while.
var siteMaster = sync.OnceValues(func() (*seal.PrivateKey, []byte) {
	key := must(seal.Generate("master", time.Now().Add(-time.Hour)))
	return key, must(key.ArmorProtected([]byte("correct-horse-battery-staple")))
})

// logs is a log that tests may read while it is written.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// site is a server that runs, and whoever talks to it.
type site struct {
	t       testing.TB
	dir     string
	address string
	offset  atomic.Int64 // of its clock
	log     logs
	server  *Server
	key     identity.KeyID
	control *api.Client
	stop    func() // ends it and waits
	people  map[string]*person
}

// person is an administrator with a client.
type person struct {
	*api.Client
	name string
	key  *identity.Key
}

// host is an enrolled machine.
type host struct {
	*api.Client // as its running identity
	name        string
	boot        *identity.Key
	running     *identity.Key
	packet      []byte
	blob        []byte
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// newState makes a state folder and does not serve it.
func newState(t testing.TB, dir string) (address string) {
	t.Helper()
	address = freeAddress(t)
	master, private := siteMaster()
	settings := Settings{Name: "srv", Listen: []string{address}, Addresses: []string{address}}
	if err := Init(dir, settings, Master{master.Public(), private}, time.Now()); err != nil {
		t.Fatal(err)
	}
	return address
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, dir: filepath.Join(t.TempDir(), "srv"), people: map[string]*person{}}
	s.address = newState(t, s.dir)
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *site) now() time.Time { return time.Now().Add(time.Duration(s.offset.Load())) }

func (s *site) start() {
	s.t.Helper()
	state, err := OpenState(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = New(state, slog.New(slog.NewTextHandler(&s.log, &slog.HandlerOptions{Level: slog.LevelDebug})), s.now)
	s.key = state.Key.KeyID()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.server.Run(ctx) }()
	s.control = api.DialControl(Socket(s.dir))
	awaitServer(s.t, s.control)
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, state.Close()); err != nil {
			s.t.Error(err)
		}
		s.control.Close()
	})
}

func (s *site) restart() {
	s.t.Helper()
	s.stop()
	s.start()
}

func awaitServer(t testing.TB, control *api.Client) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := control.Call(context.Background(), "GET", "/v1/status", nil, nil)
		if err == nil || api.CodeOf(err) != "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func (s *site) here() unlock.Server {
	return unlock.Server{Name: "srv", KeyID: s.key, Addresses: []string{s.address}}
}

func (s *site) dial(key *identity.Key, witness *api.Witness) *api.Client {
	s.t.Helper()
	c := must(api.Dial(s.here(), key, witness))
	s.t.Cleanup(c.Close)
	return c
}

// local is a call on the control socket that must succeed.
func (s *site) local(method, path string, in, out any) {
	s.t.Helper()
	if err := s.control.Call(context.Background(), method, path, in, out); err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
}

// person returns the administrator of that name, and makes them with the role
// that is said first.
func (s *site) person(name, role string) *person {
	s.t.Helper()
	if p := s.people[name]; p != nil {
		return p
	}
	p := &person{name: name, key: must(identity.Generate())}
	p.Client = s.dial(p.key, nil)
	if err := p.login(s.invite(name, role)); err != nil {
		s.t.Fatal(err)
	}
	s.people[name] = p
	return p
}

func (s *site) invite(name, role string) []byte {
	s.t.Helper()
	var text api.Text
	s.local("POST", "/v1/admins", api.NewAdmin{Name: name, Role: role}, &text)
	return must(api.ParseInvite([]byte(text.Text))).Secret
}

func (p *person) login(secret []byte) error {
	return p.Call(context.Background(), "POST", "/v1/login", api.Login{Secret: secret}, nil)
}

func (s *site) token(uses int) []byte {
	s.t.Helper()
	var text api.Text
	s.local("POST", "/v1/tokens", api.NewToken{Uses: uses, TTL: time.Hour}, &text)
	return must(api.ParseToken([]byte(text.Text))).Servers[0].Secret
}

func newHost(s *site, name string) *host {
	h := &host{name: name, boot: must(identity.Generate()), running: must(identity.Generate()), blob: []byte("a sealed blob of " + name)}
	h.Client = s.dial(h.running, nil)
	return h
}

func (h *host) register(secret []byte) error {
	registration := must(api.Registration{
		Name: h.name, MachineIDHash: strings.Repeat("ab", 32), Boot: h.boot.Public(), Running: h.running.KeyID(),
	}.Sign(h.boot))
	return h.Call(context.Background(), "POST", "/v1/enroll", api.Enroll{Secret: secret, Registration: registration}, nil)
}

// makePacket seals the canaries of these tests.
func (h *host) makePacket(policy escrow.Policy, volume string) []byte {
	master, _ := siteMaster()
	header := escrow.Header{
		Machine: h.name, KeyID: h.boot.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: volume},
	}
	return must(escrow.Make(header, policy, []*seal.PublicKey{master.Public()}, []escrow.Payload{
		&escrow.PassphrasePayload{Passphrase: []byte(sitePassphrase), Slot: 1, LUKSType: "luks2"},
		&escrow.VolumeKeyPayload{
			Key: siteVolumeKey, LUKSType: "luks2", Cipher: "aes-xts-plain64", KeyBits: 512, DataOffset: 16 << 20, SectorSize: 512,
			DigestHash: "sha256", DigestIterations: 1000, DigestSalt: []byte("salt"), Digest: []byte("digest"), HeaderBackup: []byte("header"),
		},
	}, h.running, time.Now()))
}

func (s *site) policy() escrow.Policy {
	s.t.Helper()
	var p api.Policy
	s.local("GET", "/v1/policy", nil, &p)
	return must(escrow.ParsePolicy([]byte(p.Policy)))
}

// enroll makes a machine with one volume that boots.
func (s *site) enroll(name, volume string) *host {
	s.t.Helper()
	h := newHost(s, name)
	if err := h.register(s.token(1)); err != nil {
		s.t.Fatal(err)
	}
	h.packet = h.makePacket(s.policy(), volume)
	path := "/v1/self/volumes/" + volume
	if err := h.Call(context.Background(), "PUT", path, api.Upload{Packet: h.packet, Blob: h.blob}, nil); err != nil {
		s.t.Fatal(err)
	}
	if err := h.Call(context.Background(), "POST", path+"/commit", api.Commit{Packet: must(escrow.Parse(h.packet)).ID, Boot: true}, nil); err != nil {
		s.t.Fatal(err)
	}
	return h
}

func (h *host) packetID() string { return must(escrow.Parse(h.packet)).ID }

// change changes one machine by its key ID.
func (s *site) change(h *host, change api.Change) {
	s.t.Helper()
	change.Machines = []string{string(h.boot.KeyID())}
	s.local("POST", "/v1/machines", change, nil)
}

// bootConn connects as a boot identity and asks.
func bootConn(address string, server identity.KeyID, boot *identity.Key) (*tls.Conn, error) {
	conn, err := tls.Dial("tcp", address, must(boot.ClientTLS(server, unlock.Protocol)))
	if err != nil {
		return nil, err
	}
	request := must(unlock.Request{Attempt: strings.Repeat("0a", 16)}.Bytes())
	_, err = conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...))
	return conn, err
}

// bootReply returns all that the server sends, without the frame's length.
func bootReply(conn *tls.Conn) ([]byte, error) {
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	all, err := io.ReadAll(conn)
	return all[min(4, len(all)):], err
}

// boot asks for a machine's blobs.
func (s *site) boot(h *host) (unlock.Reply, []byte) {
	s.t.Helper()
	data := must(bootReply(must(bootConn(s.address, s.key, h.boot))))
	return must(unlock.ParseReply(data)), data
}

func (s *site) audit() []store.Event {
	s.t.Helper()
	var events []store.Event
	s.local("GET", "/v1/audit", nil, &events)
	return events
}

// actions are the actions about something, in order.
func (s *site) actions(about string) []string {
	s.t.Helper()
	var out []string
	for _, e := range s.audit() {
		if e.Request == about || e.Machine == about || e.Packet == about {
			out = append(out, e.Action)
		}
	}
	return out
}

// ask is a request that its requester knows.
type ask struct {
	signed []byte
	id     string
	oneOff *seal.PrivateKey
}

var askedOneOff = sync.OnceValue(func() *seal.PrivateKey { return must(seal.Generate("one-off", time.Now().Add(-time.Hour))) })

// newAsk signs a request of p for a machine's packet.
func newAsk(p *person, h *host, payload string, lifetime time.Duration, now time.Time) ask {
	packet := must(escrow.Parse(h.packet))
	id := hex.EncodeToString(must(io.ReadAll(io.LimitReader(randomSource{}, 16))))
	signed := must(recovery.Request{
		ID: id, PacketID: packet.ID, PacketDigest: packet.Digest, HeaderDigest: packet.HeaderDigest, Payload: payload,
		PayloadDigest: sha256.Sum256(must(packet.Payload(payload)).Message), VolumeUUID: packet.Volume.UUID, Machine: packet.Machine,
		Requester: p.name, RequesterID: p.key.KeyID(), Reason: "forgot it", Created: now.Truncate(time.Second),
		Expires: now.Truncate(time.Second).Add(lifetime), Recipient: askedOneOff().Public(),
	}.Sign(p.key))
	return ask{signed, id, askedOneOff()}
}

type randomSource struct{}

func (randomSource) Read(b []byte) (int, error) {
	return copy(b, must(identity.Generate()).Public()[12:]), nil
}

// file files a request.
func (p *person) file(s *site, h *host) ask {
	s.t.Helper()
	a := newAsk(p, h, escrow.ForPassphrase, time.Hour, s.now())
	if err := p.Call(context.Background(), "POST", "/v1/requests", api.Signed{Signed: a.signed}, nil); err != nil {
		s.t.Fatal(err)
	}
	return a
}

// approval is what the command of an approver sends for a request.
func (p *person) approval(a ask, h *host) api.Approve {
	master, _ := siteMaster()
	request, packet, digest := must(recovery.ParseRequest(a.signed)), must(escrow.Parse(h.packet)), recovery.Digest(a.signed)
	_, message, err := packet.Share(request.Payload, master.Public().Fingerprint())
	share := must(escrow.OpenShare(must(message, err), master, packet, request.Payload))
	resealed := must(recovery.Reseal(share, request, digest, time.Now()))
	return api.Approve{Share: resealed, Approval: must(recovery.Approval{
		RequestDigest: digest, Trustee: master.Public().Fingerprint(), ShareDigest: sha256.Sum256(resealed),
		Approver: p.name, ApproverID: p.key.KeyID(), Created: time.Now().Truncate(time.Second),
	}.Sign(p.key))}
}

func (p *person) approve(a ask, h *host) error {
	return p.Call(context.Background(), "POST", "/v1/requests/"+a.id+"/approve", p.approval(a, h), nil)
}

func (p *person) collect(a ask) (api.Release, error) {
	var out api.Release
	err := p.Call(context.Background(), "POST", "/v1/requests/"+a.id+"/release", nil, &out)
	return out, err
}

func wantCode(t testing.TB, what string, err error, code api.Code) {
	t.Helper()
	if api.CodeOf(err) != code {
		t.Errorf("%s: %v (%s), want %s", what, err, api.CodeOf(err), code)
	}
}

func contains(t testing.TB, path string, what []byte) bool {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(data, what)
}

// readReply reads one reply of a connection that a test holds itself.
func readReply(t testing.TB, r *bufio.Reader) (status int, closes bool, body []byte) {
	t.Helper()
	reply, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatalf("the connection was cut off: %v", err)
	}
	defer reply.Body.Close()
	if body, err = io.ReadAll(reply.Body); err != nil {
		t.Fatalf("the reply was cut off: %v", err)
	}
	return reply.StatusCode, reply.Close, body
}
