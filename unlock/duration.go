package unlock

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ErrDuration is wrapped by every error of ParseDuration.
var ErrDuration = errors.New("not an RFC 3339 duration such as PT5M or P1D")

// maxDuration bounds a duration: 100 years of 365 days.
const maxDuration = 100 * 365 * day

const day = 24 * time.Hour

// Duration is a time.Duration whose text is an RFC 3339 duration, as in
// mandos-clients.conf(5): PT5M, P1D, PT0S. It is not negative, has whole
// seconds, and is at most 100 years.
type Duration time.Duration

type unit struct {
	letter byte
	length time.Duration
}

// The units of RFC 3339, appendix A, in their order. A year is 52 weeks and a
// month 4 weeks, as Mandos reads them (rfc3339_duration_to_delta).
var (
	dateUnits = []unit{{'Y', 52 * 7 * day}, {'M', 4 * 7 * day}, {'D', day}}
	timeUnits = []unit{{'H', time.Hour}, {'M', time.Minute}, {'S', time.Second}}
	weekUnits = []unit{{'W', 7 * day}}
)

// ParseDuration reads an RFC 3339 duration: P1W, or P1Y2M3DT4H5M6S with any of
// the units left out (appendix A lets none out between two others; that is
// accepted here, as ISO 8601 does).
func ParseDuration(text string) (Duration, error) {
	fail := func() (Duration, error) { return 0, fmt.Errorf("%w: %q", ErrDuration, text) }
	rest, found := strings.CutPrefix(text, "P")
	if !found || rest == "" {
		return fail()
	}
	if strings.HasSuffix(rest, "W") {
		total, ok := addUnits(0, rest, weekUnits)
		if !ok {
			return fail()
		}
		return Duration(total), nil
	}
	date, clock, hasClock := strings.Cut(rest, "T")
	if hasClock && clock == "" {
		return fail()
	}
	total, ok := addUnits(0, date, dateUnits)
	if ok {
		total, ok = addUnits(total, clock, timeUnits)
	}
	if !ok {
		return fail()
	}
	return Duration(total), nil
}

// addUnits adds what text says, each unit at most once and in order.
func addUnits(total time.Duration, text string, units []unit) (time.Duration, bool) {
	for _, u := range units {
		digits := 0
		for digits < len(text) && text[digits] >= '0' && text[digits] <= '9' {
			digits++
		}
		if digits == 0 || digits == len(text) || text[digits] != u.letter {
			continue
		}
		n, err := strconv.ParseInt(text[:digits], 10, 64)
		if err != nil || n > int64((maxDuration-total)/u.length) {
			return 0, false
		}
		total += time.Duration(n) * u.length
		text = text[digits+1:]
	}
	return total, text == ""
}

// String is the duration in days, hours, minutes and seconds: P7D, PT1H0M30S,
// PT0S. Parts of a second are cut off.
func (d Duration) String() string {
	seconds := int64(time.Duration(d) / time.Second)
	days, clock := seconds/86400, seconds%86400
	hours, minutes, seconds := clock/3600, clock/60%60, clock%60
	out := []byte{'P'}
	if days != 0 {
		out = fmt.Appendf(out, "%dD", days)
	}
	if clock == 0 && days != 0 {
		return string(out)
	}
	out = append(out, 'T')
	if hours != 0 {
		out = fmt.Appendf(out, "%dH", hours)
	}
	// RFC 3339 lets no unit out between two others, and Mandos reads it so.
	if minutes != 0 || hours != 0 && seconds != 0 {
		out = fmt.Appendf(out, "%dM", minutes)
	}
	if seconds != 0 || clock == 0 {
		out = fmt.Appendf(out, "%dS", seconds)
	}
	return string(out)
}

// MarshalText refuses what ParseDuration would not give back.
func (d Duration) MarshalText() ([]byte, error) {
	if d < 0 || time.Duration(d) > maxDuration || time.Duration(d)%time.Second != 0 {
		return nil, fmt.Errorf("%w: %v", ErrDuration, time.Duration(d))
	}
	return []byte(d.String()), nil
}

// UnmarshalText is ParseDuration.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := ParseDuration(string(text))
	if err != nil {
		return err
	}
	*d = parsed
	return nil
}
