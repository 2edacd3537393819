package vxlan

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// OpKind is what one operation does. The order of the constants is the order
// in which Diff returns operations: what is added first, what is removed last.
type OpKind uint8

const (
	// OpDelStale removes a network whose VNI now belongs to another one. It
	// comes first because both have the same kernel names.
	OpDelStale OpKind = iota
	// OpAddNetwork makes the namespace, the bridge and the VXLAN device.
	OpAddNetwork
	// OpSetNetwork changes MTU, subnets or Native in place.
	OpSetNetwork
	// OpSetDevice repairs or remakes the VXLAN device; its forwarding
	// entries follow.
	OpSetDevice
	// OpSetFDB makes frames to MAC go to VTEP, by a way of MTU bytes; without
	// a VTEP they are answered for but go nowhere (a service address).
	OpSetFDB
	// OpSetNeigh makes the bridge answer for Addr with MAC.
	OpSetNeigh
	// OpSetPort makes or repairs a task's port.
	OpSetPort
	// OpSetHostLeg makes or repairs the host's leg.
	OpSetHostLeg
	// OpDelHostLeg removes the host's leg.
	OpDelHostLeg
	// OpDelPort removes a task's port.
	OpDelPort
	// OpDelNeigh removes the answer for Addr.
	OpDelNeigh
	// OpDelFDB removes the forwarding entry of MAC.
	OpDelFDB
	// OpDelNetwork removes devices and namespace.
	OpDelNetwork
)

var opNames = [...]string{
	"del stale network", "add network", "set network", "set device", "set fdb", "set neigh", "set port",
	"set host leg", "del host leg", "del port", "del neigh", "del fdb", "del network",
}

// String names the kind for messages: "add network", "set fdb".
func (k OpKind) String() string {
	if int(k) < len(opNames) {
		return opNames[k]
	}
	return fmt.Sprintf("op(%d)", uint8(k))
}

// Op is one change. Only the fields that its kind speaks of are set.
type Op struct {
	Kind    OpKind
	VNI     uint32
	Network *Network // OpAddNetwork, OpSetNetwork, OpSetDevice: without ports, peers, VIPs and leg
	Port    *Port    // OpSetPort, OpDelPort
	HostLeg *HostLeg // OpSetHostLeg, OpDelHostLeg
	Addr    netip.Addr
	MAC     net.HardwareAddr
	VTEP    netip.Addr
	Native  bool // of OpSetFDB: see Peer.Native
	MTU     int  // OpSetFDB, where narrower than the network's; else 0
}

// String is one line for errors and logs.
func (o Op) String() string {
	s := fmt.Sprintf("%s of network %d", o.Kind, o.VNI)
	switch o.Kind {
	case OpSetPort, OpDelPort:
		s = fmt.Sprintf("%s %s %s of task %s of network %d", o.Kind, o.Port.IfName, o.Port.Addr, o.Port.Task.Short(), o.VNI)
	case OpSetHostLeg, OpDelHostLeg:
		s = fmt.Sprintf("%s %s of network %d", o.Kind, o.HostLeg.Name, o.VNI)
	case OpSetNeigh, OpDelNeigh:
		s = fmt.Sprintf("%s %s %s of network %d", o.Kind, o.Addr, o.MAC, o.VNI)
	case OpSetFDB, OpDelFDB:
		s = fmt.Sprintf("%s %s to %s of network %d", o.Kind, o.MAC, wayText(Way{o.VTEP, o.Native}, o.MTU), o.VNI)
	case OpAddNetwork, OpDelNetwork, OpDelStale:
		s = fmt.Sprintf("%s %d", o.Kind, o.VNI)
	}
	return s
}

func wayText(w Way, mtu int) string {
	if mtu == 0 {
		return w.String()
	}
	return fmt.Sprintf("%s (MTU %d)", w, mtu)
}

// Way is where frames to a hardware address go.
type Way struct {
	VTEP   netip.Addr // invalid = nowhere
	Native bool       // see Peer.Native
}

// String is the way for messages.
func (w Way) String() string {
	switch {
	case !w.VTEP.IsValid():
		return "nowhere"
	case w.Native:
		return w.VTEP.String() + " without encapsulation"
	}
	return w.VTEP.String()
}

// Tables are the two tables of one network as the kernel keeps them. Peers and
// VIPs are a view of both; Derive and Observed turn one into the other.
type Tables struct {
	// Neigh answers ARP and neighbour discovery: address to MAC.
	Neigh map[netip.Addr]MAC
	// FDB forwards: MAC to VTEP, or to nowhere (the zero Way).
	FDB map[MAC]Way
	// MTU of the way to a MAC, in bytes, where it is narrower than the
	// network's. Not every engine keeps it (Network.Ways).
	MTU map[MAC]int
}

// MAC is a 48-bit hardware address as a map key.
type MAC [6]byte

// MACOf copies a hardware address. One that has not 6 bytes is the zero MAC,
// which Validate refuses.
func MACOf(a net.HardwareAddr) MAC {
	var m MAC
	if len(a) == len(m) {
		copy(m[:], a)
	}
	return m
}

// HardwareAddr is a fresh copy.
func (m MAC) HardwareAddr() net.HardwareAddr { return append(net.HardwareAddr(nil), m[:]...) }

// Derive computes the tables that a network needs. A Peer without an address
// is a forwarding entry alone, one without a VTEP a neighbour alone: that is
// how half-made entries of a kernel are expressed.
//
// On an encrypted network the router answers for every peer, and a peer's own
// MAC leads to the router, too: a balancer writes it into packets to a service
// address, and the router tells by it which peer is meant. An entry that was read
// as a wrong one (at the unspecified address) stays that.
func Derive(n Network) Tables {
	t := Tables{Neigh: make(map[netip.Addr]MAC, len(n.Peers)+len(n.VIPs)), FDB: make(map[MAC]Way, len(n.Peers)+len(n.VIPs))}
	for _, v := range n.VIPs {
		if v.Addr.IsValid() {
			t.Neigh[v.Addr.Unmap()] = MACOf(v.MAC)
		}
		t.FDB[MACOf(v.MAC)] = Way{}
	}
	for _, p := range n.Peers {
		if n.Encrypted && p.VTEP.IsValid() && !p.VTEP.IsUnspecified() {
			t.FDB[MACOf(weft.RouterMAC(n.VNI))] = Way{}
			t.FDB[MACOf(p.MAC)] = Way{}
			if p.Addr.IsValid() {
				t.Neigh[p.Addr.Unmap()] = MACOf(weft.RouterMAC(n.VNI))
			}
			continue
		}
		if p.Addr.IsValid() {
			t.Neigh[p.Addr.Unmap()] = MACOf(p.MAC)
		}
		if p.VTEP.IsValid() {
			twin, ok := t.FDB[MACOf(p.MAC)]
			t.FDB[MACOf(p.MAC)] = Way{p.VTEP.Unmap(), p.Native && (!ok || twin.Native)}
			t.narrow(MACOf(p.MAC), p.MTU, n.MTU)
		}
	}
	return t
}

// narrow files the MTU of a way. Of two for one MAC the smaller one counts.
func (t *Tables) narrow(mac MAC, mtu, network int) {
	if old, ok := t.MTU[mac]; mtu == 0 || mtu >= network || ok && old <= mtu {
		return
	}
	if t.MTU == nil {
		t.MTU = make(map[MAC]int)
	}
	t.MTU[mac] = mtu
}

// Observed is the opposite of Derive: the peers and VIPs that tables amount
// to, sorted. Derive(Observed(t)) equals t for every t.
func Observed(t Tables) (peers []Peer, vips []VIP) {
	named := make(map[MAC]bool, len(t.Neigh))
	for addr, mac := range t.Neigh {
		named[mac] = true
		way, ok := t.FDB[mac]
		if ok && !way.VTEP.IsValid() {
			vips = append(vips, VIP{Addr: addr, MAC: mac.HardwareAddr()})
			continue
		}
		peers = append(peers, Peer{Addr: addr, MAC: mac.HardwareAddr(), VTEP: way.VTEP, Native: way.Native, MTU: t.MTU[mac]})
	}
	for mac, way := range t.FDB {
		switch {
		case named[mac]:
		case way.VTEP.IsValid():
			peers = append(peers, Peer{MAC: mac.HardwareAddr(), VTEP: way.VTEP, Native: way.Native, MTU: t.MTU[mac]})
		default:
			vips = append(vips, VIP{MAC: mac.HardwareAddr()})
		}
	}
	slices.SortFunc(peers, comparePeers)
	slices.SortFunc(vips, compareVIPs)
	return peers, vips
}

// Diff returns the least operations that make have into want, additions before
// removals, networks by VNI. It is empty exactly if both need the same kernel
// objects. Neither argument is changed; want should be valid.
func Diff(have, want State) []Op {
	var ops []Op
	for vni, w := range want.Networks {
		h, ok := have.Networks[vni]
		switch {
		case !ok:
			ops = append(ops, Op{Kind: OpAddNetwork, VNI: vni, Network: header(w)})
			h = bare(w)
		case h.ID != w.ID:
			ops = append(ops, Op{Kind: OpDelStale, VNI: vni}, Op{Kind: OpAddNetwork, VNI: vni, Network: header(w)})
			h = bare(w)
		}
		ops = append(ops, diffNetwork(h, w)...)
	}
	for vni := range have.Networks {
		if _, ok := want.Networks[vni]; !ok {
			ops = append(ops, Op{Kind: OpDelNetwork, VNI: vni})
		}
	}
	slices.SortFunc(ops, compareOps)
	return ops
}

// bare is the network as OpAddNetwork makes it.
func bare(w Network) Network {
	n := *header(w)
	if n.Encrypted {
		n.VTEP = netip.IPv4Unspecified()
	}
	return n
}

// sameDevice reports whether the device that leads to other nodes is as wanted.
// The uplink of an encrypted network has no address: a sound one is read as one
// with the unspecified address, a broken one without.
func sameDevice(h, w Network) bool {
	if h.Encrypted || w.Encrypted {
		return h.Encrypted == w.Encrypted && h.VTEP.IsValid()
	}
	return h.VTEP.Unmap() == w.VTEP.Unmap() && h.Port == w.Port
}

func diffNetwork(h, w Network) []Op {
	var ops []Op
	remade := !sameDevice(h, w)
	if h.MTU != w.MTU || h.Native != w.Native || !slices.Equal(sortedPrefixes(h.Subnets), sortedPrefixes(w.Subnets)) {
		ops = append(ops, Op{Kind: OpSetNetwork, VNI: w.VNI, Network: header(w)})
	}
	ht, wt := Derive(h), Derive(w)
	if remade {
		ops = append(ops, Op{Kind: OpSetDevice, VNI: w.VNI, Network: header(w)})
		ht.FDB = nil // it went with the device
	}
	for mac, way := range wt.FDB {
		if old, ok := ht.FDB[mac]; !ok || old != way || h.Ways && ht.MTU[mac] != wt.MTU[mac] {
			ops = append(ops, Op{Kind: OpSetFDB, VNI: w.VNI, MAC: mac.HardwareAddr(), VTEP: way.VTEP, Native: way.Native, MTU: wt.MTU[mac]})
		}
	}
	for mac, way := range ht.FDB {
		if _, ok := wt.FDB[mac]; !ok {
			ops = append(ops, Op{Kind: OpDelFDB, VNI: w.VNI, MAC: mac.HardwareAddr(), VTEP: way.VTEP, Native: way.Native})
		}
	}
	for addr, mac := range wt.Neigh {
		if old, ok := ht.Neigh[addr]; !ok || old != mac {
			ops = append(ops, Op{Kind: OpSetNeigh, VNI: w.VNI, Addr: addr, MAC: mac.HardwareAddr()})
		}
	}
	for addr, mac := range ht.Neigh {
		if _, ok := wt.Neigh[addr]; !ok {
			ops = append(ops, Op{Kind: OpDelNeigh, VNI: w.VNI, Addr: addr, MAC: mac.HardwareAddr()})
		}
	}
	return append(ops, diffPorts(h, w)...)
}

func diffPorts(h, w Network) []Op {
	var ops []Op
	mtu := h.MTU != w.MTU                  // a port carries the network's
	changed := mtu || h.Native != w.Native // and is found by its addresses, or not
	have := make(map[string]Port, len(h.Ports))
	for _, p := range h.Ports {
		have[string(p.Task)] = p
	}
	for _, p := range w.Ports {
		if old, ok := have[string(p.Task)]; !ok || changed || comparePorts(old, p) != 0 {
			ops = append(ops, Op{Kind: OpSetPort, VNI: w.VNI, Port: &p})
		}
		delete(have, string(p.Task))
	}
	for _, p := range have {
		ops = append(ops, Op{Kind: OpDelPort, VNI: w.VNI, Port: &p})
	}
	switch {
	case w.HostLeg == nil && h.HostLeg != nil:
		ops = append(ops, Op{Kind: OpDelHostLeg, VNI: w.VNI, HostLeg: h.HostLeg})
	case w.HostLeg != nil && (h.HostLeg == nil || mtu || !equalLegs(*h.HostLeg, *w.HostLeg)):
		ops = append(ops, Op{Kind: OpSetHostLeg, VNI: w.VNI, HostLeg: w.HostLeg})
	}
	return ops
}

func header(n Network) *Network {
	n.Ports, n.Peers, n.VIPs, n.HostLeg = nil, nil, nil, nil
	return &n
}

func equalLegs(a, b HostLeg) bool {
	return a.Name == b.Name && a.Addr == b.Addr && a.Addr6 == b.Addr6 && bytes.Equal(a.MAC, b.MAC)
}

func compareOps(a, b Op) int {
	return cmp.Or(
		cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.VNI, b.VNI),
		a.Addr.Compare(b.Addr), bytes.Compare(a.MAC, b.MAC), strings.Compare(opTask(a), opTask(b)))
}

func opTask(o Op) string {
	if o.Port == nil {
		return ""
	}
	return string(o.Port.Task)
}

func comparePeers(a, b Peer) int {
	return cmp.Or(a.Addr.Compare(b.Addr), bytes.Compare(a.MAC, b.MAC), a.VTEP.Compare(b.VTEP), compareBools(a.Native, b.Native))
}

func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func compareVIPs(a, b VIP) int {
	return cmp.Or(a.Addr.Compare(b.Addr), bytes.Compare(a.MAC, b.MAC))
}

func comparePorts(a, b Port) int {
	return cmp.Or(
		cmp.Compare(a.Task, b.Task), cmp.Compare(a.NetNS, b.NetNS), cmp.Compare(a.IfName, b.IfName),
		comparePrefixes(a.Addr, b.Addr), comparePrefixes(a.Addr6, b.Addr6), bytes.Compare(a.MAC, b.MAC))
}

func sortedPrefixes(ps []netip.Prefix) []netip.Prefix {
	out := slices.Clone(ps)
	slices.SortFunc(out, comparePrefixes)
	return out
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}
