package ingresstest

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Address plan of a Rig: host i has 10.99.9.(1+i) on the underlay. A network has
// tasks 10.0.16.N and fd00:16::N; its service addresses are of the same subnets.
const (
	rigMTU      = 1450
	rigPort     = 4789
	rigSubnet   = "10.0.16.0/24"
	rigSubnet6  = "fd00:16::/64"
	firstRigVNI = 4097
)

// Parts are what a Rig is made of: the real thing, as on a node.
type Parts struct {
	// Overlay makes the overlay engine of a host. dir is a folder of its own.
	Overlay func(host int, node weft.ID, dir string) (vxlan.Kernel, error)
	// Sandbox makes a task's namespace on the calling thread's host, with
	// service addresses, and returns its path.
	Sandbox func(ctx context.Context, dir string, task weft.ID, vips []netip.Addr) (string, error)
	// Networks is how many overlay networks there are; all have the same
	// addresses. 0 = one.
	Networks int
}

// Rig is two hosts with overlay networks, this one being the test's own namespace.
// Its methods are called by the test's goroutine.
type Rig struct {
	T     testing.TB
	Dir   string // of namespaces
	Nodes [2]weft.ID
	parts Parts
	// other is the namespace of the second host.
	other    string
	overlays [2]vxlan.Kernel
	networks []*rigNetwork
	open     []io.Closer
	// raw counts the associations that were opened by hand: each has a port of its own.
	raw int
}

type rigNetwork struct {
	id    weft.ID
	vni   uint32
	vips  []vxlan.VIP
	ports [2][]vxlan.Port
}

// NewRig makes both hosts. All goes with the test.
func NewRig(t testing.TB, parts Parts) *Rig {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "rig")
	must(t, err)
	r := &Rig{T: t, Dir: dir, parts: parts}
	for i := range max(1, parts.Networks) {
		r.networks = append(r.networks, &rigNetwork{id: weft.NewID(), vni: uint32(firstRigVNI + i)})
	}
	t.Cleanup(r.Release)
	r.other, err = netns.Create(dir, "other")
	must(t, err)
	t.Cleanup(func() {
		names, err := netns.List(dir, "")
		must(t, err)
		for _, name := range names {
			must(t, netns.Remove(filepath.Join(dir, name)))
		}
	})
	r.wire()
	for i := range r.overlays {
		r.Nodes[i] = weft.NewID()
		r.overlays[i], err = parts.Overlay(i, r.Nodes[i], dir)
		must(t, err)
	}
	t.Cleanup(func() {
		for i := range r.overlays {
			must(t, r.on(i, func() error { return r.overlays[i].Apply(context.Background(), vxlan.State{}) }))
		}
	})
	return r
}

// wire joins the two hosts.
func (r *Rig) wire() {
	h, err := netns.Open(r.other)
	must(r.T, err)
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "under0"
	must(r.T, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "under0", PeerNamespace: netlink.NsFd(h.FD())}))
	r.T.Cleanup(func() {
		if l, err := netlink.LinkByName("under0"); err == nil {
			must(r.T, netlink.LinkDel(l))
		}
	})
	for i := range r.overlays {
		must(r.T, r.on(i, func() error {
			l, err := netlink.LinkByName("under0")
			if err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			a, err := netlink.ParseAddr(vtep(i).String() + "/24")
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l), netlink.LinkSetUp(lo))
		}))
	}
}

func vtep(host int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 9, byte(1 + host)}) }

// on runs f on a host.
func (r *Rig) on(host int, f func() error) error {
	if host == 0 {
		return f()
	}
	return netns.Do(r.other, f)
}

// VIP announces the n-th service address of both families on a network.
func (r *Rig) VIP(network int, service weft.ID, n int) (v4, v6 netip.Addr) {
	v4, v6 = address(n), twin(n)
	nw := r.networks[network]
	for _, a := range []netip.Addr{v4, v6} {
		nw.vips = append(nw.vips, vxlan.VIP{Addr: a, MAC: weft.VIPMAC(service, a)})
	}
	return v4, v6
}

func address(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 16, byte(n)}) }

func twin(n int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x16, 15: byte(n)})
}

// Task is a task of a Rig.
type Task struct {
	ingress.Backend
	NetNS string
}

// Task makes the task with the n-th addresses on a network; vips are its service's.
// It is on the network after the next Apply.
func (r *Rig) Task(host, network, n int, vips ...netip.Addr) Task {
	r.T.Helper()
	id := weft.NewID()
	var ns string
	must(r.T, r.on(host, func() (err error) {
		ns, err = r.parts.Sandbox(r.T.Context(), r.Dir, id, vips)
		return err
	}))
	nw := r.networks[network]
	p := vxlan.Port{Task: id, NetNS: ns, IfName: "eth0", Addr: netip.PrefixFrom(address(n), 24), Addr6: netip.PrefixFrom(twin(n), 64), MAC: weft.EndpointMAC(id, address(n))}
	nw.ports[host] = append(nw.ports[host], p)
	return Task{ingress.Backend{Task: id, Addr: address(n), Addr6: twin(n), MAC: p.MAC}, ns}
}

// Apply makes the overlay on both hosts.
func (r *Rig) Apply() {
	r.T.Helper()
	for i := range r.overlays {
		st := vxlan.State{Networks: map[uint32]vxlan.Network{}}
		for _, nw := range r.networks {
			n := vxlan.Network{ID: nw.id, VNI: nw.vni, MTU: rigMTU, VTEP: vtep(i), Port: rigPort, Ports: nw.ports[i], VIPs: nw.vips,
				Subnets: []netip.Prefix{netip.MustParsePrefix(rigSubnet), netip.MustParsePrefix(rigSubnet6)}}
			for _, p := range nw.ports[1-i] {
				for _, a := range p.Addrs() {
					n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: p.MAC, VTEP: vtep(1 - i)})
				}
			}
			st.Networks[n.VNI] = n
		}
		must(r.T, r.on(i, func() error { return r.overlays[i].Apply(r.T.Context(), st) }))
	}
}

// Network is a network of this host as an engine is given it.
func (r *Rig) Network(network int, services ...ingress.Service) ingress.Network {
	nw := r.networks[network]
	n := ingress.Network{VNI: nw.vni, NetNS: filepath.Join(r.Dir, weft.OverlayNetNS(r.Nodes[0], nw.vni)), Bridge: weft.BridgeName(nw.vni), IPv6: true, Services: services}
	for _, p := range nw.ports[0] {
		n.Ports, n.Tasks = append(n.Ports, weft.PortVethName(p.Task, nw.id)), append(n.Tasks, p.NetNS)
		n.Speakers = append(n.Speakers, ingress.Speaker{MAC: p.MAC, Addrs: []netip.Addr{p.Addr.Addr(), p.Addr6.Addr()}})
	}
	return n
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
