package volumekey

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"mandos-escrow/escrow"
)

// Tags.
const (
	tagPacket          = 0x420135F4 // volume_key's own
	tagVersion         = 0x42000065
	tagMajor           = 0x42000066
	tagMinor           = 0x42000067
	tagObjectType      = 0x42000052
	tagSymmetricKey    = 0x4200008A
	tagSecretData      = 0x42000080
	tagSecretType      = 0x42000081
	tagKeyBlock        = 0x4200003C
	tagKeyValueType    = 0x42000040
	tagKeyValue        = 0x4200003F
	tagKeyMaterial     = 0x4200003D
	tagKey             = 0x4200003B
	tagAttribute       = 0x42000008
	tagAttributeName   = 0x4200000A
	tagAttributeValue  = 0x4200000B
	tagNameSpace       = 0x42000003
	tagNameID          = 0x42000002
	tagAlgorithm       = 0x42000025
	tagLength          = 0x42000026
	tagParameters      = 0x42000027
	tagWrapping        = 0x42000041
	tagWrappingMethod  = 0x4200009A
	tagEncryptionKey   = 0x42000032
	tagIdentifier      = 0x4200008F
	tagBlockCipherMode = 0x42000011
	tagPadding         = 0x4200005A
	tagHash            = 0x42000034
	tagIV              = 0x42000039
)

// Values, and the highest that the draft has of each.
const (
	objectSymmetricKey, objectSecretData, maxObject = 2, 8, 8
	valueOpaque, valueTransparent, maxValue         = 2, 5, 15
	algorithmAES, algorithmRSA, maxAlgorithm        = 3, 4, 12
	modeCBC, maxMode                                = 1, 11
	paddingNone, paddingPKCS5, paddingPKCS1         = 1, 3, 8
	maxPadding, maxHash                             = 8, 8
	encryptKeyOnly                                  = 0x81E64B1B // volume_key's own
)

const (
	nameHost   = "Host Name"
	nameUUID   = "Volume UUID"
	nameLabel  = "Volume Label"
	nameFile   = "Volume File"
	nameFormat = "Volume Format"
	nameSlot   = "Passphrase Slot"
	nameCipher = "LUKS Cipher Name"
	nameMode   = "LUKS Cipher Mode"
	formatLUKS = "crypt_LUKS"
)

const (
	attributeText       = "Application Specific Identification"
	attributeCipher     = "x-redhat.com:volume_key LUKS Cipher Name"
	attributeMode       = "x-redhat.com:volume_key LUKS Cipher Mode"
	attributeLength     = "Cryptographic Length"
	attributeAlgorithm  = "Cryptographic Algorithm"
	attributeParameters = "Cryptographic Parameters"
)

// content is a decoded packet. Its slices point into what was decoded.
type content struct {
	facts  Facts
	secret []byte // sealed when wrap is not nil
	wrap   *wrapping
	bits   int32             // "Cryptographic Length"; 0 if it is not there
	names  map[string]string // name spaces, as attributes give them
}

// wrapping says how a secret is sealed on its own.
type wrapping struct {
	algorithm, mode, padding uint32 // 0: not said
	identifier               string
	iv                       []byte
}

func decode(data []byte) (*content, error) {
	top := newReader(data)
	c := &content{names: map[string]string{}}
	r := top.structure(tagPacket)
	top.end("the packet")
	v := r.structure(tagVersion)
	if major, minor := v.int32(tagMajor), v.int32(tagMinor); *r.err == nil && (major != 0 || minor != 98) {
		r.fail("version %d.%d is not known", major, minor)
	}
	v.end("the version")
	switch r.enum(tagObjectType, maxObject) {
	case objectSymmetricKey:
		c.facts.Payload = escrow.ForVolumeKey
		object := r.structure(tagSymmetricKey)
		c.readKeyBlock(object.structure(tagKeyBlock), valueTransparent)
		object.end("the key")
	case objectSecretData:
		c.facts.Payload = escrow.ForPassphrase
		object := r.structure(tagSecretData)
		object.enum(tagSecretType, 1) // a password
		c.readKeyBlock(object.structure(tagKeyBlock), valueOpaque)
		object.end("the secret")
	default:
		r.fail("it holds neither a key nor a passphrase")
	}
	r.end("the object")
	if *r.err != nil {
		return nil, *r.err
	}
	return c, c.judge()
}

// readKeyBlock reads a secret that has this value type unless it is wrapped.
func (c *content) readKeyBlock(r *reader, plain uint32) {
	kind := r.enum(tagKeyValueType, maxValue)
	value := r.structure(tagKeyValue)
	switch {
	case *r.err != nil:
	case kind == valueTransparent:
		key := value.structure(tagKeyMaterial)
		c.secret = key.bytes(tagKey)
		key.end("the key material")
	case kind == valueOpaque:
		c.secret = value.bytes(tagKeyMaterial)
	default:
		r.fail("key value of type %d", kind)
	}
	for *r.err == nil && len(value.rest) > 0 {
		c.readAttribute(value.structure(tagAttribute))
	}
	w := readAlgorithm(r)
	if r.next(tagWrapping) {
		readWrapping(r.structure(tagWrapping), w)
		c.wrap = w
		plain = valueOpaque
	}
	if *r.err == nil && kind != plain {
		r.fail("key value of type %d, where %d belongs", kind, plain)
	}
	r.end("the key block")
}

func readAlgorithm(r *reader) *wrapping {
	w := &wrapping{}
	if r.next(tagAlgorithm) {
		w.algorithm = r.enum(tagAlgorithm, maxAlgorithm)
	}
	if r.next(tagLength) {
		if n := r.int32(tagLength); n <= 0 {
			r.fail("number of key bits %d", n)
		}
	}
	return w
}

func readWrapping(r *reader, w *wrapping) {
	if method := r.number(tagWrappingMethod, typeEnum); method != encryptKeyOnly {
		r.fail("wrapping method %08X is not known", method)
	}
	key := r.structure(tagEncryptionKey)
	w.identifier = key.text(tagIdentifier)
	if key.next(tagParameters) {
		w.mode, w.padding = readParameters(key, tagParameters)
	}
	key.end("the encryption key information")
	if r.next(tagIV) {
		w.iv = r.bytes(tagIV)
	}
	r.end("the wrapping")
}

func readParameters(r *reader, tag uint32) (mode, padding uint32) {
	p := r.structure(tag)
	if p.next(tagBlockCipherMode) {
		mode = p.enum(tagBlockCipherMode, maxMode)
	}
	if p.next(tagPadding) {
		padding = p.enum(tagPadding, maxPadding)
	}
	if p.next(tagHash) {
		p.enum(tagHash, maxHash)
	}
	p.end("the parameters")
	return mode, padding
}

// readAttribute reads the attributes that volume_key writes. It reads two of them
// and does not use them, as they can say only some of the ciphers.
func (c *content) readAttribute(r *reader) {
	switch name := r.text(tagAttributeName); name {
	case attributeText, attributeCipher, attributeMode:
		value := r.structure(tagAttributeValue)
		space, id := value.text(tagNameSpace), value.text(tagNameID)
		value.end("the attribute")
		if _, twice := c.names[space]; twice || !belongs(name, space) {
			r.fail("attribute %q stands twice, or in %q", space, name)
		}
		c.names[space] = id
	case attributeLength:
		n := r.int32(tagAttributeValue)
		if c.bits != 0 || n <= 0 {
			r.fail("number of key bits %d, or it stands twice", n)
		}
		c.bits = n
	case attributeAlgorithm:
		r.enum(tagAttributeValue, maxAlgorithm)
	case attributeParameters:
		readParameters(r, tagAttributeValue)
	default:
		r.fail("attribute %q is not known", name)
	}
	r.end("the attribute")
}

// belongs reports whether an attribute may have a name space: the cipher has
// attributes of its own.
func belongs(attribute, space string) bool {
	return (attribute == attributeCipher) == (space == nameCipher) && (attribute == attributeMode) == (space == nameMode)
}

// judge looks at what was read as a whole.
func (c *content) judge() error {
	required := []string{nameHost, nameFile, nameFormat}
	if c.facts.Payload == escrow.ForVolumeKey {
		required = append(required, nameCipher, nameMode)
	}
	for _, name := range required {
		if c.names[name] == "" {
			return fmt.Errorf("attribute %q is missing", name)
		}
	}
	if format := c.names[nameFormat]; format != formatLUKS {
		return fmt.Errorf("volume format %q is not known", format)
	}
	f := &c.facts
	f.Host, f.UUID, f.Label, f.Path, f.Slot = c.names[nameHost], c.names[nameUUID], c.names[nameLabel], c.names[nameFile], escrow.NoSlot
	if f.Payload == escrow.ForPassphrase {
		return errors.Join(c.judgeSlot(), c.judgeSecret(c.secret, c.wrap != nil))
	}
	f.Cipher, f.KeyBits = c.names[nameCipher]+"-"+c.names[nameMode], int(c.bits)
	if c.bits == 0 || c.bits%8 != 0 {
		return fmt.Errorf("number of key bits %d", c.bits)
	}
	return c.judgeSecret(c.secret, c.wrap != nil)
}

func (c *content) judgeSlot() error {
	text, found := c.names[nameSlot]
	if !found {
		return nil
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return fmt.Errorf("slot %q", text)
	}
	c.facts.Slot = int(n)
	return nil
}

// judgeSecret looks at the secret itself, which must not be sealed any more.
func (c *content) judgeSecret(plain []byte, sealed bool) error {
	switch {
	case sealed:
		return nil
	case c.facts.Payload == escrow.ForVolumeKey && len(plain) != c.facts.KeyBits/8:
		return fmt.Errorf("the key has %d bytes, and not the %d bits that the packet says", len(plain), c.facts.KeyBits)
	case c.facts.Payload == escrow.ForPassphrase && bytes.IndexByte(plain, 0) >= 0:
		return errors.New("the passphrase contains a NUL")
	}
	return nil
}
