//go:build tools

package depstmp

import (
	_ "github.com/ProtonMail/go-crypto/openpgp"
	_ "github.com/anatol/luks.go"
	_ "github.com/anatol/devmapper.go"
	_ "github.com/hashicorp/vault/shamir"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spf13/cobra"
	_ "github.com/spf13/cobra/doc"
	_ "github.com/tyler-smith/go-bip39/wordlists"
	_ "go.etcd.io/bbolt"
	_ "golang.org/x/crypto/chacha20poly1305"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
)
