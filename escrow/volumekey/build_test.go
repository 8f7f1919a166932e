package volumekey

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"slices"
)

// A packet is built here as a tree, so that a test can spoil any part of it.
type node struct {
	tag   uint32
	kind  byte
	value []byte
	parts []*node
}

func (n *node) bytes() []byte {
	value := n.value
	for _, part := range n.parts {
		value = append(value, part.bytes()...)
	}
	out := binary.BigEndian.AppendUint32(nil, n.tag)
	out = append(out, n.kind)
	return append(binary.BigEndian.AppendUint32(out, uint32(len(value))), value...)
}

// find returns the first node with a tag, from the top.
func (n *node) find(tag uint32) *node {
	if n.tag == tag {
		return n
	}
	for _, part := range n.parts {
		if found := part.find(tag); found != nil {
			return found
		}
	}
	return nil
}

func structure(tag uint32, parts ...*node) *node {
	return &node{tag: tag, kind: typeStructure, parts: slices.DeleteFunc(parts, func(p *node) bool { return p == nil })}
}

func number(tag uint32, kind byte, n uint32) *node {
	return &node{tag: tag, kind: kind, value: binary.BigEndian.AppendUint32(nil, n)}
}

func text(tag uint32, value string) *node {
	return &node{tag: tag, kind: typeText, value: []byte(value)}
}
func raw(tag uint32, value []byte) *node { return &node{tag: tag, kind: typeBytes, value: value} }

func attribute(name, space, id string) *node {
	return structure(tagAttribute, text(tagAttributeName, name),
		structure(tagAttributeValue, text(tagNameSpace, space), text(tagNameID, id)))
}

const (
	testHost  = "old.example"
	testUUID  = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	testLabel = "root disk"
	testPath  = "/dev/disk/by-id/ata-X_1-part3"
)

// testKey is a volume key of 256 bits.
var testKey = bytes.Repeat([]byte{0xab, 1}, 16)

func common() []*node {
	return []*node{
		attribute(attributeText, nameHost, testHost), attribute(attributeText, nameUUID, testUUID),
		attribute(attributeText, nameLabel, testLabel), attribute(attributeText, nameFile, testPath),
		attribute(attributeText, nameFormat, formatLUKS),
	}
}

// keyAttributes are in volume_key's order, for aes-cbc-essiv:sha256.
func keyAttributes() []*node {
	return append(
		common(),
		structure(tagAttribute, text(tagAttributeName, attributeLength), number(tagAttributeValue, typeInt32, uint32(8*len(testKey)))),
		attribute(attributeCipher, nameCipher, "aes"),
		structure(tagAttribute, text(tagAttributeName, attributeAlgorithm), number(tagAttributeValue, typeEnum, algorithmAES)),
		attribute(attributeMode, nameMode, "cbc-essiv:sha256"),
		structure(tagAttribute, text(tagAttributeName, attributeParameters),
			structure(tagAttributeValue, number(tagBlockCipherMode, typeEnum, modeCBC), number(tagHash, typeEnum, 5))),
	)
}

func object(kind uint32, secret *node) *node {
	return structure(tagPacket,
		structure(tagVersion, number(tagMajor, typeInt32, 0), number(tagMinor, typeInt32, 98)),
		number(tagObjectType, typeEnum, kind), secret)
}

func volumeKeyTree() *node {
	value := structure(tagKeyValue, append([]*node{structure(tagKeyMaterial, raw(tagKey, testKey))}, keyAttributes()...)...)
	return object(objectSymmetricKey, structure(tagSymmetricKey,
		structure(tagKeyBlock, number(tagKeyValueType, typeEnum, valueTransparent), value)))
}

func passphraseTree(passphrase string) *node {
	attributes := append(common(), attribute(attributeText, nameSlot, "4"))
	value := structure(tagKeyValue, append([]*node{raw(tagKeyMaterial, []byte(passphrase))}, attributes...)...)
	return object(objectSecretData, structure(tagSecretData, number(tagSecretType, typeEnum, 1),
		structure(tagKeyBlock, number(tagKeyValueType, typeEnum, valueOpaque), value)))
}

// wrapAES is a tree with its secret sealed under an AES key, as NSS does it with
// and without padding.
func wrapAES(tree *node, key []byte, padding uint32) *node {
	value := tree.find(tagKeyValue)
	material := value.parts[0]
	plain := material.value
	if inner := material.find(tagKey); inner != nil {
		plain = inner.value
	}
	iv := bytes.Repeat([]byte{7}, aes.BlockSize)
	value.parts[0] = raw(tagKeyMaterial, encryptCBC(key, iv, pad(plain, padding)))
	block := tree.find(tagKeyBlock)
	block.parts[0] = number(tagKeyValueType, typeEnum, valueOpaque)
	block.parts = append(block.parts,
		number(tagAlgorithm, typeEnum, algorithmAES), number(tagLength, typeInt32, uint32(8*len(key))),
		structure(tagWrapping, number(tagWrappingMethod, typeEnum, encryptKeyOnly),
			structure(tagEncryptionKey, text(tagIdentifier, "x-redhat.com:volume_key secret key"),
				structure(tagParameters, number(tagBlockCipherMode, typeEnum, modeCBC), number(tagPadding, typeEnum, padding))),
			raw(tagIV, iv)))
	return tree
}

func pad(plain []byte, padding uint32) []byte {
	n := aes.BlockSize - len(plain)%aes.BlockSize
	if padding == paddingPKCS5 {
		return append(bytes.Clone(plain), bytes.Repeat([]byte{byte(n)}, n)...)
	}
	return append(bytes.Clone(plain), make([]byte, n%aes.BlockSize)...)
}

func encryptCBC(key, iv, plain []byte) []byte {
	out := make([]byte, len(plain))
	cipher.NewCBCEncrypter(must(aes.NewCipher(key)), iv).CryptBlocks(out, plain)
	return out
}

func packet(format Format, body []byte) []byte {
	return append([]byte(magic+string(rune(format))), body...)
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
