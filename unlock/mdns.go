package unlock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"

	"golang.org/x/net/dns/dnsmessage"

	"mandos-escrow/internal/identity"
)

// What servers announce (docs/unlock-protocol.md, section "Discovery").
const (
	ServiceType = "_mandos-escrow._tcp"
	KeyIDText   = "key-id=" // and the server's key ID: its TXT record

	serviceDomain = ServiceType + ".local."
)

// Limits of a packet; one that exceeds them is dropped whole.
const (
	maxPacket   = 4096 // bytes
	maxRecords  = 64
	maxServices = 8 // of our type
)

var errAnswer = errors.New("not an answer about servers")

// service is what an answer says about one server.
type service struct {
	key       identity.KeyID // empty: it did not say
	port      uint16
	addresses []net.IP // of its host, if the packet has them
}

// query asks for servers (RFC 6762, sections 5.4 and 6.7). It comes from a port
// of its own and wants a unicast answer, which repeats its ID.
func query(id uint16) []byte {
	q := binary.BigEndian.AppendUint16(nil, id)
	q = append(q, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) // a query, with one question
	for label := range strings.SplitSeq(serviceDomain, ".") {
		q = append(append(q, byte(len(label))), label...)
	}
	const typePTR, unicastIN = 12, 0x8001
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(q, typePTR), unicastIN)
}

// records are those of a packet that matter, by lower-case name.
type records struct {
	count int
	srv   []srvRecord
	txt   map[string][]string
	hosts map[string][]net.IP
}

type srvRecord struct {
	name, host string
	port       uint16
}

// parseAnswer reads an answer or announcement. Whoever is on the link can send
// one, with anything in it.
func parseAnswer(packet []byte) (id uint16, found []service, err error) {
	if len(packet) > maxPacket {
		return 0, nil, fmt.Errorf("%w: %d bytes", errAnswer, len(packet))
	}
	var p dnsmessage.Parser
	header, err := p.Start(packet)
	if err != nil || !header.Response || header.RCode != dnsmessage.RCodeSuccess {
		return 0, nil, errAnswer
	}
	if err := p.SkipAllQuestions(); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	r := records{txt: map[string][]string{}, hosts: map[string][]net.IP{}}
	if err := errors.Join(
		r.read(&p, p.AnswerHeader, p.SkipAnswer),
		r.read(&p, p.AuthorityHeader, p.SkipAuthority),
		r.read(&p, p.AdditionalHeader, p.SkipAdditional),
	); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	return header.ID, r.services(), nil
}

func (r *records) read(p *dnsmessage.Parser, next func() (dnsmessage.ResourceHeader, error), skip func() error) error {
	for {
		header, err := next()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return nil
		}
		if r.count++; err == nil && r.count > maxRecords {
			err = errors.New("too many records")
		}
		if err == nil {
			err = r.add(p, header, skip)
		}
		if err != nil {
			return err
		}
	}
}

func (r *records) add(p *dnsmessage.Parser, header dnsmessage.ResourceHeader, skip func() error) error {
	const flush = 1 << 15 // RFC 6762, section 10.2
	if header.Class&^flush != dnsmessage.ClassINET {
		return skip()
	}
	name := lower(header.Name)
	switch header.Type {
	case dnsmessage.TypeSRV:
		body, err := p.SRVResource()
		if err != nil {
			return err
		}
		r.srv = append(r.srv, srvRecord{name, lower(body.Target), body.Port})
	case dnsmessage.TypeTXT:
		body, err := p.TXTResource()
		if err != nil {
			return err
		}
		r.txt[name] = body.TXT
	case dnsmessage.TypeA:
		body, err := p.AResource()
		if err != nil {
			return err
		}
		r.hosts[name] = append(r.hosts[name], net.IP(body.A[:]))
	case dnsmessage.TypeAAAA:
		body, err := p.AAAAResource()
		if err != nil {
			return err
		}
		r.hosts[name] = append(r.hosts[name], net.IP(body.AAAA[:]))
	default:
		return skip()
	}
	return nil
}

// services are the instances of our type. One whose key ID cannot be read is
// none of ours.
func (r *records) services() []service {
	var list []service
	for _, s := range r.srv {
		if !strings.HasSuffix(s.name, "."+serviceDomain) || s.port == 0 || len(list) == maxServices {
			continue
		}
		key, err := keyOf(r.txt[s.name])
		if err != nil {
			continue
		}
		list = append(list, service{key, s.port, r.hosts[s.host]})
	}
	return list
}

// keyOf returns the key ID that a TXT record names, or none if it has no such
// string. Keys of strings know no case, and the first counts (RFC 6763, 6.4).
func keyOf(txt []string) (identity.KeyID, error) {
	for _, s := range txt {
		if len(s) >= len(KeyIDText) && strings.EqualFold(s[:len(KeyIDText)], KeyIDText) {
			return identity.ParseKeyID(s[len(KeyIDText):])
		}
	}
	return "", nil
}

// lower is a name in the letters that comparing takes it by (RFC 4343).
func lower(name dnsmessage.Name) string {
	b := []byte(name.String())
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}
