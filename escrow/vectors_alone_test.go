package escrow

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"

	"mandos-escrow/internal/seal"
)

// testHolder has the key testdata/keys/certificate-NAME.pem, the same in every
// run, and a certificate to it.
func testHolder(name string) holder {
	block, _ := pem.Decode(keyFile("certificate-"+name+".pem", func() []byte {
		var key any
		switch name {
		case "rsa":
			key = must(rsa.GenerateKey(rand.Reader, 2048))
		case "p256":
			key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		case "x25519":
			key = must(ecdh.X25519().GenerateKey(rand.Reader))
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
	}))
	switch key := must(x509.ParsePKCS8PrivateKey(block.Bytes)).(type) {
	case *rsa.PrivateKey:
		return holder{key, issue(key.Public(), nil)}
	case *ecdsa.PrivateKey:
		return holder{key, issue(key.Public(), nil)}
	case *ecdh.PrivateKey:
		return holder{key, issue(key.PublicKey(), nil)}
	}
	panic("no such key: " + name)
}

// edits are vectors of one kind that are malformed.
func edits(kind, prefix string, all map[string]struct {
	from          []byte
	pattern, with string
},
) map[string]vector {
	out := map[string]vector{}
	for name, e := range all {
		out[prefix+name] = vector{kind: kind, expect: "malformed", data: edit(e.from, e.pattern, e.with)}
	}
	return out
}

func aloneVectors() map[string]vector {
	foreign := foreignPayload()
	foreign.Passphrase = []byte(" a space first")
	both, old := standAlone(passphrasePayload(), fingerprinted()).Plain, standAlone(oldVolumeKeyPayload()).Plain
	other := standAlone(foreign).Plain
	out := edits("payload", "stand-alone-", map[string]struct {
		from          []byte
		pattern, with string
	}{
		"version-2":            {both, `^(mandos-escrow-stand-alone): 1`, "${1}: 2"},
		"id-short":             {both, `^(id: .*)..$`, "${1}"},
		"id-missing":           {both, `^id: .*\n`, ""},
		"supersedes-itself":    {both, `^id: (.*)\nsupersedes: .*$`, "id: ${1}\nsupersedes: ${1}"},
		"created-missing":      {both, `^created: .*\n`, ""},
		"name-empty":           {both, `^machine-name: .*$`, "machine-name: "},
		"uuid-missing":         {both, `^volume-uuid: .*\n`, ""},
		"key-id":               {both, `^(machine-name: .*\n)`, "${1}machine-key-id: " + strings.Repeat("00", 32) + "\n"},
		"payload-none":         {both, `^payload: (.*\n)+`, ""},
		"payload-twice":        {old, `^(payload: (.*\n)+)`, "${1}${1}"},
		"payload-order":        {both, `^(payload: passphrase\n(?:[^p].*\n)+)(payload: volume-key\n(?:.*\n)+)`, "${2}${1}"},
		"trailing":             {both, `\z`, "x: y\n"},
		"no-sector-size":       {both, `^sector-size: .*\n`, ""},
		"no-data-offset":       {both, `^data-offset: .*\n`, ""},
		"no-digest-salt":       {both, `^digest-salt: .*\n`, ""},
		"no-digest":            {both, `^digest: .*\n`, ""},
		"no-cipher":            {old, `^cipher: .*\n`, ""},
		"fingerprint-short":    {both, `^(data-fingerprint: .*)..$`, "${1}"},
		"fingerprint-17-times": {both, `^(data-fingerprint: .*\n)`, strings.Repeat("${1}", 16)},
		"fingerprint-first":    {both, `^(header-backup: .*\n)(data-fingerprint: .*\n)`, "${2}${1}"},
		"foreign-not-base64":   {other, `^passphrase-base64: .*$`, "passphrase-base64: *"},
		"foreign-base64-plain": {other, `^passphrase-base64: .*$`, "passphrase-base64: " + base64.StdEncoding.EncodeToString([]byte("plain"))},
		"foreign-both":         {other, `^(passphrase-base64: .*\n)`, "passphrase: plain\n${1}"},
		"foreign-slot-32":      {other, `^(passphrase-base64: .*\n)`, "${1}slot: 32\n"},
		"foreign-slot-name":    {other, `^(passphrase-base64: .*\n)`, "${1}recovery-slot: 2\n"},
	})
	for name, data := range map[string][]byte{"both": both, "old-volume-key": old, "foreign": other} {
		out["stand-alone-ok-"+name] = vector{kind: "payload", expect: "ok", data: data}
	}
	return out
}

func sheetVectors() map[string]vector {
	sealed := func(p Payload) []byte {
		s := must(SealSheet(standAlone(p), p.Name(), packetPassphrase))
		return must(OpenSheet(s.Message, packetPassphrase)).Plain
	}
	pass, key := sealed(passphrasePayload()), sealed(volumeKeyPayload())
	out := edits("payload", "sheet-", map[string]struct {
		from          []byte
		pattern, with string
	}{
		"version-2":       {key, `^(mandos-escrow-sheet): 1`, "${1}: 2"},
		"id-missing":      {key, `^id: .*\n`, ""},
		"uuid":            {key, `^volume-uuid: .*$`, "volume-uuid: x"},
		"key-hex":         {key, `^volume-key: .*$`, "volume-key: abc"},
		"key-short":       {key, `^volume-key: .*$`, "volume-key: AAAAAAAAAAA="},
		"no-cipher":       {key, `^cipher: .*\n`, ""},
		"no-sector-size":  {key, `^sector-size: .*\n`, ""},
		"both":            {key, `\z`, string(pass[bytes.Index(pass, []byte("recovery-passphrase")):])},
		"none":            {key, `^volume-key: (.*\n)+`, ""},
		"chosen":          {pass, `^recovery-passphrase: .*$`, "recovery-passphrase: of a person, 1234"},
		"group":           {pass, `^recovery-passphrase: 011000`, "recovery-passphrase: 011001"},
		"foreign":         {pass, `^recovery-passphrase`, "passphrase"},
		"no-slot":         {pass, `^recovery-slot: .*\n`, ""},
		"payload-section": {pass, `^recovery-passphrase`, "payload: passphrase\nrecovery-passphrase"},
	})
	for name, data := range map[string][]byte{"passphrase": pass, "volume-key": key} {
		out["sheet-ok-"+name] = vector{kind: "payload", expect: "ok", data: data}
	}
	return out
}

// certificateVectors: those that are changed have a MAC that fits again, so that
// not the MAC but the fault itself is what is found.
func certificateVectors() map[string]vector {
	o := standAlone(passphrasePayload())
	out := map[string]vector{}
	for _, name := range []string{"rsa", "p256", "x25519"} {
		out["certificate-ok-"+name] = vector{kind: "certificate", expect: "ok", open: name, data: must(SealCertificate(o, testHolder(name).certificate, now))}
	}
	rsa, p256 := out["certificate-ok-rsa"].data, out["certificate-ok-p256"].data
	for name, e := range map[string]struct {
		from                  []byte
		pattern, with, expect string
	}{
		"version-2":     {p256, `^(mandos-escrow-certificate-packet): 1`, "${1}: 2", "malformed"},
		"method":        {p256, `^key-method: .*$`, "key-method: ecdh", "malformed"},
		"no-method":     {p256, `^key-method: .*\n`, "", "malformed"},
		"no-wrapped":    {p256, `^wrapped-key: .*\n`, "", "malformed"},
		"key-short":     {p256, `^(key-sha256: .*)..$`, "${1}", "malformed"},
		"mac-short":     {p256, `^(mac: .*)..$`, "${1}", "malformed"},
		"no-mac":        {p256, `^mac: .*\n`, "", "malformed"},
		"trailing":      {p256, `\z`, "x: y\n", "malformed"},
		"uuid-missing":  {p256, `^volume-uuid: .*\n`, "", "malformed"},
		"key-other":     {p256, `^key-sha256: .*$`, "key-sha256: " + strings.Repeat("00", 32), "other key"},
		"method-other":  {p256, `^key-method: .*$`, "key-method: rsa-oaep-sha256", "other key"},
		"mac":           {p256, `^mac: .*$`, "mac: " + strings.Repeat("00", 32), "integrity"},
		"clear":         {p256, `^machine-name: a`, "machine-name: b", "integrity"},
		"once-no-key":   {p256, `^wrapped-key: .*$`, "wrapped-key: AAAA", "integrity"},
		"wrapped-other": {rsa, `^wrapped-key: .*$`, "wrapped-key: " + base64.StdEncoding.EncodeToString(make([]byte, 256)), "integrity"},
	} {
		key := "p256"
		if bytes.Equal(e.from, rsa) {
			key = "rsa"
		}
		out["certificate-"+name] = vector{kind: "certificate", expect: e.expect, open: key, data: edit(e.from, e.pattern, e.with)}
	}
	out["certificate-once-other-curve"] = vector{kind: "certificate", expect: "integrity", open: "p256", data: edit(p256, `^wrapped-key: .*$`,
		"wrapped-key: "+base64.StdEncoding.EncodeToString(must(x509.MarshalPKIXPublicKey(must(ecdh.X25519().GenerateKey(rand.Reader)).Public()))))}
	out["certificate-other-header"] = vector{kind: "certificate", expect: "integrity", open: "rsa", data: wrappedAnew(o.Plain, func(h *Header) { h.Volume.Label = "x" })}
	out["certificate-no-packet"] = vector{kind: "certificate", expect: "integrity", open: "rsa", data: wrappedAnew([]byte("hello\n"), func(*Header) {})}
	return out
}

// wrappedAnew is a packet with an honest MAC over a dishonest content.
func wrappedAnew(plain []byte, change func(*Header)) []byte {
	h := testHolder("rsa")
	spki := must(x509.MarshalPKIXPublicKey(publicKey(h.certificate)))
	sum := sha256.Sum256(spki)
	s := sealedCertificate{header: standAlone(passphrasePayload()).Header, certificate: sum[:], spki: sum[:]}
	change(&s.header)
	key := must(s.wrap(publicKey(h.certificate), spki))
	s.message = must(seal.EncryptKey(plain, key, now))
	s.signature = must(certificateMAC(must(s.encode()), key))
	return must(s.encode())
}

func lineVectors() map[string]vector {
	lines := Lines(message(91))
	text := func(change func(l []string) []string) []byte {
		return []byte(strings.Join(change(append([]string(nil), lines...)), "\n") + "\n")
	}
	out := map[string]vector{
		"ok":        {expect: "ok", data: text(func(l []string) []string { return l })},
		"ok-empty":  {expect: "ok", data: []byte(strings.Join(Lines(message(100)), "\n"))},
		"ok-order":  {expect: "ok", data: text(func(l []string) []string { return []string{l[3], l[1], l[0], l[2]} })},
		"ok-case":   {expect: "ok", data: text(func(l []string) []string { l[2] = strings.ToLower(l[2]); return l })},
		"ok-digits": {expect: "ok", data: text(func(l []string) []string { l[1] = l[1][:3] + confusedBack.Replace(l[1][3:]); return l })},
		"ok-code":   {expect: "ok", data: []byte(QRText(message(91)))},
		"ok-around": {expect: "ok", data: text(func(l []string) []string { return append([]string{"1. Start the machine"}, l...) })},
		"missing":   {expect: "line", data: text(func(l []string) []string { return append(l[:1], l[2:]...) })},
		"no-last":   {expect: "line", data: text(func(l []string) []string { return l[:3] })},
		"twice":     {expect: "line", data: text(func(l []string) []string { return append(l, l[2]) })},
		"character": {expect: "line", data: text(func(l []string) []string { l[1] = l[1][:4] + "2" + l[1][5:]; return l })},
		"number":    {expect: "line", data: text(func(l []string) []string { l[1] = "05" + l[1][2:]; return l })},
		"check":     {expect: "line", data: text(func(l []string) []string { l[3] = l[3][:len(l[3])-2] + "AA"; return l })},
		"cut-line":  {expect: "line", data: text(func(l []string) []string { l[0] = l[0][:30]; return l })},
		"no-line":   {expect: "line", data: []byte("nothing here\n")},
		"code-cut":  {expect: "line", data: []byte(QRText(message(91))[:145])},
		"too-short": {expect: "line", data: fmt.Appendf(nil, "01 ABC %s\n", checkOf(1, "ABC"))},
	}
	named := map[string]vector{}
	for name, v := range out {
		v.kind = "lines"
		named["lines-"+name] = v
	}
	return named
}

var confusedBack = strings.NewReplacer("O", "0", "I", "1", "B", "8")
