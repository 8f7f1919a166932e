package unlock

import "time"

// The transitions of a Machine. Each returns the record as it is afterwards;
// a server commits that, with its audit record, before it acts on it.

// Enable starts a new timeout. An enabled machine stays as it is, as in
// Mandos, unless its timeout has passed.
func (m Machine) Enable(now time.Time) Machine {
	if m.Enabled && !m.expired(now) {
		return m
	}
	m.Enabled, m.DisabledBecause, m.LastEnabled = true, "", now
	m.Expires = m.deadline(now)
	return m
}

// Disable stops every release, and forgets an approval: it was given for a
// boot that is not to happen. why is shown to administrators; a machine that
// timed out and is then disabled is not "timed out" any more.
func (m Machine) Disable(now time.Time, why string) Machine {
	if m.Approval.Given {
		m.Approval = Approval{}
	}
	if m.Enabled || m.DisabledBecause == TimedOut {
		m.Enabled, m.DisabledBecause, m.LastDisabled, m.Expires = false, why, now, time.Time{}
	}
	return m
}

// Unenroll takes the machine back, on the word of its running identity: it has
// no blobs any more. One that somebody disabled stays disabled for their reason.
func (m Machine) Unenroll(now time.Time) Machine {
	m = m.Disable(now, SelfUnenrolled)
	m.Volumes, m.Unenrolled = nil, now
	return m
}

// Expire disables the machine if its timeout has passed. Once that is
// committed, no clock that is set back revives it.
func (m Machine) Expire(now time.Time) Machine {
	if !m.Enabled || !m.expired(now) {
		return m
	}
	return m.Disable(now, TimedOut)
}

// Released notes a release and adds the extended timeout, for the time that
// the boot takes. That is given once: again only after a sign of life, so that
// boot keys alone, which lie in the initramfs, cannot keep a stolen machine
// enabled by asking again and again (in Mandos they can).
func (m Machine) Released(now time.Time, nonce string) Machine {
	alive := m.LastReleased.IsZero() || m.LastCheckedOK.After(m.LastReleased) || m.LastEnabled.After(m.LastReleased)
	if extended := now.Add(time.Duration(m.ExtendedTimeout)); alive && !m.Expires.IsZero() && extended.After(m.Expires) {
		m.Expires = extended
	}
	m.LastReleased, m.LastNonce = now, nonce
	return m
}

// CheckedOK notes a sign of life, and starts the timeout anew. It does not
// revive a machine whose timeout has passed.
func (m Machine) CheckedOK(now time.Time) Machine {
	m = m.Expire(now)
	m.LastCheckedOK = now
	if m.Enabled {
		m.Expires = m.deadline(now)
	}
	return m
}

// ApprovalRequested notes that a boot waits for an administrator.
func (m Machine) ApprovalRequested(now time.Time) Machine {
	m.LastApprovalRequest = now
	return m
}

// Approve lets the machine boot for the approval duration; by is who says so.
func (m Machine) Approve(now time.Time, by string) Machine { return m.decided(now, by, true) }

// Deny refuses the machine for the approval duration.
func (m Machine) Deny(now time.Time, by string) Machine { return m.decided(now, by, false) }

func (m Machine) decided(now time.Time, by string, given bool) Machine {
	m.Approval = Approval{Given: given, At: now, Until: now.Add(time.Duration(m.ApprovalDuration)), By: by}
	return m
}

// Set changes the settings. A running timeout ends earlier or later by the
// difference, as in Mandos; one that has passed stays passed.
func (m Machine) Set(now time.Time, s Settings) Machine {
	m = m.Expire(now)
	old := m.Timeout
	m.Settings = s
	switch {
	case !m.Enabled || s.Timeout == old:
	case s.Timeout == 0 || m.Expires.IsZero():
		m.Expires = m.deadline(now)
	default:
		m.Expires = m.Expires.Add(time.Duration(s.Timeout - old))
	}
	return m.Expire(now)
}

// deadline is when a timeout that starts now ends; zero for none.
func (m Machine) deadline(now time.Time) time.Time {
	if m.Timeout == 0 {
		return time.Time{}
	}
	return now.Add(time.Duration(m.Timeout))
}
