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
	// locals are the hardware addresses that lead to each link of the host.
	locals map[uint32][]macKey
	// near are the host's ends of ports and legs, by network.
	near map[uint32][]nearEnd
	// via attaches programs; other is the way in which none may be.
	via, other attacher
	// detached are the underlay devices whose program was gone, and whether
	// that is a network's DeviceFault.
	detached map[int]bool
}

type nearEnd struct {
	owned
	link *netlink.Veth
}

func (e *Engine) look(ctx context.Context, b build, o *objects) (*snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := &snapshot{e: e, o: o, detached: make(map[int]bool), near: make(map[uint32][]nearEnd)}
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
	s.via, s.other = s.attachers(b.attach)
	s.locals = make(map[uint32][]macKey)
	for k, d := range s.dests {
		if d.Kind.isLocal() {
			s.locals[d.IfIndex] = append(s.locals[d.IfIndex], k)
		}
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
		if !s.isOrphan(k) {
			table(k.VNI).FDB[k.MAC] = s.vtepOf(k, d)
		}
	}
	for k, ep := range s.eps {
		if !s.isOrphan(macKey{VNI: k.VNI, MAC: ep.MAC}) {
			table(k.VNI).Neigh[k.Addr.Addr()] = ep.MAC
		}
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

// isOrphan reports whether a hardware address led to a link that is gone: a task
// may take its port along, and its entries are no one's damage. Sweep removes
// them.
func (s *snapshot) isOrphan(k macKey) bool {
	d, ok := s.dests[k]
	return ok && d.Kind.isLocal() && s.host.byIndex[int(d.IfIndex)] == nil
}

// wrong is the VTEP of an entry that is not as Apply would write it.
func wrong() netip.Addr { return netip.IPv6Unspecified() }

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

// reroute writes the entries anew that were right by the routes of the last pass:
// a route that has changed is nobody's damage.
func (s *snapshot) reroute(before map[[2]netip.Addr]hop) error {
	for k, d := range s.dests {
		head, ok := s.nets[k.VNI]
		if !ok || !d.Kind.isRemote() {
			continue
		}
		vtep := d.VTEP.Addr()
		old, known := before[[2]netip.Addr{head.VTEP.Addr(), vtep}]
		if now := s.host.remote(head, vtep); known && d != now && d == remoteBy(head, vtep, old) {
			if err := s.o.maps[overlayMapMacs].Put(k, now); err != nil {
				return fmt.Errorf("write map %s: %w", overlayMapMacs, err)
			}
			s.dests[k] = now
		}
	}
	return nil
}

// remote is the entry of a hardware address behind vtep.
func (h *host) remote(n netValue, vtep netip.Addr) destValue {
	return remoteBy(n, vtep, h.hop(n.VTEP.Addr(), vtep))
}

func remoteBy(n netValue, vtep netip.Addr, way hop) destValue {
	d := destValue{Kind: destTunnel, MTU: n.MTU, UDP: n.UDP, VTEP: addrOf(vtep)}
	if way.direct {
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
	switch {
	case !s.o.complete() || !s.o.isHooked:
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
	if n.Device, n.DeviceFault = s.deviceFault(head, tunnel); n.DeviceFault != "" {
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

// deviceFault says at which device packets of the network cannot come in, and
// why; "" = they can. Of two such devices it names the tunnel, and sweep counts the
// other one.
func (s *snapshot) deviceFault(head netValue, tunnel int) (device, fault string) {
	dev := s.host.underlay(head.VTEP.Addr())
	under := ""
	if dev != 0 && !s.via.isAttached(underlayHook(dev)) {
		under = s.host.byIndex[dev].Attrs().Name
		if _, known := s.detached[dev]; !known {
			s.detached[dev] = false
		}
	}
	name := weft.TunnelName(head.UDP.v())
	switch {
	case s.host.byName[name] == nil:
		return name, vxlan.FaultGone
	case tunnel == 0:
		return name, name + " was down or another device"
	case !s.via.isAttached(tunnelHook(tunnel)):
		return name, detachedReason(name)
	case under != "":
		s.detached[dev] = true
		return under, detachedReason(under)
	}
	return "", ""
}

func detachedReason(device string) string { return "the program of " + device + " was detached" }

// port checks a port from end to end and takes its own entries out of the
// network's tables: what is left there is of others, or stray. A port that is
// not as it should be has a Fault and nothing else.
func (s *snapshot) port(near nearEnd, head netValue, tunnel int, t *vxlan.Tables) linux.Far {
	l := near.link
	fault := func(format string, args ...any) linux.Far { return linux.Far{Fault: fmt.Sprintf(format, args...)} }
	name := near.leg
	if name == "" {
		name = near.port.IfName
	}
	f, err := linux.ReadFar(l, near.port.NetNS, name)
	val, ok := s.ports[uint32(l.Index)]
	addrs := s.takeOut(near, val.MAC, vxlan.MACOf(f.MAC), t)
	if tunnel == 0 { // which is the device's fault: its repair renews the entry
		tunnel = int(val.Tunnel)
	}
	if !ok || val != localPort(near.vni, head, val.MAC, tunnel) {
		return fault("the entry of %s was gone or damaged", l.Name)
	}
	if s.dests[macKey{VNI: near.vni, MAC: val.MAC}] != localDest(near, head) {
		return fault("the entry of %s was gone or damaged", val.MAC.HardwareAddr())
	}
	switch {
	case l.Flags&unix.IFF_UP == 0:
		return fault("%s was down", l.Name)
	case l.MTU != int(head.MTU):
		return fault("%s had an MTU of %d instead of %d", l.Name, l.MTU, head.MTU)
	case !s.via.isAttached(portHook(l.Name, l.Index)):
		return fault("the program of %s was detached", l.Name)
	}
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

// takeOut removes a port's entries from the tables: those of its hardware address
// if that leads to it, else those of all that do, or of its far end's where none
// does. It returns the addresses that are answered with them.
func (s *snapshot) takeOut(near nearEnd, mac, far vxlan.MAC, t *vxlan.Tables) []netip.Addr {
	var macs []vxlan.MAC
	for _, k := range s.locals[uint32(near.link.Index)] {
		if k.VNI == near.vni {
			macs = append(macs, k.MAC)
		}
	}
	switch {
	case slices.Contains(macs, mac):
		macs = []vxlan.MAC{mac}
	case len(macs) == 0:
		macs = append(macs, far)
	}
	var addrs []netip.Addr
	for _, mac := range macs {
		delete(t.FDB, mac)
		for a, m := range t.Neigh {
			if m == mac {
				addrs = append(addrs, a)
				delete(t.Neigh, a)
			}
		}
	}
	return addrs
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
