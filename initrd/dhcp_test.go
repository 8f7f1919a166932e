package initrd

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

var testMAC = [6]byte{0x52, 0x54, 0, 1, 2, 3}

// request is the BOOTP part of a message, as a server reads it.
func request(m message) []byte { return m.packet()[ipHeader+udpHeader:] }

func TestParseReply(t *testing.T) {
	server := dhcpServer{address: "10.1.0.7", lease: 600, routes: []byte{
		24, 10, 9, 8, 10, 1, 0, 2, // 10.9.8.0/24 by 10.1.0.2
		0, 10, 1, 0, 1, // everything by 10.1.0.1
		32, 10, 1, 1, 1, 0, 0, 0, 0, // on the link
	}}
	r, err := parseReply(server.answer(request(message{kind: dhcpRequest, xid: 7, mac: testMAC})), 7, testMAC)
	if err != nil {
		t.Fatal(err)
	}
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	want := []route{{p("10.9.8.0/24"), a("10.1.0.2")}, {p("0.0.0.0/0"), a("10.1.0.1")}, {p("10.1.1.1/32"), netip.Addr{}}}
	if r.kind != dhcpAck || r.address != p("10.1.0.7/24") || r.server != a("10.1.0.1") || !slices.Equal(r.routes, want) ||
		!slices.Equal(r.dns, []netip.Addr{a("10.1.0.1")}) || r.duration != 10*time.Minute || r.renewal != 5*time.Minute {
		t.Errorf("%+v", r)
	}
}

// TestBadReplies: one thing is wrong with each of them, and none is taken.
func TestBadReplies(t *testing.T) {
	good := dhcpServer{address: "10.1.0.7"}.answer(request(message{kind: dhcpDiscover, xid: 7, mac: testMAC}))
	if _, err := parseReply(good, 7, testMAC); err != nil {
		t.Fatal(err)
	}
	const bootp, options = ipHeader + udpHeader, ipHeader + udpHeader + replyMin
	set := func(at int, value ...byte) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[at:], value); return b }
	}
	header := func(change func([]byte) []byte) func([]byte) []byte {
		return func(b []byte) []byte {
			b = change(b)
			copy(b[10:12], []byte{0, 0})
			binary.BigEndian.PutUint16(b[10:], checksum(b[:ipHeader]))
			return b
		}
	}
	for name, spoil := range map[string]func([]byte) []byte{
		"empty":            func([]byte) []byte { return nil },
		"cut":              func(b []byte) []byte { return b[:len(b)-1] },
		"header alone":     func(b []byte) []byte { return b[:ipHeader] },
		"IPv6":             set(0, 0x65),
		"short header":     header(set(0, 0x44)),
		"checksum":         set(10, good[10]^1),
		"fragment":         header(set(6, 0x20, 0)),
		"later fragment":   header(set(6, 0, 1)),
		"TCP":              header(set(9, 6)),
		"from another":     set(ipHeader, 0, 53),
		"to another":       set(ipHeader+2, 0, 69),
		"UDP too long":     set(ipHeader+4, 0xff, 0xff),
		"UDP too short":    set(ipHeader+4, 0, 7),
		"UDP cut":          set(ipHeader+4, 0, 100),
		"request":          set(bootp, 1),
		"other hardware":   set(bootp+1, 6),
		"other length":     set(bootp+2, 16),
		"other xid":        set(bootp+4, 1),
		"other MAC":        set(bootp+28, 1),
		"no cookie":        set(bootp+236, 0),
		"no address":       set(bootp+16, 0, 0, 0, 0),
		"multicast":        set(bootp+16, 224, 0, 0, 1),
		"loopback":         set(bootp+16, 127, 0, 0, 1),
		"its network":      set(bootp+16, 10, 1, 0, 0),
		"its broadcast":    set(bootp+16, 10, 1, 0, 255),
		"no type":          set(options, 0, 0, 0),
		"option cut":       set(options+1, 250),
		"no server":        set(options+3, 0, 0, 0, 0, 0, 0),
		"server of zero":   set(options+5, 0, 0, 0, 0),
		"mask with holes":  set(options+11, 255, 0, 255, 0),
		"mask of zero":     set(options+11, 0, 0, 0, 0),
		"mask of 3 bytes":  set(options+9, optionMask, 3, 255, 255, 255, 0),
		"route to nowhere": set(options+21, optionRoutes, 4, 33, 1, 1, 1),
		"route cut":        set(options+21, optionRoutes, 4, 8, 10, 1, 1),
	} {
		if r, err := parseReply(spoil(slices.Clone(good)), 7, testMAC); !errors.Is(err, errReply) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

func TestOverload(t *testing.T) {
	b := make([]byte, replyMin)
	b = appendOption(b, optionOverload, 3)
	b = append(b, optionEnd)
	copy(b[108:], appendOption(nil, optionDNS, 10, 0, 0, 1))
	copy(b[44:], appendOption(nil, optionDNS, 10, 0, 0, 2))
	options, err := parseOptions(b)
	if err != nil || !slices.Equal(options[optionDNS], []byte{10, 0, 0, 1, 10, 0, 0, 2}) {
		t.Errorf("%v, %v", options, err)
	}
}

func FuzzReply(f *testing.F) {
	f.Add(dhcpServer{address: "10.1.0.7"}.answer(request(message{kind: dhcpDiscover, xid: 7, mac: testMAC})))
	f.Add(dhcpServer{address: "10.1.0.7", routes: []byte{24, 10, 9, 8, 10, 1, 0, 2}}.answer(request(message{kind: dhcpRequest, xid: 7, mac: testMAC})))
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > ipHeader { // a fuzzer does not find checksums
			copy(packet[10:12], []byte{0, 0})
			binary.BigEndian.PutUint16(packet[10:], checksum(packet[:ipHeader]))
		}
		r, err := parseReply(packet, 7, testMAC)
		if err != nil {
			if !errors.Is(err, errReply) {
				t.Fatal(err)
			}
			return
		}
		if r.kind == dhcpNak {
			return
		}
		if !unicast(r.address.Addr()) || r.address.Bits() < 1 || !unicast(r.server) || len(r.routes) > maxRoutes || len(r.dns) > 3 ||
			r.duration < 0 || r.renewal > r.duration || r.duration > 0 && r.renewal < dhcpShortest/2 {
			t.Fatalf("%+v", r)
		}
	})
}

// exchangeTest runs a client against a server that is a function: what it returns for a message is sent back.
func exchangeTest(t *testing.T, serve func(at time.Duration, options map[byte][]byte, b []byte) []byte, lasts time.Duration) []*lease {
	t.Helper()
	var leases []*lease
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		ours, theirs := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), lasts)
		defer cancel()
		go func() {
			buf := make([]byte, 2000)
			for {
				n, err := theirs.Read(buf)
				if err != nil {
					return
				}
				b := buf[ipHeader+udpHeader : n]
				options, err := parseOptions(b)
				if err != nil || checksum(buf[:ipHeader]) != 0 {
					t.Errorf("the client's message: %v", err)
				}
				if reply := serve(time.Since(begin), options, b); reply != nil {
					go func() { _, _ = theirs.Write(reply) }()
				}
			}
		}()
		c := &dhcpClient{conn: ours, mac: testMAC, leased: func(l *lease) { leases = append(leases, l) }, report: func(string, ...any) {}}
		if err := c.run(ctx); err != nil {
			t.Error(err)
		}
		theirs.Close()
		synctest.Wait()
	})
	return leases
}

// TestNobodyAnswers: the attempts come further and further apart, up to 16 seconds, and never stop.
func TestNobodyAnswers(t *testing.T) {
	var times []time.Duration
	leases := exchangeTest(t, func(at time.Duration, _ map[byte][]byte, _ []byte) []byte {
		times = append(times, at)
		return nil
	}, 10*time.Minute)
	if len(leases) != 0 || len(times) < 25 || times[0] != 0 {
		t.Fatalf("%d leases, attempts at %v", len(leases), times)
	}
	for i, step := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 16 * time.Second} {
		if d := times[i+1] - times[i]; d < step/2 || d >= step*3/2 {
			t.Errorf("attempt %d after %v", i+1, d)
		}
	}
}

// TestSilenceIsSaid once, not at each attempt.
func TestSilenceIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		go func() {
			buf := make([]byte, 2000)
			for {
				if _, err := theirs.Read(buf); err != nil {
					return
				}
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		said := 0
		c := &dhcpClient{conn: ours, mac: testMAC, report: func(string, ...any) { said++ }}
		if err := c.run(ctx); err != nil || said != 1 {
			t.Errorf("%v, said %d times", err, said)
		}
	})
}

// TestRenewal: at half its time a lease is asked for again, with the address that the link has, and goes on.
func TestRenewal(t *testing.T) {
	server := dhcpServer{address: "10.1.0.7", lease: 600}
	var renewed []time.Duration
	leases := exchangeTest(t, func(at time.Duration, o map[byte][]byte, b []byte) []byte {
		if netip.AddrFrom4([4]byte(b[12:16])).String() == "10.1.0.7" {
			renewed = append(renewed, at)
			if len(o[optionServer]) != 0 || len(o[optionAddress]) != 0 {
				t.Errorf("options %v", o)
			}
		}
		return server.answer(b)
	}, 16*time.Minute)
	if want := []time.Duration{5 * time.Minute, 10 * time.Minute, 15 * time.Minute}; !slices.Equal(renewed, want) || len(leases) != 4 {
		t.Errorf("renewed at %v, %d leases", renewed, len(leases))
	}
}

// TestLeaseRunsOut: a server that is gone costs the address when the time is over, not before, and then the client asks anew.
func TestLeaseRunsOut(t *testing.T) {
	server := dhcpServer{address: "10.1.0.7", lease: 600}
	discovered := 0
	leases := exchangeTest(t, func(at time.Duration, o map[byte][]byte, b []byte) []byte {
		if o[optionType][0] == dhcpDiscover {
			discovered++
			if discovered == 2 && at != 10*time.Minute {
				t.Errorf("asked anew after %v", at)
			}
		}
		if at > time.Minute && at < 11*time.Minute {
			return nil
		}
		return server.answer(b)
	}, 12*time.Minute)
	if len(leases) != 3 || leases[0] == nil || leases[1] != nil || leases[2] == nil {
		t.Errorf("%v", leases)
	}
}

// TestRefused: a server that offers and then refuses is not asked in a tight loop.
func TestRefused(t *testing.T) {
	asked := 0
	server := dhcpServer{address: "10.1.0.7"}
	leases := exchangeTest(t, func(_ time.Duration, o map[byte][]byte, b []byte) []byte {
		reply := server.answer(b)
		if o[optionType][0] == dhcpRequest {
			asked++
			reply[ipHeader+udpHeader+replyMin+2] = dhcpNak
		}
		return reply
	}, time.Minute)
	if slices.ContainsFunc(leases, func(l *lease) bool { return l != nil }) || asked < 10 || asked > 120 {
		t.Errorf("%v, refused %d times", leases, asked)
	}
}

// TestRequestIsLost: the offer is asked for again, with the server that made it.
func TestRequestIsLost(t *testing.T) {
	server := dhcpServer{address: "10.1.0.7"}
	requests := 0
	leases := exchangeTest(t, func(_ time.Duration, o map[byte][]byte, b []byte) []byte {
		if o[optionType][0] == dhcpRequest {
			requests++
			if !slices.Equal(o[optionAddress], []byte{10, 1, 0, 7}) || !slices.Equal(o[optionServer], []byte{10, 1, 0, 1}) {
				t.Errorf("options %v", o)
			}
			if requests < 3 {
				return nil
			}
		}
		return server.answer(b)
	}, time.Minute)
	if requests != 3 || len(leases) != 1 {
		t.Errorf("%d requests, leases %v", requests, leases)
	}
}
