package server

import (
	"context"
	"strings"
	"testing"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
)

// matrix says for every route who gets past the check of roles, in the order
// of callers: y does, - is refused, h does and is then told to come as an
// administrator or a machine of their own (from the control socket).
var matrix = map[string]string{
	//                                        stranger machine viewer helpdesk approver admin local
	"GET /v1/status":                      "- - y y y y y",
	"POST /v1/confirm":                    "- - - - - - y",
	"GET /v1/backup":                      "- - - - - - y",
	"GET /v1/policy":                      "- - y y y y y",
	"GET /v1/master":                      "- - y y y y y",
	"POST /v1/master/export":              "- - - - - y y",
	"POST /v1/master/saved":               "- - - - - y y",
	"PUT /v1/master":                      "- - - - - y y",
	"GET /v1/audit":                       "- - y y y y y",
	"POST /v1/login":                      "y h y y y y h",
	"GET /v1/admins":                      "- - y y y y y",
	"POST /v1/admins":                     "- - - - - y y",
	"DELETE /v1/admins":                   "- - - - - y y",
	"GET /v1/tokens":                      "- - - - - y y",
	"POST /v1/tokens":                     "- - - - - y y",
	"DELETE /v1/tokens":                   "- - - - - y y",
	"POST /v1/enroll":                     "y y h h h h h",
	"GET /v1/self":                        "- y - - - - -",
	"PUT /v1/self/volumes/{uuid}":         "- y - - - - -",
	"POST /v1/self/volumes/{uuid}/commit": "- y - - - - -",
	"POST /v1/self/boot":                  "- y - - - - -",
	"POST /v1/self/verify":                "- y - - - - -",
	"DELETE /v1/self":                     "- y - - - - -",
	"GET /v1/machines":                    "- - y y y y y",
	"POST /v1/machines":                   "- - - - - y y",
	"GET /v1/packets":                     "- - y y y y y",
	"POST /v1/packets":                    "- - - - - y y",
	"GET /v1/packets/{id}":                "- - y y y y y",
	"GET /v1/packets/{id}/file":           "- - - - - y y",
	"POST /v1/packets/{id}/obsolete":      "- - - - - y y",
	"POST /v1/packets/{id}/hold":          "- - - - - y y",
	"POST /v1/packets/expire":             "- - - - - y y",
	"POST /v1/packets/{id}/reencrypted":   "- - - - - y y",
	"DELETE /v1/packets/{id}":             "- - - - - y y",
	"GET /v1/lives":                       "- - y y y y y",
	"PUT /v1/lives":                       "- - - - - y y",
	"GET /v1/recoverable":                 "- - - y y y y",
	"GET /v1/requests":                    "- - y y y y y",
	"POST /v1/requests":                   "- - - y y y y",
	"GET /v1/requests/{id}":               "- - y y y y y",
	"GET /v1/requests/{id}/material":      "- - - - y y h",
	"POST /v1/requests/{id}/approve":      "- - - - y y y",
	"POST /v1/requests/{id}/deny":         "- - - y y y y",
	"POST /v1/requests/{id}/release":      "- - - y y y h",
	"POST /v1/rescues":                    "- - - y y y h",
}

var callers = []string{"stranger", "machine", "viewer", "helpdesk", "approver", "admin", "local"}

// past tells from a reply how far a call got.
func past(err error) string {
	text := ""
	if err != nil {
		text = err.Error()
	}
	switch {
	case text == errStranger.Message:
		return "-"
	case api.CodeOf(err) == api.CodeRefused && (strings.Contains(text, "has the role") || strings.Contains(text, "on the server itself") || strings.Contains(text, "only a machine does this")):
		return "-"
	case api.CodeOf(err) == api.CodeUsage && (strings.Contains(text, "use --home") || strings.Contains(text, "over the network")):
		return "h"
	}
	return "y"
}

func TestRoleMatrix(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	clients := map[string]*api.Client{
		"stranger": s.dial(must(identity.Generate()), nil), "machine": h.Client, "local": s.control,
		"viewer": s.person("vera", "viewer").Client, "helpdesk": s.person("hugo", "helpdesk").Client,
		"approver": s.person("anna", "approver").Client, "admin": s.person("adam", "admin").Client,
	}
	asked := s.person("hugo", "").file(s, h)
	seen := map[string]bool{}
	for _, rt := range routes {
		seen[rt.pattern] = true
		row, found := matrix[rt.pattern]
		if !found {
			t.Errorf("route %q has no row in the matrix of roles", rt.pattern)
			continue
		}
		method, path, _ := strings.Cut(rt.pattern, " ")
		path = strings.ReplaceAll(path, "{uuid}", siteVolume)
		if strings.Contains(path, "requests") {
			path = strings.ReplaceAll(path, "{id}", asked.id)
		}
		path = strings.ReplaceAll(path, "{id}", h.packetID())
		for i, want := range strings.Fields(row) {
			caller := callers[i]
			var err error
			if rt.pattern == "GET /v1/backup" || strings.HasSuffix(rt.pattern, "/file") {
				err = clients[caller].Stream(context.Background(), path, &strings.Builder{})
			} else {
				err = clients[caller].Call(context.Background(), method, path, bodyOf(rt.pattern), nil)
			}
			if got := past(err); got != want {
				t.Errorf("%s as %s: %s, want %s (%v)", rt.pattern, caller, got, want, err)
			}
		}
	}
	for pattern := range matrix {
		if !seen[pattern] {
			t.Errorf("the matrix has %q, which is no route", pattern)
		}
	}
}

// bodyOf gets past the check of roles and then changes nothing, or nothing
// that matters.
func bodyOf(pattern string) any {
	switch pattern {
	case "POST /v1/packets/{id}/hold":
		return api.Hold{}
	case "POST /v1/requests/{id}/deny":
		return api.Deny{Reason: "two\nlines"}
	}
	return struct{}{}
}

// Two roles and two kinds of identity do not add up: a machine's key is no
// administrator's, nor the reverse.
func TestNobodyIsTwo(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	wantCode(t, "a machine logs in", (&person{Client: h.Client}).login(s.invite("mallory", "admin")), api.CodeUsage)
	anna := s.person("anna", "approver")
	as := newHost(s, "anna's")
	as.Client, as.running = anna.Client, anna.key
	wantCode(t, "an administrator enrolls", as.register(s.token(1)), api.CodeUsage)
	second := &person{Client: anna.Client}
	wantCode(t, "a second name for one key", second.login(s.invite("anna2", "admin")), api.CodeRefused)
	// the boot identity may fetch its blob, and is nobody here
	boot := s.dial(h.boot, nil)
	if err := boot.Call(t.Context(), "GET", "/v1/self", nil, nil); past(err) != "-" {
		t.Errorf("the boot identity: %v", err)
	}
	// and the running identity is nobody on the boot protocol
	if reply := must(unlockReply(s, h.running)); reply.Released {
		t.Error("a running identity was given the blob")
	}
}
