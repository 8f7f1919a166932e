package volumekey

import (
	"errors"
	"fmt"
)

// maxDepth bounds how deep values stand in each other; CMS needs 8, a name in it 3
// more.
const maxDepth = 16

const (
	constructed = 0x20
	indefinite  = 0x80
)

// fromBER writes one value with definite lengths, as encoding/asn1 demands: NSS
// leaves the length of what it streams open. All other rules that DER adds are
// encoding/asn1's to check.
func fromBER(data []byte) ([]byte, error) {
	value, rest, err := berValue(data, 0)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes after its end", len(rest))
	}
	return value, err
}

func berValue(data []byte, depth int) (der, rest []byte, err error) {
	if depth > maxDepth {
		return nil, nil, fmt.Errorf("values deeper than %d", maxDepth)
	}
	tag, size, rest, err := berHeader(data)
	if err != nil {
		return nil, nil, err
	}
	var content []byte
	switch {
	case size == indefiniteSize && tag&constructed == 0:
		return nil, nil, errors.New("a value without an end")
	case size == indefiniteSize:
		content, rest, err = berUntilEnd(rest, depth)
	case tag&constructed != 0:
		content, err = berAll(rest[:size], depth)
		rest = rest[size:]
	default:
		content, rest = rest[:size], rest[size:]
	}
	if err != nil {
		return nil, nil, err
	}
	return append(derHeader(tag, len(content)), content...), rest, nil
}

// indefiniteSize is the size of a value that ends where its last part does.
const indefiniteSize = -1

func berHeader(data []byte) (tag byte, size int, rest []byte, err error) {
	if len(data) < 2 {
		return 0, 0, nil, errors.New("cut off")
	}
	tag, size, rest = data[0], int(data[1]), data[2:]
	switch {
	case tag&0x1f == 0x1f:
		return 0, 0, nil, errors.New("a tag of several bytes")
	case size == indefinite:
		return tag, indefiniteSize, rest, nil
	case size > indefinite:
		n := size - indefinite
		if n > 3 || n > len(rest) {
			return 0, 0, nil, errors.New("a length that is cut off or too large")
		}
		size = 0
		for _, b := range rest[:n] {
			size = size<<8 | int(b)
		}
		rest = rest[n:]
	}
	if size > len(rest) {
		return 0, 0, nil, fmt.Errorf("a value of %d bytes is larger than what it stands in", size)
	}
	return tag, size, rest, nil
}

func berAll(data []byte, depth int) (der []byte, err error) {
	for len(data) > 0 {
		var value []byte
		if value, data, err = berValue(data, depth+1); err != nil {
			return nil, err
		}
		der = append(der, value...)
	}
	return der, nil
}

// berUntilEnd reads values up to the two zero bytes that end them.
func berUntilEnd(data []byte, depth int) (der, rest []byte, err error) {
	for {
		if len(data) >= 2 && data[0] == 0 && data[1] == 0 {
			return der, data[2:], nil
		}
		var value []byte
		if value, data, err = berValue(data, depth+1); err != nil {
			return nil, nil, err
		}
		der = append(der, value...)
	}
}

func derHeader(tag byte, size int) []byte {
	switch {
	case size < 0x80:
		return []byte{tag, byte(size)}
	case size < 0x100:
		return []byte{tag, 0x81, byte(size)}
	case size < 0x10000:
		return []byte{tag, 0x82, byte(size >> 8), byte(size)}
	}
	return []byte{tag, 0x83, byte(size >> 16), byte(size >> 8), byte(size)}
}
