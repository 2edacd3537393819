package ingresstest

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// Wire is a Lane of real packets: a Rig with an engine.
type Wire struct {
	rig    *Rig
	engine ingress.Engine
	// clients and tasks by network.
	clients [2]Task
	tasks   [2][]Task
	vips    [2]netip.Addr // of both families
	// Remembers says how long the engine still knows an idle TCP flow to a service
	// address of which nothing more is heard. nil = for ever.
	Remembers func(from, to netip.AddrPort) (time.Duration, error)
}

// lateAfter is how long portLate is silent, and an idle connection idle. That they
// live longer is asked of the engine (Remembers): nobody waits for two hours.
const lateAfter = time.Second

// Address plan of a Wire: clients .50, backends .11 to .14 on network 0, .11 on
// network 1, the service address .200 on both.
const (
	firstBackend = 11
	clientNumber = 50
	vipNumber    = 200
)

// NewWire makes a rig of two networks and its tasks. The engine is called by make
// once the networks are there.
func NewWire(t testing.TB, parts Parts, make func(*Rig) (ingress.Engine, error)) *Wire {
	t.Helper()
	parts.Networks = 2
	r := NewRig(t, parts)
	w := &Wire{rig: r}
	for n := range w.clients {
		w.vips[0], w.vips[1] = r.VIP(n, "web", vipNumber)
		w.clients[n] = r.Task(0, n, clientNumber)
		for i := range []int{4, 1}[n] {
			w.tasks[n] = append(w.tasks[n], r.Task(i%2, n, firstBackend+i, w.vips[:]...))
		}
	}
	r.Apply()
	for _, tasks := range w.tasks {
		for _, k := range tasks {
			r.Serve(k, lateAfter, w.vips[:]...)
		}
	}
	var err error
	w.engine, err = make(r)
	must(t, err)
	return w
}

// Suites are the two runs of the suite, by family.
func (w *Wire) Suites() map[string]*Suite {
	return map[string]*Suite{
		"IPv4": {Lane: w, Wire: w, VIP: w.vips[0], Client: address(clientNumber)},
		"IPv6": {Lane: w, Wire: w, VIP: w.vips[1], Client: twin(clientNumber)},
	}
}

// Apply implements Lane.
func (w *Wire) Apply(services ...[]ingress.Service) error {
	var t ingress.Table
	for n := range w.clients {
		var of []ingress.Service
		if n < len(services) {
			of = services[n]
		}
		t.Networks = append(t.Networks, w.rig.Network(n, of...))
		for _, k := range w.tasks[n] {
			t.Ends = append(t.Ends, ingress.End{Task: k.Task, NetNS: k.NetNS, Addrs: []ingress.EndAddr{{VIP: w.vips[0], Own: k.Addr}, {VIP: w.vips[1], Own: k.Addr6}}})
		}
	}
	return w.engine.Apply(w.rig.T.Context(), t)
}

// Backends implements Lane.
func (w *Wire) Backends(network int) []ingress.Backend {
	var out []ingress.Backend
	for _, k := range w.tasks[network] {
		out = append(out, k.Backend)
	}
	return out
}

// Open implements Lane.
func (w *Wire) Open(network int, p weft.Protocol, from uint16, to netip.AddrPort) (Flow, error) {
	if p == weft.SCTP {
		return w.rig.OpenSCTP(w.clients[network].NetNS, from, to)
	}
	s, err := w.rig.Open(w.clients[network].NetNS, p, from, to)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Release closes the flows of the last case.
func (w *Wire) Release() { w.rig.Release() }

// task is the one with that id.
func (w *Wire) task(id weft.ID) Task {
	for _, tasks := range w.tasks {
		for _, k := range tasks {
			if k.Task == id {
				return k
			}
		}
	}
	return Task{}
}

func (s *Suite) dial(p weft.Protocol, port uint16) (*Socket, error) {
	return s.Wire.rig.Open(s.Wire.clients[0].NetNS, p, 0, netip.AddrPortFrom(s.VIP, port))
}

// remembered asks how long the engine knows a connection of a client.
func (s *Suite) remembered(c *Socket, least time.Duration) error {
	if s.Wire.Remembers == nil {
		return nil
	}
	from, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return err
	}
	d, err := s.Wire.Remembers(from, netip.AddrPortFrom(s.VIP, portTCP))
	if err == nil && d < least {
		err = fmt.Errorf("an idle connection is known for %s more, want %s", d, least)
	}
	return err
}

// idle: a connection is known for 7,000 s of silence, and each packet begins them
// anew.
func idle(s *Suite) error {
	c, err := s.dial(weft.TCP, portTCP)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := s.remembered(c, 7000*time.Second); err != nil {
		return err
	}
	select {
	case <-time.After(lateAfter):
	case <-s.Wire.rig.T.Context().Done():
	}
	if err := same([]Flow{c}); err != nil {
		return err
	}
	return s.remembered(c, 7000*time.Second)
}

// halfClose: the client has said all that it will, the backend answers much later.
func halfClose(s *Suite) error {
	c, err := s.dial(weft.TCP, portLate)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.CloseWrite(); err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(lateAfter + silence))
	if b, err := io.ReadAll(c); err != nil || string(b) != "late\n" {
		return fmt.Errorf("after a while the half that is open brought %q, %v", b, err)
	}
	half, err := s.dial(weft.TCP, portTCP)
	if err != nil {
		return err
	}
	defer half.Close()
	if err := half.CloseWrite(); err != nil {
		return err
	}
	return s.remembered(half, 300*time.Second)
}

// fragments: a datagram of three packets arrives whole, and so does the answer.
func fragments(s *Suite) error {
	_, err := s.fragmented()
	return err
}

// fragmentsStay: they arrive where the flow's small datagrams do.
func fragmentsStay(s *Suite) error {
	moved, err := s.fragmented()
	if err == nil && moved > 0 {
		err = fmt.Errorf("%d of 24 went to another backend", moved)
	}
	return err
}

func (s *Suite) fragmented() (moved int, err error) {
	for range 8 {
		c, err := s.dial(weft.UDP, portVIP)
		if err != nil {
			return 0, err
		}
		for range 3 {
			name, _, err := c.Ask(4000)
			if err != nil {
				return 0, fmt.Errorf("a datagram of 4,000 bytes on a flow of %s: %w", c.Name, err)
			}
			if name != c.Name {
				moved++
			}
		}
		c.Close()
	}
	return moved, nil
}

// bulk: full packets cross both ways.
func bulk(s *Suite) error {
	const size = 1 << 20
	for range 4 { // here and there
		c, err := s.dial(weft.TCP, portTCP)
		if err != nil {
			return err
		}
		c.SetDeadline(time.Now().Add(10 * silence))
		sent := make(chan error, 1)
		go func() { // ends with the connection
			_, err := c.Write(make([]byte, size))
			sent <- err
		}()
		n, err := io.CopyN(io.Discard, c, size)
		c.Close()
		if err = errors.Join(err, <-sent); err != nil {
			return fmt.Errorf("%d of %d bytes came back from %s: %w", n, size, c.Name, err)
		}
	}
	return nil
}

// icmpErrors: what a client's host says of a backend's answer reaches that backend.
func icmpErrors(s *Suite) error {
	for range 5 { // Linux sends a burst of six to one host, then one a second
		c, err := s.dial(weft.UDP, portErrors)
		if err != nil {
			return err
		}
		from, err := netip.ParseAddrPort(c.LocalAddr().String())
		if err != nil {
			return err
		}
		c.Close() // who answers now is told that nobody is there
		if err := s.Wire.rig.bounced(s.Wire.task(c.Name), s.VIP, from); err != nil {
			return err
		}
	}
	return nil
}

// ping: a service address answers to it.
func ping(s *Suite) error {
	network, kind, proto := "udp4", icmp.Type(ipv4.ICMPTypeEcho), 1
	if s.VIP.Is6() {
		network, kind, proto = "udp6", ipv6.ICMPTypeEchoRequest, 58
	}
	var pc *icmp.PacketConn
	err := netns.Do(s.Wire.clients[0].NetNS, func() (err error) {
		pc, err = icmp.ListenPacket(network, s.Client.String())
		return err
	})
	if err != nil {
		return err
	}
	defer pc.Close()
	for seq := range 3 {
		m := icmp.Message{Type: kind, Body: &icmp.Echo{Seq: seq, Data: []byte("weft")}}
		b, err := m.Marshal(nil)
		if err != nil {
			return err
		}
		pc.SetDeadline(time.Now().Add(silence))
		if _, err := pc.WriteTo(b, udpAddr(s.VIP, 0)); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("ping %s: %w", s.VIP, err)
		}
		r, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil {
			return err
		}
		if r.Type != ipv4.ICMPTypeEchoReply && r.Type != ipv6.ICMPTypeEchoReply || from.String() != udpAddr(s.VIP, 0).String() {
			return fmt.Errorf("ping %s: %v from %s", s.VIP, r.Type, from)
		}
	}
	return nil
}

// hairpin: a backend that calls its own service reaches every backend in turn,
// itself among them.
func hairpin(s *Suite) error {
	for i, k := range s.Wire.tasks[0] {
		if i%2 != 0 {
			continue // of the host without an engine
		}
		own := k.Addr
		if s.VIP.Is6() {
			own = k.Addr6
		}
		got := map[weft.ID]int{}
		for range 40 {
			c, err := s.Wire.rig.Open(k.NetNS, weft.TCP, 0, netip.AddrPortFrom(s.VIP, portTCP))
			if err != nil {
				return fmt.Errorf("a backend calls its own service: %w", err)
			}
			if got[c.Name]++; c.Saw != own {
				return fmt.Errorf("%s saw %s, want %s", c.Name, c.Saw, own)
			}
			if err := same([]Flow{c}); err != nil {
				return err
			}
			c.Close()
		}
		if len(got) != len(s.Wire.tasks[0]) {
			return fmt.Errorf("40 flows of %s to its own service went to %v", k.Task, got)
		}
	}
	return nil
}

func (s *Suite) answers(p weft.Protocol, port uint16) error {
	for range 8 {
		c, err := s.dial(p, port)
		if err != nil {
			return err
		}
		if err := same([]Flow{c}); err != nil {
			return err
		}
		c.Close()
	}
	return nil
}

func udpWildcard(s *Suite) error { return s.answers(weft.UDP, portUDP) }
func tcpOwn(s *Suite) error      { return s.answers(weft.TCP, portOwn) }
func udpOwn(s *Suite) error      { return s.answers(weft.UDP, portOwn) }
