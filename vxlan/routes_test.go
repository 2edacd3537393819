package vxlan_test

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft/vxlan"
)

var (
	subnet4 = netip.MustParsePrefix("10.0.16.0/24")
	subnet6 = netip.MustParsePrefix("fd77::/64")
)

// lookUp is what a kernel does with the routes: the longest prefix wins, and the
// port's own route is the rest.
func lookUp(routes []vxlan.Route, to netip.Addr, port int) int {
	best, mtu := -1, port
	for _, r := range routes {
		if r.Dst.Contains(to) && r.Dst.Bits() > best {
			best, mtu = r.Dst.Bits(), r.MTU
		}
	}
	return mtu
}

// TestRoutesGiveEachItsMTU: every address has its MTU by the longest prefix, no
// destination stands twice, the subnet's own route is left alone, and there are
// never more routes than narrow addresses.
func TestRoutesGiveEachItsMTU(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		n := vxlan.Network{MTU: rapid.SampledFrom([]int{1450, 8950}).Draw(r, "mtu"), Subnets: []netip.Prefix{subnet4, subnet6}}
		want := map[netip.Addr]int{}
		narrow := 0
		for i := range rapid.IntRange(0, 40).Draw(r, "addresses") {
			a := netip.AddrFrom4([4]byte{10, 0, 16, byte(i + 2)})
			switch rapid.IntRange(0, 5).Draw(r, "kind") {
			case 0:
				a = netip.MustParseAddr("fd77::")
				b := a.As16()
				b[15] = byte(i + 2)
				a = netip.AddrFrom16(b)
			case 1:
				a = netip.AddrFrom4([4]byte{10, 9, 9, byte(i + 2)}) // outside
			}
			mtu := rapid.SampledFrom([]int{0, 1450, 1370, 1230, 9000}).Draw(r, "way")
			if rapid.Bool().Draw(r, "VIP") {
				n.VIPs = append(n.VIPs, vxlan.VIP{Addr: a, MTU: mtu})
			} else {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MTU: mtu})
			}
			want[a] = n.MTU
			if mtu != 0 && a.Is6() {
				mtu = max(mtu, 1280)
			}
			if mtu != 0 && mtu < n.MTU {
				want[a], narrow = mtu, narrow+1
			}
		}
		routes := vxlan.Routes(n)
		for a, mtu := range want {
			if got := lookUp(routes, a, n.MTU); got != mtu {
				r.Fatalf("%s gets %d, want %d, by %v", a, got, mtu, routes)
			}
		}
		if len(routes) > narrow {
			r.Fatalf("%d routes for %d narrow addresses: %v", len(routes), narrow, routes)
		}
		seen := map[netip.Prefix]bool{subnet4: true, subnet6: true}
		for _, route := range routes {
			if seen[route.Dst] || route.Dst != route.Dst.Masked() {
				r.Fatalf("%s stands twice, is the port's own or has host bits: %v", route.Dst, routes)
			}
			seen[route.Dst] = true
		}
	})
}

// A jumbo node among plain ones: the number of routes does not grow with that of
// the peers.
func TestRoutesOfAUniformNetwork(t *testing.T) {
	n := vxlan.Network{MTU: 8950, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.16.0/20")}}
	for i := range 3000 {
		n.Peers = append(n.Peers, vxlan.Peer{Addr: netip.AddrFrom4([4]byte{10, 0, byte(16 + i>>8), byte(i)}), MTU: 1450})
	}
	n.Peers[5].MTU, n.Peers[6].MTU = 0, 1230
	want := []vxlan.Route{
		{Dst: netip.MustParsePrefix("10.0.16.0/21"), MTU: 1450},
		{Dst: netip.MustParsePrefix("10.0.16.5/32"), MTU: 8950},
		{Dst: netip.MustParsePrefix("10.0.16.6/32"), MTU: 1230},
		{Dst: netip.MustParsePrefix("10.0.24.0/21"), MTU: 1450},
	}
	if got := vxlan.Routes(n); !slices.Equal(got, want) {
		t.Errorf("routes = %v, want %v", got, want)
	}
	if got := vxlan.Routes(vxlan.Network{MTU: 1450, Subnets: n.Subnets, Peers: []vxlan.Peer{{Addr: netip.MustParseAddr("10.0.16.9")}}}); len(got) != 0 {
		t.Errorf("routes = %v where no way is narrow", got)
	}
}
