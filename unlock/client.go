package unlock

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
)

// Delays between attempts at one server: each is random between half of a step
// and all of it; the steps are 2, 4, 8, 16 and then 30 seconds. News of the
// network ends a delay, but not within newsGap of the attempt that other news
// began: whoever is on the link can make news.
const (
	firstStep = 2 * time.Second
	lastStep  = 30 * time.Second
	newsGap   = time.Second
)

// Finder knows where servers say that they are; Browser is one.
type Finder interface {
	// Addresses returns where the server with this key may be (HOST:PORT),
	// likely ones first. Nothing is proved: whoever is on the link said so.
	Addresses(id identity.KeyID) []string

	// Changed returns a channel that is closed when Addresses next has one that
	// it did not have before, or a server is there again.
	Changed() <-chan struct{}
}

// Client asks a machine's servers for its passphrases.
type Client struct {
	Config  *Config
	Keys    Keys
	Volumes []string // UUIDs of the volumes that are wanted

	// Any: a passphrase of one volume is enough, and those of the others come along
	// if they can. Otherwise all or none are wanted.
	Any bool

	// First is an address (HOST:PORT) that is tried first for every server;
	// empty: none is.
	First string

	// Finder has addresses that are tried beside the configured ones, each as
	// soon as it is there; nil: there are none.
	Finder Finder

	// Links returns a channel that is closed when a link or an address of this
	// machine next comes up: servers that did not answer are asked again then.
	// nil: nobody says so.
	Links func() <-chan struct{}

	// Report is told of each failed attempt at a server; nil: nobody is. It is
	// called by one goroutine at a time.
	Report func(server Server, err error)

	// Dial replaces a net.Dialer's; nil: that is used.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Result has the passphrases by volume UUID, and the nonces of the releases
// that were used by server.
type Result struct {
	Passphrases map[string][]byte
	Nonces      map[identity.KeyID]string
}

// Wipe clears the passphrases.
func (r *Result) Wipe() {
	for _, p := range r.Passphrases {
		secret.Wipe(p)
	}
}

// Fetch asks all servers at once, each of them one time, and returns as soon
// as enough have released. The error is a FetchError or the context's.
func (c *Client) Fetch(ctx context.Context) (*Result, error) { return c.gather(ctx, true) }

// Run asks until enough servers have released, for ever. A server that has
// released is not asked again, as long as what it gave may still be of use.
// The error is the context's.
func (c *Client) Run(ctx context.Context) (*Result, error) {
	for n := 0; ; n++ {
		result, err := c.gather(ctx, false)
		if err == nil || ctx.Err() != nil {
			return result, err
		}
		if err := sleep(ctx, backoff(n)); err != nil {
			return nil, err
		}
	}
}

// outcome is one attempt at one server.
type outcome struct {
	server Server
	answer Answer
	blobs  []*blob
	err    error
}

func (c *Client) gather(ctx context.Context, once bool) (*Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	outcomes := make(chan outcome)
	attempt := secret.ID()
	for _, s := range c.Config.Servers {
		go c.pursue(ctx, s, attempt, once, outcomes)
	}
	t := &tally{client: c, once: once, nonces: map[identity.KeyID]string{}, failed: map[identity.KeyID]error{}}
	defer t.wipe()
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case o := <-outcomes:
			if result, err := t.add(o); result != nil || err != nil {
				return result, err
			}
		}
	}
}

// pursue asks one server until it gives a good answer, or once.
func (c *Client) pursue(ctx context.Context, s Server, attempt string, once bool, outcomes chan<- outcome) {
	var hurried time.Time // when news last began an attempt
	for n := 0; ; n++ {
		heard := c.news()
		o := c.try(ctx, s, attempt)
		select {
		case outcomes <- o:
		case <-ctx.Done():
			wipeBlobs(o.blobs)
			return
		}
		if once || o.err == nil {
			return
		}
		fresh, err := heard.pause(ctx, backoff(n), hurried.Add(newsGap))
		if err != nil {
			return
		}
		if fresh {
			n, hurried = -1, time.Now()
		}
	}
}

// try makes one attempt. A good answer has a good blob for each wanted volume,
// or for any.
func (c *Client) try(ctx context.Context, s Server, attempt string) outcome {
	answer, err := c.ask(ctx, s, attempt)
	if err != nil {
		return outcome{server: s, err: err}
	}
	blobs, err := answer.open(c.Config.Machine, c.Keys.OpenPGP)
	missing := slices.DeleteFunc(slices.Clone(c.Volumes), func(v string) bool {
		return slices.ContainsFunc(blobs, func(b *blob) bool { return b.volume == v })
	})
	if len(missing) == 0 || c.Any && len(missing) < len(c.Volumes) {
		return outcome{server: s, answer: answer, blobs: blobs}
	}
	wipeBlobs(blobs)
	if err == nil {
		err = fmt.Errorf("%w: server %s has none of volume %s", ErrBlob, s.KeyID.Short(), missing[0])
	}
	return outcome{server: s, err: err}
}

func backoff(n int) time.Duration {
	step := min(firstStep<<min(n, 10), lastStep)
	return step/2 + rand.N(step/2)
}

// news are the two channels that say that another attempt may succeed now. They
// are got before an attempt, so that what comes during it is not missed.
type news struct{ found, links <-chan struct{} }

func (c *Client) news() news {
	var n news
	if c.Finder != nil {
		n.found = c.Finder.Changed()
	}
	if c.Links != nil {
		n.links = c.Links()
	}
	return n
}

// pause waits for d, or less when there is news: it is then over at once, but
// never before a time. fresh says that it was news.
func (n news) pause(ctx context.Context, d time.Duration, notBefore time.Time) (fresh bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-n.found:
	case <-n.links:
	case <-timer.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
	return true, sleep(ctx, time.Until(notBefore))
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
