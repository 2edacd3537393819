package netstate

import (
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// setNative lets a network's packets go without encapsulation where the network
// asks for it and the way is proven, and adds what there is to prove to ways.
// Ports take such packets also where this node sends none: others decide for
// themselves, by what they have proven.
func (d *deriver) setNative(n weft.Network, out *vxlan.Network, ways map[vxlan.NativeWay]vxlan.NativeEnds) {
	if !d.takesNative(n) {
		return
	}
	out.Native = true
	if n.Spec.Encap() == weft.EncapAuto && d.in.CutsTunnels {
		return
	}
	var from []netip.Addr
	for _, p := range out.Ports {
		from = append(from, bare(p.Addrs())...)
	}
	for i, p := range out.Peers {
		way := vxlan.NativeWay{VNI: n.VNI, VTEP: p.VTEP.Unmap()}
		out.Peers[i].Native = d.in.Proven[way]
		ends := ways[way]
		ends.From, ends.To = from, append(ends.To, p.Addr)
		ways[way] = ends
	}
}

// takesNative reports whether packets to a network's tasks may come without
// encapsulation. Then their addresses alone say whose they are: of two networks
// of which one overlaps the other neither is so. The leader makes no such pair.
func (d *deriver) takesNative(n weft.Network) bool {
	encap := n.Spec.Encap()
	if d.in.Proven == nil || encap != weft.EncapNative && encap != weft.EncapAuto || n.Spec.Encrypted() || n.Spec.Ingress {
		return false
	}
	return !slices.ContainsFunc(d.in.Networks, func(o weft.Network) bool {
		return o.ID != n.ID && slices.ContainsFunc(o.Spec.Subnets, func(s weft.Subnet) bool {
			return slices.ContainsFunc(n.Spec.Subnets, func(mine weft.Subnet) bool { return mine.Prefix.Overlaps(s.Prefix) })
		})
	})
}
