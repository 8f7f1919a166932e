package unlock

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"PT0S": 0, "P0D": 0, "PT5M": 5 * time.Minute, "P1D": day, "P7D": 7 * day, "P1W": 7 * day,
		"PT60S": time.Minute, "PT60M": time.Hour, "PT24H": day, "PT5M30S": 330 * time.Second,
		"P1DT3M20S": day + 200*time.Second, "P1Y2M": (52 + 8) * 7 * day, "P1M": 28 * day,
		"PT1H30S": time.Hour + 30*time.Second, "P100D": 100 * day,
	} {
		got, err := ParseDuration(text)
		if err != nil || got != Duration(want) {
			t.Errorf("%s: %v, %v; want %v", text, time.Duration(got), err, want)
		}
	}
	for _, text := range []string{
		"", "P", "PT", "5m", "pt5m", "P5", "PT5", "P1DT", "PT1M1H", "P1D1Y", "P1W2D", "P2D1W", "PW", "PT-5M", "PT+5M",
		"PT1.5S", "PT5M ", "P1H", "PT1D", "P101Y", "PT9999999999999H", "P99999999999999999999D", "PT5M5M",
	} {
		if got, err := ParseDuration(text); !errors.Is(err, ErrDuration) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

func TestDurationString(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"PT0S": 0, "PT5M": 5 * time.Minute, "P1D": day, "PT1H30M": 90 * time.Minute,
		"PT1H0M30S": time.Hour + 30*time.Second, "P1DT1S": day + time.Second, "PT59S": 59 * time.Second,
	} {
		if got := Duration(d).String(); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestDurationRoundTrip(t *testing.T) {
	for range 5000 {
		want := Duration(time.Duration(rand.Int64N(int64(maxDuration/time.Second)>>rand.IntN(30))) * time.Second)
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got Duration
		if err := json.Unmarshal(text, &got); err != nil || got != want {
			t.Fatalf("%s: %v, %v", text, got, err)
		}
	}
	for _, bad := range []Duration{-1, Duration(-time.Second), 1, Duration(maxDuration + time.Second)} {
		if text, err := bad.MarshalText(); !errors.Is(err, ErrDuration) {
			t.Errorf("%d: %s, %v", bad, text, err)
		}
	}
}

func FuzzDuration(f *testing.F) {
	f.Add("PT5M")
	f.Add("P1Y2M3DT4H5M6S")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDuration(text)
		if err != nil {
			return
		}
		again, err := ParseDuration(d.String())
		if err != nil || again != d {
			t.Fatalf("%q: %v, then %v, %v", text, d, again, err)
		}
	})
}
