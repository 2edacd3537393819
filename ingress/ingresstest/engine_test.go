package ingresstest

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: tasks 10.0.16.N, service address 10.0.16.200, host's leg
// 10.0.16.250, host 192.0.2.1, outside client 192.0.2.2; the same last numbers in
// fd00::/64 and, for the host, 2001:db8::1.
func memoryBed() *Bed {
	e := New("/ns/hidden")
	b := &Bed{
		Engine: e, Network: ingress.Network{VNI: 4097, NetNS: "/ns/hidden", Bridge: "br"}, Missing: "/ns/none",
		VIP:    netip.MustParseAddr("10.0.16.200"),
		Entry:  ingress.Entry{Link: weft.IngressLeg, Addr: netip.MustParsePrefix("10.0.16.250/24")},
		Inside: netip.MustParseAddr("10.0.16.50"), Host: netip.MustParseAddr("192.0.2.1"),
		Target: map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7},
	}
	for n := 11; n < 14; n++ {
		id, addr := weft.ID(fmt.Sprintf("task%d", n)), netip.AddrFrom4([4]byte{10, 0, 16, byte(n)})
		b.Backends = append(b.Backends, ingress.Backend{Task: id, Addr: addr, Addr6: netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(n)}), MAC: weft.EndpointMAC(id, addr)})
	}
	from := uint16(32768)
	b.Open = func(_ *testing.T, outside bool, p weft.Protocol, port uint16) (Flow, error) {
		from++
		pkt := Packet{VNI: 4097, Protocol: p, Src: netip.AddrPortFrom(b.Inside, from), Dst: netip.AddrPortFrom(b.VIP, port)}
		if outside {
			pkt.VNI, pkt.Src, pkt.Dst = 0, netip.AddrPortFrom(b.Host.Next(), from), netip.AddrPortFrom(b.Host, port)
		}
		r := e.Trace(pkt)
		switch {
		case r.Refused:
			return nil, ErrRefused
		case r.Backend == "":
			return nil, fmt.Errorf("nobody is at %s", pkt.Dst)
		}
		if outside && r.Dst.Port() != b.Target[p] {
			return nil, fmt.Errorf("the backend saw port %d", r.Dst.Port())
		}
		return memoryFlow{e, pkt, r}, nil
	}
	return b
}

type memoryFlow struct {
	e *Engine
	p Packet
	r Result
}

func (f memoryFlow) Backend() weft.ID { return f.r.Backend }
func (f memoryFlow) Seen() netip.Addr { return f.r.Src.Addr() }
func (f memoryFlow) Again() (weft.ID, error) {
	r := f.e.Trace(f.p)
	if r.Refused {
		return "", ErrRefused
	}
	return r.Backend, nil
}

func TestConformance(t *testing.T) {
	hidden := memoryBed()
	t.Run("client hidden", func(t *testing.T) { Conformance(t, hidden) })
	kept := memoryBed()
	kept.Client = kept.Host.Next()
	Conformance(t, kept)
}

func TestConformanceIPv6(t *testing.T) {
	b := memoryBed()
	b.VIP, b.Inside, b.Host = netip.MustParseAddr("fd00::200"), netip.MustParseAddr("fd00::50"), netip.MustParseAddr("2001:db8::1")
	b.Client = b.Host.Next()
	b.Entry.Addr6, b.Network.IPv6 = netip.MustParsePrefix("fd00::250/64"), true
	Conformance(t, b)
}

func TestStatsCountNewFlows(t *testing.T) {
	b := memoryBed()
	b.apply(t, b.table(b.Backends[0]))
	f := b.open(t, true, weft.UDP)
	again(t, f)
	b.open(t, true, weft.UDP)
	b.open(t, false, weft.TCP)
	s, err := b.Engine.Stats(t.Context())
	if err != nil || len(s.Published) != 1 || s.Published[ingress.PortKey{Protocol: weft.UDP, Port: port}] != 2 {
		t.Errorf("stats %v, %v, want two flows on udp 30000", s, err)
	}
}

// memoryLane is the engine in memory as a Lane: packets are traced, not sent.
type memoryLane struct {
	e    *Engine
	from uint16
	is6  bool
}

func (l *memoryLane) network(n int, services []ingress.Service) ingress.Network {
	return ingress.Network{VNI: uint32(4097 + n), NetNS: fmt.Sprintf("/ns/%d", n), Bridge: "br", IPv6: true, Services: services}
}

func (l *memoryLane) Apply(services ...[]ingress.Service) error {
	var t ingress.Table
	for n := range 2 {
		var of []ingress.Service
		if n < len(services) {
			of = services[n]
		}
		t.Networks = append(t.Networks, l.network(n, of))
	}
	return l.e.Apply(context.Background(), t)
}

func (l *memoryLane) Backends(network int) (out []ingress.Backend) {
	for i := range []int{4, 1}[network] {
		n := 11 + i
		id, addr := weft.ID(fmt.Sprintf("task%d%d", network, n)), netip.AddrFrom4([4]byte{10, 0, 16, byte(n)})
		out = append(out, ingress.Backend{Task: id, Addr: addr, Addr6: netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(n)}), MAC: weft.EndpointMAC(id, addr)})
	}
	return out
}

func (l *memoryLane) Open(network int, p weft.Protocol, from uint16, to netip.AddrPort) (Flow, error) {
	if l.from++; from == 0 {
		from = 32768 + l.from
	}
	src := netip.AddrPortFrom(l.client(), from)
	if from < 32768 {
		l.e.Forget(src) // a SYN begins a flow anew
	}
	r := l.e.Trace(Packet{VNI: uint32(4097 + network), Protocol: p, Src: src, Dst: to})
	switch {
	case r.Refused:
		return nil, ErrRefused
	case r.Backend == "":
		return nil, fmt.Errorf("nobody is at %s", to)
	}
	return memoryFlow{l.e, Packet{VNI: uint32(4097 + network), Protocol: p, Src: src, Dst: to}, r}, nil
}

func (l *memoryLane) client() netip.Addr {
	if l.is6 {
		return netip.MustParseAddr("fd00::50")
	}
	return netip.MustParseAddr("10.0.16.50")
}

// TestServices runs the cases that need no packets.
func TestServices(t *testing.T) {
	for name, vip := range map[string]string{"IPv4": "10.0.16.200", "IPv6": "fd00::200"} {
		l := &memoryLane{e: New("/ns/0", "/ns/1"), is6: name == "IPv6"}
		s := &Suite{Lane: l, VIP: netip.MustParseAddr(vip), Client: l.client(), Many: 10000}
		t.Run(name, s.Run)
	}
}
