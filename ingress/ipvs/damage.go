package ipvs

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// damage is what others have done to a namespace since the last Apply left it: no
// difference that only the wish explains. A service and its backends are one object.
func damage(vni uint32, left, have, want state) []weft.Repair {
	var out []weft.Repair
	say := func(kind, object, reason string) {
		out = append(out, weft.Repair{Kind: kind, Object: fmt.Sprintf("%s of network %d", object, vni), Reason: reason})
	}
	for _, a := range differing(left.local, have.local) {
		if want.local[a] {
			say("service route missing", "service address "+a.String(), reasonGone)
		}
	}
	for _, a := range onlyIn(have.local, left.local, netip.Addr.Compare) {
		if !want.local[a] {
			say("service route stray", "service address "+a.String(), reasonStray)
		}
	}
	for _, a := range differing(left.near, have.near) {
		if want.near[a] {
			say("task route missing", "task "+a.String(), reasonGone)
		}
	}
	for _, a := range onlyIn(have.near, left.near, netip.Addr.Compare) {
		if !want.near[a] {
			say("task route stray", "task "+a.String(), "no task has it")
		}
	}
	for _, a := range differing(left.neigh, have.neigh) {
		h, there := have.neigh[a]
		w, wanted := want.neigh[a]
		switch {
		case !wanted || there && h == w:
		case !there:
			say("backend missing", "neighbour "+a.String(), reasonGone)
		default:
			say("backend wrong", "neighbour "+a.String(), fmt.Sprintf("it was %x instead of %x", h, left.neigh[a]))
		}
	}
	for _, a := range onlyIn(have.neigh, left.neigh, netip.Addr.Compare) {
		if _, ok := want.neigh[a]; !ok {
			say("backend stray", "neighbour "+a.String(), reasonStray)
		}
	}
	for _, k := range differingServices(left.services, have.services) {
		h, there := have.services[k]
		w, wanted := want.services[k]
		switch {
		case !wanted || there && slices.Equal(h, w):
		case !there:
			say("service missing", k.String(), reasonGone)
		default:
			say("service wrong", k.String(), fmt.Sprintf("it had backends %v instead of %v", h, left.services[k]))
		}
	}
	for _, k := range onlyIn(have.services, left.services, compareKeys) {
		if _, ok := want.services[k]; !ok {
			say("service stray", k.String(), reasonStray)
		}
	}
	return out
}

const (
	reasonGone  = "it was gone"
	reasonStray = "no service has it"
)
