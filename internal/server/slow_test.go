package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
)

// A body that comes slowly is judged by what its sender may do when it is
// there, not by what they might when its first byte came.
func TestRemovedWhileTheBodyComes(t *testing.T) {
	s := newSite(t)
	h := s.enroll("web1", siteVolume)
	no := false
	s.change(h, api.Change{Enable: &no})
	mallory := s.person("mallory", "admin")
	yes := true
	body := must(json.Marshal(api.Change{Machines: []string{"web1"}, Enable: &yes}))
	conn := must(tls.Dial("tcp", s.address, must(mallory.key.ClientTLS(s.key, api.Protocol))))
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/machines HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:1])
	// The server has the headers once it answers another call on a later connection.
	if err := mallory.Call(context.Background(), "GET", "/v1/status", nil, nil); err != nil {
		t.Fatal(err)
	}
	s.local("DELETE", "/v1/admins", api.Name{Name: "mallory"}, nil)
	if _, err := conn.Write(body[1:]); err != nil {
		t.Fatal(err)
	}
	if status, _, text := readReply(t, bufio.NewReader(conn)); status != api.CodeRefused.Status() {
		t.Errorf("%d: %s", status, text)
	}
	if r, _ := s.boot(h); r.Released {
		t.Error("a removed administrator enabled a machine")
	}
}

// Who is let in and then removed changes nothing: each change looks again.
func TestAuthorizeInTheTransaction(t *testing.T) {
	s := newSite(t)
	eve := s.person("eve", "approver")
	check := func(rt route) (err error) {
		if err := s.server.store.View(func(tx *store.Tx) error {
			a, lookup := tx.AdminByName("eve")
			err = call{route: rt, key: eve.key.Public(), admin: &a}.authorize(tx)
			return lookup
		}); err != nil {
			t.Fatal(err)
		}
		return err
	}
	if err := check(route{access: approver}); err != nil {
		t.Errorf("an approver: %v", err)
	}
	wantCode(t, "an approver as admin", check(route{access: admin}), api.CodeRefused)
	s.local("DELETE", "/v1/admins", api.Name{Name: "eve"}, nil)
	wantCode(t, "removed", check(route{access: approver}), api.CodeRefused)
}

func TestACopiedDiskRaisesAnAlarm(t *testing.T) {
	s := newSite(t)
	first := s.enroll("laptop7", siteVolume)
	second := s.enroll("laptop7", siteVolume)
	var packets []api.Packet
	s.local("GET", "/v1/packets", nil, &packets)
	for _, p := range packets {
		if !p.Hold && p.ID == first.packetID() || p.State != escrow.Verified {
			t.Errorf("packet %s: %s, hold %t", p.ID, p.State, p.Hold)
		}
	}
	alarms := 0
	for _, e := range s.audit() {
		if e.Action == "alarm.fork" && e.Packet == second.packetID() {
			alarms++
		}
	}
	if alarms != 1 {
		t.Errorf("%d alarms", alarms)
	}
}
