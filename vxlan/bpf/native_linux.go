package bpf

import (
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/vxlan"
)

// takesNative reports whether a network of this node takes packets without
// encapsulation: only then does the underlay's program look for them.
func (s *snapshot) takesNative() bool {
	for _, head := range s.nets {
		if head.isNative() {
			return true
		}
	}
	return false
}

func readNatives(m *ebpf.Map) (map[uint32]map[addr16]nativeValue, error) {
	all, err := dump[addr16, nativeValue](m)
	if err != nil {
		return nil, err
	}
	out := make(map[uint32]map[addr16]nativeValue, len(all))
	for a, v := range all {
		if out[v.IfIndex] == nil {
			out[v.IfIndex] = make(map[addr16]nativeValue)
		}
		out[v.IfIndex][a] = v
	}
	return out, nil
}

// hasNatives reports whether a port's addresses are those by which it gets
// packets without encapsulation; a leg, and a port of another network, has none.
func (s *snapshot) hasNatives(near nearEnd, head netValue, mac vxlan.MAC, addrs []netip.Addr) bool {
	has := s.natives[uint32(near.link.Attrs().Index)]
	if !head.isNative() || near.leg != "" {
		return len(has) == 0
	}
	want := nativeValue{VNI: near.vni, IfIndex: uint32(near.link.Attrs().Index), MAC: mac}
	for _, a := range addrs {
		if has[addrOf(a)] != want {
			return false
		}
	}
	return len(addrs) == len(has)
}

// setNatives files a port's addresses, or takes them out where the network is
// not native.
func (w *writer) setNatives(vni uint32, head netValue, index int, mac vxlan.MAC, addrs []netip.Prefix) error {
	keep := map[addr16]bool{}
	for _, a := range addrs {
		if !head.isNative() {
			break
		}
		keep[addrOf(a.Addr())] = true
		if err := w.put(overlayMapNatives, addrOf(a.Addr()), nativeValue{VNI: vni, IfIndex: uint32(index), MAC: mac}); err != nil {
			return err
		}
	}
	return w.delNatives(index, keep)
}

// delNatives takes out a port's addresses but those to keep, and those that
// another port has taken over since the map was read.
func (w *writer) delNatives(index int, keep map[addr16]bool) error {
	var errs []error
	for a := range w.natives[uint32(index)] {
		var now nativeValue
		if keep[a] || w.o.maps[overlayMapNatives].Lookup(a, &now) != nil || now.IfIndex != uint32(index) {
			continue
		}
		errs = append(errs, w.remove(overlayMapNatives, a))
	}
	return errors.Join(errs...)
}

// sweepNatives takes out what leads to links that are gone.
func (w *writer) sweepNatives() error {
	var errs []error
	for index := range w.natives {
		if w.host.byIndex[int(index)] == nil {
			errs = append(errs, w.delNatives(int(index), nil))
		}
	}
	return errors.Join(errs...)
}
