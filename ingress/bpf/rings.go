package bpf

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"slices"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// The following are the structs of c/balance.c, without holes.

type serviceValue struct {
	Ring uint64
	Size uint32
	Zero uint32
}

type slotKey struct {
	Ring  uint64
	Index uint32
	Zero  uint32
}

type flowKey struct {
	VNI          uint32
	SPort, DPort uint16
	Src, Dst     [16]byte
	Proto        uint32
}

// tables are the contents of the balancer's maps.
type tables struct {
	services map[overlay.AddrKey]serviceValue
	slots    map[slotKey]overlay.MACValue
}

// keep has, by service address, the backends that flows may lead to: those that
// drain, too.
type keep map[overlay.AddrKey]map[vxlan.MAC]bool

// plan computes the maps of these networks.
func plan(networks []ingress.Network) (tables, keep) {
	t := tables{services: map[overlay.AddrKey]serviceValue{}, slots: map[slotKey]overlay.MACValue{}}
	k := keep{}
	for _, n := range networks {
		for _, s := range n.Services {
			key := overlay.KeyOf(n.VNI, s.VIP)
			k[key] = map[vxlan.MAC]bool{}
			var open []ingress.Backend
			for _, b := range s.Backends {
				k[key][vxlan.MACOf(b.MAC)] = true
				if !b.Draining {
					open = append(open, b)
				}
			}
			t.services[key] = t.ring(open)
		}
	}
	return t, k
}

// ring fills the slots of a service. Rings of equal contents are one.
func (t tables) ring(open []ingress.Backend) serviceValue {
	slices.SortFunc(open, func(a, b ingress.Backend) int { return cmp.Compare(a.Task, b.Task) })
	keys := make([]string, len(open))
	name := fnv.New64a()
	for i, b := range open {
		keys[i] = string(b.Task)
		name.Write([]byte(b.Task))
		name.Write(b.MAC)
	}
	ring := ingress.Ring(keys, ingress.RingSize(len(keys)))
	name.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(ring))))
	v := serviceValue{Ring: name.Sum64(), Size: uint32(len(ring))}
	if v.Size == 0 {
		return serviceValue{}
	}
	for slot, i := range ring {
		t.slots[slotKey{Ring: v.Ring, Index: uint32(slot)}] = overlay.ValueOf(vxlan.MACOf(open[i].MAC))
	}
	return v
}

// lost reports whether a backend that flows may lead to by before is not in k.
func (k keep) lost(before keep) bool {
	for service, macs := range before {
		for mac := range macs {
			if !k[service][mac] {
				return true
			}
		}
	}
	return false
}

// allows reports whether a flow may stay.
func (k keep) allows(f flowKey, mac vxlan.MAC) bool {
	key := overlay.AddrKey{VNI: f.VNI, Addr: f.Dst}
	return k[key][mac]
}
