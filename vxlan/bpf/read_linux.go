package bpf

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
)

// snapshot is what one pass found, and the open objects to change it. Used by
// one goroutine.
type snapshot struct {
	e    *Engine
	o    *objects
	host *host
	nets map[uint32]netValue // kept up to date by the writer
	// dests, eps and ports are as they were read.
	dests map[macKey]destValue
	eps   map[epKey]epValue
	ports map[uint32]portValue
	// natives are as they were read, by the host's end of their port.
	natives map[uint32]map[addr16]nativeValue
	// near are the host's ends of ports and legs, by network.
	near map[uint32][]nearEnd
}

type nearEnd struct {
	owned
	link *netlink.Veth
}

func (e *Engine) look(ctx context.Context, o *objects) (*snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := &snapshot{e: e, o: o, near: make(map[uint32][]nearEnd)}
	var err error
	if s.nets, err = dump[uint32, netValue](o.maps[overlayMapNets]); err != nil {
		return nil, err
	}
	if s.dests, err = dump[macKey, destValue](o.maps[overlayMapMacs]); err != nil {
		return nil, err
	}
	if s.eps, err = dump[epKey, epValue](o.maps[overlayMapEps]); err != nil {
		return nil, err
	}
	if s.ports, err = dump[uint32, portValue](o.maps[overlayMapPorts]); err != nil {
		return nil, err
	}
	if s.natives, err = readNatives(o.maps[overlayMapNatives]); err != nil {
		return nil, err
	}
	if s.host, err = lookAtHost(); err != nil {
		return nil, err
	}
	for _, l := range s.host.byIndex {
		if v, ok := l.(*netlink.Veth); ok {
			if own, ok := parseAlias(e.cfg.Node, v.Alias); ok {
				s.near[own.vni] = append(s.near[own.vni], nearEnd{own, v})
			}
		}
	}
	return s, nil
}

func (s *snapshot) close() { s.host.close() }

// state is the snapshot in the words of package vxlan.
func (s *snapshot) state(ctx context.Context) (vxlan.State, error) {
	seen := map[uint32]bool{}
	for vni := range s.nets {
		seen[vni] = true
	}
	for vni := range s.near {
		seen[vni] = true
	}
	tables := map[uint32]*vxlan.Tables{}
	table := func(vni uint32) *vxlan.Tables {
		seen[vni] = true
		if tables[vni] == nil {
			tables[vni] = &vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]vxlan.Way{}}
		}
		return tables[vni]
	}
	for k, d := range s.dests {
		table(k.VNI).FDB[k.MAC] = s.wayOf(k, d)
	}
	for k, ep := range s.eps {
		table(k.VNI).Neigh[k.Addr.Addr()] = ep.MAC
	}
	st := vxlan.State{Networks: make(map[uint32]vxlan.Network, len(seen))}
	for _, vni := range slices.Sorted(maps.Keys(seen)) {
		if err := ctx.Err(); err != nil {
			return vxlan.State{}, err
		}
		st.Networks[vni] = s.network(vni, table(vni))
	}
	return st, nil
}

// wrong is the way of an entry that is not as Apply would write it.
func wrong() vxlan.Way { return vxlan.Way{VTEP: netip.IPv4Unspecified()} }

// way is where an entry sends.
func (d destValue) way() vxlan.Way {
	return vxlan.Way{VTEP: d.VTEP.Addr(), Native: d.Flags&wayNative != 0}
}

// wayOf is where an entry sends, by what the routes say now.
func (s *snapshot) wayOf(k macKey, d destValue) vxlan.Way {
	head, ok := s.nets[k.VNI]
	switch {
	case d.Kind == destVIP && d == (destValue{Kind: destVIP}):
		return vxlan.Way{}
	case ok && d.Kind.isRemote() && d == s.host.remote(head, d.way()):
		return d.way()
	}
	return wrong()
}

// remote is the entry of a hardware address on another node. Where the way leads
// by a router it stays native by name, and is used once it does not any more.
func (h *host) remote(n netValue, to vxlan.Way) destValue {
	d := destValue{Kind: destTunnel, MTU: n.MTU, UDP: n.UDP, VTEP: addrOf(to.VTEP)}
	if to.Native {
		d.Flags |= wayNative
	}
	if hop := h.hop(n.VTEP.Addr(), to.VTEP); hop.direct {
		d.Kind, d.IfIndex, d.NHFamily = destDirect, uint32(hop.ifindex), unix.AF_INET
		if hop.via.Is6() {
			d.NHFamily = unix.AF_INET6
		}
		if hop.via == to.VTEP {
			d.Flags |= wayOnLink
		}
		copy(d.NextHop[:], hop.via.AsSlice())
	}
	return d
}

func (s *snapshot) network(vni uint32, t *vxlan.Tables) vxlan.Network {
	head, known := s.nets[vni]
	n, ok := decodeNet(vni, head)
	switch {
	case !s.o.complete():
		n = vxlan.Network{VNI: vni, Fault: "programs or maps were gone"}
	case !known:
		n = vxlan.Network{VNI: vni, Fault: vxlan.FaultGone}
	case !ok:
		n = vxlan.Network{VNI: vni, Fault: "its entry was damaged"}
	}
	tunnel := 0
	if v := s.e.tunnel(s.host, head.UDP.v()); v != nil {
		tunnel = v.Index
	}
	if n.DeviceFault = s.deviceFault(head, tunnel); n.DeviceFault != "" {
		n.VTEP, n.Port = netip.Addr{}, 0
	}
	for _, near := range s.near[vni] {
		f := s.port(near, head, tunnel, t)
		if near.leg != "" {
			n.HostLeg = &vxlan.HostLeg{Name: near.leg, MAC: f.MAC, Addr: f.Addr, Addr6: f.Addr6, Fault: f.Fault}
			continue
		}
		p := near.port
		p.MAC, p.Addr, p.Addr6, p.Fault = f.MAC, f.Addr, f.Addr6, f.Fault
		n.Ports = append(n.Ports, p)
	}
	n.Peers, n.VIPs = vxlan.Observed(*t)
	slices.SortFunc(n.Ports, func(a, b vxlan.Port) int { return cmp.Compare(a.Task, b.Task) })
	return n
}

// deviceFault says why packets of the network cannot come in; "" = they can.
func (s *snapshot) deviceFault(head netValue, tunnel int) string {
	name := weft.TunnelName(head.UDP.v())
	switch dev := s.host.underlay(head.VTEP.Addr()); {
	case s.host.byName[name] == nil:
		return vxlan.FaultGone
	case tunnel == 0:
		return name + " was down or another device"
	case !s.e.isAttached(s.o, tunnelHook(tunnel)):
		return "the program of " + name + " was detached"
	case dev != 0 && !s.e.isAttached(s.o, underlayHook(dev, s.takesNative())):
		return "the program of " + s.host.byIndex[dev].Attrs().Name + " was detached"
	}
	return ""
}

// port checks a port from end to end and takes its own entries out of the
// network's tables: what is left there is of others, or stray. A port that is
// not as it should be has a Fault and nothing else.
func (s *snapshot) port(near nearEnd, head netValue, tunnel int, t *vxlan.Tables) linux.Far {
	l := near.link
	fault := func(format string, args ...any) linux.Far { return linux.Far{Fault: fmt.Sprintf(format, args...)} }
	val, ok := s.ports[uint32(l.Index)]
	if !ok || val != localPort(near.vni, head, val.MAC, tunnel) {
		return fault("the entry of %s was gone or damaged", l.Name)
	}
	if s.dests[macKey{VNI: near.vni, MAC: val.MAC}] != localDest(near, head) {
		return fault("the entry of %s was gone or damaged", val.MAC.HardwareAddr())
	}
	delete(t.FDB, val.MAC)
	if !s.hasNatives(near, head, val.MAC, t.Neigh) {
		return fault("the entries of %s for packets without encapsulation were gone or damaged", l.Name)
	}
	var addrs []netip.Addr
	for a, m := range t.Neigh {
		if m == val.MAC {
			addrs = append(addrs, a)
			delete(t.Neigh, a)
		}
	}
	switch {
	case l.Flags&unix.IFF_UP == 0:
		return fault("%s was down", l.Name)
	case l.MTU != int(head.MTU):
		return fault("%s had an MTU of %d instead of %d", l.Name, l.MTU, head.MTU)
	case !s.e.isAttached(s.o, portHook(l.Name, l.Index)):
		return fault("the program of %s was detached", l.Name)
	}
	name := near.leg
	if name == "" {
		name = near.port.IfName
	}
	f, err := linux.ReadFar(l, near.port.NetNS, name)
	if err != nil {
		return fault("%v", err)
	}
	has := (&vxlan.Port{Addr: f.Addr, Addr6: f.Addr6}).Addrs()
	switch {
	case f.Fault != "":
		return fault("%s", f.Fault)
	case !f.Addr.IsValid():
		return fault("%s had no address", name)
	case vxlan.MACOf(f.MAC) != val.MAC:
		return fault("%s had the hardware address %s", name, f.MAC)
	case len(addrs) != len(has):
		return fault("%d addresses were answered for instead of %d", len(addrs), len(has))
	}
	for _, p := range has {
		if !slices.Contains(addrs, p.Addr()) {
			return fault("%s had the address %s", name, p.Addr())
		}
	}
	return f
}

func localPort(vni uint32, head netValue, mac vxlan.MAC, tunnel int) portValue {
	return portValue{VNI: vni, UDP: head.UDP, MAC: mac, Tunnel: uint32(tunnel), VTEP: head.VTEP}
}

func localDest(near nearEnd, head netValue) destValue {
	d := destValue{Kind: destTask, MTU: head.MTU, IfIndex: uint32(near.link.Index), UDP: head.UDP, VTEP: head.VTEP}
	if near.leg != "" {
		d.Kind = destLeg
	}
	return d
}
