// Package netstate turns what one node knows of the cluster into the values
// that the data plane takes: overlay state, balancer table and name records.
//
// It is pure: the same Input gives the same Output, whatever came before it.
// Nothing here reads a clock, a kernel or a file, so that a fault in what weft
// programs can be reproduced from a dump of its Input.
package netstate

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// Input is everything the data plane of one node follows from.
type Input struct {
	Self Node
	// NetNSDir is where the hidden namespaces of networks are named.
	NetNSDir string
	// NoIPv6 says that this host's kernel has none: networks of two families
	// go on with IPv4 here. One of IPv6 alone fails by name.
	NoIPv6 bool
	// DataPathPort is the UDP port of VXLAN.
	DataPathPort uint16
	// MTU is that of this node's link into the underlay, in bytes. Paths are
	// what the underlay carries to other nodes, by VTEP; a node that is not
	// in it takes what the link does.
	MTU   int
	Paths map[netip.Addr]int
	// Proven are the ways on which packets were seen to arrive without
	// encapsulation; nil = this node's engine cannot do without. CutsTunnels
	// says that the link cuts large packets of VXLAN itself.
	Proven      map[vxlan.NativeWay]bool
	CutsTunnels bool
	// KeyEpoch is the cluster's generation of keys for encrypted networks.
	KeyEpoch uint64
	Networks []weft.Network
	Services []Service
	// Nodes are all members, Self included. Endpoints of others are ignored.
	Nodes []Node
	Local []LocalTask
	// Endpoints are what gossip knows of other nodes' tasks; entries owned
	// by Self are ignored in favour of Local.
	Endpoints []weft.OwnedEndpoint
	Gateway   ingress.Gateway
	// HostAddrs are the addresses of this host that ports can be bound to, but
	// for the loopback's own; see weft.NodeDescription. Needed only if IsBound.
	HostAddrs []weft.HostAddr
}

// Node is a member of the cluster.
type Node struct {
	ID          weft.ID
	Hostname    string
	VTEP        netip.Addr
	IngressAddr netip.Prefix
	// Keys are its public keys for encrypted networks.
	Keys []weft.NodeKey
	// IngressAddr6 is invalid where the ingress network has no IPv6.
	IngressAddr6 netip.Prefix
}

// Service is what balancers and names need of a service.
type Service struct {
	ID       weft.ID
	Name     string
	Mode     weft.EndpointMode
	VIPs     []weft.VIP
	Ports    []weft.PortSpec
	Networks []weft.NetworkTarget
	// HideClient: its tasks see the address of the node that took a request.
	HideClient bool
}

// LocalTask is a task whose sandbox exists on this node.
type LocalTask struct {
	Task  weft.Task
	NetNS string
	// Gateway is its address behind the gateway bridge; invalid without a leg.
	Gateway netip.Addr
	State   weft.EndpointState
}

// Output is the desired state of the node's data plane.
type Output struct {
	Overlay vxlan.State
	Ingress ingress.Table
	Names   dns.Records
	// Publish is what this node tells the others.
	Publish []weft.Endpoint
	// Native are the ways to prove, for the Input of a later Derive.
	Native map[vxlan.NativeWay]vxlan.NativeEnds
}

// Derive computes the desired state. Order within slices is by identifier, so
// that equal inputs give equal outputs.
func Derive(in Input) Output {
	in = inOrder(in)
	published := publish(in)
	if in.NoIPv6 {
		in = withoutIPv6(in)
	}
	return newDeriver(in).derive(published)
}

// deriver carries the input, in order, and its indexes through one Derive.
type deriver struct {
	in        Input
	endpoints map[weft.ID][]endpoint  // by network: everyone's, ours too
	local     map[weft.ID][]LocalTask // by network
	// byService are the endpoints by network and service.
	byService map[weft.ID]map[weft.ID][]endpoint
	hosts     map[weft.ID]string     // names of the nodes
	members   map[weft.ID]netip.Addr // their tunnel addresses as the leader knows them; invalid = it does not
	subnets   map[weft.ID][]weft.Subnet
	mesh      []ingress.Published // those of mode ingress, once derived
}

func newDeriver(in Input) *deriver {
	d := &deriver{
		in: in, local: localByNetwork(in), byService: map[weft.ID]map[weft.ID][]endpoint{},
		hosts: map[weft.ID]string{}, members: map[weft.ID]netip.Addr{}, subnets: map[weft.ID][]weft.Subnet{},
	}
	for _, n := range in.Nodes {
		d.hosts[n.ID], d.members[n.ID] = n.Hostname, n.VTEP
	}
	for _, n := range in.Networks {
		d.subnets[n.ID] = n.Spec.Subnets
	}
	d.endpoints = d.byNetwork()
	for network, all := range d.endpoints {
		of := make(map[weft.ID][]endpoint, len(all))
		for _, e := range all {
			of[e.Service] = append(of[e.Service], e)
		}
		d.byService[network] = of
	}
	return d
}

// derive computes all but what is published.
func (d *deriver) derive(published []weft.Endpoint) Output {
	out := Output{
		Overlay: vxlan.State{Networks: map[uint32]vxlan.Network{}},
		Publish: published,
		Native:  map[vxlan.NativeWay]vxlan.NativeEnds{},
	}
	for _, n := range d.in.Networks {
		if !d.carried(n) {
			continue
		}
		o := d.overlay(n)
		d.setNative(n, &o, out.Native)
		out.Overlay.Networks[n.VNI] = o
		out.Ingress.Networks = append(out.Ingress.Networks, d.balanced(n))
		if n.Spec.Ingress {
			d.mesh = d.inMesh(n)
			out.Ingress.Ingress = d.entry(n)
		}
	}
	out.Ingress.Published = d.published(d.mesh)
	out.Ingress.Ends = d.ends()
	d.encrypt(&out)
	out.Ingress.Underlay = d.underlay()
	out.Ingress.Gateway = d.gateway()
	out.Names = d.names()
	return out
}

// endpoint is an endpoint with where it is.
type endpoint struct {
	weft.Endpoint
	owner weft.ID
	vtep  netip.Addr
	local bool
}

func (d *deriver) byNetwork() map[weft.ID][]endpoint {
	m := map[weft.ID][]endpoint{}
	taken := given(d.in)
	for i := range d.in.Endpoints {
		e := &d.in.Endpoints[i]
		isTaken := slices.ContainsFunc(e.Addrs(), func(a netip.Addr) bool { return taken[e.Network][a.Unmap()] })
		if !isTaken && d.isEligible(e) {
			m[e.Network] = append(m[e.Network], d.remoteEnd(e))
		}
	}
	for i := range d.in.Local {
		for _, a := range d.in.Local[i].Task.Attachments {
			m[a.Network] = append(m[a.Network], d.localEnd(&d.in.Local[i], a))
		}
	}
	for id := range m {
		m[id] = oneEach(m[id])
	}
	return m
}

// isEligible reports whether an endpoint can be what it says, whoever else claims
// its addresses. A node that was removed from the cluster still has the gossip key.
func (d *deriver) isEligible(e *weft.OwnedEndpoint) bool {
	return e.Owner != d.in.Self.ID && d.isMember(e.Owner) && isElsewhere(e.VTEP, d.in.Self.VTEP) && isElsewhere(d.vtep(e), d.in.Self.VTEP) && inside(e.Addrs(), d.subnets[e.Network])
}

func (d *deriver) isMember(id weft.ID) bool {
	_, ok := d.members[id]
	return ok
}

// vtep is where an endpoint's owner takes packets: as it has told the leader, by its
// certificate. What gossip says of it counts while the leader knows nothing, for
// nobody signs that: any member could take another's packets by it. The leader's is
// also what others let in (underlay).
func (d *deriver) vtep(e *weft.OwnedEndpoint) netip.Addr {
	if known := d.members[e.Owner]; known.IsValid() {
		return known
	}
	return e.VTEP
}

func (d *deriver) remoteEnd(e *weft.OwnedEndpoint) endpoint {
	return endpoint{Endpoint: e.Endpoint, owner: e.Owner, vtep: d.vtep(e)}
}

func (d *deriver) localEnd(t *LocalTask, a weft.Attachment) endpoint {
	return endpoint{Endpoint: localEndpoint(t, a), owner: d.in.Self.ID, vtep: d.in.Self.VTEP, local: true}
}

// given are the addresses, by network, that the leader has given to services and
// to nodes. Gossip that says of one that it is a task's is older than that, or
// newer than what the leader said last; either way nobody answers there by two
// names.
func given(in Input) map[weft.ID]map[netip.Addr]bool {
	out := map[weft.ID]map[netip.Addr]bool{}
	add := func(at weft.Attachment) {
		for _, p := range at.Addrs() {
			if out[at.Network] == nil {
				out[at.Network] = map[netip.Addr]bool{}
			}
			out[at.Network][p.Addr().Unmap()] = true
		}
	}
	for _, s := range in.Services {
		for _, v := range s.VIPs {
			add(weft.Attachment(v))
		}
	}
	for _, n := range in.Networks {
		for _, node := range in.Nodes {
			if n.Spec.Ingress {
				add(weft.Attachment{Network: n.ID, Addr: node.IngressAddr, Addr6: node.IngressAddr6})
			}
		}
	}
	return out
}

// isElsewhere reports whether a tunnel can lead to vtep: it is another host's and
// of our own family. A node that left and joined again is a second member at our
// address until somebody removes the first: what that one had is gone.
func isElsewhere(vtep, own netip.Addr) bool {
	vtep, own = vtep.Unmap(), own.Unmap()
	return vtep.IsValid() && vtep != own && vtep.Is4() == own.Is4()
}

// inside reports whether all of an endpoint's addresses are of the network.
func inside(addrs []netip.Addr, subnets []weft.Subnet) bool {
	for _, a := range addrs {
		if !slices.ContainsFunc(subnets, func(s weft.Subnet) bool { return s.Prefix.Contains(a) }) {
			return false
		}
	}
	return len(addrs) > 0
}

// oneEach leaves one endpoint for each address: ours, else that of the greater
// task id. The engines refuse a network in which an address stands twice, and a
// stale entry must not cost the others their network. The order is by task.
func oneEach(all []endpoint) []endpoint {
	slices.SortFunc(all, func(a, b endpoint) int {
		ours := cmp.Compare(rank(b), rank(a))
		return cmp.Or(ours, cmp.Compare(b.Task, a.Task), cmp.Compare(b.owner, a.owner), a.Addr.Compare(b.Addr))
	})
	taken := make(map[netip.Addr]bool, len(all))
	all = slices.DeleteFunc(all, func(e endpoint) bool {
		if slices.ContainsFunc(e.Addrs(), func(a netip.Addr) bool { return taken[a] }) {
			return true
		}
		for _, a := range e.Addrs() {
			taken[a] = true
		}
		return false
	})
	slices.SortFunc(all, func(a, b endpoint) int {
		return cmp.Or(cmp.Compare(a.Task, b.Task), a.Addr.Compare(b.Addr))
	})
	return all
}

func rank(e endpoint) int {
	if e.local {
		return 1
	}
	return 0
}

func localByNetwork(in Input) map[weft.ID][]LocalTask {
	m := map[weft.ID][]LocalTask{}
	for _, t := range in.Local {
		for _, a := range t.Task.Attachments {
			m[a.Network] = append(m[a.Network], t)
		}
	}
	return m
}

func localEndpoint(t *LocalTask, a weft.Attachment) weft.Endpoint {
	return weft.Endpoint{
		Network: a.Network, Task: t.Task.ID, Service: t.Task.Service, Slot: t.Task.Slot,
		Addr: a.Addr.Addr(), Addr6: a.Addr6.Addr(), State: t.State,
	}
}

func publish(in Input) []weft.Endpoint {
	var out []weft.Endpoint
	for i := range in.Local {
		for _, a := range in.Local[i].Task.Attachments {
			out = append(out, localEndpoint(&in.Local[i], a))
		}
	}
	return out
}

// carried reports whether this node takes part in a network: it runs a task on
// it, or it is the ingress network, on which every node answers.
func (d *deriver) carried(n weft.Network) bool {
	if n.Spec.Ingress {
		return d.in.Self.IngressAddr.IsValid()
	}
	return len(d.local[n.ID]) > 0
}

func (d *deriver) overlay(n weft.Network) vxlan.Network {
	out := vxlan.Network{
		ID: n.ID, VNI: n.VNI, MTU: d.mtu(n), VTEP: d.in.Self.VTEP, Port: d.in.DataPathPort, Encrypted: n.Spec.Encrypted(),
	}
	for _, s := range n.Spec.Subnets {
		out.Subnets = append(out.Subnets, s.Prefix)
	}
	out.Ports = d.ports(n)
	for _, e := range d.endpoints[n.ID] {
		if !e.local {
			out.Peers = appendPeers(out.Peers, e.Addrs(), weft.EndpointMAC(e.Task, e.Addr), e.vtep)
		}
	}
	if n.Spec.Ingress {
		out.HostLeg = &vxlan.HostLeg{
			Name: weft.IngressLeg, Addr: d.in.Self.IngressAddr, Addr6: d.in.Self.IngressAddr6,
			MAC: weft.NodeMAC(d.in.Self.ID, d.in.Self.IngressAddr.Addr()),
		}
		out.Peers = append(out.Peers, d.ingressLegs()...)
	}
	for i := range d.in.Services {
		out.VIPs = append(out.VIPs, d.vips(n, &d.in.Services[i], out.MTU)...)
	}
	d.setWays(n, out.Peers, out.MTU)
	slices.SortFunc(out.Peers, byPeer)
	slices.SortFunc(out.VIPs, byVIP)
	return out
}

func byPeer(a, b vxlan.Peer) int { return cmp.Or(a.Addr.Compare(b.Addr), bytes.Compare(a.MAC, b.MAC)) }

func byVIP(a, b vxlan.VIP) int { return cmp.Or(a.Addr.Compare(b.Addr), bytes.Compare(a.MAC, b.MAC)) }

// ports are those of this node's tasks on a network.
func (d *deriver) ports(n weft.Network) (out []vxlan.Port) {
	for _, t := range d.local[n.ID] {
		for i, a := range t.Task.Attachments {
			if a.Network != n.ID {
				continue
			}
			out = append(out, vxlan.Port{
				Task: t.Task.ID, NetNS: t.NetNS, IfName: fmt.Sprintf("eth%d", i),
				Addr: a.Addr, Addr6: a.Addr6, MAC: weft.EndpointMAC(t.Task.ID, a.Addr.Addr()),
			})
		}
	}
	return out
}

// vips are a service's addresses on a network whose ports have an MTU.
func (d *deriver) vips(n weft.Network, s *Service, mtu int) (out []vxlan.VIP) {
	for _, v := range s.VIPs {
		if v.Network == n.ID {
			for _, a := range bare(v.Addrs()) {
				out = append(out, vxlan.VIP{Addr: a, MAC: weft.VIPMAC(s.ID, a), MTU: d.narrowest(n, s.ID, mtu)})
			}
		}
	}
	return out
}

// ingressLegs are the other nodes' own ports on the ingress network: answers to
// requests that entered there go back to them.
func (d *deriver) ingressLegs() []vxlan.Peer {
	var out []vxlan.Peer
	for _, n := range d.in.Nodes {
		if n.ID != d.in.Self.ID && n.IngressAddr.IsValid() && isElsewhere(n.VTEP, d.in.Self.VTEP) {
			leg := weft.Attachment{Addr: n.IngressAddr, Addr6: n.IngressAddr6}
			out = appendPeers(out, bare(leg.Addrs()), weft.NodeMAC(n.ID, n.IngressAddr.Addr()), n.VTEP)
		}
	}
	return out
}

// appendPeers adds an endpoint of another node: a peer for each address.
func appendPeers(to []vxlan.Peer, addrs []netip.Addr, mac net.HardwareAddr, vtep netip.Addr) []vxlan.Peer {
	for _, a := range addrs {
		to = append(to, vxlan.Peer{Addr: a, MAC: mac, VTEP: vtep})
	}
	return to
}

// bare are the addresses without their subnets' lengths.
func bare(prefixes []netip.Prefix) []netip.Addr {
	out := make([]netip.Addr, len(prefixes))
	for i, p := range prefixes {
		out[i] = p.Addr()
	}
	return out
}

func (d *deriver) balanced(n weft.Network) ingress.Network {
	out := ingress.Network{
		VNI:    n.VNI,
		NetNS:  filepath.Join(d.in.NetNSDir, weft.OverlayNetNS(d.in.Self.ID, n.VNI)),
		Bridge: weft.BridgeName(n.VNI),
		IPv6:   n.Spec.IPv6,
	}
	d.localEnds(n, &out)
	for i := range d.in.Services {
		out.Services = append(out.Services, d.balancedService(n, &d.in.Services[i])...)
	}
	return out
}

// localEnds fills in where an engine meets this node's tasks on a network: their ports,
// who speaks there, and their namespaces.
func (d *deriver) localEnds(n weft.Network, out *ingress.Network) {
	out.Ports, out.Tasks, out.Speakers = nil, nil, nil
	for _, t := range d.local[n.ID] {
		out.Ports = append(out.Ports, weft.PortVethName(t.Task.ID, n.ID))
		if t.NetNS != "" {
			out.Tasks = append(out.Tasks, t.NetNS)
		}
		for _, a := range t.Task.Attachments {
			if a.Network == n.ID {
				out.Speakers = append(out.Speakers, ingress.Speaker{MAC: weft.EndpointMAC(t.Task.ID, a.Addr.Addr()), Addrs: bare(a.Addrs())})
			}
		}
	}
}

func (d *deriver) balancedService(n weft.Network, s *Service) (out []ingress.Service) {
	for _, v := range s.VIPs {
		if v.Network != n.ID {
			continue
		}
		backends := d.backends(n.ID, s.ID)
		for _, a := range bare(v.Addrs()) {
			out = append(out, ingress.Service{ID: s.ID, VIP: a, MAC: weft.VIPMAC(s.ID, a), Backends: backends})
		}
	}
	return out
}

// of are the endpoints of a service on a network, in their order.
func (d *deriver) of(network, service weft.ID) []endpoint { return d.byService[network][service] }

func (d *deriver) backends(network, service weft.ID) []ingress.Backend {
	var out []ingress.Backend
	for _, e := range d.of(network, service) {
		if e.State == weft.EndpointStarting {
			continue
		}
		out = append(out, ingress.Backend{
			Task: e.Task, Addr: e.Addr, Addr6: e.Addr6, MAC: weft.EndpointMAC(e.Task, e.Addr),
			Draining: e.State == weft.EndpointDraining,
		})
	}
	return out
}

// gateway adds what tasks must not reach by way of the host: the overlays'
// own ranges. A host is not a router between them.
func (d *deriver) gateway() ingress.Gateway {
	g := d.in.Gateway
	g.Protect = slices.Clone(g.Protect)
	if g.Legs = d.legs(); len(g.Legs) > 0 {
		g.Addr6 = netip.PrefixFrom(weft.GatewayAddr6(), weft.GatewayPool6().Bits())
	}
	for _, n := range d.in.Networks {
		for _, s := range n.Spec.Subnets {
			g.Protect = append(g.Protect, s.Prefix)
		}
	}
	return g
}
