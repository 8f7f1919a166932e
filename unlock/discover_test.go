package unlock

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"mandos-escrow/internal/identity"
)

// announcement is what one server says, as grandcat/zeroconf puts it.
type announcement struct {
	id        uint16
	instance  string
	host      string
	port      uint16
	txt       []string
	addresses []string
}

func (a announcement) bytes() []byte {
	name := dnsmessage.MustNewName
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: a.id, Response: true, Authoritative: true})
	b.EnableCompression()
	header := func(n string) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: name(n), Class: dnsmessage.ClassINET, TTL: 120}
	}
	instance := a.instance + "." + serviceDomain
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	must(b.StartAnswers())
	must(b.PTRResource(header(serviceDomain), dnsmessage.PTRResource{PTR: name(instance)}))
	must(b.StartAdditionals())
	must(b.SRVResource(header(instance), dnsmessage.SRVResource{Port: a.port, Target: name(a.host)}))
	if a.txt != nil {
		must(b.TXTResource(header(instance), dnsmessage.TXTResource{TXT: a.txt}))
	}
	for _, text := range a.addresses {
		ip := net.ParseIP(text)
		if four := ip.To4(); four != nil {
			must(b.AResource(header(a.host), dnsmessage.AResource{A: [4]byte(four)}))
			continue
		}
		must(b.AAAAResource(header(a.host), dnsmessage.AAAAResource{AAAA: [16]byte(ip)}))
	}
	packet, err := b.Finish()
	must(err)
	return packet
}

const questionID = 0xbeef

// announced is a good answer of the server with testKeyID.
func announced(addresses ...string) announcement {
	return announcement{questionID, "srv", "host.local.", 7625, []string{KeyIDText + string(testKeyID)}, addresses}
}

// newBrowser has asked on one link, which has addresses in two networks.
func newBrowser() (*Browser, *socket) {
	_, four, _ := net.ParseCIDR("192.0.2.0/24")
	_, six, _ := net.ParseCIDR("2001:db8::/64")
	b := &Browser{servers: []identity.KeyID{testKeyID}, changed: make(chan struct{})}
	return b, &socket{link: "eth0", id: questionID, onLink: []*net.IPNet{four, six}}
}

var linkLocal = net.ParseIP("fe80::5")

const fromLinkLocal = "[fe80::5%eth0]:7625"

func TestTakesAnswers(t *testing.T) {
	key := KeyIDText + string(testKeyID)
	for name, c := range map[string]struct {
		change func(a *announcement)
		want   []string
	}{
		"whole": {
			func(a *announcement) { a.addresses = []string{"192.0.2.7", "2001:db8::7", "fe80::7"} },
			[]string{fromLinkLocal, "192.0.2.7:7625", "[2001:db8::7]:7625", "[fe80::7%eth0]:7625"},
		},
		"no address":         {func(*announcement) {}, []string{fromLinkLocal}},
		"the source's again": {func(a *announcement) { a.addresses = []string{"fe80::5", "fe80::5"} }, []string{fromLinkLocal}},
		"many addresses": {
			func(a *announcement) {
				a.addresses = []string{"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"}
			},
			[]string{fromLinkLocal, "192.0.2.1:7625", "192.0.2.2:7625", "192.0.2.3:7625"},
		},
		"addresses of elsewhere": {
			func(a *announcement) {
				a.addresses = []string{"198.51.100.1", "127.0.0.1", "0.0.0.0", "::", "::1", "ff02::1", "224.0.0.1", "2001:db8:1::1", "255.255.255.255", "::ffff:198.51.100.1"}
			},
			[]string{fromLinkLocal},
		},
		"another host's addresses":     {func(a *announcement) { a.host = "h." + strings.Repeat("x", 60) + ".local." }, []string{fromLinkLocal}},
		"another port":                 {func(a *announcement) { a.port = 1 }, []string{"[fe80::5%eth0]:1"}},
		"port 0":                       {func(a *announcement) { a.port = 0 }, nil},
		"no TXT":                       {func(a *announcement) { a.txt = nil }, []string{fromLinkLocal}},
		"TXT without a key":            {func(a *announcement) { a.txt = []string{"path=/", ""} }, []string{fromLinkLocal}},
		"TXT with more":                {func(a *announcement) { a.txt = []string{"path=/", "KEY-ID=" + string(testKeyID), "key-id=x"} }, []string{fromLinkLocal}},
		"another server's key":         {func(a *announcement) { a.txt = []string{KeyIDText + strings.Repeat("0", 64)} }, nil},
		"a key that is cut off":        {func(a *announcement) { a.txt = []string{key[:70]} }, nil},
		"an empty key":                 {func(a *announcement) { a.txt = []string{KeyIDText, key} }, nil},
		"the answer to another query":  {func(a *announcement) { a.id++ }, nil},
		"instance in capitals":         {func(a *announcement) { a.instance = "SRV 1" }, []string{fromLinkLocal}},
		"no instance of it, but alike": {func(a *announcement) { a.instance = "x._tcp.local" }, []string{fromLinkLocal}},
	} {
		t.Run(name, func(t *testing.T) {
			b, s := newBrowser()
			before, a := b.Changed(), announced()
			c.change(&a)
			b.take(s, a.bytes(), linkLocal, epoch)
			if got := b.Addresses(testKeyID); !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
			if fired := isClosed(before); fired != (c.want != nil) {
				t.Errorf("told of a change: %t", fired)
			}
			again := b.Changed()
			if b.take(s, a.bytes(), linkLocal, epoch.Add(time.Minute)); isClosed(again) {
				t.Error("the same answer is told as a change")
			}
		})
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestDropsPackets: each is dropped whole, with the good record that is in it.
func TestDropsPackets(t *testing.T) {
	good := announced("192.0.2.7").bytes()
	set := func(at int, value uint16) []byte {
		packet := slices.Clone(good)
		binary.BigEndian.PutUint16(packet[at:], value)
		return packet
	}
	for name, packet := range map[string][]byte{
		"empty":               {},
		"a header only":       good[:12],
		"a question":          query(questionID),
		"not a response":      set(2, 0),
		"an error":            set(2, 0x8403),
		"questions missing":   set(4, 65535),
		"records missing":     set(10, 65535),
		"too long":            append(slices.Clone(good), make([]byte, maxPacket)...),
		"too many records":    announced(slices.Repeat([]string{"192.0.2.7"}, maxRecords)...).bytes(),
		"a name without end":  append(set(10, 4), 0xc0, byte(len(good))),
		"a name of 300 bytes": append(set(10, 4), slices.Repeat([]byte("\x09123456789"), 30)...),
	} {
		b, s := newBrowser()
		if b.take(s, packet, linkLocal, epoch); b.Addresses(testKeyID) != nil {
			t.Errorf("%s: found %q", name, b.Addresses(testKeyID))
		}
	}
	for n := range len(good) {
		if _, found, err := parseAnswer(good[:n]); err == nil {
			t.Errorf("cut off after %d of %d bytes: %v", n, len(good), found)
		}
	}
	for _, from := range []string{"198.51.100.1", "2001:db8:1::1", "::1", "0.0.0.0"} {
		b, s := newBrowser()
		if b.take(s, good, net.ParseIP(from), epoch); b.Addresses(testKeyID) != nil {
			t.Errorf("from %s: found %q", from, b.Addresses(testKeyID))
		}
	}
}

// TestFloodOfAnswers: what is kept is bounded, on each link by itself, and a
// server gets in again once the flood was late.
func TestFloodOfAnswers(t *testing.T) {
	b, s := newBrowser()
	other := &socket{link: "eth1", id: questionID}
	flood := func(now time.Time) {
		for i := range 1000 {
			a := announced(fmt.Sprintf("192.0.2.%d", i%256))
			a.port = uint16(i + 1)
			b.take(s, a.bytes(), linkLocal, now)
		}
	}
	now := epoch
	flood(now)
	b.take(other, announced().bytes(), net.ParseIP("fe80::9"), now.Add(-time.Hour))
	b.take(s, announced().bytes(), linkLocal, now.Add(settleTime-1))
	list := b.Addresses(testKeyID)
	if len(list) != maxCandidates+1 || slices.Contains(list, fromLinkLocal) {
		t.Fatalf("%q", list)
	}
	if at := slices.Index(list, "[fe80::9%eth1]:7625"); at < 0 || at > maxCandidates-1 {
		t.Errorf("the other link is hidden: %q", list)
	}
	now = now.Add(settleTime)
	b.take(s, announced().bytes(), linkLocal, now)
	flood(now.Add(settleTime - 1))
	if list := b.Addresses(testKeyID); len(list) != maxCandidates+1 || !slices.Contains(list, fromLinkLocal) {
		t.Errorf("the server that was first once is not kept: %q", list)
	}
}

// TestServerIsThereAgain: an announcement makes the browser ask, and the answer
// is news although its address was known.
func TestServerIsThereAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, s := newBrowser()
		heard := make(chan struct{}, 1)
		answer := announced().bytes()
		b.take(s, answer, linkLocal, time.Now())
		before := b.Changed()
		for _, packet := range [][]byte{{}, query(questionID), announced().bytes()[:50]} {
			b.notice(packet, heard)
		}
		if b.take(s, answer, linkLocal, time.Now()); isClosed(before) || len(heard) > 0 {
			t.Error("news without an announcement")
		}
		start := time.Now()
		b.notice(answer, heard)
		b.notice(answer, heard)
		if len(heard) != 1 || time.Since(start) != 2*askGap {
			t.Errorf("two announcements made %d questions due in %v", len(heard), time.Since(start))
		}
		if isClosed(before) {
			t.Error("the announcement itself was believed")
		}
		if b.take(s, answer, linkLocal, time.Now()); !isClosed(before) {
			t.Error("the answer was no news")
		}
	})
}

// TestManyKeys: servers that nobody asks for take no room.
func TestManyKeys(t *testing.T) {
	b, s := newBrowser()
	for i := range 1000 {
		a := announced()
		a.txt = []string{KeyIDText + fmt.Sprintf("%064x", i)}
		b.take(s, a.bytes(), linkLocal, epoch)
		a.txt, a.port = nil, uint16(i+1)
		b.take(s, a.bytes(), linkLocal, epoch)
	}
	b.take(s, announced().bytes(), linkLocal, epoch)
	if list := b.Addresses(testKeyID); len(list) != maxCandidates+1 || !slices.Contains(list, fromLinkLocal) {
		t.Errorf("%q", list)
	}
}

// TestQuery is what RFC 6762 asks for, as another reader sees it.
func TestQuery(t *testing.T) {
	var m dnsmessage.Message
	if err := m.Unpack(query(questionID)); err != nil {
		t.Fatal(err)
	}
	const unicast = 1 << 15
	want := dnsmessage.Question{Name: dnsmessage.MustNewName("_mandos-escrow._tcp.local."), Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET | unicast}
	if m.ID != questionID || m.Response || len(m.Questions) != 1 || m.Questions[0] != want {
		t.Errorf("%+v", m)
	}
}

func TestAskDelays(t *testing.T) {
	var at time.Duration
	var got []time.Duration
	for n := range 12 {
		got = append(got, at)
		at += askDelay(n)
	}
	if got[1] != 250*time.Millisecond || got[2] != 750*time.Millisecond || got[3] != 1750*time.Millisecond || askDelay(8) != lastAsk || askDelay(1<<40) != lastAsk {
		t.Errorf("%v", got)
	}
}
