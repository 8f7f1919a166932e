package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

const benchPackets = 100_000

// BenchmarkLists is what people and machines ask of a server with 100,000
// machines and as many packets, over the real port: a page of a list, searches,
// the packet of a volume, a machine's own state, an upload, the status, and the
// whole list in pages.
func BenchmarkLists(b *testing.B) {
	dir, address := benchState(b)
	state, err := OpenState(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer state.Close()
	admin, running, boot := benchKey(b), benchKey(b), benchKey(b)
	fillPackets(b, state, admin, running, boot)
	ctx, cancel := context.WithCancel(b.Context())
	stopped := make(chan error, 1)
	srv := New(state, slog.New(slog.DiscardHandler), time.Now)
	go func() { stopped <- srv.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-stopped; err != nil {
			b.Error(err)
		}
	}()
	awaitControl(b, dir)
	here := unlock.Server{Name: "srv", KeyID: state.Key.KeyID(), Addresses: []string{address}}
	dial := func(key *identity.Key) *api.Client {
		client, err := api.Dial(here, key, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(client.Close)
		return client
	}
	person, machine := dial(admin), dial(running)
	for _, c := range []struct{ name, path string }{
		{"first page", "/v1/packets?limit=1000"},
		{"page in the middle", "/v1/packets?limit=1000&after=" + fmt.Sprintf("%032x", benchPackets/2)},
		{"machine by name", "/v1/packets?limit=1000&machine=machine77777"},
		{"machine by key ID", "/v1/packets?limit=1000&machine=" + benchKeyID(77777)[:12]},
		{"volume", "/v1/packets?limit=1000&volume=" + benchUUID(77777)},
		{"group of 1 in 100", "/v1/packets?limit=1000&group=group77"},
		{"state, none", "/v1/packets?limit=1000&state=expired"},
		{"unverified, none", "/v1/packets?limit=1000&unverified=true"},
		{"unverified since", "/v1/packets?limit=1000&unverified=true&since=P30D"},
		{"packet by prefix", "/v1/packets/" + fmt.Sprintf("%032x", 77777)},
		{"recoverable by name", "/v1/recoverable?volume=" + url.QueryEscape("bench machine")},
		{"recoverable by UUID", "/v1/recoverable?volume=" + benchVolume},
		{"recoverable by part", "/v1/recoverable?volume=" + benchVolume[:8]},
		{"machines, first page", "/v1/machines?limit=1000"},
		{"status", "/v1/status"},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if err := person.Call(b.Context(), "GET", c.path, nil, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("own state", func(b *testing.B) {
		for b.Loop() {
			if err := machine.Call(b.Context(), "GET", "/v1/self", nil, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("upload", func(b *testing.B) {
		data := srvPacket(b, state, running, boot)
		for b.Loop() {
			srv.uploads.forget() // the limits are not what is measured
			srv.events.forget()
			if err := machine.Call(b.Context(), "PUT", "/v1/self/volumes/"+benchVolume, api.Upload{Packet: data, Blob: []byte("blob")}, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("all in pages", func(b *testing.B) {
		for b.Loop() {
			after := ""
			for n := 0; ; {
				var page []api.Packet
				if err := person.Call(b.Context(), "GET", "/v1/packets?limit=1000&after="+after, nil, &page); err != nil {
					b.Fatal(err)
				}
				if n += len(page); len(page) < 1000 {
					if n < benchPackets {
						b.Fatalf("%d packets", n)
					}
					break
				}
				after = page[len(page)-1].ID
			}
		}
	})
}

// forget gives every machine all back.
func (u *allowances) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.left = nil
}

func benchKeyID(n int) string { return hexDigest(fmt.Append(nil, "machine", n)) }

func benchUUID(n int) string {
	digest := hexDigest(fmt.Append(nil, "volume", n))
	return digest[:8] + "-" + digest[8:12] + "-4" + digest[13:16] + "-8" + digest[17:20] + "-" + digest[20:32]
}

// fillPackets enrolls machines of 100 groups with one packet each, and one
// machine and one administrator who really ask.
func fillPackets(b *testing.B, state *State, admin, running, boot *identity.Key) {
	b.Helper()
	const step = 5000
	now := time.Now()
	for start := 0; start < benchPackets; start += step {
		err := state.Store.Update(func(tx *store.Tx) error {
			for n := start; n < start+step; n++ {
				id, group := identity.KeyID(benchKeyID(n)), fmt.Sprint("group", n%100)
				m := unlock.Machine{KeyID: id, Name: fmt.Sprint("machine", n), Group: group, Settings: unlock.Defaults(), Volumes: []string{benchUUID(n)}}
				e, data := storedPacket(fmt.Sprintf("%032x", n), id, benchUUID(n), now)
				e.Machine, e.Group = m.Name, group
				if err := errors.Join(tx.PutMachine(m.Enable(now)), tx.PutPacket(e, data)); err != nil {
					return err
				}
			}
			return tx.Audit(store.Event{Time: now, Actor: "benchmark", Action: "machine.enroll"})
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	data := srvPacket(b, state, running, boot)
	packet, err := escrow.Parse(data)
	if err != nil {
		b.Fatal(err)
	}
	entry, err := escrow.NewEntry(packet, now).Verify(now)
	if err != nil {
		b.Fatal(err)
	}
	err = state.Store.Update(func(tx *store.Tx) error {
		m := unlock.Machine{
			KeyID: boot.KeyID(), RunningKeyID: running.KeyID(), RunningKey: running.Public(), Name: "bench machine", MachineIDHash: benchKeyID(0), Settings: unlock.Defaults(),
		}
		return errors.Join(
			tx.PutMachine(m.Enable(now)), tx.PutPacket(entry, data), store.Lives.Put(tx, escrow.Lives{"": {Lifetime: 1000 * time.Hour}}),
			tx.PutAdmin(store.Admin{Name: "adam", KeyID: admin.KeyID(), Key: admin.Public(), Role: store.Administrator, Created: now}),
			tx.Audit(store.Event{Time: now, Actor: "benchmark", Action: "machine.enroll"}),
		)
	})
	if err != nil {
		b.Fatal(err)
	}
}

// srvPacket seals a packet to the server's own policy.
func srvPacket(b *testing.B, state *State, running, boot *identity.Key) (data []byte) {
	b.Helper()
	err := state.Store.View(func(tx *store.Tx) error {
		policy, err := ownPolicy(tx)
		if err != nil {
			return err
		}
		keys, err := store.TrusteeKeys.Get(tx)
		if err != nil {
			return err
		}
		master, err := seal.ParsePublic(keys[0])
		if err != nil {
			return err
		}
		header := escrow.Header{Machine: "bench machine", KeyID: boot.KeyID(), MachineIDHash: benchKeyID(0), Volume: escrow.Volume{UUID: benchVolume}}
		payload := &escrow.PassphrasePayload{Passphrase: []byte(sitePassphrase), Slot: 1, LUKSType: "luks2"}
		data, err = escrow.Make(header, policy, []*seal.PublicKey{master}, []escrow.Payload{payload}, running, time.Now())
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return data
}
