package initrd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// interval is how often questions and mappings are looked for.
const interval = 100 * time.Millisecond

// retryRead is how long a device that cannot be read is left alone.
const retryRead = time.Second

// Options are what a caller of Run decides.
type Options struct {
	Config string                                // folder of the configuration
	Say    func(format string, a ...any)         // one line for the console
	Failed func(server unlock.Server, err error) // what a server did instead of releasing

	// Tests put others in the places of these; zero: the real ones.
	root    root
	bringUp func(context.Context, NetworkOptions) network
	finder  unlock.Finder
}

// network is a Network.
type network interface {
	Changed() <-chan struct{}
	Stop(ctx context.Context) error
}

func (o Options) where() root { return cmp.Or(o.root, "/") }

// cmdline reads the kernel command line, and says what is wrong with it.
func (o Options) cmdline() Cmdline {
	text, err := os.ReadFile(o.where().path("proc/cmdline"))
	if err != nil {
		o.Say("kernel command line: %v", err)
	}
	line, err := ParseCmdline(string(text))
	if err != nil {
		o.Say("kernel command line: %s", printable(err.Error(), 600))
	}
	return line
}

// stopTime is how long the network may take to be put back; the image's scripts
// wait 5 s.
const stopTime = 4500 * time.Millisecond

// Run answers questions for enrolled volumes until all of them are mapped, or
// the context ends, which is no error. With mandos-escrow=off on the kernel
// command line it does nothing. Errors are those of Load: there was nothing to
// run with.
func Run(ctx context.Context, o Options) error {
	line := o.cmdline()
	if line.Off {
		o.Say("off, says the kernel command line")
		return nil
	}
	folder, err := openRunFolder(o.where())
	if err != nil {
		o.Say("nothing is reported of this boot: %v", err)
	}
	config, keys, err := Load(o.Config)
	if err != nil {
		if failed := folder.report(err.Error(), nil); failed != nil {
			o.Say("%v", failed)
		}
		return err
	}
	b := newBoot(config.Volumes, o)
	b.folder = folder
	if b.notice(); b.done() {
		b.write()
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	up := o.network(ctx, line)
	defer o.takeDown(up)
	finder := o.browse(ctx, up, config)
	b.fetch = func(ctx context.Context, volumes []string) (*unlock.Result, error) {
		client := &unlock.Client{
			Config: config, Keys: keys, Volumes: volumes, Any: true, Report: b.failed,
			First: line.Connect, Links: up.Changed, Finder: finder,
		}
		return client.Run(ctx)
	}
	b.watch(ctx)
	b.run(ctx)
	return nil
}

func (o Options) network(ctx context.Context, line Cmdline) network {
	options := NetworkOptions{
		Words: line.Words, File: filepath.Join(o.Config, NetworkFile), Hooks: filepath.Join(o.Config, HooksFolder),
		Connect: line.Connect, Report: o.Say,
	}
	if o.bringUp != nil {
		return o.bringUp(ctx, options)
	}
	return StartNetwork(ctx, options)
}

// browse looks for servers on every link.
func (o Options) browse(ctx context.Context, n network, config *unlock.Config) unlock.Finder {
	var servers []identity.KeyID
	for _, s := range config.Servers {
		servers = append(servers, s.KeyID)
	}
	if o.finder != nil {
		return o.finder
	}
	return unlock.Browse(ctx, n.Changed, servers)
}

func (o Options) takeDown(n network) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		o.Say("%s", printable(err.Error(), 600))
	}
}

// What an administrator may put beside the configuration.
const (
	NetworkFile = "network"         // words as on the kernel command line
	HooksFolder = "network-hooks.d" // programs that bring up what the kernel cannot alone
)

// Load reads a configuration folder. Errors are unlock.ErrConfig, or why a file
// cannot be read.
func Load(dir string) (*unlock.Config, unlock.Keys, error) {
	config, err := LoadConfig(dir)
	if err != nil {
		return nil, unlock.Keys{}, err
	}
	var files [2][]byte
	for i, name := range []string{unlock.TLSPrivateKeyFile, unlock.PrivateKeyFile} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, unlock.Keys{}, fmt.Errorf("read configuration: %w", err)
		}
		defer secret.Wipe(data)
		files[i] = data
	}
	keys, err := config.ParseKeys(files[0], files[1])
	if err != nil {
		return nil, unlock.Keys{}, fmt.Errorf("%s: %w", dir, err)
	}
	return config, keys, nil
}

// LoadConfig is Load for who needs no keys.
func LoadConfig(dir string) (*unlock.Config, error) {
	path := filepath.Join(dir, unlock.ConfigFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	config, err := unlock.ParseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return config, nil
}

// Brief is a server's failure in a few words, without what differs from one
// attempt to the next, such as local port numbers.
func Brief(err error) string {
	var op *net.OpError
	switch {
	case errors.Is(err, unlock.ErrRefused):
		return "refused"
	case errors.As(err, &op) && op.Addr != nil:
		return op.Op + " " + op.Addr.String() + ": " + op.Err.Error()
	}
	return err.Error()
}

// boot is one boot. Everything but failed runs in the goroutine of run.
type boot struct {
	volumes []*volume
	judged  map[string]*verdict // by question
	sources []source
	changed <-chan struct{} // questions may have changed; nil: never said
	devices devices
	mapped  func() ([]mapping, error)
	folder  runFolder
	say     func(format string, a ...any)

	fetch   func(ctx context.Context, volumes []string) (*unlock.Result, error)
	stop    context.CancelFunc // of the fetch that runs; nil: none does
	fetched chan *unlock.Result

	mu       sync.Mutex
	failures map[identity.KeyID]string // the last of each server
	tell     func(unlock.Server, error)
}

// volume is an enrolled volume in this boot.
type volume struct {
	unlock.Volume
	passphrase []byte // until it is of no more use
	asked      bool   // somebody asked for it
	answered   string // the question whose asker took our answer
	mapped     bool
	report     VolumeReport
}

// verdict is what is known of a question.
type verdict struct {
	volume *volume   // nil: not ours to answer
	again  time.Time // the device could not be read: when to try again
}

func newBoot(enrolled []unlock.Volume, o Options) *boot {
	r := o.where()
	b := &boot{
		judged: map[string]*verdict{}, devices: r.devices(), say: o.Say, tell: o.Failed,
		mapped:  func() ([]mapping, error) { return mappings(r) },
		fetched: make(chan *unlock.Result), failures: map[identity.KeyID]string{},
	}
	for _, v := range enrolled {
		report := VolumeReport{VolumeBoot: unlock.VolumeBoot{UUID: v.UUID, Outcome: unlock.Unanswered, Reason: "nobody asked for it"}}
		b.volumes = append(b.volumes, &volume{Volume: v, report: report})
	}
	b.sources = []source{
		askpass{proc: r.path("proc"), program: r.path("lib/cryptsetup/askpass"), fifo: r.path("lib/cryptsetup/passfifo")},
		&agent{dir: r.path("run/systemd/ask-password"), proc: r.path("proc"), now: monotonic},
	}
	return b
}

// watch has the agent wake run at once.
func (b *boot) watch(ctx context.Context) {
	for _, s := range b.sources {
		if a, ok := s.(*agent); ok {
			changed, err := a.watch(ctx)
			if err != nil {
				b.say("questions are found later than they could be: %v", err)
			}
			b.changed = changed
		}
	}
}

// missing are the UUIDs of the volumes whose passphrases are of use and not here.
func (b *boot) missing() []string {
	var list []string
	for _, v := range b.volumes {
		if v.passphrase == nil && !v.mapped && v.answered == "" {
			list = append(list, v.UUID)
		}
	}
	return list
}

// run ends when all volumes are mapped, or the context ends.
func (b *boot) run(ctx context.Context) {
	defer b.wipe()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	b.write()
	for !b.step(ctx) {
		select {
		case result := <-b.fetched:
			b.keep(result)
		case <-b.changed:
		case <-ticker.C:
		case <-ctx.Done():
			b.notice() // what was mapped since
			b.explain()
			b.write()
			return
		}
	}
}

func (b *boot) wipe() {
	b.cancel()
	for _, v := range b.volumes {
		v.wipe()
	}
}

func (v *volume) wipe() {
	secret.Wipe(v.passphrase)
	v.passphrase = nil
}

// step looks once at everything, and says whether all is done.
func (b *boot) step(ctx context.Context) (done bool) {
	b.notice()
	var open []question
	for _, s := range b.sources {
		open = append(open, s.pending()...)
	}
	maps.DeleteFunc(b.judged, func(id string, _ *verdict) bool {
		return !slices.ContainsFunc(open, func(q question) bool { return q.id == id })
	})
	for _, q := range open {
		b.consider(ctx, q)
	}
	if !slices.ContainsFunc(b.volumes, (*volume).wanted) {
		b.cancel()
	}
	return b.done()
}

func (b *boot) done() bool {
	return !slices.ContainsFunc(b.volumes, func(v *volume) bool { return !v.mapped })
}

// wanted tells whether a server's answer is still of use: somebody asked, and
// has nothing yet.
func (v *volume) wanted() bool { return v.asked && !v.mapped && v.answered == "" }

// consider does with a question what can be done now.
func (b *boot) consider(ctx context.Context, q question) {
	known := b.judge(q)
	v := known.volume
	if v == nil || v.mapped || v.report.Outcome == unlock.Rejected || v.answered == q.id {
		return
	}
	if v.answered != "" {
		b.reject(v)
		return
	}
	if !v.asked {
		v.asked = true
		b.outcome(v, unlock.Unanswered, "no server released yet")
	}
	if v.passphrase == nil {
		b.start(ctx)
		return
	}
	if _, err := compare(b.devices.resolve(q.device), v.Volume); err != nil {
		known.volume = nil
		b.refuse(known, v, q, err)
		return
	}
	b.answer(known, v, q)
}

// judge finds out, once for each question, whether it is ours to answer. A
// device that cannot be read is tried again.
func (b *boot) judge(q question) *verdict {
	known, ok := b.judged[q.id]
	if ok && (known.again.IsZero() || time.Now().Before(known.again)) {
		return known
	}
	if !ok {
		known = &verdict{}
		b.judged[q.id] = known
	}
	known.again = time.Time{}
	enrolled := make([]unlock.Volume, 0, len(b.volumes))
	for _, v := range b.volumes {
		enrolled = append(enrolled, v.Volume)
	}
	found, err := b.devices.identify(q.device, enrolled)
	var v *volume
	if found != nil {
		v = b.volumes[slices.IndexFunc(b.volumes, func(v *volume) bool { return v.UUID == found.UUID })]
	}
	if err != nil {
		b.refuse(known, v, q, err)
		return known
	}
	known.volume = v
	return known
}

// refuse leaves a question to the prompt: for good when the device is not the
// volume that was enrolled, else for a while. v may be nil.
func (b *boot) refuse(known *verdict, v *volume, q question, err error) {
	if v == nil || !errors.Is(err, ErrMismatch) {
		known.again = time.Now().Add(retryRead)
		return
	}
	reason := printable(err.Error(), unlock.MaxReason)
	b.say("NOT ANSWERED: %s asks for volume %s, but %s", printable(q.device, 200), v.UUID, reason)
	b.outcome(v, unlock.Mismatched, reason)
}

func (b *boot) answer(known *verdict, v *volume, q question) {
	switch err := q.answer(v.passphrase); {
	case err == nil:
		v.answered = q.id
		b.say("volume %s: passphrase handed over", v.UUID)
		b.outcome(v, unlock.Unanswered, "the passphrase was handed over, and the volume is not open yet")
	case errors.Is(err, errGone), errors.Is(err, errBusy):
	default:
		known.volume = nil
		b.say("volume %s: %s", v.UUID, printable(err.Error(), unlock.MaxReason))
	}
}

// reject: who took our answer asks again.
func (b *boot) reject(v *volume) {
	v.wipe()
	const reason = "its keyslot does not take the boot passphrase any more; mandos-escrow enroll on the machine makes a new one"
	b.say("volume %s: %s", v.UUID, reason)
	b.outcome(v, unlock.Rejected, reason)
}

// notice finds volumes that are mapped now, whoever opened them.
func (b *boot) notice() {
	mapped, err := b.mapped()
	if err != nil {
		return
	}
	for _, v := range b.volumes {
		if v.mapped || !slices.ContainsFunc(mapped, func(m mapping) bool { return m.of(v.UUID) }) {
			continue
		}
		v.mapped = true
		v.wipe()
		if v.answered != "" {
			b.outcome(v, unlock.Opened, "")
		} else {
			b.outcome(v, unlock.Answered, b.lastFailures())
		}
	}
}

// outcome changes a volume's report, but never takes back what an administrator
// must know.
func (b *boot) outcome(v *volume, o unlock.Outcome, reason string) {
	was := v.report.Outcome
	if was == unlock.Rejected || was == unlock.Mismatched && o != unlock.Rejected {
		return
	}
	v.report.Outcome, v.report.Reason, v.report.Uptime = o, reason, uptime()
	b.write()
}

// explain says of volumes that stay closed what the servers did.
func (b *boot) explain() {
	for _, v := range b.volumes {
		if v.report.Outcome == unlock.Unanswered && v.asked && v.answered == "" {
			b.outcome(v, unlock.Unanswered, cmp.Or(b.lastFailures(), v.report.Reason))
		}
	}
}

func (b *boot) write() {
	var volumes []VolumeReport
	for _, v := range b.volumes {
		volumes = append(volumes, v.report)
	}
	if err := b.folder.report("", volumes); err != nil {
		b.say("%v", err)
	}
}

// start asks the servers, unless that is under way, for all that is missing. One
// that has no blob of a volume holds up no other: what came is kept, and the rest
// is asked for again.
func (b *boot) start(ctx context.Context) {
	if b.stop != nil {
		return
	}
	ctx, b.stop = context.WithCancel(ctx)
	volumes := b.missing()
	go func() {
		result, err := b.fetch(ctx, volumes)
		if err != nil {
			result = nil // the context's end
		}
		select {
		case b.fetched <- result:
		case <-ctx.Done():
			if result != nil {
				result.Wipe()
			}
		}
	}()
}

func (b *boot) cancel() {
	if b.stop != nil {
		b.stop()
		b.stop = nil
	}
}

// keep takes what the servers released.
func (b *boot) keep(result *unlock.Result) {
	b.cancel()
	if result == nil {
		return
	}
	for _, v := range b.volumes {
		passphrase := result.Passphrases[v.UUID]
		switch {
		case passphrase == nil:
		case v.mapped || v.answered != "":
			secret.Wipe(passphrase)
		default:
			v.passphrase = passphrase
		}
	}
	if err := b.folder.release(result.Nonces); err != nil {
		b.say("%v", err)
	}
}

// failed hears of each failed attempt at a server, from the goroutine that
// asks; the one before may not have ended yet.
func (b *boot) failed(s unlock.Server, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures[s.KeyID] = s.Name + ": " + Brief(err)
	b.tell(s, err)
}

// lastFailures says in one line what each server did last instead of releasing.
func (b *boot) lastFailures() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var texts []string
	for _, id := range slices.Sorted(maps.Keys(b.failures)) {
		texts = append(texts, b.failures[id])
	}
	return printable(strings.Join(texts, "; "), unlock.MaxReason)
}
