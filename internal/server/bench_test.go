package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

const (
	benchVolume  = "7f0c1a52-93b4-4a0e-8d9b-5a2f4f1f0d11"
	benchClients = 500 // machines that really ask
	benchCallers = 64  // at once
	benchRound   = 640 // calls
)

// BenchmarkBoot is a whole boot at the whole server: handshake, decision, the
// release and its audit entry on disk, and the sealed blob. In turn with it
// goes what it is compared with: nothing but the handshake with keys on both
// sides. One operation is a round of both.
func BenchmarkBoot(b *testing.B) {
	for _, machines := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprintf("machines=%d", machines), func(b *testing.B) {
			dir, address := benchState(b)
			state, err := OpenState(dir)
			if err != nil {
				b.Fatal(err)
			}
			defer state.Close()
			clients := fillState(b, state, machines)
			bare := bareHandshakes(b, state.Key)
			ctx, cancel := context.WithCancel(b.Context())
			stopped := make(chan error, 1)
			go func() { stopped <- New(state, slog.New(slog.DiscardHandler), time.Now).Run(ctx) }()
			defer func() {
				cancel()
				if err := <-stopped; err != nil {
					b.Error(err)
				}
			}()
			awaitControl(b, dir)
			var boots, handshakes time.Duration
			for b.Loop() {
				handshakes += inParallel(b, func(n int) error { return handshakeOnce(bare, clients[n%len(clients)]) })
				boots += inParallel(b, func(n int) error { return bootOnce(address, clients[n%len(clients)]) })
			}
			b.ReportMetric(float64(b.N*benchRound)/boots.Seconds(), "boots/s")
			b.ReportMetric(float64(b.N*benchRound)/handshakes.Seconds(), "handshakes/s")
			b.ReportMetric(handshakes.Seconds()/boots.Seconds(), "ratio")
		})
	}
}

// inParallel makes one round of calls and says how long it took.
func inParallel(b *testing.B, once func(n int) error) time.Duration {
	var wait sync.WaitGroup
	start := time.Now()
	for caller := range benchCallers {
		wait.Go(func() {
			for n := caller; n < benchRound; n += benchCallers {
				if err := once(n); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wait.Wait()
	return time.Since(start)
}

// bareHandshakes listens with the server's key, and sends one byte when it has
// seen the other's.
func bareHandshakes(b *testing.B, key *identity.Key) (address string) {
	b.Helper()
	config, err := key.ServerTLS(unlock.Protocol)
	if err != nil {
		b.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = conn.Write([]byte{1})
			}()
		}
	}()
	return listener.Addr().String()
}

func handshakeOnce(address string, config *tls.Config) error {
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return errors.Join(err, conn.Close())
}

// bootOnce asks as a boot program does; opening the blob is its own cost.
func bootOnce(address string, config *tls.Config) error {
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	request, err := unlock.Request{Attempt: strings.Repeat("ab", 16)}.Bytes()
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err != nil || len(answer) < 4 {
		return fmt.Errorf("answer of %d bytes: %w", len(answer), err)
	}
	reply, err := unlock.ParseReply(answer[4:])
	if err == nil && !reply.Released {
		err = unlock.ErrRefused
	}
	return err
}

// BenchmarkIdle is the memory of the server program with 10,000 machines,
// while nobody asks for anything.
func BenchmarkIdle(b *testing.B) {
	program := filepath.Join(b.TempDir(), "mandos-escrow")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "mandos-escrow/cmd/mandos-escrow")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	dir, _ := benchState(b)
	state, err := OpenState(dir)
	if err != nil {
		b.Fatal(err)
	}
	fillState(b, state, 10_000)
	if err := state.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		server := exec.CommandContext(b.Context(), program, "server", "run", "--state", dir)
		if err := server.Start(); err != nil {
			b.Fatal(err)
		}
		awaitControl(b, dir)
		time.Sleep(2 * time.Second)
		b.ReportMetric(residentMegabytes(b, server.Process.Pid), "MB")
		if err := errors.Join(server.Process.Signal(syscall.SIGTERM), server.Wait()); err != nil {
			b.Error(err)
		}
	}
}

func residentMegabytes(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range bytes.Lines(status) {
		if fields := strings.Fields(string(line)); len(fields) == 3 && fields[0] == "VmRSS:" {
			kilobytes, err := strconv.Atoi(fields[1])
			if err != nil {
				b.Fatal(err)
			}
			return float64(kilobytes) * 1024 / 1e6
		}
	}
	b.Fatalf("no VmRSS in %s", status)
	return 0
}

func benchKey(b *testing.B) *identity.Key {
	b.Helper()
	key, err := identity.Generate()
	if err != nil {
		b.Fatal(err)
	}
	return key
}

// benchState makes a server's folder, and says where it will listen.
func benchState(b *testing.B) (dir, address string) {
	b.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	address = free.Addr().String()
	if err := free.Close(); err != nil {
		b.Fatal(err)
	}
	master, err := seal.Generate("master", time.Now())
	if err != nil {
		b.Fatal(err)
	}
	dir = filepath.Join(b.TempDir(), "srv")
	settings := Settings{Name: "srv", Listen: []string{address}, Addresses: []string{address}}
	if err := Init(dir, settings, Master{Public: master.Public()}, time.Now()); err != nil {
		b.Fatal(err)
	}
	return dir, address
}

// fillState enrolls machines, and returns the TLS side of the first ones.
func fillState(b *testing.B, state *State, machines int) (clients []*tls.Config) {
	b.Helper()
	const step = 5000
	for start := 0; start < machines; start += step {
		err := state.Store.Update(func(tx *store.Tx) error {
			for n := start; n < min(start+step, machines); n++ {
				id := identity.KeyID(fmt.Sprintf("%064x", n))
				if n < benchClients {
					key := benchKey(b)
					config, err := key.ClientTLS(state.Key.KeyID(), unlock.Protocol)
					if err != nil {
						return err
					}
					id, clients = key.KeyID(), append(clients, config)
				}
				m := unlock.Machine{KeyID: id, Name: fmt.Sprintf("machine%d", n), Settings: unlock.Defaults(), Volumes: []string{benchVolume}}
				if err := errors.Join(tx.PutMachine(m.Enable(time.Now())), tx.PutBlob(id, benchVolume, make([]byte, 900))); err != nil {
					return err
				}
			}
			return tx.Audit(store.Event{Time: time.Now(), Actor: "benchmark", Action: "machine.enroll"})
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	return clients
}

func awaitControl(b *testing.B, dir string) {
	b.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		client := api.DialControl(Socket(dir))
		err = client.Call(b.Context(), "GET", "/v1/status", nil, nil)
		client.Close()
		if err == nil {
			return
		}
	}
	b.Fatal(err)
}
