package nft

import (
	"encoding/binary"
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

var update = flag.Bool("update", false, "write golden files")

func testBackend(n byte, isDraining bool) ingress.Backend {
	id, addr := weft.ID([]byte{'t', '0' + n}), netip.AddrFrom4([4]byte{10, 0, 16, n})
	return ingress.Backend{Task: id, Addr: addr, Addr6: netip.AddrFrom16([16]byte{0: 0xfd, 15: n}), MAC: weft.EndpointMAC(id, addr), Draining: isDraining}
}

// namedRules is a ruleset and the name of its golden file.
type namedRules struct {
	name  string
	rules ruleset
}

// goldenRulesets are what stands in the kernel for a few tables.
func goldenRulesets() []namedRules {
	vip := func(n byte, b ...ingress.Backend) ingress.Service {
		a := netip.AddrFrom4([4]byte{10, 0, 16, n})
		return ingress.Service{ID: weft.ID([]byte{'s', n}), VIP: a, MAC: weft.VIPMAC("s", a), Backends: b}
	}
	many := make([]ingress.Backend, 0, 9)
	for n := byte(1); n <= 9; n++ {
		many = append(many, testBackend(n, false))
	}
	gateway := ingress.Gateway{
		Bridge: weft.GatewayBridge, Subnet: netip.MustParsePrefix("172.31.0.0/16"),
		Protect: []netip.Prefix{netip.MustParsePrefix("10.0.16.0/20"), netip.MustParsePrefix("10.0.32.0/20"), netip.MustParsePrefix("10.255.0.0/16")},
	}
	entry := ingress.Entry{Link: weft.IngressLeg, Addr: netip.MustParsePrefix("10.255.0.2/16"), Addr6: netip.MustParsePrefix("fd00:ff::2/64")}
	vip6 := func(n byte, b ...ingress.Backend) ingress.Service {
		s := vip(n, b...)
		s.VIP = netip.AddrFrom16([16]byte{0: 0xfd, 15: n})
		s.MAC = weft.VIPMAC("s", s.VIP)
		return s
	}
	both := ingress.Network{IPv6: true, Ports: []string{"wp1"}, Services: []ingress.Service{
		vip(200, testBackend(1, false)), vip6(200, testBackend(1, false)), vip6(201, testBackend(4, true)), vip6(202),
	}}
	options := []ingress.Published{
		{Service: "k", Protocol: weft.UDP, Port: 10000, Target: 10000, Count: 10001, Backends: many[:2]}, // ports kept
		{Service: "m", Protocol: weft.UDP, Port: 20001, Target: 40001, Count: 3, Backends: many[:1], HideClient: true},
		{Service: "e", Protocol: weft.SCTP, Port: 65530, Target: 65530, Count: 6, Backends: many[:1]}, // to the last port
		{Service: "b", Protocol: weft.TCP, Port: 30003, Target: 80, Backends: many[:1], IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.IPv6Loopback()}},
		{Service: "a", Protocol: weft.TCP, Port: 30004, Target: 80, Backends: many[:3], Allow: []netip.Prefix{
			netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("192.0.2.128/25"), netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("2001:db8::/32"),
		}},
		{Service: "4", Protocol: weft.TCP, Port: 30005, Target: 80, Backends: many[:1], IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, // IPv4 only
		{Service: "o", Protocol: weft.TCP, Port: 30003, Target: 81, Backends: many[1:2], IPs: []netip.Addr{netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("192.0.2.2")}, HideClient: true,
			Allow: []netip.Prefix{netip.MustParsePrefix("128.0.0.0/1")}},
		{Service: "o", Protocol: weft.UDP, Port: 40000, Count: 10, Target: 40000, Backends: many[:1], IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}},
		{Service: "p", Protocol: weft.UDP, Port: 40005, Count: 2, Target: 50005, Backends: many[1:2], IPs: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}},
		{Service: "h", Protocol: weft.TCP, Port: 8080, Target: 80, Host: true, Backends: []ingress.Backend{{Task: "h", Addr: netip.MustParseAddr("172.31.0.5")}}},
	}
	within := entry
	for _, a := range []string{"10.255.0.2", "10.255.1.3"} {
		addr := netip.MustParseAddr(a)
		within.Nodes = append(within.Nodes, ingress.EntryNode{MAC: weft.NodeMAC("n", addr), Addr: addr})
	}
	taskInside := wish{EntryTask: ingress.EntryTask{Link: "eth1", Addr: netip.MustParsePrefix("10.255.0.9/16"), Addr6: netip.MustParsePrefix("fd00:ff::9/64")}}
	withLeg := wish{EntryTask: taskInside.EntryTask, gateway: ingress.EntryTask{Link: weft.GatewayLeg}}
	return []namedRules{
		{"bridge_empty", bridgeRules(ingress.Network{}, true)},
		{"bridge_services", bridgeRules(ingress.Network{Services: []ingress.Service{
			vip(200, testBackend(1, false), testBackend(2, false), testBackend(3, true)), // one drains
			vip(201, testBackend(4, true)), // all drain
			vip(202),                       // none
			vip(203, many...),              // a larger ring
		}}, true)},
		{"divert", divertRules(Diversion{MAC: net.HardwareAddr{0x0e, 0, 0, 0, 16, 1}, IPv6: true, Unmarked: []netip.Addr{netip.MustParseAddr("10.0.16.201"), netip.MustParseAddr("fd00::c9")}}, false)},
		{"divert_straight", divertRules(Diversion{MAC: net.HardwareAddr{0x0e, 0, 0, 0, 16, 1}, Unmarked: []netip.Addr{netip.MustParseAddr("fd00::c9")}}, true)},
		{"bridge_no_reject", bridgeRules(ingress.Network{Services: []ingress.Service{vip(202)}}, false)},
		{"ports", portRules(ingress.Network{Ports: []string{"wp1", "wp2"}, Services: []ingress.Service{
			vip(200, testBackend(1, false)), vip(201, testBackend(4, true)), vip(202),
		}})},
		{"bridge_ipv6", bridgeRules(both, true)},
		{"bridge_ipv6_no_reject", bridgeRules(both, false)},
		{"ports_ipv6", portRules(both)},
		{"host_ipv6", hostRules6(ingress.Table{Ingress: entry, Gateway: gateway, Published: []ingress.Published{
			{Service: "s", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: many[:2]},
			{Service: "s", Protocol: weft.UDP, Port: 30000, Target: 7, Backends: many[:1]},
		}})},
		{"inside", ipv4.insideRules(within, taskInside)},
		{"inside_with_leg", ipv6.insideRules(within, withLeg)},
		{"inside_ipv6", ipv6.insideRules(within, taskInside)},
		{"inside_link", insideLink(within, taskInside.EntryTask)},
		{"host_empty", hostRules(ingress.Table{})},
		{"router_ipv6", ipv6.routerRules(ingress.Router{VNIs: []uint32{4097}, Backends: many[:2]})},
		{"router", ipv4.routerRules(ingress.Router{VNIs: []uint32{4097}, Backends: many[:2]})},
		{"router_links", acceptRules(ingress.Router{VNIs: []uint32{4097, 4098}})},
		{"host_full", hostRules(ingress.Table{Ingress: entry, Gateway: gateway, Underlay: ingress.Underlay{
			Port: 4789, Self: netip.MustParseAddr("10.99.0.1"), Members: []netip.Addr{netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd00::1")},
		}, Published: []ingress.Published{
			{Service: "s", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: many[:2]},
			{Service: "s", Protocol: weft.UDP, Port: 30000, Target: 7, Backends: many[:1], HideClient: true},
			{Service: "d", Protocol: weft.TCP, Port: 30001, Target: 80, Backends: []ingress.Backend{testBackend(1, true)}},
			{Service: "l", Protocol: weft.TCP, Port: 30002, Target: 80, Backends: many},
		}})},
		{"host_options", hostRules(ingress.Table{Ingress: entry, Gateway: gateway, Published: options})},
		{"host_options_ipv6", hostRules6(ingress.Table{Ingress: entry, Gateway: gateway, Published: options})},
	}
}

func TestGoldenRulesets(t *testing.T) {
	for _, tc := range goldenRulesets() {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join("testdata", tc.name+".txt")
			got := tc.rules.String()
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// TestSignatureSeesTheShape: a change of shape replaces the table, a change of
// elements does not.
func TestSignatureSeesTheShape(t *testing.T) {
	base := hostRules(ingress.Table{}).signature()
	elements := ingress.Table{Published: []ingress.Published{{Protocol: weft.TCP, Port: 30000, Backends: []ingress.Backend{testBackend(1, false)}}}}
	if got := hostRules(elements).signature(); got != base {
		t.Error("a published port changes the shape: the table would be replaced, and its counters lost")
	}
	for name, table := range map[string]ingress.Table{
		"entry":   {Ingress: ingress.Entry{Link: "x", Addr: netip.MustParsePrefix("10.255.0.2/16")}},
		"gateway": {Gateway: ingress.Gateway{Bridge: "x", Subnet: netip.MustParsePrefix("172.31.0.0/16")}},
	} {
		if hostRules(table).signature() == base {
			t.Errorf("%s: the shape is the same", name)
		}
	}
	if bridgeRules(ingress.Network{}, true).signature() == bridgeRules(ingress.Network{}, false).signature() {
		t.Error("refusing and dropping have one shape")
	}
}

// TestIntervals: the elements cover exactly the prefixes, told by a slow twin
// that asks each prefix.
func TestIntervals(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var prefixes []netip.Prefix
		for range rapid.IntRange(0, 6).Draw(t, "prefixes") {
			// Few bits, so that prefixes touch and nest.
			a := netip.AddrFrom4([4]byte{byte(rapid.SampledFrom([]int{10, 11, 255}).Draw(t, "a")), byte(rapid.IntRange(252, 255).Draw(t, "b")), 0, 0})
			prefixes = append(prefixes, netip.PrefixFrom(a, rapid.IntRange(6, 18).Draw(t, "bits")).Masked())
		}
		elements := ipv4.intervals(prefixes)
		probe := []uint32{0, 1<<32 - 1}
		for k := range elements {
			n := binary.BigEndian.Uint32([]byte(k))
			probe = append(probe, n-1, n, n+1)
		}
		for _, p := range prefixes {
			b := p.Addr().As4()
			n := binary.BigEndian.Uint32(b[:])
			probe = append(probe, n-1, n, n+1, n+1<<(32-p.Bits())-1, n+1<<(32-p.Bits()))
		}
		for _, n := range probe {
			var b [4]byte
			binary.BigEndian.PutUint32(b[:], n)
			addr := netip.AddrFrom4(b)
			want := false
			for _, p := range prefixes {
				want = want || p.Contains(addr)
			}
			if got := covered(elements, n); got != want {
				t.Fatalf("%s covered: %v, want %v, by %v as %q", addr, got, want, prefixes, elements)
			}
		}
	})
}

// covered reads interval elements as the kernel does: the nearest element at or
// below decides.
func covered(elements map[string]string, n uint32) bool {
	best, in := int64(-1), false
	for k, v := range elements {
		if at := int64(binary.BigEndian.Uint32([]byte(k))); at <= int64(n) && at > best {
			best, in = at, v != intervalEnd
		}
	}
	return in
}

func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gen := rapid.MapOf(rapid.StringN(1, 2, 2), rapid.StringN(0, 1, 1))
		have, want := gen.Draw(t, "have"), gen.Draw(t, "want")
		got := map[string]string{}
		for k, v := range have {
			got[k] = v
		}
		d := diff(have, want)
		for _, e := range d.del { // nftables refuses to delete what is not there
			if _, ok := got[string(e.Key)]; !ok {
				t.Fatalf("deletes %q, which is not there", e.Key)
			}
			delete(got, string(e.Key))
		}
		for _, e := range d.add { // and to add another value under a key
			if _, ok := got[string(e.Key)]; ok {
				t.Fatalf("adds %q, which is there", e.Key)
			}
			got[string(e.Key)] = string(e.Val)
		}
		if len(got) != len(want) {
			t.Fatalf("%q became %q, want %q", have, got, want)
		}
		for k, v := range want {
			if got[k] != v {
				t.Fatalf("%q became %q, want %q", have, got, want)
			}
		}
	})
}
