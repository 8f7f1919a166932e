package luks

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestJSONRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                           "no value",
		" ":                          "no value",
		"{":                          "no string",
		`{"a"`:                       "no colon",
		`{"a":1`:                     "no comma",
		`{"a":1,}`:                   "no string",
		`{"a":1,"a":1}`:              "stands twice",
		`{"a":1,"\u0061":1}`:         "stands twice",
		`{a:1}`:                      "no string",
		`[1,]`:                       "no value",
		`[1 2]`:                      "no comma",
		`{} {}`:                      "something follows",
		`{}x`:                        "something follows",
		"{}\x00":                     "something follows",
		`"a`:                         "no end",
		"\"a\nb\"":                   "control character",
		"\"a\x00b\"":                 "control character",
		`"\x"`:                       "escape",
		`"\u12g4"`:                   "escape",
		`"\u+123"`:                   "escape",
		`"\u12`:                      "escape",
		`"\ud800"`:                   "surrogate",
		`"\ud800\n"`:                 "escape",
		`"\ud800\u0061"`:             "surrogate",
		`"\udc00\ud800"`:             "surrogate",
		"\"\xff\"":                   "UTF-8",
		"01":                         "something follows",
		"-":                          "no value",
		"+1":                         "no value",
		"1.":                         "no digit",
		".5":                         "no value",
		"1e":                         "no digit",
		"1e+":                        "no digit",
		"tru":                        "no value",
		"NaN":                        "no value",
		strings.Repeat("[", 33):      "nested too deeply",
		strings.Repeat(`{"a":`, 100): "nested too deeply",
	} {
		if _, err := parseJSON([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// agree compares a value with what encoding/json reads of the same bytes.
func agree(t *testing.T, v value) {
	t.Helper()
	var theirs any
	if err := json.Unmarshal(v.raw, &theirs); err != nil {
		t.Fatalf("accepted %q: %v", v.raw, err)
	}
	switch theirs := theirs.(type) {
	case map[string]any:
		if v.members == nil || v.list != nil || v.text != nil || v.other || len(v.members) != len(theirs) {
			t.Fatalf("%q is %+v", v.raw, v)
		}
		for name, member := range v.members {
			if _, ok := theirs[name]; !ok {
				t.Fatalf("%q has a member %q", v.raw, name)
			}
			agree(t, member)
		}
	case []any:
		if v.members != nil || v.list == nil || v.text != nil || v.other || len(v.list) != len(theirs) {
			t.Fatalf("%q is %+v", v.raw, v)
		}
		for _, item := range v.list {
			agree(t, item)
		}
	case string:
		if v.members != nil || v.list != nil || v.text == nil || v.other || *v.text != theirs {
			t.Fatalf("%q is %+v", v.raw, v)
		}
	default:
		if v.members != nil || v.list != nil || v.text != nil || !v.other {
			t.Fatalf("%q is %+v", v.raw, v)
		}
	}
}

// FuzzJSON: what is accepted, encoding/json reads the same way. What is refused
// and JSON to it, differs in what this reader is stricter about.
func FuzzJSON(f *testing.F) {
	b := seed(f, "luks2.hdr")
	f.Add([]byte(strings.TrimRight(string(b[binUsed:]), "\x00")))
	f.Add([]byte(` {"a" : [ 1, -2.5e+3, "\u00e9\ud83d\ude00\\\/\"\n", true, false, null, {}, [] ] } `))
	f.Add([]byte(`{"a":{"b":{"a":"\ud800"}},"a":0}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := parseJSON(text)
		if err == nil {
			agree(t, v)
			return
		}
		if json.Valid(text) {
			for _, stricter := range []string{"twice", "surrogate", "escape", "deeply", "UTF-8"} {
				if strings.Contains(err.Error(), stricter) {
					return
				}
			}
			t.Fatalf("refused %q: %v", text, err)
		}
	})
}
