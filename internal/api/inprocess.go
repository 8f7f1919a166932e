package api

import (
	"io"
	"net/http"
)

// inProcess is a transport that calls a handler of this process: a command
// that finds no running server serves itself.
type inProcess struct{ handler http.Handler }

// RoundTrip implements http.RoundTripper.
func (t inProcess) RoundTrip(request *http.Request) (*http.Response, error) {
	reader, writer := io.Pipe()
	w := &pipeWriter{header: http.Header{}, pipe: writer, started: make(chan struct{})}
	go func() {
		defer request.Body.Close()
		t.handler.ServeHTTP(w, request)
		w.WriteHeader(http.StatusOK)
		writer.Close()
	}()
	<-w.started
	return &http.Response{
		Status: http.StatusText(w.status), StatusCode: w.status, Header: w.header.Clone(),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: reader, ContentLength: -1, Request: request,
	}, nil
}

type pipeWriter struct {
	header  http.Header
	pipe    *io.PipeWriter
	status  int
	started chan struct{}
}

func (w *pipeWriter) Header() http.Header { return w.header }

func (w *pipeWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
		close(w.started)
	}
}

func (w *pipeWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.pipe.Write(b)
}
