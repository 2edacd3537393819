package sandbox

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// legAddr reads the recorded address of a task's leg; invalid without a leg.
func (m *Linux) legAddr(task weft.ID) (netip.Prefix, error) {
	l, err := find(weft.HostVethName(task))
	if err != nil || l == nil {
		return netip.Prefix{}, err
	}
	if owner, p, ok := m.parseLegAlias(l.Attrs().Alias); ok && owner == task {
		return p, nil
	}
	return netip.Prefix{}, nil
}

// near is the host end of a leg; link is nil without one.
type near struct {
	link       netlink.Link
	isIsolated bool
	shortcut   string // what is wrong with it; "" = nothing
	// recorded is the address in its alias, invalid if the alias is not whole.
	recorded netip.Prefix
}

// readNear asks for the one link. The answer has what the bridge says of its port
// (IFLA_INFO_SLAVE_DATA), for which the library would list all ports.
func (m *Linux) readNear(task weft.ID) (near, error) {
	var n near
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(weft.HostVethName(task))))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENODEV) {
		return n, nil
	}
	if err != nil || len(msgs) == 0 {
		return n, fmt.Errorf("look up link %s: %w", weft.HostVethName(task), err)
	}
	if n.link, err = netlink.LinkDeserialize(nil, msgs[0]); err != nil {
		return n, fmt.Errorf("read link %s: %w", weft.HostVethName(task), err)
	}
	n.isIsolated, err = portIsIsolated(msgs[0])
	if owner, p, ok := m.parseLegAlias(n.link.Attrs().Alias); ok && owner == task {
		n.recorded = p
	}
	return n, err
}

// portIsIsolated finds IFLA_BRPORT_ISOLATED in a link's message.
func portIsIsolated(msg []byte) (bool, error) {
	b := msg[unix.SizeofIfInfomsg:]
	for _, kind := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_SLAVE_DATA, nl.IFLA_BRPORT_ISOLATED} {
		attrs, err := nl.ParseRouteAttr(b)
		if err != nil {
			return false, fmt.Errorf("read bridge port: %w", err)
		}
		b = nil
		for _, a := range attrs {
			if a.Attr.Type&nl.NLA_TYPE_MASK == kind {
				b = a.Value
			}
		}
		if b == nil {
			return false, nil // no port of a bridge
		}
	}
	return len(b) > 0 && b[0] != 0, nil
}

// isPaired reports whether far is the other end of a leg: proof of ownership where
// the alias is missing.
func (n near) isPaired(far netlink.Link) bool {
	return n.link != nil && far != nil &&
		far.Attrs().Index == n.link.Attrs().ParentIndex && far.Attrs().ParentIndex == n.link.Attrs().Index
}

// fault says what is wrong with a leg that is there; "" = nothing.
func (n near) fault(far netlink.Link, g gateway, addr netip.Prefix) string {
	var out []string
	say := func(is bool, text string) {
		if is {
			out = append(out, text)
		}
	}
	if !n.isPaired(far) {
		return "another link had its place and " + faultGone
	}
	say(n.recorded != addr, "its address was not recorded")
	say(g.link == nil || n.link.Attrs().MasterIndex != g.link.Attrs().Index, "it was not on the bridge")
	say(len(out) == 0 && !n.isIsolated, "it was not isolated")
	say(len(out) == 0 && n.shortcut != "", n.shortcut)
	say(n.link.Attrs().Flags&net.FlagUp == 0, "it was down")
	say(far.Attrs().Flags&net.FlagUp == 0, faultInner)
	return strings.Join(out, ", ")
}

// chooseLeg is the address that a task's leg has, had, or is to have. Unless it has
// one, m.mu is held until the choice is in its alias: no other may be given it.
func (m *Linux) chooseLeg(task weft.ID, g gateway, n near, left State) (netip.Prefix, error) {
	if g.fits(n.recorded) {
		return n.recorded, nil
	}
	links, err := complete(netlink.LinkList)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list links: %w", err)
	}
	used := map[netip.Addr]bool{g.addr.Addr(): true}
	for _, l := range links {
		if owner, p, ok := m.parseLegAlias(l.Attrs().Alias); ok && owner != task {
			used[p.Addr()] = true
		}
	}
	for o := range left {
		if o.Class != LegAddress {
			continue
		}
		if p, err := netip.ParsePrefix(o.Name); err == nil && g.fits(p) && !used[p.Addr()] {
			return p, nil
		}
	}
	return pickAddr(g.addr.Masked(), used)
}

// makeLeg makes or completes both ends of a leg, but for its address.
func (m *Linux) makeLeg(task weft.ID, path string, g gateway, addr netip.Prefix) error {
	n, err := m.readNear(task)
	if err != nil {
		return err
	}
	far, err := farOf(path)
	if err != nil {
		return err
	}
	if paired := n.isPaired(far); n.link != nil && !paired {
		if err := m.removeLeg(n.link, paired); err != nil {
			return err
		}
		n.link = nil
	}
	name := weft.HostVethName(task)
	if n.link == nil {
		if n.link, err = addLeg(name, path, g.link); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetAlias(n.link, m.legAlias(task, addr)); err != nil {
		return fmt.Errorf("set alias of %s: %w", name, err)
	}
	if err := netlink.LinkSetMaster(n.link, g.link); err != nil {
		return fmt.Errorf("put %s on the bridge: %w", name, err)
	}
	if err := netlink.LinkSetIsolated(n.link, true); err != nil {
		return fmt.Errorf("isolate %s: %w", name, err)
	}
	if err := m.shortcuts.make(n.link, g.link); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(n.link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return netns.Do(path, func() error {
		if err := setUp(LegName); err != nil {
			return fmt.Errorf("set %s up: %w", LegName, err)
		}
		return nil
	})
}

// addLeg creates both ends where they belong in one message.
func addLeg(name, path string, br netlink.Link) (netlink.Link, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, br.Attrs().MTU
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: LegName, PeerMTU: uint32(br.Attrs().MTU), PeerNamespace: netlink.NsFd(ns.FD())})
	if err != nil {
		return nil, fmt.Errorf("add veth %s: %w", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up veth %s: %w", name, err)
	}
	return l, nil
}

// farOf is the inner end of a task's leg, nil without one.
func farOf(path string) (far netlink.Link, err error) {
	err = netns.Do(path, func() (err error) { far, err = find(LegName); return err })
	if errors.Is(err, weft.ErrNotFound) {
		return nil, nil
	}
	return far, err
}

func (m *Linux) delLeg(task weft.ID, path string) error {
	n, err := m.readNear(task)
	if err != nil || n.link == nil {
		return err
	}
	far, err := farOf(path)
	if err != nil {
		return err
	}
	return m.removeLeg(n.link, n.isPaired(far))
}

func (m *Linux) removeLeg(l netlink.Link, paired bool) error {
	if _, _, ok := m.parseLegAlias(l.Attrs().Alias); !ok && !paired {
		return fmt.Errorf("link %s of this host was not made by this node; delete it: %w", l.Attrs().Name, weft.ErrConflict)
	}
	if err := netlink.LinkDel(l); err != nil && !gone(err) {
		return fmt.Errorf("delete link %s: %w", l.Attrs().Name, err)
	}
	return nil
}
