package ingress

import (
	"bytes"
	"net/netip"
	"slices"
	"unsafe"
)

// Edit is the change of one service of a network: a nil Was was none before, a nil
// Is is none any more.
type Edit struct{ Was, Is *Service }

// Changes are the services that differ in their backends, those that are gone last;
// false = more than most do, or a service address among them stands twice. It does
// not look at their names, nor for addresses that stand twice among those that are
// the same (Unique). Lists of which most backends are the very same slices, as they
// are where a table is the last one with a change, cost little.
func Changes(was, is []Service, most int) ([]Edit, bool) {
	head, tail, short := 0, 0, min(len(was), len(is))
	for head < short && was[head].VIP == is[head].VIP {
		head++
	}
	for tail < short-head && was[len(was)-1-tail].VIP == is[len(is)-1-tail].VIP {
		tail++
	}
	var out []Edit
	pairs := func(w, i []Service) bool {
		for n := range i {
			if !SameBackends(w[n].Backends, i[n].Backends) {
				if out = append(out, Edit{&w[n], &i[n]}); len(out) > most {
					return false
				}
			}
		}
		return true
	}
	if !pairs(was[:head], is[:head]) || !pairs(was[len(was)-tail:], is[len(is)-tail:]) {
		return nil, false
	}
	// What is between is not in the same order.
	old, now := was[head:len(was)-tail], is[head:len(is)-tail]
	before := make(map[netip.Addr]*Service, len(old))
	for i := range old {
		before[old[i].VIP] = &old[i]
	}
	after := make(map[netip.Addr]bool, len(now))
	for i := range now {
		w := before[now[i].VIP]
		if after[now[i].VIP] = true; w != nil && SameBackends(w.Backends, now[i].Backends) {
			continue
		}
		if out = append(out, Edit{w, &now[i]}); len(out) > most {
			return nil, false
		}
	}
	if len(before) < len(old) || len(after) < len(now) {
		return nil, false
	}
	for i := range old {
		if after[old[i].VIP] {
			continue
		}
		if out = append(out, Edit{&old[i], nil}); len(out) > most {
			return nil, false
		}
	}
	return out, !repeats(out)
}

// repeats reports whether two edits are of one service address.
func repeats(edits []Edit) bool {
	was, is := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, e := range edits {
		for _, side := range []struct {
			s    *Service
			seen map[netip.Addr]bool
		}{{e.Was, was}, {e.Is, is}} {
			if side.s == nil {
				continue
			}
			if side.seen[side.s.VIP] {
				return true
			}
			side.seen[side.s.VIP] = true
		}
	}
	return false
}

// SameBackends reports whether two lists are equal, in the same order. It copies no
// backend: engines ask it of all services in each pass.
func SameBackends(a, b []Backend) bool {
	if len(a) != len(b) {
		return false
	}
	if unsafe.SliceData(a) == unsafe.SliceData(b) {
		return true // a table is not changed once it was given to Apply
	}
	for i := range a {
		x, y := &a[i], &b[i]
		if x.Task != y.Task || x.Draining != y.Draining || x.Addr != y.Addr || x.Addr6 != y.Addr6 || !bytes.Equal(x.MAC, y.MAC) {
			return false
		}
	}
	return true
}

// Unique reports whether no service address stands twice.
func Unique(services []Service) bool {
	seen := make(map[netip.Addr]struct{}, len(services))
	for i := range services {
		seen[services[i].VIP] = struct{}{}
	}
	return len(seen) == len(services)
}

// SameBut reports whether two networks differ in nothing but their services.
func (n *Network) SameBut(o *Network) bool {
	return n.VNI == o.VNI && n.NetNS == o.NetNS && n.Bridge == o.Bridge && n.IPv6 == o.IPv6 &&
		slices.Equal(n.Ports, o.Ports) && slices.Equal(n.Tasks, o.Tasks) &&
		slices.EqualFunc(n.Speakers, o.Speakers, func(a, b Speaker) bool { return bytes.Equal(a.MAC, b.MAC) && slices.Equal(a.Addrs, b.Addrs) })
}
