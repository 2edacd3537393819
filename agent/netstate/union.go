package netstate

import (
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Union is want plus everything that only have holds. It is the state between
// two desired states: what is new can be reached before a name or a balancer
// speaks of it, and what goes is still reachable until none does any more.
// Where both describe the same thing, want is right.
func Union(have, want vxlan.State) vxlan.State {
	out := vxlan.State{Networks: map[uint32]vxlan.Network{}, Encryption: want.Encryption}
	out.Encryption.Epoch = max(have.Encryption.Epoch, want.Encryption.Epoch)
	out.Encryption.Peers = union(have.Encryption.Peers, want.Encryption.Peers, func(p vxlan.EncryptionPeer) weft.ID { return p.Node })
	for vni, n := range want.Networks {
		if old, ok := have.Networks[vni]; ok && old.ID == n.ID {
			n = unionNetwork(old, n)
		}
		out.Networks[vni] = n
	}
	for vni, n := range have.Networks {
		if _, ok := want.Networks[vni]; !ok {
			out.Networks[vni] = n
		}
	}
	return out
}

// unionNetwork keeps what have adds, unless want gives its address to another:
// an address must never stand for two endpoints, not even for a moment.
func unionNetwork(have, want vxlan.Network) vxlan.Network {
	type portKey struct {
		task   weft.ID
		ifName string
	}
	taken := map[netip.Addr]bool{}
	for _, p := range want.Ports {
		for _, a := range p.Addrs() {
			taken[a.Addr()] = true
		}
	}
	for _, p := range want.Peers {
		taken[p.Addr] = true
	}
	oldPorts := slices.DeleteFunc(slices.Clone(have.Ports), func(p vxlan.Port) bool {
		return slices.ContainsFunc(p.Addrs(), func(a netip.Prefix) bool { return taken[a.Addr()] })
	})
	oldPeers := slices.DeleteFunc(slices.Clone(have.Peers), func(p vxlan.Peer) bool { return taken[p.Addr] })
	if !want.Native { // then nobody is reached so any more
		for i := range oldPeers {
			oldPeers[i].Native = false
		}
	}
	want.Ports = union(oldPorts, want.Ports, func(p vxlan.Port) portKey { return portKey{p.Task, p.IfName} })
	want.Peers = union(oldPeers, want.Peers, func(p vxlan.Peer) netip.Addr { return p.Addr })
	want.VIPs = union(have.VIPs, want.VIPs, func(v vxlan.VIP) netip.Addr { return v.Addr })
	if want.HostLeg == nil {
		want.HostLeg = have.HostLeg
	}
	return want
}

func union[T any, K comparable](have, want []T, key func(T) K) []T {
	seen := map[K]bool{}
	out := slices.Clone(want)
	for _, v := range want {
		seen[key(v)] = true
	}
	for _, v := range have {
		if !seen[key(v)] {
			out = append(out, v)
		}
	}
	return out
}

// Adds reports whether both, the Union of want and something else, has more than
// want.
func Adds(both, want vxlan.State) bool {
	if both.Encryption.Epoch != want.Encryption.Epoch || len(both.Encryption.Peers) != len(want.Encryption.Peers) || len(both.Networks) != len(want.Networks) {
		return true
	}
	for vni, w := range want.Networks {
		b := both.Networks[vni]
		if len(b.Ports) != len(w.Ports) || len(b.Peers) != len(w.Peers) || len(b.VIPs) != len(w.VIPs) || (b.HostLeg == nil) != (w.HostLeg == nil) {
			return true
		}
	}
	return false
}
