package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// two makes two hosts with two tasks each and applies the network.
func two(t testing.TB, v6 bool) (hosts []*host, want map[*host]vxlan.State, ports map[*host][]vxlan.Port) {
	hosts = rig(t, 2)
	ports = map[*host][]vxlan.Port{}
	for _, h := range hosts {
		ports[h] = []vxlan.Port{h.task(1, v6), h.task(2, v6)}
	}
	id := weft.NewID()
	want = map[*host]vxlan.State{}
	for _, h := range hosts {
		want[h] = state(network(h, id, ports))
		must(t, h.apply(want[h]))
	}
	return hosts, want, ports
}

func expectEqual(t testing.TB, h *host, want vxlan.State) {
	t.Helper()
	if ops := vxlan.Diff(h.read(), want); len(ops) != 0 {
		t.Fatalf("host %d: still to do: %v", h.i, ops)
	}
}

func meshWorks(t testing.TB, ports map[*host][]vxlan.Port) {
	t.Helper()
	for _, from := range ports {
		for _, a := range from {
			for _, to := range ports {
				for _, b := range to {
					if a.Task == b.Task {
						continue
					}
					if err := exchange(a.NetNS, b); err != nil {
						t.Fatalf("%s to %s: %v", a.Addr, b.Addr, err)
					}
				}
			}
		}
	}
}

// tunnel returns the VXLAN device with its counters.
func (h *host) tunnel() netlink.Link {
	h.t.Helper()
	var l netlink.Link
	must(h.t, netns.Do(h.k.path(testVNI), func() (err error) {
		l, err = netlink.LinkByName(weft.VXLANName(testVNI))
		return err
	}))
	return l
}

func TestPacketsCross(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("ipv6=%v", v6), func(t *testing.T) {
			hosts, want, ports := two(t, v6)
			for _, h := range hosts {
				expectEqual(t, h, want[h])
			}
			meshWorks(t, ports)
			for _, h := range hosts {
				s := h.tunnel().Attrs().Statistics
				if s.TxPackets == 0 || s.RxPackets == 0 {
					t.Errorf("host %d: nothing crossed the VXLAN device: %+v", h.i, s)
				}
			}
		})
	}
}

func TestUnknownAndVIPStay(t *testing.T) {
	hosts, want, ports := two(t, false)
	h := hosts[0]
	vip := netip.MustParseAddr("10.100.0.200")
	n := want[h].Networks[testVNI]
	n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC(weft.NewID(), vip)}}
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
	before := h.tunnel().Attrs().Statistics.TxPackets
	a := ports[h][0]
	// The VIP is answered for, an unknown address is not; neither leaves.
	for _, to := range []string{"10.100.0.200", "10.100.0.201", "10.100.0.255"} {
		must(t, netns.Do(a.NetNS, func() error {
			c, err := net.Dial("udp", net.JoinHostPort(to, "9"))
			if err != nil {
				return nil // broadcast is refused to us: fine
			}
			defer c.Close()
			for range 3 {
				c.Write([]byte("x"))
			}
			return nil
		}))
	}
	// The answer comes by a softirq, which on a busy machine has its time.
	var got net.HardwareAddr
	for end := time.Now().Add(5 * time.Second); got == nil && time.Now().Before(end); <-time.After(5 * time.Millisecond) {
		must(t, netns.Do(a.NetNS, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			ns, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
			for _, e := range ns {
				if e.IP.String() == vip.String() {
					got = e.HardwareAddr
				}
			}
			return err
		}))
	}
	if got.String() != n.VIPs[0].MAC.String() {
		t.Errorf("the VIP resolved to %q, want %q", got, n.VIPs[0].MAC)
	}
	if s := h.tunnel().Attrs().Statistics; s.TxPackets != before {
		t.Errorf("%d packets left the host", s.TxPackets-before)
	}
}

func TestRepair(t *testing.T) {
	hosts, want, ports := two(t, false)
	h := hosts[0]
	peer := want[h].Networks[testVNI].Peers[0]
	hidden := func(f func(br, vx netlink.Link) error) func() error {
		return func() error {
			return netns.Do(h.k.path(testVNI), func() error {
				br, err := netlink.LinkByName(weft.BridgeName(testVNI))
				if err != nil {
					return err
				}
				vx, err := netlink.LinkByName(weft.VXLANName(testVNI))
				if err != nil {
					return err
				}
				return f(br, vx)
			})
		}
	}
	task := func(f func(l netlink.Link) error) func() error {
		return func() error {
			return netns.Do(ports[h][0].NetNS, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return f(l)
			})
		}
	}
	self := netlink.Neigh{Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, HardwareAddr: peer.MAC}
	for _, c := range []struct {
		name   string
		kind   string // of the one repair
		reason string // is in it
		spoil  func() error
	}{
		{"neighbour gone", "neighbour missing", "gone", hidden(func(br, _ netlink.Link) error {
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: br.Attrs().Index, IP: peer.Addr.AsSlice()})
		})},
		{"neighbour wrong", "neighbour wrong", "02:00:00:00:00:09", hidden(func(br, _ netlink.Link) error {
			return netlink.NeighSet(&netlink.Neigh{LinkIndex: br.Attrs().Index, State: netlink.NUD_PERMANENT, IP: peer.Addr.AsSlice(), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}})
		})},
		{"stray neighbour", "neighbour stray", peer.MAC.String(), hidden(func(br, _ netlink.Link) error {
			return netlink.NeighSet(&netlink.Neigh{LinkIndex: br.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.IPv4(10, 100, 0, 99), HardwareAddr: peer.MAC})
		})},
		{"wrong VTEP", "fdb wrong", "10.99.7.77", hidden(func(_, vx netlink.Link) error {
			e := self
			e.LinkIndex, e.State, e.IP = vx.Attrs().Index, staticState, net.IPv4(10, 99, 7, 77)
			return netlink.NeighSet(&e)
		})},
		{"device entry gone", "fdb wrong", "nowhere", hidden(func(_, vx netlink.Link) error {
			e := self
			e.LinkIndex, e.IP = vx.Attrs().Index, net.IPv4zero
			return netlink.NeighDel(&e)
		})},
		{"bridge entry gone", "fdb wrong", "halves", hidden(func(_, vx netlink.Link) error {
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: peer.MAC})
		})},
		{"both entries gone", "fdb missing", "gone", hidden(func(_, vx netlink.Link) error {
			e := self
			e.LinkIndex, e.IP = vx.Attrs().Index, net.IPv4zero
			return errors.Join(netlink.NeighDel(&e), netlink.NeighDel(&netlink.Neigh{LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: peer.MAC}))
		})},
		{"stray entry", "fdb stray", "10.99.7.77", hidden(func(_, vx netlink.Link) error {
			return netlink.NeighSet(&netlink.Neigh{LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, State: staticState,
				Flags: netlink.NTF_MASTER | netlink.NTF_SELF, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}, IP: net.IPv4(10, 99, 7, 77)})
		})},
		{"learning on", "device wrong", "learning:true", hidden(func(_, vx netlink.Link) error { return netlink.LinkSetLearning(vx, true) })},
		{"device gone", "device missing", "gone", hidden(func(_, vx netlink.Link) error { return netlink.LinkDel(vx) })},
		{"device down", "device wrong", "down", hidden(func(_, vx netlink.Link) error { return netlink.LinkSetDown(vx) })},
		{"device off the bridge", "device wrong", "not on the bridge", hidden(func(_, vx netlink.Link) error { return netlink.LinkSetNoMaster(vx) })},
		{"bridge down", "network wrong", "down", hidden(func(br, _ netlink.Link) error { return netlink.LinkSetDown(br) })},
		{"bridge snoops", "network wrong", "snooping", hidden(func(br, _ netlink.Link) error { return netlink.BridgeSetMcastSnoop(br, true) })},
		{"bridge gone", "network wrong", "gone", hidden(func(br, _ netlink.Link) error { return netlink.LinkDel(br) })},
		{"MTU", "network wrong", "1300", hidden(func(_, vx netlink.Link) error { return netlink.LinkSetMTU(vx, 1300) })},
		{"MTU of the bridge", "network wrong", "1300", hidden(func(br, _ netlink.Link) error { return netlink.LinkSetMTU(br, 1300) })},
		{"port gone", "port missing", "gone", task(func(l netlink.Link) error { return netlink.LinkDel(l) })},
		{"port down", "port wrong", "down", task(func(l netlink.Link) error { return netlink.LinkSetDown(l) })},
		{"port MTU", "port wrong", "1300", task(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })},
		{"port MAC", "port wrong", "static entry", task(func(l netlink.Link) error {
			return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 1})
		})},
		{"port address", "port wrong", "more addresses", task(func(l netlink.Link) error {
			return netlink.AddrReplace(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("10.100.0.250/24"))})
		})},
		{"port off the bridge", "port wrong", "not on the bridge", hidden(func(_, _ netlink.Link) error {
			l, err := netlink.LinkByName(weft.PortVethName(ports[h][0].Task, want[h].Networks[testVNI].ID))
			if err != nil {
				return err
			}
			return netlink.LinkSetNoMaster(l)
		})},
		{"namespace unmounted", "network missing", "gone", func() error { return unix.Unmount(h.k.path(testVNI), unix.MNT_DETACH) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.spoil()
			if errors.Is(err, unix.EOPNOTSUPP) {
				t.Logf("this kernel cannot be damaged so: %v", err)
				return
			}
			must(t, err)
			if ops := vxlan.Diff(h.read(), want[h]); len(ops) == 0 {
				t.Fatal("the damage is not seen")
			}
			h.taken()
			// The kernel takes a namespace down behind our back; the VNI is
			// free again when it is done.
			err = h.apply(want[h])
			for i := 0; err != nil && errors.Is(err, weft.ErrConflict) && i < 2000; i++ {
				err = h.apply(want[h])
			}
			must(t, err)
			expectEqual(t, h, want[h])
			must(t, h.apply(want[h]))
			if rs := h.taken(); len(rs) != 1 || rs[0].Kind != c.kind || !strings.Contains(rs[0].Reason, c.reason) || rs[0].Object == "" {
				t.Errorf("repairs %+v, want one %q because of %q", rs, c.kind, c.reason)
			}
			if err := exchange(ports[h][0].NetNS, ports[hosts[1]][0]); err != nil {
				t.Error(err)
			}
		})
	}
}

// What somebody breaks while no daemon runs cannot be told from a wish that has
// changed meanwhile, unless no wish explains it.
func TestRepairsOfANewProcess(t *testing.T) {
	hosts, want, _ := two(t, false)
	h := hosts[0]
	peer := want[h].Networks[testVNI].Peers[0]
	k, err := New(h.k.cfg)
	must(t, err)
	h.k = k
	must(t, netns.Do(h.k.path(testVNI), func() error {
		br, err := netlink.LinkByName(weft.BridgeName(testVNI))
		if err != nil {
			return err
		}
		vx, err := netlink.LinkByName(weft.VXLANName(testVNI))
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetDown(vx), netlink.NeighDel(&netlink.Neigh{LinkIndex: br.Attrs().Index, IP: peer.Addr.AsSlice()}))
	}))
	h.taken()
	must(t, h.apply(want[h]))
	expectEqual(t, h, want[h])
	if rs := h.taken(); len(rs) != 1 || rs[0].Kind != "device wrong" {
		t.Errorf("repairs %+v, want the device alone", rs)
	}
}

func TestBreakOffAnywhere(t *testing.T) {
	hosts := rig(t, 1)
	h := hosts[0]
	other := &host{t: t, i: 2}
	ports := map[*host][]vxlan.Port{h: {h.task(1, false), h.task(2, false)}}
	n := network(h, weft.NewID(), ports)
	for i := range 3 {
		a := netip.AddrFrom4([4]byte{10, 100, 0, byte(100 + i)})
		n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: other.vtep()})
	}
	n.HostLeg = &vxlan.HostLeg{Name: "leg0", Addr: netip.MustParsePrefix("10.100.0.250/24"), MAC: weft.NodeMAC("n", netip.MustParseAddr("10.100.0.250"))}
	broken := errors.New("broken off")
	for _, target := range []vxlan.State{state(n), {}} {
		for at := 1; ; at++ {
			// Every run starts from the opposite of its target.
			start := state(n)
			if len(target.Networks) > 0 {
				start = vxlan.State{}
			}
			must(t, h.apply(start))
			count := 0
			ctx, cancel := context.WithCancel(context.Background())
			h.k.cfg.fail = func(vxlan.Op) error {
				if count++; count >= at {
					cancel()
					return broken
				}
				return nil
			}
			err := h.ns.Do(func() error { return h.k.Apply(ctx, target) })
			cancel()
			h.k.cfg.fail = nil
			if err == nil {
				break // at is past the last operation
			}
			if !errors.Is(err, broken) {
				t.Fatal(err)
			}
			must(t, h.apply(target))
			expectEqual(t, h, target)
		}
	}
	if names, err := netns.List(h.dir, weft.NetNSPrefix(h.node)+"n"); err != nil || len(names) != 0 {
		t.Errorf("left behind: %v %v", names, err)
	}
	must(t, h.ns.Do(func() error {
		ls, err := netlink.LinkList()
		for _, l := range ls {
			if l.Attrs().Name != "lo" && l.Attrs().Name != "under0" {
				t.Errorf("left behind: %s", l.Attrs().Name)
			}
		}
		return err
	}))
}

func TestHostLegReachesTasks(t *testing.T) {
	hosts, want, ports := two(t, false)
	legs := []vxlan.HostLeg{}
	for i, h := range hosts {
		a := netip.AddrFrom4([4]byte{10, 100, 0, byte(240 + i)})
		n := want[h].Networks[testVNI]
		n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(a, 24), MAC: weft.NodeMAC(h.node, a)}
		legs = append(legs, *n.HostLeg)
		want[h] = state(n)
	}
	for i, h := range hosts {
		n := want[h].Networks[testVNI]
		n.Peers = append(n.Peers, vxlan.Peer{Addr: legs[1-i].Addr.Addr(), MAC: legs[1-i].MAC, VTEP: hosts[1-i].vtep()})
		want[h] = state(n)
		must(t, h.apply(want[h]))
		expectEqual(t, h, want[h])
	}
	path := strings.Replace(hosts[0].dir, "n1", "h1", 1)
	for _, h := range hosts {
		if err := exchange(path, ports[h][0]); err != nil {
			t.Errorf("host leg to %s: %v", ports[h][0].Addr, err)
		}
	}
}

func TestForeignLegIsRefused(t *testing.T) {
	h := rig(t, 1)[0]
	must(t, h.ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: weft.IngressLeg}})
	}))
	n := network(h, weft.NewID(), nil)
	a := netip.MustParsePrefix("10.100.0.240/24")
	n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: a, MAC: weft.NodeMAC(h.node, a.Addr())}
	if err := h.apply(state(n)); !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), weft.IngressLeg) {
		t.Errorf("got %v", err)
	}
}

func TestDeadTaskHarmsOnlyItself(t *testing.T) {
	h := rig(t, 1)[0]
	good, dead := h.task(1, false), h.task(2, false)
	must(t, netns.Remove(dead.NetNS))
	n := network(h, weft.NewID(), map[*host][]vxlan.Port{h: {dead, good}})
	err := h.apply(state(n))
	if !errors.Is(err, weft.ErrNotFound) || !strings.Contains(err.Error(), dead.Task.Short()) {
		t.Errorf("got %v", err)
	}
	var one *vxlan.NetworkError
	if !errors.As(err, &one) || one.VNI != n.VNI {
		t.Errorf("the error does not tell whose it is: %#v", err)
	}
	n.Ports = []vxlan.Port{good}
	expectEqual(t, h, state(n))
}

func TestTakenPortIsNamed(t *testing.T) {
	h := rig(t, 1)[0]
	var c net.PacketConn
	must(t, h.ns.Do(func() (err error) { c, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", testPort)); return err }))
	defer c.Close()
	err := h.apply(state(network(h, weft.NewID(), nil)))
	if !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("got %v", err)
	}
	if st := h.read(); len(st.Networks) != 0 {
		t.Errorf("half made: %v", st)
	}
}

func TestChangeInPlace(t *testing.T) {
	hosts, want, ports := two(t, false)
	for _, h := range hosts {
		n := want[h].Networks[testVNI]
		n.MTU, n.Port, n.Subnets = 1400, 4790, n.Subnets[:1]
		must(t, h.apply(state(n)))
		expectEqual(t, h, state(n))
	}
	meshWorks(t, ports)
	h := hosts[0]
	n := want[h].Networks[testVNI]
	n.ID = weft.NewID() // the VNI now belongs to another network
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

func TestHostFacts(t *testing.T) {
	h := rig(t, 1)[0]
	must(t, h.ns.Do(func() error {
		if mtu, err := UnderlayMTU(h.vtep()); mtu != 1500 || err != nil {
			t.Errorf("UnderlayMTU: %d, %v", mtu, err)
		}
		if _, err := UnderlayMTU(netip.MustParseAddr("192.0.2.1")); !errors.Is(err, weft.ErrNotFound) {
			t.Errorf("UnderlayMTU of a foreign address: %v", err)
		}
		ps, err := HostPrefixes()
		found := false
		for _, p := range ps {
			found = found || p == netip.MustParsePrefix("10.99.7.0/24")
		}
		if err != nil || !found {
			t.Errorf("HostPrefixes: %v, %v", ps, err)
		}
		bindable, err := HostAddrs()
		if err != nil || len(bindable) != 1 || bindable[0].Addr != h.vtep() || bindable[0].Interface == "" {
			t.Errorf("HostAddrs: %v, %v", bindable, err)
		}
		as, err := AddrCandidates()
		if err != nil || len(as) != 1 || as[0] != h.vtep() {
			t.Errorf("AddrCandidates: %v, %v", as, err)
		}
		return nil
	}))
}

func BenchmarkApply1000Peers(b *testing.B) {
	h := rig(b, 1)[0]
	h.k.cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	empty := network(h, weft.NewID(), nil)
	full := empty
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 100, byte(i >> 8), byte(i)})
		full.Peers = append(full.Peers, vxlan.Peer{Addr: a.Next(), MAC: weft.EndpointMAC("x", a.Next()), VTEP: netip.AddrFrom4([4]byte{10, 99, 7, byte(2 + i%9)})})
	}
	b.Run("add", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			must(b, h.apply(state(empty)))
			b.StartTimer()
			must(b, h.apply(state(full)))
		}
	})
	b.Run("change-1", func(b *testing.B) {
		must(b, h.apply(state(full)))
		var took []time.Duration
		for i := 0; b.Loop(); i++ {
			n := full
			n.Peers = append([]vxlan.Peer(nil), full.Peers...)
			n.Peers[500].MAC = weft.EndpointMAC(weft.ID(fmt.Sprint(i)), n.Peers[500].Addr)
			start := time.Now()
			must(b, h.apply(state(n)))
			took = append(took, time.Since(start))
		}
		// The mean has the whole pass that is due every expressFor.
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "median-ms")
	})
	b.Run("nothing-to-do", func(b *testing.B) {
		must(b, h.apply(state(full)))
		for b.Loop() {
			must(b, h.apply(state(full)))
		}
	})
}

func TestConformance(t *testing.T) {
	h := rig(t, 1)[0]
	n := network(h, weft.NewID(), map[*host][]vxlan.Port{h: {h.task(1, false)}})
	peer, vip := netip.MustParseAddr("10.100.0.21"), netip.MustParseAddr("10.100.0.200")
	n.Peers = []vxlan.Peer{{Addr: peer, MAC: weft.EndpointMAC("u", peer), VTEP: netip.MustParseAddr("10.99.7.2")}}
	n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("s", vip)}}
	must(t, h.ns.Do(func() error { vxlantest.Conformance(t, h.k, n); return nil }))
}

// The probe leaves nothing, finds what a killed one left, and disturbs nobody.
func TestProbe(t *testing.T) {
	h := rig(t, 1)[0]
	n := network(h, weft.NewID(), nil)
	must(t, h.apply(state(n)))
	probe := func(ctx context.Context) error { return h.ns.Do(func() error { return h.k.Probe(ctx) }) }
	h.k.lockless.Store(true) // what a probe sees counts, not what was thought before
	must(t, probe(context.Background()))
	if n := h.k.Note(); n != "" {
		t.Errorf("the note is %q on a kernel that locks ports", n)
	}
	for _, name := range []string{probeHost, weft.OverlayNetNS(probeNode, probeVNI)} {
		_, err := netns.Create(h.dir, name)
		must(t, err)
	}
	must(t, probe(context.Background()))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := probe(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if names, err := netns.List(h.dir, ""); err != nil || len(names) != 1 {
		t.Errorf("namespaces %v, %v; want that of the network alone", names, err)
	}
	expectEqual(t, h, state(n))
	must(t, h.apply(state(n)))
	if rs := h.taken(); len(rs) != 0 {
		t.Errorf("the probe's doings were counted: %v", rs)
	}
}

func BenchmarkProbe(b *testing.B) {
	h := rig(b, 1)[0]
	for b.Loop() {
		must(b, h.ns.Do(func() error { return h.k.Probe(context.Background()) }))
	}
}
