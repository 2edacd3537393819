package bpf

import (
	"context"
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
			tables[vni] = &vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]netip.Addr{}}
		}
		return tables[vni]
	}
	for k, d := range s.dests {
		table(k.VNI).FDB[k.MAC] = s.vtepOf(k, d)
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

// wrong is the VTEP of an entry that is not as Apply would write it.
func wrong() netip.Addr { return netip.IPv4Unspecified() }

// vtepOf is where an entry sends, by what the routes say now.
func (s *snapshot) vtepOf(k macKey, d destValue) netip.Addr {
	head, ok := s.nets[k.VNI]
	switch {
	case d.Kind == destVIP && d == (destValue{Kind: destVIP}):
		return netip.Addr{}
	case ok && d.Kind.isRemote() && d == s.host.remote(head, d.VTEP.Addr()):
		return d.VTEP.Addr()
	}
	return wrong()
}

// remote is the entry of a hardware address behind vtep.
func (h *host) remote(n netValue, vtep netip.Addr) destValue {
	d := destValue{Kind: destTunnel, MTU: n.MTU, UDP: n.UDP, VTEP: addrOf(vtep)}
	if way := h.hop(n.VTEP.Addr(), vtep); way.direct {
		d.Kind, d.IfIndex, d.NHFamily = destDirect, uint32(way.ifindex), unix.AF_INET
		if way.via.Is6() {
			d.NHFamily = unix.AF_INET6
		}
		copy(d.NextHop[:], way.via.AsSlice())
	}
	return d
}

func (s *snapshot) network(vni uint32, t *vxlan.Tables) vxlan.Network {
	head, known := s.nets[vni]
	n, ok := decodeNet(vni, head)
	if !known || !ok || !s.o.complete() {
		n = vxlan.Network{VNI: vni} // half made
	}
	tunnel := 0
	if v := s.e.tunnel(s.host, head.UDP.v()); v != nil {
		tunnel = v.Index
	}
	if !s.carries(head, tunnel) {
		n.VTEP, n.Port = netip.Addr{}, 0
	}
	for _, near := range s.near[vni] {
		f, sound := s.port(near, head, tunnel, t)
		if near.leg != "" {
			n.HostLeg = &vxlan.HostLeg{Name: near.leg}
			if sound {
				n.HostLeg.MAC, n.HostLeg.Addr, n.HostLeg.Addr6 = f.MAC, f.Addr, f.Addr6
			}
			continue
		}
		p := near.port
		if sound {
			p.MAC, p.Addr, p.Addr6 = f.MAC, f.Addr, f.Addr6
		}
		n.Ports = append(n.Ports, p)
	}
	n.Peers, n.VIPs = vxlan.Observed(*t)
	slices.SortFunc(n.Ports, func(a, b vxlan.Port) int { return compareIDs(a.Task, b.Task) })
	return n
}

func compareIDs(a, b weft.ID) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// carries reports whether packets of the network can come in.
func (s *snapshot) carries(head netValue, tunnel int) bool {
	if tunnel == 0 || !s.e.isAttached(s.o, tunnelHook(tunnel)) {
		return false
	}
	dev := s.host.underlay(head.VTEP.Addr())
	return dev == 0 || s.e.isAttached(s.o, underlayHook(dev))
}

// port checks a port from end to end and takes its own entries out of the
// network's tables: what is left there is of others, or stray.
func (s *snapshot) port(near nearEnd, head netValue, tunnel int, t *vxlan.Tables) (linux.Far, bool) {
	l := near.link
	val, ok := s.ports[uint32(l.Index)]
	if !ok || val != localPort(near.vni, head, val.MAC, tunnel) {
		return linux.Far{}, false
	}
	k := macKey{VNI: near.vni, MAC: val.MAC}
	if s.dests[k] != localDest(near, head) {
		return linux.Far{}, false
	}
	delete(t.FDB, val.MAC)
	var addrs []netip.Addr
	for a, m := range t.Neigh {
		if m == val.MAC {
			addrs = append(addrs, a)
			delete(t.Neigh, a)
		}
	}
	if l.Flags&unix.IFF_UP == 0 || l.MTU != int(head.MTU) || !s.e.isAttached(s.o, portHook(l.Name, l.Index)) {
		return linux.Far{}, false
	}
	name := near.leg
	if name == "" {
		name = near.port.IfName
	}
	f, err := linux.ReadFar(l, near.port.NetNS, name)
	if err != nil {
		s.e.cfg.Log.Debug("far end of a port cannot be read; it will be remade", "link", l.Name, weft.KeyErr, err)
		return linux.Far{}, false
	}
	has := (&vxlan.Port{Addr: f.Addr, Addr6: f.Addr6}).Addrs()
	if !f.Addr.IsValid() || vxlan.MACOf(f.MAC) != val.MAC || len(addrs) != len(has) {
		return linux.Far{}, false
	}
	for _, p := range has {
		if !slices.Contains(addrs, p.Addr()) {
			return linux.Far{}, false
		}
	}
	return f, true
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
