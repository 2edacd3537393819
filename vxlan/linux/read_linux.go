package linux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
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
// differs from every valid state, and with the reason in its Fault: a network
// without ID is half made, one without MTU needs its settings again, one
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
		n.Fault = "its namespace is gone" // a file without a mount
		return n, nil
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
	if !ok {
		n.Fault = weft.BridgeName(vni) + " is gone"
		return n, nil
	}
	id, subnets, ok := parseNetworkAlias(k.cfg.Node, br.Alias)
	if !ok {
		n.Fault = weft.BridgeName(vni) + " does not say which network it is"
		return n, nil
	}
	n.ID, n.Subnets, n.MTU = id, subnets, br.MTU
	if n.Fault = bridgeFault(br); n.Fault != "" {
		n.MTU = 0
	}
	tables := vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]vxlan.Way{}}
	tunnelIndex := 0
	if vx, ok := tunnel.(*netlink.Vxlan); ok {
		tunnelIndex = vx.Index
		if n.DeviceFault = tunnelFault(vx, vni, br.Index, flags[vx.Index]); n.DeviceFault == "" {
			n.VTEP, n.Port = addrOf(vx.SrcAddr), uint16(vx.Port)
		}
		if vx.MTU != br.MTU {
			n.MTU, n.Fault = 0, fmt.Sprintf("%s had MTU %d, %s %d", vx.Name, vx.MTU, br.Name, br.MTU)
		}
	} else if up, ok := uplink.(*netlink.Veth); ok && tunnel == nil {
		tunnelIndex = up.Index
		k.readUplink(&n, up, br, flags[up.Index])
	} else {
		n.DeviceFault = vxlan.FaultGone
	}
	local, err := readTables(h.conn, br.Index, tunnelIndex, &tables)
	if err != nil {
		return n, err
	}
	n.Peers, n.VIPs = vxlan.Observed(tables)
	for _, l := range links {
		if v, ok := l.(*netlink.Veth); ok && l != uplink {
			k.readVeth(&n, v, br, flags[v.Index], local)
		}
	}
	slices.SortFunc(n.Ports, func(a, b vxlan.Port) int { return cmpString(string(a.Task), string(b.Task)) })
	return n, nil
}

// readVeth files a veth of the hidden namespace as a task's port or the leg.
func (k *Kernel) readVeth(n *vxlan.Network, v *netlink.Veth, br *netlink.Bridge, flags portFlags, local map[int][]vxlan.MAC) {
	fault := portFault(v, br, flags)
	if fault == "" && v.MTU != br.MTU && n.MTU != 0 { // else every port is given its MTU anyway
		fault = fmt.Sprintf("%s had MTU %d, %s %d", v.Name, v.MTU, br.Name, br.MTU)
	}
	if v.Name == legPeer {
		n.HostLeg = k.readLeg(v, fault, local)
		return
	}
	if p, ok := parsePortAlias(k.cfg.Node, v.Alias); ok && v.Name == weft.PortVethName(p.Task, n.ID) {
		n.Ports = append(n.Ports, k.readPort(p, v, fault, local))
		return
	}
	// The rest of a crash between a veth and its alias: known by no task, so
	// it is named by its link and removed by Diff.
	n.Ports = append(n.Ports, vxlan.Port{Task: strayTask(v.Name), Fault: "a veth that no task has"})
}

// bridgeFault says what is set wrongly on a network's bridge; "" = nothing.
func bridgeFault(br *netlink.Bridge) string {
	switch {
	case br.Flags&unix.IFF_UP == 0:
		return vxlan.FaultDown
	case br.MulticastSnooping == nil || *br.MulticastSnooping:
		return br.Name + " had multicast snooping on"
	}
	return ""
}

// tunnelFault says what is wrong with a network's VXLAN device; "" = nothing.
func tunnelFault(vx *netlink.Vxlan, vni uint32, bridge int, flags portFlags) string {
	switch {
	case vx.VxlanId != int(vni) || vx.FlowBased || vx.Group != nil:
		return vx.Name + " was another device"
	case vx.Flags&unix.IFF_UP == 0:
		return vx.Name + " was down"
	case vx.MasterIndex != bridge:
		return vx.Name + " was not on the bridge"
	case vx.Learning:
		return vx.Name + " learnt addresses"
	case !flags.are(tunnelPort()):
		return fmt.Sprintf("the bridge port flags of %s were %+v", vx.Name, flags)
	}
	return ""
}

// portFault says what is wrong with the near end of a veth; "" = nothing.
func portFault(v *netlink.Veth, br *netlink.Bridge, flags portFlags) string {
	switch {
	case v.Flags&unix.IFF_UP == 0:
		return v.Name + " was down"
	case v.MasterIndex != br.Index:
		return v.Name + " was not on the bridge"
	case !flags.are(localPort()):
		return fmt.Sprintf("the bridge port flags of %s were %+v", v.Name, flags)
	}
	return ""
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
		t.FDB[m] = vxlan.Way{VTEP: onTunnel[m]}
	}
	for m := range onTunnel {
		if !onBridge[m] {
			t.FDB[m] = vxlan.Way{VTEP: netip.IPv4Unspecified()} // half an entry equals none that is wanted
		}
	}
	return local, nil
}

// readPort looks at the end inside the task's namespace.
func (k *Kernel) readPort(p vxlan.Port, v *netlink.Veth, fault string, local map[int][]vxlan.MAC) vxlan.Port {
	if p.Fault = fault; fault != "" {
		return p
	}
	err := withNS(p.NetNS, func(c *conn) error {
		e, err := readEnd(c, p.IfName, v.Attrs())
		p.Fault = cmp.Or(e.fault, entryFault(v, local, e))
		if err == nil && p.Fault == "" {
			p.MAC, p.Addr, p.Addr6 = e.mac, e.addr, e.addr6
		}
		return err
	})
	if err != nil && p.Fault == "" {
		p.Fault = err.Error()
	}
	if err != nil && !errors.Is(err, weft.ErrNotFound) {
		k.cfg.Log.Warn("task port cannot be read; it will be remade", weft.KeyTask, p.Task, weft.KeyErr, err)
	}
	return p
}

func (k *Kernel) readLeg(v *netlink.Veth, fault string, local map[int][]vxlan.MAC) *vxlan.HostLeg {
	leg := &vxlan.HostLeg{Fault: "its end in the host's namespace was gone"}
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
	e, err := readEnd(c, leg.Name, v.Attrs())
	if leg.Fault = cmp.Or(fault, e.fault, entryFault(v, local, e)); err != nil && leg.Fault == "" {
		leg.Fault = err.Error()
	}
	if leg.Fault == "" {
		leg.MAC, leg.Addr, leg.Addr6 = e.mac, e.addr, e.addr6
	}
	return leg
}

// entryFault reports that the bridge has no static entry that leads to the veth
// of e; "" = it has.
func entryFault(v *netlink.Veth, local map[int][]vxlan.MAC, e farEnd) string {
	if slices.Contains(local[v.Index], vxlan.MACOf(e.mac)) {
		return ""
	}
	return fmt.Sprintf("the bridge had no static entry of %s for %s", e.mac, v.Name)
}

// farEnd is the other end of a veth as it was found.
type farEnd struct {
	mac         net.HardwareAddr
	addr, addr6 netip.Prefix
	fault       string // why it is not as it should be; "" = it is
}

// readEnd reads the other end of a pair.
func readEnd(c *conn, name string, peer *netlink.LinkAttrs) (farEnd, error) {
	l, err := c.find(name)
	if err != nil {
		return farEnd{}, err
	}
	if l == nil {
		return farEnd{fault: name + " was gone"}, nil
	}
	a := l.Attrs()
	e := farEnd{mac: a.HardwareAddr}
	switch {
	case a.ParentIndex != peer.Index || a.Index != peer.ParentIndex:
		e.fault = name + " was another link"
	case a.MTU != peer.MTU:
		e.fault = fmt.Sprintf("%s had MTU %d, %s %d", name, a.MTU, peer.Name, peer.MTU)
	case a.Flags&unix.IFF_UP == 0:
		e.fault = name + " was down"
	}
	if e.fault != "" {
		return e, nil
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return c.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return e, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	var found []netip.Prefix
	for _, x := range addrs {
		if p := prefixOf(x.IPNet); !p.Addr().IsLinkLocalUnicast() {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }) // IPv4 first
	switch {
	case len(found) == 0:
		e.fault = name + " had no address"
	case len(found) == 1:
		e.addr = found[0]
	case len(found) == 2 && found[0].Addr().Is4() && found[1].Addr().Is6():
		e.addr, e.addr6 = found[0], found[1]
	default:
		e.fault = fmt.Sprintf("%s had %v, more addresses than it was given", name, found)
	}
	return e, nil
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
