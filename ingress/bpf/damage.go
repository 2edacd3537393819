package bpf

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/weftnet/weft"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// What can be wrong with an object: the second half of a Repair's Kind.
const (
	missing = "missing"
	wrong   = "wrong"
	stray   = "stray"
)

const reasonGone = "it was gone"

// damage is what others have done to the maps since the last Apply left them: no
// difference that only the wish explains. A service and its ring of backends are
// one object each.
func damage(left, have, want tables) []weft.Repair {
	var out []weft.Repair
	for k := range have.services {
		if _, ok := left.services[k]; ok {
			continue
		}
		if _, ok := want.services[k]; !ok {
			out = append(out, repair("service "+stray, k, "no service has it"))
		}
	}
	for k, l := range left.services {
		h, there := have.services[k]
		w, wanted := want.services[k]
		switch {
		case !wanted, there && (h == l || h == w):
		case !there:
			out = append(out, repair("service "+missing, k, reasonGone))
		default:
			out = append(out, repair("service "+wrong, k, fmt.Sprintf("its ring was %x instead of %x", h.Ring, l.Ring)))
		}
	}
	bad := map[uint64]string{}
	for k, l := range left.slots {
		if h, ok := have.slots[k]; !ok {
			bad[k.Ring] = fmt.Sprintf("its slots from %d on were gone", k.Chunk*chunk)
		} else if h != l {
			i := 0
			for h[i] == l[i] {
				i++
			}
			bad[k.Ring] = fmt.Sprintf("its slot %d was %s instead of %s", int(k.Chunk)*chunk+i, h[i].MAC.HardwareAddr(), l[i].MAC.HardwareAddr())
		}
	}
	for k, l := range left.services { // rings of equal contents are one
		if _, wanted := want.services[k]; wanted && bad[l.Ring] != "" {
			out = append(out, repair("ring "+wrong, k, bad[l.Ring]))
			delete(bad, l.Ring)
		}
	}
	strays := map[uint64]bool{}
	for k := range have.slots {
		_, inLeft := left.slots[k]
		_, inWant := want.slots[k]
		if !inLeft && !inWant {
			strays[k.Ring] = true
		}
	}
	for _, r := range slices.Sorted(maps.Keys(strays)) {
		out = append(out, weft.Repair{Kind: "ring " + stray, Object: fmt.Sprintf("ring %x", r), Reason: "no service has it"})
	}
	out = append(out, socketDamage(left.socketTables, have.socketTables, want.socketTables)...)
	slices.SortFunc(out, func(a, b weft.Repair) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object, b.Object))
	})
	return out
}

func repair(kind string, k overlay.AddrKey, reason string) weft.Repair {
	return weft.Repair{Kind: kind, Object: fmt.Sprintf("service address %s of network %d", k.Addr.Addr(), k.VNI), Reason: reason}
}
