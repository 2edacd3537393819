package bpf

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

var (
	meshHosts   = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")}
	meshClients = []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("203.0.113.9")}
)

func drawPublished(r *rapid.T) []ingress.Published {
	var out []ingress.Published
	for range rapid.IntRange(0, 4).Draw(r, "ports") {
		p := ingress.Published{
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP, weft.SCTP}).Draw(r, "protocol"),
			Port:     uint16(rapid.IntRange(30000, 30006).Draw(r, "port")), Target: uint16(rapid.IntRange(80, 84).Draw(r, "target")),
			Count: uint16(rapid.IntRange(0, 3).Draw(r, "count")), HideClient: rapid.IntRange(0, 3).Draw(r, "hidden") == 0, Host: rapid.IntRange(0, 5).Draw(r, "host") == 0,
		}
		if rapid.Bool().Draw(r, "bound") {
			p.IPs = meshHosts[rapid.IntRange(0, 1).Draw(r, "address"):]
		}
		if rapid.Bool().Draw(r, "limited") {
			p.Allow = []netip.Prefix{netip.PrefixFrom(meshClients[rapid.IntRange(0, 1).Draw(r, "client")], 24)}
		}
		for n := range 3 {
			if rapid.Bool().Draw(r, "backend") {
				p.Backends = append(p.Backends, meshBackend(n, rapid.Bool().Draw(r, "draining")))
			}
		}
		out = append(out, p)
	}
	return out
}

func meshBackend(n int, drains bool) ingress.Backend {
	b := ingress.Backend{Task: weft.ID(fmt.Sprint(n)), Addr: netip.AddrFrom4([4]byte{10, 0, 16, byte(n)}), MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(n)}, Draining: drains}
	if n > 0 {
		b.Addr6 = netip.MustParseAddr(fmt.Sprintf("fd16::%d", n))
	}
	return b
}

// slowAllows asks every port of every entry of the table.
func slowAllows(published []ingress.Published, f flow) bool {
	for _, p := range published {
		if len(p.IPs) > 0 && !slices.Contains(p.IPs, f.asked) || len(p.Allow) > 0 && !p.Allow[0].Contains(f.client) {
			continue
		}
		if p.Host || p.HideClient || p.Protocol == weft.TCP && f.proto != 6 || p.Protocol == weft.UDP && f.proto != 17 || p.Protocol == weft.SCTP {
			continue
		}
		for i := range max(p.Count, 1) {
			for _, b := range p.Backends {
				if p.Port+i == f.port && p.Target+i == f.target && vxlan.MACOf(b.MAC) == f.backend && (f.addr == b.Addr || f.addr == b.Addr6) {
					return true
				}
			}
		}
	}
	return false
}

// TestFlowsOfTables: over any sequence of tables, the flows that stay are those
// that the table allows, although they are read only when something was lost; and a
// port's bit is set if flows to it may go past the host.
func TestFlowsOfTables(t *testing.T) {
	var every []flow
	for _, proto := range []uint32{6, 17} {
		for port := uint16(29999); port < 30010; port++ {
			for target := uint16(80); target < 88; target++ {
				for n := range 3 {
					b := meshBackend(n, false)
					for _, a := range []netip.Addr{b.Addr, b.Addr6} {
						for i := range meshHosts {
							if a.IsValid() {
								every = append(every, flow{proto, meshClients[i], meshHosts[0], port, target, vxlan.MACOf(b.MAC), a}, flow{proto, meshClients[i], meshHosts[1], port, target, vxlan.MACOf(b.MAC), a})
							}
						}
					}
				}
			}
		}
	}
	rapid.Check(t, func(r *rapid.T) {
		var before *leads
		there := map[flow]bool{}
		for range rapid.IntRange(1, 5).Draw(r, "passes") {
			published := drawPublished(r)
			bits, now := planMesh(published)
			if before == nil || now.lost(*before) {
				for f := range there {
					if !now.allows(f) {
						delete(there, f)
					}
				}
			}
			before = &now
			for _, f := range every {
				want := slowAllows(published, f)
				if got := now.allows(f); got != want {
					r.Fatalf("flow %+v is allowed: %v, want %v by %+v", f, got, want, published)
				}
				if there[f] && !want {
					r.Fatalf("flow %+v has stayed, with %+v", f, published)
				}
				if want {
					there[f] = true
				}
			}
			for port := uint32(29990); port < 30020; port++ {
				for _, proto := range []uint32{6, 17} {
					want := slices.ContainsFunc(published, func(p ingress.Published) bool {
						n, ok := protocolNumber(p.Protocol)
						return ok && n == proto && !p.Host && !p.HideClient && port >= uint32(p.Port) && port < uint32(p.Port)+uint32(max(p.Count, 1))
					})
					n := port
					if proto == 17 {
						n += 1 << 16
					}
					if got := bits[n/64]>>(n%64)&1 == 1; got != want {
						r.Fatalf("bit of port %d of protocol %d: %v, want %v by %+v", port, proto, got, want, published)
					}
				}
			}
		}
	})
}

// TestRoutesOfLinks: an address is found as among all routes of its link, by the
// longest prefix.
func TestRoutesOfLinks(t *testing.T) {
	prefixes := []string{"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "192.0.2.0/24", "::/0", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1::7/128"}
	vias := []string{"", "10.9.9.1", "10.9.9.2", "fe80::1"}
	clients := []string{"10.1.2.3", "10.1.2.4", "10.1.9.9", "10.9.9.9", "192.0.2.7", "203.0.113.1", "2001:db8:1::7", "2001:db8:1::8", "2001:db8:2::1", "2001:4860::1"}
	rapid.Check(t, func(r *rapid.T) {
		var routes []hostRoute
		for range rapid.IntRange(0, 8).Draw(r, "routes") {
			h := hostRoute{Link: rapid.IntRange(1, 3).Draw(r, "link"), Dst: netip.MustParsePrefix(rapid.SampledFrom(prefixes).Draw(r, "prefix")),
				MTU: rapid.SampledFrom([]int{1400, 1500}).Draw(r, "mtu"), IsMain: rapid.IntRange(0, 9).Draw(r, "main") > 0}
			if v := rapid.SampledFrom(vias).Draw(r, "via"); v != "" && (netip.MustParseAddr(v).Is6() || h.Dst.Addr().Is4()) {
				h.Via = netip.MustParseAddr(v)
			}
			routes = append(routes, h)
		}
		got := reachesOf([]int{1, 2}, routes)
		for _, c := range clients {
			for link := 1; link <= 3; link++ {
				want, wanted := slowReach(routes, link, netip.MustParseAddr(c))
				have, ok := longest(got, link, netip.MustParseAddr(c))
				if ok != wanted || have != want {
					r.Fatalf("%s by link %d: %+v, %v; want %+v, %v by %+v", c, link, have, ok, want, wanted, routes)
				}
			}
		}
	})
}

// slowReach is what the routes say, all of them asked.
func slowReach(routes []hostRoute, link int, client netip.Addr) (h hopValue, ok bool) {
	if link == 3 { // nobody comes by it
		return h, false
	}
	bits, areRules := -1, false
	for _, r := range routes {
		areRules = areRules || r.Link != 3 && !r.IsMain
		if r.Link != link || !r.Dst.Contains(client) || r.Dst.Bits() < bits {
			continue
		}
		one := hopValue{MTU: uint32(r.MTU), Family: 2}
		if client.Is6() || r.Via.Is6() {
			one.Family = 10
		}
		copy(one.NextHop[:], r.Via.AsSlice())
		if r.Dst.Bits() == bits && one != h {
			one = hopValue{MTU: min(one.MTU, h.MTU)}
		}
		h, ok, bits = one, true, r.Dst.Bits()
	}
	if areRules {
		h = hopValue{MTU: h.MTU}
	}
	return h, ok
}

// longest is what the kernel finds in the map.
func longest(in map[reachKey]hopValue, link int, client netip.Addr) (hopValue, bool) {
	for bits := client.BitLen(); bits >= 0; bits-- {
		if h, ok := in[reachOf(link, netip.PrefixFrom(client, bits))]; ok {
			return h, true
		}
	}
	return hopValue{}, false
}

func TestManyRoutesAreCut(t *testing.T) {
	routes := []hostRoute{{Link: 1, Dst: netip.MustParsePrefix("0.0.0.0/0"), MTU: 1500, IsMain: true}}
	for i := range 2 * maxReaches {
		routes = append(routes, hostRoute{Link: 1, Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 12), byte(i >> 4), byte(i << 4)}), 28), MTU: 1400, IsMain: true})
	}
	got := reachesOf([]int{1}, routes)
	if len(got) != maxReaches {
		t.Errorf("%d routes of %d, the map holds %d", len(got), len(routes), maxReaches)
	}
	if _, ok := longest(got, 1, netip.MustParseAddr("203.0.113.1")); !ok {
		t.Error("the default route is left out")
	}
}

func TestClientsComeBy(t *testing.T) {
	global := []netip.Addr{netip.MustParseAddr("fe80::1"), netip.MustParseAddr("192.0.2.1")}
	for name, c := range map[string]struct {
		link hostLink
		want bool
	}{
		"a card":                       {hostLink{Name: "eth0", IsEthernet: true, Addrs: global}, true},
		"another's bridge":             {hostLink{Name: "docker0", IsEthernet: true, Addrs: global}, true},
		"a port of one":                {hostLink{Name: "veth1", IsEthernet: true, HasMaster: true, Addrs: global}, false},
		"without addresses":            {hostLink{Name: "eth1", IsEthernet: true}, false},
		"with a link-local one":        {hostLink{Name: "eth1", IsEthernet: true, Addrs: global[:1]}, false},
		"the loopback":                 {hostLink{Name: "lo", Addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, false},
		"a tunnel without Ethernet":    {hostLink{Name: "wg0", Addrs: global}, false},
		"the leg":                      {hostLink{Name: weft.IngressLeg, IsEthernet: true, Addrs: global}, false},
		"the gateway":                  {hostLink{Name: weft.GatewayBridge, IsEthernet: true, Addrs: global}, false},
		"whatever else weft has made":  {hostLink{Name: "wp1", IsEthernet: true, Alias: weft.LinkAlias("n") + " x", Addrs: global}, false},
		"somebody's of a similar name": {hostLink{Name: "wp1", IsEthernet: true, Alias: "weftless", Addrs: global}, true},
	} {
		if got := c.link.isOutside(); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestMeshConfigIsChecked(t *testing.T) {
	table := ingress.Split{}
	for name, c := range map[string]MeshConfig{
		"no node":         {Dir: "/run/x", Table: table},
		"relative folder": {Node: "n", Dir: "x", Table: table},
		"no engine":       {Node: "n", Dir: "/run/x"},
	} {
		if _, err := NewMesh(c); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestMeshLayouts(t *testing.T) {
	spec, err := loadMeshPrograms()
	must(t, err)
	for _, c := range []struct {
		name       string
		key, value any
	}{
		{meshMapEntry, uint32(0), entryValue{}}, {meshMapPublished, uint32(0), uint64(0)}, {meshMapReaches, reachKey{}, hopValue{}},
		{meshMapRequests, endsValue{}, turnValue{}}, {meshMapAnswers, endsValue{}, turnValue{}},
		{meshMapRequestsUdp, endsValue{}, turnValue{}}, {meshMapAnswersUdp, endsValue{}, turnValue{}},
		{meshMapPassings, [0]byte{}, passingValue{}},
	} {
		m := spec.Maps[c.name]
		if k, v := binary.Size(c.key), binary.Size(c.value); uint32(k) != m.KeySize || uint32(v) != m.ValueSize {
			t.Errorf("%s: Go has %d and %d bytes, C %d and %d", c.name, k, v, m.KeySize, m.ValueSize)
		}
	}
	if got := spec.Maps[meshMapPublished].MaxEntries; got != portWords {
		t.Errorf("map %s has %d words, want %d", meshMapPublished, got, portWords)
	}
	if got := spec.Maps[meshMapReaches].MaxEntries; got != maxReaches {
		t.Errorf("map %s has room for %d, want %d", meshMapReaches, got, maxReaches)
	}
	for _, name := range append(slices.Clone(meshOwn), meshShared...) {
		if spec.Maps[name] == nil {
			t.Errorf("no program knows map %s", name)
		}
	}
	if want := len(meshOwn) + len(meshShared); len(spec.Maps) != want {
		t.Errorf("the programs have %d maps, want %d", len(spec.Maps), want)
	}
}

// leaves is an engine that leaves out all ports.
type leaves struct{ ingress.Engine }

func (leaves) Unanswered(ingress.Table) []ingress.Unanswered {
	return []ingress.Unanswered{{Reason: "none"}}
}

// What the engine below does not answer is not answered.
func TestMeshTellsWhatIsNotAnswered(t *testing.T) {
	m, err := NewMesh(MeshConfig{Node: "n", Dir: "/nowhere", Table: leaves{}})
	if err != nil {
		t.Fatal(err)
	}
	if got := ingress.UnansweredBy(m, ingress.Table{}); len(got) != 1 || got[0].Reason != "none" {
		t.Errorf("%+v", got)
	}
}
