package unlock

import (
	"bytes"
	"errors"
	"testing"
)

// seeds are the vectors of one input.
func seeds(f *testing.F, input string) {
	for _, v := range vectors(&testing.T{}) {
		if v.input == input {
			f.Add(v.data)
		}
	}
}

// sameAgain: what is read is refused by name, or written again unchanged.
func sameAgain(t *testing.T, input string, data []byte, named error) {
	again, err := vector{input: input, data: data}.outcome()
	switch {
	case err != nil && !errors.Is(err, named):
		t.Fatalf("%q: unnamed error %v", data, err)
	case err == nil && !bytes.Equal(again, data):
		t.Fatalf("%q was read, and written as %q", data, again)
	}
}

func FuzzRequest(f *testing.F) {
	seeds(f, "request")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "request", data, ErrProtocol) })
}

func FuzzReply(f *testing.F) {
	seeds(f, "reply")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "reply", data, ErrProtocol) })
}

func FuzzBlob(f *testing.F) {
	seeds(f, "blob")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "blob", data, ErrBlob) })
}

func FuzzConfig(f *testing.F) {
	seeds(f, "config")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "config", data, ErrConfig) })
}
