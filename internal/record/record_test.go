package record

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

var when = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// sample has a field of each kind.
func sample() []byte {
	w := New("test-record", 3).Text("text", "ünï code: 1").OptionalText("absent", "").Uint("uint", 1<<63-1).
		Time("time", when.Add(999*time.Millisecond).In(time.FixedZone("x", 3600))).Hex("hex", []byte{0, 0xab}).
		Base64("base64", []byte{0xff, 0xfe}).Text("many", "a").Text("many", "b")
	data, err := w.Bytes()
	if err != nil {
		panic(err)
	}
	return data
}

const sampleText = "test-record: 3\ntext: ünï code: 1\nuint: 9223372036854775807\ntime: 2026-01-02T03:04:05Z\nhex: 00ab\nbase64: //4=\nmany: a\nmany: b\n"

func read(data []byte) (*Reader, []any) {
	r := Parse(data, "test-record", 3, 1000)
	values := []any{
		r.Text("text"), r.OptionalText("absent"), r.Uint("uint"), r.Time("time"), string(r.Hex("hex", 2)), string(r.Base64("base64")),
		strings.Join(r.Repeated("many", 2), ","),
	}
	return r, values
}

func TestRoundTrip(t *testing.T) {
	if got := string(sample()); got != sampleText {
		t.Fatalf("%q", got)
	}
	r, got := read(sample())
	want := []any{"ünï code: 1", "", uint64(1<<63 - 1), when, "\x00\xab", "\xff\xfe", "a,b"}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("value %d: %v", i, got[i])
		}
	}
	if err := r.End(); err != nil {
		t.Error(err)
	}
}

// There is one spelling: what was changed is refused, or is another value that
// is written just like that.
func TestOneSpelling(t *testing.T) {
	for name, c := range map[string][2]string{
		"other kind":             {"test-record: 3", "test-recorD: 3"},
		"other version":          {"test-record: 3", "test-record: 4"},
		"version with a zero":    {"test-record: 3", "test-record: 03"},
		"no space":               {"text: ", "text:"},
		"two spaces":             {"text: ", "text:  "},
		"space at the end":       {"uint: 9223372036854775807", "uint: 9223372036854775807 "},
		"carriage return":        {"hex: 00ab\n", "hex: 00ab\r\n"},
		"empty line":             {"hex: 00ab\n", "\nhex: 00ab\n"},
		"empty value":            {"ünï code: 1", ""},
		"tab":                    {"ünï code", "ünï\tcode"},
		"escape":                 {"ünï code", "\x1b[2J"},
		"C1 control":             {"ünï code", "\u009b2J"},
		"NUL":                    {"ünï code", "a\x00b"},
		"line separator":         {"ünï code", "a\u2028b"},
		"paragraph separator":    {"ünï code", "a\u2029b"},
		"bidirectional override": {"ünï code", "a\u202eb"},
		"zero width space":       {"ünï code", "a\u200bb"},
		"byte order mark":        {"ünï code", "\ufeffa"},
		"not UTF-8":              {"ünï code", "a\xffb"},
		"surrogate":              {"ünï code", "a\xed\xa0\x80b"},
		"leading zero":           {"uint: 9", "uint: 09"},
		"plus":                   {"uint: 9", "uint: +9"},
		"minus":                  {"uint: 9", "uint: -9"},
		"underscore":             {"uint: 9", "uint: 9_0"},
		"hex number":             {"uint: 9", "uint: 0x9"},
		"too large":              {"uint: 9223372036854775807", "uint: 9223372036854775808"},
		"upper-case hex":         {"00ab", "00aB"},
		"odd hex":                {"00ab", "0ab"},
		"other size":             {"00ab", "00ab00"},
		"base64 not padded":      {"//4=", "//4"},
		"base64 of the web":      {"//4=", "__4="},
		"base64, spare bits":     {"//4=", "//5="},
		"base64, broken":         {"//4=", "/ /4="},
		"time with a fraction":   {"05Z", "05.0Z"},
		"time with an offset":    {"05Z", "05+00:00"},
		"time, lower case":       {"02T03", "02t03"},
		"no such day":            {"2026-01-02", "2026-02-30"},
		"leap second":            {"04:05Z", "04:60Z"},
		"one more of many":       {"many: b\n", "many: b\nmany: c\n"},
		"after the end":          {"many: b\n", "many: b\nmore: c\n"},
		"order":                  {"hex: 00ab\nbase64: //4=\n", "base64: //4=\nhex: 00ab\n"},
		"twice":                  {"hex: 00ab\n", "hex: 00ab\nhex: 00ab\n"},
		"missing":                {"hex: 00ab\n", ""},
		"no end":                 {"many: b\n", "many: b"},
		"in front":               {"test-record", "\ntest-record"},
		"long":                   {"many: b\n", "many: " + strings.Repeat("b", 1000) + "\n"},
	} {
		if !strings.Contains(sampleText, c[0]) {
			t.Fatalf("%s: no %q", name, c[0])
		}
		r, _ := read([]byte(strings.Replace(sampleText, c[0], c[1], 1)))
		if err := r.End(); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
		if r.Text("text") != "" || r.Next("many") {
			t.Errorf("%s: goes on after a fault", name)
		}
	}
}

// What cannot be read is not written.
func TestWriterRefuses(t *testing.T) {
	for _, value := range []string{"", " a", "a ", "a\nb: c", "a\x1b", "\u202e", "\xff", "a\u2028"} {
		if data, err := New("k", 1).Text("name", value).Text("next", "fine").Bytes(); err == nil {
			t.Errorf("%q: wrote %q", value, data)
		}
		if Printable(value) == nil {
			t.Errorf("%q is printable", value)
		}
	}
	if Printable("a name, ünï-code 漢字") != nil {
		t.Error("a harmless name is refused")
	}
}

func TestErrorsHoldNoValue(t *testing.T) {
	const canary = "CANARY"
	for _, text := range []string{"k: 1\nsecret: " + canary + "\x00\n", "k: 1\nsecret: " + canary + "\nsecret: " + canary + "\n", "k: 1\nother: " + canary + "\n"} {
		r := Parse([]byte(text), "k", 1, 100)
		r.Hex("secret", 3)
		if err := r.End(); err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("%v", err)
		}
	}
	if _, err := New("k", 1).Text("secret", canary+"\n").Bytes(); err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("%v", err)
	}
}

// The writer leaves no copy of what it wrote in an array that it outgrew.
func TestWriterWipesWhatItOutgrows(t *testing.T) {
	w := New("k", 1)
	w.Text("secret", strings.Repeat("S", 100))
	first, _ := w.Bytes()
	w.Text("long", strings.Repeat("x", 10_000))
	if bytes.Contains(first[:cap(first)], []byte("SSS")) {
		t.Error("a copy stays")
	}
	last, _ := w.Bytes()
	w.Wipe()
	if bytes.ContainsAny(last[:cap(last)], "Sx") {
		t.Error("not wiped")
	}
}

func TestKind(t *testing.T) {
	for data, want := range map[string]string{
		"mandos-escrow-packet: 1\nid: x\n": "mandos-escrow-packet", "-----BEGIN PGP MESSAGE-----\n\nx: y": "", "": "", "a": "",
		"two words: 1\n": "", strings.Repeat("a", 65) + ": 1\n": "",
	} {
		if got := Kind([]byte(data)); got != want {
			t.Errorf("%q: %q", data, got)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(sampleText))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := Parse(data, "test-record", 3, 1000)
		w := New("test-record", 3).Text("text", r.Text("text")).OptionalText("absent", r.OptionalText("absent")).Uint("uint", r.Uint("uint")).
			Time("time", r.Time("time")).Hex("hex", r.Hex("hex", 2)).Base64("base64", r.Base64("base64"))
		for _, v := range r.Repeated("many", 2) {
			w.Text("many", v)
		}
		if err := r.End(); err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		if again, err := w.Bytes(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("another spelling: %v\n%q\n%q", err, data, again)
		}
	})
}
