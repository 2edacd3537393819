package vxlan

import "net/netip"

// NativeWay is the way of one network's packets to another node, as far as they
// go there without encapsulation. Each must be proven for itself: a segment may
// carry the addresses of one network and not those of another.
type NativeWay struct {
	VNI  uint32
	VTEP netip.Addr
}

// NativeEnds are the addresses on both ends of a way: of local tasks and of
// tasks on the other node.
type NativeEnds struct{ From, To []netip.Addr }

// NativeProbe is one packet between two addresses of a way, of one family. Its
// echo carries ID, which nobody can know who has not seen the probe.
type NativeProbe struct {
	NativeWay
	From, To netip.Addr
	ID       uint64
}

// NativeFamily reports whether packets of the family of a can go to vtep without
// encapsulation: the kernel sends IPv4 to neighbours of either family, IPv6
// only to those of IPv6.
func NativeFamily(a, vtep netip.Addr) bool { return a.Unmap().Is4() || vtep.Unmap().Is6() }
