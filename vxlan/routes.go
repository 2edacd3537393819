package vxlan

import (
	"net/netip"
	"slices"
)

// Route tells the sender behind a port that packets to Dst may have MTU bytes
// (inner IP packet). The sender's own kernel then does all that a narrow way
// asks for: segments of TCP fit from the first one on, in both directions, and
// whoever sends larger datagrams is told so at once, without an ICMP message.
type Route struct {
	Dst netip.Prefix
	MTU int
}

// Routes returns the fewest routes, by destination, that give each peer and VIP
// of the network its MTU. What no route names has the port's own. Where most
// addresses of a subnet are narrow in the same way, two routes over its halves
// stand for them: they win over the port's own route to the subnet, which stays.
// Addresses that nobody has, and those of local tasks, then share that MTU.
func Routes(n Network) []Route {
	mtus := make(map[netip.Addr]int, len(n.Peers)+len(n.VIPs))
	for _, p := range n.Peers {
		mtus[p.Addr.Unmap()] = n.wayMTU(p.Addr, p.MTU)
	}
	for _, v := range n.VIPs {
		mtus[v.Addr.Unmap()] = n.wayMTU(v.Addr, v.MTU)
	}
	delete(mtus, netip.Addr{})
	var out []Route
	for _, subnet := range n.Subnets {
		within := make(map[netip.Addr]int)
		for a, mtu := range mtus {
			if subnet.Contains(a) {
				within[a] = mtu
				delete(mtus, a)
			}
		}
		usual := usualMTU(within, n.MTU)
		if usual != n.MTU {
			low, high := halves(subnet)
			out = append(out, Route{low, usual}, Route{high, usual})
		}
		out = append(out, others(within, usual)...)
	}
	out = append(out, others(mtus, n.MTU)...)
	slices.SortFunc(out, func(a, b Route) int { return comparePrefix(a.Dst, b.Dst) })
	return out
}

// wayMTU is what may be sent to an address.
func (n *Network) wayMTU(to netip.Addr, mtu int) int {
	if mtu == 0 {
		return n.MTU
	}
	if to.Unmap().Is6() {
		// Every link of IPv6 carries as much (RFC 8200 section 5); below
		// it the tunnel's packets are cut, and not the tasks'.
		mtu = max(mtu, minMTUIPv6)
	}
	return min(mtu, n.MTU)
}

// others are single routes to all that differs from the usual MTU.
func others(mtus map[netip.Addr]int, usual int) []Route {
	var out []Route
	for a, mtu := range mtus {
		if mtu != usual {
			out = append(out, Route{netip.PrefixFrom(a, a.BitLen()), mtu})
		}
	}
	return out
}

// usualMTU is the one that leaves the fewest routes: that of the port unless
// another saves more than its own two routes; of equals the greatest.
func usualMTU(mtus map[netip.Addr]int, port int) int {
	count := make(map[int]int)
	for _, mtu := range mtus {
		count[mtu]++
	}
	usual, saved := port, count[port]
	for mtu, n := range count {
		if mtu != port && (n-2 > saved || n-2 == saved && usual != port && mtu > usual) {
			usual, saved = mtu, n-2
		}
	}
	return usual
}

// halves of a subnet. One of a single address has none, and no need of any: its
// only route is never cheaper in two.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	b := p.Masked().Addr().AsSlice()
	low = netip.PrefixFrom(p.Masked().Addr(), p.Bits()+1)
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	a, _ := netip.AddrFromSlice(b)
	return low, netip.PrefixFrom(a, p.Bits()+1)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
