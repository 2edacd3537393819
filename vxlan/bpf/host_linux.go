package bpf

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/linux"
)

// host is what one pass saw of the calling thread's namespace.
type host struct {
	conn    *netlink.Handle
	byIndex map[int]netlink.Link
	byName  map[string]netlink.Link
	// addrs are all addresses, with their link's index.
	addrs map[netip.Addr]int
	// hops caches the way to each VTEP, by (from, to).
	hops map[[2]netip.Addr]hop
}

// hop is the way to another node.
type hop struct {
	ifindex int
	via     netip.Addr // on that link
	// direct: the program can send there itself; else the VXLAN device does.
	direct bool
}

func lookAtHost() (*host, error) {
	c, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	if err := c.SetSocketTimeout(linux.AnswerLimit); err != nil {
		c.Close()
		return nil, fmt.Errorf("bound the wait of an rtnetlink socket: %w", err)
	}
	h := &host{conn: c, hops: make(map[[2]netip.Addr]hop)}
	if err := h.refresh(); err != nil {
		c.Close()
		return nil, err
	}
	return h, nil
}

func (h *host) close() { h.conn.Close() }

func (h *host) refresh() error {
	links, err := linux.Complete(h.conn.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	h.byIndex, h.byName = make(map[int]netlink.Link, len(links)), make(map[string]netlink.Link, len(links))
	for _, l := range links {
		h.byIndex[l.Attrs().Index], h.byName[l.Attrs().Name] = l, l
	}
	addrs, err := linux.Complete(func() ([]netlink.Addr, error) { return h.conn.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	h.addrs = make(map[netip.Addr]int, len(addrs))
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			h.addrs[ip.Unmap()] = a.LinkIndex
		}
	}
	return nil
}

// isEthernet reports whether programs can read and write frames of a link as
// they expect them.
func (h *host) isEthernet(index int) bool {
	l := h.byIndex[index]
	return l != nil && l.Attrs().EncapType == "ether" && l.Attrs().Flags&unix.IFF_LOOPBACK == 0
}

// underlay is the device at which packets for vtep are taken, 0 if there is none
// that programs can read: then all comes by the VXLAN device.
func (h *host) underlay(vtep netip.Addr) int {
	if i := h.addrs[vtep]; h.isEthernet(i) {
		return i
	}
	return 0
}

// hop looks up the route from one VTEP to another. Without a usable one the
// kernel decides anew for each packet, in its VXLAN device.
func (h *host) hop(from, to netip.Addr) hop {
	key := [2]netip.Addr{from, to}
	if found, ok := h.hops[key]; ok {
		return found
	}
	found := h.route(from, to)
	h.hops[key] = found
	return found
}

func (h *host) route(from, to netip.Addr) hop {
	if h.underlay(from) == 0 {
		return hop{}
	}
	routes, err := h.conn.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.AsSlice()})
	if err != nil || len(routes) != 1 {
		return hop{}
	}
	r := routes[0]
	via := to
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		via = gw.Unmap()
	}
	if v, ok := r.Via.(*netlink.Via); ok {
		if gw, ok := netip.AddrFromSlice(v.Addr); ok {
			via = gw.Unmap()
		}
	}
	if r.Type != unix.RTN_UNICAST || r.Encap != nil || r.MPLSDst != nil || !h.isEthernet(r.LinkIndex) {
		return hop{}
	}
	return hop{ifindex: r.LinkIndex, via: via, direct: true}
}

// tunnelMTU lets any packet through: the sizes of packets are checked before.
const tunnelMTU = 65000

// tunnel is our VXLAN device for a UDP port, nil if it is missing or is not as
// it should be.
func (e *Engine) tunnel(h *host, port uint16) *netlink.Vxlan {
	v, ok := h.byName[weft.TunnelName(port)].(*netlink.Vxlan)
	if !ok || v.Alias != weft.LinkAlias(e.cfg.Node) || v.Flags&unix.IFF_UP == 0 || !v.FlowBased || v.Learning || v.Port != int(port) {
		return nil
	}
	return v
}

// makeTunnel makes the VXLAN device that every packet may take which the
// programs leave to the kernel. It has no VNI and no peers of its own: the
// programs say both for each packet. Its socket also tells the kernel that UDP
// to this port is VXLAN, so that received TCP is joined to large packets (GRO)
// before the programs see it.
func (e *Engine) makeTunnel(h *host, port uint16) error {
	name := weft.TunnelName(port)
	if old := h.byName[name]; old != nil {
		// One without an alias, but of our group, is the rest of a crash.
		if a := old.Attrs(); a.Alias != weft.LinkAlias(e.cfg.Node) && (a.Alias != "" || a.Group != linux.LinkGroup) {
			return fmt.Errorf("make VXLAN device %s: this host has a link of that name that this node did not make; remove it: %w", name, weft.ErrConflict)
		}
		if err := h.conn.LinkDel(old); err != nil {
			return fmt.Errorf("delete VXLAN device %s: %w", name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = name, tunnelMTU, linux.LinkGroup
	v := &netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: int(port), NoAge: true, UDP6ZeroCSumRx: true}
	err := h.conn.LinkAdd(v)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("add VXLAN device %s: another device of this host already uses UDP port %d; remove it or choose another data path port: %w", name, port, weft.ErrConflict)
	}
	if err != nil {
		return fmt.Errorf("add VXLAN device %s: %w", name, err)
	}
	l, err := h.conn.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up VXLAN device %s: %w", name, err)
	}
	if err := linux.Quiet(name); err != nil {
		return err
	}
	err = h.conn.LinkSetUp(l)
	if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EEXIST) {
		return errors.Join(fmt.Errorf("bring up %s: UDP port %d is taken by %s; stop it or choose another data path port: %w", name, port, linux.UDPHolder(port), weft.ErrConflict), h.conn.LinkDel(l))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("set %s up: %w", name, err), h.conn.LinkDel(l))
	}
	if err := h.conn.LinkSetAlias(l, weft.LinkAlias(e.cfg.Node)); err != nil {
		return fmt.Errorf("set alias of %s: %w", name, err)
	}
	return h.refresh()
}
