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
	"github.com/weftnet/weft/vxlan"
)

// Address plan: underlay 10.99.0.N, network "front" 10.0.16.0/20, "back"
// 10.0.32.0/20, ingress 10.255.0.0/16.
var (
	vtep1   = netip.MustParseAddr("10.99.0.1")
	vtep2   = netip.MustParseAddr("10.99.0.2")
	front   = network("front", 4097, "10.0.16.0/20", false)
	back    = network("back", 4098, "10.0.32.0/20", false)
	mesh    = network("ingress", weft.IngressVNI, "10.255.0.0/16", true)
	self    = Node{ID: "n1", Hostname: "h1", VTEP: vtep1, IngressAddr: netip.MustParsePrefix("10.255.0.2/16")}
	other   = Node{ID: "n2", Hostname: "h2", VTEP: vtep2, IngressAddr: netip.MustParsePrefix("10.255.0.3/16")}
	webVIP  = netip.MustParsePrefix("10.0.16.2/20")
	meshVIP = netip.MustParsePrefix("10.255.0.4/16")
	web     = Service{
		ID: "web", Name: "web", VIPs: []weft.VIP{{Network: "ingress", Addr: meshVIP}, {Network: "front", Addr: webVIP}},
		Ports:    []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: 30000}},
		Networks: []weft.NetworkTarget{{Network: "front", Aliases: []string{"www"}}},
	}
)

func network(name string, vni uint32, subnet string, isIngress bool) weft.Network {
	return weft.Network{ID: weft.ID(name), VNI: vni, Spec: weft.NetworkSpec{
		Name: name, Ingress: isIngress, Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix(subnet)}},
	}}
}

func localWeb(slot uint64, addr, meshAddr string, s weft.EndpointState) LocalTask {
	id := weft.ID(fmt.Sprintf("web%d", slot))
	return LocalTask{
		Task: weft.Task{ID: id, Service: "web", Slot: slot, Attachments: []weft.Attachment{
			{Network: "ingress", Addr: netip.MustParsePrefix(meshAddr)},
			{Network: "front", Addr: netip.MustParsePrefix(addr)},
		}},
		NetNS: "/ns/" + string(id), State: s,
	}
}

func remoteWeb(slot uint64, addr string, s weft.EndpointState) weft.OwnedEndpoint {
	id := weft.ID(fmt.Sprintf("web%d", slot))
	return weft.OwnedEndpoint{Owner: "n2", VTEP: vtep2, Endpoint: weft.Endpoint{
		Network: "front", Task: id, Service: "web", Slot: slot, Addr: netip.MustParseAddr(addr), State: s,
	}}
}

func base() Input {
	return Input{
		Self: self, NetNSDir: "/ns", DataPathPort: 4789, MTU: 1500,
		Networks: []weft.Network{back, front, mesh}, Services: []Service{web}, Nodes: []Node{self, other},
	}
}

// A host that left the cluster and joined again is two members, one of them
// down, at one address.
func TestDeriveLeavesOutOurOwnPast(t *testing.T) {
	in := base()
	past := Node{ID: "n1-before", Hostname: "h1", VTEP: vtep1, IngressAddr: netip.MustParsePrefix("10.255.0.9/16")}
	in.Nodes = append(in.Nodes, past)
	in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
	stale := remoteWeb(2, "10.0.16.4", weft.EndpointReady)
	stale.Owner, stale.VTEP = past.ID, vtep1
	in.Endpoints = []weft.OwnedEndpoint{stale, remoteWeb(3, "10.0.16.5", weft.EndpointReady)}
	out := Derive(in)
	for vni, n := range out.Overlay.Networks {
		for _, p := range n.Peers {
			if p.VTEP == vtep1 {
				t.Errorf("network %d has the peer %v behind our own address", vni, p.Addr)
			}
		}
	}
	if got := len(out.Overlay.Networks[front.VNI].Peers); got != 1 {
		t.Errorf("front has %d peers, want the one on the other node", got)
	}
	if err := vxlan.Validate(out.Overlay); err != nil {
		t.Errorf("the overlay engine would refuse all of it: %v", err)
	}
}

// TestDeriveBelievesTheLeaderOfTunnels: packets for a node's tasks go where it has told
// the leader, not where a member says who speaks in its name.
func TestDeriveBelievesTheLeaderOfTunnels(t *testing.T) {
	vtep3 := netip.MustParseAddr("10.99.0.3")
	for _, c := range []struct {
		name          string
		known, gossip netip.Addr
		want          netip.Addr
	}{
		{"both say the same", vtep2, vtep2, vtep2},
		{"gossip says something else", vtep2, vtep3, vtep2},
		{"the leader does not know", netip.Addr{}, vtep3, vtep3},
	} {
		in := base()
		for i := range in.Nodes {
			if in.Nodes[i].ID == other.ID {
				in.Nodes[i].VTEP = c.known
			}
		}
		in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
		far := remoteWeb(3, "10.0.16.5", weft.EndpointReady)
		far.VTEP = c.gossip
		in.Endpoints = []weft.OwnedEndpoint{far}
		whole := Derive(in)
		if peers := whole.Overlay.Networks[front.VNI].Peers; len(peers) != 1 || peers[0].VTEP != c.want {
			t.Errorf("%s: peers %v, want one by %v", c.name, peers, c.want)
		}
		// The same by a change of one endpoint.
		before := in
		before.Endpoints = nil
		var d Deriver
		d.Derive(before)
		if out := d.Derive(in); !reflect.DeepEqual(out.Overlay.Networks[front.VNI].Peers, whole.Overlay.Networks[front.VNI].Peers) {
			t.Errorf("%s: a change leads to peers %v", c.name, out.Overlay.Networks[front.VNI].Peers)
		}
	}
}

func TestDeriveCarriesOnlyItsNetworks(t *testing.T) {
	out := Derive(base())
	if len(out.Overlay.Networks) != 1 {
		t.Fatalf("an idle node carries %d networks, want the ingress network only", len(out.Overlay.Networks))
	}
	m := out.Overlay.Networks[weft.IngressVNI]
	if m.HostLeg == nil || m.HostLeg.Addr != self.IngressAddr {
		t.Errorf("host leg = %+v, want %v", m.HostLeg, self.IngressAddr)
	}
	want := []vxlan.Peer{{Addr: other.IngressAddr.Addr(), MAC: weft.NodeMAC("n2", other.IngressAddr.Addr()), VTEP: vtep2}}
	if !reflect.DeepEqual(m.Peers, want) {
		t.Errorf("ingress peers = %v, want the other node's leg %v", m.Peers, want)
	}
	if len(out.Ingress.Published) != 1 || len(out.Ingress.Published[0].Backends) != 0 {
		t.Errorf("published = %+v, want port 30000 with no backend", out.Ingress.Published)
	}

	in := base()
	in.Self.IngressAddr = netip.Prefix{}
	if out := Derive(in); len(out.Overlay.Networks) != 0 || len(out.Ingress.Published) != 0 {
		t.Errorf("a node without an ingress address carries %d networks, publishes %d ports", len(out.Overlay.Networks), len(out.Ingress.Published))
	}
}

func TestDeriveEndpointStates(t *testing.T) {
	for _, c := range []struct {
		name     string
		state    weft.EndpointState
		backend  bool
		draining bool
		ready    bool
	}{
		{"starting is reachable but balanced to by nobody", weft.EndpointStarting, false, false, false},
		{"ready takes connections", weft.EndpointReady, true, false, true},
		{"draining keeps its flows", weft.EndpointDraining, true, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := base()
			in.Local = []LocalTask{localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)}
			in.Endpoints = []weft.OwnedEndpoint{remoteWeb(2, "10.0.16.11", c.state)}
			out := Derive(in)
			n := out.Overlay.Networks[4097]
			if len(n.Peers) != 1 || n.Peers[0].VTEP != vtep2 {
				t.Errorf("peers = %v, want web2 behind %v in every state", n.Peers, vtep2)
			}
			i := slices.IndexFunc(out.Ingress.Networks, func(n ingress.Network) bool { return n.VNI == 4097 })
			bs := out.Ingress.Networks[i].Services[0].Backends
			j := slices.IndexFunc(bs, func(b ingress.Backend) bool { return b.Task == "web2" })
			if (j >= 0) != c.backend || j >= 0 && bs[j].Draining != c.draining {
				t.Errorf("backends = %+v", bs)
			}
			tasks := out.Names.Networks["front"].Services[0].Tasks
			if len(tasks) != 2 || tasks[1].Ready != c.ready {
				t.Errorf("names = %+v, want web2 ready=%v", tasks, c.ready)
			}
		})
	}
}

func TestDeriveOwnEndpointsComeFromTheNodeItself(t *testing.T) {
	in := base()
	in.Local = []LocalTask{localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)}
	stale := remoteWeb(7, "10.0.16.77", weft.EndpointReady)
	stale.Owner = "n1"
	in.Endpoints = []weft.OwnedEndpoint{stale}
	out := Derive(in)
	if n := out.Overlay.Networks[4097]; len(n.Peers) != 0 {
		t.Errorf("an echo of our own old table became a peer: %v", n.Peers)
	}
	if len(out.Publish) != 2 {
		t.Errorf("publishes %d endpoints, want one per attachment", len(out.Publish))
	}
	if vip := out.Overlay.Networks[4097].VIPs; len(vip) != 1 || vip[0].Addr != webVIP.Addr() {
		t.Errorf("vips = %v, want web's on front only", vip)
	}
	ports := out.Overlay.Networks[4097].Ports
	if len(ports) != 1 || ports[0].IfName != "eth1" || ports[0].Addr.String() != "10.0.16.10/20" {
		t.Errorf("ports = %+v, want the second attachment as eth1", ports)
	}
	for _, n := range out.Ingress.Networks {
		if want := []string{"/ns/web1"}; !slices.Equal(n.Tasks, want) {
			t.Errorf("tasks of network %d = %v, want %v", n.VNI, n.Tasks, want)
		}
	}
}

// TestDeriveLeavesOutWhatEnginesRefuse: one entry that makes no sense must not
// cost the others their network.
func TestDeriveLeavesOutWhatEnginesRefuse(t *testing.T) {
	edit := func(slot uint64, addr string, f func(*weft.OwnedEndpoint)) weft.OwnedEndpoint {
		e := remoteWeb(slot, addr, weft.EndpointReady)
		f(&e)
		return e
	}
	good := remoteWeb(9, "10.0.16.20", weft.EndpointReady)
	for name, odd := range map[string]weft.OwnedEndpoint{
		"the address of a local task":             remoteWeb(7, "10.0.16.10", weft.EndpointReady),
		"an address twice":                        remoteWeb(3, "10.0.16.20", weft.EndpointReady),
		"a former life of this node":              edit(7, "10.0.16.77", func(e *weft.OwnedEndpoint) { e.VTEP = vtep1 }),
		"no tunnel address":                       edit(7, "10.0.16.77", func(e *weft.OwnedEndpoint) { e.VTEP = netip.Addr{} }),
		"a tunnel address of the other family":    edit(7, "10.0.16.77", func(e *weft.OwnedEndpoint) { e.VTEP = netip.MustParseAddr("fd00::2") }),
		"an address outside of the network":       remoteWeb(7, "10.0.32.77", weft.EndpointReady),
		"a second address outside of the network": edit(7, "10.0.16.77", func(e *weft.OwnedEndpoint) { e.Addr6 = netip.MustParseAddr("fd00:2::77") }),
		"no address":                              edit(7, "10.0.16.77", func(e *weft.OwnedEndpoint) { e.Addr = netip.Addr{} }),
	} {
		t.Run(name, func(t *testing.T) {
			in := base()
			in.Local = []LocalTask{localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)}
			in.Endpoints = []weft.OwnedEndpoint{good, odd}
			out := Derive(in)
			if err := vxlan.Validate(out.Overlay); err != nil {
				t.Errorf("the engine refuses it: %v", err)
			}
			if p := out.Overlay.Networks[4097].Peers; len(p) != 1 || p[0].Addr != good.Addr || !reflect.DeepEqual(p[0].MAC, weft.EndpointMAC(good.Task, good.Addr)) {
				t.Errorf("peers %v, want the good one alone", p)
			}
			i := slices.IndexFunc(out.Ingress.Networks, func(n ingress.Network) bool { return n.VNI == 4097 })
			if b := out.Ingress.Networks[i].Services[0].Backends; len(b) != 2 {
				t.Errorf("backends %v, want the local task and the good one", b)
			}
		})
	}
}

func TestDeriveDNSRRHasNoVIPName(t *testing.T) {
	in := base()
	in.Services[0].Mode, in.Services[0].VIPs = weft.EndpointDNSRR, nil
	in.Local = []LocalTask{localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)}
	s := Derive(in).Names.Networks["front"].Services[0]
	if len(s.VIP) > 0 {
		t.Errorf("dnsrr service has the vip %v", s.VIP)
	}
	if !slices.Equal(s.Aliases, []string{"www"}) {
		t.Errorf("aliases = %v", s.Aliases)
	}
}

// TestDeriveIgnoresOrder: the kernel must not be rewritten because a map was
// walked in another order.
func TestDeriveIgnoresOrder(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		in := base()
		in.Services = slices.Clone(in.Services)
		for i := range rapid.IntRange(0, 6).Draw(r, "remote") {
			in.Endpoints = append(in.Endpoints, remoteWeb(uint64(i+2), fmt.Sprintf("10.0.16.%d", i+20), weft.EndpointReady))
		}
		for i := range rapid.IntRange(1, 4).Draw(r, "local") {
			in.Local = append(in.Local, localWeb(uint64(i+100), fmt.Sprintf("10.0.16.%d/20", i+100), fmt.Sprintf("10.255.0.%d/16", i+100), weft.EndpointReady))
		}
		want := Derive(in)
		checkSpeakers(r, want)
		in.Endpoints = rapid.Permutation(in.Endpoints).Draw(r, "endpoints")
		in.Local = rapid.Permutation(in.Local).Draw(r, "locals")
		in.Nodes = rapid.Permutation(in.Nodes).Draw(r, "nodes")
		in.Networks = rapid.Permutation(in.Networks).Draw(r, "networks")
		if got := Derive(in); !reflect.DeepEqual(got, want) {
			r.Fatalf("order changed the outcome:\n got %+v\nwant %+v", got, want)
		}
	})
}

// checkSpeakers: whoever has a port on a network speaks there, of its addresses.
func checkSpeakers(r *rapid.T, out Output) {
	for _, n := range out.Ingress.Networks {
		var of []ingress.Speaker
		for _, p := range out.Overlay.Networks[n.VNI].Ports {
			of = append(of, ingress.Speaker{MAC: p.MAC, Addrs: bare(p.Addrs())})
		}
		if !reflect.DeepEqual(n.Speakers, of) {
			r.Fatalf("network %d: %v speak, its ports are %v", n.VNI, n.Speakers, of)
		}
	}
}

// TestUnionHoldsBoth: nothing that either state reaches is missing from the
// union, what both name is as wanted, and no address stands twice.
func TestUnionHoldsBoth(t *testing.T) {
	state := func(r *rapid.T, label string) vxlan.State {
		s := vxlan.State{Networks: map[uint32]vxlan.Network{}}
		for _, vni := range rapid.SliceOfNDistinct(rapid.Uint32Range(4096, 4098), 0, 3, rapid.ID).Draw(r, label) {
			n := vxlan.Network{ID: weft.ID(fmt.Sprint(vni)), VNI: vni, MTU: rapid.IntRange(1280, 1282).Draw(r, label+"mtu")}
			used := map[netip.Addr]bool{}
			for _, h := range rapid.SliceOfNDistinct(rapid.IntRange(1, 9), 0, 9, rapid.ID).Draw(r, label+"hosts") {
				a := netip.AddrFrom4([4]byte{10, 0, 16, byte(h)})
				a6 := netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(rapid.IntRange(1, 9).Draw(r, label+"second"))})
				if rapid.Bool().Draw(r, label+"local") {
					p := vxlan.Port{Task: weft.ID(fmt.Sprint(h)), IfName: "eth0", Addr: netip.PrefixFrom(a, 20)}
					if !used[a6] {
						p.Addr6 = netip.PrefixFrom(a6, 64)
					}
					n.Ports = append(n.Ports, p)
				} else {
					p := vxlan.Peer{Addr: a, VTEP: netip.AddrFrom4([4]byte{10, 99, 0, byte(rapid.IntRange(2, 4).Draw(r, label+"vtep"))})}
					n.Peers = append(n.Peers, p)
					if p.Addr = a6; !used[a6] {
						n.Peers = append(n.Peers, p)
					}
				}
				used[a6] = true
			}
			s.Networks[vni] = n
		}
		return s
	}
	rapid.Check(t, func(r *rapid.T) {
		have, want := state(r, "have"), state(r, "want")
		u := Union(have, want)
		for vni, n := range want.Networks {
			got := u.Networks[vni]
			if got.MTU != n.MTU {
				r.Fatalf("mtu %d, want the wanted %d", got.MTU, n.MTU)
			}
			for _, p := range n.Peers {
				if !slices.ContainsFunc(got.Peers, func(q vxlan.Peer) bool { return reflect.DeepEqual(p, q) }) {
					r.Fatalf("wanted peer %v is missing", p)
				}
			}
		}
		for vni, n := range u.Networks {
			seen := map[netip.Addr]bool{}
			for _, p := range n.Ports {
				for _, a := range bare(p.Addrs()) {
					if seen[a] {
						r.Fatalf("%v of a port stands twice", a)
					}
					seen[a] = true
				}
			}
			for _, p := range n.Peers {
				if seen[p.Addr] {
					r.Fatalf("peer %v stands twice", p.Addr)
				}
				seen[p.Addr] = true
			}
			old := have.Networks[vni]
			for _, p := range old.Peers {
				local := slices.ContainsFunc(n.Ports, func(q vxlan.Port) bool { return slices.Contains(bare(q.Addrs()), p.Addr) })
				if local {
					continue // the address is ours now
				}
				if !seen[p.Addr] {
					r.Fatalf("peer %v of the old state went too early", p)
				}
			}
		}
		if !reflect.DeepEqual(Union(want, want), want) && len(want.Networks) > 0 {
			r.Fatalf("union of equal states differs from them")
		}
	})
}

func TestDeriveIgnoresThoseWhoAreNoMembers(t *testing.T) {
	in := base()
	in.Local = []LocalTask{localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)}
	in.Endpoints = []weft.OwnedEndpoint{remoteWeb(2, "10.0.16.11", weft.EndpointReady)}
	in.Nodes = []Node{self} // the other was removed
	n := Derive(in)
	if peers := n.Overlay.Networks[4097].Peers; len(peers) != 0 {
		t.Errorf("peers = %v of a node that was removed", peers)
	}
	for _, net := range n.Ingress.Networks {
		for _, s := range net.Services {
			if len(s.Backends) != 1 || s.Backends[0].Task != "web1" {
				t.Errorf("backends of %s = %+v, want the local task alone", s.ID, s.Backends)
			}
		}
	}
}
