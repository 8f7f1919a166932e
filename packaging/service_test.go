//go:build vm

package packaging

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// boot runs a script under a systemd of the system's own, which is process 1 of
// a container: with its sandboxes, and without any other service than those
// that the script starts. It returns what the script says.
func (d *debian) boot(script string) string {
	d.t.Helper()
	for path, text := range map[string]string{
		"etc/systemd/system/probe.target":  "[Unit]\nDefaultDependencies=no\nWants=probe.service\n",
		"etc/systemd/system/probe.service": "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/sh -exc '/probe; echo done'\nExecStopPost=/bin/systemctl exit\nStandardOutput=file:/probe.out\nStandardError=inherit\n",
		"probe":                            "#!/bin/sh\nset -ex\n" + script,
		"probe.out":                        "",
	} {
		if err := os.WriteFile(filepath.Join(d.dir, path), []byte(text), 0o755); err != nil {
			d.t.Fatal(err)
		}
	}
	log, _ := d.run(`
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
ip link set lo up
exec env container=container /sbin/init --unit=probe.target --log-target=console --show-status=0
`)
	said, err := os.ReadFile(filepath.Join(d.dir, "probe.out"))
	if err != nil {
		d.t.Fatal(err)
	}
	if !strings.HasSuffix(string(said), "done\n") {
		d.t.Fatalf("the script failed:\n%s\nsystemd says:\n%s", said, log)
	}
	return string(said)
}

// TestService runs the server as its package installs it, in its sandbox.
func TestService(t *testing.T) {
	d := newDebian(t)
	d.must("dpkg -i /debs/0/*.deb")
	said := d.boot(`
state=/var/lib/mandos-escrow

# Where there is no server, starting it does nothing, and that is no failure.
systemctl start mandos-escrow.service mandos-escrow-agent.service
[ "$(systemctl is-active mandos-escrow.service mandos-escrow-agent.service)" = "inactive
inactive" ]

echo seven-badgers-under-a-tin-roof >/tmp/passphrase
chmod 644 /tmp/passphrase
runuser -u mandos-escrow -- mandos-escrow server init --name srv1 --address 127.0.0.1:7625 --master-passphrase-file /tmp/passphrase
systemctl enable --now mandos-escrow.service
mandos-escrow server status --state $state --wait 60s
pid=$(systemctl show --value -p MainPID mandos-escrow.service)
grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/$pid/status

# An enrolled machine's agent tells it what became of the boot.
mandos-escrow token create --uses 1 --ttl 1h --state $state >/tmp/token
truncate -s 64M /tmp/disk
cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /tmp/disk /tmp/passphrase
mandos-escrow enroll --token-file /tmp/token --device /tmp/disk --passphrase-file /tmp/passphrase --name laptop7 --no-image
install -d -m 700 /run/mandos-escrow
(umask 077; cat >/run/mandos-escrow/boot) <<END
mandos-escrow-boot-report: 1
boot-id: $(cat /proc/sys/kernel/random/boot_id)
volume-uuid: $(cryptsetup luksUUID /tmp/disk)
outcome: rejected
uptime: 7
END
systemctl start mandos-escrow-agent.service
while [ "$(systemctl is-active mandos-escrow-agent.service)" = active ]; do sleep 0.1; done
systemctl show -p Result -p ExecMainStatus mandos-escrow-agent.service
mandos-escrow machine show laptop7 --state $state

# Upgraded while it runs, it goes on with the new program.
dpkg -i /debs/1/*.deb
mandos-escrow server status --state $state --wait 60s
[ "$(systemctl show --value -p MainPID mandos-escrow.service)" != $pid ]
systemctl is-active mandos-escrow.service

# Removed, it has ended well, and its state is there.
dpkg -r mandos-escrow-client mandos-escrow
[ "$(systemctl is-active mandos-escrow.service)" = inactive ]
[ ! -e /etc/systemd/system/multi-user.target.wants/mandos-escrow.service ]
[ -e $state/server.conf ]
`)
	for _, want := range []string{"Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "ExecMainStatus=0", "last boot"} {
		if !strings.Contains(said, want) {
			t.Errorf("the server runs without %q:\n%s", want, said)
		}
	}
}
