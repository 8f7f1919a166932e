package testvm

import (
	"bytes"
	"strings"
	"sync"
)

// fatal are the texts after which a machine gets no further: qemu then halts
// the guest without ending.
var fatal = []string{"Kernel panic - not syncing", "emulation failure"}

// Console keeps all that a machine wrote to its serial line, and qemu's own
// messages. The zero value is ready to use, by several goroutines.
type Console struct {
	mu     sync.Mutex
	text   bytes.Buffer
	signal chan struct{} // closed at the next write; nil when nobody waits
}

// Write takes output of the machine.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.signal != nil {
		close(c.signal)
		c.signal = nil
	}
	return c.text.Write(p)
}

// String returns all output so far, with the serial line's carriage returns
// taken out.
func (c *Console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ReplaceAll(c.text.String(), "\r", "")
}

// Contains reports whether text has been written.
func (c *Console) Contains(text string) bool {
	return strings.Contains(c.String(), text)
}

// Tail returns the last n lines.
func (c *Console) Tail(n int) string {
	lines := strings.SplitAfter(c.String(), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// changed returns a channel that is closed by the next write.
func (c *Console) changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.signal == nil {
		c.signal = make(chan struct{})
	}
	return c.signal
}

// broken reports whether the machine can get no further.
func (c *Console) broken() bool {
	text := c.String()
	for _, sign := range fatal {
		if strings.Contains(text, sign) {
			return true
		}
	}
	return false
}
