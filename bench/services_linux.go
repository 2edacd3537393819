package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	balance "github.com/weftnet/weft/ingress/bpf"
	"github.com/weftnet/weft/ingress/ipvs"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/lab/vm"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Paths to a service address: from a task to the one backend of a service, on the
// other host, through a service engine. To compare with: the same hosts, to the
// backend's own address; and the overlay engine on hosts without a service engine.
const (
	vipEBPF    = "ebpf-vip"
	vipVeth    = "ebpf-vip-veth" // not balanced at the socket, but at the task's veth
	vipIPVS    = "ipvs-vip"
	vipNFT     = "nft-vip"
	directEBPF = "ebpf-direct"
	directIPVS = "ipvs-direct"
	directNFT  = "nft-direct"
	// Among many other services.
	vipEBPFMany = "ebpf-vip-10k"
	vipIPVSMany = "ipvs-vip-10k"
	vipNFTMany  = "nft-vip-10k"
)

// manyServices are the services of a case that ends in -10k, with
// backendsEach backends.
const (
	manyServices = 10_000
	backendsEach = 10
)

// vipCase is what a case is made of.
type vipCase struct {
	name    string
	direct  string // the case to the backend's own address
	overlay string
	engine  func(g *ground, n vipNode) (ingress.Engine, error)
	many    bool
}

// vipNode is one host of a path to a service address.
type vipNode struct {
	id  weft.ID
	bpf string // folder of its bpffs
}

var vipCases = []vipCase{
	{vipEBPF, directEBPF, pathEBPF, ebpfBalancer, false},
	{vipVeth, directEBPF, pathEBPF, vethBalancer, false},
	{vipIPVS, directIPVS, pathBridge, ipvsBalancer, false},
	{vipNFT, directNFT, pathBridge, nftBalancer, false},
	{vipEBPFMany, directEBPF, pathEBPF, ebpfBalancer, true},
	{vipIPVSMany, directIPVS, pathBridge, ipvsBalancer, true},
	{vipNFTMany, directNFT, pathBridge, nftBalancer, true},
}

// The generators are nobody's tasks, so that their sockets are below the top of the
// cgroup tree and no further.
func ebpfBalancer(g *ground, n vipNode) (ingress.Engine, error) {
	top, err := balance.CgroupOf("bench")
	if err == nil && filepath.Base(top) == "bench" {
		top = filepath.Dir(filepath.Dir(top)) // TOP/weft/bench
	}
	if err != nil {
		return nil, err
	}
	e, err := balance.New(balance.Config{Node: n.id, Dir: n.bpf, Cgroup: top})
	return withEnds(g, e), err
}

func vethBalancer(g *ground, n vipNode) (ingress.Engine, error) {
	e, err := balance.New(balance.Config{Node: n.id, Dir: n.bpf})
	return withEnds(g, e), err
}

func ipvsBalancer(g *ground, n vipNode) (ingress.Engine, error) {
	e, err := ipvs.New(ipvs.Config{Node: n.id, NetNSDir: g.dir})
	return withEnds(g, e), err
}

// withEnds is an engine with what nftables does beside it: the backend's end.
func withEnds(g *ground, e ingress.Engine) ingress.Engine {
	return ingress.Split{Services: e, Published: nft.New(g.dir)}
}

func nftBalancer(g *ground, _ vipNode) (ingress.Engine, error) { return nft.New(g.dir), nil }

// servicePairs: what the address costs, what many others add to it, and what a
// service engine costs those who use none of its services.
var servicePairs = func() []pair {
	var out []pair
	for _, c := range vipCases {
		if one, isMany := strings.CutSuffix(c.name, "-10k"); isMany {
			out = append(out, pair{c.name, one})
		} else {
			out = append(out, pair{c.name, c.direct})
			if p := (pair{c.direct, c.overlay}); !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}()

// serviceLimits: what a service address is to cost, for each new connection.
var serviceLimits = []limit{
	{Case: vipEBPF, Metric: string(crr), Over: directEBPF, Least: 0.99},
	{Case: vipIPVS, Metric: string(crr), Over: directIPVS, Least: 0.94},
	{Case: vipNFT, Metric: string(crr), Over: directNFT, Least: 0.94},
	{Case: vipEBPFMany, Metric: string(crr), Over: vipEBPF, Least: 0.98},
	{Case: vipIPVSMany, Metric: string(crr), Over: vipIPVS, Least: 0.98},
	{Case: vipNFTMany, Metric: string(crr), Over: vipNFT, Least: 0.98},
}

// servicesBench: service addresses on the instruction clock.
func servicesBench() benchmark {
	c := choices{Metrics: append([]string{string(rr), string(crr)}, fillingNames()...), Cases: []string{pathEBPF, pathBridge}}
	for _, v := range vipCases {
		if !slices.Contains(c.Cases, v.direct) {
			c.Cases = append(c.Cases, v.direct)
		}
		c.Cases = append(c.Cases, v.name)
	}
	for _, m := range meshCases {
		c.Cases = append(c.Cases, m.name)
	}
	c.Usual = slices.DeleteFunc(slices.Clone(c.Cases), func(n string) bool { return strings.HasSuffix(n, "-10k") })
	return benchmark{
		Name:    "services",
		About:   "what a service address costs in instructions: requests and new connections per 10^9 of them to a service's one task on another host, with each service engine, beside the same to the task's own address, and from outside by a published port of a node without a task, against host to host; and what 10,000 services of ten backends take to be programmed, and in memory",
		Choices: c,
		Linked:  true,
		Away: func(ctx context.Context, o options) (away, error) {
			s, kernel, err := inGuest(ctx, o, vm.Config{MemoryMiB: 2048, DiskMiB: 512},
				"for m in veth vxlan bridge sch_ingress cls_bpf nf_tables nft_reject_bridge nft_chain_nat nft_nat nft_masq nft_ct nft_fib_inet nft_socket nft_tproxy macvlan ip_vs ip_vs_rr; do modprobe $m; done\n"+guestCommand(o))
			if err != nil {
				return away{}, err
			}
			return away{
				Series: s, Guest: "Linux " + kernel + " on one processor, whose clock counts instructions",
				Limits: limitsOn(slices.Concat(serviceLimits, meshLimits, fillingLimits), pathRaw, o.cases, o.metrics),
			}, nil
		},
	}
}

// Address plan of services: the measured one's address, others in 10.68.0.0/16,
// their backends in crowdNet.
var (
	serviceAddr = netip.MustParseAddr("10.100.0.200")
	otherVIPs   = netip.MustParsePrefix("10.68.0.0/16")
)

// vip makes a path to a service address.
func (g *ground) vip(ctx context.Context, name string, h pairOfHosts) error {
	i := slices.IndexFunc(vipCases, func(c vipCase) bool { return c.name == name || c.direct == name })
	c := vipCases[i]
	var ports [2]vxlan.Port
	for i := range h {
		ns, err := g.namespace(fmt.Sprintf("%s%d", name, i))
		if err != nil {
			return err
		}
		task, addr := weft.NewID(), taskOn(i)
		ports[i] = vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(i), MAC: weft.EndpointMAC(task, addr)}
	}
	service := weft.NewID()
	all := vipPath{vipCase: c, path: name, network: weft.NewID(), ports: ports}
	all.services = []ingress.Service{{
		ID: service, VIP: serviceAddr, MAC: weft.VIPMAC(service, serviceAddr),
		Backends: []ingress.Backend{{Task: ports[1].Task, Addr: taskOn(1), MAC: ports[1].MAC}},
	}}
	if c.many {
		all.services = append(all.services, otherServices(manyServices, backendsEach)...)
	}
	for i, ns := range h {
		if err := g.vipHost(ctx, all, i, ns); err != nil {
			return err
		}
	}
	if err := netns.Do(ports[1].NetNS, func() error { return holdAddress(serviceAddr) }); err != nil {
		return err
	}
	p := path{name: name, from: ports[0].NetNS, to: ports[1].NetNS, addr: serviceAddr, listen: netip.IPv4Unspecified()}
	if name == c.direct {
		p.addr = taskOn(1)
	}
	g.paths[name] = p
	return nil
}

// vipPath is a path to a service address, before its hosts are made.
type vipPath struct {
	vipCase
	path     string
	network  weft.ID
	ports    [2]vxlan.Port
	services []ingress.Service
}

// vipHost makes the network and the balancer of host i, whose namespace is ns.
func (g *ground) vipHost(ctx context.Context, c vipPath, i int, ns string) error {
	balancer, table, err := g.vipNetwork(ctx, c, i, ns)
	if err != nil {
		return err
	}
	return netns.Do(ns, func() error {
		if err := balancer.Probe(ctx); err != nil {
			return err
		}
		return balancer.Apply(ctx, table)
	})
}

// vipNetwork makes the network of host i, and its balancer, which has done nothing yet,
// with the table that it is to apply.
func (g *ground) vipNetwork(ctx context.Context, c vipPath, i int, ns string) (ingress.Engine, ingress.Table, error) {
	ports, services := c.ports, c.services
	node := vipNode{id: weft.NewID(), bpf: filepath.Join(g.dir, fmt.Sprintf("%s-bpf%d", c.path, i))}
	overlay, err := g.engineOf(c.overlay, node)
	if err != nil {
		return nil, ingress.Table{}, err
	}
	balancer, err := c.engine(g, node)
	if err != nil {
		return nil, ingress.Table{}, err
	}
	n := network(c.network, i, ports[i])
	n.Subnets = append(n.Subnets, otherVIPs)
	n.Peers = []vxlan.Peer{{Addr: ports[1-i].Addr.Addr(), MAC: ports[1-i].MAC, VTEP: vtep(1 - i)}}
	for _, s := range services {
		n.VIPs = append(n.VIPs, vxlan.VIP{Addr: s.VIP, MAC: s.MAC})
	}
	table := ingress.Table{Networks: []ingress.Network{{
		VNI: n.VNI, NetNS: filepath.Join(g.dir, weft.OverlayNetNS(node.id, n.VNI)), Bridge: weft.BridgeName(n.VNI),
		Ports: []string{weft.PortVethName(ports[i].Task, c.network)}, Tasks: []string{ports[i].NetNS}, Services: services,
		Speakers: []ingress.Speaker{{MAC: ports[i].MAC, Addrs: []netip.Addr{ports[i].Addr.Addr()}}},
	}}, Underlay: ingress.Underlay{Port: groundPort, Self: vtep(i), Members: []netip.Addr{vtep(0), vtep(1)}}}
	if i == 1 {
		table.Ends = []ingress.End{{Task: ports[i].Task, NetNS: ports[i].NetNS, Addrs: []ingress.EndAddr{{VIP: serviceAddr, Own: taskOn(i)}}}}
	}
	undo := context.WithoutCancel(ctx)
	g.later(func() error {
		return netns.Do(ns, func() error { return errors.Join(balancer.Close(undo), overlay.Apply(undo, vxlan.State{})) })
	})
	return balancer, table, netns.Do(ns, func() error { return overlay.Apply(ctx, only(n)) })
}

// holdAddress gives the calling thread's namespace a service address as a task's
// has it (agent/sandbox): on the loopback, spoken of to nobody.
func holdAddress(a netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for name, value := range map[string]string{"arp_ignore": "1", "arp_announce": "2"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/"+name, []byte(value), 0o644); err != nil {
			return err
		}
	}
	return netlink.AddrReplace(lo, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}})
}

// otherServices are services of the same network that nobody asks.
func otherServices(count, backends int) []ingress.Service {
	out := make([]ingress.Service, count)
	vip, backend := otherVIPs.Addr(), crowdNet.Addr()
	for i := range out {
		vip = vip.Next()
		id := weft.ID(fmt.Sprintf("service%018d", i))
		out[i] = ingress.Service{ID: id, VIP: vip, MAC: weft.VIPMAC(id, vip)}
		for range backends {
			backend = backend.Next()
			task := weft.ID(fmt.Sprintf("task%021d", i*backends+len(out[i].Backends)))
			out[i].Backends = append(out[i].Backends, ingress.Backend{Task: task, Addr: backend, MAC: weft.EndpointMAC(task, backend)})
		}
	}
	return out
}
