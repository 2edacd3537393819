package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// Gateway implements Maker.
func (m *Linux) Gateway(ctx context.Context) (string, netip.Prefix, error) {
	if err := ctx.Err(); err != nil {
		return "", netip.Prefix{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, subnet, err := m.bridgeLocked()
	if err != nil {
		return "", netip.Prefix{}, fmt.Errorf("gateway bridge %s: %w", weft.GatewayBridge, err)
	}
	return weft.GatewayBridge, subnet.Masked(), nil
}

// Close implements Maker.
func (m *Linux) Close(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l, err := find(weft.GatewayBridge)
	if err != nil || l == nil {
		return err
	}
	if !m.ownsBridge(l) {
		return nil // not ours, nothing to remove
	}
	if err := netlink.LinkDel(l); err != nil && !gone(err) {
		return fmt.Errorf("delete gateway bridge %s: %w", weft.GatewayBridge, err)
	}
	return nil
}

// bridgeMAC is given in the message that creates the bridge, so that one left
// by a crash before its alias is known as ours.
func (m *Linux) bridgeMAC() net.HardwareAddr {
	return weft.NodeMAC(m.cfg.Node, netip.AddrFrom4([4]byte{'w', 'g', 'w', 0}))
}

func (m *Linux) ownsBridge(l netlink.Link) bool {
	a := l.Attrs()
	return l.Type() == "bridge" && (a.Alias == weft.LinkAlias(m.cfg.Node) || a.Alias == "" && bytes.Equal(a.HardwareAddr, m.bridgeMAC()))
}

// bridgeLocked makes or completes the bridge and returns its address.
func (m *Linux) bridgeLocked() (netlink.Link, netip.Prefix, error) {
	l, err := find(weft.GatewayBridge)
	if err != nil {
		return nil, netip.Prefix{}, err
	}
	if l == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = weft.GatewayBridge, m.bridgeMAC()
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return nil, netip.Prefix{}, fmt.Errorf("add bridge: %w", err)
		}
		if l, err = netlink.LinkByName(weft.GatewayBridge); err != nil {
			return nil, netip.Prefix{}, fmt.Errorf("look up bridge: %w", err)
		}
	}
	if !m.ownsBridge(l) {
		return nil, netip.Prefix{}, fmt.Errorf("this host has a link of that name that this node did not make; rename or delete it: %w", weft.ErrConflict)
	}
	if l.Attrs().Alias == "" {
		if err := netlink.LinkSetAlias(l, weft.LinkAlias(m.cfg.Node)); err != nil {
			return nil, netip.Prefix{}, fmt.Errorf("set alias: %w", err)
		}
	}
	addr, err := bridgeAddr(l)
	if err != nil {
		return nil, addr, err
	}
	if !addr.IsValid() {
		used, err := usedPrefixes()
		if err != nil {
			return nil, addr, err
		}
		subnet, err := pickSubnet(m.cfg.Pool, used)
		if err != nil {
			return nil, addr, err
		}
		addr = netip.PrefixFrom(subnet.Addr().Next(), subnet.Bits())
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, addr, fmt.Errorf("add address %s: %w", addr, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return nil, addr, fmt.Errorf("set up: %w", err)
	}
	return l, addr, m.forward()
}

// forward switches routing on in the host's namespace. It is not switched off
// again: others may rely on it by then.
func (m *Linux) forward() error {
	const key = "/proc/sys/net/ipv4/ip_forward"
	old, err := os.ReadFile(key)
	if err != nil {
		return fmt.Errorf("read ip_forward: %w", err)
	}
	if strings.TrimSpace(string(old)) == "1" {
		return nil
	}
	if err := os.WriteFile(key, []byte("1"), 0o644); err != nil {
		return fmt.Errorf("set ip_forward, without which tasks cannot reach the outside: %w", err)
	}
	m.cfg.Log.Info("ip_forward switched on for the gateway bridge", weft.KeyNode, m.cfg.Node)
	return nil
}

func bridgeAddr(l netlink.Link) (netip.Prefix, error) {
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if p := prefixOf(a.IPNet); p.IsValid() {
			return p, nil
		}
	}
	return netip.Prefix{}, nil
}

// usedPrefixes are the host's addresses and routes but the default ones.
func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []netip.Prefix
	for _, r := range routes {
		if p := prefixOf(r.Dst); p.IsValid() && p.Bits() > 0 {
			out = append(out, p)
		}
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if p := prefixOf(a.IPNet); p.IsValid() {
			out = append(out, p.Masked())
		}
	}
	return out, nil
}

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

func (m *Linux) setLeg(task weft.ID, path string) (netip.Prefix, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	br, gw, err := m.bridgeLocked()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("gateway bridge %s: %w", weft.GatewayBridge, err)
	}
	links, err := complete(netlink.LinkList)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list links: %w", err)
	}
	name := weft.HostVethName(task)
	used := make(map[netip.Addr]bool)
	var near netlink.Link
	var addr netip.Prefix
	for _, l := range links {
		owner, p, ok := m.parseLegAlias(l.Attrs().Alias)
		if l.Attrs().Name == name {
			near = l
			if ok && owner == task && gw.Contains(p.Addr()) && p.Bits() == gw.Bits() {
				addr = p
			}
		} else if ok {
			used[p.Addr()] = true
		}
	}
	if near != nil {
		paired, err := pairedWith(path, near)
		if err != nil {
			return addr, err
		}
		if !paired || !addr.IsValid() {
			if err := m.removeLeg(near, paired); err != nil {
				return addr, err
			}
			near = nil
		}
	}
	if !addr.IsValid() {
		if addr, err = pickAddr(gw.Masked(), used); err != nil {
			return addr, err
		}
	}
	if near == nil {
		if near, err = addLeg(name, path, br); err != nil {
			return addr, err
		}
	}
	if err := netlink.LinkSetAlias(near, m.legAlias(task, addr)); err != nil {
		return addr, fmt.Errorf("set alias of %s: %w", name, err)
	}
	if err := netlink.LinkSetMaster(near, br); err != nil {
		return addr, fmt.Errorf("put %s on the bridge: %w", name, err)
	}
	if err := netlink.LinkSetIsolated(near, true); err != nil {
		return addr, fmt.Errorf("isolate %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(near); err != nil {
		return addr, fmt.Errorf("set %s up: %w", name, err)
	}
	return addr, netns.Do(path, func() error { return setLegInside(addr, gw.Addr()) })
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

// pairedWith reports whether the other end of near is the leg in the task's
// namespace: proof of ownership where the alias is missing.
func pairedWith(path string, near netlink.Link) (paired bool, err error) {
	err = netns.Do(path, func() error {
		l, err := find(LegName)
		if err != nil || l == nil {
			return err
		}
		paired = l.Attrs().Index == near.Attrs().ParentIndex && l.Attrs().ParentIndex == near.Attrs().Index
		return nil
	})
	if errors.Is(err, weft.ErrNotFound) {
		return false, nil
	}
	return paired, err
}

func (m *Linux) delLeg(task weft.ID, path string) error {
	l, err := find(weft.HostVethName(task))
	if err != nil || l == nil {
		return err
	}
	paired, err := pairedWith(path, l)
	if err != nil {
		return err
	}
	return m.removeLeg(l, paired)
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

// setLegInside runs in the task's namespace.
func setLegInside(addr netip.Prefix, gw netip.Addr) error {
	l, err := netlink.LinkByName(LegName)
	if err != nil {
		return fmt.Errorf("look up %s: %w", LegName, err)
	}
	if err := setAddrs(l, []netip.Prefix{addr}, netlink.FAMILY_V4); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", LegName, err)
	}
	route := &netlink.Route{LinkIndex: l.Attrs().Index, Gw: gw.AsSlice(), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route by %s: %w", gw, err)
	}
	return nil
}

// setAddrs makes the link's addresses of a family equal to want; link-local
// and loopback ones are the kernel's.
func setAddrs(l netlink.Link, want []netip.Prefix, family int) error {
	have, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(l, family) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	var known []netip.Prefix
	for _, a := range have {
		known = append(known, prefixOf(a.IPNet))
	}
	for _, p := range want {
		if slices.Contains(known, p) {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if p.Bits() == 128 {
			// Without a route of its own in the main table, where setRules
			// looks for the way out to a service address.
			a.Flags |= unix.IFA_F_NOPREFIXROUTE
		}
		if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to %s: %w", p, l.Attrs().Name, err)
		}
	}
	for i, p := range known {
		if slices.Contains(want, p) || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if err := netlink.AddrDel(l, &have[i]); err != nil && !gone(err) {
			return fmt.Errorf("delete address %s of %s: %w", p, l.Attrs().Name, err)
		}
	}
	return nil
}

func find(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up link %s: %w", name, err)
	}
	return l, nil
}

func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL)
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP) // invalid for nil
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
