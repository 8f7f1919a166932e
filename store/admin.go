package store

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
)

const (
	adminBucket       = "admin"        // blind name: Admin
	adminKeyBucket    = "admin-key"    // blind key ID: the key of the Admin
	adminInviteBucket = "admin-invite" // blind hash of the invite: the same
)

// Role is what an administrator may do.
type Role string

// The roles; each may do what those before it may.
const (
	Viewer        Role = "viewer"
	Helpdesk      Role = "helpdesk" // may request a recovery
	Approver      Role = "approver" // may approve one
	Administrator Role = "admin"

	// Rescuer is no administrator's role, and allows nothing that needs one:
	// the key that logs in with a rescue invite has it.
	Rescuer Role = "rescue"
)

var roles = []Role{Viewer, Helpdesk, Approver, Administrator}

// ParseRole checks the name of a role: ErrRole.
func ParseRole(text string) (Role, error) {
	if !slices.Contains(roles, Role(text)) {
		return "", fmt.Errorf("%w: it is one of %v", ErrRole, roles)
	}
	return Role(text), nil
}

// Allows reports whether one who has role r may do what needs role needed. An
// unknown role allows nothing, and nothing allows it.
func (r Role) Allows(needed Role) bool {
	has, needs := slices.Index(roles, r), slices.Index(roles, needed)
	return needs >= 0 && has >= needs
}

// Admin is an administrator. Before the first login it has an invite and no
// key, after it a key and no invite.
type Admin struct {
	Name          string          `json:"name"` // unique
	KeyID         identity.KeyID  `json:"key_id,omitempty"`
	Key           identity.Public `json:"key,omitempty"`
	Role          Role            `json:"role"`
	Created       time.Time       `json:"created"`
	InviteHash    Hash            `json:"invite_hash,omitzero"` // SHA-256; zero: no invite
	InviteExpires time.Time       `json:"invite_expires,omitzero"`
	Removed       bool            `json:"removed"`
	// Rescue is what a rescue invite is for: then the role is Rescuer, and there
	// is nobody who is an administrator.
	Rescue *recovery.Rescue `json:"rescue,omitempty"`
}

// AdminByKey returns the administrator with this key; a removed one is
// ErrNotFound.
func (tx *Tx) AdminByKey(id identity.KeyID) (Admin, error) {
	return tx.presentAdmin(adminKeyBucket, string(id))
}

// AdminByInvite returns the administrator whose invite has this SHA-256; a
// removed one is ErrNotFound. Whether the invite has expired is not looked at.
func (tx *Tx) AdminByInvite(hash Hash) (Admin, error) {
	return tx.presentAdmin(adminInviteBucket, hash.String())
}

func (tx *Tx) presentAdmin(bucket, text string) (Admin, error) {
	key, err := tx.follow(bucket, text)
	if err != nil {
		return Admin{}, err
	}
	admin, err := getJSON[Admin](tx, adminBucket, key)
	if err == nil && admin.Removed {
		return Admin{}, fmt.Errorf("store: administrator: %w, removed", ErrNotFound)
	}
	return admin, err
}

// AdminByName returns the administrator with this name, also a removed one.
func (tx *Tx) AdminByName(name string) (Admin, error) {
	return getJSON[Admin](tx, adminBucket, tx.sealer.blind(adminBucket, name))
}

// PutAdmin adds an administrator, or replaces the one with the same name. A
// key or an invite of another, even a removed one, is ErrExists: nobody is two
// people. An unknown role is ErrRole.
func (tx *Tx) PutAdmin(admin Admin) error {
	if admin.Name == "" {
		return errors.New("store: an administrator needs a name")
	}
	if _, err := ParseRole(string(admin.Role)); err != nil && admin.Role != Rescuer {
		return fmt.Errorf("store: administrator %q: %w", admin.Name, err)
	}
	if (admin.Role == Rescuer) != (admin.Rescue != nil) {
		return fmt.Errorf("store: administrator %q: a rescue, and nobody else, has a volume", admin.Name)
	}
	if admin.KeyID != admin.keyID() {
		return fmt.Errorf("store: administrator %q: key ID is not that of the key", admin.Name)
	}
	if err := tx.moveAdmin(admin); err != nil {
		return err
	}
	return putJSON(tx, adminBucket, tx.sealer.blind(adminBucket, admin.Name), admin)
}

func (a Admin) keyID() identity.KeyID {
	if len(a.Key) == 0 {
		return ""
	}
	return a.Key.KeyID()
}

// moveAdmin brings the indexes from what is stored to admin. What is refused
// is refused before anything is written.
func (tx *Tx) moveAdmin(admin Admin) error {
	target := tx.sealer.blind(adminBucket, admin.Name)
	invited := admin.InviteHash != (Hash{})
	if invited {
		if err := tx.available(adminInviteBucket, admin.InviteHash.String(), target); err != nil {
			return err
		}
	}
	if admin.KeyID != "" {
		if err := tx.claim(adminKeyBucket, string(admin.KeyID), target); err != nil {
			return err
		}
	}
	if invited {
		if err := tx.claim(adminInviteBucket, admin.InviteHash.String(), target); err != nil {
			return err
		}
	}
	return tx.leaveAdmin(admin)
}

// leaveAdmin removes the indexes that the stored record has and admin lacks.
func (tx *Tx) leaveAdmin(admin Admin) error {
	old, err := tx.AdminByName(admin.Name)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	if old.KeyID != "" && old.KeyID != admin.KeyID {
		if err := tx.unclaim(adminKeyBucket, string(old.KeyID)); err != nil {
			return err
		}
	}
	if old.InviteHash != (Hash{}) && old.InviteHash != admin.InviteHash {
		return tx.unclaim(adminInviteBucket, old.InviteHash.String())
	}
	return nil
}

// Admins goes through all administrators, removed ones too, in no order that
// means anything. An error is the last thing it gives.
func (tx *Tx) Admins() iter.Seq2[Admin, error] {
	return allJSON[Admin](tx, adminBucket)
}
