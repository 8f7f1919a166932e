package identity

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// ErrPin is wrapped when the other end has another key than the pinned one.
var ErrPin = errors.New("the server has another key than the pinned one")

// The certificate only carries the key: both ends pin the key and read no
// date, so a machine whose clock stands at 1970 can still boot.
func (k *Key) certificate() (tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280, 4.1.2.5: no end
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.private.Public(), k.private)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("identity: make certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k.private}, nil
}

func (k *Key) config(protocols []string) (*tls.Config, error) {
	certificate, err := k.certificate()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		Certificates:           []tls.Certificate{certificate},
		MinVersion:             tls.VersionTLS13,
		NextProtos:             protocols,
		SessionTicketsDisabled: true,
	}, nil
}

// ServerTLS is TLS 1.3 that demands a client key of any kind; who that is and
// what it may do is decided behind it, by PeerKeyID.
func (k *Key) ServerTLS(protocols ...string) (*tls.Config, error) {
	config, err := k.config(protocols)
	if err != nil {
		return nil, err
	}
	config.ClientAuth = tls.RequireAnyClientCert
	return config, nil
}

// ClientTLS is TLS 1.3 with k's key to the server that has the key pinned, for
// one application protocol (ALPN).
func (k *Key) ClientTLS(pinned KeyID, protocol string) (*tls.Config, error) {
	config, err := k.config([]string{protocol})
	if err != nil {
		return nil, err
	}
	// The chain means nothing for a self-signed certificate; VerifyConnection
	// checks the key instead, and TLS has checked that the peer holds it.
	config.InsecureSkipVerify = true
	config.VerifyConnection = func(state tls.ConnectionState) error {
		id, err := PeerKeyID(state)
		if err != nil {
			return err
		}
		if id != pinned {
			return fmt.Errorf("%w: has %s, pinned %s", ErrPin, id.Short(), pinned.Short())
		}
		if state.NegotiatedProtocol != protocol {
			return fmt.Errorf("identity: the server does not speak %s", protocol)
		}
		return nil
	}
	return config, nil
}

// PeerKeyID returns the key ID of the other end of a connection.
func PeerKeyID(state tls.ConnectionState) (KeyID, error) {
	public, err := PeerKey(state)
	if err != nil {
		return "", err
	}
	return public.KeyID(), nil
}

// PeerKey returns the public key of the other end of a connection.
func PeerKey(state tls.ConnectionState) (Public, error) {
	if len(state.PeerCertificates) == 0 {
		return nil, fmt.Errorf("%w: the peer showed none", ErrKey)
	}
	return ParsePublic(state.PeerCertificates[0].RawSubjectPublicKeyInfo)
}
