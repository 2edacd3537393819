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
	mtu, err := inner(n, d.in.MTU, d.in.Self.VTEP)
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

// inner is what an underlay of bytes leaves for a network's packets.
func inner(n weft.Network, bytes int, vtep netip.Addr) (int, error) {
	if n.Spec.Encrypted() {
		return vxlan.EncryptedMTU(bytes, vtep)
	}
	return vxlan.MTU(bytes, vtep)
}

// setWays gives peers of a network, whose ports have an MTU, theirs.
func (d *deriver) setWays(n weft.Network, peers []vxlan.Peer, mtu int) {
	for i := range peers {
		peers[i].MTU = d.way(n, peers[i].VTEP, mtu)
	}
}

// way is the MTU of a network to a node where it is narrower than that of the
// network's ports, else 0.
func (d *deriver) way(n weft.Network, vtep netip.Addr, port int) int {
	path, ok := d.in.Paths[vtep.Unmap()]
	if !ok {
		return 0
	}
	mtu, err := inner(n, path, vtep)
	if err == nil && mtu < port && n.Spec.Encrypted() {
		mtu, err = vxlan.EncryptedWay(path, vtep)
	}
	if err != nil || mtu >= port {
		return 0
	}
	return mtu
}

// narrowest is the way to a service: a balancer chooses among its tasks after
// the sender has made the packet, so it must fit all of them.
func (d *deriver) narrowest(n weft.Network, service weft.ID, port int) int {
	least := 0
	for _, e := range d.of(n.ID, service) {
		if e.local {
			continue
		}
		if way := d.way(n, e.vtep, port); way != 0 && (least == 0 || way < least) {
			least = way
		}
	}
	return least
}
