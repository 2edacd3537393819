package linux

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// dual makes two hosts with two tasks each, all with addresses of both families,
// and a leg of each host on the network.
func dual(t *testing.T, under6 bool) (hosts []*host, want map[*host]vxlan.State, ports map[*host][]vxlan.Port) {
	t.Helper()
	hosts = rig(t, 2)
	ports = map[*host][]vxlan.Port{}
	for _, h := range hosts {
		if under6 {
			h.use6()
		}
		for n := 1; n < 3; n++ {
			p := h.task(n, false)
			p.Addr6 = netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 10*h.i+n))
			ports[h] = append(ports[h], p)
		}
	}
	legs := map[*host]vxlan.HostLeg{}
	for _, h := range hosts {
		a := netip.AddrFrom4([4]byte{10, 100, 0, byte(240 + h.i)})
		legs[h] = vxlan.HostLeg{Name: weft.IngressLeg, MAC: weft.NodeMAC(h.node, a),
			Addr: netip.PrefixFrom(a, 24), Addr6: netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 240+h.i))}
	}
	id := weft.NewID()
	want = map[*host]vxlan.State{}
	for _, h := range hosts {
		n := network(h, id, ports)
		leg := legs[h]
		n.HostLeg = &leg
		for other, l := range legs {
			if other != h {
				for _, a := range l.Addrs() {
					n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: l.MAC, VTEP: other.vtep()})
				}
			}
		}
		want[h] = state(n)
		must(t, h.apply(want[h]))
	}
	return hosts, want, ports
}

func TestTwoFamilies(t *testing.T) {
	for _, under6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("underlay ipv6=%v", under6), func(t *testing.T) {
			hosts, want, ports := dual(t, under6)
			for _, h := range hosts {
				expectEqual(t, h, want[h])
			}
			meshWorks(t, ports)
			path := strings.Replace(hosts[0].dir, "n1", "h1", 1)
			for _, h := range hosts {
				if err := exchange(path, ports[h][0]); err != nil {
					t.Errorf("host leg to %s: %v", ports[h][0].Addr6, err)
				}
			}
			for _, h := range hosts {
				if s := h.tunnel().Attrs().Statistics; s.TxPackets == 0 || s.RxPackets == 0 {
					t.Errorf("host %d: nothing crossed the VXLAN device: %+v", h.i, s)
				}
			}
		})
	}
}

// What one family lacks is seen and repaired while the other is whole.
func TestSecondAddressIsRepaired(t *testing.T) {
	hosts, want, ports := dual(t, false)
	h, p := hosts[0], ports[hosts[0]][0]
	inTask := func(f func(l netlink.Link) error) func() error {
		return func() error {
			return netns.Do(p.NetNS, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return f(l)
			})
		}
	}
	for name, spoil := range map[string]func() error{
		"second address gone": inTask(func(l netlink.Link) error {
			return netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(p.Addr6)})
		}),
		"another address": inTask(func(l netlink.Link) error {
			return netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("fd77::bad/64"))})
		}),
		"port down": inTask(netlink.LinkSetDown), // the kernel then drops IPv6 addresses
		"IPv6 of the leg off": func() error {
			return h.ns.Do(func() error {
				return setSysctls([]sysctl{{"net/ipv6/conf/" + weft.IngressLeg + "/disable_ipv6", "1"}})
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, spoil())
			if ops := vxlan.Diff(h.read(), want[h]); len(ops) != 1 {
				t.Fatalf("the damage is seen as %v", ops)
			}
			must(t, h.apply(want[h]))
			expectEqual(t, h, want[h])
			if err := exchange(p.NetNS, ports[hosts[1]][0]); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestConformanceTwoFamilies(t *testing.T) {
	h := rig(t, 1)[0]
	p := h.task(1, false)
	p.Addr6 = netip.MustParsePrefix("fd77::11/64")
	n := network(h, weft.NewID(), map[*host][]vxlan.Port{h: {p}})
	first := netip.MustParseAddr("10.100.0.21")
	for _, a := range []string{"10.100.0.21", "fd77::21"} {
		n.Peers = append(n.Peers, vxlan.Peer{Addr: netip.MustParseAddr(a), MAC: weft.EndpointMAC("u", first), VTEP: netip.MustParseAddr("10.99.7.2")})
	}
	for _, a := range []string{"10.100.0.200", "fd77::200"} {
		vip := netip.MustParseAddr(a)
		n.VIPs = append(n.VIPs, vxlan.VIP{Addr: vip, MAC: weft.VIPMAC("s", vip)})
	}
	must(t, h.ns.Do(func() error { vxlantest.Conformance(t, h.k, n); return nil }))
}
