package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"mandos-escrow/internal/identity"
	"mandos-escrow/unlock"
)

// ErrUnreachable: no server answered; nothing was changed, or it is not known
// whether it was.
var ErrUnreachable = errors.New("server unreachable")

// ErrReply: a server answered what no server of ours does.
var ErrReply = errors.New("the reply is not understood")

// Client talks to one server: over TLS with pinned keys, or over the control
// socket, or to a handler in this process.
type Client struct {
	Name    string
	scheme  string
	http    *http.Client
	witness *Witness
}

const (
	dialTimeout  = 10 * time.Second
	replyTimeout = 2 * time.Minute
	maxReply     = 64 << 20
)

// noRedirect: a server that sends a caller elsewhere is not one of ours.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Dial makes a client for a server as somebody who holds key. Addresses are
// tried in order. No connection is made before the first call. A nil witness
// is for machines before they keep one and is never used for administrators.
func Dial(server unlock.Server, key *identity.Key, witness *Witness) (*Client, error) {
	config, err := key.ClientTLS(server.KeyID, Protocol)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		TLSClientConfig:     config,
		TLSHandshakeTimeout: dialTimeout,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var failures []error
			for _, address := range server.Addresses {
				conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
				if err == nil {
					return conn, nil
				}
				failures = append(failures, err)
			}
			return nil, errors.Join(failures...)
		},
		IdleConnTimeout: 10 * time.Second,
	}
	return &Client{server.Name, "https", &http.Client{Transport: transport, CheckRedirect: noRedirect, Timeout: replyTimeout}, witness}, nil
}

// DialControl makes a client for the control socket of a state folder.
func DialControl(socket string) *Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return DialUnix(ctx, socket)
		},
	}
	return &Client{"the running server", "http", &http.Client{Transport: transport}, nil}
}

// DialUnix connects to a unix socket however long its path is: sun_path has
// room for 108 bytes (unix(7)), /proc/self/fd/N/NAME always fits.
func DialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	short := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	return (&net.Dialer{}).DialContext(ctx, "unix", short)
}

// InProcess makes a client for a handler of this process.
func InProcess(handler http.Handler) *Client {
	return &Client{"this command", "http", &http.Client{Transport: inProcess{handler}}, nil}
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Call sends in (nil for none) and reads the reply into out (nil for none).
func (c *Client) Call(ctx context.Context, method, path string, in, out any) error {
	reply, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	body, err := io.ReadAll(io.LimitReader(reply.Body, maxReply+1))
	defer clear(body)
	switch {
	case err != nil:
		return fmt.Errorf("%s %s at %s: %w: %w", method, path, c.Name, ErrUnreachable, err)
	case len(body) > maxReply:
		return fmt.Errorf("%s %s at %s: %w: longer than %d bytes", method, path, c.Name, ErrReply, maxReply)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("%s %s at %s: %w: %w", method, path, c.Name, ErrReply, err)
	}
	return nil
}

// Stream copies the reply to w, as far as the size that stands before it.
func (c *Client) Stream(ctx context.Context, path string, w io.Writer) error {
	reply, err := c.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	size, err := strconv.ParseInt(reply.Header.Get(HeaderSize), 10, 64)
	if err != nil || size < 0 || c.scheme == "https" && size > maxReply { // a backup is fetched on the spot only
		return fmt.Errorf("GET %s at %s: %w: its size is %q", path, c.Name, ErrReply, reply.Header.Get(HeaderSize))
	}
	n, err := io.Copy(w, io.LimitReader(reply.Body, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("GET %s at %s: %w", path, c.Name, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, c.scheme+"://server"+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, path, err)
		}
		request.Body, request.ContentLength = &body{text: text}, int64(len(text))
	}
	var shown []byte
	if c.witness != nil {
		if shown, err = c.witness.show(request.Header); err != nil {
			return nil, errors.Join(err, request.Body.Close())
		}
	}
	reply, err := c.http.Do(request)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		if errors.Is(err, identity.ErrPin) {
			return nil, fmt.Errorf("%s: %w; somebody else answers at its address, or it was installed anew", c.Name, err)
		}
		return nil, fmt.Errorf("%s: %w: %w", c.Name, ErrUnreachable, err)
	}
	if c.witness != nil {
		if err := c.witness.see(reply, shown); err != nil {
			reply.Body.Close()
			return nil, fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	if reply.StatusCode != http.StatusOK {
		defer reply.Body.Close()
		return nil, refusal(reply)
	}
	return reply, nil
}

// body is a request's text, which may hold secrets: it is cleared when it is
// closed, which a transport may do after the reply has begun.
type body struct {
	mu   sync.Mutex
	text []byte
	next int
}

// Read copies what follows.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == len(b.text) {
		return 0, io.EOF
	}
	n := copy(p, b.text[b.next:])
	b.next += n
	return n, nil
}

// Close clears the text.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.text)
	b.next = len(b.text)
	return nil
}

func refusal(reply *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(reply.Body, 64<<10))
	e := &Error{}
	if err := json.Unmarshal(body, e); err != nil || e.Code == "" {
		return Errorf(CodeInternal, "the server answered with status %d", reply.StatusCode)
	}
	e.Message = harmless(e.Message)
	return e
}

// harmless escapes what could deceive on a terminal. Lines after the first are
// indented, so that none looks like one of the command's own.
func harmless(text string) string {
	var out strings.Builder
	for i, line := range strings.Split(text, "\n") {
		if i > 0 {
			out.WriteString("\n  ")
			line = strings.TrimLeft(line, " ")
		}
		for _, r := range line {
			if unicode.IsPrint(r) {
				out.WriteRune(r)
			} else {
				out.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
			}
		}
	}
	return out.String()
}
