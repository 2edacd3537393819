package linux

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// legPeer is the bridge side of the host's leg.
const legPeer = "wleg"

// strayPrefix begins the "task" of a veth that no alias claims; it is no
// character of an ID.
const strayPrefix = "!"

func strayTask(link string) weft.ID { return weft.ID(strayPrefix + link) }

// end is the far end of a veth: what the task or the host sees.
type end struct {
	name string
	mac  net.HardwareAddr
	// addrs are one or two, of different families.
	addrs []netip.Prefix
	mtu   int
	// alias, when set, proves ownership in a shared namespace.
	alias string
}

func (w *writer) setPort(h *hidden, vni uint32, p vxlan.Port) error {
	br, err := h.conn.LinkByIndex(h.bridge)
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w", weft.BridgeName(vni), err)
	}
	id, _, ok := parseNetworkAlias(w.k.cfg.Node, br.Attrs().Alias)
	if !ok {
		return fmt.Errorf("read alias of %s: %w", weft.BridgeName(vni), weft.ErrNotFound)
	}
	alias, err := portAlias(w.k.cfg.Node, p)
	if err != nil {
		return err
	}
	ns, err := netns.Open(p.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	task, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer task.close()
	v := veth{name: weft.PortVethName(p.Task, id), alias: alias, ns: ns, far: task,
		end: end{name: p.IfName, mac: p.MAC, addrs: p.Addrs(), mtu: br.Attrs().MTU}}
	return w.setVeth(h, v)
}

func (w *writer) delPort(h *hidden, vni uint32, p vxlan.Port) error {
	if name, stray := strings.CutPrefix(string(p.Task), strayPrefix); stray {
		l, err := h.conn.find(name)
		if err != nil || l == nil {
			return err
		}
		if _, claimed := parsePortAlias(w.k.cfg.Node, l.Attrs().Alias); claimed || name == legPeer {
			return nil // made anew by an earlier operation
		}
		return h.conn.remove(name)
	}
	br, err := h.conn.LinkByIndex(h.bridge)
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w", weft.BridgeName(vni), err)
	}
	id, _, ok := parseNetworkAlias(w.k.cfg.Node, br.Attrs().Alias)
	if !ok {
		return fmt.Errorf("read alias of %s: %w", weft.BridgeName(vni), weft.ErrNotFound)
	}
	return h.conn.remove(weft.PortVethName(p.Task, id))
}

func (w *writer) setLeg(h *hidden, leg vxlan.HostLeg) error {
	host, err := dial()
	if err != nil {
		return err
	}
	defer host.close()
	br, err := h.conn.LinkByIndex(h.bridge)
	if err != nil {
		return fmt.Errorf("look up the bridge of host leg %s: %w", leg.Name, err)
	}
	// A link of that name which is not the other end of ours is someone
	// else's unless it carries our alias.
	near, err := h.conn.find(legPeer)
	if err != nil {
		return err
	}
	far, err := host.find(leg.Name)
	if err != nil {
		return err
	}
	paired := near != nil && far != nil && near.Attrs().ParentIndex == far.Attrs().Index && far.Attrs().ParentIndex == near.Attrs().Index
	if far != nil && !paired && far.Attrs().Alias != weft.LinkAlias(w.k.cfg.Node) {
		return fmt.Errorf("make host leg %s: this host has a link of that name that weft did not make; rename it: %w", leg.Name, weft.ErrConflict)
	}
	return w.setVeth(h, veth{name: legPeer, ns: w.host, far: host, prepare: func() error { return legSysctls(leg.Name, leg.Addrs()) },
		end: end{name: leg.Name, mac: leg.MAC, addrs: leg.Addrs(), mtu: br.Attrs().MTU, alias: weft.LinkAlias(w.k.cfg.Node)}})
}

// veth is a pair with its near end on a hidden bridge, or that of a Pair.
type veth struct {
	kind        PairKind
	name, alias string // of the near end
	ns          *netns.Handle
	far         *conn // into ns
	end         end
	// prepare, when set, runs before the far end gets its addresses.
	prepare func() error
}

// legSysctls keeps the host from speaking IPv6 on its leg by itself, and lets it
// have the address that it was given: a link-local one would let tasks reach the
// host's listeners past the balancer's rules, and what makes no address is
// switched off whole.
func legSysctls(name string, addrs []netip.Prefix) error {
	off := "1"
	if slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		off = "0"
	}
	base := "net/ipv6/conf/" + name + "/"
	return setSysctls([]sysctl{{base + "addr_gen_mode", "1"}, {base + "accept_ra", "0"}, {base + "disable_ipv6", off}})
}

// setVeth repairs the pair in place where it can, and makes it anew where not.
func (w *writer) setVeth(h *hidden, v veth) error {
	near, far, err := w.pair(h, v)
	if err != nil {
		return err
	}
	if near == nil {
		if near, far, err = w.addPair(h, v); err != nil {
			return err
		}
	}
	if v.alias != "" {
		if err := h.conn.LinkSetAlias(near, v.alias); err != nil {
			return fmt.Errorf("set alias of %s: %w", v.name, err)
		}
	}
	if v.end.alias != "" {
		if err := v.far.LinkSetAlias(far, v.end.alias); err != nil {
			return fmt.Errorf("set alias of %s: %w", v.end.name, err)
		}
	}
	if err := h.conn.LinkSetMasterByIndex(near, h.bridge); err != nil {
		return fmt.Errorf("put %s on the bridge: %w", v.name, err)
	}
	if err := h.conn.setPortFlags(near.Attrs().Index, localPort()); err != nil {
		return fmt.Errorf("set bridge port flags of %s: %w", v.name, err)
	}
	if err := h.conn.LinkSetMTU(near, v.end.mtu); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", v.name, v.end.mtu, err)
	}
	if err := h.setLocal(near.Attrs().Index, v.end.mac); err != nil {
		return fmt.Errorf("add fdb %s on %s: %w", v.end.mac, v.name, err)
	}
	if err := h.conn.LinkSetUp(near); err != nil {
		return fmt.Errorf("set %s up: %w", v.name, err)
	}
	if v.prepare != nil {
		if err := v.prepare(); err != nil {
			return err
		}
	}
	return setEnd(v.far, far, v.end)
}

// pair returns both ends if they are there and belong together. What is left
// of a pair that does not fit is deleted.
func (w *writer) pair(h *hidden, v veth) (near, far netlink.Link, err error) {
	if near, err = h.conn.find(v.name); err != nil {
		return nil, nil, err
	}
	if far, err = v.far.find(v.end.name); err != nil {
		return nil, nil, err
	}
	if near != nil && far != nil && near.Attrs().ParentIndex == far.Attrs().Index && far.Attrs().ParentIndex == near.Attrs().Index && isUsable(near) {
		return near, far, nil
	}
	if near != nil {
		if err := h.conn.remove(v.name); err != nil {
			return nil, nil, err
		}
	}
	if far != nil {
		// In a task's namespace all is ours; in the host's setLeg has
		// seen the alias.
		if err := v.far.remove(v.end.name); err != nil {
			return nil, nil, err
		}
	}
	return nil, nil, nil
}

// addPair creates both ends where they belong in one message: moving a link
// between namespaces costs grace periods of the kernel.
func (w *writer) addPair(h *hidden, v veth) (near, far netlink.Link, err error) {
	kind := PairVeth
	if v.kind == PairNetkit {
		kind, err = PairNetkit, h.conn.addNetkit(v)
	} else {
		err = h.conn.addVeth(v)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("add %s %s with peer %s: %w", kind, v.name, v.end.name, err)
	}
	if near, err = h.conn.LinkByName(v.name); err != nil {
		return nil, nil, fmt.Errorf("look up %s %s: %w", kind, v.name, err)
	}
	if far, err = v.far.LinkByName(v.end.name); err != nil {
		return nil, nil, fmt.Errorf("look up %s peer %s: %w", kind, v.end.name, err)
	}
	return near, far, nil
}

func (c *conn) addVeth(v veth) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = v.name, v.end.mtu, linkGroup
	return c.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: v.end.name, PeerHardwareAddr: v.end.mac, PeerMTU: uint32(v.end.mtu),
		PeerNamespace: netlink.NsFd(v.ns.FD()),
	})
}

// setEnd gives the far end its MTU, MAC and addresses, and nothing else.
func setEnd(c *conn, l netlink.Link, e end) error {
	if err := c.LinkSetMTU(l, e.mtu); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", e.name, e.mtu, err)
	}
	if err := c.LinkSetHardwareAddr(l, e.mac); err != nil {
		return fmt.Errorf("set hardware address of %s to %s: %w", e.name, e.mac, err)
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return c.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", e.name, err)
	}
	missing := slices.Clone(e.addrs)
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		if i := slices.Index(missing, p); i >= 0 {
			missing = slices.Delete(missing, i, i+1)
			continue
		}
		if p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if err := c.AddrDel(l, &a); err != nil && !gone(err) {
			return fmt.Errorf("delete address %s of %s: %w", p, e.name, err)
		}
	}
	for _, p := range missing {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // the allocator knows that it is free
		}
		if err := c.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to %s: %w", p, e.name, err)
		}
	}
	if err := c.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", e.name, err)
	}
	return nil
}
