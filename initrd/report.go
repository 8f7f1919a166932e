package initrd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

// The files in RunFolder, which outlives the image (docs/boot.md, section 6).
const (
	RunFolder   = "/run/mandos-escrow"
	ReportFile  = "boot"
	ReleaseFile = "release"
)

const (
	reportKind  = "mandos-escrow-boot-report"
	releaseKind = "mandos-escrow-release"
	maxReport   = 64 << 10 // bytes, of both files
)

// Report is what became of a boot.
type Report struct {
	BootID  string // of the kernel
	Fault   string // why the boot program could not do its work at all; empty: it could
	Volumes []VolumeReport
}

// VolumeReport is what became of one volume, and when: in seconds since the
// kernel started.
type VolumeReport struct {
	unlock.VolumeBoot
	Uptime uint64
}

// Bytes returns the file's content, or why it cannot be read again.
func (r Report) Bytes() ([]byte, error) {
	w := record.New(reportKind, 1).Text("boot-id", r.BootID).OptionalText("fault", r.Fault)
	for _, v := range r.Volumes {
		w.Text("volume-uuid", v.UUID).Text("outcome", string(v.Outcome)).Uint("uptime", v.Uptime).OptionalText("reason", v.Reason)
	}
	return checked(w, func(data []byte) error { _, err := ParseReport(data); return err })
}

// ParseReport reads what Report.Bytes wrote.
func ParseReport(data []byte) (Report, error) {
	r := record.Parse(data, reportKind, 1, maxReport)
	report := Report{BootID: r.Text("boot-id"), Fault: r.OptionalText("fault")}
	boot := unlock.Boot{ID: report.BootID}
	for r.Next("volume-uuid") {
		v := VolumeReport{VolumeBoot: unlock.VolumeBoot{UUID: r.Text("volume-uuid"), Outcome: unlock.Outcome(r.Text("outcome"))}}
		v.Uptime, v.Reason = r.Uint("uptime"), r.OptionalText("reason")
		report.Volumes = append(report.Volumes, v)
		boot.Volumes = append(boot.Volumes, v.VolumeBoot)
	}
	if err := r.End(); err != nil {
		return Report{}, err
	}
	if len(report.Fault) > unlock.MaxReason {
		return Report{}, fmt.Errorf("%w: a fault of %d bytes", unlock.ErrBoot, len(report.Fault))
	}
	if err := boot.Check(); err != nil {
		return Report{}, err
	}
	return report, nil
}

// Release is what proves, later, that this boot was released: the servers'
// nonces.
type Release struct {
	BootID string
	Nonces map[identity.KeyID]string
}

// Bytes returns the file's content, or why it cannot be read again.
func (r Release) Bytes() ([]byte, error) {
	w := record.New(releaseKind, 1).Text("boot-id", r.BootID)
	var servers []identity.KeyID
	for id := range r.Nonces {
		servers = append(servers, id)
	}
	slices.Sort(servers)
	for _, id := range servers {
		w.Text("server-key-id", string(id)).Text("nonce", r.Nonces[id])
	}
	return checked(w, func(data []byte) error { _, err := ParseRelease(data); return err })
}

// ParseRelease reads what Release.Bytes wrote.
func ParseRelease(data []byte) (Release, error) {
	r := record.Parse(data, releaseKind, 1, maxReport)
	release := Release{BootID: r.Text("boot-id"), Nonces: map[identity.KeyID]string{}}
	if !record.IsUUID(release.BootID) {
		r.Fail("boot-id", "not a UUID")
	}
	last := identity.KeyID("")
	for len(release.Nonces) == 0 || r.Next("server-key-id") {
		id, err := identity.ParseKeyID(r.Text("server-key-id"))
		if err != nil || id <= last {
			r.Fail("server-key-id", "not a key ID in its order")
		}
		nonce := r.Hex("nonce", 16)
		if r.Err() != nil {
			break
		}
		release.Nonces[id], last = fmt.Sprintf("%x", nonce), id
	}
	if len(release.Nonces) > unlock.MaxServers {
		r.Fail("server-key-id", "too many servers")
	}
	if err := r.End(); err != nil {
		return Release{}, err
	}
	return release, nil
}

func checked(w *record.Writer, parse func([]byte) error) ([]byte, error) {
	data, err := w.Bytes()
	if err == nil {
		err = parse(data)
	}
	return data, err
}

// runFolder is where the files are written, and the boot that they are of. The
// zero value writes none.
type runFolder struct{ dir, bootID string }

func openRunFolder(r root) (runFolder, error) {
	id, err := os.ReadFile(r.path("proc/sys/kernel/random/boot_id"))
	if err != nil {
		return runFolder{}, fmt.Errorf("boot id: %w", err)
	}
	f := runFolder{dir: r.path(RunFolder), bootID: printable(string(id), 36)}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return runFolder{}, fmt.Errorf("make %s: %w", f.dir, err)
	}
	return f, nil
}

func (f runFolder) report(fault string, volumes []VolumeReport) error {
	if f.bootID == "" {
		return nil
	}
	data, err := Report{BootID: f.bootID, Fault: printable(fault, unlock.MaxReason), Volumes: volumes}.Bytes()
	if err != nil {
		return fmt.Errorf("report of this boot: %w", err)
	}
	return f.write(ReportFile, data)
}

func (f runFolder) release(nonces map[identity.KeyID]string) error {
	if f.bootID == "" {
		return nil
	}
	data, err := Release{BootID: f.bootID, Nonces: nonces}.Bytes()
	if err != nil {
		return fmt.Errorf("nonces of the release: %w", err)
	}
	return f.write(ReleaseFile, data)
}

// write puts a whole file in the place of another. /run is memory: there is
// nothing to sync.
func (f runFolder) write(name string, data []byte) error {
	path := filepath.Join(f.dir, name)
	if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	file, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = file.Write(data)
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// uptime is in whole seconds since the kernel started, sleep included: the
// clock may be at 1970.
func uptime() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0
	}
	return uint64(now.Sec)
}
