package escrow

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

const (
	certificateKind    = "mandos-escrow-certificate-packet"
	certificateVersion = 1
	certificateLabel   = "mandos-escrow certificate-packet 1 "
	methodRSA          = "rsa-oaep-sha256"
	methodECDH         = "ecdh-hkdf-sha256"
	minRSA             = 2048  // bits
	maxRSA             = 16384 // bits: an operation with a longer key takes minutes
)

// Errors of certificates.
var (
	// ErrCertificate: nothing should be sealed to it, or cannot be.
	ErrCertificate = errors.New("certificate cannot be used")
	// ErrOtherKey: the packet is sealed to another certificate's key.
	ErrOtherKey = errors.New("packet is sealed to another key")
)

// CheckCertificate refuses a certificate that nothing should be sealed to: out
// of its dates, for another use, or with a weak key. Who issued it, whoever
// brings it has judged. Every error is ErrCertificate.
func CheckCertificate(c *x509.Certificate, now time.Time) error {
	if err := checkCertificate(c, now); err != nil {
		return fmt.Errorf("escrow: certificate of %q: %w: %w", c.Subject.CommonName, ErrCertificate, err)
	}
	return nil
}

func checkCertificate(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("it is not valid before %s", c.NotBefore.UTC().Format(time.DateTime))
	case now.After(c.NotAfter):
		return fmt.Errorf("it expired on %s", c.NotAfter.UTC().Format(time.DateTime))
	case len(c.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("it has a critical extension that is not known, %v", c.UnhandledCriticalExtensions[0])
	}
	need, name := x509.KeyUsageKeyAgreement, "keyAgreement"
	public := publicKey(c)
	if key, isRSA := public.(*rsa.PublicKey); isRSA {
		need, name = x509.KeyUsageKeyEncipherment, "keyEncipherment"
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("its RSA key has %d bits; %d to %d are possible", bits, minRSA, maxRSA)
		}
	} else if _, err := exchangeKey(public); err != nil {
		return err
	}
	if c.KeyUsage != 0 && c.KeyUsage&need == 0 {
		return fmt.Errorf("its key usage does not allow %s", name)
	}
	return nil
}

// publicKey is a certificate's key, or nil. The library itself passes X25519 over
// in a certificate.
func publicKey(c *x509.Certificate) crypto.PublicKey {
	if c.PublicKey != nil {
		return c.PublicKey
	}
	key, err := x509.ParsePKIXPublicKey(c.RawSubjectPublicKeyInfo)
	if err != nil {
		return nil
	}
	return key
}

// exchangeKey is a public key for ECDH.
func exchangeKey(public crypto.PublicKey) (*ecdh.PublicKey, error) {
	switch key := public.(type) {
	case *ecdh.PublicKey:
		return key, nil
	case *ecdsa.PublicKey:
		if exchange, err := key.ECDH(); err == nil {
			return exchange, nil
		}
		return nil, fmt.Errorf("its curve is %s; P-256, P-384, P-521 and X25519 are possible", key.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil, errors.New("its Ed25519 key can only sign; RSA, P-256, P-384, P-521 and X25519 are possible")
	}
	return nil, errors.New("its kind of key is not known; RSA, P-256, P-384, P-521 and X25519 are possible")
}

// sealedCertificate is a certificate packet as it is written.
type sealedCertificate struct {
	header             Header // in clear
	certificate, spki  []byte // SHA-256 of each
	method             string
	wrapped            []byte
	message, signature []byte // signature: the MAC
}

// SealCertificate seals what was opened or newly made to a certificate that
// CheckCertificate lets pass. Errors: ErrCertificate.
func SealCertificate(o *Opened, certificate *x509.Certificate, now time.Time) ([]byte, error) {
	if err := CheckCertificate(certificate, now); err != nil {
		return nil, err
	}
	text, err := sealCertificate(o, certificate, now)
	if err != nil {
		return nil, fmt.Errorf("escrow: seal packet to a certificate: %w", err)
	}
	return text, nil
}

func sealCertificate(o *Opened, certificate *x509.Certificate, now time.Time) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(publicKey(certificate))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	certificateSum, keySum := sha256.Sum256(certificate.Raw), sha256.Sum256(spki)
	s := sealedCertificate{header: o.Header, certificate: certificateSum[:], spki: keySum[:]}
	contentKey, err := s.wrap(publicKey(certificate), spki)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(contentKey)
	if s.message, err = seal.EncryptKey(o.Plain, contentKey, now); err != nil {
		return nil, err
	}
	body, err := s.encode()
	if err != nil {
		return nil, err
	}
	if s.signature, err = certificateMAC(body, contentKey); err != nil {
		return nil, err
	}
	text, err := s.encode()
	if err == nil {
		_, _, err = parseCertificate(text) // what cannot be read back is worth nothing
	}
	return text, err
}

// wrap makes a content key that only the private half of public gives back; spki
// is public in DER.
func (s *sealedCertificate) wrap(public crypto.PublicKey, spki []byte) (contentKey []byte, err error) {
	if key, isRSA := public.(*rsa.PublicKey); isRSA {
		contentKey = secret.Random(contentKeySize)
		s.method = methodRSA
		if s.wrapped, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, key, contentKey, nil); err != nil {
			secret.Wipe(contentKey)
			return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
		}
		return contentKey, nil
	}
	key, err := exchangeKey(public)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	once, err := key.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a one-off key: %w", err)
	}
	s.method = methodECDH
	if s.wrapped, err = x509.MarshalPKIXPublicKey(once.Public()); err != nil {
		return nil, fmt.Errorf("encode the one-off key: %w", err)
	}
	return agreedKey(once, key, s.wrapped, spki)
}

// agreedKey is the content key of an exchange; both public keys are part of it.
func agreedKey(private *ecdh.PrivateKey, peer *ecdh.PublicKey, once, recipient []byte) ([]byte, error) {
	shared, err := private.ECDH(peer)
	if err != nil {
		return nil, fmt.Errorf("key exchange: %w", err)
	}
	defer secret.Wipe(shared)
	both := sha256.Sum256(append(bytes.Clone(once), recipient...))
	return hkdf.Key(sha256.New, shared, nil, certificateLabel+"key "+hex.EncodeToString(both[:]), contentKeySize)
}

func certificateMAC(body, contentKey []byte) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, contentKey, nil, certificateLabel+"mac", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("derive the MAC's key: %w", err)
	}
	defer secret.Wipe(key)
	h := hmac.New(sha256.New, key)
	h.Write(body)
	return h.Sum(nil), nil
}

// encode is the packet up to what the MAC is over, and the MAC if there is one.
func (s *sealedCertificate) encode() ([]byte, error) {
	w := record.New(certificateKind, certificateVersion)
	if err := s.header.writeAlone(w); err != nil {
		return nil, err
	}
	w.Hex("certificate-sha256", s.certificate).Hex("key-sha256", s.spki)
	w.Text("key-method", s.method).Base64("wrapped-key", s.wrapped).Base64("payload", s.message)
	if s.signature != nil {
		w.Hex("mac", s.signature)
	}
	return w.Bytes()
}

// parseCertificate reads a packet; body is what its MAC is over.
func parseCertificate(text []byte) (s *sealedCertificate, body []byte, err error) {
	r := record.Parse(text, certificateKind, certificateVersion, MaxPacketSize)
	s = &sealedCertificate{header: readAlone(r)}
	s.certificate, s.spki = r.Hex("certificate-sha256", sha256.Size), r.Hex("key-sha256", sha256.Size)
	s.method, s.wrapped, s.message = r.Text("key-method"), r.Base64("wrapped-key"), r.Base64("payload")
	body = text[:len(text)-len(r.Rest())]
	s.signature = r.Hex("mac", sha256.Size)
	if r.Err() == nil && s.method != methodRSA && s.method != methodECDH {
		r.Fail("key-method", "is not known")
	}
	if err := r.End(); err != nil {
		return nil, nil, err
	}
	if again, err := s.encode(); err != nil || !bytes.Equal(again, text) {
		return nil, nil, errors.Join(fmt.Errorf("%w: it is not in canonical form", record.ErrFormat), err)
	}
	return s, body, nil
}

// OpenCertificate opens what SealCertificate made, with the private key: RSA,
// ECDSA (whose key is used for ECDH) or ECDH. Nothing is decrypted before the
// MAC is found right. Errors: ErrIntegrity, ErrOtherKey.
func OpenCertificate(text []byte, key crypto.PrivateKey) (*Opened, error) {
	plain, header, err := openCertificate(text, key)
	if errors.Is(err, ErrOtherKey) || errors.Is(err, ErrCertificate) {
		return nil, fmt.Errorf("escrow: open packet to a certificate: %w", err)
	}
	o, err := openPlain("packet to a certificate", plain, err)
	if err != nil {
		return nil, err
	}
	again, err := o.Header.encodeAlone()
	clearly, clearErr := header.encodeAlone()
	if err = errors.Join(err, clearErr); err != nil || !bytes.Equal(again, clearly) {
		o.Wipe()
		return nil, fmt.Errorf("escrow: open packet to a certificate: %w: it repeats another header", errors.Join(ErrIntegrity, err))
	}
	return o, nil
}

func openCertificate(text []byte, key crypto.PrivateKey) ([]byte, *Header, error) {
	s, body, err := parseCertificate(text)
	if err != nil {
		return nil, nil, err
	}
	contentKey, err := s.unwrap(key)
	if err != nil {
		return nil, nil, err
	}
	defer secret.Wipe(contentKey)
	mac, err := certificateMAC(body, contentKey)
	if err != nil {
		return nil, nil, err
	}
	if !hmac.Equal(mac, s.signature) {
		return nil, nil, errors.New("it does not fit its MAC")
	}
	plain, err := seal.DecryptKey(s.message, contentKey)
	return plain, &s.header, err
}

// unwrap gives back the content key, of which the MAC tells whether it is right.
func (s *sealedCertificate) unwrap(key crypto.PrivateKey) ([]byte, error) {
	if elliptic, ok := key.(*ecdsa.PrivateKey); ok {
		exchange, err := elliptic.ECDH()
		if err != nil {
			return nil, fmt.Errorf("%w: its key: %w", ErrCertificate, err)
		}
		key = exchange
	}
	switch private := key.(type) {
	case *rsa.PrivateKey:
		if _, err := s.checkKey(private.Public(), methodRSA); err != nil {
			return nil, err
		}
		return s.unwrapRSA(private)
	case *ecdh.PrivateKey:
		spki, err := s.checkKey(private.Public(), methodECDH)
		if err != nil {
			return nil, err
		}
		return s.unwrapECDH(private, spki)
	}
	return nil, fmt.Errorf("%w: a key that is neither RSA nor for ECDH", ErrCertificate)
}

// checkKey compares a private key's public half with what the packet names, and
// returns it in DER.
func (s *sealedCertificate) checkKey(public crypto.PublicKey, method string) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("%w: its key: %w", ErrCertificate, err)
	}
	if sum := sha256.Sum256(spki); s.method != method || !bytes.Equal(sum[:], s.spki) {
		return nil, fmt.Errorf("%w: that of the certificate with the SHA-256 %x", ErrOtherKey, s.certificate)
	}
	return spki, nil
}

func (s *sealedCertificate) unwrapRSA(key *rsa.PrivateKey) ([]byte, error) {
	contentKey, err := rsa.DecryptOAEP(sha256.New(), nil, key, s.wrapped, nil)
	if err != nil || len(contentKey) != contentKeySize {
		secret.Wipe(contentKey)
		return nil, errors.New("the content key cannot be opened")
	}
	return contentKey, nil
}

func (s *sealedCertificate) unwrapECDH(key *ecdh.PrivateKey, spki []byte) ([]byte, error) {
	public, err := x509.ParsePKIXPublicKey(s.wrapped)
	if err != nil {
		return nil, errors.New("the one-off key cannot be read")
	}
	once, err := exchangeKey(public)
	if err != nil {
		return nil, errors.New("the one-off key is of another kind")
	}
	return agreedKey(key, once, s.wrapped, spki)
}
