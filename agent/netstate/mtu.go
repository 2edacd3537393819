package netstate

import (
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// leastIPv6 is what every link of IPv6 carries (RFC 8200 section 5). An overlay
// with IPv6 does so over a narrower underlay, too: the tunnel's packets are cut
// there and put together again by the peer.
const leastIPv6 = 1280

// mtu is that of a network's ports: what this node's own link takes, for some
// peer may be as wide, and no more than the network's spec allows. Packets to
// other peers are bounded by their ways; what comes from them fits.
func (d *deriver) mtu(n weft.Network) int {
	mtu, err := vxlan.MTU(d.in.MTU, d.in.Self.VTEP)
	if err != nil {
		mtu = 0 // the engine refuses the network, and names it
	}
	if bound := n.Spec.MTU(); bound > 0 {
		mtu = min(mtu, bound)
	}
	if n.Spec.HasIPv6() {
		mtu = max(mtu, leastIPv6)
	}
	return mtu
}

// way is the MTU of the overlay to a node where it is narrower than the
// network's, else 0.
func (d *deriver) way(network int, vtep netip.Addr) int {
	path, ok := d.in.Paths[vtep.Unmap()]
	if !ok {
		return 0
	}
	mtu, err := vxlan.MTU(path, vtep)
	if err != nil || mtu >= network {
		return 0
	}
	return mtu
}

// narrowest is the way to a service: a balancer chooses among its tasks after
// the sender has made the packet, so it must fit all of them.
func (d *deriver) narrowest(network, service weft.ID, mtu int) int {
	least := 0
	for _, e := range d.endpoints[network] {
		if e.Service != service || e.local {
			continue
		}
		if way := d.way(mtu, e.vtep); way != 0 && (least == 0 || way < least) {
			least = way
		}
	}
	return least
}
