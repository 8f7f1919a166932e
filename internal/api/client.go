package api

import (
	"bytes"
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
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/unlock"
)

// ErrUnreachable: no server answered; nothing was changed, or it is not known
// whether it was.
var ErrUnreachable = errors.New("server unreachable")

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
)

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
	return &Client{server.Name, "https", &http.Client{Transport: transport, Timeout: replyTimeout}, witness}, nil
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
	body, err := io.ReadAll(io.LimitReader(reply.Body, 64<<20))
	defer clear(body)
	if err != nil {
		return fmt.Errorf("%s %s at %s: %w: %w", method, path, c.Name, ErrUnreachable, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("%s %s at %s: reply is not understood: %w", method, path, c.Name, err)
	}
	return nil
}

// Stream copies the reply to w.
func (c *Client) Stream(ctx context.Context, path string, w io.Writer) error {
	reply, err := c.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	n, err := io.Copy(w, reply.Body)
	if err == nil && reply.Header.Get("Mandos-Escrow-Size") != strconv.FormatInt(n, 10) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("GET %s at %s: %w", path, c.Name, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader = http.NoBody
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, path, err)
		}
		defer clear(text)
		body = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.scheme+"://server"+path, body)
	if err != nil {
		return nil, err
	}
	var shown []byte
	if c.witness != nil {
		shown = c.witness.show(request.Header)
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

func refusal(reply *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(reply.Body, 64<<10))
	e := &Error{}
	if err := json.Unmarshal(body, e); err != nil || e.Code == "" {
		return Errorf(CodeInternal, "the server answered %s", reply.Status)
	}
	return e
}
