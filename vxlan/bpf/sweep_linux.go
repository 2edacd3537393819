package bpf

import (
	"errors"
	"fmt"
	"strings"

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
	needed := map[string]bool{}
	tunnels := map[string]bool{}
	for vni, head := range w.nets {
		tunnels[weft.TunnelName(head.UDP.v())] = true
		needed[tunnelHook(w.tunnelIndex(head.UDP.v())).pin] = true
		if dev := w.host.underlay(head.VTEP.Addr()); dev != 0 {
			h := underlayHook(dev, w.takesNative())
			needed[h.pin] = true
			if err := w.e.attach(w.o, h); err != nil {
				errs = append(errs, &vxlan.NetworkError{VNI: vni, Err: err})
			}
		}
	}
	return errors.Join(append(errs, w.sweepHooks(needed), w.sweepTunnels(tunnels), w.sweepPorts(), w.sweepNatives())...)
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

// sweepHooks detaches programs from devices that no network uses, and unpins
// the links of ports that are gone.
func (w *writer) sweepHooks(needed map[string]bool) error {
	pins, err := w.e.hooks()
	if err != nil {
		return err
	}
	links, err := linux.Complete(w.host.conn.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if _, ok := parseAlias(w.e.cfg.Node, l.Attrs().Alias); ok {
			needed[l.Attrs().Name] = true
		}
	}
	var errs []error
	for _, pin := range pins {
		if !needed[pin] {
			errs = append(errs, w.e.detach(pin))
		}
	}
	return errors.Join(errs...)
}

// sweepTunnels deletes our VXLAN devices of UDP ports that no network uses.
func (w *writer) sweepTunnels(needed map[string]bool) error {
	var errs []error
	for name, l := range w.host.byName {
		if l.Type() != "vxlan" || needed[name] || !strings.HasPrefix(name, tunnelNamePrefix) || l.Attrs().Alias != weft.LinkAlias(w.e.cfg.Node) {
			continue
		}
		if err := w.host.conn.LinkDel(l); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("delete VXLAN device %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// tunnelNamePrefix is what weft.TunnelName begins with.
var tunnelNamePrefix = strings.TrimSuffix(weft.TunnelName(0), "0")

// sweepPorts removes what is known of links that are gone.
func (w *writer) sweepPorts() error {
	var errs []error
	for index := range w.ports {
		if w.host.byIndex[int(index)] == nil {
			errs = append(errs, w.remove(overlayMapPorts, index))
		}
	}
	return errors.Join(errs...)
}
