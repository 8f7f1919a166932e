// Package server is the service: one TCP port and a control socket in front of
// the store. It keeps what others sealed, decides by the rules of the rooms
// (unlock, recovery, escrow), writes the audit log, and opens nothing.
//
// It is not where the rules live, and holds no key that opens a packet or a
// blob. It may import every room, store, internal/api and internal/config.
package server

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// Names in a state folder.
const (
	settingsFile   = "server.conf" // written last: where it stands, the folder is whole
	keysFolder     = "keys"
	storeKeyFile   = "keys/store.key"
	storeFile      = "store.db"
	socketFile     = "control.sock"
	lockFile       = "lock"
	snapshotPrefix = ".snapshot." // of a folder in it, while a backup is made
	draftPrefix    = ".restore."  // of a folder in it, while a backup is restored
)

// maxListen is how many addresses a server can listen on.
const maxListen = 16

// ErrState: a folder that holds no server, or one already.
var ErrState = errors.New("state folder")

// Settings are what `server init` was told.
type Settings struct {
	Name      string
	Listen    []string // HOST:PORT
	Addresses []string // HOST:PORT, as machines and administrators reach it
}

func (s Settings) bytes() ([]byte, error) {
	w := record.New("mandos-escrow-server", 1).Text("name", s.Name)
	for _, l := range s.Listen {
		w.Text("listen", l)
	}
	for _, a := range s.Addresses {
		w.Text("address", a)
	}
	return w.Bytes()
}

func readSettings(dir string) (Settings, error) {
	data, err := os.ReadFile(filepath.Join(dir, settingsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Settings{}, fmt.Errorf("%w: %s holds no server: make one with `mandos-escrow server init --state %s`", ErrState, dir, dir)
	}
	if err != nil {
		return Settings{}, err
	}
	return parseSettings(data)
}

func parseSettings(data []byte) (Settings, error) {
	in := record.Parse(data, "mandos-escrow-server", 1, 64<<10)
	s := Settings{Name: in.Text("name"), Listen: in.Repeated("listen", maxListen), Addresses: in.Repeated("address", unlock.MaxAddresses)}
	if err := in.End(); err != nil {
		return Settings{}, fmt.Errorf("%s: %w", settingsFile, err)
	}
	return s, nil
}

// Check refuses settings that no server can have.
func (s Settings) Check() error {
	switch err := record.Printable(s.Name); {
	case err != nil || len(s.Name) > api.MaxName:
		return fmt.Errorf("server name %q: it must be 1 to %d printable bytes", s.Name, api.MaxName)
	case len(s.Listen) > maxListen || len(s.Addresses) > unlock.MaxAddresses:
		return fmt.Errorf("at most %d --listen and %d --address are possible", maxListen, unlock.MaxAddresses)
	}
	for _, list := range [][]string{s.Listen, s.Addresses} {
		if len(list) == 0 {
			return errors.New("a server needs at least one --listen and one --address")
		}
		for _, a := range list {
			if _, _, err := splitListen(a); err != nil {
				return err
			}
		}
	}
	for _, a := range s.Addresses {
		if err := unlock.CheckAddress(a); err != nil {
			return fmt.Errorf("--address %w: it is where machines reach this server", err)
		}
	}
	return nil
}

// Master is the OpenPGP pair that a server's packets are sealed to.
type Master struct {
	Public  *seal.PublicKey
	Private []byte // armored, under its passphrase; nil when it is kept elsewhere
}

// Init makes a state folder. What an interrupted Init left is made anew.
func Init(dir string, s Settings, master Master, now time.Time) error {
	if err := s.Check(); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := config.Lock(filepath.Join(dir, lockFile))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := clearUnfinished(dir); err != nil {
		return err
	}
	if _, err := config.MakeKey(filepath.Join(dir, keysFolder)); err != nil {
		return err
	}
	key := secret.Random(32)
	defer secret.Wipe(key)
	text := hex.AppendEncode(nil, key)
	defer secret.Wipe(text)
	if err := config.Replace(filepath.Join(dir, storeKeyFile), text); err != nil {
		return err
	}
	if err := fill(dir, key, s, master, now); err != nil {
		return err
	}
	data, err := s.bytes()
	if err != nil {
		return err
	}
	return config.Replace(filepath.Join(dir, settingsFile), data)
}

// clearUnfinished refuses a folder that holds a server or anything that is not
// ours, and removes what an interrupted Init or restore left. A store that was
// ever used is neither: its settings are lost, and it must not be.
func clearUnfinished(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, settingsFile)); err == nil {
		return fmt.Errorf("%w: %s holds a server already", ErrState, dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case lockFile, keysFolder, storeFile, storeFile + ".new":
		default:
			if strings.HasPrefix(e.Name(), draftPrefix) {
				if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
					return err
				}
				continue
			}
			return fmt.Errorf("%w: %s is not empty: %s is in it", ErrState, dir, e.Name())
		}
	}
	if err := checkUnused(dir); err != nil {
		return err
	}
	for _, name := range []string{storeFile, storeKeyFile} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func checkUnused(dir string) error {
	path := filepath.Join(dir, storeFile)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var head store.Head
	var unconfirmed string
	key, err := loadStoreKey(dir)
	if err == nil {
		defer secret.Wipe(key)
		var db *store.Store
		if db, err = store.Open(path, key); err == nil {
			err = errors.Join(db.View(func(tx *store.Tx) error {
				var errs [2]error
				head, errs[0] = tx.AuditHead()
				unconfirmed, errs[1] = store.Unconfirmed.Get(tx)
				return errors.Join(errs[:]...)
			}), db.Close())
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %s holds a store that does not open, and no %s: move it away first: %w", ErrState, dir, settingsFile, err)
	}
	if head.Seq > 1 && unconfirmed != restored {
		return fmt.Errorf("%w: %s holds a store that was in use, and no %s: put that back, or move the folder away", ErrState, dir, settingsFile)
	}
	return nil
}

func fill(dir string, key []byte, s Settings, master Master, now time.Time) error {
	policy, err := escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: master.Public.Fingerprint(), Name: s.Name}})
	if err != nil {
		return err
	}
	public, err := master.Public.Armor()
	if err != nil {
		return err
	}
	db, err := store.Create(filepath.Join(dir, storeFile), key)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Update(func(tx *store.Tx) error {
		return errors.Join(
			store.ServerName.Put(tx, s.Name),
			store.Epoch.Put(tx, 1),
			store.Policy.Put(tx, policy.Bytes()),
			store.TrusteeKeys.Put(tx, [][]byte{public}),
			store.MasterPublic.Put(tx, public),
			store.MasterPrivate.Put(tx, master.Private),
			tx.Audit(store.Event{Time: now, Actor: LocalActor(), Action: "server.init", Detail: "master key " + master.Public.Fingerprint()}),
		)
	})
}

// State is an opened state folder.
type State struct {
	Dir      string
	Settings Settings
	Key      *identity.Key
	Store    *store.Store
}

// OpenState opens a state folder. Only one process can.
func OpenState(dir string) (*State, error) {
	settings, err := readSettings(dir)
	if err != nil {
		return nil, err
	}
	key, err := config.LoadKey(filepath.Join(dir, keysFolder))
	if err != nil {
		return nil, err
	}
	storeKey, err := loadStoreKey(dir)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(storeKey)
	db, err := store.Open(filepath.Join(dir, storeFile), storeKey)
	if err != nil {
		return nil, err
	}
	return &State{dir, settings, key, db}, nil
}

// Close closes the store.
func (s *State) Close() error { return s.Store.Close() }

// Socket is the path of a state folder's control socket.
func Socket(dir string) string { return filepath.Join(dir, socketFile) }

func loadStoreKey(dir string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(dir, storeKeyFile))
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(text)
	return parseStoreKey(text)
}

func parseStoreKey(text []byte) ([]byte, error) {
	key, err := hex.AppendDecode(nil, config.TrimNewline(text))
	if err != nil || len(key) != 32 {
		secret.Wipe(key)
		return nil, fmt.Errorf("%s: not 64 hex digits", storeKeyFile)
	}
	return key, nil
}
