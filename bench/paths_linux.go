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
)

var casePaths = []string{pathRouted, pathHand, pathBridge, pathEBPF}

// Address plan: two hosts 10.99.8.1 and .2 on one veth; for path number n, which
// also numbers VNIs and UDP ports, 10.(100+n).0.0/16. Task i is 10.(100+n).i.2
// where its host routes and 10.(100+n).0.(i+1) on an overlay.
const (
	groundMTU  = 1500
	overlayMTU = groundMTU - 50 // VXLAN over IPv4
	groundVNI  = 5100
	groundPort = 4800
	groundDev  = "eth0"
)

// path is a way from one namespace to an address in another.
type path struct {
	name     string
	from, to string // files of namespaces
	addr     netip.Addr
}

// ground is two hosts in namespaces, and what lies between their tasks.
type ground struct {
	dir   string
	host  [2]string // files of namespaces
	log   *slog.Logger
	undo  []func() error
	paths map[string]path
}

// newGround makes the hosts and the paths that are named. On error it has
// cleaned up.
func newGround(ctx context.Context, log *slog.Logger, names []string) (*ground, error) {
	dir, err := os.MkdirTemp("/run", "weft-bench")
	if err != nil {
		return nil, fmt.Errorf("make folder for namespaces: %w", err)
	}
	g := &ground{dir: dir, log: log, paths: map[string]path{}}
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
	for i := range g.host {
		var err error
		if g.host[i], err = g.namespace(fmt.Sprintf("host%d", i)); err != nil {
			return err
		}
	}
	if err := g.veth(g.host[0], groundDev, g.host[1], groundDev, groundMTU); err != nil {
		return err
	}
	for i, ns := range g.host {
		if err := netns.Do(ns, func() error { return address(groundDev, netip.PrefixFrom(vtep(i), 24).String()) }); err != nil {
			return err
		}
	}
	g.paths[pathRaw] = path{pathRaw, g.host[0], g.host[1], vtep(1)}
	makers := map[string]func(context.Context, string, int) error{
		pathRouted: g.routed, pathHand: g.hand, pathBridge: g.overlay, pathEBPF: g.overlay,
	}
	for n, name := range names {
		make, ok := makers[name]
		if !ok {
			return fmt.Errorf("no path %q", name)
		}
		if err := make(ctx, name, n); err != nil {
			return fmt.Errorf("make path %s: %w", name, err)
		}
	}
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
func (g *ground) routed(_ context.Context, name string, n int) error {
	var tasks [2]string
	for i := range g.host {
		var err error
		if tasks[i], err = g.namespace(fmt.Sprintf("%s%d", name, i)); err != nil {
			return err
		}
		if err := g.veth(g.host[i], name, tasks[i], "eth0", groundMTU); err != nil {
			return err
		}
		gateway, task := netip.AddrFrom4([4]byte{10, byte(100 + n), byte(i), 1}), netip.AddrFrom4([4]byte{10, byte(100 + n), byte(i), 2})
		other := &net.IPNet{IP: net.IPv4(10, byte(100+n), byte(1-i), 0), Mask: net.CIDRMask(24, 32)}
		err = netns.Do(g.host[i], func() error {
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
	g.paths[name] = path{name, tasks[0], tasks[1], netip.AddrFrom4([4]byte{10, byte(100 + n), 1, 2})}
	return nil
}

// taskOn is the address of task i on overlay n.
func taskOn(n, i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(100 + n), 0, byte(i + 1)}) }

// hand is the overlay as a person makes it: VXLAN device and bridge in a
// namespace beside the host, entries and neighbours by hand.
func (g *ground) hand(_ context.Context, name string, n int) error {
	var tasks [2]string
	for i := range g.host {
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
		err = netns.Do(g.host[i], func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU, attrs.Namespace = "vxlan0", overlayMTU, netlink.NsFd(side.FD())
			return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: groundVNI + n, SrcAddr: vtep(i).AsSlice(), Port: groundPort + n, Learning: false})
		})
		if err != nil {
			return fmt.Errorf("add VXLAN device: %w", err)
		}
		if err := g.veth(hidden, "task", tasks[i], "eth0", overlayMTU); err != nil {
			return err
		}
		if err := netns.Do(hidden, func() error { return bridged(n, i) }); err != nil {
			return err
		}
		if err := netns.Do(tasks[i], func() error { return neighbour(n, i) }); err != nil {
			return err
		}
	}
	g.paths[name] = path{name, tasks[0], tasks[1], taskOn(n, 1)}
	return nil
}

func mac(n, i int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, byte(n), byte(i + 1)} }

// bridged puts VXLAN device and task on a bridge, with the entry of the other task.
func bridged(n, i int) error {
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
			State: netlink.NUD_PERMANENT, HardwareAddr: mac(n, 1-i), IP: vtep(1 - i).AsSlice()}))
}

// neighbour gives a task its addresses and the other task's.
func neighbour(n, i int) error {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetHardwareAddr(l, mac(n, i)), address("eth0", netip.PrefixFrom(taskOn(n, i), 16).String()),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			HardwareAddr: mac(n, 1-i), IP: taskOn(n, 1-i).AsSlice()}))
}

// engine makes one of weft's engines for host i.
func (g *ground) engine(name string, i int) (vxlan.Kernel, error) {
	node := weft.NewID()
	switch name {
	case pathBridge:
		return linux.New(linux.Config{Node: node, NetNSDir: g.dir, Log: g.log})
	default:
		return bpf.New(bpf.Config{Node: node, Dir: filepath.Join(g.dir, fmt.Sprintf("bpf%d", i)), Log: g.log})
	}
}

// overlay is a network of one of weft's engines.
func (g *ground) overlay(ctx context.Context, name string, n int) error {
	var ports [2]vxlan.Port
	for i := range g.host {
		ns, err := g.namespace(fmt.Sprintf("%s%d", name, i))
		if err != nil {
			return err
		}
		task, addr := weft.NewID(), taskOn(n, i)
		ports[i] = vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: netip.PrefixFrom(addr, 16), MAC: weft.EndpointMAC(task, addr)}
	}
	id := weft.NewID()
	for i, ns := range g.host {
		k, err := g.engine(name, i)
		if err != nil {
			return err
		}
		o := 1 - i
		want := vxlan.State{Networks: map[uint32]vxlan.Network{uint32(groundVNI + n): {
			ID: id, VNI: uint32(groundVNI + n), Subnets: []netip.Prefix{ports[i].Addr.Masked()}, MTU: overlayMTU, VTEP: vtep(i),
			Port: uint16(groundPort + n), Ports: []vxlan.Port{ports[i]},
			Peers: []vxlan.Peer{{Addr: ports[o].Addr.Addr(), MAC: ports[o].MAC, VTEP: vtep(o)}},
		}}}
		g.later(func() error {
			return netns.Do(ns, func() error { return k.Apply(context.WithoutCancel(ctx), vxlan.State{}) })
		})
		if err := netns.Do(ns, func() error { return k.Apply(ctx, want) }); err != nil {
			return err
		}
	}
	g.paths[name] = path{name, ports[0].NetNS, ports[1].NetNS, ports[1].Addr.Addr()}
	return nil
}
