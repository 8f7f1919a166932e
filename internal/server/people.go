package server

import (
	"crypto/sha256"
	"errors"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// inviteLifetime is how long an invite may be used.
const inviteLifetime = 7 * 24 * time.Hour

// Limits of a token.
const (
	maxUses = 10000
	maxTTL  = 366 * 24 * time.Hour
)

func (s *Server) address() unlock.Server {
	return unlock.Server{Name: s.state.Settings.Name, KeyID: s.key.KeyID(), Addresses: s.state.Settings.Addresses}
}

func (s *Server) admins(call) (any, error) {
	out := []api.AdminInfo{}
	return &out, s.store.View(func(tx *store.Tx) error {
		for a, err := range tx.Admins() {
			if err != nil {
				return err
			}
			info := api.AdminInfo{Name: a.Name, Role: string(a.Role), KeyID: a.KeyID, Created: a.Created, Removed: a.Removed}
			if r := a.Rescue; r != nil {
				info.Rescue = &api.RescueInfo{Volume: r.Volume, InvitedBy: r.Inviter, Reason: r.Reason, Expires: r.Expires}
			}
			out = append(out, info)
		}
		return nil
	})
}

// adminAdd makes an invite. A name belongs to one person for ever, so that the
// audit log stays readable: a removed administrator's name is not given again.
// Who let an invite expire gets a new one.
func (s *Server) adminAdd(c call) (any, error) {
	in, err := decode[api.NewAdmin](c)
	if err != nil {
		return nil, err
	}
	if err := checkName("name", in.Name); err != nil {
		return nil, err
	}
	if strings.HasPrefix(in.Name, recovery.RescuePrefix) || strings.HasPrefix(in.Name, rescueNames) {
		return nil, api.Errorf(api.CodeUsage, "name %q: such names are those of rescue invites", in.Name)
	}
	role, err := store.ParseRole(in.Role)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "%v", err)
	}
	invite := api.Invite{Server: s.address(), Name: in.Name, Secret: secret.Random(16)}
	defer secret.Wipe(invite.Secret)
	err = s.store.Update(func(tx *store.Tx) error {
		old, err := tx.AdminByName(in.Name)
		switch {
		case err == nil && (old.KeyID != "" || old.Removed || c.now.Before(old.InviteExpires)):
			return api.Errorf(api.CodeConflict, "there is an administrator %s already; names are not used twice", in.Name)
		case err != nil && !errors.Is(err, store.ErrNotFound):
			return err
		}
		if invite.PolicyDigest, err = policyDigest(tx); err != nil {
			return err
		}
		err = tx.PutAdmin(store.Admin{
			Name: in.Name, Role: role, Created: c.now,
			InviteHash: sha256.Sum256(invite.Secret), InviteExpires: c.now.Add(inviteLifetime),
		})
		if err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "admin.add", Detail: in.Name + " as " + string(role)})
	})
	if err != nil {
		return nil, err
	}
	text, err := invite.Text()
	return api.Text{Text: text}, err
}

func (s *Server) adminRemove(c call) (any, error) {
	in, err := decode[api.Name](c)
	if err != nil {
		return nil, err
	}
	var left api.Removed
	return &left, s.store.Update(func(tx *store.Tx) error {
		a, err := tx.AdminByName(in.Name)
		switch {
		case err == nil && a.Removed:
			return api.Errorf(api.CodeNotFound, "administrator %q was removed before", in.Name)
		case err != nil:
			return api.Errorf(api.CodeNotFound, "there is no administrator %q; `mandos-escrow admin list` shows them", in.Name)
		}
		if err := forget(tx, a); err != nil {
			return err
		}
		if err := withdraw(tx, c, a); err != nil {
			return err
		}
		if err := denyRescue(tx, c, a, "the rescue invite was removed"); err != nil {
			return err
		}
		if err := endInvited(tx, c, a); err != nil {
			return err
		}
		if left.Approvers, err = approvers(tx); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "admin.remove", Detail: a.Name})
	})
}

// approvers counts who may approve a recovery.
func approvers(tx *store.Tx) (n int, err error) {
	for a, err := range tx.Admins() {
		if err != nil {
			return 0, err
		}
		if !a.Removed && a.Role.Allows(store.Approver) {
			n++
		}
	}
	return n, nil
}

// withdraw takes back what a removed administrator had approved and nobody has
// collected.
func withdraw(tx *store.Tx, c call, a store.Admin) error {
	var changed []recovery.Record
	for rec, err := range tx.Requests() {
		if err != nil {
			return err
		}
		if next, ok := rec.Withdraw(a.KeyID, c.now); ok {
			changed = append(changed, next)
		}
	}
	for _, rec := range changed {
		if err := tx.PutRequest(rec); err != nil {
			return err
		}
		if err := c.record(tx, store.Event{Action: "recover.withdraw", Request: rec.ID, Detail: "approval of " + a.Name + ", who is removed"}); err != nil {
			return err
		}
	}
	return nil
}

// login binds the key of the connection to the administrator whom the invite
// names. The same key may log in again with the same invite; another may not.
func (s *Server) login(c call) (any, error) {
	in, err := decode[api.Login](c)
	if err != nil {
		return nil, err
	}
	if c.local || c.key == nil || c.machine != nil {
		return nil, api.Errorf(api.CodeUsage, "a login comes over the network, with an identity of its own")
	}
	var out api.LoginReply
	return &out, s.store.Update(func(tx *store.Tx) error {
		a, err := tx.AdminByInvite(sha256.Sum256(in.Secret))
		if err != nil || a.Removed || a.KeyID != "" && a.KeyID != c.key.KeyID() || a.KeyID == "" && !c.now.Before(a.InviteExpires) || a.Rescue != nil && a.Rescue.Over(c.now) {
			return api.Errorf(api.CodeRefused, "refused: this invite is unknown here, used or expired; ask for a new one")
		}
		if other, err := tx.AdminByKey(c.key.KeyID()); err == nil && other.Name != a.Name {
			return api.Errorf(api.CodeRefused, "refused: this identity belongs to %s already; use another --home for %s", other.Name, a.Name)
		}
		policy, err := currentPolicy(tx)
		if err != nil {
			return err
		}
		out = api.LoginReply{Name: a.Name, Role: string(a.Role), Policy: policy}
		action := "admin.login"
		if r := a.Rescue; r != nil {
			out.Name, out.Expires, action = r.Requester(), r.Expires, "rescue.login"
		}
		a.Key, a.KeyID = c.key, c.key.KeyID()
		if err := tx.PutAdmin(a); errors.Is(err, store.ErrExists) {
			return api.Errorf(api.CodeRefused, "refused: this identity was a removed administrator's; use another --home for %s", a.Name)
		} else if err != nil {
			return err
		}
		c.actor = actorOf(a)
		return c.record(tx, store.Event{Action: action, Detail: "key " + string(a.KeyID)})
	})
}

func (s *Server) tokens(c call) (any, error) {
	out := []api.TokenInfo{}
	return &out, s.store.View(func(tx *store.Tx) error {
		for t, err := range tx.Tokens() {
			if err != nil {
				return err
			}
			info := api.TokenInfo{
				ID: t.ID, Created: t.Created, Expires: t.Expires, Uses: t.Uses,
				UsedBy: []string{}, Group: t.Group, Hold: t.Hold, Revoked: t.Revoked, By: t.By,
			}
			for _, id := range t.UsedBy {
				info.UsedBy = append(info.UsedBy, string(id))
			}
			out = append(out, info)
		}
		return nil
	})
}

func (s *Server) tokenCreate(c call) (any, error) {
	in, err := decode[api.NewToken](c)
	switch {
	case err != nil:
		return nil, err
	case in.Uses < 1 || in.Uses > maxUses:
		return nil, api.Errorf(api.CodeUsage, "--uses %d: from 1 to %d", in.Uses, maxUses)
	case in.TTL < time.Minute || in.TTL > maxTTL:
		return nil, api.Errorf(api.CodeUsage, "--ttl %s: from 1m to %s", in.TTL, maxTTL)
	case in.Group != "":
		if err := checkName("group", in.Group); err != nil {
			return nil, err
		}
	}
	mine := api.TokenServer{Server: s.address(), Secret: secret.Random(16)}
	defer secret.Wipe(mine.Secret)
	token := api.Token{}
	err = s.store.Update(func(tx *store.Tx) error {
		policy, err := ownPolicy(tx)
		if err != nil {
			return err
		}
		token.PolicyDigest, token.Threshold = policy.Digest(), policy.Threshold
		mine.Trustees = nil
		for _, t := range policy.Trustees {
			mine.Trustees = append(mine.Trustees, t.Fingerprint+" "+t.Name)
		}
		if mine.Keys, err = trusteeKeys(tx); err != nil {
			return err
		}
		id := secret.ID()
		err = tx.PutToken(store.Token{
			ID: id, SecretHash: sha256.Sum256(mine.Secret), Created: c.now, Expires: c.now.Add(in.TTL),
			Uses: in.Uses, Group: in.Group, Hold: in.Hold, By: c.actor,
		})
		if err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "token.create", Detail: id})
	})
	if err != nil {
		return nil, err
	}
	token.Servers = []api.TokenServer{mine}
	text, err := token.Text()
	return api.Text{Text: text}, err
}

func (s *Server) tokenRevoke(c call) (any, error) {
	in, err := decode[api.Name](c)
	if err != nil {
		return nil, err
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		t, err := tx.Token(in.Name)
		if err != nil {
			return api.Errorf(api.CodeNotFound, "there is no token %q; `mandos-escrow token list` shows them", in.Name)
		}
		t.Revoked = true
		if err := tx.PutToken(t); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "token.revoke", Detail: t.ID})
	})
}

// trusteeKeys are the public keys of the policy's trustees as a token carries
// them, so that a machine seals to a server's master key also while that server
// does not answer.
func trusteeKeys(tx *store.Tx) ([][]byte, error) {
	armored, err := store.TrusteeKeys.Get(tx)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, text := range armored {
		key, err := seal.ParsePublic(text)
		if err != nil {
			return nil, err
		}
		binary, err := key.Binary()
		if err != nil {
			return nil, err
		}
		out = append(out, binary)
	}
	return out, nil
}

func ownPolicy(tx *store.Tx) (escrow.Policy, error) {
	text, err := store.Policy.Get(tx)
	if err != nil {
		return escrow.Policy{}, err
	}
	return escrow.ParsePolicy(text)
}

func policyDigest(tx *store.Tx) ([32]byte, error) {
	policy, err := ownPolicy(tx)
	return policy.Digest(), err
}

// checkName refuses what could deceive the reader of a list.
func checkName(what, text string) error {
	if err := record.Printable(text); err != nil || len(text) > api.MaxName {
		return api.Errorf(api.CodeUsage, "%s %q: it must be 1 to %d printable bytes without a space at its ends", what, text, api.MaxName)
	}
	return nil
}
