package netstate

import (
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// drawState has few addresses, tasks and nodes, so that two states have much in
// common.
func drawState(t *rapid.T, label string) vxlan.State {
	pick := func(n int, what string) byte { return byte(rapid.IntRange(0, n).Draw(t, label+" "+what)) }
	out := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for vni := range uint32(2) {
		n := vxlan.Network{ID: weft.ID([]string{"n", "m"}[vni]), VNI: vni, Port: 4789, VTEP: netip.MustParseAddr("10.99.0.1"), Encrypted: vni == 1}
		switch pick(8, "network") {
		case 0:
			continue
		case 1:
			n.ID += "2"
		case 2:
			n.Port = 4790
		}
		for a := byte(1); a <= 5; a++ {
			addr := netip.AddrFrom4([4]byte{10, 0, byte(vni), a})
			mac := net.HardwareAddr{2, 0, 0, 0, 0, pick(1, "holder")}
			switch pick(4, "kind") {
			case 0:
				n.Ports = append(n.Ports, vxlan.Port{Task: weft.ID(mac.String()), Addr: netip.PrefixFrom(addr, 24)})
			case 1, 2:
				n.Peers = append(n.Peers, vxlan.Peer{Addr: addr, MAC: mac, VTEP: netip.AddrFrom4([4]byte{10, 99, 0, 2 + pick(1, "node")}), MTU: int(pick(1, "mtu"))})
			case 3:
				n.VIPs = append(n.VIPs, vxlan.VIP{Addr: addr, MAC: mac})
			}
		}
		out.Networks[vni] = n
	}
	for i := range byte(2) {
		if pick(3, "has keys") > 0 {
			out.Encryption.Peers = append(out.Encryption.Peers, vxlan.EncryptionPeer{
				Node: weft.ID([]string{"b", "c"}[i]), VTEP: netip.AddrFrom4([4]byte{10, 99, 0, 2 + i}), Keys: []weft.NodeKey{{Epoch: uint64(pick(1, "key"))}},
			})
		}
	}
	return out
}

// way is all that leads to an address, as text; "" = nothing does. It is the slow
// twin of Missing.
func way(s vxlan.State, w vxlan.Network, a netip.Addr) string {
	n := s.Networks[w.VNI]
	if n.ID != w.ID || n.Port != w.Port || n.VTEP != w.VTEP || n.Encrypted != w.Encrypted {
		return ""
	}
	for _, p := range n.Ports {
		if p.Addr.Addr() == a {
			return "port of " + string(p.Task)
		}
	}
	for _, p := range n.Peers {
		if p.Addr != a {
			continue
		}
		keys := ""
		if n.Encrypted {
			i := slices.IndexFunc(s.Encryption.Peers, func(e vxlan.EncryptionPeer) bool { return e.VTEP == p.VTEP })
			if i < 0 {
				return ""
			}
			keys = " with the keys of " + string(s.Encryption.Peers[i].Node) + string(rune('0'+s.Encryption.Peers[i].Keys[0].Epoch))
		}
		return "peer " + p.MAC.String() + " at " + p.VTEP.String() + keys
	}
	for _, v := range n.VIPs {
		if v.Addr == a {
			return "service " + v.MAC.String()
		}
	}
	return ""
}

// TestMissing: an address is missing if what leads to it is not the same, or nothing
// does. Order and the size of packets are nothing.
func TestMissing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := drawState(t, "have"), drawState(t, "want")
		for vni, n := range have.Networks {
			if rapid.Bool().Draw(t, "other order") {
				n.Peers = slices.Clone(n.Peers)
				slices.Reverse(n.Peers)
				have.Networks[vni] = n
			}
		}
		expected := map[weft.ID]map[netip.Addr]bool{}
		for _, n := range want.Networks {
			holders(n, func(a netip.Addr, _ net.HardwareAddr) {
				if to := way(want, n, a); to == "" || way(have, n, a) != to {
					if expected[n.ID] == nil {
						expected[n.ID] = map[netip.Addr]bool{}
					}
					expected[n.ID][a] = true
				}
			})
		}
		got := Missing(have, want)
		if len(expected)+len(got) > 0 && !reflect.DeepEqual(got, expected) {
			for id := range got {
				t.Logf("%s: %v", id, got[id])
			}
			t.Fatalf("missing %v, want %v", got, expected)
		}
		both := Union(have, want)
		if added := Adds(both, want); added == reflect.DeepEqual(both, Union(want, want)) {
			t.Fatalf("adds: %v", added)
		}
	})
}
