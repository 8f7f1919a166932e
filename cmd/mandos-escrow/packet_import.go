package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
)

type importOptions struct {
	openOptions
	device, out       string
	outPassphraseFile string
	threshold         int
}

func newPacketImport(g *globals) *cobra.Command {
	o := importOptions{openOptions: packetPassphrase()}
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "take over a packet in a file, whoever made it",
		Long: `Takes FILE over to the servers that --home knows, as an administrator:

  a packet sealed to trustees (volume save --token-file) is uploaded as it is;
  any other is opened on this machine and sealed anew to the trustees of the
  policy that the home has pinned: one of volume_key, and so of Anaconda
  (--escrowcert, --backuppassphrase); of "volume save"; an off-line packet; a
  printed sheet, as typed lines or as a scanner's text.

With --device the packet's secrets are first proved on the volume; without, the
packet stays "pending", because nobody knows yet whether it opens anything. It
never replaces what a machine itself escrowed. The same FILE again is the same
packet, unless a proof completes it from the volume's header: then both are there.

With several servers, --threshold says how many of them must agree before the
packet opens. With --out nothing is uploaded: a packet under a new packet
passphrase is written, which "volume restore" and "gpg -d" read.`,
		Example: `  mandos-escrow --home adam packet import laptop7-escrow --key escrow-key.pem --device /dev/sda3
  mandos-escrow packet import sheet.txt --packet-passphrase-file P --out laptop7.asc --new-packet-passphrase-file Q`,
		Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runImport(cmd.Context(), g, o, args[0]) },
	}
	withOpen(cmd, &o.openOptions)
	f := cmd.Flags()
	f.StringVar(&o.device, "device", "", "the LUKS volume to prove the packet's secrets on; for a volume key also a file that cryptsetup luksHeaderBackup wrote")
	f.IntVar(&o.threshold, "threshold", 0, "how many trustees of several servers must agree")
	f.StringVar(&o.out, "out", "", "write a packet under a packet passphrase to this file, and upload nothing")
	f.StringVar(&o.outPassphraseFile, "new-packet-passphrase-file", "", "with --out: file with the packet passphrase that it gets (asked for otherwise)")
	return g.withState(g.withJSON(cmd), "")
}

// imported is what an import did.
type imported struct {
	Packet          string        `json:"packet"`
	Volume          escrow.Volume `json:"volume"`
	Sealing         string        `json:"sealing"` // of FILE
	Proved          bool          `json:"proved"`
	Unauthenticated []string      `json:"unauthenticated"`
	File            string        `json:"file,omitempty"`
	Servers         []string      `json:"servers,omitempty"`
}

func runImport(ctx context.Context, g *globals, o importOptions, path string) error {
	if o.out == "" && o.outPassphraseFile != "" {
		return usage("--new-packet-passphrase-file is for --out")
	}
	data, err := config.ReadInput(path, g.in, nil)
	if err != nil {
		return err
	}
	defer secret.Wipe(data)
	sealing := escrow.SealingOf(data)
	asItIs := sealing == escrow.ByTrustees && o.out == ""
	if asItIs && o.device != "" && len(o.keys) == 0 {
		return usage("to prove a packet on --device it must be opened: give --key with the keys of its trustees, or leave --device out")
	}
	if o.out != "" {
		return importToFile(ctx, g, o, path, data)
	}
	c, err := g.connectAll(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	if asItIs {
		return importAsItIs(ctx, g, c, o, path, data)
	}
	policy, keys, err := c.trustees(ctx, o.threshold)
	if err != nil {
		return err
	}
	src, err := o.openProved(ctx, g, path, data)
	if err != nil {
		return err
	}
	defer src.Wipe()
	packet, err := src.sealAnew(c[0], policy, keys, data)
	if err != nil {
		return err
	}
	return src.upload(ctx, g, c, packet)
}

// source is an opened packet on its way to a server or a file.
type source struct {
	*openedFile
	proved    bool
	completed bool // from the volume's header, with what the packet did not say
}

// openProved opens a packet and proves it, if there is a volume to prove it on.
func (o importOptions) openProved(ctx context.Context, g *globals, path string, data []byte) (*source, error) {
	opened, err := openData(g, o.openOptions, path, data)
	if err != nil {
		return nil, err
	}
	src := &source{openedFile: opened}
	if o.device == "" {
		return src, nil
	}
	if err := src.prove(ctx, g, o.device); err != nil {
		src.Wipe()
		return nil, err
	}
	return src, nil
}

// prove checks each secret against the volume: the key by its digest, a
// passphrase by opening a keyslot. What the packet did not know of the volume,
// and its header knows, it knows afterwards.
func (s *source) prove(ctx context.Context, g *globals, device string) error {
	header, err := luks.ReadHeaderFile(device)
	if err != nil {
		return err
	}
	if err := sameVolume(s.Opened, header, device); err != nil {
		return err
	}
	if header.Alone && s.Passphrase != nil {
		return usage("%s is a header without its data: a passphrase is proved on the volume itself", device)
	}
	if p := s.VolumeKey; p != nil {
		if err := proveKey(p, header, device); err != nil {
			return s.doubt(err)
		}
		if err := s.complete(g, header, device); err != nil {
			return err
		}
	}
	if p := s.Passphrase; p != nil {
		opens, err := provePassphrase(ctx, p, header, device)
		if err != nil {
			return s.doubt(err)
		}
		s.completed = s.completed || p.Slot != opens || p.LUKSType != header.Type
		p.Slot, p.LUKSType = opens, header.Type
	}
	s.proved = true
	return nil
}

// complete gives a volume key what its packet did not say of the volume.
func (s *source) complete(g *globals, header *luks.Header, device string) error {
	p := s.VolumeKey
	if p.DataOffset == escrow.NoOffset || p.DigestHash == "" || len(p.HeaderBackup) == 0 {
		known := volumeKeyPayload(header, p.Key)
		known.Fingerprint = p.Fingerprint
		p.Wipe()
		s.VolumeKey, s.completed = known, true
	}
	if len(s.VolumeKey.Fingerprint) != 0 {
		return nil
	}
	if err := addFingerprint(g, s.VolumeKey, header, device); err != nil {
		return fmt.Errorf("%s: look at the data: %w", device, err)
	}
	s.completed = s.completed || len(s.VolumeKey.Fingerprint) != 0
	return nil
}

func (s *source) payloads() []escrow.Payload {
	var all []escrow.Payload
	if s.Passphrase != nil {
		all = append(all, s.Passphrase)
	}
	if s.VolumeKey != nil {
		all = append(all, s.VolumeKey)
	}
	return all
}

// header is what the new packet says in clear. It supersedes nothing: what it
// would replace is the machine's, or another import.
func (s *source) header(id string, now time.Time) escrow.Header {
	return escrow.Header{ID: id, Created: now, Machine: s.Header.Machine, Volume: s.Header.Volume}
}

// importID makes the packet of a file the same one whenever this home imports the
// same secrets under this policy, and another one when a proof completed it: what
// was proved is never said of other bytes. The signature is a keyed digest: who has
// not the home's key learns nothing of the secrets from it.
func (s *source) importID(home *identity.Key, policy escrow.Policy, data []byte, completed bool) string {
	what := sha256.Sum256(s.Plain)
	if s.sealing == escrow.ByVolumeKey { // its plaintext here has an id of this moment
		what = sha256.Sum256(data)
	}
	digest := policy.Digest()
	text := append(digest[:], what[:]...)
	if completed {
		text = append(text, "completed"...)
	}
	sum := sha256.Sum256(home.Sign("import", text))
	return hex.EncodeToString(sum[:16])
}

// sealAnew seals to the trustees. What this home sealed before of the same file it
// takes again, so that all servers have the same bytes, and again after one of them
// was down.
func (s *source) sealAnew(at *session, policy escrow.Policy, keys []*seal.PublicKey, data []byte) ([]byte, error) {
	now := time.Now()
	if at.key == nil { // on the server itself
		return sealToTrustees(s.header(secret.ID(), now), policy, keys, s.payloads(), now)
	}
	id := s.importID(at.key, policy, data, s.completed)
	for _, id := range []string{s.importID(at.key, policy, data, true), id} { // the completed one knows more
		kept, err := at.home.Import(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		packet, err := escrow.Parse(kept)
		if err == nil {
			err = packet.CheckPolicy(policy)
		}
		return kept, err
	}
	packet, err := sealToTrustees(s.header(id, now), policy, keys, s.payloads(), now)
	if err != nil {
		return nil, err
	}
	return packet, at.home.KeepImport(id, packet)
}

func importAsItIs(ctx context.Context, g *globals, c circle, o importOptions, path string, data []byte) error {
	packet, err := escrow.Parse(data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	src := &source{openedFile: &openedFile{Opened: &escrow.Opened{Header: packet.Header}, sealing: escrow.ByTrustees, unproved: []string{}}}
	if o.device != "" {
		if src, err = o.openProved(ctx, g, path, data); err != nil {
			return err
		}
	}
	defer src.Wipe()
	return src.upload(ctx, g, c, data)
}

// upload sends a packet to all servers.
func (s *source) upload(ctx context.Context, g *globals, c circle, data []byte) error {
	packet, err := escrow.Parse(data)
	if err != nil {
		return err
	}
	answers := callAll[api.Packet](ctx, c, "POST", "/v1/packets", api.Import{Packet: data, Proved: s.proved})
	done, err := everywhere(answers)
	if err != nil {
		if len(done) > 0 {
			err = fmt.Errorf("%w; run the same command again when they answer", err)
		}
		return err
	}
	out := imported{Packet: packet.ID, Volume: packet.Volume, Sealing: string(s.sealing), Proved: s.proved, Unauthenticated: s.unproved}
	for _, a := range done {
		out.Servers = append(out.Servers, a.Name)
	}
	return s.report(g, out, namesOf(done))
}

func (s *source) report(g *globals, out imported, where string) error {
	if g.json {
		return g.printJSON(out)
	}
	if out.Proved {
		where += "; proved on the volume"
	}
	fmt.Fprintf(g.out, "packet %s of volume %s: %s\n", out.Packet, safe(out.Volume.UUID), where)
	if !out.Proved {
		g.say("not proved: nobody knows yet whether it opens the volume; run the command again with --device DEV where the volume is")
	}
	return nil
}

func importToFile(ctx context.Context, g *globals, o importOptions, path string, data []byte) error {
	if o.out == "-" {
		return usage("--out - is not possible here: name a file")
	}
	target, err := config.NewOutput(o.out)
	if err != nil {
		return err
	}
	defer target.Discard()
	src, err := o.openProved(ctx, g, path, data)
	if err != nil {
		return err
	}
	defer src.Wipe()
	passphrase, err := g.newSecret(o.outPassphraseFile, "--new-packet-passphrase-file", "New packet passphrase: ")
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	now := time.Now()
	alone, err := escrow.NewStandAlone(src.header(src.Header.ID, now), src.payloads()...)
	if err != nil {
		return err
	}
	defer secret.Wipe(alone.Plain)
	text, err := escrow.SealOffline(alone, passphrase, now)
	if err != nil {
		return err
	}
	if _, err := target.Write(text); err != nil {
		return fmt.Errorf("write %s: %w", o.out, err)
	}
	if err := target.Commit(); err != nil {
		return err
	}
	out := imported{Packet: alone.Header.ID, Volume: alone.Header.Volume, Sealing: string(src.sealing), Proved: src.proved, Unauthenticated: src.unproved, File: o.out}
	return src.report(g, out, o.out)
}

// trustees are those that an import is sealed to: those of the pinned policy; of
// several servers, those of all their policies, of which threshold must agree, as
// `token merge` makes them.
func (c circle) trustees(ctx context.Context, threshold int) (escrow.Policy, []*seal.PublicKey, error) {
	answers := askAll(c, func(s *session) (pinnedPolicy, error) { return s.pinned(ctx) })
	for _, a := range answers {
		if a.err != nil {
			return escrow.Policy{}, nil, a.fault() // all of them must be able to take it
		}
	}
	first := answers[0].value
	same := !slices.ContainsFunc(answers, func(a answer[pinnedPolicy]) bool { return a.value.policy.Digest() != first.policy.Digest() })
	switch {
	case same && threshold != 0 && threshold != first.policy.Threshold:
		return escrow.Policy{}, nil, usage("the policy wants %d trustees to agree, and --threshold says %d", first.policy.Threshold, threshold)
	case same:
		return first.policy, first.keys, nil
	case threshold == 0:
		return escrow.Policy{}, nil, usage("the home is known to %d servers with trustees of their own: say with --threshold how many must agree, as for `token merge`, or name one with --server", len(c))
	}
	var list []escrow.Trustee
	var keys []*seal.PublicKey
	for _, a := range answers {
		if own := a.value.policy; threshold > 1 && len(own.Trustees) > 1 || threshold < own.Threshold {
			return escrow.Policy{}, nil, fmt.Errorf("%w: %s has %d trustees, of which %d must agree: with several servers each has one; name one with --server", escrow.ErrPolicy, safe(a.Name), len(own.Trustees), own.Threshold)
		}
		list, keys = append(list, a.value.policy.Trustees...), append(keys, a.value.keys...)
	}
	policy, err := escrow.NewPolicy(1, threshold, nil, list)
	return policy, keys, err
}

type pinnedPolicy struct {
	policy escrow.Policy
	keys   []*seal.PublicKey
}

// pinned is the policy that the home has pinned, and the public keys of its
// trustees, which the server may not choose.
func (s *session) pinned(ctx context.Context) (p pinnedPolicy, err error) {
	var said api.Policy
	if err := s.Call(ctx, "GET", "/v1/policy", nil, &said); err != nil {
		return p, err
	}
	if p.policy, err = escrow.ParsePolicy([]byte(said.Policy)); err != nil {
		return p, err
	}
	if s.key != nil && p.policy.Digest() != s.membership.Policy.Digest() {
		return p, fmt.Errorf("%w: %s shows another policy", errForeign, safe(s.Name))
	}
	for _, text := range said.Keys {
		key, err := seal.ParsePublic([]byte(text))
		if err != nil {
			return p, err
		}
		if _, found := p.policy.Trustee(key.Fingerprint()); !found {
			return p, fmt.Errorf("%w: key %s is no trustee's of %s", errForeign, key.Fingerprint(), safe(s.Name))
		}
		p.keys = append(p.keys, key)
	}
	return p, nil
}
