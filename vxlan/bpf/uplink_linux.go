package bpf

import (
	"fmt"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
)

// On an encrypted network who is elsewhere is behind the uplink, a veth whose far
// end is the router in the namespace of the WireGuard devices (package wg). The
// router is a port like a task's, with its own hardware address, to which those of
// the endpoints elsewhere lead, too. Nothing of such a network is sent or taken as
// VXLAN: its entries have no VTEP, and the programs know them by their kind.

// cryptPath is the file of the namespace with the WireGuard devices, which
// package wg makes.
func (e *Engine) cryptPath() string {
	return filepath.Join(e.cfg.NetNSDir, weft.CryptNetNS(e.cfg.Node))
}

// setUplink makes the uplink or repairs it in place.
func (w *writer) setUplink(vni uint32, mtu int) error {
	name := weft.UplinkName(vni)
	if w.e.cfg.NetNSDir == "" {
		return fmt.Errorf("make %s: the overlay engine ebpf was configured without a folder of namespaces: %w", name, weft.ErrUnsupported)
	}
	alias := uplinkAlias(w.e.cfg.Node, vni)
	if old := w.host.byName[name]; old != nil {
		// One without an alias, but of our group, is the rest of a crash.
		if a := old.Attrs(); a.Alias != alias && (a.Alias != "" || a.Group != linux.LinkGroup) {
			return fmt.Errorf("make uplink %s: this host has a link of that name that this node did not make; remove it: %w", name, weft.ErrConflict)
		}
	}
	p := linux.Pair{Name: name, Alias: alias, MTU: mtu, NetNS: w.e.cryptPath(), FarName: weft.RouterName(vni), FarMAC: weft.RouterMAC(vni)}
	near, err := p.Set()
	if err != nil {
		return err
	}
	index := near.Attrs().Index
	if err := w.host.refresh(); err != nil {
		return err
	}
	w.uplinks[vni], _ = w.host.byIndex[index].(*netlink.Veth)
	if err := w.put(overlayMapPorts, uint32(index), uplinkPort(vni)); err != nil {
		return err
	}
	return w.via.attach(portHook(near))
}

// delUplink removes the uplink, if there is one. Entries that lead there go with
// the network.
func (w *writer) delUplink(vni uint32) error {
	up := w.uplinks[vni]
	if up == nil {
		return nil
	}
	delete(w.uplinks, vni)
	if err := w.remove(overlayMapPorts, uint32(up.Index)); err != nil {
		return err
	}
	if err := w.host.conn.LinkDel(up); err != nil && !isGone(err) {
		return fmt.Errorf("delete link %s: %w", up.Name, err)
	}
	return nil // its program goes with it, and the pin with the sweep
}

// uplinkFault says why packets cannot reach the router; "" = they can.
func (s *snapshot) uplinkFault(vni uint32, head netValue) string {
	up := s.uplinks[vni]
	switch {
	case up == nil:
		return vxlan.FaultGone
	case up.Flags&unix.IFF_UP == 0:
		return up.Name + " was down"
	case up.MTU != int(head.MTU):
		return fmt.Sprintf("%s had an MTU of %d instead of %d", up.Name, up.MTU, head.MTU)
	case s.ports[uint32(up.Index)] != uplinkPort(vni):
		return "the entry of " + up.Name + " was gone or damaged"
	case !s.via.isAttached(portHook(up)):
		return detachedReason(up.Name)
	}
	fault, err := linux.RouterFault(s.e.cryptPath(), vni, up)
	if err != nil {
		s.e.cfg.Log.Warn("uplink cannot be read; it will be repaired", weft.KeyVNI, vni, weft.KeyErr, err)
		return err.Error()
	}
	return fault
}

// uplinkDest is the entry of a hardware address that is elsewhere.
func (s *snapshot) uplinkDest(vni uint32) destValue {
	d := destValue{Kind: destSealedTask}
	if up := s.uplinks[vni]; up != nil {
		d.IfIndex = uint32(up.Index)
	}
	return d
}

func uplinkPort(vni uint32) portValue {
	return portValue{VNI: vni, MAC: vxlan.MACOf(weft.RouterMAC(vni))}
}

// isService reports whether a hardware address is that of a service.
func isService(n vxlan.Network, mac vxlan.MAC) bool {
	for _, v := range n.VIPs {
		if vxlan.MACOf(v.MAC) == mac {
			return true
		}
	}
	return false
}
