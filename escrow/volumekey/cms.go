package volumekey

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/secret"
)

// The shape of CMS enveloped data (RFC 5652, section 6) as NSS writes it: one
// recipient, RSA with PKCS#1 v1.5, AES-256-CBC. Nothing authenticates it.
type (
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content envelopedData `asn1:"explicit,tag:0"`
	}
	envelopedData struct {
		Version    int
		Recipients []recipientInfo `asn1:"set"`
		Encrypted  encryptedContent
	}
	recipientInfo struct {
		Version      int
		IssuerSerial struct {
			Issuer asn1.RawValue
			Serial asn1.RawValue
		}
		Algorithm    algorithm
		EncryptedKey []byte
	}
	algorithm struct {
		Algorithm  asn1.ObjectIdentifier
		Parameters asn1.RawValue `asn1:"optional"`
	}
	encryptedContent struct {
		Type      asn1.ObjectIdentifier
		Algorithm algorithm
		Content   asn1.RawValue `asn1:"tag:0"`
	}
)

var (
	oidEnveloped = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidRSA       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidAES256CBC = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
)

// sealedCMS is what is needed of it.
type sealedCMS struct {
	issuer     []byte // DER
	serial     []byte // of the integer
	key        []byte // under the recipient's RSA key
	iv         []byte
	ciphertext []byte
}

func parseCMS(data []byte) (*sealedCMS, error) {
	der, err := fromBER(data)
	if err != nil {
		return nil, fmt.Errorf("CMS: %w", err)
	}
	var info contentInfo
	if rest, err := asn1.Unmarshal(der, &info); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("CMS: not enveloped data (%w), or %d bytes after it", err, len(rest))
	}
	encrypted := info.Content.Encrypted
	switch {
	case !info.Type.Equal(oidEnveloped) || !encrypted.Type.Equal(oidData):
		return nil, fmt.Errorf("CMS: content of type %v and %v", info.Type, encrypted.Type)
	case len(info.Content.Recipients) != 1:
		return nil, fmt.Errorf("CMS: %d recipients, not 1", len(info.Content.Recipients))
	case !info.Content.Recipients[0].Algorithm.Algorithm.Equal(oidRSA) || !encrypted.Algorithm.Algorithm.Equal(oidAES256CBC):
		return nil, errors.New("CMS: sealed by other means than RSA with PKCS#1 v1.5 and AES-256-CBC")
	}
	recipient := info.Content.Recipients[0]
	s := &sealedCMS{
		issuer: recipient.IssuerSerial.Issuer.FullBytes, serial: recipient.IssuerSerial.Serial.Bytes,
		key: recipient.EncryptedKey, iv: encrypted.Algorithm.Parameters.Bytes,
	}
	if s.ciphertext, err = octets(encrypted.Content); err != nil {
		return nil, fmt.Errorf("CMS: %w", err)
	}
	if n := len(s.ciphertext); len(s.iv) != aes.BlockSize || n == 0 || n%aes.BlockSize != 0 {
		return nil, errors.New("CMS: its content is not whole blocks of AES")
	}
	return s, nil
}

// octets puts the pieces of an octet string together.
func octets(value asn1.RawValue) ([]byte, error) {
	if !value.IsCompound {
		return value.Bytes, nil
	}
	var all []byte
	for rest := value.Bytes; len(rest) > 0; {
		var piece []byte
		var err error
		if rest, err = asn1.Unmarshal(rest, &piece); err != nil {
			return nil, fmt.Errorf("piece of the content: %w", err)
		}
		all = append(all, piece...)
	}
	return all, nil
}

// open decrypts with a recipient's private key. Without integrity it can only
// tell that the padding is wrong: then it is another key, or a changed packet.
func (s *sealedCMS) open(key crypto.PrivateKey) ([]byte, error) {
	contentKey, err := decryptRSA(key, s.key)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(contentKey)
	if len(contentKey) != 32 {
		return nil, fmt.Errorf("%w: the content key has %d bytes", escrow.ErrIntegrity, len(contentKey))
	}
	return decryptCBC(contentKey, s.iv, s.ciphertext)
}

func decryptRSA(key crypto.PrivateKey, sealed []byte) ([]byte, error) {
	private, ok := key.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: it is sealed to an RSA key", ErrKey)
	}
	plain, err := private.Decrypt(rand.Reader, sealed, nil) // nil: PKCS#1 v1.5
	if err != nil {
		return nil, fmt.Errorf("%w, or the packet is damaged (they cannot be told apart)", ErrKey)
	}
	return plain, nil
}

// decryptCBC decrypts and takes the padding off (RFC 5652, section 6.3). There is
// nobody to hide from which of them failed: it all happens on this machine.
func decryptCBC(key, iv, ciphertext []byte) ([]byte, error) {
	plain, err := decryptBlocks(key, iv, ciphertext)
	if err != nil {
		return nil, err
	}
	n := int(plain[len(plain)-1])
	if n < 1 || n > aes.BlockSize || !bytes.Equal(plain[len(plain)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		secret.Wipe(plain)
		return nil, fmt.Errorf("%w: wrong padding; another key, or a damaged packet", escrow.ErrIntegrity)
	}
	return plain[:len(plain)-n], nil
}

func decryptBlocks(key, iv, ciphertext []byte) ([]byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("%w: an AES key has 16, 24 or 32 bytes, and not %d", ErrKey, len(key))
	}
	if n := len(ciphertext); len(iv) != aes.BlockSize || n == 0 || n%aes.BlockSize != 0 {
		return nil, fmt.Errorf("%w: not whole blocks of AES", escrow.ErrIntegrity)
	}
	plain := make([]byte, len(ciphertext))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, ciphertext)
	return plain, nil
}
