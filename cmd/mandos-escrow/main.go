// Command mandos-escrow is the server of sealed keys and every command that a
// person or a machine gives it. The program that boots a machine is
// mandos-escrow-unlock.
package main

import (
	"fmt"
	"os"

	"mandos-escrow/internal/secret"
)

func main() {
	if err := secret.Harden(); err != nil {
		fmt.Fprintln(os.Stderr, "mandos-escrow:", err)
		os.Exit(exitFailed)
	}
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
