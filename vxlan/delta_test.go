package vxlan_test

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// TestDeltaIsDiff holds Delta against its slow twin: whatever it takes on is
// what Diff says of valid states, and it takes on every change of one peer or one
// service address of a network in the clear.
func TestDeltaIsDiff(t *testing.T) {
	taken := 0
	rapid.Check(t, func(t *rapid.T) {
		left := vxlan.Normalize(draw(t, "left"))
		want := vxlan.Normalize(left)
		if rapid.Bool().Draw(t, "keeps ways") {
			for vni, n := range left.Networks {
				n.Ways = true
				left.Networks[vni] = n
			}
		}
		simple := true
		for _, vni := range slices.Sorted(maps.Keys(want.Networks)) {
			n := want.Networks[vni]
			switch rapid.IntRange(0, 6).Draw(t, fmt.Sprint("change of ", vni)) {
			case 0: // one more endpoint, of one or two addresses
				p := vxlan.Peer{Addr: netip.AddrFrom4([4]byte{10, 0, 0, 90}), MAC: weft.EndpointMAC("new", second(90)), VTEP: netip.AddrFrom4([4]byte{10, 99, 0, 9})}
				n.Peers = append(n.Peers, p)
				if rapid.Bool().Draw(t, "two") {
					p.Addr = second(90)
					n.Peers = append(n.Peers, p)
				}
			case 1: // one less
				if len(n.Peers) > 0 {
					i := rapid.IntRange(0, len(n.Peers)-1).Draw(t, "which")
					n.Peers = slices.Delete(n.Peers, i, i+1)
				}
			case 2: // an address has a new holder
				if len(n.Peers) > 0 {
					i := rapid.IntRange(0, len(n.Peers)-1).Draw(t, "which")
					n.Peers[i].MAC = weft.EndpointMAC("other", n.Peers[i].Addr)
				}
			case 3: // one moves to another node, with both addresses
				if len(n.Peers) > 0 {
					mac := vxlan.MACOf(n.Peers[0].MAC)
					for i := range n.Peers {
						if vxlan.MACOf(n.Peers[i].MAC) == mac {
							n.Peers[i].VTEP = netip.AddrFrom4([4]byte{10, 99, 0, 8})
						}
					}
				}
			case 6: // a way becomes native, or encapsulated, and narrower
				for i := range n.Peers {
					n.Peers[i].Native, n.Peers[i].MTU = n.Native && !n.Peers[i].Native, 1290
				}
			case 4:
				a := netip.AddrFrom4([4]byte{10, 0, 0, 91})
				n.VIPs = append(n.VIPs, vxlan.VIP{Addr: a, MAC: weft.VIPMAC("s", a)})
			case 5:
				continue
			}
			if n.Encrypted {
				simple = false
			}
			want.Networks[vni] = n
		}
		if vxlan.Validate(want) != nil {
			simple = false // half a twin has moved
		}
		ops := vxlan.Diff(left, want)
		got, _, ok := vxlan.Delta(left, want)
		if ok && !reflect.DeepEqual(got, ops) {
			t.Fatalf("Delta gives\n%v\nDiff\n%v", got, ops)
		}
		if ok && vxlan.Validate(want) != nil {
			t.Fatalf("Delta takes a wish that is not valid: %v", vxlan.Validate(want))
		}
		if !ok && simple && len(ops) > 0 {
			t.Fatalf("Delta leaves %v to others", ops)
		}
		if ok {
			taken++
		}
	})
	if taken == 0 {
		t.Error("Delta took on nothing")
	}
}

// TestDeltaLeavesTheRest: any two states, most of which differ in more.
func TestDeltaLeavesTheRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		left, want := draw(t, "left"), draw(t, "want")
		if got, _, ok := vxlan.Delta(left, want); ok && !reflect.DeepEqual(got, vxlan.Diff(left, want)) {
			t.Fatalf("Delta gives\n%v\nDiff\n%v", got, vxlan.Diff(left, want))
		}
		if got, _, ok := vxlan.Delta(left, left); ok {
			t.Fatalf("nothing has changed, and Delta gives %v", got)
		}
	})
}

// TestDeltaRefusesWhatMayBeWrong: an address or a hardware address that stands
// twice is for Validate to judge.
func TestDeltaRefusesWhatMayBeWrong(t *testing.T) {
	a := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
	node := netip.MustParseAddr("10.99.0.3")
	peer := func(i byte) vxlan.Peer {
		return vxlan.Peer{Addr: a(i), MAC: weft.EndpointMAC(weft.ID(fmt.Sprint("t", i)), a(i)), VTEP: node}
	}
	left := vxlan.State{Networks: map[uint32]vxlan.Network{4097: {
		ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789,
		Peers: []vxlan.Peer{peer(1), peer(2)}, VIPs: []vxlan.VIP{{Addr: a(9), MAC: weft.VIPMAC("s", a(9))}},
		Ports: []vxlan.Port{{Task: "p", NetNS: "/run/p", IfName: "eth0", Addr: netip.PrefixFrom(a(5), 24), MAC: weft.EndpointMAC("p", a(5))}},
	}}}
	for name, add := range map[string]vxlan.Peer{
		"address of a peer":            {Addr: a(1), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"address of a service":         {Addr: a(9), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"address of a port":            {Addr: a(5), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"hardware address of a port":   {Addr: a(7), MAC: weft.EndpointMAC("p", a(5)), VTEP: node},
		"hardware address of a peer":   {Addr: a(7), MAC: weft.EndpointMAC("t1", a(1)), VTEP: node},
		"VTEP that is this node":       {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: netip.MustParseAddr("10.99.0.1")},
		"VTEP of another family":       {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: netip.MustParseAddr("fd00::1")},
		"hardware address of a group":  {Addr: a(7), MAC: []byte{1, 0, 0, 0, 0, 7}, VTEP: node},
		"no hardware address":          {Addr: a(7), VTEP: node},
		"hardware address of a VIP":    {Addr: a(7), MAC: weft.VIPMAC("s", a(9)), VTEP: node},
		"MTU of the way out of bounds": {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: node, MTU: 3},
	} {
		want := vxlan.Normalize(left)
		n := want.Networks[4097]
		n.Peers = append(n.Peers, add)
		want.Networks[4097] = n
		if ops, _, ok := vxlan.Delta(left, want); ok {
			t.Errorf("%s: taken on as %v", name, ops)
		}
	}
}
