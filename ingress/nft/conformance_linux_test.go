package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestConformance runs the suite of all engines on a bridge with real tasks.
func TestConformance(t *testing.T) { testConformance(t, false, false) }

func TestConformanceIPv6(t *testing.T) { testConformance(t, true, false) }

func TestConformanceHiddenClient(t *testing.T) { testConformance(t, false, true) }

func TestConformanceHiddenClientIPv6(t *testing.T) { testConformance(t, true, true) }

func testConformance(t *testing.T, is6, hidden bool) {
	f := newFabric(t)
	e := New(f.dir)
	must(t, e.Probe(t.Context()))
	s := service()
	if is6 {
		s.VIP = netip.MustParseAddr(vip6Text)
		s.MAC = weft.VIPMAC(s.ID, s.VIP)
	}
	outside, inside := f.outside(), f.client(50, s)
	bed := &ingresstest.Bed{
		Engine: e, Network: ingress.Network{VNI: 4097, NetNS: f.br, Bridge: "br"}, Missing: f.dir + "/none",
		Backends: []ingress.Backend{f.task(11), f.task(12), f.task(13)}, VIP: s.VIP,
		Inside: netip.MustParseAddr("10.0.16.50"), Host: netip.MustParseAddr(hostText),
		Target: map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7}, Drops: !e.CanRefuse(),
	}
	bed.Entry, bed.Client = f.entry(), netip.MustParseAddr(clientText)
	if is6 {
		if !e.CanPublish6() {
			netnstest.Missing(t, "userns", fmt.Errorf("this kernel does not translate IPv6: %w", weft.ErrUnsupported))
		}
		bed.Network.IPv6, bed.Entry, bed.Client = true, f.entry6(), netip.MustParseAddr(client6Text)
		bed.Inside, bed.Host = twin("10.0.16.50"), netip.MustParseAddr(host6Text)
	}
	if hidden {
		bed.Client = netip.Addr{}
	}
	bed.Network.Ports = f.ports // of the client and the backends, made just now
	clientPort := 20000         // below what the kernel chooses from
	bed.Open = func(t *testing.T, out bool, p weft.Protocol, port uint16) (ingresstest.Flow, error) {
		ns, to := inside, netip.AddrPortFrom(bed.VIP, port)
		if out {
			ns, to = outside, netip.AddrPortFrom(bed.Host, port)
		}
		clientPort++
		return openFlow(t, ns, string(p), clientPort, to)
	}
	t.Cleanup(func() { must(t, e.Close(t.Context())) })
	ingresstest.Conformance(t, bed)
}

// socketFlow is a connected socket whose other end answers with its name and
// the address that it sees.
type socketFlow struct {
	c    net.Conn
	udp  bool
	name string
	seen netip.Addr
}

func (f *socketFlow) Backend() weft.ID { return weft.ID(f.name) }
func (f *socketFlow) Seen() netip.Addr { return f.seen }

func (f *socketFlow) Again() (weft.ID, error) {
	if !f.udp {
		return weft.ID(f.name), echo(f.c) // a connection has one end for life
	}
	name, _, err := f.ask()
	return weft.ID(name), err
}

// silence is how long nobody's answer is waited for.
const silence = time.Second

func openFlow(t *testing.T, ns, network string, from int, to netip.AddrPort) (*socketFlow, error) {
	f := &socketFlow{udp: network == "udp"}
	d := net.Dialer{Timeout: silence, LocalAddr: &net.TCPAddr{Port: from}}
	if f.udp {
		d.LocalAddr = &net.UDPAddr{Port: from}
	}
	err := netns.Do(ns, func() (err error) {
		f.c, err = d.DialContext(t.Context(), network, to.String())
		return err
	})
	if err == nil {
		t.Cleanup(func() { f.c.Close() })
		f.name, f.seen, err = f.ask()
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", ingresstest.ErrRefused, err)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ask reads the greeting, which a datagram has to ask for.
func (f *socketFlow) ask() (name string, seen netip.Addr, err error) {
	if err := f.c.SetDeadline(time.Now().Add(silence)); err != nil {
		return "", seen, err
	}
	if f.udp {
		if _, err := f.c.Write([]byte("x")); err != nil {
			return "", seen, err
		}
	}
	// One byte at a time: what follows the greeting is not ours to read.
	var line []byte
	buf := make([]byte, 1)
	if f.udp {
		buf = make([]byte, 1500)
	}
	for !strings.HasSuffix(string(line), "\n") {
		n, err := f.c.Read(buf)
		if err != nil {
			return "", seen, err
		}
		line = append(line, buf[:n]...)
	}
	name, addr, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	from, err := netip.ParseAddrPort(addr)
	return name, from.Addr(), err
}
