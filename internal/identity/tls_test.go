package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"
)

// shake makes a handshake and one byte each way, and returns what the server
// knows of the client, and both ends' errors.
func shake(client, server *tls.Config) (state tls.ConnectionState, clientErr, serverErr error) {
	near, far := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	_ = near.SetDeadline(deadline)
	_ = far.SetDeadline(deadline)
	done := make(chan error)
	s := tls.Server(far, server)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x"))
		}
		far.Close()
		done <- err
	}()
	c := tls.Client(near, client)
	clientErr = c.Handshake()
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	near.Close()
	serverErr = <-done
	return s.ConnectionState(), clientErr, serverErr
}

func TestBothEndsArePinned(t *testing.T) {
	server, client, other := must(Generate()), must(Generate()), must(Generate())
	config := must(server.ServerTLS("p/1", "q/1"))
	state, clientErr, serverErr := shake(must(client.ClientTLS(server.KeyID(), "q/1")), config)
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	if id, err := PeerKeyID(state); err != nil || id != client.KeyID() || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "q/1" {
		t.Errorf("%s, %v, %+v", id, err, state)
	}
	if _, err, _ := shake(must(client.ClientTLS(other.KeyID(), "q/1")), config); !errors.Is(err, ErrPin) {
		t.Errorf("another key than the pinned one: %v", err)
	}
	if _, err, _ := shake(must(client.ClientTLS("", "q/1")), config); !errors.Is(err, ErrPin) {
		t.Errorf("nothing pinned: %v", err)
	}
	if _, err, _ := shake(must(client.ClientTLS(server.KeyID(), "r/1")), config); err == nil {
		t.Error("a protocol that the server does not speak")
	}
	if _, err, _ := shake(must(client.ClientTLS(server.KeyID(), "q/1")), must(server.ServerTLS())); err == nil || !strings.Contains(err.Error(), "does not speak") {
		t.Errorf("no protocol at all: %v", err)
	}
}

func TestServerRefuses(t *testing.T) {
	server, client := must(Generate()), must(Generate())
	config := must(server.ServerTLS("q/1"))
	for name, change := range map[string]func(*tls.Config){
		"no client key": func(c *tls.Config) { c.Certificates = nil },
		"TLS 1.2":       func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
	} {
		c := must(client.ClientTLS(server.KeyID(), "q/1"))
		change(c)
		if _, _, err := shake(c, config); err == nil {
			t.Errorf("%s: served", name)
		}
	}
}

// TLS proves that the peer holds the key that it shows: a copied certificate
// is worth nothing.
func TestCopiedCertificate(t *testing.T) {
	server, thief := must(Generate()), must(Generate())
	config := must(thief.ServerTLS("q/1"))
	copied := must(server.certificate())
	copied.PrivateKey = thief.private
	config.Certificates = []tls.Certificate{copied}
	if _, err, _ := shake(must(must(Generate()).ClientTLS(server.KeyID(), "q/1")), config); err == nil {
		t.Error("somebody without the key was taken for the server")
	}
}

// A peer with another kind of key is nobody.
func TestOtherKindOfKey(t *testing.T) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	server := must(Generate())
	c := must(must(Generate()).ClientTLS(server.KeyID(), "q/1"))
	c.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	state, _, _ := shake(c, must(server.ServerTLS("q/1")))
	if id, err := PeerKeyID(state); !errors.Is(err, ErrKey) || id != "" {
		t.Errorf("%q, %v", id, err)
	}
	if _, err := PeerKey(tls.ConnectionState{}); !errors.Is(err, ErrKey) {
		t.Errorf("no certificate: %v", err)
	}
}

// A machine whose clock stands at 1970 must boot, and one in 2100 too.
func TestClocks(t *testing.T) {
	server, client := must(Generate()), must(Generate())
	for _, now := range []time.Time{time.Unix(1, 0), time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)} {
		c, s := must(client.ClientTLS(server.KeyID(), "q/1")), must(server.ServerTLS("q/1"))
		c.Time = func() time.Time { return now }
		s.Time = c.Time
		if _, err, _ := shake(c, s); err != nil {
			t.Errorf("%s: %v", now, err)
		}
	}
}
