package initrd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

const hexKey = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// TestCompareTable: LUKS1 and LUKS2 as the kernel shows them, and each change
// to them.
func TestCompareTable(t *testing.T) {
	luks2 := unlock.Volume{Cipher: "aes-xts-plain64", KeyBits: 512, Offset: 16 << 20, SectorSize: 4096}
	luks1 := unlock.Volume{Cipher: "aes-cbc-essiv:sha256", KeyBits: 256, Offset: 2 << 20, SectorSize: 512}
	var (
		table2 = "aes-xts-plain64 :64:logon:cryptsetup:01234567-89ab-cdef-0123-456789abcdef-d0 0 254:3 32768 2 allow_discards sector_size:4096"
		table1 = "aes-cbc-essiv:sha256 " + hexKey[:64] + " 0 8:1 4096"
	)
	for name, c := range map[string]struct {
		volume          unlock.Volume
		table, old, new string
		want            string // in the error; empty: it matches
	}{
		"LUKS2":               {luks2, table2, "", "", ""},
		"LUKS1":               {luks1, table1, "", "", ""},
		"performance":         {luks2, table2, "2 allow", "5 same_cpu_crypt no_read_workqueue no_write_workqueue allow", ""},
		"key in clear":        {luks2, table2, ":64:logon:cryptsetup:01234567-89ab-cdef-0123-456789abcdef-d0", hexKey, ""},
		"null cipher":         {luks2, table2, "aes-xts-plain64", "cipher_null-ecb", "cipher is cipher_null-ecb, enrolled was aes-xts-plain64"},
		"other cipher":        {luks1, table1, "aes-", "serpent-", "cipher is serpent-"},
		"capi":                {luks2, table2, "aes-xts-plain64", "capi:xts(aes)-plain64", "cipher"},
		"short key":           {luks2, table2, ":64:", ":32:", "key bits is 256, enrolled was 512"},
		"no key":              {luks2, table2, ":64:logon:cryptsetup:01234567-89ab-cdef-0123-456789abcdef-d0", "-", "key bits is 0"},
		"bad key":             {luks1, table1, hexKey[:64], "x" + hexKey[:63], "key bits is 0"},
		"odd key":             {luks1, table1, hexKey[:64], hexKey[:63], "key bits is 0"},
		"IV offset":           {luks2, table2, " 0 254", " 8 254", "IV offset is 8"},
		"offset":              {luks2, table2, "32768", "0", "data offset in sectors is 0, enrolled was 32768"},
		"sector size":         {luks2, table2, "4096", "512", "sector size is 512"},
		"no sector size":      {luks2, table2, "2 allow_discards sector_size:4096", "1 allow_discards", "sector size is 512"},
		"sector size, LUKS1":  {luks1, table1, "8:1 4096", "8:1 4096 1 sector_size:4096", "sector size is 4096"},
		"IV of large sectors": {luks2, table2, "2 allow_discards", "2 iv_large_sectors", "option iv_large_sectors"},
		"integrity":           {luks2, table2, "2 allow_discards", "2 integrity:28:aead", "option integrity:28:aead"},
		"option of later":     {luks2, table2, "allow_discards", "\x1b[2J", "option ?[2J"},
		"number of options":   {luks2, table2, "2 allow", "1 allow", "number of options"},
		"number only":         {luks1, table1, "8:1 4096", "8:1 4096 0", ""},
		"number is none":      {luks1, table1, "8:1 4096", "8:1 4096 x", "number of options"},
		"device":              {luks2, table2, "254:3", "/dev/vda3", "device beneath"},
		"big device":          {luks2, table2, "254:3", "9999:3", "device beneath"},
		"cut":                 {luks1, table1, " 4096", "", "4 fields"},
		"empty":               {luks1, "", "", "", "0 fields"},
	} {
		t.Run(name, func(t *testing.T) {
			table := strings.Replace(c.table, c.old, c.new, 1)
			if c.old != "" && table == c.table {
				t.Fatal("nothing was changed")
			}
			device, err := compareTable([]byte(table), c.volume)
			if c.want == "" {
				want := unix.Mkdev(254, 3)
				if c.volume == luks1 {
					want = unix.Mkdev(8, 1)
				}
				if err != nil || device != want {
					t.Errorf("%d, %v", device, err)
				}
				return
			}
			if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), hexKey[:16]) {
				t.Errorf("the error shows the key: %v", err)
			}
		})
	}
}

// reply is the data of a DM_TABLE_STATUS reply, as the kernel makes it.
func reply(targets ...target) []byte {
	var data []byte
	for _, t := range targets {
		spec := make([]byte, 40)
		binary.NativeEndian.PutUint64(spec, t.start)
		copy(spec[24:], t.kind)
		next := (len(data) + 40 + len(t.params) + 1 + 7) &^ 7
		binary.NativeEndian.PutUint32(spec[20:], uint32(next))
		data = append(append(append(data, spec...), t.params...), make([]byte, next-len(data)-40-len(t.params))...)
	}
	return data
}

func TestParseTargets(t *testing.T) {
	data := reply(target{0, "crypt", []byte("one")}, target{8, "linear", []byte("another one")})
	got, err := parseTargets(append(data, "rest"...), 2)
	if err != nil || fmt.Sprintf("%d %s %s", got[0].start, got[0].kind, got[0].params) != "0 crypt one" ||
		fmt.Sprintf("%d %s %s", got[1].start, got[1].kind, got[1].params) != "8 linear another one" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseTargets(nil, 0); len(got) != 0 || err != nil {
		t.Errorf("nothing: %v, %v", got, err)
	}
	for n := range len(data) {
		if got, err := parseTargets(data[:n], 2); err == nil {
			t.Errorf("cut at %d: %v", n, got)
		}
	}
	back := bytes.Clone(data)
	binary.NativeEndian.PutUint32(back[20:], 8)
	if got, err := parseTargets(back, 2); err == nil {
		t.Errorf("next leads back: %v", got)
	}
	if _, err := parseTargets(data, 1<<31); err == nil {
		t.Error("endless targets")
	}
}

// fakeMapper has one table, and lets go of a mapping at the busy-th try.
type fakeMapper struct {
	targets []target
	fail    error
	busy    int
	removed []uint64
}

func (f *fakeMapper) table(uint64) ([]target, error) {
	var copied []target
	for _, t := range f.targets {
		copied = append(copied, target{t.start, t.kind, bytes.Clone(t.params)})
	}
	return copied, f.fail
}

func (f *fakeMapper) remove(device uint64) error {
	if f.busy--; f.busy >= 0 {
		return unix.EBUSY
	}
	f.removed = append(f.removed, device)
	return nil
}

// mapped is a machine whose first volume is open as it was enrolled.
func mapped(t *testing.T) (*machine, *fakeMapper, checker) {
	t.Helper()
	m := newMachine(t)
	v := m.config.Volumes[0]
	m.open("root", v.UUID)
	m.write("sys/dev/block/8:3/uevent", "MAJOR=8\nMINOR=3\nDEVNAME=vda\nDEVTYPE=partition\n")
	table := fmt.Sprintf("%s %s 0 8:3 %d", v.Cipher, hexKey, v.Offset/512)
	if v.SectorSize != 512 {
		table += fmt.Sprintf(" 1 sector_size:%d", v.SectorSize)
	}
	f := &fakeMapper{targets: []target{{0, "crypt", []byte(table)}}}
	return m, f, checker{m.root, f, m.say}
}

func TestCheckMapped(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*machine, *fakeMapper)
		want   error
		says   string
	}{
		"as enrolled": {func(*machine, *fakeMapper) {}, nil, ""},
		"nothing is open": {func(m *machine, f *fakeMapper) {
			m.write("sys/class/block/dm-root/dm/uuid", "LVM-x\n")
			f.fail = unix.EIO
		}, nil, ""},
		"stranger is open": {func(m *machine, f *fakeMapper) {
			m.open("root", "01234567-89ab-cdef-0123-456789abcdef")
			f.fail = unix.EIO
		}, nil, ""},
		"null cipher": {func(m *machine, f *fakeMapper) {
			f.targets[0].params = bytes.Replace(f.targets[0].params, []byte(m.config.Volumes[0].Cipher), []byte("cipher_null-ecb"), 1)
		}, ErrMismatch, "cipher is cipher_null-ecb"},
		"linear": {func(_ *machine, f *fakeMapper) { f.targets[0].kind = "linear" }, ErrMismatch, "not one crypt target"},
		"two targets": {
			func(_ *machine, f *fakeMapper) { f.targets = append(f.targets, target{8, "linear", nil}) },
			ErrMismatch, "not one crypt target",
		},
		"begins later":    {func(_ *machine, f *fakeMapper) { f.targets[0].start = 8 }, ErrMismatch, "not one crypt target"},
		"no table":        {func(_ *machine, f *fakeMapper) { f.targets = nil }, ErrMismatch, "not one crypt target"},
		"header of today": {func(m *machine, _ *fakeMapper) { format(m.t, m.disk(0)) }, ErrMismatch, "UUID is"},
		"header of the UUID": {func(m *machine, _ *fakeMapper) {
			format(m.t, m.disk(0), "--type", "luks2", "--pbkdf", "pbkdf2", "--uuid", m.config.Volumes[0].UUID)
		}, ErrMismatch, "volume key digest is"},
		"on another disk":  {func(m *machine, _ *fakeMapper) { m.write("sys/dev/block/8:3/uevent", "DEVNAME=vdb\n") }, ErrMismatch, "UUID is"},
		"unreadable":       {func(_ *machine, f *fakeMapper) { f.fail = unix.EIO }, unix.EIO, ""},
		"no device":        {func(m *machine, _ *fakeMapper) { m.write("sys/dev/block/8:3/uevent", "MAJOR=8\n") }, errNoNode, ""},
		"no device number": {func(m *machine, _ *fakeMapper) { m.write("sys/class/block/dm-root/dev", "x\n") }, errNumber, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m, f, check := mapped(t)
			c.change(m, f)
			err := check.check(m.config.Volumes)
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			said := m.console()
			if errors.Is(c.want, ErrMismatch) {
				if len(f.removed) != 1 || f.removed[0] != unix.Mkdev(254, 0) || !strings.Contains(said, c.says) || !strings.Contains(said, "mandos-escrow=off") {
					t.Errorf("removed %v, says %s", f.removed, said)
				}
			} else if len(f.removed) != 0 || said != "" {
				t.Errorf("removed %v, says %s", f.removed, said)
			}
			if strings.Contains(said, hexKey[:16]) || err != nil && strings.Contains(err.Error(), hexKey[:16]) {
				t.Errorf("shows the key: %v, %s", err, said)
			}
		})
	}
}

// TestExpensiveKeyslot: somebody added a keyslot that takes long. Its volume is not
// opened unattended, but boots.
func TestExpensiveKeyslot(t *testing.T) {
	m, f, check := mapped(t)
	v := format(t, m.disk(0), "--type", "luks1")
	m.config.Volumes[0] = v
	m.open("root", v.UUID)
	f.targets[0].params = fmt.Appendf(nil, "%s %s 0 8:3 %d", v.Cipher, strings.Repeat("0", v.KeyBits/4), v.Offset/512)
	const keyslot1 = 208 + 48
	patch(t, m.disk(0), keyslot1, "\x00\xac\x71\xf3\xff\xff\xff\xff") // active, 2^32-1 iterations
	if _, err := compare(m.disk(0), v); !errors.Is(err, luks.ErrTooExpensive) || !errors.Is(err, ErrMismatch) {
		t.Errorf("before: %v", err)
	}
	if err := check.check(m.config.Volumes); err != nil || len(f.removed) != 0 {
		t.Errorf("%v, removed %v, says %s", err, f.removed, m.console())
	}
}

// TestRemoveBusy: somebody looks at the mapping for a while, or for ever.
func TestRemoveBusy(t *testing.T) {
	m, f, check := mapped(t)
	f.targets[0].kind = "linear"
	synctest.Test(t, func(t *testing.T) {
		f.busy = 20
		if err := check.check(m.config.Volumes); !errors.Is(err, ErrMismatch) || len(f.removed) != 1 || strings.Contains(m.console(), "could not be removed") {
			t.Errorf("%v, removed %v, says %s", err, f.removed, m.console())
		}
		f.busy = 1000
		if err := check.check(m.config.Volumes); !errors.Is(err, ErrMismatch) || len(f.removed) != 1 || !strings.Contains(m.console(), "could not be removed") {
			t.Errorf("%v, removed %v, says %s", err, f.removed, m.console())
		}
	})
}

// TestCheckMappedOff: the kernel command line turns it off, before anything is
// read.
func TestCheckMappedOff(t *testing.T) {
	m, _, _ := mapped(t)
	m.write("etc/mandos-escrow/unlock.conf", "")
	if err := CheckMapped(m.options()); !errors.Is(err, unlock.ErrConfig) {
		t.Errorf("%v", err)
	}
	m.write("proc/cmdline", "mandos-escrow=off\n")
	if err := CheckMapped(m.options()); err != nil {
		t.Errorf("%v", err)
	}
}
