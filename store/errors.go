package store

import "errors"

// Errors of opening a store.
var (
	// ErrInUse says that another process has the store open.
	ErrInUse = errors.New("a server is running on it")
	// ErrSchema says that a newer program wrote the store; nothing was changed.
	ErrSchema = errors.New("the store has a schema that this program does not know")
	// ErrDamaged says that the file is cut off, torn, or no store.
	ErrDamaged = errors.New("the store file is damaged")
)

// Errors of transactions.
var (
	// ErrKey says that a value does not open: the store key is another one, or
	// the value was changed, or moved here from elsewhere.
	ErrKey = errors.New("wrong store key, or damaged value")
	// ErrNotFound says that there is no such record.
	ErrNotFound = errors.New("not found")
	// ErrExists says that the place is taken by another record.
	ErrExists = errors.New("exists already")
	// ErrFull says that there is no room left; nothing was written, and the
	// store goes on working when there is room again.
	ErrFull = errors.New("no room left for the store")
	// ErrRole says that a role is not viewer, helpdesk, approver or admin.
	ErrRole = errors.New("unknown role")
	// ErrAudit says that an audit log is not a chain.
	ErrAudit = errors.New("the audit log is broken")
)

// Errors of Token.Use.
var (
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenUsed    = errors.New("the token is used up")
	ErrTokenRevoked = errors.New("the token is revoked")
)

// errUnaudited is a fault of the program, not of what it was asked.
var errUnaudited = errors.New("transaction changes records without an audit event")
