package bpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

func TestConformance(t *testing.T) { eachWay(t, testConformance) }

func testConformance(t *testing.T, way string) {
	h := rig(t, plan{way: way, hosts: 1})[0]
	n := network(h, weft.NewID(), 1450, map[*testHost][]vxlan.Port{h: {h.task(1, false)}})
	peer, vip := netip.MustParseAddr("10.100.0.21"), netip.MustParseAddr("10.100.0.200")
	n.Peers = []vxlan.Peer{{Addr: peer, MAC: weft.EndpointMAC("u", peer), VTEP: netip.MustParseAddr("10.99.8.2")}}
	n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("s", vip)}}
	vxlantest.Conformance(t, inHost{h}, n)
}

// inHost is the engine of a host for callers elsewhere.
type inHost struct{ h *testHost }

func (k inHost) Read(ctx context.Context) (st vxlan.State, err error) {
	err = k.h.ns.Do(func() error { st, err = k.h.k.Read(ctx); return err })
	return st, err
}

func (k inHost) Apply(ctx context.Context, want vxlan.State) error {
	return k.h.ns.Do(func() error { return k.h.k.Apply(ctx, want) })
}

// TestPacketsCross: both families inside and outside, alone and beside the
// bridge engine, at the sizes of Ethernet and of jumbo frames.
func TestPacketsCross(t *testing.T) { eachWay(t, testPacketsCross) }

func testPacketsCross(t *testing.T, way string) {
	for i, c := range []struct {
		name string
		plan plan
		v6   bool
	}{
		{"ipv4 in ipv4", plan{way: way, hosts: 2}, false},
		{"ipv6 in ipv4", plan{way: way, hosts: 2}, true},
		{"ipv4 in ipv6", plan{way: way, hosts: 2, under6: true}, false},
		{"with the bridge engine, ipv6", plan{way: way, hosts: 2, bridges: []int{2}}, true},
		{"ipv6 in ipv6", plan{way: way, hosts: 2, under6: true}, true},
		{"jumbo", plan{way: way, hosts: 2, mtu: 9000}, false},
		{"with the bridge engine", plan{way: way, hosts: 2, bridges: []int{2}}, false},
		{"with the bridge engine over ipv6", plan{way: way, hosts: 2, under6: true, bridges: []int{2}}, false},
	} {
		if way != AttachTCX && i > 3 {
			break // the programs are the same
		}
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t, c.plan, c.v6)
			for _, h := range m.hosts {
				expectEqual(t, h, m.want[h])
			}
			t.Run("tcp", func(t *testing.T) { m.all(t, overTCP) })
			t.Run("udp", func(t *testing.T) { m.all(t, overUDP) })
			if t.Failed() {
				for _, h := range m.hosts {
					if !h.bridge {
						fmt.Println(h.i, h.drops())
					}
				}
			}
		})
	}
}

func TestProbe(t *testing.T) { eachWay(t, testProbe) }

func testProbe(t *testing.T, way string) {
	h := rig(t, plan{way: way, hosts: 1})[0]
	must(t, h.ns.Do(func() error { return h.engine().Probe(context.Background()) }))
}

// TestChoice: without a wish it is tcx and netkit where those work, and the reason
// for anything else is told.
func TestChoice(t *testing.T) {
	netnstest.NeedRoot(t)
	e, err := New(Config{Node: "n", Dir: "/run/none", Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	must(t, e.Probe(t.Context()))
	b, err := e.build()
	must(t, err)
	attach, ports, notes := AttachTCX, PortsNetkit, []string{}
	if isTooOld(t, AttachTCX) {
		attach, notes = AttachClsact, append(notes, "no tcx")
	}
	if isTooOld(t, PortsNetkit) {
		ports, notes = PortsVeth, append(notes, "no netkit pair works here")
	}
	if b.attach != attach || b.ports != ports {
		t.Errorf("chosen are %s and %s, want %s and %s", b.attach, b.ports, attach, ports)
	}
	for _, n := range notes {
		if !strings.Contains(e.Note(), n) {
			t.Errorf("the note is %q, want one with %q", e.Note(), n)
		}
	}
	if len(notes) == 0 && e.Note() != "" {
		t.Errorf("the note is %q, want none", e.Note())
	}
}

// TestHostLegReachesTasks: the host's own port, to tasks of both hosts, beside
// either engine.
func TestHostLegReachesTasks(t *testing.T) { eachWay(t, testHostLegReachesTasks) }

func testHostLegReachesTasks(t *testing.T, way string) {
	for _, bridges := range [][]int{nil, {2}} {
		t.Run(fmt.Sprintf("bridges=%v", bridges), func(t *testing.T) {
			m := newMesh(t, plan{way: way, hosts: 2, bridges: bridges}, false)
			legs := []vxlan.HostLeg{}
			for i, h := range m.hosts {
				a := netip.AddrFrom4([4]byte{10, 100, 0, byte(240 + i)})
				n := m.want[h].Networks[testVNI]
				n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(a, 24), MAC: weft.NodeMAC(h.node, a)}
				legs = append(legs, *n.HostLeg)
				m.want[h] = state(n)
			}
			for i, h := range m.hosts {
				n := m.want[h].Networks[testVNI]
				n.Peers = append(n.Peers, vxlan.Peer{Addr: legs[1-i].Addr.Addr(), MAC: legs[1-i].MAC, VTEP: m.hosts[1-i].vtep()})
				m.want[h] = state(n)
				must(t, h.apply(m.want[h]))
				expectEqual(t, h, m.want[h])
			}
			for _, from := range m.hosts {
				for _, to := range m.hosts {
					if err := tcpFrom(from.path, m.ports[to][0]); err != nil {
						t.Errorf("leg of host %d to a task of host %d: %v", from.i, to.i, err)
					}
				}
			}
			h := m.hosts[0]
			n := m.want[h].Networks[testVNI]
			n.HostLeg = nil
			must(t, h.apply(state(n)))
			expectEqual(t, h, state(n))
		})
	}
}

func TestForeignLinksAreRefused(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	n := network(h, weft.NewID(), 1450, nil)
	a := netip.MustParsePrefix("10.100.0.240/24")
	n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: a, MAC: weft.NodeMAC(h.node, a.Addr())}
	for _, name := range []string{weft.TunnelName(testPort), weft.IngressLeg} {
		must(t, h.ns.Do(func() error {
			return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
		}))
		if err := h.apply(state(n)); !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v", err)
		}
		must(t, h.inHost(name, netlink.LinkDel))
	}
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

func TestDeadTaskHarmsOnlyItself(t *testing.T) { eachWay(t, testDeadTaskHarmsOnlyItself) }

func testDeadTaskHarmsOnlyItself(t *testing.T, way string) {
	h := rig(t, plan{way: way, hosts: 1})[0]
	good, dead := h.task(1, false), h.task(2, false)
	must(t, netns.Remove(dead.NetNS))
	n := network(h, weft.NewID(), 1450, map[*testHost][]vxlan.Port{h: {dead, good}})
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
	h := rig(t, plan{hosts: 1})[0]
	var c net.PacketConn
	must(t, h.ns.Do(func() (err error) { c, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", testPort)); return err }))
	defer c.Close()
	n := network(h, weft.NewID(), 1450, nil)
	err := h.apply(state(n))
	if !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("got %v", err)
	}
	c.Close()
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

func TestChangeInPlace(t *testing.T) { eachWay(t, testChangeInPlace) }

func testChangeInPlace(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	for _, h := range m.hosts {
		n := m.want[h].Networks[testVNI]
		n.Port = 4791 // alone
		must(t, h.apply(state(n)))
		expectEqual(t, h, state(n))
		n.MTU, n.Port, n.Subnets = 1400, 4790, n.Subnets[:1]
		must(t, h.apply(state(n)))
		expectEqual(t, h, state(n))
		must(t, h.ns.Do(func() error {
			if _, err := netlink.LinkByName(weft.TunnelName(testPort)); err == nil {
				t.Error("the device of the old UDP port is left")
			}
			return nil
		}))
	}
	m.all(t, overTCP)
	h := m.hosts[0]
	n := m.want[h].Networks[testVNI]
	if got := h.repairs(); len(got) > 0 {
		t.Errorf("repaired: %v", got)
	}
	n.ID = weft.NewID() // the VNI now belongs to another network
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

// TestReusedAddressReachesNoOneElse: who still has the old task's hardware
// address for an address that another task got since reaches nobody.
func TestReusedAddressReachesNoOneElse(t *testing.T) { eachWay(t, testReusedAddressReachesNoOneElse) }

func testReusedAddressReachesNoOneElse(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	client, old := m.ports[h][0], m.ports[other][0]
	must(t, overTCP(client, old)) // the client has resolved it now
	next := other.task(1, false)
	for next.MAC.String() == old.MAC.String() { // one in 256
		next = other.task(1, false)
	}
	m.ports[other][0] = next
	for _, x := range m.hosts {
		n := m.want[x].Networks[testVNI]
		must(t, x.apply(state(network(x, n.ID, n.MTU, m.ports))))
	}
	before := h.drops()["unknown destination"]
	frame := udpFrame(client, old, 7003, "stale", 20)
	rawSend(t, client.NetNS, "eth0", frame)
	if !eventually(func() bool { return h.drops()["unknown destination"] > before }) {
		t.Errorf("the stale address was not dropped: %v", h.drops())
	}
	must(t, netns.Do(client.NetNS, func() error {
		return netlink.NeighDel(&netlink.Neigh{LinkIndex: linkIndex(t, "eth0"), IP: old.Addr.Addr().AsSlice()})
	}))
	must(t, overTCP(client, next))
}

func linkIndex(t *testing.T, name string) int {
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l.Attrs().Index
}

// TestProbeNamesWhatIsMissing: where no program can be loaded the error says so,
// as one that the choice of engines understands.
func TestProbeNamesWhatIsMissing(t *testing.T) {
	e, err := New(Config{Node: "n", Dir: "/run/none", Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	e.build = func() (build, error) { return build{}, unsupported("load a classifier program", unix.EPERM) }
	err = e.Probe(context.Background())
	if !errors.Is(err, weft.ErrUnsupported) || !strings.Contains(err.Error(), "overlay engine ebpf") {
		t.Errorf("got %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, c := range []Config{{}, {Node: "n", Dir: "relative", Log: log}, {Node: "a.b", Dir: "/run/x", Log: log}, {Node: "n", Dir: "/run/x"}, {Node: "n", Dir: "/run/x", Log: log, Attach: "glue"}, {Node: "n", Dir: "/run/x", Log: log, Ports: "glue"}} {
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%+v: got %v, want ErrInvalid", c, err)
		}
	}
}

func BenchmarkApply(b *testing.B) {
	h := rig(b, plan{hosts: 1})[0]
	empty := network(h, weft.NewID(), 1450, nil)
	full := empty
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 100, byte(i >> 8), byte(i)}).Next()
		full.Peers = append(full.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: netip.AddrFrom4([4]byte{10, 99, 8, byte(2 + i%9)})})
	}
	one := full
	one.Peers = append([]vxlan.Peer(nil), full.Peers...)
	one.Peers[500].VTEP = netip.AddrFrom4([4]byte{10, 99, 8, 77})
	b.Run("add-1000", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			must(b, h.apply(state(empty)))
			b.StartTimer()
			must(b, h.apply(state(full)))
		}
	})
	b.Run("change-1-of-1000", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			must(b, h.apply(state([]vxlan.Network{one, full}[i%2])))
		}
	})
	b.Run("nothing-to-do", func(b *testing.B) {
		must(b, h.apply(state(full)))
		for b.Loop() {
			must(b, h.apply(state(full)))
		}
	})
}
