package escrow

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"
)

// holder has a certificate, and the private key to it.
type holder struct {
	key         crypto.PrivateKey
	certificate *x509.Certificate
}

// issue makes a certificate for a public key, by a key of its own, because not
// all keys can sign.
func issue(public crypto.PublicKey, change func(*x509.Certificate)) *x509.Certificate {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "escrow of Example"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	authority := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	exchange, isX25519 := public.(*ecdh.PublicKey)
	if isX25519 { // for which the library makes none: one for Ed25519, with another number
		public = ed25519.PublicKey(exchange.Bytes())
	}
	der := must(x509.CreateCertificate(rand.Reader, template, &x509.Certificate{Subject: pkix.Name{CommonName: "CA"}}, public, authority))
	if isX25519 {
		der = bytes.Replace(der, []byte{6, 3, 0x2b, 0x65, 0x70}, []byte{6, 3, 0x2b, 0x65, 0x6e}, 1)
	}
	return must(x509.ParseCertificate(der))
}

// certificateHolders has one of each kind of key.
var certificateHolders = sync.OnceValue(func() map[string]holder {
	holders := map[string]holder{}
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	holders["RSA"] = holder{rsaKey, issue(rsaKey.Public(), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })}
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		key := must(ecdsa.GenerateKey(curve, rand.Reader))
		holders[name] = holder{key, issue(key.Public(), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })}
	}
	key := must(ecdh.X25519().GenerateKey(rand.Reader))
	holders["X25519"] = holder{key, issue(key.Public(), nil)}
	return holders
})

func TestCheckCertificate(t *testing.T) {
	for name, h := range certificateHolders() {
		if err := CheckCertificate(h.certificate, now); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := certificateHolders()
	rsa1024, p224 := must(rsa.GenerateKey(rand.Reader, 1024)), must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))
	signs, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	publicOf := func(name string) crypto.PublicKey { return publicKey(good[name].certificate) }
	for name, c := range map[string]struct {
		certificate *x509.Certificate
		words       string
	}{
		"expired": {issue(publicOf("RSA"), func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = now.AddDate(-17, 0, 0), time.Date(2010, 1, 2, 0, 0, 0, 0, time.UTC)
		}), "expired on 2010-01-02"},
		"not yet":  {issue(publicOf("P-256"), func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), "not valid before"},
		"RSA-1024": {issue(rsa1024.Public(), nil), "1024 bits"},
		"P-224":    {issue(p224.Public(), nil), "P-224"},
		"Ed25519":  {issue(signs, nil), "can only sign"},
		"RSA for signing": {issue(publicOf("RSA"), func(c *x509.Certificate) {
			c.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement
		}), "keyEncipherment"},
		"EC for signing": {issue(publicOf("P-256"), func(c *x509.Certificate) {
			c.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
		}), "keyAgreement"},
		"critical extension": {issue(publicOf("RSA"), func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), "critical extension"},
	} {
		if err := CheckCertificate(c.certificate, now); !errors.Is(err, ErrCertificate) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
		if text, err := SealCertificate(standAlone(passphrasePayload()), c.certificate, now); text != nil || !errors.Is(err, ErrCertificate) {
			t.Errorf("%s: sealed: %v", name, err)
		}
	}
}

func TestOtherCertificateKey(t *testing.T) {
	holders := certificateHolders()
	other := map[string]crypto.PrivateKey{
		"RSA": must(rsa.GenerateKey(rand.Reader, 2048)), "P-256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
		"P-384": holders["RSA"].key, "P-521": holders["P-256"].key, "X25519": must(ecdh.X25519().GenerateKey(rand.Reader)),
	}
	for name, h := range holders {
		text := must(SealCertificate(standAlone(passphrasePayload()), h.certificate, now))
		if o, err := OpenCertificate(text, other[name]); o != nil || !errors.Is(err, ErrOtherKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	text := must(SealCertificate(standAlone(passphrasePayload()), holders["RSA"].certificate, now))
	if o, err := OpenCertificate(text, ed25519.PrivateKey{}); o != nil || !errors.Is(err, ErrCertificate) {
		t.Errorf("a key that only signs: %v", err)
	}
}
