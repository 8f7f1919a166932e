package enroll

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

const (
	uploadsKind = "mandos-escrow-uploads"
	maxUploads  = 2 << 20 // bytes
)

// uploads are what servers are still to be sent of one volume: one packet, byte
// for byte the same for all, and a blob for each. They are on disk before the
// first server gets its own, so that one that did not answer gets them later. No
// passphrase is in them but sealed to the boot identity.
type uploads struct {
	packet string // its ID
	data   []byte // the packet
	blobs  map[identity.KeyID][]byte
}

// owes reports whether a server can be given what it lacks.
func (u *uploads) owes(server identity.KeyID) bool {
	if u == nil {
		return false
	}
	_, ok := u.blobs[server]
	return ok
}

func (e *enrolment) uploadsPath(uuid string) string {
	return e.path(RunningFolder, "volume-"+uuid+".uploads")
}

// keepUploads writes them, or removes the file when nobody is owed anything.
func (e *enrolment) keepUploads(uuid string, u *uploads) error {
	if u == nil || len(u.blobs) == 0 {
		return config.RemoveWiped(e.uploadsPath(uuid))
	}
	w := record.New(uploadsKind, 1).Text("volume-uuid", uuid).Text("packet", u.packet).Base64("packet-data", u.data)
	for _, id := range slices.Sorted(maps.Keys(u.blobs)) {
		w.Text("server-key-id", string(id))
		if blob := u.blobs[id]; blob != nil {
			w.Base64("blob", blob)
		}
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.ReplaceWiped(e.uploadsPath(uuid), data)
}

// readUploads returns nil when there are none of that packet.
func (e *enrolment) readUploads(uuid, packet string) (*uploads, error) {
	path := e.uploadsPath(uuid)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	in := record.Parse(data, uploadsKind, 1, maxUploads)
	of := in.Text("volume-uuid")
	u := &uploads{packet: hex.EncodeToString(in.Hex("packet", 16)), data: in.Base64("packet-data"), blobs: map[identity.KeyID][]byte{}}
	for in.Next("server-key-id") && len(u.blobs) <= unlock.MaxServers {
		id, err := identity.ParseKeyID(in.Text("server-key-id"))
		if err != nil {
			in.Fail("server-key-id", err.Error())
		}
		u.blobs[id] = nil
		if in.Next("blob") {
			u.blobs[id] = in.Base64("blob")
		}
	}
	err = in.End()
	if err == nil && of != uuid {
		err = fmt.Errorf("%w: of volume %s", record.ErrFormat, of)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove it: what it says is made anew, with --passphrase-file", path, err)
	}
	if u.packet != packet {
		return nil, nil
	}
	return u, nil
}

// behind are the names of the servers that are owed something.
func (e *enrolment) behind(u *uploads) (names []string) {
	for _, p := range e.peers {
		if u.owes(p.KeyID) {
			names = append(names, p.Name)
		}
	}
	return names
}
