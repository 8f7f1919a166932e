module mandos-escrow

go 1.26.0

require (
	codeberg.org/go-pdf/fpdf v0.12.0
	github.com/ProtonMail/go-crypto v1.5.2
	github.com/aead/serpent v0.0.0-20160714141033-fba169763ea6
	github.com/anatol/luks.go v0.0.0-20260615185044-2658459c8ca5
	github.com/boombuler/barcode v1.1.0
	github.com/dgryski/go-camellia v0.0.0-20191119043421-69a8a13fb23d
	github.com/emmansun/gmsm v0.29.0
	github.com/grandcat/zeroconf v1.0.0
	github.com/hashicorp/vault v1.21.4
	github.com/jzelinskie/whirlpool v0.0.0-20201016144138-0675e54bb004
	github.com/rogpeppe/go-internal v1.14.1
	github.com/spf13/cobra v1.10.2
	github.com/tyler-smith/go-bip39 v1.1.0
	github.com/youmark/pkcs8 v0.0.0-20240726163527-a2c0da244d78
	go.etcd.io/bbolt v1.4.3
	golang.org/x/crypto v0.58.0
	golang.org/x/net v0.62.0
	golang.org/x/sys v0.49.0
	golang.org/x/term v0.47.0
	lukechampine.com/adiantum v1.1.1
)

require (
	github.com/anatol/devmapper.go v0.0.0-20250316020617-2671eefd35d7 // indirect
	github.com/cenkalti/backoff v2.2.1+incompatible // indirect
	github.com/cloudflare/circl v1.6.3 // indirect
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/miekg/dns v1.1.73 // indirect
	github.com/spf13/pflag v1.0.9 // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/tools v0.51.0 // indirect
)
