package netstate

import (
	"bytes"
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
// an address must never stand for two endpoints, not even for a moment. Lists to
// which have adds nothing are those of want.
func unionNetwork(have, want vxlan.Network) vxlan.Network {
	type portKey struct {
		task   weft.ID
		ifName string
	}
	ports, _ := trimmed(have.Ports, want.Ports, func(a, b *vxlan.Port) bool { return samePort(a, b) && bytes.Equal(a.MAC, b.MAC) })
	peers, _ := trimmed(have.Peers, want.Peers, func(a, b *vxlan.Peer) bool { return samePeer(a, b) && a.MTU == b.MTU && a.Native == b.Native })
	vips, _ := trimmed(have.VIPs, want.VIPs, func(a, b *vxlan.VIP) bool { return sameVIP(a, b) && a.MTU == b.MTU })
	if len(ports)+len(peers) > 0 {
		free := map[netip.Addr]bool{} // addresses of those two that want gives to nobody
		for i := range ports {
			for _, a := range ports[i].Addrs() {
				free[a.Addr()] = true
			}
		}
		for i := range peers {
			free[peers[i].Addr] = true
		}
		for i := range want.Ports {
			for _, a := range want.Ports[i].Addrs() {
				delete(free, a.Addr())
			}
		}
		for i := range want.Peers {
			delete(free, want.Peers[i].Addr)
		}
		ports = slices.DeleteFunc(slices.Clone(ports), func(p vxlan.Port) bool {
			return slices.ContainsFunc(p.Addrs(), func(a netip.Prefix) bool { return !free[a.Addr()] })
		})
		peers = slices.DeleteFunc(slices.Clone(peers), func(p vxlan.Peer) bool { return !free[p.Addr] })
	}
	if !want.Native { // then nobody is reached so any more
		for i := range peers {
			peers[i].Native = false
		}
	}
	want.Ports = union(ports, want.Ports, func(p vxlan.Port) portKey { return portKey{p.Task, p.IfName} })
	want.Peers = union(peers, want.Peers, func(p vxlan.Peer) netip.Addr { return p.Addr })
	want.VIPs = union(vips, want.VIPs, func(v vxlan.VIP) netip.Addr { return v.Addr })
	if want.HostLeg == nil {
		want.HostLeg = have.HostLeg
	}
	return want
}

// union is want, and what of have it has no key of.
func union[T any, K comparable](have, want []T, key func(T) K) []T {
	if len(have) == 0 {
		return want
	}
	more := make(map[K]bool, len(have))
	for _, v := range have {
		more[key(v)] = true
	}
	for _, v := range want {
		delete(more, key(v))
	}
	out := slices.Clip(want)
	for _, v := range have {
		if more[key(v)] {
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
