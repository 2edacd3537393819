package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// Encrypted networks as far as this engine makes them: to the router and back.
// That packets cross is tested by package wg.

// cryptNS makes the namespace of the WireGuard devices, without those.
func (h *testHost) cryptNS() string {
	h.t.Helper()
	path, err := netns.Create(h.dir, weft.CryptNetNS(h.node))
	must(h.t, err)
	h.t.Cleanup(func() { netns.Remove(path) })
	return path
}

// sealed is an encrypted network with a task, a peer and a service.
func sealed(h *testHost) (vxlan.Network, vxlan.Port) {
	h.t.Helper()
	p := h.task(1, false)
	n := network(h, weft.NewID(), 1440, map[*testHost][]vxlan.Port{h: {p}})
	n.Encrypted = true
	peer, vip := netip.MustParseAddr("10.100.0.21"), netip.MustParseAddr("10.100.0.200")
	n.Peers = []vxlan.Peer{{Addr: peer, MAC: weft.EndpointMAC("u", peer), VTEP: netip.MustParseAddr("10.99.8.2")}}
	n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("s", vip)}}
	return n, p
}

func TestConformanceEncrypted(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	h.cryptNS()
	n, _ := sealed(h)
	vxlantest.Conformance(t, inHost{h}, n)
}

// routed sends a frame from the task and reports how the router gets it.
func routed(t *testing.T, crypt string, from vxlan.Port, frame []byte) (got []byte, kind uint8, err error) {
	t.Helper()
	fd := -1
	must(t, netns.Do(crypt, func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(limit))
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_IP >> 8, Ifindex: linkIndex(t, weft.RouterName(testVNI))}))
	}))
	defer unix.Close(fd)
	rawSend(t, from.NetNS, from.IfName, frame)
	buf := make([]byte, 2000)
	n, sa, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return nil, 0, err
	}
	return buf[:n], sa.(*unix.SockaddrLinklayer).Pkttype, nil
}

// crosses: what is for an endpoint elsewhere comes to the router as if it were
// its own, by the router's hardware address and by the endpoint's, and what the
// router sends comes to the task.
func crosses(t *testing.T, crypt string, n vxlan.Network, task vxlan.Port) error {
	t.Helper()
	peer := vxlan.Port{Addr: netip.PrefixFrom(n.Peers[0].Addr, 24), MAC: n.Peers[0].MAC}
	router := peer
	router.MAC = weft.RouterMAC(n.VNI)
	for _, to := range []vxlan.Port{router, peer} {
		frame := udpFrame(task, to, 7003, "out", 20)
		got, kind, err := routed(t, crypt, task, frame)
		// From a port of netkit it comes under the router's hardware address.
		named := append(slices.Clone(router.MAC), frame[6:]...)
		if err != nil || !bytes.Equal(got, frame) && !bytes.Equal(got, named) || kind != unix.PACKET_HOST {
			return fmt.Errorf("to %s the router got %x of kind %d, %w", to.MAC, got, kind, err)
		}
	}
	var s net.PacketConn
	err := netns.Do(task.NetNS, func() (err error) {
		s, err = net.ListenPacket("udp4", netip.AddrPortFrom(task.Addr.Addr(), 0).String())
		return err
	})
	if err != nil {
		return err
	}
	defer s.Close()
	rawSend(t, crypt, weft.RouterName(n.VNI), udpFrame(router, task, uint16(s.LocalAddr().(*net.UDPAddr).Port), "in", 20))
	s.SetReadDeadline(time.Now().Add(limit))
	buf := make([]byte, 100)
	size, from, err := s.ReadFrom(buf)
	if err != nil || !strings.HasPrefix(string(buf[:size]), "in") || from.(*net.UDPAddr).AddrPort().Addr() != n.Peers[0].Addr {
		return fmt.Errorf("the task heard %q of %v, %w", buf[:size], from, err)
	}
	return nil
}

// TestUplinkIsRepaired: whatever is wrong with the way to the router is seen,
// repaired by one pass and told as a repair.
func TestUplinkIsRepaired(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	crypt := h.cryptNS()
	n, task := sealed(h)
	want := state(n)
	must(t, h.apply(want))
	expectEqual(t, h, want)
	if err := crosses(t, crypt, n, task); err != nil {
		t.Fatalf("%v; %v", err, h.drops())
	}
	up, router := weft.UplinkName(testVNI), weft.RouterName(testVNI)
	inCrypt := func(f func(netlink.Link) error) func() error {
		return func() error {
			return netns.Do(crypt, func() error {
				l, err := netlink.LinkByName(router)
				if err != nil {
					return err
				}
				return f(l)
			})
		}
	}
	put := func(name string, key, value any) func() error {
		return func() error { return h.pinnedMap(name).Put(key, value) }
	}
	index := func() (i uint32) {
		must(t, h.inHost(up, func(l netlink.Link) error { i = uint32(l.Attrs().Index); return nil }))
		return i
	}
	peer := macKey{VNI: testVNI, MAC: vxlan.MACOf(n.Peers[0].MAC)}
	own := macKey{VNI: testVNI, MAC: vxlan.MACOf(task.MAC)}
	gate := macKey{VNI: testVNI, MAC: vxlan.MACOf(weft.RouterMAC(testVNI))}
	service := macKey{VNI: testVNI, MAC: vxlan.MACOf(n.VIPs[0].MAC)}
	clear := h.remoteTo(t, n.Peers[0].VTEP)
	for _, c := range []struct {
		name  string
		spoil func() error
		// unread: Read alone has no words for it, only Apply sees it.
		unread bool
	}{
		{"uplink gone", func() error { return h.inHost(up, netlink.LinkDel) }, false},
		{"uplink down", func() error { return h.inHost(up, netlink.LinkSetDown) }, false},
		{"uplink's MTU", func() error {
			return h.inHost(up, func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })
		}, false},
		{"router down", inCrypt(netlink.LinkSetDown), false},
		{"router's MTU", inCrypt(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) }), false},
		{"router's hardware address", inCrypt(func(l netlink.Link) error {
			return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 1})
		}), false},
		{"port entry gone", func() error { return h.pinnedMap("ports").Delete(index()) }, false},
		{"port entry that may send in the clear", func() error {
			return h.pinnedMap("ports").Put(index(), portValue{VNI: testVNI, UDP: be(testPort), MAC: gate.MAC, VTEP: addrOf(h.vtep())})
		}, false},
		{"program detached", func() error {
			l, err := link.LoadPinnedLink(h.engine().path("links", up), nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Close())
		}, false},
		{"program of the underlay detached", func() error {
			pins, err := filepath.Glob(h.engine().path("links", "u*"))
			if err != nil || len(pins) != 1 {
				return errors.Join(err, fmt.Errorf("pins %q", pins))
			}
			l, err := link.LoadPinnedLink(pins[0], nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Close())
		}, false},
		{"peer gone", func() error { return h.pinnedMap("macs").Delete(peer) }, false},
		{"router's entry gone", func() error { return h.pinnedMap("macs").Delete(gate) }, false},
		{"peer in the clear", put("macs", peer, clear), false},
		{"router in the clear", put("macs", gate, clear), false},
		{"stray in the clear", put("macs", macKey{VNI: testVNI, MAC: vxlan.MAC{2, 9, 9, 9, 9, 9}}, clear), false},
		{"peer at another link", put("macs", peer, destValue{Kind: destSealedTask, IfIndex: 1}), false},
		{"peer as a service", put("macs", peer, destValue{Kind: destVIP}), true},
		{"service as a peer", func() error {
			return h.pinnedMap("macs").Put(service, destValue{Kind: destSealedTask, IfIndex: index()})
		}, true},
		{"peer answered for by itself", put("eps", epKey{VNI: testVNI, Addr: addrOf(n.Peers[0].Addr)}, epValue{MAC: peer.MAC}), false},
		{"task that takes plain packets", func() error {
			var d destValue
			if err := h.pinnedMap("macs").Lookup(own, &d); err != nil {
				return err
			}
			d.Kind, d.UDP, d.VTEP = destTask, be(testPort), addrOf(h.vtep())
			return h.pinnedMap("macs").Put(own, d)
		}, false},
		{"network that is not encrypted", func() error {
			plain := n
			plain.Encrypted = false
			v, err := encodeNet(plain)
			return errors.Join(err, h.pinnedMap("nets").Put(uint32(testVNI), v))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			if ops := vxlan.Diff(h.read(), want); len(ops) == 0 != c.unread {
				t.Fatalf("of the damage is seen: %v", ops)
			}
			var repairs []weft.Repair
			h.engine().cfg.Repaired = func(r weft.Repair) { repairs = append(repairs, r) }
			must(t, h.apply(want))
			h.engine().cfg.Repaired = nil
			if len(repairs) == 0 {
				t.Error("no repair is told")
			}
			for k, d := range h.dests() {
				if k.VNI == testVNI && d.Kind != destVIP && (d.Kind < destSealedTask || d.VTEP != addr16{}) {
					t.Errorf("%s: %+v", k.MAC.HardwareAddr(), d)
				}
			}
			var d destValue
			if err := h.pinnedMap("macs").Lookup(service, &d); err != nil || d.Kind != destVIP {
				t.Errorf("the service is %+v, %v", d, err)
			}
			expectEqual(t, h, want)
			if err := crosses(t, crypt, n, task); err != nil {
				t.Errorf("%v; %v", err, h.drops())
			}
		})
	}
}

// dests are all entries of hardware addresses.
func (h *testHost) dests() map[macKey]destValue {
	h.t.Helper()
	out, err := dump[macKey, destValue](h.pinnedMap("macs"))
	must(h.t, err)
	return out
}

// TestWithoutItsNamespace: without the namespace of the devices the network is
// not made, and the others are.
func TestWithoutItsNamespace(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	n, _ := sealed(h)
	plain := network(h, weft.NewID(), 1450, nil)
	plain.VNI++
	err := h.apply(state(n, plain))
	var one *vxlan.NetworkError
	if !errors.Is(err, weft.ErrNotFound) || !errors.As(err, &one) || one.VNI != n.VNI {
		t.Errorf("got %v", err)
	}
	expectEqual(t, h, state(plain))
	h.engine().cfg.NetNSDir = ""
	if err := h.apply(state(n, plain)); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("without a folder: %v", err)
	}
}

func TestForeignUplinkIsRefused(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	h.cryptNS()
	n, _ := sealed(h)
	name := weft.UplinkName(n.VNI)
	must(t, h.ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
	}))
	if err := h.apply(state(n)); !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), name) {
		t.Errorf("got %v", err)
	}
	must(t, h.inHost(name, netlink.LinkDel))
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

// TestOriginFollows: the address and port by which plain packets are known are
// those of the wish, though no packet of the network has them.
func TestOriginFollows(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	h.cryptNS()
	n, _ := sealed(h)
	must(t, h.apply(state(n)))
	n.Port, n.MTU = n.Port+1, n.MTU-40
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
	var v netValue
	must(t, h.pinnedMap("nets").Lookup(uint32(testVNI), &v))
	if v.UDP.v() != n.Port {
		t.Errorf("port %d, want %d", v.UDP.v(), n.Port)
	}
}

// TestClearIsNotHeard: plain VXLAN of an encrypted network from a member, with
// the right hardware addresses, whole and in fragments, comes neither to a task
// nor to the router. It is dropped and counted, beside a plain network, whose
// device takes fragments, and alone.
func TestClearIsNotHeard(t *testing.T) {
	for _, under6 := range []bool{false, true} {
		for _, beside := range []bool{true, false} {
			t.Run(fmt.Sprintf("ipv6=%v beside=%v", under6, beside), func(t *testing.T) {
				hosts := rig(t, plan{hosts: 2, under6: under6})
				h, member := hosts[0], hosts[1]
				h.cryptNS()
				n, task := sealed(h)
				n.Peers[0].VTEP = member.vtep()
				want := state(n)
				if beside {
					plain := network(h, weft.NewID(), 1450, nil)
					plain.VNI++
					want = state(n, plain)
				}
				must(t, h.apply(want))
				var s net.PacketConn
				must(t, netns.Do(task.NetNS, func() (err error) {
					s, err = net.ListenPacket("udp4", netip.AddrPortFrom(task.Addr.Addr(), 7003).String())
					return err
				}))
				defer s.Close()
				peer := vxlan.Port{Addr: netip.PrefixFrom(n.Peers[0].Addr, 24), MAC: n.Peers[0].MAC}
				router := task
				router.MAC = weft.RouterMAC(testVNI)
				sent := uint64(0)
				for _, to := range []vxlan.Port{task, router} {
					for _, size := range []int{100, 4000} {
						if size > 1000 && !beside {
							continue // no device takes fragments
						}
						sent++
						frame := udpFrame(peer, to, 7003, "clear", size)
						must(t, netns.Do(member.path, func() error {
							c, err := net.Dial("udp", netip.AddrPortFrom(h.vtep(), testPort).String())
							if err != nil {
								return err
							}
							defer c.Close()
							_, err = c.Write(encapsulated(testVNI, frame))
							return err
						}))
						if !eventually(func() bool { return h.drops()["unencrypted"] == sent }) {
							t.Fatalf("%d bytes to %s are not counted: %v", size, to.MAC, h.drops())
						}
					}
				}
				// What the network itself carries comes behind them.
				router.Addr = peer.Addr
				rawSend(t, h.dir+"/"+weft.CryptNetNS(h.node), weft.RouterName(testVNI), udpFrame(router, task, 7003, "genuine", 20))
				s.SetReadDeadline(time.Now().Add(limit))
				buf := make([]byte, 65536)
				got, _, err := s.ReadFrom(buf)
				if err != nil || !strings.HasPrefix(string(buf[:got]), "genuine") {
					t.Errorf("heard %q, %v", buf[:min(got, 20)], err)
				}
			})
		}
	}
}

// TestNothingLeavesInTheClear: an entry that leads to another node, which nobody
// writes, does not make a task of an encrypted network send there.
func TestNothingLeavesInTheClear(t *testing.T) {
	hosts := rig(t, plan{hosts: 2})
	h, other := hosts[0], hosts[1]
	h.cryptNS()
	n, task := sealed(h)
	plain := network(h, weft.NewID(), 1450, nil)
	plain.VNI++ // for a way that packets could take
	must(t, h.apply(state(n, plain)))
	var under net.PacketConn
	must(t, other.ns.Do(func() (err error) {
		under, err = net.ListenPacket("udp4", netip.AddrPortFrom(other.vtep(), testPort).String())
		return err
	}))
	defer under.Close()
	peer := vxlan.Port{Addr: netip.PrefixFrom(n.Peers[0].Addr, 24), MAC: n.Peers[0].MAC}
	for i, kind := range []kind{destDirect, destTunnel} {
		d := h.remoteTo(t, other.vtep())
		d.Kind = kind
		must(t, h.pinnedMap("macs").Put(macKey{VNI: testVNI, MAC: vxlan.MACOf(peer.MAC)}, d))
		rawSend(t, task.NetNS, "eth0", udpFrame(task, peer, 7003, "secret", 20))
		if !eventually(func() bool { return h.drops()["unencrypted"] == uint64(i+1) }) {
			t.Errorf("kind %d is not dropped: %v", kind, h.drops())
		}
	}
	// The first thing on the wire is what is sent now.
	must(t, h.ns.Do(func() error {
		c, err := net.Dial("udp", under.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		return binary.Write(c, binary.BigEndian, uint32(77))
	}))
	under.SetReadDeadline(time.Now().Add(limit))
	buf := make([]byte, 2000)
	if size, _, err := under.ReadFrom(buf); err != nil || size != 4 {
		t.Errorf("the other node got %x, %v", buf[:size], err)
	}
}
