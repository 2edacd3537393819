package netstate

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Addresses of this host, as tests of bound ports see it.
var hostAddrs = []weft.HostAddr{
	{Interface: "eth0", Addr: netip.MustParseAddr("10.99.0.1")}, {Interface: "eth0", Addr: netip.MustParseAddr("2001:db8::1")},
	{Interface: "eth1", Addr: netip.MustParseAddr("192.0.2.1")},
}

func ips(all ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func localHost(slot int, state weft.EndpointState, gateway string, ports ...weft.PortSpec) LocalTask {
	id := weft.ID(fmt.Sprintf("own%d", slot))
	t := LocalTask{Task: weft.Task{ID: id, Service: "own", Slot: uint64(slot), Ports: ports}, NetNS: "/ns/" + string(id), State: state}
	if gateway != "" {
		t.Gateway = netip.MustParseAddr(gateway)
	}
	return t
}

func TestPublished(t *testing.T) {
	allow := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	mesh := func(p weft.PortSpec) weft.PortSpec { p.Protocol = weft.TCP; return p }
	host := func(p weft.PortSpec) weft.PortSpec { p.Protocol, p.Mode = weft.TCP, weft.PublishHost; return p }
	gateway := func(slot int, draining bool) []ingress.Backend {
		return []ingress.Backend{{Task: weft.ID(fmt.Sprintf("own%d", slot)), Addr: netip.MustParseAddr("172.31.240.2"),
			Addr6: netip.MustParseAddr("fd77:6566:7467::ac1f:f002"), Draining: draining}}
	}
	backends := []ingress.Backend{{Task: "web1", Addr: netip.MustParseAddr("10.255.0.5"), MAC: weft.EndpointMAC("web1", netip.MustParseAddr("10.255.0.5"))}}
	for _, c := range []struct {
		name  string
		hide  bool
		ports []weft.PortSpec // of web, in the mesh
		own   []LocalTask     // of a service in mode host
		want  []ingress.Published
	}{
		{"one port", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 8080, Target: 80, Backends: backends}}},
		{"chosen neighbours are one rule", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 81, Published: 30001}), mesh(weft.PortSpec{Target: 80, Published: 30000})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Count: 2, Backends: backends}}},
		{"range with clients", true, []weft.PortSpec{mesh(weft.PortSpec{Target: 10000, Published: 20000, Count: 10001, Allow: allow})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 20000, Target: 10000, Count: 10001, Allow: allow, HideClient: true, Backends: backends}}},
		{"address of this host and of another", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, IPs: ips("10.99.0.1", "10.99.0.2")})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 8080, Target: 80, IPs: ips("10.99.0.1"), Backends: backends}}},
		{"address of another host only", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, IPs: ips("10.99.0.2")})}, nil, nil},
		{"loopback", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, IPs: ips("127.0.0.1", "::1")})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 8080, Target: 80, IPs: ips("127.0.0.1"), Backends: backends}}},
		{"loopback of IPv6 alone", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, IPs: ips("::1")})}, nil, nil},
		{"interface", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, Interface: "eth0"})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 8080, Target: 80, IPs: ips("10.99.0.1", "2001:db8::1"), Backends: backends}}},
		{"interface of another host", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, Interface: "eth7"})}, nil, nil},
		{"loopback interface", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 8080, Interface: "lo"})}, nil,
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 8080, Target: 80, IPs: ips("127.0.0.1"), Backends: backends}}},
		{"mode host on IPv6", false, nil, []LocalTask{localHost(1, weft.EndpointReady, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000, IPs: ips("2001:db8::1")}))},
			[]ingress.Published{{Service: "own", Protocol: weft.TCP, Port: 9000, Target: 80, Host: true, HideClient: true, IPs: ips("2001:db8::1"), Backends: gateway(1, false)}}},
		{"mode host", false, nil, []LocalTask{localHost(1, weft.EndpointReady, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000, Allow: allow}))},
			[]ingress.Published{{Service: "own", Protocol: weft.TCP, Port: 9000, Target: 80, Host: true, Allow: allow, HideClient: true, Backends: gateway(1, false)}}},
		{"mode host that is starting", false, nil, []LocalTask{localHost(1, weft.EndpointStarting, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000}))},
			[]ingress.Published{{Service: "own", Protocol: weft.TCP, Port: 9000, Target: 80, Host: true, HideClient: true}}},
		{"mode host without a leg", false, nil, []LocalTask{localHost(1, weft.EndpointReady, "", host(weft.PortSpec{Target: 80, Published: 9000}))}, nil},
		{"mode host on another's address", false, nil, []LocalTask{localHost(1, weft.EndpointReady, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000, IPs: ips("10.99.0.2")}))}, nil},
		{"port goes from one task to the next", false, nil, []LocalTask{
			localHost(1, weft.EndpointDraining, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000})),
			localHost(2, weft.EndpointReady, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000}))},
			[]ingress.Published{{Service: "own", Protocol: weft.TCP, Port: 9000, Target: 80, Host: true, HideClient: true, Backends: gateway(2, false)}}},
		{"task that ends, alone", false, nil, []LocalTask{localHost(1, weft.EndpointDraining, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000}))},
			[]ingress.Published{{Service: "own", Protocol: weft.TCP, Port: 9000, Target: 80, Host: true, HideClient: true, Backends: gateway(1, true)}}},
		{"mesh takes over from one that ends", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 80, Published: 9000})},
			[]LocalTask{localHost(1, weft.EndpointDraining, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9000}))},
			[]ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 9000, Target: 80, Backends: backends}}},
		{"one that serves keeps its port out of a range", false, []weft.PortSpec{mesh(weft.PortSpec{Target: 100, Published: 9000, Count: 10})},
			[]LocalTask{localHost(1, weft.EndpointReady, "172.31.240.2", host(weft.PortSpec{Target: 80, Published: 9001}))},
			[]ingress.Published{
				{Service: "web", Protocol: weft.TCP, Port: 9000, Target: 100, Backends: backends},
				{Service: "own", Protocol: weft.TCP, Port: 9001, Target: 80, Host: true, HideClient: true, Backends: gateway(1, false)},
				{Service: "web", Protocol: weft.TCP, Port: 9002, Target: 102, Count: 8, Backends: backends}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := base()
			in.HostAddrs = hostAddrs
			in.Services[0].Ports, in.Services[0].HideClient = c.ports, c.hide
			in.Services = append(in.Services, Service{ID: "own", Name: "own", HideClient: true})
			in.Local = append([]LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}, c.own...)
			got := Derive(in).Ingress.Published
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
}

// A node without the ingress network has no mesh, and its own tasks' ports.
func TestModeHostNeedsNoMesh(t *testing.T) {
	in := base()
	in.Self.IngressAddr = netip.Prefix{}
	in.Nodes[0] = in.Self
	in.Local = []LocalTask{localHost(1, weft.EndpointReady, "172.31.240.2", weft.PortSpec{Protocol: weft.UDP, Target: 53, Published: 53, Mode: weft.PublishHost})}
	if got := Derive(in).Ingress.Published; len(got) != 1 || !got[0].Host || got[0].Port != 53 {
		t.Errorf("published %+v", got)
	}
	if in.IsBound() {
		t.Error("a port on all addresses is bound")
	}
	in.Local[0].Task.Ports[0].Interface = "eth0"
	if !in.IsBound() {
		t.Error("a port of an interface is not bound")
	}
}

// TestModeHostOverIPv6: the legs of tasks with ports in mode host, and no others, are
// asked over IPv6, from before they take connections until they are gone; on a host
// without IPv6 none is.
func TestModeHostOverIPv6(t *testing.T) {
	port := weft.PortSpec{Protocol: weft.TCP, Target: 80, Published: 9000, Mode: weft.PublishHost}
	in := base()
	in.Gateway = ingress.Gateway{Bridge: weft.GatewayBridge, Subnet: netip.MustParsePrefix("172.31.240.0/20")}
	if g := Derive(in).Ingress.Gateway; g.Addr6.IsValid() || len(g.Legs) > 0 {
		t.Errorf("without ports in mode host the gateway is %+v", g)
	}
	in.Local = []LocalTask{
		localHost(3, weft.EndpointDraining, "172.31.240.4", port), localHost(1, weft.EndpointStarting, "172.31.240.2", port),
		localHost(2, weft.EndpointReady, "172.31.240.3"), localHost(4, weft.EndpointReady, "", port),
	}
	leg := func(slot int, addr string) ingress.EntryTask {
		id := weft.ID(fmt.Sprintf("own%d", slot))
		return ingress.EntryTask{Task: id, NetNS: "/ns/" + string(id), Link: "gw0", Addr6: netip.MustParsePrefix(addr)}
	}
	g := Derive(in).Ingress.Gateway
	want := []ingress.EntryTask{leg(1, "fd77:6566:7467::ac1f:f002/64"), leg(3, "fd77:6566:7467::ac1f:f004/64")}
	if !slices.Equal(g.Legs, want) || g.Addr6 != netip.MustParsePrefix("fd77:6566:7467::1/64") {
		t.Errorf("gateway %+v, want the legs %+v", g, want)
	}
	in.NoIPv6 = true
	out := Derive(in).Ingress
	if g := out.Gateway; g.Addr6.IsValid() || len(g.Legs) > 0 {
		t.Errorf("on a host without IPv6 the gateway is %+v", g)
	}
	for _, p := range out.Published {
		for _, b := range p.Backends {
			if p.Host && b.Addr6.IsValid() {
				t.Errorf("on a host without IPv6 a port leads to %s", b.Addr6)
			}
		}
	}
}

// TestPublishedIsNeverWidened: whatever the ports and tasks, no two rules are about
// one port of one address, and none is on an address that its port is not bound to.
func TestPublishedIsNeverWidened(t *testing.T) {
	all := []string{"127.0.0.1", "10.99.0.1", "192.0.2.1"}
	port := func(t *rapid.T, mode weft.PublishMode) weft.PortSpec {
		p := weft.PortSpec{Protocol: weft.TCP, Target: uint16(rapid.IntRange(1, 9).Draw(t, "target")), Mode: mode,
			Published: uint16(rapid.IntRange(1, 12).Draw(t, "published")), Count: uint16(rapid.IntRange(0, 4).Draw(t, "count"))}
		switch rapid.IntRange(0, 3).Draw(t, "bound") {
		case 1:
			p.IPs = ips(rapid.SampledFrom([]string{"127.0.0.1", "10.99.0.1", "10.99.0.2"}).Draw(t, "ip"))
		case 2:
			p.Interface = rapid.SampledFrom([]string{"eth0", "eth1", "eth7"}).Draw(t, "link")
		}
		return p
	}
	type socket struct {
		port uint16
		addr string
	}
	sockets := func(port, count uint16, on []netip.Addr) map[socket]bool {
		out := map[socket]bool{}
		for i := range max(1, count) {
			for _, a := range all {
				if len(on) == 0 || slices.Contains(on, netip.MustParseAddr(a)) {
					out[socket{port + i, a}] = true
				}
			}
		}
		return out
	}
	rapid.Check(t, func(t *rapid.T) {
		in := base()
		in.HostAddrs = hostAddrs
		var specs []weft.PortSpec
		in.Services[0].Ports = nil
		for range rapid.IntRange(0, 4).Draw(t, "mesh") {
			p := port(t, weft.PublishIngress)
			if !slices.ContainsFunc(specs, func(o weft.PortSpec) bool { return o.Clashes(&p) }) { // as the leader sees to
				specs = append(specs, p)
				in.Services[0].Ports = append(in.Services[0].Ports, p)
			}
		}
		for slot := range rapid.IntRange(0, 4).Draw(t, "own") {
			p := port(t, weft.PublishHost)
			specs = append(specs, p)
			in.Local = append(in.Local, localHost(slot, weft.EndpointState(rapid.IntRange(0, 2).Draw(t, "state")), "172.31.240.2", p))
		}
		may, alone := map[socket]bool{}, map[socket]bool{}
		for i, p := range specs {
			on := slices.DeleteFunc(ips(all...), func(a netip.Addr) bool {
				isOnLink := slices.Contains(hostAddrs, weft.HostAddr{Interface: p.Interface, Addr: a})
				return p.IsBound() && !slices.Contains(p.IPs, a) && !isOnLink
			})
			if len(on) == 0 {
				continue
			}
			clashes := false
			for j := range specs {
				clashes = clashes || j != i && specs[j].Clashes(&p)
			}
			for s := range sockets(p.Published, p.Count, on) {
				may[s] = true
				alone[s] = alone[s] || !clashes
			}
		}
		is := map[socket]bool{}
		for _, r := range Derive(in).Ingress.Published {
			for s := range sockets(r.Port, r.Count, r.IPs) {
				if is[s] || !may[s] {
					t.Fatalf("%v is published twice (%v), or nobody asked for it (%v): %+v", s, is[s], !may[s], r)
				}
				is[s] = true
			}
		}
		for s, mustBe := range alone {
			if mustBe && !is[s] {
				t.Fatalf("%v is not published, and nobody else asked for it", s)
			}
		}
	})
}

// BenchmarkDeriveManyPorts: many services with a published port and one task each.
func BenchmarkDeriveManyPorts(b *testing.B) {
	in := manyPorts(2000)
	for b.Loop() {
		if got := Derive(in); len(got.Ingress.Published) != 2000 || len(got.Ingress.Published[7].Backends) != 1 {
			b.Fatal("ports are missing")
		}
	}
}

// BenchmarkDeriverOneMore: one of them comes, and goes, by a Deriver.
func BenchmarkDeriverOneMore(b *testing.B) {
	more, fewer := manyPorts(2001), manyPorts(2001)
	fewer.Services, fewer.Endpoints = fewer.Services[:2000], fewer.Endpoints[:2000]
	var d Deriver
	d.Derive(fewer)
	for b.Loop() {
		if got := d.Derive(more); len(got.Ingress.Published) != 2001 || len(got.Ingress.Published[2000].Backends) != 1 {
			b.Fatal("ports are missing")
		}
		d.Derive(fewer)
	}
	if d.wholes != 1 {
		b.Fatalf("all was made %d times", d.wholes)
	}
}

func manyPorts(n int) Input {
	in := base()
	in.Services = nil
	for i := range n {
		id := weft.ID(fmt.Sprintf("svc%04d", i))
		at := netip.AddrFrom4([4]byte{10, 255, byte(1 + i/250), byte(1 + i%250)})
		in.Services = append(in.Services, Service{
			ID: id, Name: string(id), VIPs: []weft.VIP{{Network: "ingress", Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, byte(100 + i/250), byte(1 + i%250)}), 16)}},
			Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: uint16(10000 + i)}},
		})
		in.Endpoints = append(in.Endpoints, weft.OwnedEndpoint{Owner: "n2", VTEP: vtep2, Endpoint: weft.Endpoint{
			Network: "ingress", Task: id + "t", Service: id, Slot: 1, Addr: at, State: weft.EndpointReady,
		}})
	}
	return in
}
