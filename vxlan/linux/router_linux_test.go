package linux

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

func (h *host) route(r *Router, want vxlan.State) {
	h.t.Helper()
	must(h.t, h.ns.Do(func() error { return r.ApplyRoutes(context.Background(), want) }))
}

// routesAt are our routes at a port.
func routesAt(t testing.TB, p vxlan.Port) map[netip.Prefix]int {
	t.Helper()
	var out map[netip.Prefix]int
	must(t, withNS(p.NetNS, func(c *conn) error {
		l, err := c.LinkByName(p.IfName)
		if err != nil {
			return err
		}
		out, err = c.routesOver(l.Attrs().Index)
		return err
	}))
	return out
}

// believed is the MTU that the kernel at a port has for a destination.
func believed(t testing.TB, p vxlan.Port, to netip.Addr) int {
	t.Helper()
	mtu := 0
	must(t, netns.Do(p.NetNS, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		level, opt := unix.IPPROTO_IP, unix.IP_MTU
		if to.Is6() {
			level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU
		}
		var sockErr error
		err = raw.Control(func(fd uintptr) { mtu, sockErr = unix.GetsockoptInt(int(fd), level, opt) })
		return errors.Join(err, sockErr)
	}))
	return mtu
}

// sendDF sends one datagram that must not be cut, of size bytes with all headers.
func sendDF(t testing.TB, p vxlan.Port, to netip.Addr, size int) error {
	t.Helper()
	return netns.Do(p.NetNS, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		level, opt, headers := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, 28
		if to.Is6() {
			level, opt, headers = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, 48
		}
		var sockErr error
		err = raw.Control(func(fd uintptr) { sockErr = unix.SetsockoptInt(int(fd), level, opt, unix.IP_PMTUDISC_DO) })
		if err := errors.Join(err, sockErr); err != nil {
			return err
		}
		_, err = c.Write(make([]byte, size-headers))
		return err
	})
}

// TestNarrowWay: a sender knows that one of its peers is behind a narrower way,
// in both families; datagrams that do not fit are refused at once, those that
// fit are not, TCP passes; and the knowledge follows changes without a trace.
func TestNarrowWay(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("ipv6=%v", v6), func(t *testing.T) {
			hosts, want, ports := two(t, v6)
			h, a := hosts[0], ports[hosts[0]][0]
			b, other := ports[hosts[1]][0], ports[hosts[1]][1]
			var r Router
			set := func(mtu int) {
				n := want[h].Networks[testVNI]
				n.Peers = append([]vxlan.Peer(nil), n.Peers...)
				for i := range n.Peers {
					if n.Peers[i].Addr == b.Addr.Addr() {
						n.Peers[i].MTU = mtu
					}
				}
				must(t, h.apply(state(n)))
				h.route(&r, state(n))
				expectEqual(t, h, state(n))
			}
			for _, mtu := range []int{1370, 1300, 0, 1330} {
				set(mtu)
				expect := mtu
				if mtu == 0 {
					expect = testMTU
				}
				if got := believed(t, a, b.Addr.Addr()); got != expect {
					t.Errorf("MTU to the narrow peer is %d, want %d", got, expect)
				}
				if got := believed(t, a, other.Addr.Addr()); got != testMTU {
					t.Errorf("MTU to the other peer is %d, want %d", got, testMTU)
				}
				if err := sendDF(t, a, b.Addr.Addr(), expect); err != nil {
					t.Errorf("%d bytes do not fit into %d: %v", expect, expect, err)
				}
				if err := sendDF(t, a, b.Addr.Addr(), expect+1); !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("%d bytes to a way of %d: %v, want EMSGSIZE", expect+1, expect, err)
				}
				must(t, exchange(a.NetNS, b))
			}
			// Behind our back: a route is gone, another has come.
			must(t, netns.Do(a.NetNS, func() error {
				return setRoutes(a.IfName, []vxlan.Route{{Dst: netip.PrefixFrom(other.Addr.Addr(), other.Addr.Addr().BitLen()), MTU: 1290}})
			}))
			set(1330)
			if got := routesAt(t, a); len(got) != 1 || believed(t, a, b.Addr.Addr()) != 1330 {
				t.Errorf("routes = %v, want the one to the narrow peer", got)
			}
			set(0)
			if got := routesAt(t, a); len(got) != 0 || !r.isClean {
				t.Errorf("routes = %v, clean %v, want none", got, r.isClean)
			}
		})
	}
}

// TestNarrowNetwork: where most ways are narrow the subnet's own route stays and
// is overruled; the same holds for the host's leg.
func TestNarrowNetwork(t *testing.T) {
	hosts, want, ports := two(t, false)
	h, a := hosts[0], ports[hosts[0]][0]
	n := want[h].Networks[testVNI]
	n.Peers = nil
	for i := range 20 {
		addr := netip.AddrFrom4([4]byte{10, 100, 0, byte(100 + i)})
		n.Peers = append(n.Peers, vxlan.Peer{Addr: addr, MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(i + 1)}, VTEP: hosts[1].vtep(), MTU: 1230})
	}
	n.Peers[3].MTU = 0
	n.HostLeg = &vxlan.HostLeg{Name: "leg", Addr: netip.MustParsePrefix("10.100.0.9/24"), MAC: net.HardwareAddr{2, 0, 0, 0, 1, 9}}
	must(t, h.apply(state(n)))
	var r Router
	h.route(&r, state(n))
	if got := routesAt(t, a); len(got) != 3 {
		t.Errorf("routes = %v, want two halves and one exception", got)
	}
	leg := vxlan.Port{NetNS: fmt.Sprintf("/proc/self/fd/%d", h.ns.FD()), IfName: "leg"}
	for _, p := range []vxlan.Port{a, leg} {
		for i, mtu := range map[int]int{0: 1230, 19: 1230, 3: testMTU} {
			if got := believed(t, p, n.Peers[i].Addr); got != mtu {
				t.Errorf("%s: MTU to %s is %d, want %d", p.IfName, n.Peers[i].Addr, got, mtu)
			}
		}
	}
	// A port of which nothing is left is nobody's fault.
	n.Ports = append(n.Ports, vxlan.Port{Task: "gone", NetNS: "/nowhere", IfName: "eth0"})
	h.route(&r, state(n))
	routes := 0
	must(t, withNS(a.NetNS, func(c *conn) error {
		all, err := c.RouteList(nil, netlink.FAMILY_V4)
		routes = len(all)
		return err
	}))
	if routes != 4 {
		t.Errorf("%d routes in all, want ours and the subnet's own", routes)
	}
}
