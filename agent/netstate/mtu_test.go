package netstate

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Every peer's MTU is what its own path carries, the port's what the link does
// within the bound of the spec, and a service address fits all its backends.
func TestMTUFollowsPaths(t *testing.T) {
	vtep3 := netip.MustParseAddr("10.99.0.77")
	rapid.Check(t, func(r *rapid.T) {
		in := base()
		in.MTU = rapid.SampledFrom([]int{9000, 1500, 1420}).Draw(r, "link")
		paths := rapid.SampledFrom([]int{0, 9000, 1500, 1420, 1280, 100})
		in.Paths = map[netip.Addr]int{}
		for _, v := range []netip.Addr{vtep2, vtep3} {
			if p := paths.Draw(r, "path"); p != 0 {
				in.Paths[v] = p
			}
		}
		in.Nodes = append(in.Nodes, Node{ID: "n3", VTEP: vtep3, IngressAddr: netip.MustParsePrefix("10.255.0.33/16")})
		overhead := 50
		if rapid.Bool().Draw(r, "encrypted") {
			in.Networks[1].Spec.Options, overhead = map[string]string{weft.OptionEncrypted: ""}, 60
		}
		bound := rapid.SampledFrom([]int{0, 1300, 8000}).Draw(r, "bound")
		if bound > 0 {
			if in.Networks[1].Spec.Options == nil {
				in.Networks[1].Spec.Options = map[string]string{}
			}
			in.Networks[1].Spec.Options[weft.OptionMTU] = fmt.Sprint(bound)
		}
		in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
		near, far := remoteWeb(2, "10.0.16.4", weft.EndpointReady), remoteWeb(3, "10.0.16.5", weft.EndpointDraining)
		far.Owner, far.VTEP = "n3", vtep3
		in.Endpoints = []weft.OwnedEndpoint{near, far}

		out := Derive(in)
		n := out.Overlay.Networks[front.VNI]
		port := in.MTU - overhead
		if bound > 0 {
			port = min(port, bound)
		}
		if n.MTU != port {
			r.Fatalf("ports have %d, want %d", n.MTU, port)
		}
		effective := func(mtu int) int {
			if mtu == 0 {
				return n.MTU
			}
			return mtu
		}
		least := port
		for _, p := range n.Peers {
			want := port
			if path := in.Paths[p.VTEP]; path >= 68+overhead { // less leaves nothing for an inner packet
				want = min(port, path-overhead)
				if want < port && overhead == 60 {
					want = want / 16 * 16 // WireGuard's padding
				}
			}
			if got := effective(p.MTU); got != want || p.MTU >= port {
				r.Fatalf("peer %s has %d, want %d of %d", p.Addr, p.MTU, want, port)
			}
			least = min(least, want)
		}
		for _, v := range n.VIPs {
			if effective(v.MTU) != least {
				r.Fatalf("service address has %d, want %d", v.MTU, least)
			}
		}
		mesh := out.Overlay.Networks[weft.IngressVNI]
		for _, p := range mesh.Peers {
			if path := in.Paths[p.VTEP]; path == 1280 && p.MTU != 1230 {
				r.Fatalf("the leg of %s has %d, want 1230", p.VTEP, p.MTU)
			}
		}
		if err := vxlan.Validate(out.Overlay); err != nil {
			r.Fatalf("the engine would refuse it: %v", err)
		}
	})
}

// IPv6 is never given less than its standard asks for.
func TestMTUOfIPv6(t *testing.T) {
	in := base()
	in.Networks[1].Spec.IPv6 = true
	in.MTU, in.Networks[1].Spec.Subnets = 1280, []weft.Subnet{{Prefix: netip.MustParsePrefix("fd77::/64")}}
	in.Local = []LocalTask{localWeb(1, "fd77::3/64", "10.255.0.5/16", weft.EndpointReady)}
	if got := Derive(in).Overlay.Networks[front.VNI].MTU; got != 1280 {
		t.Errorf("MTU = %d over an underlay of 1280, want 1280", got)
	}
	in.MTU = 1500
	if got := Derive(in).Overlay.Networks[front.VNI].MTU; got != 1450 {
		t.Errorf("MTU = %d over an underlay of 1500, want 1450", got)
	}
}
