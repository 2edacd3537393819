package netstate

import (
	"bytes"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Missing are the addresses, by network, that want has and that have does not lead
// to in the same way: what must not be named while the kernel holds have. The size
// of packets on the way is no part of it.
func Missing(have, want vxlan.State) map[weft.ID]map[netip.Addr]bool {
	out := map[weft.ID]map[netip.Addr]bool{}
	for vni, w := range want.Networks {
		h := have.Networks[vni]
		if h.ID != w.ID || h.VTEP != w.VTEP || h.Port != w.Port || h.Encrypted != w.Encrypted {
			h = vxlan.Network{}
		}
		m := missing{}
		absent(m, h.Ports, w.Ports, portAddrs, samePort)
		absent(m, h.Peers, w.Peers, func(p *vxlan.Peer) []netip.Addr { return []netip.Addr{p.Addr} }, samePeer)
		absent(m, h.VIPs, w.VIPs, func(v *vxlan.VIP) []netip.Addr { return []netip.Addr{v.Addr} }, sameVIP)
		if w.Encrypted {
			m.addStrange(have.Encryption, want.Encryption, w.Peers)
		}
		if len(m) > 0 {
			out[w.ID] = m
		}
	}
	return out
}

// missing are addresses of one network.
type missing map[netip.Addr]bool

// addStrange adds the peers on nodes whose keys are not those of want.
func (m missing) addStrange(have, want vxlan.Encryption, peers []vxlan.Peer) {
	known := map[netip.Addr]bool{}
	for _, w := range want.Peers {
		known[w.VTEP] = slices.ContainsFunc(have.Peers, func(h vxlan.EncryptionPeer) bool {
			return h.Node == w.Node && h.VTEP == w.VTEP && slices.Equal(h.Keys, w.Keys)
		})
	}
	for _, p := range peers {
		if !known[p.VTEP] {
			m[p.Addr.Unmap()] = true
		}
	}
}

// absent adds the addresses of what is in want and not, or otherwise, in have. Both
// begin and end alike, mostly.
func absent[T any](to missing, have, want []T, addrs func(*T) []netip.Addr, same func(a, b *T) bool) {
	if have, want = trimmed(have, want, same); len(want) == 0 {
		return
	}
	holders := make(map[netip.Addr]*T, len(have))
	for i := range have {
		for _, a := range addrs(&have[i]) {
			holders[a] = &have[i]
		}
	}
	for i := range want {
		for _, a := range addrs(&want[i]) {
			if h := holders[a]; h == nil || !same(h, &want[i]) {
				to[a.Unmap()] = true
			}
		}
	}
}

func portAddrs(p *vxlan.Port) []netip.Addr { return bare(p.Addrs()) }

func samePort(a, b *vxlan.Port) bool {
	return a.Task == b.Task && a.NetNS == b.NetNS && a.IfName == b.IfName && a.Addr == b.Addr && a.Addr6 == b.Addr6
}

func samePeer(a, b *vxlan.Peer) bool {
	return a.Addr == b.Addr && a.VTEP == b.VTEP && bytes.Equal(a.MAC, b.MAC)
}

func sameVIP(a, b *vxlan.VIP) bool { return a.Addr == b.Addr && bytes.Equal(a.MAC, b.MAC) }
