package bpf

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
)

// isGone reports that the object of a removal does not exist any more.
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT)
}

// sweep ends a pass: the underlay devices get their program, which now finds
// full maps, and what no network needs any more goes.
func (w *writer) sweep() error {
	var errs []error
	for vni := range w.loose {
		if !w.broken[vni] {
			errs = append(errs, w.sweepEntries(vni))
		}
	}
	needed := map[string]hook{}
	tunnels := map[string]bool{}
	for vni, head := range w.nets {
		if head.isEncrypted() {
			errs = append(errs, w.setOrigin(vni, head))
			head = w.nets[vni]
		} else {
			tunnels[weft.TunnelName(head.UDP.v())] = true
			if i := w.tunnelIndex(head.UDP.v()); i != 0 {
				needed[tunnelHook(i).pin] = tunnelHook(i)
			}
		}
		if dev := w.host.underlay(head.VTEP.Addr()); dev != 0 {
			h := underlayHook(dev, w.takesNative())
			needed[h.pin] = h
			if err := w.via.attach(h); err != nil {
				errs = append(errs, &vxlan.NetworkError{VNI: vni, Err: err})
				continue
			}
			if told, ok := w.detached[dev]; ok && !told {
				name := w.host.byIndex[dev].Attrs().Name
				w.repairs = append(w.repairs, weft.Repair{Kind: "device wrong", Object: name, Reason: detachedReason(name)})
				w.detached[dev] = true
			}
		}
	}
	return errors.Join(append(errs, w.sweepHooks(needed), w.sweepTunnels(tunnels), w.sweepPorts(), w.sweepNatives())...)
}

// setOrigin files a new VTEP and UDP port of an encrypted network: they carry
// nothing of it, and packets in the clear are known by them.
func (w *writer) setOrigin(vni uint32, head netValue) error {
	n, ok := w.want.Networks[vni]
	now := head
	now.VTEP, now.UDP = addrOf(n.VTEP), be(n.Port)
	if !ok || now == head {
		return nil
	}
	w.nets[vni] = now
	return w.put(overlayMapNets, vni, now)
}

// sweepEntries removes what the maps hold of a network and nobody wants.
func (w *writer) sweepEntries(vni uint32) error {
	var errs []error
	t := vxlan.Derive(w.want.Networks[vni])
	for k := range w.dests {
		if _, ok := t.FDB[k.MAC]; k.VNI == vni && !ok {
			errs = append(errs, w.delFDB(k))
		}
	}
	for k := range w.eps {
		if _, ok := t.Neigh[k.Addr.Addr()]; k.VNI == vni && !ok {
			errs = append(errs, w.delNeigh(k))
		}
	}
	return errors.Join(errs...)
}

// sweepHooks detaches programs from devices that no network uses and of ports
// that are gone, and all that are attached in the other way.
func (w *writer) sweepHooks(needed map[string]hook) error {
	links, err := linux.Complete(w.host.conn.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if _, ok := parseAlias(w.e.cfg.Node, l.Attrs().Alias); ok {
			h := portHook(l)
			needed[h.pin] = h
		}
	}
	return errors.Join(w.via.sweep(needed), w.other.sweep(nil))
}

// sweepTunnels deletes our VXLAN devices of UDP ports that no network uses.
func (w *writer) sweepTunnels(needed map[string]bool) error {
	var errs []error
	for name, l := range w.host.byName {
		if needed[name] || !w.e.isTunnel(l) {
			continue
		}
		if err := w.host.conn.LinkDel(l); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("delete VXLAN device %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// isTunnel reports whether a link is a VXLAN device of this node's engine.
func (e *Engine) isTunnel(l netlink.Link) bool {
	return l.Type() == "vxlan" && strings.HasPrefix(l.Attrs().Name, tunnelNamePrefix) && l.Attrs().Alias == weft.LinkAlias(e.cfg.Node)
}

// tunnelNamePrefix is what weft.TunnelName begins with.
var tunnelNamePrefix = strings.TrimSuffix(weft.TunnelName(0), "0")

// sweepPorts removes what is known of links that are gone, unless the pass has
// written it anew.
func (w *writer) sweepPorts() error {
	var errs []error
	for index := range w.ports {
		if w.host.byIndex[int(index)] == nil {
			errs = append(errs, w.remove(overlayMapPorts, index))
		}
	}
	for k, d := range w.dests {
		var now destValue
		if w.isOrphan(k) && w.o.maps[overlayMapMacs].Lookup(k, &now) == nil && now == d {
			errs = append(errs, w.remove(overlayMapMacs, k))
		}
	}
	for k, ep := range w.eps {
		var now epValue
		if w.isOrphan(macKey{VNI: k.VNI, MAC: ep.MAC}) && !w.isWanted(k) && w.o.maps[overlayMapEps].Lookup(k, &now) == nil && now == ep {
			errs = append(errs, w.remove(overlayMapEps, k))
		}
	}
	return errors.Join(errs...)
}
