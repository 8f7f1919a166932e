package server

import (
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
)

// access is who may call a route. Roles of administrators are cumulative.
type access int

const (
	anyone   access = iota // proves itself by a secret in the call
	machines               // a running identity
	viewer
	helpdesk
	approver
	admin
	local // the control socket, or a command that opened the store itself
)

// route is one thing that can be asked for.
type route struct {
	pattern     string // of net/http.ServeMux
	access      access
	refusal     string // the audit action of a refusal; "" where none is kept
	unconfirmed bool   // answers locally while nothing else is served: what a person needs before confirm
	handle      func(*Server, call) (any, error)
}

var routes = []route{
	{"GET /v1/status", viewer, "", true, (*Server).status},
	{"POST /v1/confirm", local, "", true, (*Server).confirm},
	{"GET /v1/backup", local, "", true, (*Server).backup},
	{"GET /v1/policy", viewer, "", false, (*Server).policy},
	{"GET /v1/master", viewer, "", false, (*Server).master},
	{"POST /v1/master/export", admin, "", false, (*Server).masterExport},
	{"POST /v1/master/saved", admin, "", false, (*Server).masterSaved},
	{"PUT /v1/master", admin, "", false, (*Server).masterReplace},
	{"GET /v1/audit", viewer, "", true, (*Server).audit},

	{"POST /v1/login", anyone, "", false, (*Server).login},
	{"GET /v1/admins", viewer, "", false, (*Server).admins},
	{"POST /v1/admins", admin, "", false, (*Server).adminAdd},
	{"DELETE /v1/admins", admin, "", false, (*Server).adminRemove},
	{"GET /v1/tokens", admin, "", false, (*Server).tokens},
	{"POST /v1/tokens", admin, "", false, (*Server).tokenCreate},
	{"DELETE /v1/tokens", admin, "", false, (*Server).tokenRevoke},

	{"POST /v1/enroll", anyone, "", false, (*Server).enroll},
	{"GET /v1/self", machines, "", false, (*Server).self},
	{"PUT /v1/self/volumes/{uuid}", machines, "", false, (*Server).upload},
	{"POST /v1/self/volumes/{uuid}/commit", machines, "", false, (*Server).commit},
	{"POST /v1/self/boot", machines, "", false, (*Server).selfBoot},
	{"POST /v1/self/verify", machines, "", false, (*Server).selfVerify},
	{"DELETE /v1/self", machines, "", false, (*Server).selfRemove},

	{"GET /v1/machines", viewer, "", true, (*Server).machines},
	{"POST /v1/machines", admin, "machine.change.refused", true, (*Server).change},
	{"GET /v1/packets", viewer, "", true, (*Server).packets},
	{"POST /v1/packets", admin, "packet.import.refused", false, (*Server).packetImport},
	{"POST /v1/packets/expire", admin, "packet.expire.refused", false, (*Server).packetExpire},
	{"GET /v1/packets/{id}", viewer, "", true, (*Server).packet},
	{"GET /v1/packets/{id}/file", admin, "packet.export.refused", false, (*Server).packetExport},
	{"POST /v1/packets/{id}/obsolete", admin, "packet.obsolete.refused", false, (*Server).packetObsolete},
	{"POST /v1/packets/{id}/hold", admin, "packet.hold.refused", false, (*Server).packetHold},
	{"POST /v1/packets/{id}/reencrypted", admin, "packet.reencrypted.refused", false, (*Server).packetReencrypted},
	{"DELETE /v1/packets/{id}", admin, "packet.delete.refused", false, (*Server).packetDelete},
	{"GET /v1/lives", viewer, "", false, (*Server).lives},
	{"PUT /v1/lives", admin, "policy.set.refused", false, (*Server).setLife},
	{"GET /v1/recoverable", helpdesk, "", false, (*Server).recoverable},

	{"GET /v1/requests", viewer, "", false, (*Server).requests},
	{"POST /v1/requests", helpdesk, "recover.request.refused", false, (*Server).request},
	{"GET /v1/requests/{id}", viewer, "", false, (*Server).requestShow},
	{"GET /v1/requests/{id}/material", approver, "recover.approve.refused", false, (*Server).material},
	{"POST /v1/requests/{id}/approve", approver, "recover.approve.refused", false, (*Server).approve},
	{"POST /v1/requests/{id}/deny", helpdesk, "recover.deny.refused", false, (*Server).deny},
	{"POST /v1/requests/{id}/release", helpdesk, "recover.release.refused", false, (*Server).release},
	{"POST /v1/rescues", helpdesk, "rescue.invite.refused", false, (*Server).rescueInvite},
}

// rescueRoutes are what a rescue may call too, each only about its own volume
// and its own request.
var rescueRoutes = map[string]bool{
	"GET /v1/recoverable":            true,
	"POST /v1/requests":              true,
	"GET /v1/requests/{id}":          true,
	"POST /v1/requests/{id}/deny":    true,
	"POST /v1/requests/{id}/release": true,
}

// bodyLimit is how much of a body is read: a stranger sends no more than a
// secret and a registration.
func (rt route) bodyLimit() int64 {
	if rt.access == anyone {
		return 8 << 10
	}
	return api.MaxBody
}

var roleOf = map[access]store.Role{viewer: store.Viewer, helpdesk: store.Helpdesk, approver: store.Approver, admin: store.Administrator}
