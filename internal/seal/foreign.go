package seal

// DecryptForeign opens a binary message under a passphrase that GnuPG made, as the
// program volume_key had it do: compressed, and stretched with SHA-1. The S2K must
// be iterated and salted and the cipher AES-256, as everywhere; what it inflates to
// is bounded as every message is.
func DecryptForeign(message, passphrase []byte) ([]byte, error) {
	return decryptSymmetric(message, passphrase)
}
