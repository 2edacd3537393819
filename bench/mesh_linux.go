package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	balance "github.com/weftnet/weft/ingress/bpf"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Paths from a client outside to a published port, by a node that has no task of
// the service. The client's address is kept, or hidden behind the node's.
const (
	meshEBPF       = "ebpf-mesh"
	meshEBPFSnat   = "ebpf-mesh-snat"
	meshBridge     = "bridge-mesh"
	meshBridgeSnat = "bridge-mesh-snat"
	// On the bridge, with services balanced by IPVS.
	meshIPVS     = "ipvs-mesh"
	meshIPVSSnat = "ipvs-mesh-snat"
)

// meshCase is what a case is made of.
type meshCase struct {
	name, overlay string
	hides, isIPVS bool
}

var meshCases = []meshCase{
	{meshEBPF, pathEBPF, false, false}, {meshEBPFSnat, pathEBPF, true, false},
	{meshBridge, pathBridge, false, false}, {meshBridgeSnat, pathBridge, true, false},
	{meshIPVS, pathBridge, false, true}, {meshIPVSSnat, pathBridge, true, true},
}

var meshPairs = []pair{{meshEBPF, meshEBPFSnat}, {meshBridge, meshBridgeSnat}, {meshIPVS, meshIPVSSnat}, {meshEBPF, dockerMesh}, {meshBridge, dockerMesh}}

// meshLimits: keeping the address costs nothing with nftables and less than hiding it
// in eBPF, which hides none, and a request takes at most 0.6 of Docker's.
var meshLimits = []limit{
	{Case: meshEBPF, Metric: string(crr), Over: meshEBPFSnat, Least: 1.3},
	{Case: meshBridge, Metric: string(crr), Over: meshBridgeSnat, Least: 1.0},
	{Case: meshIPVS, Metric: string(crr), Over: meshIPVSSnat, Least: 1.0},
	{Case: meshEBPF, Metric: string(rr), Over: dockerMesh, Least: 1 / 0.6},
	{Case: meshBridge, Metric: string(rr), Over: dockerMesh, Least: 1 / 0.6},
}

func isMesh(name string) bool {
	return slices.ContainsFunc(meshCases, func(c meshCase) bool { return c.name == name })
}

// legOn is the address of host i's leg on the ingress network.
func legOn(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 100, 0, byte(250 + i)}) }

// mesh makes a path from outside to a task on the other host.
func (g *ground) mesh(ctx context.Context, name string, h pairOfHosts) error {
	c := meshCases[slices.IndexFunc(meshCases, func(c meshCase) bool { return c.name == name })]
	ns, err := g.namespace(name + "-task")
	if err != nil {
		return err
	}
	outside, err := g.client(name, h[0])
	if err != nil {
		return err
	}
	task := weft.NewID()
	port := vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(1), MAC: weft.EndpointMAC(task, taskOn(1))}
	id := weft.NewID()
	var nodes []vipNode
	var entries []ingress.EntryNode
	for i := range h {
		n := vipNode{id: weft.NewID(), bpf: filepath.Join(g.dir, fmt.Sprintf("%s-bpf%d", name, i))}
		nodes = append(nodes, n)
		entries = append(entries, ingress.EntryNode{MAC: weft.NodeMAC(n.id, legOn(i)), Addr: legOn(i)})
	}
	table := ingress.Table{Ingress: ingress.Entry{Link: weft.IngressLeg, Nodes: entries}}
	for proto, ports := range map[weft.Protocol][]uint16{weft.TCP: {answerPort, drainPort}, weft.UDP: {windowPort}} {
		for _, p := range ports {
			table.Published = append(table.Published, ingress.Published{Service: "s", Protocol: proto, Port: p, Target: p, HideClient: c.hides,
				Backends: []ingress.Backend{{Task: task, Addr: taskOn(1), MAC: port.MAC}}})
		}
	}
	for i, host := range h {
		n := network(id, i, port)
		n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(legOn(i), taskNet.Bits()), MAC: entries[i].MAC}
		n.Peers = []vxlan.Peer{{Addr: legOn(1 - i), MAC: entries[1-i].MAC, VTEP: vtep(1 - i)}}
		t := table
		t.Ingress.Addr = n.HostLeg.Addr
		t.Underlay = ingress.Underlay{Port: groundPort, Self: vtep(i), Members: []netip.Addr{vtep(0), vtep(1)}}
		if i == 0 {
			n.Ports = nil
			n.Peers = append(n.Peers, vxlan.Peer{Addr: taskOn(1), MAC: port.MAC, VTEP: vtep(1)})
		} else {
			t.Ingress.Tasks = []ingress.EntryTask{{Task: task, NetNS: ns, Link: "eth0", Addr: port.Addr}}
		}
		if c.isIPVS {
			// Nobody asks for the address: it is there so that the bridge has the engine's table,
			// as every network of services has.
			n.VIPs = []vxlan.VIP{{Addr: serviceAddr, MAC: weft.VIPMAC("s", serviceAddr)}}
			t.Networks = []ingress.Network{{
				VNI: n.VNI, NetNS: filepath.Join(g.dir, weft.OverlayNetNS(nodes[i].id, n.VNI)), Bridge: weft.BridgeName(n.VNI),
				Services: []ingress.Service{{ID: "s", VIP: serviceAddr, MAC: weft.VIPMAC("s", serviceAddr), Backends: []ingress.Backend{{Task: task, Addr: taskOn(1), MAC: port.MAC}}}},
			}}
			if i == 1 { // without its speaker the table drops the task's ARP
				local := &t.Networks[0]
				local.Ports, local.Tasks = []string{weft.PortVethName(task, id)}, []string{ns}
				local.Speakers = []ingress.Speaker{{MAC: port.MAC, Addrs: []netip.Addr{taskOn(1)}}}
			}
		}
		if err := g.meshHost(ctx, c, meshSide{nodes[i], host, n, t}); err != nil {
			return err
		}
	}
	g.paths[name] = path{name: name, from: outside, to: ns, addr: outsideOf(0), listen: netip.IPv4Unspecified()}
	return nil
}

// meshSide is one host of a path through the mesh.
type meshSide struct {
	vipNode
	ns      string
	network vxlan.Network
	table   ingress.Table
}

func (g *ground) meshHost(ctx context.Context, c meshCase, side meshSide) error {
	ns, n, t := side.ns, side.network, side.table
	k, err := g.engineOf(c.overlay, side.vipNode)
	if err != nil {
		return err
	}
	var e ingress.Engine = nft.New(g.dir)
	switch {
	case c.isIPVS:
		e, err = ipvsBalancer(g, side.vipNode)
	case c.overlay == pathEBPF:
		e, err = balance.NewMesh(balance.MeshConfig{Node: side.id, Dir: side.bpf, Table: e})
	}
	if err != nil {
		return err
	}
	undo := context.WithoutCancel(ctx)
	g.later(func() error {
		return netns.Do(ns, func() error { return errors.Join(e.Close(undo), k.Apply(undo, vxlan.State{})) })
	})
	return netns.Do(ns, func() error {
		if err := errors.Join(k.Apply(ctx, only(n)), e.Probe(ctx)); err != nil {
			return err
		}
		if m, ok := e.(*balance.Mesh); ok && m.Note() != "" {
			return errors.New(m.Note())
		}
		return e.Apply(ctx, t)
	})
}
