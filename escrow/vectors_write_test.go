package escrow

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
)

// writeVectors makes every vector anew. Each has one fault, and is otherwise
// right: a changed packet is signed again, so that not the signature but the
// fault itself is what is found.
func writeVectors(t *testing.T) {
	all := map[string]vector{}
	for _, more := range []map[string]vector{
		packetVectors(), signatureVectors(), openVectors(), policyVectors(), shareVectors(), payloadVectors(), aloneVectors(), sheetVectors(), certificateVectors(), lineVectors(),
	} {
		for name, v := range more {
			all[name] = v
		}
	}
	if err := os.RemoveAll("testdata/vectors"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata/vectors", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, v := range all {
		if err := os.WriteFile(filepath.Join("testdata/vectors", name), v.encode(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// edit replaces the first match of a pattern; (?m) is on.
func edit(data []byte, pattern, with string) []byte {
	re := regexp.MustCompile("(?m)" + pattern)
	at := re.FindSubmatchIndex(data)
	if at == nil {
		panic("no match for " + pattern)
	}
	out := re.Expand(bytes.Clone(data[:at[0]]), []byte(with), data, at)
	return append(out, data[at[1]:]...)
}

// resign signs a changed packet with the machine's key.
func resign(data []byte) []byte {
	body := data[:bytes.LastIndex(data, []byte("\nsignature: "))+1]
	signature := testKeys().machine.Sign(signContext, body)
	return fmt.Appendf(bytes.Clone(body), "signature: %s\n", base64.StdEncoding.EncodeToString(signature))
}

func packetVectors() map[string]vector {
	one, two := newFixture(1, 1).make(passphrasePayload()), newFixture(1, 2).make(passphrasePayload())
	both := newFixture(1, 1).make(passphrasePayload(), volumeKeyPayload())
	threeOfFive := newFixture(3, 5).make(passphrasePayload())
	out := map[string]vector{
		"packet-ok":              {kind: "packet", expect: "ok", data: one},
		"packet-ok-both":         {kind: "packet", expect: "ok", data: both},
		"packet-ok-3-of-5":       {kind: "packet", expect: "ok", data: threeOfFive, open: "passphrase 5 1 3"},
		"packet-ok-open":         {kind: "packet", expect: "ok", data: both, open: "volume-key 1"},
		"packet-3-of-5-too-few":  {kind: "packet", expect: "too few", data: threeOfFive, open: "passphrase 1 2"},
		"packet-empty":           {kind: "packet", expect: "malformed"},
		"packet-cut-in-the-line": {kind: "packet", expect: "malformed", data: one[:len(one)-1]},
		"packet-after-signature": {kind: "packet", expect: "malformed", data: append(bytes.Clone(one), "x: y\n"...)},
		"packet-crlf":            {kind: "packet", expect: "malformed", data: bytes.ReplaceAll(one, []byte("\n"), []byte("\r\n"))},
	}
	trustee := `^trustee: (.*)\ntrustee: (.*)\n`
	for name, e := range map[string]struct {
		from          []byte
		pattern, with string
	}{
		"version-2":           {one, `^mandos-escrow-packet: 1`, "mandos-escrow-packet: 2"},
		"other-kind":          {one, `^mandos-escrow-packet`, "mandos-escrow-policy"},
		"id-upper-case":       {one, `^id: .*0f$`, "id: 000102030405060708090A0B0C0D0E0F"},
		"id-short":            {one, `^(id: .*)..$`, "${1}"},
		"id-missing":          {one, `^id: .*\n`, ""},
		"supersedes-itself":   {one, `^id: (.*)$`, "id: ${1}\nsupersedes: ${1}"},
		"supersedes-empty":    {one, `^created`, "supersedes: \ncreated"},
		"created-offset":      {one, `^(created: .*)Z$`, "${1}+00:00"},
		"created-fraction":    {one, `^(created: .*)Z$`, "${1}.5Z"},
		"created-no-date":     {one, `^created: 2026-01-02`, "created: 2026-02-30"},
		"name-control":        {one, `^machine-name: `, "machine-name: \x1b[2J"},
		"name-bidi":           {one, `^machine-name: `, "machine-name: \u202e"},
		"name-not-utf8":       {one, `^machine-name: `, "machine-name: \xff"},
		"name-space":          {one, `^(machine-name: .*)$`, "${1} "},
		"name-long":           {one, `^machine-name: .*$`, "machine-name: " + strings.Repeat("n", 256)},
		"two-spaces":          {one, `^machine-name: `, "machine-name:  "},
		"no-space":            {one, `^machine-name: `, "machine-name:"},
		"key-id-missing":      {one, `^machine-key-id: .*\n`, ""},
		"key-id-short":        {one, `^(machine-key-id: .*)..$`, "${1}"},
		"key-id-twice":        {one, `^(machine-key-id: .*\n)`, "${1}${1}"},
		"uuid-path":           {one, `^volume-uuid: .*$`, "volume-uuid: ../../etc/passwd"},
		"label-empty":         {one, `^volume-label: .*$`, "volume-label: "},
		"order-of-fields":     {one, `^(volume-label: .*\n)(volume-by-id: .*\n)`, "${2}${1}"},
		"epoch-0":             {one, `^policy-epoch: .*$`, "policy-epoch: 0"},
		"epoch-leading-zero":  {one, `^policy-epoch: `, "policy-epoch: 0"},
		"epoch-negative":      {one, `^policy-epoch: `, "policy-epoch: -"},
		"epoch-2-to-63":       {one, `^policy-epoch: .*$`, "policy-epoch: 9223372036854775808"},
		"threshold-0":         {one, `^threshold: 1`, "threshold: 0"},
		"threshold-above":     {one, `^threshold: 1`, "threshold: 2"},
		"threshold-2-to-32":   {one, `^threshold: 1`, "threshold: 4294967297"},
		"trustee-none":        {one, `^trustee: .*\n`, ""},
		"trustee-lower-case":  {one, `^trustee: .*$`, "trustee: " + strings.Repeat("ab", 20)},
		"trustee-key-id":      {one, `^trustee: .*(.{16})$`, "trustee: ${1}"},
		"trustee-order":       {two, trustee, "trustee: ${2}\ntrustee: ${1}\n"},
		"trustee-twice":       {two, trustee, "trustee: ${1}\ntrustee: ${1}\n"},
		"trustee-extra":       {one, `^(trustee: .*\n)`, "${1}trustee: " + strings.Repeat("F", 40) + "\n"},
		"payload-none":        {one, `^passphrase-(.*\n)+(signer)`, "${2}"},
		"payload-unknown":     {one, `^passphrase-payload`, "password-payload"},
		"payload-twice":       {one, `^(passphrase-(.*\n)+)(signer)`, "${1}${1}${3}"},
		"payload-order":       {both, `^((?:passphrase-.*\n)+)((?:volume-key-.*\n)+)`, "${2}${1}"},
		"payload-not-base64":  {one, `^passphrase-payload: .`, "passphrase-payload: *"},
		"payload-padding":     {one, `^(passphrase-payload: [^=\n]*)=*$`, "${1}==="},
		"payload-empty":       {one, `^passphrase-payload: .*$`, "passphrase-payload: "},
		"mac-short":           {one, `^(passphrase-mac: .*)..$`, "${1}"},
		"mac-missing":         {one, `^passphrase-mac: .*\n`, ""},
		"set-missing":         {one, `^passphrase-set: .*\n`, ""},
		"share-missing":       {two, `^passphrase-share-2: .*\n`, ""},
		"share-extra":         {one, `^(passphrase-share-)1(: .*\n)`, "${1}1${2}${1}2${2}"},
		"share-order":         {two, `^passphrase-share-1(: .*\n)passphrase-share-2`, "passphrase-share-2${1}passphrase-share-1"},
		"unknown-field":       {one, `^signer`, "note: hello\nsigner"},
		"comment":             {one, `^signer`, "# hello\nsigner"},
		"empty-line":          {one, `^signer`, "\nsigner"},
		"signer-missing":      {one, `^signer: .*\n`, ""},
		"signer-mid-padding":  {one, `^(signer: .*)=$`, "${1}"},
		"payload-newline-b64": {one, `^(passphrase-payload: .{40})`, "${1}\n"},
	} {
		out["packet-"+name] = vector{kind: "packet", expect: "malformed", data: resign(edit(e.from, e.pattern, e.with))}
	}
	return out
}

func signatureVectors() map[string]vector {
	data := newFixture(1, 1).make(passphrasePayload())
	body := data[:bytes.LastIndex(data, []byte("\nsignature: "))+1]
	sign := func(body, signature []byte) []byte {
		return fmt.Appendf(bytes.Clone(body), "signature: %s\n", base64.StdEncoding.EncodeToString(signature))
	}
	withSigner := func(spki []byte, id identity.KeyID) []byte {
		changed := edit(body, `^signer: .*$`, "signer: "+base64.StdEncoding.EncodeToString(spki))
		return edit(changed, `^machine-running-key-id: .*$`, "machine-running-key-id: "+string(id))
	}
	other := testKeys().otherHost
	p256 := must(x509.MarshalPKIXPublicKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()))
	otherSigner := edit(body, `^signer: .*$`, "signer: "+base64.StdEncoding.EncodeToString(other.Public()))
	noKey := []byte("no key at all")
	out := map[string]vector{
		"other-context":   {expect: "signature", data: sign(body, testKeys().machine.Sign("request", body))},
		"other-key":       {expect: "signature", data: sign(body, other.Sign(signContext, body))},
		"other-signer":    {expect: "signature", data: sign(otherSigner, other.Sign(signContext, otherSigner))},
		"other-content":   {expect: "signature", data: edit(data, `^machine-name: a`, "machine-name: b")},
		"short":           {expect: "signature", data: sign(body, []byte("short"))},
		"missing":         {expect: "malformed", data: body},
		"twice":           {expect: "malformed", data: edit(data, `^(signature: .*\n)`, "${1}${1}")},
		"signer-p256":     {expect: "signer", data: sign(withSigner(p256, identity.Public(p256).KeyID()), make([]byte, 64))},
		"signer-no-key":   {expect: "signer", data: sign(withSigner(noKey, identity.Public(noKey).KeyID()), make([]byte, 64))},
		"payload-swapped": {expect: "signature", data: swapPayloads(data)},
	}
	named := map[string]vector{}
	for name, v := range out {
		v.kind = "packet"
		named["signature-"+name] = v
	}
	return named
}

// swapPayloads puts the payload of another packet with the same header.
func swapPayloads(data []byte) []byte {
	other := newFixture(1, 1).make(passphrasePayload())
	line := regexp.MustCompile(`(?m)^passphrase-payload: .*$`)
	return line.ReplaceAllLiteral(data, line.Find(other))
}

// openVectors are well signed, and found out only by trustees.
func openVectors() map[string]vector {
	f := newFixture(1, 1)
	key := f.public[0]
	envelope := func(change func(*Share)) []byte { // seals a changed share in place of the right one
		p := f.packet(passphrasePayload())
		s := must(OpenShare(p.Payloads[0].Shares[0], testKeys().trustees[0], p, ForPassphrase))
		change(s)
		p.Payloads[0].Shares[0] = must(seal.Encrypt(must(s.Bytes()), key, nil, now))
		return resign(append(must(p.encode(nil)), "signature: x\n"...))
	}
	contents := func(plain func(p *Packet) []byte, honestMAC bool) []byte {
		return sealedWith(f, plain, honestMAC)
	}
	out := map[string]vector{
		"open-share-other-header":  {expect: "foreign share", data: envelope(func(s *Share) { s.HeaderDigest[0] ^= 1 })},
		"open-share-other-message": {expect: "foreign share", data: envelope(func(s *Share) { s.PayloadDigest[0] ^= 1 })},
		"open-share-other-payload": {expect: "foreign share", data: envelope(func(s *Share) { s.Payload = ForVolumeKey })},
		"open-share-other-set":     {expect: "foreign share", data: envelope(func(s *Share) { s.SetID[0] ^= 1 })},
		"open-share-commitment":    {expect: "foreign share", data: envelope(func(s *Share) { s.Commitment[0] ^= 1 })},
		"open-share-corrupt":       {expect: "corrupt share", data: envelope(func(s *Share) { s.Data[0] ^= 1 })},
		"open-share-index":         {expect: "corrupt share", data: envelope(func(s *Share) { s.Index = 2 })},
		"open-mac":                 {expect: "integrity", data: contents(nil, false)},
		"open-other-header": {expect: "integrity", data: contents(func(p *Packet) []byte {
			h := p.Header
			h.Volume.Label = "another"
			return must(plaintext(must(h.encode()), passphrasePayload()))
		}, true)},
		"open-other-payload": {expect: "integrity", data: contents(func(p *Packet) []byte {
			return must(plaintext(p.HeaderBytes, volumeKeyPayload()))
		}, true)},
		"open-no-record": {expect: "integrity", data: contents(func(*Packet) []byte { return []byte("hello\n") }, true)},
		"open-ok":        {expect: "ok", data: contents(nil, true)},
	}
	for name, v := range out {
		v.kind, v.open = "packet", ForPassphrase+" 1"
		out[name] = v
	}
	out["open-commitment"] = vector{kind: "packet", expect: "commitment", open: ForPassphrase + " 1", data: forgedSet(f)}
	return out
}

// sealedWith is a packet whose dealer put other lines, or a wrong MAC.
func sealedWith(f *fixture, plain func(*Packet) []byte, honestMAC bool) []byte {
	p := f.packet(passphrasePayload())
	text := must(plaintext(p.HeaderBytes, passphrasePayload()))
	if plain != nil {
		text = plain(p)
	}
	contentKey := bytes.Repeat([]byte{7}, contentKeySize)
	s := SealedPayload{Name: ForPassphrase, Message: must(seal.EncryptKey(text, contentKey, now))}
	s.MAC = must(p.mac(&s, contentKey))
	if !honestMAC {
		s.MAC[0] ^= 1
	}
	if err := p.sealShares(&s, contentKey, f.public, now); err != nil {
		panic(err)
	}
	p.Payloads[0] = s
	return resign(append(must(p.encode(nil)), "signature: x\n"...))
}

// forgedSet is a packet whose dealer committed to another content key.
func forgedSet(f *fixture) []byte {
	p := f.packet(passphrasePayload())
	s := &p.Payloads[0]
	share := must(OpenShare(s.Shares[0], testKeys().trustees[0], p, ForPassphrase))
	share.Commitment = bytes.Repeat([]byte{9}, sha256.Size)
	set := share.SetDigest()
	s.Set = set[:]
	s.Shares[0] = must(seal.Encrypt(must(share.Bytes()), f.public[0], nil, now))
	return resign(append(must(p.encode(nil)), "signature: x\n"...))
}

func policyVectors() map[string]vector {
	good := newFixture(2, 3).policy
	previous := good.Digest()
	successor := must(NewPolicy(2, 3, previous[:], good.Trustees)).Bytes()
	first := good.Bytes()
	out := map[string]vector{
		"policy-ok":   {kind: "policy", expect: "ok", data: first},
		"policy-ok-2": {kind: "policy", expect: "ok", data: successor},
	}
	for name, e := range map[string]struct {
		from          []byte
		pattern, with string
	}{
		"version-2":       {first, `^mandos-escrow-policy: 1`, "mandos-escrow-policy: 2"},
		"epoch-0":         {first, `^epoch: 1`, "epoch: 0"},
		"previous-at-1":   {successor, `^epoch: 2`, "epoch: 1"},
		"no-previous":     {first, `^epoch: 1`, "epoch: 2"},
		"previous-short":  {successor, `^(previous: .*)..$`, "${1}"},
		"threshold-0":     {first, `^threshold: 2`, "threshold: 0"},
		"threshold-4":     {first, `^threshold: 2`, "threshold: 4"},
		"threshold-huge":  {first, `^threshold: 2`, "threshold: 4294967298"},
		"no-trustee":      {first, `^(trustee: .*\n)+`, ""},
		"order":           {first, `^(trustee: .*\n)(trustee: .*\n)`, "${2}${1}"},
		"twice":           {first, `^(trustee: .*\n)`, "${1}${1}"},
		"same-key":        {first, `^(trustee: \w+) (.*)\n`, "${1} ${2}\n${1} again\n"},
		"no-name":         {first, `^(trustee: \w+) .*$`, "${1}"},
		"two-spaces":      {first, `^(trustee: \w+) `, "${1}  "},
		"short-id":        {first, `^trustee: \w{24}`, "trustee: "},
		"33-trustees":     {first, `^(trustee: .*\n)+`, manyTrustees(33)},
		"trailing":        {first, `\z`, "x: y\n"},
		"no-final-line":   {first, `\n\z`, ""},
		"control-in-name": {first, `^(trustee: \w+) `, "${1} \x07"},
	} {
		out["policy-"+name] = vector{kind: "policy", expect: "policy", data: edit(e.from, e.pattern, e.with)}
	}
	out["policy-ok-32"] = vector{kind: "policy", expect: "ok", data: edit(first, `^(trustee: .*\n)+`, manyTrustees(32))}
	return out
}

func manyTrustees(n int) string {
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, "trustee: %040X number %d\n", i, i)
	}
	return text.String()
}

func shareVectors() map[string]vector {
	parts := must(Split(bytes.Repeat([]byte{3}, contentKeySize), 2, 3, commitmentInfo(ForPassphrase)))
	encode := func(change func(*Share)) []byte {
		s := Share{Payload: ForPassphrase, Part: *parts[1]}
		s.Data = bytes.Clone(s.Data)
		change(&s)
		return must(s.Bytes())
	}
	good := encode(func(*Share) {})
	out := map[string]vector{
		"share-ok":        {expect: "ok", data: good},
		"share-flipped":   {expect: "corrupt share", data: encode(func(s *Share) { s.Data[4] ^= 1 })},
		"share-x-0":       {expect: "corrupt share", data: encode(func(s *Share) { s.Data[32] = 0; rewrite(s) })},
		"share-x-other":   {expect: "corrupt share", data: encode(func(s *Share) { s.Data[32] ^= 1 })},
		"share-shorter":   {expect: "corrupt share", data: encode(func(s *Share) { s.Data = s.Data[1:] })},
		"share-index-0":   {expect: "corrupt share", data: encode(func(s *Share) { s.Index = 0 })},
		"share-index-4":   {expect: "corrupt share", data: encode(func(s *Share) { s.Index = 4 })},
		"share-index-1":   {expect: "corrupt share", data: encode(func(s *Share) { s.Index = 1 })},
		"share-threshold": {expect: "corrupt share", data: encode(func(s *Share) { s.Threshold = 4 })},
		"share-version":   {expect: "malformed", data: edit(good, `share: 1`, "share: 2")},
		"share-upper":     {expect: "malformed", data: append(bytes.Clone(good[:len(good)-3]), "AB\n"...)},
		"share-odd":       {expect: "malformed", data: edit(good, `.\n\z`, "\n")},
		"share-no-digest": {expect: "corrupt share", data: edit(good, `^(digest: .*\n)+`, "")},
		"share-trailing":  {expect: "malformed", data: edit(good, `\z`, "x: y\n")},
	}
	for name, v := range out {
		v.kind = "share"
		out[name] = v
	}
	return out
}

func payloadVectors() map[string]vector {
	h := newFixture(1, 1).packet(passphrasePayload()).HeaderBytes
	pass, key := must(plaintext(h, passphrasePayload())), must(plaintext(h, volumeKeyPayload()))
	out := map[string]vector{
		"payload-ok-passphrase": {kind: "payload", expect: "ok", data: pass},
		"payload-ok-volume-key": {kind: "payload", expect: "ok", data: key},
	}
	for name, e := range map[string]struct {
		from          []byte
		pattern, with string
	}{
		"none":           {pass, `^payload: (.*\n)+`, ""},
		"unknown":        {pass, `^payload: .*`, "payload: both"},
		"slot-32":        {pass, `^recovery-slot: 2`, "recovery-slot: 32"},
		"slot-negative":  {pass, `^recovery-slot: 2`, "recovery-slot: -2"},
		"no-passphrase":  {pass, `^recovery-passphrase: .*\n`, ""},
		"passphrase-513": {pass, `^recovery-passphrase: .*`, "recovery-passphrase: " + strings.Repeat("1", 513)},
		"luks-3":         {pass, `^luks-type: luks2`, "luks-type: luks3"},
		"trailing":       {pass, `\z`, "volume-key: 00\n"},
		"both":           {pass, `\z`, string(key)},
		"key-bits":       {key, `^key-bits: 512`, "key-bits: 256"},
		"key-upper":      {key, `^volume-key: ab`, "volume-key: AB"},
		"key-129-bytes":  {key, `^volume-key: .*`, "volume-key: " + strings.Repeat("00", 129)},
		"offset":         {key, `^data-offset: .*`, "data-offset: 513"},
		"sector-size":    {key, `^sector-size: .*`, "sector-size: 1000"},
		"sector-large":   {key, `^sector-size: .*`, "sector-size: 8192"},
		"iterations-0":   {key, `^digest-iterations: .*`, "digest-iterations: 0"},
		"iterations-big": {key, `^digest-iterations: .*`, "digest-iterations: 4294967296"},
		"digest-long":    {key, `^digest: .*`, "digest: " + strings.Repeat("00", 65)},
		"no-backup":      {key, `^header-backup: .*\n`, ""},
	} {
		out["payload-"+name] = vector{kind: "payload", expect: "malformed", data: edit(e.from, e.pattern, e.with)}
	}
	return out
}
