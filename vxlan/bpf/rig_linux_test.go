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
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: the underlay is 10.99.8.0/24 and fd99:8::/64, host i has .i in
// it; the overlay is 10.100.0.0/24 and fd77::/64, task t of host i has 10*i+t.
const (
	testVNI  = 5001
	testPort = 4789
	underMTU = 1500
)

// host is one node in a namespace of its own, with either engine.
type testHost struct {
	t      testing.TB
	i      int
	v6     bool // of the underlay
	ns     *netns.Handle
	path   string
	node   weft.ID
	k      vxlan.Kernel
	dir    string
	bridge bool
	way    string
	// qdisc is the kind of one at the underlay's ingress that is not ours.
	qdisc string
	// repaired has what the engine has told since the test last looked.
	repaired []string
}

// plan says what a rig is made of.
type plan struct {
	hosts  int
	under6 bool
	mtu    int    // of the underlay
	direct bool   // two hosts on one veth, without the bridge
	way    string // one of ways; "" = as the engine chooses
	// bridges has the numbers of hosts that run the bridge engine.
	bridges []int
}

// ways are those in which programs are attached, and the first of them with tasks'
// ports of netkit.
var ways = []string{AttachTCX, AttachClsact, PortsNetkit}

// inWay makes an engine's configuration that of a way.
func inWay(cfg Config, way string) Config {
	cfg.Attach, cfg.Ports = way, PortsVeth
	switch way {
	case "":
		cfg.Ports = ""
	case PortsNetkit:
		cfg.Attach, cfg.Ports = AttachTCX, PortsNetkit
	}
	return cfg
}

// eachWay runs a test with programs attached in each way.
func eachWay(t *testing.T, f func(t *testing.T, way string)) {
	netnstest.NeedRoot(t)
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			needWay(t, way)
			f(t, way)
		})
	}
}

// needWay ends a test for whose way the kernel is too old.
func needWay(t *testing.T, way string) {
	t.Helper()
	if isTooOld(t, way) {
		netnstest.Missing(t, way, fmt.Errorf("this kernel cannot attach programs by %s", way))
	}
}

// isTooOld asks the kernel without the code under test.
func isTooOld(t *testing.T, way string) bool {
	t.Helper()
	err := inScratch(func(string) error {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
		if err != nil {
			return err
		}
		defer p.Close()
		switch way {
		case AttachTCX:
			l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: p, Attach: ebpf.AttachTCXIngress})
			if err != nil {
				return err
			}
			return l.Close()
		case PortsNetkit:
			return netlink.LinkAdd(&netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: "any0"}})
		}
		return netlink.QdiscAdd(&netlink.GenericQdisc{QdiscType: "clsact",
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: 1, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return true
	}
	must(t, err)
	return false
}

// rig makes hosts on one bridge in the test's own namespace.
func rig(t testing.TB, p plan) []*testHost {
	t.Helper()
	netnstest.NeedRoot(t)
	if p.mtu == 0 {
		p.mtu = underMTU
	}
	dir, err := os.MkdirTemp("/run", "rig")
	must(t, err)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "under", p.mtu
	br := &netlink.Bridge{LinkAttrs: attrs}
	must(t, netlink.LinkAdd(br))
	t.Cleanup(func() { netlink.LinkDel(br) })
	must(t, netlink.LinkSetUp(br))
	var hosts []*testHost
	for i := 1; i <= p.hosts; i++ {
		h := &testHost{t: t, i: i, v6: p.under6, way: p.way, node: weft.NewID(), dir: filepath.Join(dir, fmt.Sprintf("n%d", i))}
		for _, b := range p.bridges {
			h.bridge = h.bridge || b == i
		}
		h.make(dir)
		hosts = append(hosts, h)
	}
	if p.direct {
		join(t, hosts[0].ns, hosts[1].ns, 0, "under0", p.mtu)
	} else {
		here, err := netns.Current()
		must(t, err)
		t.Cleanup(func() { here.Close() })
		for _, h := range hosts {
			join(t, here, h.ns, br.Index, fmt.Sprintf("u%d", h.i), p.mtu)
		}
	}
	for _, h := range hosts {
		h.start()
	}
	return hosts
}

// join makes a veth from one namespace, where it may be on a bridge, to another,
// where it is under0.
func join(t testing.TB, a, b *netns.Handle, bridge int, name string, mtu int) {
	t.Helper()
	must(t, a.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex, attrs.MTU = name, bridge, mtu
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "under0", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(b.FD())})
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	}))
	t.Cleanup(func() {
		must(t, a.Do(func() error {
			if l, err := netlink.LinkByName(name); err == nil {
				return netlink.LinkDel(l)
			}
			return nil
		}))
	})
}

// make makes the namespace.
func (h *testHost) make(dir string) {
	t := h.t
	t.Helper()
	var err error
	h.path, err = netns.Create(dir, fmt.Sprintf("h%d", h.i))
	must(t, err)
	h.ns, err = netns.Open(h.path)
	must(t, err)
	t.Cleanup(func() {
		h.ns.Close()
		netns.Remove(h.path)
	})
}

// start gives the host its address and its engine.
func (h *testHost) start() {
	t := h.t
	t.Helper()
	var err error
	must(t, h.ns.Do(func() error {
		l, err := netlink.LinkByName("under0")
		if err != nil {
			return err
		}
		bits := 24
		a := &netlink.Addr{}
		if h.v6 {
			bits, a.Flags = 64, 2 // nodad
		}
		a.IPNet = &net.IPNet{IP: h.vtep().AsSlice(), Mask: net.CIDRMask(bits, h.vtep().BitLen())}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(lo), netlink.LinkSetUp(l))
	}))
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if h.bridge {
		h.k, err = linux.New(linux.Config{Node: h.node, NetNSDir: h.dir, Log: log})
	} else {
		h.k, err = New(inWay(Config{Node: h.node, Dir: h.dir + "-bpf", NetNSDir: h.dir, Log: log, Repaired: h.note}, h.way))
	}
	must(t, err)
	t.Cleanup(func() {
		if err := h.apply(vxlan.State{}); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(h.dir + "-bpf"); err == nil {
			t.Errorf("host %d: the bpffs is left behind", h.i)
		}
		must(t, h.ns.Do(func() error {
			ls, err := netlink.LinkList()
			for _, l := range ls {
				if l.Attrs().Name != "lo" && l.Attrs().Name != "under0" {
					t.Errorf("host %d: left behind: %s", h.i, l.Attrs().Name)
				}
			}
			if kind := qdiscOf(t, "under0"); kind != h.qdisc {
				t.Errorf("host %d: the underlay device has a qdisc %q, want %q", h.i, kind, h.qdisc)
			}
			return err
		}))
	})
}

func (h *testHost) vtep() netip.Addr {
	if h.v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd99:8::%d", h.i))
	}
	return netip.AddrFrom4([4]byte{10, 99, 8, byte(h.i)})
}

func (h *testHost) note(r weft.Repair) { h.repaired = append(h.repaired, r.Kind) }

// repairs are the kinds of repairs since the last call, sorted.
func (h *testHost) repairs() []string {
	out := h.repaired
	h.repaired = nil
	slices.Sort(out)
	return out
}

func (h *testHost) engine() *Engine { return h.k.(*Engine) }

func (h *testHost) apply(want vxlan.State) error {
	return h.ns.Do(func() error { return h.k.Apply(context.Background(), want) })
}

func (h *testHost) read() vxlan.State {
	h.t.Helper()
	var st vxlan.State
	must(h.t, h.ns.Do(func() (err error) { st, err = h.k.Read(context.Background()); return err }))
	return st
}

// restart makes the host's engine anew, as the next daemon would.
func (h *testHost) restart(way string) {
	h.t.Helper()
	e, err := New(inWay(h.engine().cfg, way))
	must(h.t, err)
	h.k, h.way = e, way
}

func (h *testHost) drops() map[string]uint64 {
	h.t.Helper()
	out, err := h.engine().Drops(context.Background())
	must(h.t, err)
	return out
}

// task makes a task's namespace and describes its port.
func (h *testHost) task(n int, v6 bool) vxlan.Port {
	h.t.Helper()
	id := weft.NewID()
	path, err := netns.Create(h.dir, weft.TaskNetNS(h.node, id))
	must(h.t, err)
	h.t.Cleanup(func() { netns.Remove(path) })
	addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, 0, byte(10*h.i + n)}), 24)
	if v6 {
		addr = netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 10*h.i+n))
	}
	return vxlan.Port{Task: id, NetNS: path, IfName: "eth0", Addr: addr, MAC: weft.EndpointMAC(id, addr.Addr())}
}

// network is the state of one network whose ports are on their hosts.
func network(h *testHost, id weft.ID, mtu int, ports map[*testHost][]vxlan.Port) vxlan.Network {
	n := vxlan.Network{ID: id, VNI: testVNI, Subnets: []netip.Prefix{netip.MustParsePrefix("10.100.0.0/24"), netip.MustParsePrefix("fd77::/64")},
		MTU: mtu, VTEP: h.vtep(), Port: testPort, Ports: ports[h]}
	for other, ps := range ports {
		for _, p := range ps {
			if other != h {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: p.Addr.Addr(), MAC: p.MAC, VTEP: other.vtep()})
			}
		}
	}
	return n
}

func state(ns ...vxlan.Network) vxlan.State {
	s := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for _, n := range ns {
		s.Networks[n.VNI] = n
	}
	return s
}

// mesh makes hosts with two tasks each and applies one network on all.
type mesh struct {
	hosts []*testHost
	want  map[*testHost]vxlan.State
	ports map[*testHost][]vxlan.Port
}

func newMesh(t testing.TB, p plan, v6 bool) mesh {
	t.Helper()
	return meshOf(t, p, rig(t, p), v6)
}

func meshOf(t testing.TB, p plan, hosts []*testHost, v6 bool) mesh {
	t.Helper()
	m := mesh{hosts: hosts, want: map[*testHost]vxlan.State{}, ports: map[*testHost][]vxlan.Port{}}
	for _, h := range m.hosts {
		m.ports[h] = []vxlan.Port{h.task(1, v6), h.task(2, v6)}
	}
	id := weft.NewID()
	under := p.mtu
	if under == 0 {
		under = underMTU
	}
	for _, h := range m.hosts {
		mtu, err := vxlan.MTU(under, h.vtep())
		must(t, err)
		m.want[h] = state(network(h, id, mtu, m.ports))
		must(t, h.apply(m.want[h]))
	}
	return m
}

// all tries every pair of tasks.
func (m mesh) all(t testing.TB, try func(from, to vxlan.Port) error) {
	t.Helper()
	for _, from := range m.ports {
		for _, a := range from {
			for _, to := range m.ports {
				for _, b := range to {
					if a.Task == b.Task {
						continue
					}
					if err := try(a, b); err != nil {
						t.Fatalf("%s to %s: %v", a.Addr, b.Addr, err)
					}
				}
			}
		}
	}
}

func expectEqual(t testing.TB, h *testHost, want vxlan.State) {
	t.Helper()
	if ops := vxlan.Diff(h.read(), want); len(ops) != 0 {
		t.Fatalf("host %d: still to do: %v", h.i, ops)
	}
}

// limit bounds one exchange.
const limit = 3 * time.Second

// overTCP sends a million bytes to an address in another namespace and back.
func overTCP(from, to vxlan.Port) error { return tcpFrom(from.NetNS, to) }

func tcpFrom(from string, to vxlan.Port) error {
	var l net.Listener
	err := netns.Do(to.NetNS, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(to.Addr.Addr(), 7000).String())
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_, err = io.Copy(c, c)
		served <- err
	}()
	err = netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), limit)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(limit))
		msg := make([]byte, 1_000_000)
		for i := range msg {
			msg[i] = byte(i * 7)
		}
		go c.Write(msg) // ends with the connection's deadline
		got := make([]byte, len(msg))
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if string(got) != string(msg) {
			return errors.New("the bytes came back changed")
		}
		return nil
	})
	l.Close()
	<-served
	return err
}

// overUDP sends datagrams of several sizes, up to fragments, and back.
func overUDP(from, to vxlan.Port) error {
	var s net.PacketConn
	err := netns.Do(to.NetNS, func() (err error) {
		s, err = net.ListenPacket("udp", netip.AddrPortFrom(to.Addr.Addr(), 7001).String())
		return err
	})
	if err != nil {
		return err
	}
	defer s.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		buf := make([]byte, 65536)
		for {
			n, a, err := s.ReadFrom(buf)
			if err != nil {
				return
			}
			s.WriteTo(buf[:n], a)
		}
	}()
	err = netns.Do(from.NetNS, func() error {
		c, err := net.Dial("udp", s.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		for _, size := range []int{1, 18, 1000, 1400, 5000, 30000} {
			c.SetDeadline(time.Now().Add(limit))
			msg := make([]byte, size)
			for i := range msg {
				msg[i] = byte(i * 5)
			}
			if _, err := c.Write(msg); err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
			got := make([]byte, 65536)
			n, err := c.Read(got)
			if err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
			if string(got[:n]) != string(msg) {
				return fmt.Errorf("%d bytes came back changed", size)
			}
		}
		return nil
	})
	s.Close()
	<-served
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pingPong sends bytes both ways over a connection.
func pingPong(a, b net.Conn) error {
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		way[0].SetDeadline(time.Now().Add(limit))
		way[1].SetDeadline(time.Now().Add(limit))
		if _, err := way[0].Write([]byte("ping")); err != nil {
			return err
		}
		if _, err := io.ReadFull(way[1], make([]byte, 4)); err != nil {
			return err
		}
	}
	return nil
}

func writeSysctl(file, value string) error { return os.WriteFile(file, []byte(value), 0o644) }
