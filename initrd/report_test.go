package initrd

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

const (
	volumeA = "aaaaaaaa-0000-4000-8000-000000000001"
	volumeB = "bbbbbbbb-0000-4000-8000-000000000002"
	keyA    = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	keyB    = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	nonceA  = "00000000000000000000000000000001"

	reportText = "mandos-escrow-boot-report: 1\nboot-id: " + bootID + "\nvolume-uuid: " + volumeA + "\noutcome: opened\nuptime: 7\n" +
		"volume-uuid: " + volumeB + "\noutcome: unanswered\nuptime: 0\nreason: srv1: refused\n"
	releaseText = "mandos-escrow-release: 1\nboot-id: " + bootID + "\nserver-key-id: " + keyA + "\nnonce: " + nonceA +
		"\nserver-key-id: " + keyB + "\nnonce: " + nonceA + "\n"
)

func TestReportRoundTrip(t *testing.T) {
	want := Report{BootID: bootID, Volumes: []VolumeReport{
		{unlock.VolumeBoot{UUID: volumeA, Outcome: unlock.Opened}, 7},
		{unlock.VolumeBoot{UUID: volumeB, Outcome: unlock.Unanswered, Reason: "srv1: refused"}, 0},
	}}
	data, err := want.Bytes()
	if err != nil || string(data) != reportText {
		t.Fatalf("%q, %v", data, err)
	}
	if got, err := ParseReport(data); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	fault := Report{BootID: bootID, Fault: "damaged configuration"}
	data, err = fault.Bytes()
	if got, failed := ParseReport(data); err != nil || failed != nil || !reflect.DeepEqual(got, fault) {
		t.Errorf("%q, %v: %+v, %v", data, err, got, failed)
	}
}

func TestReleaseRoundTrip(t *testing.T) {
	want := Release{bootID, map[identity.KeyID]string{keyB: nonceA, keyA: nonceA}}
	data, err := want.Bytes()
	if err != nil || string(data) != releaseText {
		t.Fatalf("%q, %v", data, err)
	}
	if got, err := ParseRelease(data); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestReportsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		old, new string
		want     error
	}{
		"boot id":       {"boot-id: " + bootID, "boot-id: x", unlock.ErrBoot},
		"UUID":          {volumeA, "../../x", unlock.ErrBoot},
		"twice":         {volumeB, volumeA, unlock.ErrBoot},
		"outcome":       {"outcome: opened", "outcome: fine", unlock.ErrBoot},
		"long reason":   {"srv1: refused", strings.Repeat("x", unlock.MaxReason+1), unlock.ErrBoot},
		"long fault":    {"volume-uuid: " + volumeA, "fault: " + strings.Repeat("x", unlock.MaxReason+1) + "\nvolume-uuid: " + volumeA, unlock.ErrBoot},
		"no uptime":     {"uptime: 7\n", "", record.ErrFormat},
		"escape":        {"srv1", "\x1b[2J", record.ErrFormat},
		"later version": {"report: 1", "report: 2", record.ErrFormat},
		"other kind":    {"mandos-escrow-boot-report", "mandos-escrow-release", record.ErrFormat},
		"many volumes": {reportText[strings.Index(reportText, "volume-uuid"):], func() string {
			var text strings.Builder
			for i := range unlock.MaxBlobs + 1 {
				text.WriteString("volume-uuid: aaaaaaaa-0000-4000-8000-0000000000" + string(rune('0'+i/10)) + string(rune('0'+i%10)) + "\noutcome: opened\nuptime: 1\n")
			}
			return text.String()
		}(), unlock.ErrBoot},
	} {
		text := strings.Replace(reportText, c.old, c.new, 1)
		if r, err := ParseReport([]byte(text)); text == reportText || !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	for name, c := range map[string][2]string{
		"boot id":     {bootID, "x"},
		"key id":      {keyA, "aa"},
		"order":       {keyA, strings.Repeat("c", 64)},
		"twice":       {keyB, keyA},
		"nonce":       {nonceA, "00"},
		"no server":   {releaseText[strings.Index(releaseText, "server"):], ""},
		"cut":         {"nonce: " + nonceA + "\nserver-key-id: " + keyB + "\nnonce: " + nonceA + "\n", "nonce: " + nonceA},
		"other kind":  {"mandos-escrow-release", "mandos-escrow-boot-report"},
		"other field": {"boot-id", "boot"},
	} {
		text := strings.Replace(releaseText, c[0], c[1], 1)
		if r, err := ParseRelease([]byte(text)); text == releaseText || !errors.Is(err, record.ErrFormat) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

// TestRunFolder: modes, one file in the place of another, and a link that leads
// away.
func TestRunFolder(t *testing.T) {
	m := newMachine(t)
	f, err := openRunFolder(m.root)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(f.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st, err)
	}
	away := m.root.path("away")
	if err := os.Symlink(away, f.dir+"/boot.new"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.report("a line\nand \x1b[2J", nil); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Lstat(f.dir + "/boot")
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if _, err := os.Lstat(away); !errors.Is(err, os.ErrNotExist) {
		t.Error("it was written through a link")
	}
	if r := m.report(); r.Fault != "a line and ?[2J" {
		t.Errorf("%+v", r)
	}
	if err := (runFolder{}).report("fault", nil); err != nil {
		t.Errorf("without a folder: %v", err)
	}
}
