package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
)

// writer performs the operations of one Apply. Used by one goroutine.
type writer struct {
	*snapshot
	want vxlan.State
	// broken networks could not be made.
	broken map[uint32]bool
	// loose networks may hold entries that no operation names: those that are
	// not wanted go last.
	loose map[uint32]bool
	// repairs are those that no operation has made.
	repairs []weft.Repair
}

// do performs one operation. When a network cannot be made, none follows on it.
func (w *writer) do(op vxlan.Op) error {
	err := error(nil)
	if w.e.cfg.fail != nil {
		err = w.e.cfg.fail(op)
	}
	if err == nil {
		err = w.perform(op)
	}
	if err != nil && op.Kind <= vxlan.OpSetDevice {
		if w.broken == nil {
			w.broken = make(map[uint32]bool)
		}
		w.broken[op.VNI] = true
	}
	return err
}

func (w *writer) perform(op vxlan.Op) error {
	switch op.Kind {
	case vxlan.OpDelStale:
		return w.delStale(op.VNI)
	case vxlan.OpDelNetwork:
		return w.delNetwork(op.VNI, func(nearEnd) bool { return false })
	case vxlan.OpAddNetwork, vxlan.OpSetDevice:
		return w.setDevice(*op.Network)
	case vxlan.OpSetNetwork:
		return w.setNetwork(*op.Network)
	case vxlan.OpSetFDB:
		return w.setFDB(op)
	case vxlan.OpDelFDB:
		return w.delFDB(macKey{VNI: op.VNI, MAC: vxlan.MACOf(op.MAC)})
	case vxlan.OpSetNeigh:
		return w.put(overlayMapEps, epKey{VNI: op.VNI, Addr: addrOf(op.Addr)}, epValue{MAC: vxlan.MACOf(op.MAC)})
	case vxlan.OpDelNeigh:
		return w.delNeigh(epKey{VNI: op.VNI, Addr: addrOf(op.Addr)})
	case vxlan.OpSetPort:
		p := op.Port
		return w.setPort(owned{vni: op.VNI, port: *p}, p.MAC, p.Addrs())
	case vxlan.OpSetHostLeg:
		l := op.HostLeg
		return w.setPort(owned{vni: op.VNI, leg: l.Name}, l.MAC, l.Addrs())
	case vxlan.OpDelPort:
		return w.delPorts(op.VNI, func(n nearEnd) bool { return n.leg == "" && n.port.Task == op.Port.Task })
	case vxlan.OpDelHostLeg:
		return w.delPorts(op.VNI, func(n nearEnd) bool { return n.leg != "" })
	}
	return fmt.Errorf("operation %s is not known", op.Kind)
}

// put writes one entry. A full map says which limit was met.
func (w *writer) put(name string, key, value any) error {
	if err := w.o.maps[name].Put(key, value); err != nil {
		return fmt.Errorf("write map %s (of at most %d entries): %w", name, w.o.maps[name].MaxEntries(), err)
	}
	return nil
}

// remove deletes one entry; one that is not there is success.
func (w *writer) remove(name string, key any) error {
	if err := w.o.maps[name].Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from map %s: %w", name, err)
	}
	return nil
}

// setDevice files the network and makes the VXLAN device of its port, or the
// uplink of an encrypted network. What the
// maps hold of it stays until the new is written.
func (w *writer) setDevice(n vxlan.Network) error {
	if n.Encrypted {
		if err := w.setUplink(n.VNI, n.MTU); err != nil {
			return err
		}
		w.flag(n.VNI)
		return w.setNetwork(n)
	}
	if err := w.delUplink(n.VNI); err != nil {
		return err
	}
	old, isNew := w.nets[n.VNI], w.e.tunnel(w.host, n.Port) == nil
	if isNew {
		if err := w.e.makeTunnel(w.host, n.Port); err != nil {
			return err
		}
	}
	if err := w.via.attach(tunnelHook(w.tunnelIndex(n.Port))); err != nil {
		return err
	}
	w.flag(n.VNI)
	if err := w.setNetwork(n); err != nil {
		return err
	}
	for vni, head := range w.nets {
		switch {
		case vni == n.VNI:
			head = old
		case !isNew || head.UDP != old.UDP:
			continue
		}
		if err := w.refile(vni, head); err != nil {
			return err
		}
	}
	return nil
}

// refile brings what is sound of the entries of a network's ports from an old
// head, or an old VXLAN device, to the new one.
func (w *writer) refile(vni uint32, old netValue) error {
	head := w.nets[vni]
	for _, near := range w.near[vni] {
		index := uint32(near.link.Attrs().Index)
		val, ok := w.ports[index]
		k := macKey{VNI: vni, MAC: val.MAC}
		if !ok || val != localPort(vni, old, val.MAC, int(val.Tunnel)) || w.dests[k] != localDest(near.owned, near.link.Attrs().Index, old) {
			continue // OpSetPort follows
		}
		if err := w.put(overlayMapPorts, index, localPort(vni, head, val.MAC, w.tunnelIndex(head.UDP.v()))); err != nil {
			return err
		}
		if err := w.put(overlayMapMacs, k, localDest(near.owned, near.link.Attrs().Index, head)); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) flag(vni uint32) {
	if w.loose == nil {
		w.loose = make(map[uint32]bool)
	}
	w.loose[vni] = true
}

func (w *writer) tunnelIndex(port uint16) int {
	if v := w.e.tunnel(w.host, port); v != nil {
		return v.Index
	}
	return 0
}

// setNetwork files the head of a network. Its MTU stands in every entry, too, but
// for those of narrower ways.
func (w *writer) setNetwork(n vxlan.Network) error {
	v, err := encodeNet(n)
	if err != nil {
		return err
	}
	old := w.nets[n.VNI]
	if err := w.put(overlayMapNets, n.VNI, v); err != nil {
		return err
	}
	w.nets[n.VNI] = v
	if old.MTU == v.MTU || old.MTU == 0 {
		return nil
	}
	if v.isEncrypted() {
		return w.setUplink(n.VNI, n.MTU)
	}
	for k, d := range w.dests {
		if k.VNI != n.VNI || !d.Kind.isRemote() {
			continue
		}
		mtu := d.MTU // a narrower way stays as narrow
		if mtu == old.MTU {
			mtu = v.MTU
		}
		if err := w.put(overlayMapMacs, k, w.host.remote(v, d.way(), mtu)); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) setFDB(op vxlan.Op) error {
	d := destValue{Kind: destVIP}
	switch head := w.nets[op.VNI]; {
	case head.isEncrypted() && op.VTEP.IsValid():
		return fmt.Errorf("network %d is encrypted and nothing of it leaves by a tunnel: %w", op.VNI, weft.ErrInvalid)
	case head.isEncrypted() && !isService(w.want.Networks[op.VNI], vxlan.MACOf(op.MAC)):
		d = w.uplinkDest(op.VNI)
	case op.VTEP.IsValid():
		d = w.host.remote(head, vxlan.Way{VTEP: op.VTEP, Native: op.Native}, uint16(op.MTU))
	}
	return w.put(overlayMapMacs, macKey{VNI: op.VNI, MAC: vxlan.MACOf(op.MAC)}, d)
}

// delFDB leaves alone what a port has taken over since the maps were read.
func (w *writer) delFDB(k macKey) error {
	if w.isClaimed(k) {
		return nil
	}
	return w.remove(overlayMapMacs, k)
}

func (w *writer) delNeigh(k epKey) error {
	var ep epValue
	if err := w.o.maps[overlayMapEps].Lookup(k, &ep); err == nil && w.isClaimed(macKey{VNI: k.VNI, MAC: ep.MAC}) && w.isWanted(k) {
		return nil
	}
	return w.remove(overlayMapEps, k)
}

// isClaimed reports whether a hardware address is that of a port that stands.
func (w *writer) isClaimed(k macKey) bool {
	var d destValue
	var p portValue
	return k.MAC != vxlan.MACOf(weft.RouterMAC(k.VNI)) && w.o.maps[overlayMapMacs].Lookup(k, &d) == nil && d.Kind.isLocal() &&
		w.o.maps[overlayMapPorts].Lookup(d.IfIndex, &p) == nil && p.VNI == k.VNI && p.MAC == k.MAC
}

// isWanted reports whether an address is that of a port in the wanted state.
func (w *writer) isWanted(k epKey) bool {
	n := w.want.Networks[k.VNI]
	is := func(p netip.Prefix) bool { return addrOf(p.Addr()) == k.Addr }
	if n.HostLeg != nil && slices.ContainsFunc(n.HostLeg.Addrs(), is) {
		return true
	}
	return slices.ContainsFunc(n.Ports, func(p vxlan.Port) bool { return slices.ContainsFunc(p.Addrs(), is) })
}

// setPort makes or repairs a port from its far end to its entries, which come
// last but for the program: nothing is sent to a port that is not there.
func (w *writer) setPort(own owned, mac []byte, addrs []netip.Prefix) error {
	head := w.nets[own.vni]
	n, ok := decodeNet(own.vni, head)
	if !ok {
		return fmt.Errorf("read network %d: %w", own.vni, weft.ErrNotFound)
	}
	p := linux.Pair{MTU: n.MTU, FarMAC: mac, FarAddrs: addrs}
	if own.leg == "" {
		p.Name, p.Alias = weft.PortVethName(own.port.Task, n.ID), portAlias(w.e.cfg.Node, own.vni, own.port)
		p.NetNS, p.FarName = own.port.NetNS, own.port.IfName
		p.Kind = linux.PairKind(w.newPorts)
	} else {
		p.Name, p.Alias = weft.PortVethName(w.e.cfg.Node, n.ID), legAlias(w.e.cfg.Node, own.vni, own.leg)
		p.FarName, p.FarAlias = own.leg, weft.LinkAlias(w.e.cfg.Node)
	}
	near, err := p.Set()
	if err != nil {
		return err
	}
	index := near.Attrs().Index
	val := localPort(own.vni, head, vxlan.MACOf(mac), w.tunnelIndex(n.Port))
	if old := w.ports[uint32(index)]; old.MAC != val.MAC {
		if err := w.forget(own.vni, old.MAC, index); err != nil {
			return err
		}
	}
	if err := w.put(overlayMapPorts, uint32(index), val); err != nil {
		return err
	}
	if err := w.put(overlayMapMacs, macKey{VNI: own.vni, MAC: val.MAC}, localDest(own, index, head)); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := w.put(overlayMapEps, epKey{VNI: own.vni, Addr: addrOf(a.Addr())}, epValue{MAC: val.MAC}); err != nil {
			return err
		}
	}
	for k, ep := range w.eps { // addresses that the port had
		if k.VNI == own.vni && ep.MAC == val.MAC && !slices.ContainsFunc(addrs, func(a netip.Prefix) bool { return addrOf(a.Addr()) == k.Addr }) {
			if err := w.remove(overlayMapEps, k); err != nil {
				return err
			}
		}
	}
	if own.leg != "" {
		addrs = nil // the host's own stack takes what is for it
	}
	if err := w.setNatives(own.vni, head, index, val.MAC, addrs); err != nil {
		return err
	}
	return w.via.attach(portHook(near))
}

// forget removes the entries of a hardware address that the port at index had.
func (w *writer) forget(vni uint32, mac vxlan.MAC, index int) error {
	if err := w.delNatives(index, nil); err != nil {
		return err
	}
	k := macKey{VNI: vni, MAC: mac}
	if d, ok := w.dests[k]; ok && d.Kind.isLocal() && d.IfIndex == uint32(index) {
		if err := w.remove(overlayMapMacs, k); err != nil {
			return err
		}
	}
	for k, ep := range w.eps {
		if k.VNI == vni && ep.MAC == mac && !w.isWanted(k) {
			if err := w.remove(overlayMapEps, k); err != nil {
				return err
			}
		}
	}
	return nil
}

// delPorts removes those ports of a network that match: entries first, so that
// nothing is sent to a link that goes.
func (w *writer) delPorts(vni uint32, match func(nearEnd) bool) error {
	var errs []error
	for _, near := range w.near[vni] {
		if !match(near) {
			continue
		}
		index := near.link.Attrs().Index
		errs = append(errs, w.forget(vni, w.ports[uint32(index)].MAC, index), w.remove(overlayMapPorts, uint32(index)))
		if err := w.host.conn.LinkDel(near.link); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("delete link %s: %w", near.link.Attrs().Name, err))
		}
	}
	w.near[vni] = slices.DeleteFunc(w.near[vni], match)
	return errors.Join(errs...)
}

// delStale clears the way for a network that is made anew. If the same one was
// only half made, its ports keep their links: they are repaired in place.
func (w *writer) delStale(vni uint32) error {
	n := w.want.Networks[vni]
	old, known := decodeNet(vni, w.nets[vni])
	isOther := known && old.ID != "" && old.ID != n.ID
	keep := func(near nearEnd) bool {
		if isOther || near.leg != "" && n.HostLeg == nil {
			return false
		}
		if near.leg != "" {
			return near.link.Attrs().Name == weft.PortVethName(w.e.cfg.Node, n.ID)
		}
		return near.link.Attrs().Name == weft.PortVethName(near.port.Task, n.ID) &&
			slices.ContainsFunc(n.Ports, func(p vxlan.Port) bool { return p.Task == near.port.Task })
	}
	if isOther {
		return w.delNetwork(vni, keep)
	}
	return w.delPorts(vni, func(near nearEnd) bool { return !keep(near) })
}

// delNetwork removes all of a network but the ports to keep.
func (w *writer) delNetwork(vni uint32, keep func(nearEnd) bool) error {
	errs := []error{w.delPorts(vni, func(n nearEnd) bool { return !keep(n) }), w.delUplink(vni)}
	for k := range w.dests {
		if k.VNI == vni {
			errs = append(errs, w.remove(overlayMapMacs, k))
			delete(w.dests, k)
		}
	}
	for k := range w.eps {
		if k.VNI == vni {
			errs = append(errs, w.remove(overlayMapEps, k))
			delete(w.eps, k)
		}
	}
	errs = append(errs, w.remove(overlayMapNets, vni))
	delete(w.nets, vni)
	return errors.Join(errs...)
}
