package vxlan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// VXLAN adds an outer Ethernet-less IP header, UDP (8 bytes), the VXLAN header
// (8 bytes) and the inner Ethernet header (14 bytes) to each inner packet (RFC
// 7348 section 5).
const (
	overheadIPv4 = 20 + 8 + 8 + 14
	overheadIPv6 = 40 + 8 + 8 + 14
)

// Bounds of an MTU: RFC 791 wants 68 bytes of every IPv4 link, RFC 8200
// section 5 wants 1280 of an IPv6 one, and 65535 is what an IP length holds.
const (
	minMTU     = 68
	minMTUIPv6 = 1280
	maxMTU     = 65535
)

// MTU is the MTU in bytes of ports on an overlay whose VTEP lives on a link
// of underlay bytes: underlay - 50 for an IPv4 VTEP, - 70 for IPv6. An
// underlay that leaves less than 68 bytes is weft.ErrInvalid.
func MTU(underlay int, vtep netip.Addr) (int, error) {
	if !vtep.IsValid() {
		return 0, fmt.Errorf("compute MTU of the overlay: no VTEP address: %w", weft.ErrInvalid)
	}
	overhead := overheadIPv4
	if vtep.Unmap().Is6() {
		overhead = overheadIPv6
	}
	mtu := min(underlay, maxMTU) - overhead
	if mtu < minMTU {
		return 0, fmt.Errorf("compute MTU of the overlay: an underlay of %d bytes leaves %d, less than %d: %w", underlay, mtu, minMTU, weft.ErrInvalid)
	}
	return mtu, nil
}

// Normalize returns a copy in one order (ports by task, peers and VIPs by
// address, subnets by prefix) with IPv4-mapped addresses unmapped, so that
// equal states compare equal field by field. Exact duplicates are dropped.
func Normalize(s State) State {
	out := State{Networks: make(map[uint32]Network, len(s.Networks))}
	for vni, n := range s.Networks {
		n.Subnets = slices.Compact(sortedPrefixes(n.Subnets))
		n.VTEP = n.VTEP.Unmap()
		n.Ports = slices.Clone(n.Ports)
		slices.SortFunc(n.Ports, comparePorts)
		n.Ports = slices.CompactFunc(n.Ports, func(a, b Port) bool { return comparePorts(a, b) == 0 })
		n.Peers = slices.Clone(n.Peers)
		for i, p := range n.Peers {
			n.Peers[i].Addr, n.Peers[i].VTEP = p.Addr.Unmap(), p.VTEP.Unmap()
		}
		slices.SortFunc(n.Peers, comparePeers)
		n.Peers = slices.CompactFunc(n.Peers, func(a, b Peer) bool { return comparePeers(a, b) == 0 })
		n.VIPs = slices.Clone(n.VIPs)
		for i, v := range n.VIPs {
			n.VIPs[i].Addr = v.Addr.Unmap()
		}
		slices.SortFunc(n.VIPs, compareVIPs)
		n.VIPs = slices.CompactFunc(n.VIPs, func(a, b VIP) bool { return compareVIPs(a, b) == 0 })
		out.Networks[vni] = n
	}
	return out
}

// Validate checks that the state can be made. Every violation wraps
// weft.ErrInvalid and names network and object; all are joined.
func Validate(s State) error {
	var errs []error
	owner := make(map[weft.ID]uint32, len(s.Networks))
	for vni, n := range s.Networks {
		if other, ok := owner[n.ID]; ok {
			errs = append(errs, fmt.Errorf("network %s has both VNI %d and %d: %w", n.ID, other, vni, weft.ErrInvalid))
		}
		owner[n.ID] = vni
		if vni != n.VNI {
			errs = append(errs, fmt.Errorf("network %d: filed under %d: %w", n.VNI, vni, weft.ErrInvalid))
		}
		if err := n.Validate(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Validate checks one network as the function Validate does.
func (n Network) Validate() error {
	c := checker{n: n, addrs: make(map[netip.Addr]string), macs: make(map[MAC]string)}
	c.check()
	return errors.Join(c.errs...)
}

// sanitize is want with every network that cannot be made left as it is in have,
// and reported: the others are not held up by it.
func sanitize(have, want State) (State, error) {
	var errs []error
	sane := State{Networks: make(map[uint32]Network, len(want.Networks))}
	for vni, n := range want.Networks {
		err := n.Validate()
		if err == nil && vni != n.VNI {
			err = fmt.Errorf("network %d: filed under %d: %w", n.VNI, vni, weft.ErrInvalid)
		}
		if err == nil {
			sane.Networks[vni] = n
			continue
		}
		errs = append(errs, &NetworkError{VNI: vni, Err: err})
		if h, ok := have.Networks[vni]; ok {
			sane.Networks[vni] = h
		}
	}
	return sane, errors.Join(errs...)
}

// Plan is Diff for a want that may be wrong: a network that cannot be made
// stays as it is and is reported; the others are not held up by it.
func Plan(have, want State) ([]Op, error) {
	sane, err := sanitize(have, want)
	return Diff(have, sane), err
}

// checker collects what is wrong with one network.
type checker struct {
	n     Network
	addrs map[netip.Addr]string
	macs  map[MAC]string
	errs  []error
}

func (c *checker) fail(format string, args ...any) {
	args = append([]any{c.n.VNI}, append(args, weft.ErrInvalid)...)
	c.errs = append(c.errs, fmt.Errorf("network %d: "+format+": %w", args...))
}

func (c *checker) check() {
	n := c.n
	if n.ID == "" {
		c.fail("no id")
	}
	if n.VNI == 0 || n.VNI > weft.LastVNI {
		c.fail("VNI is not in 1-%d", weft.LastVNI)
	}
	if !n.VTEP.IsValid() || n.VTEP.IsUnspecified() || n.VTEP.IsMulticast() {
		c.fail("VTEP %s is not a unicast address", n.VTEP)
	}
	if n.Port == 0 {
		c.fail("no UDP port")
	}
	if n.Native && n.Encrypted {
		c.fail("is encrypted, and cannot go without encapsulation")
	}
	least := minMTU
	for _, p := range n.Subnets {
		if !p.IsValid() || p.Masked() != p {
			c.fail("subnet %s is malformed or has host bits", p)
		}
		if p.Addr().Is6() {
			least = minMTUIPv6
		}
	}
	if n.MTU < least || n.MTU > maxMTU {
		c.fail("MTU %d is not in %d-%d", n.MTU, least, maxMTU)
	}
	tasks := make(map[weft.ID]bool, len(n.Ports))
	for _, p := range n.Ports {
		what := "port of task " + p.Task.Short()
		if p.Task == "" || tasks[p.Task] {
			c.fail("%s: no task, or two ports of one", what)
		}
		tasks[p.Task] = true
		if p.NetNS == "" {
			c.fail("%s: no namespace path", what)
		}
		c.ifName(what, p.IfName)
		c.prefixes(what, p.Addrs())
		c.mac(what, p.MAC)
	}
	macs := make(map[MAC]Peer, len(n.Peers))
	for _, p := range n.Peers {
		what := fmt.Sprintf("peer %s", p.Addr)
		c.address(what, p.Addr)
		c.way(what, p.MTU)
		if p.Native && !n.Native {
			c.fail("%s: it is native, and the network is not", what)
		}
		// The two addresses of an endpoint share its hardware address.
		first, again := macs[MACOf(p.MAC)]
		if again && first.VTEP.Unmap() == p.VTEP.Unmap() && first.Addr.Unmap().Is4() != p.Addr.Unmap().Is4() {
			macs[MACOf(p.MAC)] = Peer{} // a third one is no twin of either
		} else {
			c.mac(what, p.MAC)
			macs[MACOf(p.MAC)] = p
		}
		if !p.VTEP.IsValid() || p.VTEP.IsUnspecified() || p.VTEP.IsMulticast() || p.VTEP.Unmap() == n.VTEP.Unmap() {
			c.fail("%s: VTEP %s is not another node's unicast address", what, p.VTEP)
		} else if n.VTEP.IsValid() && p.VTEP.Unmap().Is4() != n.VTEP.Unmap().Is4() {
			c.fail("%s: VTEP %s is not of the family of this node's %s", what, p.VTEP, n.VTEP)
		}
	}
	for _, v := range n.VIPs {
		what := fmt.Sprintf("service address %s", v.Addr)
		c.address(what, v.Addr)
		c.mac(what, v.MAC)
		c.way(what, v.MTU)
	}
	if l := n.HostLeg; l != nil {
		what := "host leg " + l.Name
		c.ifName(what, l.Name)
		c.prefixes(what, l.Addrs())
		c.mac(what, l.MAC)
	}
}

// way checks the MTU of a way. One above the network's is no fault: it may come
// from the time before a change.
func (c *checker) way(what string, mtu int) {
	if mtu != 0 && (mtu < minMTU || mtu > maxMTU) {
		c.fail("%s: MTU %d of the way there is not in %d-%d", what, mtu, minMTU, maxMTU)
	}
}

// prefixes checks the addresses of a port: the first of either family, the
// second of IPv6 beside IPv4.
func (c *checker) prefixes(what string, all []netip.Prefix) {
	for i, p := range all {
		if !p.IsValid() {
			c.fail("%s: no address", what)
		}
		if i > 0 && (!p.Addr().Is6() || !all[0].Addr().Is4()) {
			c.fail("%s: addresses %s and %s are not of IPv4 and IPv6", what, all[0], p)
		}
		c.address(what, p.Addr())
	}
}

func (c *checker) address(what string, a netip.Addr) {
	if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
		c.fail("%s: %s is not a unicast address", what, a)
		return
	}
	if other, ok := c.addrs[a.Unmap()]; ok {
		c.fail("%s: address %s is also that of %s", what, a, other)
	}
	c.addrs[a.Unmap()] = what
}

func (c *checker) mac(what string, a net.HardwareAddr) {
	m := MACOf(a)
	if m == (MAC{}) || m[0]&1 != 0 {
		c.fail("%s: %q is not a unicast hardware address", what, a.String())
		return
	}
	if other, ok := c.macs[m]; ok {
		c.fail("%s: hardware address %s is also that of %s", what, a, other)
	}
	c.macs[m] = what
}

// ifName applies the kernel's rule (dev_valid_name, net/core/dev.c).
func (c *checker) ifName(what, name string) {
	ok := name != "" && len(name) <= 15 && name != "." && name != ".."
	for _, r := range name {
		ok = ok && r > ' ' && r < 0x7f && r != '/' && r != ':'
	}
	if !ok {
		c.fail("%s: %q is not an interface name", what, name)
	}
}
