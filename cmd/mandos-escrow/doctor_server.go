package main

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/server"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// examineServer checks the server of a state folder, running or not.
func examineServer(ctx context.Context, g *globals) ([]finding, error) {
	s, err := g.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer s.close()
	var status api.Status
	if err := s.Call(ctx, "GET", "/v1/status", nil, &status); err != nil {
		return nil, err
	}
	findings := []finding{checkRunning(ctx, g.state), checkServes(status), checkMaster(status)}
	files, err := checkFiles(g.state)
	if err != nil {
		return nil, err
	}
	clock, err := checkClock(ctx, s, status, time.Now())
	if err != nil {
		return nil, err
	}
	machines, err := pages(ctx, s, "/v1/machines", nil, 0, func(m api.Machine) string { return string(m.KeyID) })
	if err != nil {
		return nil, err
	}
	findings = append(append(findings, files, clock), checkPackets(status)...)
	return append(findings, checkBoots(machines)...), nil
}

func checkRunning(ctx context.Context, state string) finding {
	conn, err := api.DialUnix(ctx, server.Socket(state))
	if err != nil {
		return finding{problem, "no server runs on " + state, "start it: systemctl start mandos-escrow, or mandos-escrow server run --state " + shellWord(state)}
	}
	conn.Close()
	return finding{Level: fine, Text: "the server runs"}
}

func checkServes(s api.Status) finding {
	if s.Unconfirmed != "" {
		return finding{problem, "it serves nothing: " + s.Unconfirmed, "look at `mandos-escrow machine list --state DIR`, disable what must not boot, then `mandos-escrow server confirm --state DIR`"}
	}
	return finding{Level: fine, Text: "it serves"}
}

func checkMaster(s api.Status) finding {
	switch {
	case !s.MasterHere:
		return finding{Level: fine, Text: "the private half of the master key is kept elsewhere"}
	case s.MasterSaved.IsZero():
		return finding{problem, "the master key was never put away: without it no packet opens again", "mandos-escrow master export --private --state DIR --out master-key.asc, and keep the file where the server is not"}
	}
	return finding{Level: fine, Text: "the master key was put away on " + s.MasterSaved.Local().Format(time.DateOnly)}
}

// checkPackets names how many machines nobody could be let into, and whose secrets
// are to be replaced.
func checkPackets(s api.Status) (findings []finding) {
	for _, c := range []struct {
		count      int
		text, next string
	}{
		{s.Unproved, "%d machines have no verified packet: nobody could be let in", "mandos-escrow packet list --unverified --state DIR names those that began; run `mandos-escrow enroll` on the machines again"},
		{s.RotateDue, "%d packets are due for rotation: their recovery passphrase was released, or they expired", "on the machines: mandos-escrow rotate --due; `mandos-escrow packet list --state DIR` has them under DUE"},
		{s.ReencryptDue, "%d volumes are due for re-encryption: others may know their volume key", "on the machines: cryptsetup reencrypt, then mandos-escrow rotate --reencrypted; docs/operations.md, section 10"},
	} {
		if c.count > 0 {
			findings = append(findings, finding{warning, fmt.Sprintf(c.text, c.count), c.next})
		}
	}
	if len(findings) == 0 {
		return []finding{{Level: fine, Text: "every machine has a verified packet, and none is due"}}
	}
	return findings
}

// checkFiles looks for what others than their owner can read or write.
func checkFiles(state string) (finding, error) {
	open := ""
	err := filepath.WalkDir(state, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err == nil && open == "" && entry.Type() != fs.ModeSymlink && info.Mode().Perm()&0o077 != 0 {
			open = fmt.Sprintf("%s (mode %04o)", path, info.Mode().Perm())
		}
		return err
	})
	if err != nil {
		return finding{}, err
	}
	if open != "" {
		return finding{problem, "others than the server's user may use " + open, "chmod -R go= " + shellWord(state)}, nil
	}
	return finding{Level: fine, Text: "nobody but the server's user can read its files"}, nil
}

// checkClock compares the clock with the newest entry of the audit log.
func checkClock(ctx context.Context, s *session, status api.Status, now time.Time) (finding, error) {
	if status.AuditSeq == 0 {
		return finding{Level: fine, Text: "the audit log is empty"}, nil
	}
	var newest []store.Event
	if err := s.Call(ctx, "GET", fmt.Sprintf("/v1/audit?after=%d", status.AuditSeq-1), nil, &newest); err != nil {
		return finding{}, err
	}
	const slack = 5 * time.Second // entries have whole seconds, and some come while we look
	for _, e := range newest {
		if e.Time.After(now.Add(slack)) {
			return finding{
				problem, fmt.Sprintf("the clock says %s, and an entry of the audit log is of %s", now.UTC().Format(time.DateTime), e.Time.UTC().Format(time.DateTime)),
				"set the clock: timeouts, tokens and requests end by it",
			}, nil
		}
	}
	return finding{Level: fine, Text: "the clock goes on from the audit log"}, nil
}

// checkBoots names machines whose last boot, or whose volumes, somebody must look
// after.
func checkBoots(machines []api.Machine) (findings []finding) {
	for _, m := range machines {
		for _, v := range m.Checks {
			if v.Reason != "" {
				findings = append(findings, finding{problem, fmt.Sprintf("%s (%s), volume %s, %s: verify failed: %s", m.Name, m.KeyID.Short(), v.UUID, when(v.Checked), v.Reason), "on that machine: mandos-escrow verify"})
			}
		}
		for _, v := range m.LastBoot.Volumes {
			who := fmt.Sprintf("%s (%s), volume %s, %s: ", m.Name, m.KeyID.Short(), v.UUID, when(m.LastBoot.Told))
			switch v.Outcome {
			case unlock.Rejected:
				findings = append(findings, finding{warning, who + "its boot passphrase opens it no more", "on that machine: mandos-escrow doctor"})
			case unlock.Mismatched:
				findings = append(findings, finding{problem, who + "another header than the enrolled one: " + v.Reason, "if nobody re-encrypted or formatted it, somebody exchanged the disk: find out who before you enroll it again"})
			}
		}
	}
	return findings
}
