package linux

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip) // the zero Addr for nil
	return a.Unmap()
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ones, bits := n.Mask.Size()
	a := addrOf(n.IP)
	if bits != a.BitLen() && a.Is4() {
		ones -= 96
	}
	return netip.PrefixFrom(a, ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func cmpString(a, b string) int { return strings.Compare(a, b) }

// isOurs reports whether a link of the host's namespace was made by weft, for
// this node or another one that shares the namespace.
func isOurs(l netlink.Link) bool {
	return strings.HasPrefix(l.Attrs().Alias, weft.LinkAlias(""))
}

// UnderlayMTU is the MTU in bytes of the link of the calling thread's namespace
// that holds addr. An address that no link holds is weft.ErrNotFound.
func UnderlayMTU(addr netip.Addr) (int, error) {
	mtu := 0
	err := eachAddr(func(l netlink.Link, p netip.Prefix) {
		if p.Addr() == addr.Unmap() {
			mtu = l.Attrs().MTU
		}
	})
	if err != nil {
		return 0, err
	}
	if mtu == 0 {
		return 0, fmt.Errorf("find the link of %s: no link of this host has that address: %w", addr, weft.ErrNotFound)
	}
	return mtu, nil
}

// usesRange reports whether the range of a link is one that overlays must
// avoid: any but our own, and the gateway bridge, on which containers have a
// leg, too.
func usesRange(l netlink.Link) bool {
	return !isOurs(l) || l.Attrs().Name == weft.GatewayBridge
}

// HostPrefixes returns the networks that the host's namespace uses: of its
// addresses and routes but the default ones, without the loopback and weft's
// own links other than the gateway bridge, sorted. An overlay must not overlap any of them.
func HostPrefixes() ([]netip.Prefix, error) {
	var out []netip.Prefix
	err := eachAddr(func(l netlink.Link, p netip.Prefix) {
		if usesRange(l) && !p.Addr().IsLoopback() {
			out = append(out, p.Masked())
		}
	})
	if err != nil {
		return nil, err
	}
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.close()
	links, err := complete(c.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	own := make(map[int]bool)
	for _, l := range links {
		own[l.Attrs().Index] = !usesRange(l) || l.Attrs().Flags&unix.IFF_LOOPBACK != 0
	}
	routes, err := complete(func() ([]netlink.Route, error) {
		return c.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if p := prefixOf(r.Dst); p.IsValid() && p.Bits() > 0 && !own[r.LinkIndex] && !p.Addr().IsMulticast() {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	return slices.Compact(out), nil
}

// HostAddrs returns the addresses of the host's own links that a published port can
// be bound to: not the loopback's own (127.0.0.1, ::1), which every host has, not
// those of one link only, and not those of weft's links. Sorted.
func HostAddrs() ([]weft.HostAddr, error) {
	var out []weft.HostAddr
	err := eachAddr(func(l netlink.Link, p netip.Prefix) {
		if a := p.Addr().Unmap(); !isOurs(l) && !a.IsLoopback() && !(a.Is6() && a.IsLinkLocalUnicast()) {
			out = append(out, weft.HostAddr{Interface: l.Attrs().Name, Addr: a})
		}
	})
	slices.SortFunc(out, func(a, b weft.HostAddr) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), a.Addr.Compare(b.Addr))
	})
	return slices.Compact(out), err
}

// AddrCandidates returns the global unicast addresses of the host's own links
// that are up, IPv4 first: what a node may advertise when nobody said which.
func AddrCandidates() ([]netip.Addr, error) {
	var out []netip.Addr
	err := eachAddr(func(l netlink.Link, p netip.Prefix) {
		if !isOurs(l) && l.Attrs().Flags&unix.IFF_UP != 0 && p.Addr().IsGlobalUnicast() {
			out = append(out, p.Addr())
		}
	})
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), err
}

func eachAddr(f func(netlink.Link, netip.Prefix)) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.close()
	links, err := complete(c.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	byIndex := make(map[int]netlink.Link, len(links))
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return c.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if l := byIndex[a.LinkIndex]; l != nil && prefixOf(a.IPNet).IsValid() {
			f(l, prefixOf(a.IPNet))
		}
	}
	return nil
}
