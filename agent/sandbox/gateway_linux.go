package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Gateway implements Maker.
func (m *Linux) Gateway(ctx context.Context) (string, netip.Prefix, error) {
	if err := ctx.Err(); err != nil {
		return "", netip.Prefix{}, err
	}
	g, err := m.keepGateway()
	if err != nil {
		return "", netip.Prefix{}, err
	}
	return weft.GatewayBridge, g.addr.Masked(), nil
}

// Close implements Maker.
func (m *Linux) Close(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l, err := find(weft.GatewayBridge)
	if err != nil {
		return err
	}
	if l != nil && m.ownsBridge(l) { // a foreign one is left
		if err := netlink.LinkDel(l); err != nil && !gone(err) {
			return fmt.Errorf("delete gateway bridge %s: %w", weft.GatewayBridge, err)
		}
	}
	m.host = memory{left: nil}
	if err := os.Remove(m.hostRecord()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the gateway bridge: %w", err)
	}
	return nil
}

func (m *Linux) hostRecord() string { return filepath.Join(m.cfg.FilesDir, hostRecordName) }

// bridgeMAC is given in the message that creates the bridge, so that one left
// by a crash before its alias is known as ours.
func (m *Linux) bridgeMAC() net.HardwareAddr {
	return weft.NodeMAC(m.cfg.Node, netip.AddrFrom4([4]byte{'w', 'g', 'w', 0}))
}

func (m *Linux) ownsBridge(l netlink.Link) bool {
	a := l.Attrs()
	return l.Type() == "bridge" && (a.Alias == weft.LinkAlias(m.cfg.Node) || a.Alias == "" && bytes.Equal(a.HardwareAddr, m.bridgeMAC()))
}

// gateway is the host's side of all legs.
type gateway struct {
	link netlink.Link
	addr netip.Prefix
}

func (g gateway) isThere() bool { return g.link != nil && g.addr.IsValid() }

// fits reports whether an address of a leg is of the bridge's subnet.
func (g gateway) fits(p netip.Prefix) bool {
	return p.IsValid() && g.addr.Contains(p.Addr()) && p.Bits() == g.addr.Bits()
}

func (m *Linux) keepGateway() (gateway, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g, err := m.gatewayLocked()
	if err != nil {
		return g, fmt.Errorf("gateway bridge %s: %w", weft.GatewayBridge, err)
	}
	return g, nil
}

// gatewayLocked reads the bridge and makes it what it should be.
func (m *Linux) gatewayLocked() (gateway, error) {
	about := record{Boot: m.boot(), Node: m.cfg.Node}
	if m.host.left == nil {
		m.host = readRecord(m.hostRecord()).memory(about)
	}
	var g gateway
	var err error
	if g.link, err = find(weft.GatewayBridge); err != nil {
		return g, err
	}
	have, addrs, err := m.readBridge(g.link)
	if err != nil {
		return g, err
	}
	if g.addr, err = m.gatewayAddrLocked(addrs); err != nil {
		return g, err
	}
	want := wantedHost(g.addr)
	if err := readSettings(have, want); err != nil {
		return g, err
	}
	ops := Diff(have, want, m.host.left, false)
	found := m.host.findings(have, ops, 0)
	failed := map[Object]bool{}
	var errs []error
	for _, op := range ops {
		if err := m.makeHost(&g, op); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
			failed[op.Object] = true
		}
	}
	m.remember(&m.host, m.host.after(want, ops, found, failed, 0), about, m.hostRecord())
	m.report(ops, found, failed, "")
	return g, errors.Join(errs...)
}

// readBridge refuses a bridge that this node has not made.
func (m *Linux) readBridge(l netlink.Link) (State, []netip.Prefix, error) {
	have := State{}
	if l == nil {
		return have, nil, nil
	}
	if !m.ownsBridge(l) {
		return nil, nil, fmt.Errorf("this host has a link of that name that this node did not make; rename or delete it: %w", weft.ErrConflict)
	}
	bridge := Object{Bridge, weft.GatewayBridge}
	switch {
	case l.Attrs().Alias == "":
		have[bridge] = "its alias was lost"
	case l.Attrs().Flags&net.FlagUp == 0:
		have[bridge] = "it was down"
	default:
		have[bridge] = ""
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []netip.Prefix
	for _, a := range addrs {
		if p := prefixOf(a.IPNet); p.IsValid() {
			out = append(out, p)
			have[Object{BridgeAddress, p.String()}] = ""
		}
	}
	return have, out, nil
}

// gatewayAddrLocked chooses the bridge's address, a new one only on a host without
// any leg.
func (m *Linux) gatewayAddrLocked(have []netip.Prefix) (netip.Prefix, error) {
	var legs []netip.Prefix
	if m.host.left == nil {
		links, err := complete(netlink.LinkList)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if _, p, ok := m.parseLegAlias(l.Attrs().Alias); ok {
				legs = append(legs, p)
			}
		}
	}
	if addr := gatewayOf(m.host.left, legs, have); addr.IsValid() {
		return addr, nil
	}
	used, err := usedPrefixes()
	if err != nil {
		return netip.Prefix{}, err
	}
	subnet, err := pickSubnet(m.cfg.Pool, used)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(subnet.Addr().Next(), subnet.Bits()), nil
}

// makeHost makes one change on the host.
func (m *Linux) makeHost(g *gateway, op Op) error {
	switch op.Class {
	case HostSetting:
		// Not switched off again: others may rely on it by then.
		if err := writeSetting(op); err != nil {
			return fmt.Errorf("tasks cannot reach the outside without it: %w", err)
		}
		m.cfg.Log.Info("ip_forward switched on for the gateway bridge", weft.KeyNode, m.cfg.Node)
		return nil
	case Bridge:
		return m.makeBridge(g)
	case BridgeAddress:
		if g.link == nil {
			return weft.ErrNotFound
		}
		return setAddr(weft.GatewayBridge, op)
	}
	panic(fmt.Sprintf("no way to make %s", op.Class))
}

func (m *Linux) makeBridge(g *gateway) error {
	if g.link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = weft.GatewayBridge, m.bridgeMAC()
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		l, err := netlink.LinkByName(weft.GatewayBridge)
		if err != nil {
			return fmt.Errorf("look up bridge: %w", err)
		}
		g.link = l
	}
	if err := netlink.LinkSetAlias(g.link, weft.LinkAlias(m.cfg.Node)); err != nil {
		return fmt.Errorf("set alias: %w", err)
	}
	return netlink.LinkSetUp(g.link)
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
