package enroll

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/unlock"
)

const (
	serversKind = "mandos-escrow-servers"
	maxServers  = 64 << 10 // bytes
)

func (e *enrolment) serversPath() string { return e.path(RunningFolder, "servers") }

// keepServers remembers whom the machine enrolled with, for what it says to
// them later: unlock.conf goes with the last volume that boots unattended.
func (e *enrolment) keepServers(servers ...unlock.Server) error {
	w := record.New(serversKind, 1)
	for _, s := range servers {
		w.Text("server", s.Name).Text("server-key-id", string(s.KeyID))
		for _, a := range s.Addresses {
			w.Text("address", a)
		}
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.Replace(e.serversPath(), data)
}

// readServers returns whom the machine enrolled with. What enrolled before that
// was remembered has it in unlock.conf.
func (e *enrolment) readServers() ([]unlock.Server, error) {
	data, err := os.ReadFile(e.serversPath())
	if errors.Is(err, fs.ErrNotExist) {
		conf, err := e.readBootConfig()
		if err != nil {
			return nil, err
		}
		return conf.Servers, nil
	}
	if err != nil {
		return nil, err
	}
	in := record.Parse(data, serversKind, 1, maxServers)
	var servers []unlock.Server
	for in.Next("server") {
		s := unlock.Server{Name: in.Text("server"), KeyID: identity.KeyID(in.Text("server-key-id"))}
		if _, err := identity.ParseKeyID(string(s.KeyID)); err != nil {
			in.Fail("server-key-id", err.Error())
		}
		s.Addresses = in.Repeated("address", unlock.MaxAddresses)
		servers = append(servers, s)
	}
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("%s: %w", e.serversPath(), err)
	}
	return servers, nil
}

// dial makes a client for one of them, as the running identity.
func (e *enrolment) dial(s unlock.Server, running *identity.Key) (*api.Client, error) {
	return api.Dial(s, running, api.NewWitness(e.path(RunningFolder, string(s.KeyID)+".head"), s.KeyID))
}
