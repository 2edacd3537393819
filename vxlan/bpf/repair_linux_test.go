package bpf

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
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

func TestRepair(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	n := m.want[h].Networks[testVNI]
	peer, port := n.Peers[0], m.ports[h][0]
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
	detach := func(pin string) func() error {
		return func() error {
			found, err := filepath.Glob(h.engine().path("links", pin))
			if err != nil || len(found) != 1 {
				return errors.Join(err, errors.New("no such link"))
			}
			l, err := link.LoadPinnedLink(found[0], nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Close())
		}
	}
	for _, c := range []struct {
		name  string
		spoil func() error
	}{
		{"peer gone", func() error { return h.pinnedMap("macs").Delete(peerKey) }},
		{"peer elsewhere", change("macs", peerKey, h.remoteTo(t, netip.MustParseAddr("10.99.8.77")))},
		{"peer garbled", change("macs", peerKey, destValue{Kind: 99, MTU: 3})},
		{"stray peer", change("macs", macKey{VNI: testVNI, MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}}, h.remoteTo(t, other.vtep()))},
		{"address gone", func() error { return h.pinnedMap("eps").Delete(epKey{VNI: testVNI, Addr: addrOf(peer.Addr)}) }},
		{"address of another", change("eps", epKey{VNI: testVNI, Addr: addrOf(peer.Addr)}, epValue{MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}})},
		{"stray address", change("eps", epKey{VNI: testVNI, Addr: addrOf(netip.MustParseAddr("10.100.0.99"))}, epValue{MAC: vxlan.MACOf(peer.MAC)})},
		{"second address of a port", change("eps", epKey{VNI: testVNI, Addr: addrOf(netip.MustParseAddr("10.100.0.98"))}, epValue{MAC: vxlan.MACOf(port.MAC)})},
		{"own entry gone", func() error { return h.pinnedMap("macs").Delete(portKey) }},
		{"own entry elsewhere", change("macs", portKey, h.remoteTo(t, other.vtep()))},
		{"network of a peer unknown", change("macs", macKey{VNI: testVNI + 1, MAC: peerKey.MAC}, h.remoteTo(t, other.vtep()))},
		{"network entry gone", func() error { return h.pinnedMap("nets").Delete(uint32(testVNI)) }},
		{"network entry garbled", change("nets", uint32(testVNI), netValue{MTU: 99})},
		{"port entry gone", func() error {
			return h.inHost(near, func(l netlink.Link) error { return h.pinnedMap("ports").Delete(uint32(l.Attrs().Index)) })
		}},
		{"port entry garbled", func() error {
			return h.inHost(near, func(l netlink.Link) error {
				return h.pinnedMap("ports").Put(uint32(l.Attrs().Index), portValue{VNI: testVNI, MAC: vxlan.MACOf(port.MAC)})
			})
		}},
		{"program of a port detached", detach(near)},
		{"program of the underlay detached", detach("u*")},
		{"program of the tunnel detached", detach("t*")},
		{"link of a port unpinned", unpin("links", near)},
		{"all links unpinned", unpin("links", "*")},
		{"a program unpinned", unpin("progs", "from_task-*")},
		{"a map unpinned", unpin("macs")},
		{"all maps unpinned", func() error {
			return errors.Join(unpin("macs")(), unpin("eps")(), unpin("ports")(), unpin("nets")(), unpin("hooks")(), unpin("counts")())
		}},
		{"forward unhooked", func() error { return h.pinnedMap("hooks").Delete(uint32(hookForward)) }},
		{"bpffs unmounted", func() error { return unix.Unmount(h.engine().cfg.Dir, unix.MNT_DETACH) }},
		{"near end down", func() error { return h.inHost(near, netlink.LinkSetDown) }},
		{"near end's MTU", func() error {
			return h.inHost(near, func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })
		}},
		{"tunnel gone", func() error { return h.inHost(weft.TunnelName(testPort), netlink.LinkDel) }},
		{"tunnel down", func() error { return h.inHost(weft.TunnelName(testPort), netlink.LinkSetDown) }},
		{"port gone", far(netlink.LinkDel)},
		{"port down", far(netlink.LinkSetDown)},
		{"port MTU", far(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })},
		{"port MAC", far(func(l netlink.Link) error {
			return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 1})
		})},
		{"port address", far(func(l netlink.Link) error {
			return netlink.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 100, 0, 250), Mask: net.CIDRMask(24, 32)}})
		})},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			if ops := vxlan.Diff(h.read(), m.want[h]); len(ops) == 0 {
				t.Fatal("the damage is not seen")
			}
			must(t, h.apply(m.want[h]))
			expectEqual(t, h, m.want[h])
			if err := overTCP(port, m.ports[other][0]); err != nil {
				t.Errorf("%v; %v", err, h.drops())
			}
			if err := overTCP(m.ports[other][1], port); err != nil {
				t.Errorf("back: %v; %v", err, h.drops())
			}
		})
	}
}

// remoteTo is a sound entry towards a VTEP.
func (h *testHost) remoteTo(t *testing.T, vtep netip.Addr) destValue {
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
		d = at.remote(v, vxlan.Way{VTEP: vtep})
		return nil
	}))
	if d.Kind != destDirect {
		t.Fatalf("the way to %s is not direct: %+v", vtep, d)
	}
	return d
}

// TestBreakOffAnywhere: a crash after any operation leaves what the next pass
// completes, in both directions.
func TestBreakOffAnywhere(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	other := &testHost{t: t, i: 2}
	ports := map[*testHost][]vxlan.Port{h: {h.task(1, false), h.task(2, false)}}
	n := network(h, weft.NewID(), 1450, ports)
	for i := range 3 {
		a := netip.AddrFrom4([4]byte{10, 100, 0, byte(100 + i)})
		n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: other.vtep()})
	}
	n.HostLeg = &vxlan.HostLeg{Name: "leg0", Addr: netip.MustParsePrefix("10.100.0.250/24"), MAC: weft.NodeMAC("n", netip.MustParseAddr("10.100.0.250"))}
	broken := errors.New("broken off")
	for _, target := range []vxlan.State{state(n), {}} {
		for at := 1; ; at++ {
			start := state(n) // every run starts from the opposite of its target
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
func TestOutlivesItsDaemon(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	links := func() map[string]string {
		out := map[string]string{}
		pins, err := h.engine().hooks()
		must(t, err)
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(h.engine().path("links", pin), nil)
			must(t, err)
			info, err := l.Info()
			must(t, err)
			out[pin] = strings.Join([]string{pin, string(rune(info.ID))}, "/")
			l.Close()
		}
		return out
	}
	before := links()
	if len(before) != 4 {
		t.Fatalf("links %v, want two ports, the underlay and the tunnel", before)
	}
	again, err := New(h.engine().cfg)
	must(t, err)
	h.k = again
	expectEqual(t, h, m.want[h])
	must(t, overTCP(m.ports[h][0], m.ports[other][0]))
	must(t, h.apply(m.want[h]))
	for pin, id := range links() {
		if before[pin] != id {
			t.Errorf("link %s was made anew", pin)
		}
	}
}

// TestUpgrade: programs of another build are replaced in place while a
// connection goes on, and the old ones' pins go.
func TestUpgrade(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	again, err := New(h.engine().cfg)
	must(t, err)
	again.build = func() (build, error) {
		b, err := newBuild()
		b.hash = "anotherbuild"
		return b, err
	}
	err = whileConnected(m.ports[other][0], m.ports[h][0], func() error {
		h.k = again
		return h.apply(m.want[h])
	})
	must(t, err)
	expectEqual(t, h, m.want[h])
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
