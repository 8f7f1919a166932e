package main

import (
	"errors"
	"net"

	"mandos-escrow/unlock"
)

// brief is a server's failure in a few words, without what differs from one
// attempt to the next, such as local port numbers.
func brief(err error) string {
	var op *net.OpError
	switch {
	case errors.Is(err, unlock.ErrRefused):
		return "refused"
	case errors.As(err, &op) && op.Addr != nil:
		return op.Op + " " + op.Addr.String() + ": " + op.Err.Error()
	}
	return err.Error()
}
