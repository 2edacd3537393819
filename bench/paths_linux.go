package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
)

// Names of the paths.
const (
	pathRaw    = "raw"    // host to host
	pathRouted = "routed" // through a veth and the host's routing, no encapsulation
	pathHand   = "hand"   // VXLAN, bridge and veth as a person makes them, in a namespace beside
	pathBridge = "bridge" // weft's engine of that name
	pathEBPF   = "ebpf"   // weft's engine of that name
	// The engine ebpf, without encapsulation.
	pathNative = "native"
	// The engine ebpf, with many endpoints in the network.
	pathCrowd = "ebpf-100k"
)

var casePaths = []string{pathRouted, pathHand, pathBridge, pathEBPF, pathNative, pathCrowd}

// crowd is how many endpoints pathCrowd has besides the two tasks.
const crowd = 100_000

// Address plan, for each path alike, as each has its own two hosts: they are
// 10.99.8.1 and .2 on one veth; task i is 10.100.i.2 where its host routes and
// 10.100.0.(i+1) on an overlay, other endpoints are in 10.64.0.0/12.
const (
	groundMTU  = 1500
	overlayMTU = groundMTU - 50 // VXLAN over IPv4
	groundVNI  = 5100
	groundPort = 4789
	groundDev  = "eth0"
)

var (
	taskNet  = netip.MustParsePrefix("10.100.0.0/16")
	crowdNet = netip.MustParsePrefix("10.64.0.0/12")
)

// path is a way from one namespace to an address in another.
type path struct {
	name     string
	from, to string // files of namespaces
	addr     netip.Addr
	own      netip.Addr // of the client, if it must not be chosen by the kernel
	listen   netip.Addr // of the server, if not addr
}

const noCore = -1

// pairOfHosts are files of namespaces.
type pairOfHosts [2]string

// ground is the namespaces of all paths.
type ground struct {
	dir   string
	log   *slog.Logger
	undo  []func() error
	core  int // that generators run on; noCore = any
	paths map[string]path
	// cables of the guest that are in use.
	cables int
}

// newGround makes the hosts and the paths that are named. On error it has
// cleaned up.
func newGround(ctx context.Context, log *slog.Logger, names []string) (*ground, error) {
	dir, err := os.MkdirTemp("/run", "weft-bench")
	if err != nil {
		return nil, fmt.Errorf("make folder for namespaces: %w", err)
	}
	g := &ground{dir: dir, log: log, core: noCore, paths: map[string]path{}}
	g.later(func() error { return os.RemoveAll(dir) })
	if err := g.build(ctx, names); err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

func (g *ground) later(f func() error) { g.undo = append(g.undo, f) }

// close removes everything, last made first.
func (g *ground) close() error {
	var errs []error
	for len(g.undo) > 0 {
		last := len(g.undo) - 1
		errs = append(errs, g.undo[last]())
		g.undo = g.undo[:last]
	}
	return errors.Join(errs...)
}

func (g *ground) build(ctx context.Context, names []string) error {
	makers := map[string]func(context.Context, string, pairOfHosts) error{
		pathRaw: g.raw, pathRouted: g.routed, pathHand: g.hand, pathBridge: g.overlay, pathEBPF: g.overlay, pathNative: g.overlay, pathCrowd: g.overlay,
	}
	for _, name := range append([]string{pathRaw}, names...) {
		make, ok := makers[like(name)]
		if slices.ContainsFunc(vipCases, func(c vipCase) bool { return c.name == name || c.direct == name }) {
			make, ok = g.vip, true
		}
		if isMesh(name) {
			make, ok = g.mesh, true
		}
		if !ok {
			return fmt.Errorf("no path %q", name)
		}
		hosts, err := g.hosts(name)
		if err == nil {
			err = make(ctx, name, hosts)
		}
		if err != nil {
			return fmt.Errorf("make path %s: %w", name, err)
		}
	}
	return nil
}

// hosts makes two, joined by a veth, or by network cards if the path's name says so.
// Each path has its own: an engine's programs on a shared link would be part of every
// other path, too.
func (g *ground) hosts(name string) (pairOfHosts, error) {
	var h pairOfHosts
	for i := range h {
		var err error
		if h[i], err = g.namespace(fmt.Sprintf("%s-host%d", name, i)); err != nil {
			return h, err
		}
	}
	join := func() error { return g.veth(h[0], groundDev, h[1], groundDev, groundMTU) }
	if onNICs(name) {
		join = func() error { return g.cable(h) }
	}
	if err := join(); err != nil {
		return h, err
	}
	for i, ns := range h {
		if err := netns.Do(ns, func() error { return address(groundDev, netip.PrefixFrom(vtep(i), 24).String()) }); err != nil {
			return h, err
		}
	}
	return h, nil
}

// outsideNet joins a host with a client that is no part of any network.
var outsideNet = netip.MustParsePrefix("10.98.8.0/24")

// outsideOf is the address of the host (0) or of its client (1) there.
func outsideOf(i int) netip.Addr {
	a := outsideNet.Addr().As4()
	a[3] = byte(i + 1)
	return netip.AddrFrom4(a)
}

// client makes a namespace beside host, from which the host is reached at
// outsideOf(0).
func (g *ground) client(name, host string) (string, error) {
	ns, err := g.namespace(name + "-client")
	if err != nil {
		return "", err
	}
	if err := g.veth(host, "outside", ns, "eth0", groundMTU); err != nil {
		return "", err
	}
	at := func(i int) string { return netip.PrefixFrom(outsideOf(i), outsideNet.Bits()).String() }
	err = netns.Do(host, func() error { return address("outside", at(0)) })
	if err == nil {
		err = netns.Do(ns, func() error { return address("eth0", at(1)) })
	}
	return ns, err
}

func (g *ground) raw(_ context.Context, name string, h pairOfHosts) error {
	g.paths[name] = path{name: name, from: h[0], to: h[1], addr: vtep(1)}
	return nil
}

func vtep(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 8, byte(i + 1)}) }

// namespace makes one, with its loopback up.
func (g *ground) namespace(name string) (string, error) {
	ns, err := netns.Create(g.dir, name)
	if err != nil {
		return "", err
	}
	g.later(func() error { return netns.Remove(ns) })
	return ns, netns.Do(ns, func() error { return linkUp("lo") })
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("set up %s: %w", name, err)
	}
	return nil
}

// veth joins two namespaces.
func (g *ground) veth(a, aName, b, bName string, mtu int) error {
	far, err := netns.Open(b)
	if err != nil {
		return err
	}
	defer far.Close()
	return netns.Do(a, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = aName, mtu
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(far.FD())})
		if err != nil {
			return fmt.Errorf("join %s and %s: %w", aName, bName, err)
		}
		g.later(func() error {
			return netns.Do(a, func() error {
				l, err := netlink.LinkByName(aName)
				if err != nil {
					return nil // it went with the other end
				}
				return netlink.LinkDel(l)
			})
		})
		return nil
	})
}

// routed is a task behind a veth on each host, and routes.
func (g *ground) routed(_ context.Context, name string, h pairOfHosts) error {
	var tasks [2]string
	for i := range h {
		var err error
		if tasks[i], err = g.namespace(fmt.Sprintf("%s%d", name, i)); err != nil {
			return err
		}
		if err := g.veth(h[i], name, tasks[i], "eth0", groundMTU); err != nil {
			return err
		}
		gateway, task := netip.AddrFrom4([4]byte{10, 100, byte(i), 1}), netip.AddrFrom4([4]byte{10, 100, byte(i), 2})
		other := &net.IPNet{IP: net.IPv4(10, 100, byte(1-i), 0), Mask: net.CIDRMask(24, 32)}
		err = netns.Do(h[i], func() error {
			return errors.Join(address(name, netip.PrefixFrom(gateway, 24).String()),
				os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644),
				netlink.RouteAdd(&netlink.Route{Dst: other, Gw: vtep(1 - i).AsSlice()}))
		})
		err = errors.Join(err, netns.Do(tasks[i], func() error {
			return errors.Join(address("eth0", netip.PrefixFrom(task, 24).String()), netlink.RouteAdd(&netlink.Route{Dst: other, Gw: gateway.AsSlice()}))
		}))
		if err != nil {
			return err
		}
	}
	g.paths[name] = path{name: name, from: tasks[0], to: tasks[1], addr: netip.AddrFrom4([4]byte{10, 100, 1, 2})}
	return nil
}

// taskOn is the address of task i on an overlay.
func taskOn(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 100, 0, byte(i + 1)}) }

func taskPrefix(i int) netip.Prefix { return netip.PrefixFrom(taskOn(i), taskNet.Bits()) }

// hand is the overlay as a person makes it: VXLAN device and bridge in a
// namespace beside the host, entries and neighbours by hand.
func (g *ground) hand(_ context.Context, name string, h pairOfHosts) error {
	var tasks [2]string
	for i := range h {
		hidden, err := g.namespace(fmt.Sprintf("%s-hidden%d", name, i))
		if err != nil {
			return err
		}
		if tasks[i], err = g.namespace(fmt.Sprintf("%s%d", name, i)); err != nil {
			return err
		}
		side, err := netns.Open(hidden)
		if err != nil {
			return err
		}
		defer side.Close()
		err = netns.Do(h[i], func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU, attrs.Namespace = "vxlan0", overlayMTU, netlink.NsFd(side.FD())
			return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: groundVNI, SrcAddr: vtep(i).AsSlice(), Port: groundPort, Learning: false})
		})
		if err != nil {
			return fmt.Errorf("add VXLAN device: %w", err)
		}
		if err := g.veth(hidden, "task", tasks[i], "eth0", overlayMTU); err != nil {
			return err
		}
		if err := netns.Do(hidden, func() error { return bridged(i) }); err != nil {
			return err
		}
		if err := netns.Do(tasks[i], func() error { return neighbour(i) }); err != nil {
			return err
		}
	}
	g.paths[name] = path{name: name, from: tasks[0], to: tasks[1], addr: taskOn(1)}
	return nil
}

func mac(i int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 8, byte(i + 1)} }

// bridged puts VXLAN device and task on a bridge, with the entry of the other task.
func bridged(i int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "bridge0", overlayMTU
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	vx, err := netlink.LinkByName("vxlan0")
	if err != nil {
		return err
	}
	task, err := netlink.LinkByName("task")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetMaster(vx, br), netlink.LinkSetMaster(task, br),
		linkUp("bridge0"), linkUp("vxlan0"), linkUp("task"),
		netlink.NeighAppend(&netlink.Neigh{LinkIndex: vx.Attrs().Index, Family: 7 /* AF_BRIDGE */, Flags: netlink.NTF_SELF,
			State: netlink.NUD_PERMANENT, HardwareAddr: mac(1 - i), IP: vtep(1 - i).AsSlice()}))
}

// neighbour gives a task its addresses and the other task's.
func neighbour(i int) error {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetHardwareAddr(l, mac(i)), address("eth0", taskPrefix(i).String()),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			HardwareAddr: mac(1 - i), IP: taskOn(1 - i).AsSlice()}))
}

// engine makes one of weft's for host i of a path.
func (g *ground) engine(name string, i int) (vxlan.Kernel, error) {
	return g.engineOf(name, vipNode{id: weft.NewID(), bpf: filepath.Join(g.dir, fmt.Sprintf("%s-bpf%d", name, i))})
}

func (g *ground) engineOf(name string, n vipNode) (vxlan.Kernel, error) {
	if like(name) == pathBridge {
		return linux.New(linux.Config{Node: n.id, NetNSDir: g.dir, Log: g.log})
	}
	return bpf.New(bpf.Config{Node: n.id, Dir: n.bpf, Log: g.log})
}

// overlay is a network of one of weft's engines.
func (g *ground) overlay(ctx context.Context, name string, h pairOfHosts) error {
	var ports [2]vxlan.Port
	for i := range h {
		ns, err := g.namespace(fmt.Sprintf("%s%d", name, i))
		if err != nil {
			return err
		}
		task, addr := weft.NewID(), taskOn(i)
		ports[i] = vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(i), MAC: weft.EndpointMAC(task, addr)}
	}
	id := weft.NewID()
	for i, ns := range h {
		k, err := g.engine(name, i)
		if err != nil {
			return err
		}
		n := network(id, i, ports[i])
		n.Peers = []vxlan.Peer{{Addr: ports[1-i].Addr.Addr(), MAC: ports[1-i].MAC, VTEP: vtep(1 - i)}}
		n.Native, n.Peers[0].Native = like(name) == pathNative, like(name) == pathNative
		if name == pathCrowd {
			n.Peers = append(n.Peers, others(crowd, i)...)
		}
		g.later(func() error {
			return netns.Do(ns, func() error { return k.Apply(context.WithoutCancel(ctx), vxlan.State{}) })
		})
		if err := netns.Do(ns, func() error { return k.Apply(ctx, only(n)) }); err != nil {
			return err
		}
	}
	g.paths[name] = path{name: name, from: ports[0].NetNS, to: ports[1].NetNS, addr: taskOn(1)}
	return nil
}

// network is the overlay of all paths as host i has it, without peers.
func network(id weft.ID, i int, port vxlan.Port) vxlan.Network {
	return vxlan.Network{
		ID: id, VNI: groundVNI, Subnets: []netip.Prefix{taskNet, crowdNet}, MTU: overlayMTU, VTEP: vtep(i),
		Port: groundPort, Ports: []vxlan.Port{port},
	}
}

func only(n vxlan.Network) vxlan.State {
	return vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}
}

// others are endpoints at the other host of host i, where nobody answers.
func others(count, i int) []vxlan.Peer {
	out := make([]vxlan.Peer, count)
	addr := crowdNet.Addr().Next()
	for j := range out {
		out[j] = vxlan.Peer{Addr: addr, MAC: weft.EndpointMAC("other", addr), VTEP: vtep(1 - i)}
		addr = addr.Next()
	}
	return out
}
