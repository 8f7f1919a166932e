// Package certkey reads the files that belong to a certificate: itself, and its
// private key, as openssl and others write them (PKCS#8, encrypted or not; PKCS#1;
// SEC 1). It is the only importer of pkcs8.
//
// It does not judge a certificate, and does no cryptography with a key: package
// escrow does. It imports no other package of this program.
package certkey

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/youmark/pkcs8"
)

// maxFile bounds what is read, in bytes: an RSA key of 16384 bits has 13 KB.
const maxFile = 256 << 10

// Errors that callers decide on.
var (
	// ErrFile: not a certificate, or not a private key, that can be read.
	ErrFile = errors.New("not a usable PEM file")
	// ErrPassphrase: the key is protected, and this passphrase does not open it;
	// or it is not protected at all.
	ErrPassphrase = errors.New("wrong passphrase of the private key")
)

// PEM types.
const (
	certificateType = "CERTIFICATE"
	lockedType      = "ENCRYPTED PRIVATE KEY"
)

// ParseCertificate reads the first certificate of a PEM file, or one in DER. Errors:
// ErrFile.
func ParseCertificate(data []byte) (*x509.Certificate, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("certkey: certificate: %w: longer than %d bytes", ErrFile, maxFile)
	}
	der := data
	if block := find(data, certificateType); block != nil {
		der = block.Bytes
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certkey: certificate: %w: %w", ErrFile, err)
	}
	return c, nil
}

// find returns the first block of one of these types.
func find(data []byte, types ...string) *pem.Block {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil
		}
		for _, t := range types {
			if block.Type == t {
				return block
			}
		}
		data = rest
	}
}

// IsPrivate reports whether data is a PEM file with a private key, and whether
// that is protected by a passphrase.
func IsPrivate(data []byte) (private, locked bool) {
	block := privateBlock(data)
	return block != nil, block != nil && block.Type == lockedType
}

func privateBlock(data []byte) *pem.Block {
	if len(data) > maxFile {
		return nil
	}
	return find(data, "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", lockedType)
}

// ParsePrivate reads the first private key of a PEM file: *rsa.PrivateKey,
// *ecdsa.PrivateKey, *ecdh.PrivateKey or ed25519.PrivateKey. A nil passphrase is
// for a key that is not protected. Errors: ErrFile, ErrPassphrase.
func ParsePrivate(data, passphrase []byte) (crypto.PrivateKey, error) {
	block := privateBlock(data)
	if block == nil {
		return nil, fmt.Errorf("certkey: private key: %w: it has no private key of at most %d bytes", ErrFile, maxFile)
	}
	defer clear(block.Bytes)
	key, err := parseBlock(block, passphrase)
	if err != nil {
		return nil, fmt.Errorf("certkey: private key: %w", err)
	}
	return key, nil
}

func parseBlock(block *pem.Block, passphrase []byte) (crypto.PrivateKey, error) {
	locked := block.Type == lockedType
	switch {
	case block.Headers["DEK-Info"] != "":
		return nil, fmt.Errorf("%w: its protection is of the old kind, MD5 without integrity; convert it with openssl pkcs8 -topk8", ErrFile)
	case locked && len(passphrase) == 0:
		return nil, fmt.Errorf("%w: it is protected, and no passphrase was given", ErrPassphrase)
	case !locked && passphrase != nil:
		return nil, fmt.Errorf("%w: it is not protected by one", ErrPassphrase)
	case locked:
		return unlock(block.Bytes, passphrase)
	}
	var key crypto.PrivateKey
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	return key, nil
}

// unlock tells a damaged key from a wrong passphrase no better than PKCS#8 does,
// which has no integrity: that the key is the certificate's, its user finds out.
func unlock(der, passphrase []byte) (crypto.PrivateKey, error) {
	if err := checkCost(der); err != nil {
		return nil, err
	}
	key, _, err := pkcs8.ParsePrivateKey(bytes.Clone(der), passphrase)
	if err != nil {
		return nil, fmt.Errorf("%w, or a kind of protection that is not known: %w", ErrPassphrase, err)
	}
	return key, nil
}

// What a protected key may cost. openssl itself refuses scrypt with more than
// 32 MiB, and takes 2048 rounds of PBKDF2 unless it is told otherwise; 10 million
// are a few seconds.
const (
	maxRounds       = 10_000_000
	maxScryptMemory = 256 << 20 // bytes: 128 N r
	maxScryptCores  = 8         // p
)

// The shapes of a protected key (RFC 5958, section 3; RFC 8018, appendix A.4; RFC
// 7914, section 7), as far as they tell what opening it costs.
type (
	lockedKey struct {
		Algorithm pkix.AlgorithmIdentifier
		Data      []byte
	}
	twoSchemes struct{ Derivation, Encryption pkix.AlgorithmIdentifier }
	roundsCost struct {
		Salt   []byte
		Rounds int
		Hash   pkix.AlgorithmIdentifier `asn1:"optional"`
	}
	scryptCost struct {
		Salt    []byte
		N, R, P int
	}
)

var (
	oidPBKDF2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	oidScrypt = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 4, 11}
)

// checkCost refuses a key whose own text demands endless time or memory. Whoever
// brings a file may have been given it.
func checkCost(der []byte) error {
	var locked lockedKey
	var schemes twoSchemes
	if _, err := asn1.Unmarshal(der, &locked); err != nil {
		return fmt.Errorf("%w: %w", ErrFile, err)
	}
	if _, err := asn1.Unmarshal(locked.Algorithm.Parameters.FullBytes, &schemes); err != nil {
		return fmt.Errorf("%w: its protection is of another kind than PBES2; convert it with openssl pkcs8 -topk8", ErrFile)
	}
	parameters := schemes.Derivation.Parameters.FullBytes
	switch kind := schemes.Derivation.Algorithm; {
	case kind.Equal(oidPBKDF2):
		var c roundsCost
		if _, err := asn1.Unmarshal(parameters, &c); err != nil || c.Rounds < 1 || c.Rounds > maxRounds {
			return fmt.Errorf("%w: PBKDF2 with %d rounds; 1 to %d are possible", ErrFile, c.Rounds, maxRounds)
		}
	case kind.Equal(oidScrypt):
		var c scryptCost
		_, err := asn1.Unmarshal(parameters, &c)
		if err != nil || c.N < 2 || c.R < 1 || c.P < 1 || c.P > maxScryptCores || c.N > maxScryptMemory/128 || c.R > maxScryptMemory/128/c.N {
			return fmt.Errorf("%w: scrypt with N %d, r %d, p %d; 128 N r may be %d bytes, and p %d", ErrFile, c.N, c.R, c.P, maxScryptMemory, maxScryptCores)
		}
	default:
		return fmt.Errorf("%w: its key derivation %v is not known; convert it with openssl pkcs8 -topk8", ErrFile, kind)
	}
	return nil
}
