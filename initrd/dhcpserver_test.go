package initrd

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// dhcpServer is a small server for tests; by its fields it is a good or a bad one.
type dhcpServer struct {
	address string // that it gives
	lease   uint32 // seconds; 0: an hour
	routes  []byte // option 121
	spoil   func(packet []byte) [][]byte
}

// serveDHCP serves one link of another namespace until the test ends.
func serveDHCP(t *testing.T, lan *elsewhere, name string, s dhcpServer) {
	t.Helper()
	var conn *linkConn
	var err error
	lan.run(func() { conn, err = openPort(index(t, name), serverPort) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 2000)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			reply := s.answer(buf[ipHeader+udpHeader : n])
			replies := [][]byte{reply}
			if s.spoil != nil {
				replies = s.spoil(reply)
			}
			for _, r := range replies {
				_, _ = conn.Write(r)
			}
		}
	}()
}

// answer replies to a BOOTP request with an offer or an acknowledgement.
func (s dhcpServer) answer(request []byte) []byte {
	options := map[byte][]byte{}
	if err := addOptions(options, request[replyMin:]); err != nil {
		return nil
	}
	kind := byte(dhcpOffer)
	if options[optionType][0] == dhcpRequest {
		kind = dhcpAck
	}
	lease := s.lease
	if lease == 0 {
		lease = 3600
	}
	address := netip.MustParseAddr(s.address)
	server := netip.PrefixFrom(address, 24).Masked().Addr().Next()
	b := make([]byte, replyMin)
	b[0], b[1], b[2] = 2, 1, 6
	copy(b[4:8], request[4:8])
	copy(b[16:20], address.AsSlice())
	copy(b[28:34], request[28:34])
	binary.BigEndian.PutUint32(b[236:], magicCookie)
	b = appendOption(b, optionType, kind)
	b = appendOption(b, optionServer, server.AsSlice()...)
	b = appendOption(b, optionMask, 255, 255, 255, 0)
	b = appendOption(b, optionRouter, server.AsSlice()...)
	b = appendOption(b, optionDNS, server.AsSlice()...)
	b = appendOption(b, optionLease, binary.BigEndian.AppendUint32(nil, lease)...)
	if s.routes != nil {
		b = appendOption(b, optionRoutes, s.routes...)
	}
	b = append(b, optionEnd)
	return appendUDP(server, netip.AddrFrom4([4]byte{255, 255, 255, 255}), serverPort, clientPort, b)
}
