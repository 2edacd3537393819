package bpf

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// pinnedMap opens one of a host's maps as anybody could.
func (h *testHost) pinnedMap(name string) *ebpf.Map {
	h.t.Helper()
	m, err := ebpf.LoadPinnedMap(h.engine().path(name), nil)
	must(h.t, err)
	h.t.Cleanup(func() { m.Close() })
	return m
}

// inHost runs f in the host's namespace with a link of it.
func (h *testHost) inHost(name string, f func(netlink.Link) error) error {
	return h.ns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return f(l)
	})
}

func TestRepair(t *testing.T) { eachWay(t, testRepair) }

func testRepair(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	n := m.want[h].Networks[testVNI]
	n.Peers[1].MTU = 1300 // n shares them with the wish
	peer, port := n.Peers[0], m.ports[h][0]
	must(t, h.apply(m.want[h]))
	h.repairs() // the audit shares the wish, too
	near := weft.PortVethName(port.Task, n.ID)
	peerKey := macKey{VNI: testVNI, MAC: vxlan.MACOf(peer.MAC)}
	portKey := macKey{VNI: testVNI, MAC: vxlan.MACOf(port.MAC)}
	change := func(name string, key, value any) func() error {
		return func() error { return h.pinnedMap(name).Put(key, value) }
	}
	unpin := func(parts ...string) func() error {
		return func() error {
			found, err := filepath.Glob(h.engine().path(parts...))
			if err != nil || len(found) == 0 {
				return errors.Join(err, errors.New("no such pin"))
			}
			for _, f := range found {
				err = errors.Join(err, os.Remove(f))
			}
			return err
		}
	}
	far := func(f func(netlink.Link) error) func() error {
		return func() error {
			return netns.Do(port.NetNS, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return f(l)
			})
		}
	}
	detach := func(name string) func() error { return func() error { return h.detach(name) } }
	type damage struct {
		name  string
		spoil func() error
		want  string // kinds of the repairs, with commas
	}
	own := map[string][]damage{
		AttachTCX: {
			{"link of a port unpinned", unpin("links", near), "port wrong"},
			{"all links unpinned", unpin("links", "*"), "device wrong,device wrong,port wrong,port wrong"},
			{"both at once", func() error {
				return errors.Join(h.inHost("under0", h.addQdisc), h.inHost("under0", h.replaceFilter), unpin("links", "u*")())
			}, "device wrong"},
		},
		AttachClsact: {
			{"qdisc of the underlay gone", func() error { return h.inHost("under0", h.delQdisc) }, "device wrong"},
			{"qdisc of a port gone", func() error { return h.inHost(near, h.delQdisc) }, "port wrong"},
			{"program of the underlay replaced", func() error { return h.inHost("under0", h.replaceFilter) }, "device wrong"},
			{"program of a port replaced", func() error { return h.inHost(near, h.replaceFilter) }, "port wrong"},
		},
		PortsNetkit: {
			{"link of a port unpinned", unpin("netkit", near), "port wrong"},
			{"all links unpinned", func() error { return errors.Join(unpin("links", "*")(), unpin("netkit", "*")()) }, "device wrong,device wrong,port wrong,port wrong"},
			{"link of another pair pinned", func() error { return h.pinAnother(near) }, "port wrong"},
			{"program of a port replaced", func() error {
				l, err := link.LoadPinnedLink(h.engine().path("netkit", near), nil)
				if err != nil {
					return err
				}
				return errors.Join(l.Update(stranger(t)), l.Close())
			}, "port wrong"},
			{"what no program has seen let through", func() error { return h.inHost(near, letThrough) }, "port wrong"},
		},
	}
	for _, c := range append([]damage{
		{"peer gone", func() error { return h.pinnedMap("macs").Delete(peerKey) }, "fdb missing"},
		{"peer elsewhere", change("macs", peerKey, h.remoteTo(t, netip.MustParseAddr("10.99.8.77"))), "fdb wrong"},
		{"peer narrower", change("macs", peerKey, h.wayTo(t, other.vtep(), 1300)), "fdb wrong"},
		{"narrow peer wider", change("macs", macKey{VNI: testVNI, MAC: vxlan.MACOf(n.Peers[1].MAC)}, h.wayTo(t, other.vtep(), 0)), "fdb wrong"},
		{"peer without MTU", func() error {
			d := h.wayTo(t, other.vtep(), 0)
			d.MTU = 0
			return h.pinnedMap("macs").Put(peerKey, d)
		}, "fdb wrong"},
		{"peer garbled", change("macs", peerKey, destValue{Kind: 99, MTU: 3}), "fdb wrong"},
		{"stray peer", change("macs", macKey{VNI: testVNI, MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}}, h.remoteTo(t, other.vtep())), "fdb stray"},
		{"address gone", func() error { return h.pinnedMap("eps").Delete(epKey{VNI: testVNI, Addr: addrOf(peer.Addr)}) }, "neighbour missing"},
		{"address of another", change("eps", epKey{VNI: testVNI, Addr: addrOf(peer.Addr)}, epValue{MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}}), "neighbour wrong"},
		{"stray address", change("eps", epKey{VNI: testVNI, Addr: addrOf(netip.MustParseAddr("10.100.0.99"))}, epValue{MAC: vxlan.MACOf(peer.MAC)}), "neighbour stray"},
		{"second address of a port", change("eps", epKey{VNI: testVNI, Addr: addrOf(netip.MustParseAddr("10.100.0.98"))}, epValue{MAC: vxlan.MACOf(port.MAC)}), "port wrong"},
		{"own entry gone", func() error { return h.pinnedMap("macs").Delete(portKey) }, "port wrong"},
		{"own entry elsewhere", change("macs", portKey, h.remoteTo(t, other.vtep())), "port wrong"},
		{"stray entry to a port", func() error {
			return h.inHost(near, func(l netlink.Link) error {
				var d destValue
				return errors.Join(h.pinnedMap("macs").Lookup(portKey, &d), h.pinnedMap("macs").Put(macKey{VNI: testVNI, MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}}, d))
			})
		}, "fdb stray"},
		{"network of a peer unknown", change("macs", macKey{VNI: testVNI + 1, MAC: peerKey.MAC}, h.remoteTo(t, other.vtep())), "network stray"},
		{"network entry gone", func() error { return h.pinnedMap("nets").Delete(uint32(testVNI)) }, "network missing"},
		{"network entry garbled", change("nets", uint32(testVNI), netValue{MTU: 99}), "network wrong"},
		{"port entry gone", func() error {
			return h.inHost(near, func(l netlink.Link) error { return h.pinnedMap("ports").Delete(uint32(l.Attrs().Index)) })
		}, "port wrong"},
		{"port entry garbled", func() error {
			return h.inHost(near, func(l netlink.Link) error {
				return h.pinnedMap("ports").Put(uint32(l.Attrs().Index), portValue{VNI: testVNI, MAC: vxlan.MACOf(port.MAC)})
			})
		}, "port wrong"},
		{"program of a port detached", detach(near), "port wrong"},
		{"program of the underlay detached", detach("under0"), "device wrong"},
		{"program of the underlay detached and a peer gone", func() error {
			return errors.Join(h.detach("under0"), h.pinnedMap("macs").Delete(peerKey))
		}, "device wrong,fdb missing"},
		{"program of the tunnel detached", detach(weft.TunnelName(testPort)), "device wrong"},
		{"a program unpinned", unpin("progs", "from_task-*"), "program missing"},
		{"a map unpinned", unpin("macs"), "map missing"},
		{"all maps unpinned", func() error {
			return errors.Join(unpin("macs")(), unpin("eps")(), unpin("ports")(), unpin("nets")(), unpin("hooks")(), unpin("counts")(), unpin("natives")(), unpin("echoes")(), unpin("epoch")())
		}, "map missing"},
		{"forward unhooked", func() error { return h.pinnedMap("hooks").Delete(uint32(hookForward)) }, "hook wrong"},
		{"bpffs unmounted", func() error { return unix.Unmount(h.engine().cfg.Dir, unix.MNT_DETACH) }, "map missing"},
		{"near end down", func() error { return h.inHost(near, netlink.LinkSetDown) }, "port wrong"},
		{"near end's MTU", func() error {
			return h.inHost(near, func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })
		}, "port wrong"},
		{"tunnel gone", func() error { return h.inHost(weft.TunnelName(testPort), netlink.LinkDel) }, "device missing"},
		{"tunnel down", func() error { return h.inHost(weft.TunnelName(testPort), netlink.LinkSetDown) }, "device wrong"},
		{"port gone", far(netlink.LinkDel), "port missing"},
		{"port down", far(netlink.LinkSetDown), "port wrong"},
		{"port MTU", far(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) }), "port wrong"},
		{"port MAC", far(func(l netlink.Link) error {
			return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 1})
		}), "port wrong"},
		{"port address", far(func(l netlink.Link) error {
			return netlink.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 100, 0, 250), Mask: net.CIDRMask(24, 32)}})
		}), "port wrong"},
	}, own[way]...) {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			if ops := vxlan.Diff(h.read(), m.want[h]); len(ops) == 0 {
				t.Fatal("the damage is not seen")
			}
			for range 2 { // nothing is counted again
				must(t, h.apply(m.want[h]))
				expectEqual(t, h, m.want[h])
			}
			if got := strings.Join(h.repairs(), ","); got != c.want {
				t.Errorf("repaired %q, want %q", got, c.want)
			}
			if err := overTCP(port, m.ports[other][0]); err != nil {
				t.Errorf("%v; %v", err, h.drops())
			}
			if err := overTCP(m.ports[other][1], port); err != nil {
				t.Errorf("back: %v; %v", err, h.drops())
			}
		})
	}
}

// TestSharedDevicesAreCountedOnce: two networks on one VXLAN device and one
// underlay device.
func TestSharedDevicesAreCountedOnce(t *testing.T) { eachWay(t, testSharedDevices) }

func testSharedDevices(t *testing.T, way string) {
	h := rig(t, plan{way: way, hosts: 1})[0]
	a := network(h, "a", 1450, map[*testHost][]vxlan.Port{h: {h.task(1, false), h.task(2, false)}})
	b := network(h, "b", 1450, map[*testHost][]vxlan.Port{h: {h.task(3, false)}})
	b.VNI++
	want := state(a, b)
	must(t, h.apply(want))
	tunnel := weft.TunnelName(testPort)
	for _, c := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"nothing", func() error { return nil }, ""},
		{"underlay detached", func() error { return h.detach("under0") }, "device wrong"},
		{"tunnel detached", func() error { return h.detach(tunnel) }, "device wrong"},
		{"both detached", func() error { return errors.Join(h.detach("under0"), h.detach(tunnel)) }, "device wrong,device wrong"},
		{"tunnel gone", func() error { return h.inHost(tunnel, netlink.LinkDel) }, "device missing"},
		{"tunnel down", func() error { return h.inHost(tunnel, netlink.LinkSetDown) }, "device wrong"},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			for range 2 {
				must(t, h.apply(want))
				expectEqual(t, h, want)
			}
			if got := strings.Join(h.repairs(), ","); got != c.want {
				t.Errorf("repaired %q, want %q", got, c.want)
			}
			must(t, overTCP(a.Ports[0], a.Ports[1]))
		})
	}
}

// TestChangedRouteIsNoRepair: the entries follow a route at the next pass.
func TestChangedRouteIsNoRepair(t *testing.T) {
	m := newMesh(t, plan{hosts: 3}, false)
	h, other, router := m.hosts[0], m.hosts[1], m.hosts[2]
	must(t, router.ns.Do(func() error {
		return errors.Join(writeSysctl("/proc/sys/net/ipv4/ip_forward", "1"), writeSysctl("/proc/sys/net/ipv4/conf/all/send_redirects", "0"),
			writeSysctl("/proc/sys/net/ipv4/conf/under0/send_redirects", "0"))
	}))
	must(t, h.inHost("under0", func(l netlink.Link) error {
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: router.vtep().AsSlice(),
			Dst: &net.IPNet{IP: other.vtep().AsSlice(), Mask: net.CIDRMask(32, 32)}})
	}))
	must(t, h.apply(m.want[h]))
	expectEqual(t, h, m.want[h])
	if got := h.repairs(); len(got) > 0 {
		t.Errorf("repaired %v", got)
	}
	var d destValue
	must(t, h.pinnedMap("macs").Lookup(macKey{VNI: testVNI, MAC: vxlan.MACOf(m.ports[other][0].MAC)}, &d))
	via := router.vtep().As4()
	if d.Kind != destDirect || [4]byte(d.NextHop[:4]) != via {
		t.Errorf("the entry leads to %v (kind %d), want %v", d.NextHop[:4], d.Kind, via)
	}
	must(t, overTCP(m.ports[h][0], m.ports[other][0]))
}

// remoteTo is a sound entry towards a VTEP.
func (h *testHost) remoteTo(t *testing.T, vtep netip.Addr) destValue { return h.wayTo(t, vtep, 0) }

// wayTo is one of a narrower way.
func (h *testHost) wayTo(t *testing.T, vtep netip.Addr, mtu uint16) destValue {
	t.Helper()
	v, err := encodeNet(vxlan.Network{ID: "n", VNI: testVNI, MTU: 1450, Port: testPort, VTEP: h.vtep()})
	must(t, err)
	var d destValue
	must(t, h.ns.Do(func() error {
		at, err := lookAtHost()
		if err != nil {
			return err
		}
		defer at.close()
		d = at.remote(v, vxlan.Way{VTEP: vtep}, mtu)
		return nil
	}))
	if d.Kind != destDirect {
		t.Fatalf("the way to %s is not direct: %+v", vtep, d)
	}
	return d
}

// TestBreakOffAnywhere: a crash after any operation leaves what the next pass
// completes, in both directions.
func TestBreakOffAnywhere(t *testing.T) { eachWay(t, testBreakOffAnywhere) }

func testBreakOffAnywhere(t *testing.T, way string) {
	h := rig(t, plan{way: way, hosts: 1})[0]
	other := &testHost{t: t, i: 2}
	ports := map[*testHost][]vxlan.Port{h: {h.task(1, false), h.task(2, false)}}
	n := network(h, weft.NewID(), 1450, ports)
	for i := range 3 {
		a := netip.AddrFrom4([4]byte{10, 100, 0, byte(100 + i)})
		n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: other.vtep()})
	}
	n.HostLeg = &vxlan.HostLeg{Name: "leg0", Addr: netip.MustParsePrefix("10.100.0.250/24"), MAC: weft.NodeMAC("n", netip.MustParseAddr("10.100.0.250"))}
	h.cryptNS()
	secret, _ := sealed(h)
	secret.VNI, secret.Ports = secret.VNI+1, []vxlan.Port{h.task(3, false)}
	broken := errors.New("broken off")
	for _, target := range []vxlan.State{state(n, secret), {}} {
		for at := 1; ; at++ {
			start := state(n, secret) // every run starts from the opposite of its target
			if len(target.Networks) > 0 {
				start = vxlan.State{}
			}
			must(t, h.apply(start))
			count := 0
			ctx, cancel := context.WithCancel(context.Background())
			h.engine().cfg.fail = func(vxlan.Op) error {
				if count++; count >= at {
					cancel()
					return broken
				}
				return nil
			}
			err := h.ns.Do(func() error { return h.k.Apply(ctx, target) })
			cancel()
			h.engine().cfg.fail = nil
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
}

// TestOutlivesItsDaemon: what is pinned goes on without any process, and a new
// engine finds nothing to do and cuts nothing.
func TestOutlivesItsDaemon(t *testing.T) { eachWay(t, testOutlivesItsDaemon) }

func testOutlivesItsDaemon(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	before := h.attached()
	if len(before) != 4 {
		t.Fatalf("attached are %v, want programs of two ports, the underlay and the tunnel", before)
	}
	again, err := New(h.engine().cfg)
	must(t, err)
	h.k = again
	expectEqual(t, h, m.want[h])
	must(t, overTCP(m.ports[h][0], m.ports[other][0]))
	must(t, h.apply(m.want[h]))
	if now := h.attached(); !slices.Equal(now, before) {
		t.Errorf("attached are %v, were %v: something was made anew", now, before)
	}
}

// TestUpgrade: programs of another build are replaced in place while a
// connection goes on, and the old ones' pins go.
func TestUpgrade(t *testing.T) { eachWay(t, testUpgrade) }

func testUpgrade(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	again, err := New(h.engine().cfg)
	must(t, err)
	again.build = func() (build, error) {
		b, err := newBuild(inWay(Config{}, way).Attach, inWay(Config{}, way).Ports)
		b.hash = "anotherbuild"
		return b, err
	}
	err = whileConnected(m.ports[other][0], m.ports[h][0], func() error {
		h.k = again
		return h.apply(m.want[h])
	})
	must(t, err)
	expectEqual(t, h, m.want[h])
	if got := h.repairs(); len(got) > 0 {
		t.Errorf("repaired: %v", got)
	}
	m.all(t, overTCP)
	pins, err := os.ReadDir(again.path("progs"))
	must(t, err)
	if len(pins) != len(progNames) {
		t.Errorf("%d programs are pinned, want %d", len(pins), len(progNames))
	}
	for _, p := range pins {
		if !strings.HasSuffix(p.Name(), "-anotherbuild") {
			t.Errorf("%s is left", p.Name())
		}
	}
}

// whileConnected opens a connection, lets change happen, and uses the same
// connection again.
func whileConnected(from, to vxlan.Port, change func() error) error {
	var l net.Listener
	if err := netns.Do(to.NetNS, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(to.Addr.Addr(), 7002).String())
		return err
	}); err != nil {
		return err
	}
	defer l.Close()
	var c net.Conn
	if err := netns.Do(from.NetNS, func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), limit)
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		return err
	}
	defer s.Close()
	if err := change(); err != nil {
		return err
	}
	return pingPong(c, s)
}
