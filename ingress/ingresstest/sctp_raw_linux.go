package ingresstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// Where the kernel has no sockets of SCTP both ends are spoken by hand, on raw ones: as
// much of RFC 9260 as opens an association, sends messages and ends it. The client is
// stricter than a kernel's: whoever answers must do so from the service's address, and
// with the right sum. Refusals are asked for by hand on every kernel.

// rawRetry is how long one try waits for its answer, of which there are rawTries.
const (
	rawRetry = time.Second
	rawTries = 3
)

// rawServer is the end at a task, of one family: at all addresses on portTCP, at the
// task's own on portOwn.
type rawServer struct {
	task   Task
	joined map[rawEnd]*rawJoined
}

type rawEnd struct {
	client       netip.Addr
	port, server uint16
}

// rawJoined is an association: the tags of both ends, and the last TSN sent.
type rawJoined struct{ peer, own, tsn uint32 }

// listenRaw opens a raw socket for SCTP in the calling thread's namespace, and returns
// how to read from it: a packet, who sent it and to which address.
func listenRaw(family string) (pc net.PacketConn, read func([]byte) (int, netip.Addr, netip.Addr, error), err error) {
	if pc, err = net.ListenPacket(family+":132", ""); err != nil {
		return nil, nil, err
	}
	addr := func(ip net.IP) netip.Addr { a, _ := netip.AddrFromSlice(ip); return a.Unmap() }
	from := func(a net.Addr) netip.Addr { return addr(a.(*net.IPAddr).IP) }
	if family == "ip4" {
		c := ipv4.NewPacketConn(pc)
		err = c.SetControlMessage(ipv4.FlagDst, true)
		read = func(b []byte) (int, netip.Addr, netip.Addr, error) {
			n, cm, src, err := c.ReadFrom(b)
			if err != nil {
				return 0, netip.Addr{}, netip.Addr{}, err
			}
			return n, from(src), addr(cm.Dst), nil
		}
	} else {
		c := ipv6.NewPacketConn(pc)
		err = c.SetControlMessage(ipv6.FlagDst, true)
		read = func(b []byte) (int, netip.Addr, netip.Addr, error) {
			n, cm, src, err := c.ReadFrom(b)
			if err != nil {
				return 0, netip.Addr{}, netip.Addr{}, err
			}
			return n, from(src), addr(cm.Dst), nil
		}
	}
	if err != nil {
		pc.Close()
	}
	return pc, read, err
}

// serveRaw answers until its socket is closed. Like the kernel it leaves the address that
// it answers from to the route.
func serveRaw(task Task, pc net.PacketConn, read func([]byte) (int, netip.Addr, netip.Addr, error)) {
	s := rawServer{task: task, joined: map[rawEnd]*rawJoined{}}
	for buf := make([]byte, 1<<16); ; {
		n, from, to, err := read(buf)
		if err != nil {
			return
		}
		p, err := parseSCTP(buf[:n])
		if err != nil {
			continue // the client says that nobody answers
		}
		for _, a := range s.take(p, from, to) {
			a.from, a.to = p.to, p.from
			pc.WriteTo(a.marshal(), &net.IPAddr{IP: from.AsSlice()})
		}
	}
}

// take is what becomes of a packet: the answers, but for their ports.
func (s *rawServer) take(p sctpPacket, from, to netip.Addr) []sctpPacket {
	end := rawEnd{from, p.from, p.to}
	a := s.joined[end]
	switch {
	case p.kind == chunkInit && len(p.value) >= initBytes:
		peer := binary.BigEndian.Uint32(p.value)
		if p.to != portTCP && (p.to != portOwn || to != s.task.Addr && to != s.task.Addr6) {
			return []sctpPacket{{tag: peer, kind: chunkAbort}}
		}
		own := rand.Uint32() | 1
		cookie := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, peer), own)
		return []sctpPacket{{tag: peer, kind: chunkInitAck, value: initValue(own, cookie)}}
	case p.kind == chunkCookieEcho && len(p.value) == 8:
		peer, own := binary.BigEndian.Uint32(p.value), binary.BigEndian.Uint32(p.value[4:])
		if p.tag != own {
			return nil
		}
		s.joined[end] = &rawJoined{peer: peer, own: own, tsn: 1}
		line := fmt.Sprintf("%s %s\n", s.task.Task, netip.AddrPortFrom(from, p.from))
		return []sctpPacket{{tag: peer, kind: chunkCookieAck}, {tag: peer, kind: chunkData, flags: flagsWhole, value: dataValue(1, []byte(line))}}
	case p.kind == chunkAbort || p.kind == chunkShutdownComplete:
		delete(s.joined, end)
		return nil
	case a == nil || a.own != p.tag:
		return []sctpPacket{{tag: p.tag, kind: chunkAbort, flags: flagTag}}
	case p.kind == chunkShutdown:
		return []sctpPacket{{tag: a.peer, kind: chunkShutdownAck}}
	case p.kind == chunkData && len(p.value) >= dataBytes:
		a.tsn++
		return []sctpPacket{
			{tag: a.peer, kind: chunkSack, value: sackValue(binary.BigEndian.Uint32(p.value))},
			{tag: a.peer, kind: chunkData, flags: flagsWhole, value: dataValue(a.tsn, p.value[dataBytes:])},
		}
	}
	return nil
}

// rawFlow is a client's association.
type rawFlow struct {
	*net.IPConn
	from, to  uint16
	tag, peer uint32
	tsn       uint32
	name      weft.ID
	saw       netip.Addr
	// offloads: a kernel at the other end may leave the sum to the link, which does
	// without between namespaces.
	offloads bool
}

// Backend implements Flow.
func (f *rawFlow) Backend() weft.ID { return f.name }

// Seen implements Flow.
func (f *rawFlow) Seen() netip.Addr { return f.saw }

// refusals are the ICMP errors that end a request for an association.
var refusals = []error{unix.ECONNREFUSED, unix.ENOPROTOOPT, unix.EPROTO}

// openRaw opens an association from a namespace; from 0 is any port.
func (r *Rig) openRaw(ns string, from uint16, to netip.AddrPort) (*rawFlow, error) {
	f := &rawFlow{from: from, to: to.Port(), tag: rand.Uint32() | 1, tsn: 1, offloads: HasSCTP() == nil}
	if from == 0 {
		f.from = uint16(32768 + r.raw%28000)
		r.raw++
	}
	family := "ip4:132"
	if to.Addr().Is6() {
		family = "ip6:132"
	}
	err := netns.Do(ns, func() (err error) {
		f.IPConn, err = net.DialIP(family, nil, &net.IPAddr{IP: to.Addr().AsSlice()}) // from others it hears nothing
		return err
	})
	if err != nil {
		return nil, err
	}
	r.open = append(r.open, f)
	ack, err := f.ask(sctpPacket{kind: chunkInit, value: initValue(f.tag, nil)}, true, chunkInitAck)
	if err != nil {
		return nil, fmt.Errorf("request for an association: %w", err)
	}
	cookie := cookieOf(ack.value)
	if len(ack.value) < initBytes || cookie == nil {
		return nil, errors.New("an INIT ACK without a cookie")
	}
	f.peer = binary.BigEndian.Uint32(ack.value)
	if _, err := f.ask(sctpPacket{tag: f.peer, kind: chunkCookieEcho, value: cookie}, true, chunkCookieAck); err != nil {
		return nil, fmt.Errorf("cookie: %w", err)
	}
	line, err := f.ask(sctpPacket{}, false, chunkData)
	if err != nil {
		return nil, fmt.Errorf("the first message: %w", err)
	}
	word, client, _ := strings.Cut(strings.TrimSpace(string(line.value[min(dataBytes, len(line.value)):])), " ")
	saw, err := netip.ParseAddrPort(client)
	f.name, f.saw = weft.ID(word), saw.Addr()
	return f, err
}

// ask sends a packet, if it has a chunk, until an answer of that kind comes. An ABORT is
// ErrRefused; so is what ICMP says, but of an association that is open.
func (f *rawFlow) ask(p sctpPacket, send bool, kind byte) (sctpPacket, error) {
	p.from, p.to = f.from, f.to
	for range rawTries {
		if send {
			if _, err := f.Write(p.marshal()); err != nil && !f.stray(err) {
				return p, fmt.Errorf("%w: %w", ErrRefused, err)
			}
		}
		if err := f.SetReadDeadline(time.Now().Add(rawRetry)); err != nil {
			return p, err
		}
		a, err := f.hear(kind)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return a, err
		}
	}
	return p, fmt.Errorf("no answer from the service's address: %w", os.ErrDeadlineExceeded)
}

// stray reports whether an error of the socket is of no meaning for this association: the
// kernel tells it to all raw sockets with this peer.
func (f *rawFlow) stray(err error) bool {
	return f.name != "" && slices.ContainsFunc(refusals, func(r error) bool { return errors.Is(err, r) })
}

func (f *rawFlow) hear(kind byte) (sctpPacket, error) {
	for buf := make([]byte, 1<<16); ; {
		n, _, err := f.ReadFrom(buf) // without IPv4's header, which Read would leave there
		if err != nil && f.stray(err) {
			continue
		}
		if slices.ContainsFunc(refusals, func(r error) bool { return errors.Is(err, r) }) {
			return sctpPacket{}, fmt.Errorf("%w: %w", ErrRefused, err)
		}
		if err != nil {
			return sctpPacket{}, err
		}
		p, err := parseSCTP(buf[:n])
		if f.offloads && errors.Is(err, errSum) {
			err = nil
		}
		if err != nil {
			return p, err
		}
		if p.to != f.from || p.from != f.to {
			continue // another one's
		}
		switch {
		case p.kind == chunkAbort && (p.tag == f.tag || p.flags&flagTag != 0 && p.tag == f.peer):
			return p, fmt.Errorf("%w: ABORT", ErrRefused)
		case p.tag != f.tag:
			return p, fmt.Errorf("an answer with the tag %#x, want %#x", p.tag, f.tag)
		case p.kind == kind:
			return p, nil
		}
	}
}

// Again implements Flow.
func (f *rawFlow) Again() (weft.ID, error) {
	f.tsn++
	_, err := f.ask(sctpPacket{tag: f.peer, kind: chunkData, flags: flagsWhole, value: dataValue(f.tsn, []byte("ping"))}, true, chunkData)
	return f.name, err // an association has one end for life
}

// Reset ends the association by an ABORT, which leaves its port free.
func (f *rawFlow) Reset() error {
	p := sctpPacket{from: f.from, to: f.to, tag: f.peer, kind: chunkAbort}
	_, err := f.Write(p.marshal())
	return errors.Join(err, f.Close())
}

// Forget leaves it without a word, as a client that dies.
func (f *rawFlow) Forget() error { return f.Close() }

// refusesSCTP wants a request for an association to be refused.
func (w *Wire) refusesSCTP(to netip.AddrPort) error {
	_, err := w.rig.openRaw(w.clients[0].NetNS, 0, to)
	if !errors.Is(err, ErrRefused) {
		return fmt.Errorf("sctp to %s: %w, want refused", to, err)
	}
	return nil
}
