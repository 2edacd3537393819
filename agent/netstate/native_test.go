package netstate

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// TestNativeFollowsOptionAndProof: a peer is native exactly if the network asks for
// it, the engine can, it pays, nothing overlaps, and its way is proven; what is
// to be proven is asked for, and nothing else.
func TestNativeFollowsOptionAndProof(t *testing.T) {
	vtep3 := netip.MustParseAddr("10.99.0.3")
	rapid.Check(t, func(r *rapid.T) {
		in := base()
		in.Nodes = append(in.Nodes, Node{ID: "n3", VTEP: vtep3, IngressAddr: netip.MustParsePrefix("10.255.0.33/16")})
		in.Networks = slices.Clone(in.Networks)
		encap := rapid.SampledFrom([]string{"", weft.EncapVXLAN, weft.EncapNative, weft.EncapAuto}).Draw(r, "encap")
		options := map[string]string{}
		if encap != "" {
			options[weft.OptionEncap] = encap
		}
		isEncrypted := rapid.IntRange(0, 4).Draw(r, "encrypted") == 0
		if isEncrypted {
			options[weft.OptionEncrypted] = ""
		}
		in.Networks[1].Spec.Options = options
		overlaps := rapid.IntRange(0, 4).Draw(r, "overlap") == 0
		if overlaps {
			in.Networks[0].Spec.Subnets = []weft.Subnet{{Prefix: netip.MustParsePrefix("10.0.24.0/24")}}
		}
		in.Networks[2].Spec.Options = map[string]string{weft.OptionEncap: weft.EncapNative} // the ingress never is
		in.CutsTunnels = rapid.Bool().Draw(r, "link cuts tunnels")
		can := rapid.Bool().Draw(r, "engine can")
		proven := map[vxlan.NativeWay]bool{}
		for _, v := range []netip.Addr{vtep2, vtep3} {
			for _, vni := range []uint32{front.VNI, weft.IngressVNI} {
				if rapid.Bool().Draw(r, "proven") {
					proven[vxlan.NativeWay{VNI: vni, VTEP: v}] = true
				}
			}
		}
		if can {
			in.Proven = proven
		}
		in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
		far := remoteWeb(3, "10.0.16.5", weft.EndpointReady)
		far.Owner, far.VTEP = "n3", vtep3
		in.Endpoints = []weft.OwnedEndpoint{remoteWeb(2, "10.0.16.4", weft.EndpointReady), far, remoteWeb(4, "10.0.16.6", weft.EndpointStarting)}

		takes := can && (encap == weft.EncapNative || encap == weft.EncapAuto) && !isEncrypted && !overlaps
		sends := takes && (encap == weft.EncapNative || !in.CutsTunnels)
		out := Derive(in)
		if err := vxlan.Validate(out.Overlay); err != nil {
			r.Fatal(err)
		}
		n := out.Overlay.Networks[front.VNI]
		if n.Native != takes {
			r.Fatalf("native %t, want %t", n.Native, takes)
		}
		for vni, n := range out.Overlay.Networks {
			for _, p := range n.Peers {
				want := vni == front.VNI && sends && proven[vxlan.NativeWay{VNI: vni, VTEP: p.VTEP}]
				if p.Native != want {
					r.Fatalf("network %d: peer %s is native: %t, want %t", vni, p.Addr, p.Native, want)
				}
			}
		}
		want := map[vxlan.NativeWay]vxlan.NativeEnds{}
		if sends {
			from := []netip.Addr{netip.MustParseAddr("10.0.16.3")}
			want[vxlan.NativeWay{VNI: front.VNI, VTEP: vtep2}] = vxlan.NativeEnds{From: from, To: []netip.Addr{netip.MustParseAddr("10.0.16.4"), netip.MustParseAddr("10.0.16.6")}}
			want[vxlan.NativeWay{VNI: front.VNI, VTEP: vtep3}] = vxlan.NativeEnds{From: from, To: []netip.Addr{netip.MustParseAddr("10.0.16.5")}}
		}
		if !maps.EqualFunc(out.Native, want, func(a, b vxlan.NativeEnds) bool {
			return slices.Equal(a.From, b.From) && slices.Equal(a.To, b.To)
		}) {
			r.Fatalf("to prove: %v, want %v", out.Native, want)
		}
	})
}

// TestUnionIsNativeAsWanted: a peer that only the past has is not reached without
// encapsulation on a network that is not native any more; the engine would
// refuse the network.
func TestUnionIsNativeAsWanted(t *testing.T) {
	in := base()
	in.Networks = slices.Clone(in.Networks)
	in.Networks[1].Spec.Options = map[string]string{weft.OptionEncap: weft.EncapNative}
	in.Proven = map[vxlan.NativeWay]bool{{VNI: front.VNI, VTEP: vtep2}: true}
	in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
	in.Endpoints = []weft.OwnedEndpoint{remoteWeb(2, "10.0.16.4", weft.EndpointReady)}
	have := Derive(in).Overlay
	if !have.Networks[front.VNI].Peers[0].Native {
		t.Fatal("the peer is not native")
	}
	in.Proven, in.Endpoints = nil, []weft.OwnedEndpoint{remoteWeb(3, "10.0.16.5", weft.EndpointReady)}
	both := Union(have, Derive(in).Overlay)
	if n := both.Networks[front.VNI]; len(n.Peers) != 2 || n.Native {
		t.Errorf("peers %v, native %t", n.Peers, n.Native)
	}
	if err := vxlan.Validate(both); err != nil {
		t.Error(err)
	}
	if !have.Networks[front.VNI].Peers[0].Native {
		t.Error("the argument was changed")
	}
}
