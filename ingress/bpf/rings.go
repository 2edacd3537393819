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
	Chunk uint32
	Zero  uint32
}

// chunk is the number of slots in an entry. Every ring has a multiple of it
// (ingress.RingSizes).
const chunk = 64

type chunkValue [chunk]overlay.MACValue

type flowKey struct {
	VNI          uint32
	SPort, DPort uint16
	Src, Dst     [16]byte
	Proto        uint32
}

// tables are the contents of the balancer's maps.
type tables struct {
	services map[overlay.AddrKey]serviceValue
	slots    map[slotKey]chunkValue
	socketTables
}

// keep has, by service address, the backends that flows may lead to: those that
// drain, too.
type keep map[overlay.AddrKey]map[vxlan.MAC]bool

// plan computes the maps of these networks.
func plan(networks []ingress.Network) (tables, keep) {
	count := 0
	for _, n := range networks {
		count += len(n.Services)
	}
	t := tables{services: make(map[overlay.AddrKey]serviceValue, count), slots: make(map[slotKey]chunkValue, count)}
	k := make(keep, count)
	for _, n := range networks {
		for _, s := range n.Services {
			key := overlay.KeyOf(n.VNI, s.VIP)
			k[key] = make(map[vxlan.MAC]bool, len(s.Backends))
			open := make([]ingress.Backend, 0, len(s.Backends))
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

// ringSize is ingress.RingSize in all powers of two between its steps: the next one
// of those has eight times the slots to compute, write and read back. What is to be
// kept, SlotsPerBackend, is. A service is balanced by one node's rings alone, so
// that no other engine has to have the same.
func ringSize(backends int) int {
	size := chunk
	for size < backends*ingress.SlotsPerBackend && size < ingress.RingSize(backends) {
		size *= 2
	}
	return size
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
	ring := ingress.Ring(keys, ringSize(len(keys)))
	name.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(ring))))
	v := serviceValue{Ring: name.Sum64(), Size: uint32(len(ring))}
	if v.Size == 0 {
		return serviceValue{}
	}
	for at := range ring {
		if at%chunk != 0 {
			continue
		}
		var c chunkValue
		for i := range c {
			c[i] = overlay.ValueOf(vxlan.MACOf(open[ring[at+i]].MAC))
		}
		t.slots[slotKey{Ring: v.Ring, Chunk: uint32(at / chunk)}] = c
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
