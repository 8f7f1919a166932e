package unlock

import (
	"crypto/tls"
	"errors"
	"net"
	"testing"
)

// The two benchmarks are to be run together: what a release costs beside the
// bare handshake with keys on both sides, both ends on this machine.

func BenchmarkHandshake(b *testing.B) {
	s := newSite(b, 1, 1)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", s.configs[0])
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if conn.(*tls.Conn).Handshake() == nil {
					_, _ = conn.Write([]byte{1})
				}
			}()
		}
	}()
	config, err := s.keys.TLS.ClientTLS(s.serverKeys[0].KeyID(), Protocol)
	if err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			conn, err := tls.Dial("tcp", listener.Addr().String(), config)
			if err == nil {
				_, err = conn.Read(make([]byte, 1)) // the server has seen our key
				err = errors.Join(err, conn.Close())
			}
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "handshakes/s")
}

func BenchmarkServe(b *testing.B) {
	s := newSite(b, 1, 1)
	address := listen(b, s.configs[0], s.sources[0])
	config, err := s.keys.TLS.ClientTLS(s.serverKeys[0].KeyID(), Protocol)
	if err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := fetchRaw(address, config); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "releases/s")
}

// fetchRaw asks without opening the blob: that is the machine's cost.
func fetchRaw(address string, config *tls.Config) error {
	raw, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	conn := tls.Client(raw, config)
	defer conn.Close()
	if _, err := conn.Write(requestFrame()); err != nil {
		return err
	}
	data, err := readFrame(conn, MaxReply, nil)
	if err != nil {
		return err
	}
	reply, err := ParseReply(data)
	if err == nil && !reply.Released {
		err = ErrRefused
	}
	return err
}
