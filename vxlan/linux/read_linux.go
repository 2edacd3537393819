package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Read implements vxlan.Kernel. What is there but not as Apply would make it
// is returned with the zero value in the field that is wrong, so that it
// differs from every valid state: a network without ID is half made, one
// without VTEP has a broken VXLAN device, a port without Addr is broken.
func (k *Kernel) Read(ctx context.Context) (vxlan.State, error) {
	vnis, err := k.vnis()
	if err != nil {
		return vxlan.State{}, err
	}
	st := vxlan.State{Networks: make(map[uint32]vxlan.Network, len(vnis))}
	for _, vni := range vnis {
		if err := ctx.Err(); err != nil {
			return vxlan.State{}, err
		}
		n, err := k.readNetwork(vni)
		if err != nil {
			return vxlan.State{}, fmt.Errorf("read network %d: %w", vni, err)
		}
		st.Networks[vni] = n
	}
	return st, nil
}

func (k *Kernel) readNetwork(vni uint32) (vxlan.Network, error) {
	n := vxlan.Network{VNI: vni}
	h, err := k.open(vni)
	if errors.Is(err, weft.ErrNotFound) {
		return n, nil // a file without a mount: the rest of a crash
	}
	if err != nil {
		return n, err
	}
	defer h.close()
	links, err := complete(h.conn.LinkList)
	if err != nil {
		return n, fmt.Errorf("list links: %w", err)
	}
	flags, err := h.conn.allPortFlags()
	if err != nil {
		return n, err
	}
	var bridge, tunnel, uplink netlink.Link
	for _, l := range links {
		switch l.Attrs().Name {
		case weft.BridgeName(vni):
			bridge = l
		case weft.VXLANName(vni):
			tunnel = l
		case weft.UplinkName(vni):
			uplink = l
		}
	}
	br, ok := bridge.(*netlink.Bridge)
	if !ok || br.Flags&unix.IFF_UP == 0 || br.MulticastSnooping == nil || *br.MulticastSnooping {
		return n, nil
	}
	id, subnets, ok := parseNetworkAlias(k.cfg.Node, br.Alias)
	if !ok {
		return n, nil
	}
	n.ID, n.Subnets, n.MTU = id, subnets, br.MTU
	tables := vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]netip.Addr{}}
	tunnelIndex := 0
	if vx, ok := tunnel.(*netlink.Vxlan); ok {
		tunnelIndex = vx.Index
		if healthyTunnel(vx, vni, br.Index) && flags[vx.Index] == tunnelPort() {
			n.VTEP, n.Port = addrOf(vx.SrcAddr), uint16(vx.Port)
		}
		if vx.MTU != br.MTU {
			n.MTU = 0
		}
	}
	if up, ok := uplink.(*netlink.Veth); ok && tunnel == nil {
		tunnelIndex = up.Index
		k.readUplink(&n, up, br, flags[up.Index] == tunnelPort())
	}
	local, err := readTables(h.conn, br.Index, tunnelIndex, &tables)
	if err != nil {
		return n, err
	}
	n.Peers, n.VIPs = vxlan.Observed(tables)
	for _, l := range links {
		v, ok := l.(*netlink.Veth)
		if !ok || l == uplink {
			continue
		}
		sound := v.MasterIndex == br.Index && v.Flags&unix.IFF_UP != 0 && flags[v.Index] == localPort() && v.MTU == br.MTU
		if v.Name == legPeer {
			n.HostLeg = k.readLeg(v, sound, local)
			continue
		}
		if p, ok := parsePortAlias(k.cfg.Node, v.Alias); ok && v.Name == weft.PortVethName(p.Task, n.ID) {
			n.Ports = append(n.Ports, k.readPort(p, v, sound, local))
			continue
		}
		// The rest of a crash between a veth and its alias: known by no
		// task, so it is named by its link and removed by Diff.
		n.Ports = append(n.Ports, vxlan.Port{Task: strayTask(v.Name)})
	}
	slices.SortFunc(n.Ports, func(a, b vxlan.Port) int { return cmpString(string(a.Task), string(b.Task)) })
	return n, nil
}

func healthyTunnel(vx *netlink.Vxlan, vni uint32, bridge int) bool {
	return vx.VxlanId == int(vni) && !vx.Learning && vx.MasterIndex == bridge && vx.Flags&unix.IFF_UP != 0 && !vx.FlowBased && vx.Group == nil
}

// readTables fills in neighbours and forwarding entries, and returns the
// static entries towards local ports by link index.
func readTables(c *conn, bridge, tunnel int, t *vxlan.Tables) (map[int][]vxlan.MAC, error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		ns, err := complete(func() ([]netlink.Neigh, error) { return c.NeighList(bridge, family) })
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range ns {
			// The kernel makes its own NOARP entries for multicast; ours
			// are permanent.
			if a := addrOf(n.IP); n.State == netlink.NUD_PERMANENT && len(n.HardwareAddr) == 6 && !a.IsMulticast() {
				t.Neigh[a] = vxlan.MACOf(n.HardwareAddr)
			}
		}
	}
	fdb, err := complete(func() ([]netlink.Neigh, error) { return c.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("list forwarding entries: %w", err)
	}
	local := make(map[int][]vxlan.MAC)
	onBridge, onTunnel := map[vxlan.MAC]bool{}, map[vxlan.MAC]netip.Addr{}
	for _, e := range fdb {
		m := vxlan.MACOf(e.HardwareAddr)
		switch {
		case e.Flags&netlink.NTF_SELF != 0 && e.LinkIndex == tunnel && tunnel != 0 && e.IP != nil:
			onTunnel[m] = addrOf(e.IP)
		case e.MasterIndex != bridge || e.State != netlink.NUD_NOARP:
		case e.LinkIndex == tunnel:
			onBridge[m] = true
		default:
			local[e.LinkIndex] = append(local[e.LinkIndex], m)
		}
	}
	for m := range onBridge {
		t.FDB[m] = onTunnel[m]
	}
	for m := range onTunnel {
		if !onBridge[m] {
			t.FDB[m] = netip.IPv4Unspecified() // half an entry equals none that is wanted
		}
	}
	return local, nil
}

// readPort looks at the end inside the task's namespace.
func (k *Kernel) readPort(p vxlan.Port, v *netlink.Veth, sound bool, local map[int][]vxlan.MAC) vxlan.Port {
	if !sound {
		return p
	}
	err := withNS(p.NetNS, func(c *conn) error {
		mac, addr, addr6, err := readEnd(c, p.IfName, v)
		if err == nil && slices.Contains(local[v.Index], vxlan.MACOf(mac)) {
			p.MAC, p.Addr, p.Addr6 = mac, addr, addr6
		}
		return err
	})
	if err != nil && !errors.Is(err, weft.ErrNotFound) {
		k.cfg.Log.Warn("task port cannot be read; it will be remade", weft.KeyTask, p.Task, weft.KeyErr, err)
	}
	return p
}

func (k *Kernel) readLeg(v *netlink.Veth, sound bool, local map[int][]vxlan.MAC) *vxlan.HostLeg {
	leg := &vxlan.HostLeg{}
	c, err := dial()
	if err != nil {
		k.cfg.Log.Warn("host leg cannot be read; it will be remade", weft.KeyErr, err)
		return leg
	}
	defer c.close()
	l, err := c.LinkByIndex(v.ParentIndex)
	if err != nil || l.Attrs().Alias != weft.LinkAlias(k.cfg.Node) {
		return leg
	}
	leg.Name = l.Attrs().Name
	mac, addr, addr6, err := readEnd(c, leg.Name, v)
	if err == nil && sound && slices.Contains(local[v.Index], vxlan.MACOf(mac)) {
		leg.MAC, leg.Addr, leg.Addr6 = mac, addr, addr6
	}
	return leg
}

// readEnd returns MAC and addresses of the other end of a veth, zero values if
// it is not as it should be.
func readEnd(c *conn, name string, peer *netlink.Veth) (mac []byte, addr, addr6 netip.Prefix, err error) {
	l, err := c.find(name)
	if err != nil || l == nil {
		return nil, addr, addr6, err
	}
	a := l.Attrs()
	if a.ParentIndex != peer.Index || a.Index != peer.ParentIndex || a.MTU != peer.MTU || a.Flags&unix.IFF_UP == 0 {
		return nil, addr, addr6, nil
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return c.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, addr, addr6, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	var found []netip.Prefix
	for _, x := range addrs {
		if p := prefixOf(x.IPNet); !p.Addr().IsLinkLocalUnicast() {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }) // IPv4 first
	switch {
	case len(found) == 1:
		addr = found[0]
	case len(found) == 2 && found[0].Addr().Is4() && found[1].Addr().Is6():
		addr, addr6 = found[0], found[1]
	case len(found) > 0:
		return nil, addr, addr6, nil // more than those we gave
	}
	return a.HardwareAddr, addr, addr6, nil
}

// withNS runs f with a connection into the namespace at path.
func withNS(path string, f func(*conn) error) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	return f(c)
}
