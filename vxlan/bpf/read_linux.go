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
	// natives are as they were read, by the host's end of their port.
	natives map[uint32]map[addr16]nativeValue
	// near are the host's ends of ports and legs, by network.
	near map[uint32][]nearEnd
	// via attaches programs; other is the way in which none may be.
	via, other attacher
	// newPorts is what ports are made of that are not there.
	newPorts string
	// detached are the underlay devices whose program was gone, and whether
	// that is a network's DeviceFault.
	detached map[int]bool
	// uplinks are those of encrypted networks; kept up to date by the writer.
	uplinks map[uint32]*netlink.Veth
}

type nearEnd struct {
	owned
	link netlink.Link // a veth or a netkit
}

func (e *Engine) look(ctx context.Context, b build, o *objects) (*snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := &snapshot{e: e, o: o, detached: make(map[int]bool), near: make(map[uint32][]nearEnd), uplinks: make(map[uint32]*netlink.Veth)}
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
	s.via, s.other = s.attachers(b.attach)
	s.newPorts = b.ports
	s.locals = make(map[uint32][]macKey)
	for k, d := range s.dests {
		if d.Kind.isLocal() {
			s.locals[d.IfIndex] = append(s.locals[d.IfIndex], k)
		}
	}
	for _, l := range s.host.byIndex {
		v, isVeth := l.(*netlink.Veth)
		if own, ok := parseAlias(e.cfg.Node, l.Attrs().Alias); ok && (isVeth || linux.IsNetkit(l)) {
			switch {
			case !own.isUplink:
				s.near[own.vni] = append(s.near[own.vni], nearEnd{own, l})
			case isVeth && v.Name == weft.UplinkName(own.vni):
				s.uplinks[own.vni] = v
			}
		}
	}
	return s, nil
}

func (s *snapshot) close() { s.host.close() }

// state is the snapshot in the words of package vxlan. Those have none for the
// uplink of an encrypted network and for a service, of which each is nowhere in
// particular: an entry that is the one and should be the other in a network of
// want is wrong. Without want each will do.
func (s *snapshot) state(ctx context.Context, want vxlan.State) (vxlan.State, error) {
	seen := map[uint32]bool{}
	for vni := range s.nets {
		seen[vni] = true
	}
	for vni := range s.near {
		seen[vni] = true
	}
	for vni := range s.uplinks {
		seen[vni] = true
	}
	services := map[macKey]bool{}
	for vni, n := range want.Networks {
		for _, v := range n.VIPs {
			services[macKey{VNI: vni, MAC: vxlan.MACOf(v.MAC)}] = n.Encrypted
		}
	}
	tables := map[uint32]*vxlan.Tables{}
	table := func(vni uint32) *vxlan.Tables {
		seen[vni] = true
		if tables[vni] == nil {
			tables[vni] = &vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]vxlan.Way{}, MTU: map[vxlan.MAC]int{}}
		}
		return tables[vni]
	}
	for k, d := range s.dests {
		if s.isOrphan(k) {
			continue
		}
		way := s.wayOf(k, d)
		if _, ok := want.Networks[k.VNI]; ok && s.nets[k.VNI].isEncrypted() && services[k] != (d.Kind == destVIP) {
			way = wrong()
		}
		table(k.VNI).FDB[k.MAC] = way
		if d.Kind.isRemote() && d.MTU != s.nets[k.VNI].MTU {
			table(k.VNI).MTU[k.MAC] = int(d.MTU)
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
// them. What led to an uplink is of endpoints elsewhere, and still theirs.
func (s *snapshot) isOrphan(k macKey) bool {
	d, ok := s.dests[k]
	return ok && d.Kind.isLocal() && s.host.byIndex[int(d.IfIndex)] == nil && s.ports[d.IfIndex] != uplinkPort(k.VNI)
}

// wrong is the way of an entry that is not as Apply would write it.
func wrong() vxlan.Way { return vxlan.Way{VTEP: netip.IPv6Unspecified()} }

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
	case ok && head.isEncrypted():
		if d == s.uplinkDest(k.VNI) {
			return vxlan.Way{}
		}
	case ok && d.Kind.isRemote() && d.MTU != 0 && d == s.host.remote(head, d.way(), d.MTU):
		return d.way()
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
		old, known := before[[2]netip.Addr{head.VTEP.Addr(), d.VTEP.Addr()}]
		if now := s.host.remote(head, d.way(), d.MTU); known && d != now && d == remoteBy(head, d.way(), d.MTU, old) {
			if err := s.o.maps[overlayMapMacs].Put(k, now); err != nil {
				return fmt.Errorf("write map %s: %w", overlayMapMacs, err)
			}
			s.dests[k] = now
		}
	}
	return nil
}

// remote is the entry of a hardware address on another node, by a way of mtu bytes;
// 0 and what is wider than the network are the network's. Where the way leads by
// a router it stays native by name, and is used once it does not any more.
func (h *host) remote(n netValue, to vxlan.Way, mtu uint16) destValue {
	return remoteBy(n, to, mtu, h.hop(n.VTEP.Addr(), to.VTEP))
}

func remoteBy(n netValue, to vxlan.Way, mtu uint16, hop hop) destValue {
	if mtu == 0 || mtu > n.MTU {
		mtu = n.MTU
	}
	d := destValue{Kind: destTunnel, MTU: mtu, UDP: n.UDP, VTEP: addrOf(to.VTEP)}
	if to.Native {
		d.Flags |= wayNative
	}
	if hop.direct {
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
	case !s.o.complete() || !s.o.isHooked:
		n = vxlan.Network{VNI: vni, Fault: "programs or maps were gone"}
	case !known:
		n = vxlan.Network{VNI: vni, Fault: vxlan.FaultGone}
	case !ok:
		n = vxlan.Network{VNI: vni, Fault: "its entry was damaged"}
	}
	tunnel := 0
	if v := s.e.tunnel(s.host, head.UDP.v()); v != nil && !head.isEncrypted() {
		tunnel = v.Index
	}
	if n.Device, n.DeviceFault = s.deviceFault(vni, head, tunnel); n.DeviceFault != "" {
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
	n.Ways = true
	slices.SortFunc(n.Ports, func(a, b vxlan.Port) int { return cmp.Compare(a.Task, b.Task) })
	return n
}

// deviceFault says at which device packets of the network cannot come in, and
// why; "" = they can. Of two such devices it names the tunnel or the uplink, and
// sweep counts the other one.
func (s *snapshot) deviceFault(vni uint32, head netValue, tunnel int) (device, fault string) {
	dev := s.host.underlay(head.VTEP.Addr())
	under := ""
	if dev != 0 && !s.via.isAttached(underlayHook(dev, s.takesNative())) {
		under = s.host.byIndex[dev].Attrs().Name
		if _, known := s.detached[dev]; !known {
			s.detached[dev] = false
		}
	}
	if head.isEncrypted() {
		device, fault = weft.UplinkName(vni), s.uplinkFault(vni, head)
	} else {
		device = weft.TunnelName(head.UDP.v())
		fault = s.tunnelFault(device, tunnel)
	}
	switch {
	case fault != "":
		return device, fault
	case under != "":
		s.detached[dev] = true
		return under, detachedReason(under)
	}
	return "", ""
}

// tunnelFault says what is wrong with the VXLAN device of a UDP port.
func (s *snapshot) tunnelFault(name string, tunnel int) string {
	switch {
	case s.host.byName[name] == nil:
		return vxlan.FaultGone
	case tunnel == 0:
		return name + " was down or another device"
	case !s.via.isAttached(tunnelHook(tunnel)):
		return detachedReason(name)
	}
	return ""
}

func detachedReason(device string) string { return "the program of " + device + " was detached" }

// port checks a port from end to end and takes its own entries out of the
// network's tables: what is left there is of others, or stray. A port that is
// not as it should be has a Fault and nothing else.
func (s *snapshot) port(near nearEnd, head netValue, tunnel int, t *vxlan.Tables) linux.Far {
	l := near.link.Attrs()
	fault := func(format string, args ...any) linux.Far { return linux.Far{Fault: fmt.Sprintf(format, args...)} }
	name := near.leg
	if name == "" {
		name = near.port.IfName
	}
	f, err := linux.ReadFar(near.link, near.port.NetNS, name)
	val, ok := s.ports[uint32(l.Index)]
	addrs := s.takeOut(near, val.MAC, vxlan.MACOf(f.MAC), t)
	if tunnel == 0 { // which is the device's fault: its repair renews the entry (an encrypted network has none)
		tunnel = int(val.Tunnel)
	}
	if !ok || val != localPort(near.vni, head, val.MAC, tunnel) {
		return fault("the entry of %s was gone or damaged", l.Name)
	}
	if s.dests[macKey{VNI: near.vni, MAC: val.MAC}] != localDest(near.owned, l.Index, head) {
		return fault("the entry of %s was gone or damaged", val.MAC.HardwareAddr())
	}
	if !s.hasNatives(near, head, val.MAC, addrs) {
		return fault("the entries of %s for packets without encapsulation were gone or damaged", l.Name)
	}
	switch {
	case l.Flags&unix.IFF_UP == 0:
		return fault("%s was down", l.Name)
	case l.MTU != int(head.MTU):
		return fault("%s had an MTU of %d instead of %d", l.Name, l.MTU, head.MTU)
	case linux.PairFault(near.link) != "":
		return fault("%s", linux.PairFault(near.link))
	case !s.via.isAttached(portHook(near.link)):
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
	for _, k := range s.locals[uint32(near.link.Attrs().Index)] {
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

// localPort is the entry of a port, localDest that of its hardware address.
func localPort(vni uint32, head netValue, mac vxlan.MAC, tunnel int) portValue {
	if head.isEncrypted() {
		return portValue{VNI: vni, MAC: mac}
	}
	return portValue{VNI: vni, UDP: head.UDP, MAC: mac, Tunnel: uint32(tunnel), VTEP: head.VTEP}
}

func localDest(own owned, index int, head netValue) destValue {
	d := destValue{Kind: destTask, MTU: head.MTU, IfIndex: uint32(index), UDP: head.UDP, VTEP: head.VTEP}
	if own.leg != "" {
		d.Kind = destLeg
	}
	if head.isEncrypted() {
		d.Kind, d.UDP, d.VTEP = d.Kind+destSealedTask-destTask, be16{}, addr16{}
	}
	return d
}
