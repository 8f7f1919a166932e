package store

import "sync"

// watches holds one channel for each key that somebody has asked about since
// it last changed; it starts no goroutine.
type watches struct {
	mu       sync.Mutex
	channels map[string]chan struct{}
}

// Watch returns a channel that is closed after the next committed change of
// the machine (its key ID) or the request (its ID) of that name, and when the
// store is closed. To miss nothing: first Watch, then read, then wait.
func (s *Store) Watch(key string) <-chan struct{} {
	w := &s.watches
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.channels == nil {
		w.channels = make(map[string]chan struct{})
	}
	if w.channels[key] == nil {
		w.channels[key] = make(chan struct{})
	}
	return w.channels[key]
}

func (w *watches) wake(keys []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, key := range keys {
		if channel, ok := w.channels[key]; ok {
			close(channel)
			delete(w.channels, key)
		}
	}
}

func (w *watches) wakeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, channel := range w.channels {
		close(channel)
	}
	clear(w.channels)
}
