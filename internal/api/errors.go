package api

import (
	"errors"
	"fmt"
	"net/http"
)

// Code is the kind of a refusal. It says nothing that its reader may not know:
// a stranger gets CodeRefused and no more.
type Code string

// The codes, with the exit code that a command ends with.
const (
	CodeRefused     Code = "refused"      // 7
	CodeUsage       Code = "usage"        // 2
	CodeNotFound    Code = "not-found"    // 1
	CodeAmbiguous   Code = "ambiguous"    // 1
	CodeConflict    Code = "conflict"     // 1
	CodeNotApproved Code = "not-approved" // 3
	CodeIntegrity   Code = "integrity"    // 5
	CodeLimit       Code = "limit"        // 6
	CodeUnconfirmed Code = "unconfirmed"  // 7
	CodeInternal    Code = "internal"     // 1
)

// Error is a reply that is not success.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{code, fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of an error, or "".
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Status is the HTTP status that carries a code (RFC 9110, section 15).
func (c Code) Status() int {
	switch c {
	case CodeRefused:
		return http.StatusForbidden
	case CodeUsage, CodeIntegrity:
		return http.StatusBadRequest
	case CodeNotFound:
		return http.StatusNotFound
	case CodeAmbiguous, CodeConflict, CodeNotApproved:
		return http.StatusConflict
	case CodeLimit:
		return http.StatusTooManyRequests
	case CodeUnconfirmed:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
