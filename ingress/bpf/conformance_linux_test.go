package bpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: the underlay is 10.99.9.0/24, this host .1 and the other .2;
// tasks have 10.0.16.N and fd16::N, the service .200 and ::200, this host's leg .250; a client outside
// is 192.0.2.2 behind this host's 192.0.2.1.
const (
	vni      = 4097
	vipText  = "10.0.16.200"
	vip6Text = "fd16::200"
	legText  = "10.0.16.250"
	hostText = "192.0.2.1"
)

// bed is this host, which is the test's own namespace, and another one.
type bed struct {
	t       testing.TB
	dir     string
	network weft.ID
	engines [2]*overlay.Engine
	nodes   [2]weft.ID
	other   string // namespace of the other host
	ports   [2][]vxlan.Port
}

func newBed(t testing.TB, way string) *bed {
	netnstest.NeedRoot(t)
	dir, err := os.MkdirTemp("/run", "balance")
	must(t, err)
	b := &bed{t: t, dir: dir, network: weft.NewID()}
	// All tests share the host's namespace: a client's port that an earlier one
	// used would be led to that one's backend.
	must(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
	b.other = b.namespace("other")
	b.wire("under0", "10.99.9.1/24", b.other, "10.99.9.2/24")
	for i := range b.engines {
		b.nodes[i] = weft.NewID()
		b.engines[i], err = overlay.New(overlay.Config{Node: b.nodes[i], Dir: b.mount(i), Log: slog.New(slog.DiscardHandler), Attach: way})
		must(t, err)
	}
	t.Cleanup(func() {
		must(t, b.engines[0].Apply(context.Background(), vxlan.State{}))
		must(t, netns.Do(b.other, func() error { return b.engines[1].Apply(context.Background(), vxlan.State{}) }))
		for i := range b.engines {
			if _, err := os.Stat(b.mount(i)); err == nil {
				t.Errorf("the bpffs of host %d is left behind", i)
			}
		}
	})
	return b
}

func (b *bed) mount(i int) string { return filepath.Join(b.dir, fmt.Sprintf("bpf%d", i)) }

func (b *bed) namespace(name string) string {
	path, err := netns.Create(b.dir, name)
	must(b.t, err)
	b.t.Cleanup(func() { netns.Remove(path) })
	return path
}

// wire joins this host to a namespace.
func (b *bed) wire(name, addr, ns, addrThere string) {
	b.t.Helper()
	h, err := netns.Open(ns)
	must(b.t, err)
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	must(b.t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.FD())}))
	b.t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			netlink.LinkDel(l)
		}
	})
	up := func(name, addr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l), netlink.LinkSetUp(lo))
	}
	must(b.t, up(name, addr))
	must(b.t, h.Do(func() error { return up("eth0", addrThere) }))
}

// apply makes the network on both hosts.
func (b *bed) apply() {
	b.t.Helper()
	vip := netip.MustParseAddr(vipText)
	leg := vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.MustParsePrefix(legText + "/24")}
	leg.MAC = weft.NodeMAC(b.nodes[0], leg.Addr.Addr())
	for i := range b.engines {
		n := vxlan.Network{ID: b.network, VNI: vni, MTU: 1450, VTEP: vtep(i), Port: 4789, Ports: b.ports[i],
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.16.0/24"), netip.MustParsePrefix("fd16::/64")}, VIPs: []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("web", vip)}}}
		for _, p := range b.ports[1-i] {
			for _, a := range p.Addrs() {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: p.MAC, VTEP: vtep(1 - i)})
			}
		}
		run := func() error {
			return b.engines[i].Apply(b.t.Context(), vxlan.State{Networks: map[uint32]vxlan.Network{vni: n}})
		}
		if i == 0 {
			n.HostLeg = &leg
			must(b.t, run())
			continue
		}
		n.Peers = append(n.Peers, vxlan.Peer{Addr: leg.Addr.Addr(), MAC: leg.MAC, VTEP: vtep(0)})
		must(b.t, netns.Do(b.other, run))
	}
}

func vtep(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 9, byte(1 + i)}) }

// task makes the namespace of a task on host i and files its port.
func (b *bed) task(i, n int) (ingress.Backend, string) {
	id := weft.ID(fmt.Sprintf("task%d", n))
	a := netip.AddrFrom4([4]byte{10, 0, 16, byte(n)})
	ns := b.namespace(string(id))
	p := vxlan.Port{Task: id, NetNS: ns, IfName: "eth0", Addr: netip.PrefixFrom(a, 24), MAC: weft.EndpointMAC(id, a),
		Addr6: netip.MustParsePrefix(fmt.Sprintf("fd16::%d/64", n))}
	b.ports[i] = append(b.ports[i], p)
	return ingress.Backend{Task: id, Addr: a, Addr6: p.Addr6.Addr(), MAC: p.MAC}, ns
}

// backend is a task that serves the service's address.
func (b *bed) backend(i, n int) ingress.Backend {
	k, ns := b.task(i, n)
	must(b.t, netns.Do(ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(vipText + "/32")
		if err != nil {
			return err
		}
		for key, v := range map[string]string{"arp_ignore": "1", "arp_announce": "2"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/"+key, []byte(v), 0o644); err != nil {
				return err
			}
		}
		return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, a))
	}))
	b.serve(ns, string(k.Task))
	return k
}

// serve answers with its name and the client's address, over TCP and UDP.
func (b *bed) serve(ns, name string) {
	var ln net.Listener
	var pc net.PacketConn
	must(b.t, netns.Do(ns, func() (err error) {
		if ln, err = net.Listen("tcp", ":80"); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp", ":7")
		return err
	}))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer context.AfterFunc(b.t.Context(), func() { c.Close() })()
				defer c.Close()
				fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
				io.Copy(c, c)
			})
		}
	})
	wg.Go(func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo([]byte(fmt.Sprintf("%s %s\n", name, from)), from)
		}
	})
	b.t.Cleanup(func() { ln.Close(); pc.Close(); wg.Wait() })
}

// TestConformance runs the suite of all engines, with backends on both hosts and
// the published ports left to nftables.
func TestConformance(t *testing.T) {
	netnstest.NeedRoot(t)
	for _, way := range []string{overlay.AttachTCX, overlay.AttachClsact} {
		t.Run(way, func(t *testing.T) { testConformance(t, way, "") })
	}
	t.Run("sockets", func(t *testing.T) {
		cgroup := placeOf(t, "conformance")
		testConformance(t, "", cgroup)
	})
}

// testConformance balances at sockets, too, with a cgroup.
func testConformance(t *testing.T, way, cgroup string) {
	b := newBed(t, way)
	if err := b.engines[0].Probe(t.Context()); errors.Is(err, weft.ErrUnsupported) {
		netnstest.Missing(t, way, err)
	}
	backends := []ingress.Backend{b.backend(0, 11), b.backend(0, 12), b.backend(1, 13)}
	_, inside := b.task(0, 50)
	outside := b.namespace("outside")
	b.wire("out0", hostText+"/24", outside, "192.0.2.2/24")
	b.apply()
	services, err := New(Config{Node: b.nodes[0], Dir: b.mount(0), Cgroup: cgroup})
	must(t, err)
	e := ingress.Split{Services: services, Published: nft.New(b.dir)}
	must(t, e.Probe(t.Context()))
	bed := &ingresstest.Bed{
		Engine: e, Network: ingress.Network{VNI: vni, NetNS: b.dir, Bridge: "none", Tasks: []string{inside}}, Missing: b.dir + "/none",
		Backends: backends, VIP: netip.MustParseAddr(vipText),
		Entry:  ingress.Entry{Link: weft.IngressLeg, Addr: netip.MustParsePrefix(legText + "/24")},
		Inside: netip.MustParseAddr("10.0.16.50"), Host: netip.MustParseAddr(hostText),
		Target: map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7},
	}
	bed.Open = func(t *testing.T, out bool, p weft.Protocol, port uint16) (ingresstest.Flow, error) {
		ns, to := inside, netip.AddrPortFrom(bed.VIP, port)
		if out {
			ns, to = outside, netip.AddrPortFrom(bed.Host, port)
		}
		return openFlow(t, ns, string(p), to)
	}
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	ingresstest.Conformance(t, bed)
	t.Run("repair", func(t *testing.T) { testRepair(t, b, services, bed) })
}

// testRepair: whatever of the balancer is damaged, the next Apply mends, and a
// flow that was open goes on.
func testRepair(t *testing.T, b *bed, e *Engine, bed *ingresstest.Bed) {
	vip := netip.MustParseAddr(vipText)
	n := bed.Network
	n.Services = []ingress.Service{{ID: "web", VIP: vip, MAC: weft.VIPMAC("web", vip), Backends: bed.Backends}}
	table := ingress.Table{Networks: []ingress.Network{n}}
	must(t, e.Apply(t.Context(), table))
	var got []string
	e.repaired = func(r weft.Repair) { got = append(got, r.Kind) }
	key := overlay.KeyOf(vni, vip)
	everything := "ring wrong,service missing"
	if e.sockets.isOn() {
		everything = "backend missing,backend missing,backend missing," + everything + ",task sockets missing"
	}
	ring := func(p *pinned) slotKey {
		var v serviceValue
		must(t, p.maps[balanceMapServices].Lookup(key, &v))
		return slotKey{Ring: v.Ring}
	}
	unpin := func(pattern string) func(*pinned) error {
		return func(*pinned) error {
			found, err := filepath.Glob(filepath.Join(e.dir, "balance", pattern))
			if err != nil || len(found) != 1 {
				return fmt.Errorf("pins %v, %v", found, err)
			}
			return os.Remove(found[0])
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(p *pinned) error
		want  string // kinds of the repairs, with commas
	}{
		{"nothing", func(*pinned) error { return nil }, ""},
		{"unhooked", func(p *pinned) error { return p.maps[overlay.MapHooks].Delete(overlay.HookBalance) }, "hook wrong"},
		{"service gone", func(p *pinned) error { return p.maps[balanceMapServices].Delete(key) }, "service missing"},
		{"service wrong", func(p *pinned) error { return p.maps[balanceMapServices].Put(key, serviceValue{Ring: 7, Size: 1}) }, "service wrong"},
		{"service stray", func(p *pinned) error {
			return p.maps[balanceMapServices].Put(overlay.KeyOf(vni, netip.MustParseAddr("10.0.16.201")), serviceValue{})
		}, "service stray"},
		{"slot gone", func(p *pinned) error { return p.maps[balanceMapSlots].Delete(ring(p)) }, "ring wrong"},
		{"slot wrong", func(p *pinned) error {
			return p.maps[balanceMapSlots].Put(ring(p), chunkValue{5: overlay.ValueOf(vxlan.MAC{2, 9, 9, 9, 9, 9})})
		}, "ring wrong"},
		{"slot stray", func(p *pinned) error {
			return p.maps[balanceMapSlots].Put(slotKey{Ring: 7}, chunkValue{overlay.ValueOf(vxlan.MAC{2, 9, 9, 9, 9, 9})})
		}, "ring stray"},
		{"all gone", func(p *pinned) error {
			_, err := p.converge(tables{})
			return err
		}, everything},
		{"map unpinned", unpin(balanceMapServices), "map missing"},
		{"program unpinned", unpin(balanceProgBalance + "-*"), "program missing"},
		{"pins gone", func(*pinned) error { return os.RemoveAll(filepath.Join(e.dir, "balance")) }, "map missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := e.open()
			must(t, err)
			must(t, c.spoil(p))
			p.close()
			got = nil
			must(t, e.Apply(t.Context(), table))
			must(t, e.Apply(t.Context(), table)) // nothing is counted again
			if s := strings.Join(got, ","); s != c.want {
				t.Errorf("repaired %q, want %q", s, c.want)
			}
			f, err := bed.Open(t, false, weft.TCP, 80)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Again(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPublishedPortsAreRefused(t *testing.T) {
	e, err := New(Config{Node: "n", Dir: "/run/none"})
	must(t, err)
	err = e.Apply(t.Context(), ingress.Table{Published: []ingress.Published{{Port: 80}}})
	if !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	err = e.Apply(t.Context(), ingress.Table{Networks: []ingress.Network{{VNI: 7}}})
	var one *ingress.NetworkError
	if !errors.As(err, &one) || one.VNI != 7 || !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("without an overlay: %v", err)
	}
}

// silence is how long nobody's answer is waited for.
const silence = 2 * time.Second

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
	if f.udp {
		name, _, err := f.ask()
		return weft.ID(name), err
	}
	f.c.SetDeadline(time.Now().Add(silence))
	if _, err := f.c.Write([]byte("ping")); err != nil {
		return "", err
	}
	_, err := io.ReadFull(f.c, make([]byte, 4))
	return weft.ID(f.name), err // a connection has one end for life
}

// lastPort is the port of the last client; those of the kernel's own choice begin
// above them all.
var lastPort atomic.Uint32

// dialer is a client with a port that none has had: the host's tracking of
// connections, and the balancer itself, remember the flows of those before, and
// would be right to lead another one of the same port where that went.
func dialer(network string) *net.Dialer {
	port := 20000 + int(lastPort.Add(1))%12000
	if network == "udp" {
		return &net.Dialer{Timeout: silence, LocalAddr: &net.UDPAddr{Port: port}}
	}
	return &net.Dialer{Timeout: silence, LocalAddr: &net.TCPAddr{Port: port}}
}

func openFlow(t *testing.T, ns, network string, to netip.AddrPort) (*socketFlow, error) {
	f := &socketFlow{udp: network == "udp"}
	err := netns.Do(ns, func() (err error) {
		f.c, err = dialer(network).Dial(network+"4", to.String())
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
	buf := make([]byte, 1)
	if f.udp {
		if _, err := f.c.Write([]byte("x")); err != nil {
			return "", seen, err
		}
		buf = make([]byte, 1500)
	}
	var line []byte // one byte at a time: what follows is not ours to read
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
