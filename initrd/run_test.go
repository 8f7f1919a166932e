package initrd

import (
	"context"
	"testing"

	"mandos-escrow/unlock"
)

// TestAskpass: the root, and then a data volume for which nobody is asked again.
func TestAskpass(t *testing.T) {
	m := newMachine(t)
	done := m.boot(t.Context())
	for i, v := range m.config.Volumes {
		a := m.askpass([]string{"100", "200"}[i], m.root.path([]string{"dev/vda", "dev/vdb"}[i]))
		if got := a.reads(); got != passphrase(v.UUID) {
			t.Fatalf("volume %d: %q", i, got)
		}
		m.open(v.UUID, v.UUID)
	}
	m.ends(done)
	m.became(unlock.Opened, unlock.Opened)
	m.noSecret()
	if n := m.server.count(); n != 1 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestSystemd is the same with systemd's questions.
func TestSystemd(t *testing.T) {
	m := newMachine(t)
	done := m.boot(t.Context())
	for i, v := range m.config.Volumes {
		q := m.systemd("cryptsetup:" + m.root.path([]string{"dev/vda", "dev/vdb"}[i]))
		if got := q.reads(); got != "+"+passphrase(v.UUID) {
			t.Fatalf("volume %d: %q", i, got)
		}
		m.open(v.UUID, v.UUID)
	}
	m.ends(done)
	m.became(unlock.Opened, unlock.Opened)
	m.noSecret()
}

func TestEndsWhenTold(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	m.until("network", func() bool { return m.network.options.Report != nil })
	cancel()
	m.ends(done)
	m.became(unlock.Unanswered, unlock.Unanswered)
}
