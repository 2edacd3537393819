package nft

import (
	"net/netip"
	"reflect"
	"slices"

	"github.com/google/nftables"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// expressMost is how many services or published ports may change without all of
// them being looked at: beyond it a whole pass costs little more for each. Our own
// choice.
const expressMost = 64

// The elements of a service, and of a published port, depend on nothing else. So
// what a few of them change is told from what these few were and are, which are
// rulesets of some sets alone: parts.

// edit is what leads from one part of r to another; false = r is not what it was
// made for, or does not tell its parts apart.
func (r *ruleset) edit(was, is ruleset) ([]setDelta, bool) {
	if r.twice || was.twice || is.twice {
		return nil, false
	}
	var out []setDelta
	for n, w := range was.sets {
		in, i := r.elementsOf(w), is.sets[n]
		for k, v := range w.elements {
			if have, ok := in[k]; !ok || have != v {
				return nil, false
			}
		}
		for k := range i.elements {
			_, goes := w.elements[k]
			if _, ok := in[k]; ok && !goes {
				return nil, false // another one's
			}
		}
		if d := i.diff(w.elements); len(d.add)+len(d.del) > 0 {
			out = append(out, setDelta{i, d})
		}
	}
	return out, true
}

// become makes r what an edit has made of it.
func (r *ruleset) become(was, is ruleset) {
	for n, w := range was.sets {
		in := r.elementsOf(w)
		for k := range w.elements {
			delete(in, k)
		}
		for k, v := range is.sets[n].elements {
			in[k] = v
		}
	}
}

// servicesPart is the part of a network's table that is of these services.
func servicesPart(services []ingress.Service, with6 bool) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge}
	for _, f := range families(with6) {
		r.sets = append(r.sets, f.serviceSets()...)
	}
	put := r.filler()
	for _, s := range services {
		fillService(put, s)
	}
	return r
}

// publishedPart is the part of the host's table that is of these ports.
func (f *family) publishedPart(ports []ingress.Published) ruleset {
	sets := f.publishedSets()
	for _, p := range ports {
		sets.add(p)
	}
	return ruleset{family: f.host, sets: sets.all(), twice: *sets.twice}
}

// sides are the services of edits, as they were and as they are.
func sides(edits []ingress.Edit) (was, is []ingress.Service) {
	for _, e := range edits {
		if e.Was != nil {
			was = append(was, *e.Was)
		}
		if e.Is != nil {
			is = append(is, *e.Is)
		}
	}
	return was, is
}

// goneBackends are the backends of was, by hardware address, that no service of all
// has any more.
func goneBackends(was, all []ingress.Service) map[string]bool {
	gone := map[string]bool{}
	for _, s := range was {
		for _, b := range s.Backends {
			gone[string(b.MAC)] = true
		}
	}
	for i := range all {
		for k := range all[i].Backends {
			if len(gone) == 0 {
				return nil
			}
			delete(gone, string(all[i].Backends[k].MAC))
		}
	}
	return gone
}

// changedPorts are the published ports that differ, as they were and as they are;
// false = more than most do.
func changedPorts(was, is []ingress.Published, most int) (old, now []ingress.Published, ok bool) {
	for len(was) > 0 && len(is) > 0 && samePort(&was[0], &is[0]) {
		was, is = was[1:], is[1:]
	}
	for len(was) > 0 && len(is) > 0 && samePort(&was[len(was)-1], &is[len(is)-1]) {
		was, is = was[:len(was)-1], is[:len(is)-1]
	}
	before := make(map[portPlace]*ingress.Published, len(was))
	for i := range was {
		before[placeOf(&was[i])] = &was[i]
	}
	if len(before) < len(was) {
		return nil, nil, false // one stands twice
	}
	for i := range is {
		k := placeOf(&is[i])
		if w := before[k]; w != nil && samePort(w, &is[i]) {
			delete(before, k)
			continue
		}
		if now = append(now, is[i]); len(now) > most {
			return nil, nil, false
		}
	}
	if len(before) > most {
		return nil, nil, false
	}
	for _, w := range before {
		old = append(old, *w)
	}
	return old, now, true
}

// portPlace is where a published port is: no two are at one address.
type portPlace struct {
	protocol weft.Protocol
	port     uint16
	first    netip.Addr // of its addresses; invalid = it is on all
}

func placeOf(p *ingress.Published) portPlace {
	k := portPlace{protocol: p.Protocol, port: p.Port}
	if len(p.IPs) > 0 {
		k.first = slices.MinFunc(p.IPs, netip.Addr.Compare)
	}
	return k
}

// samePort reports whether two published ports have the same elements.
func samePort(a, b *ingress.Published) bool {
	return a.Protocol == b.Protocol && a.Port == b.Port && a.Target == b.Target && a.Count == b.Count &&
		a.HideClient == b.HideClient && slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Allow, b.Allow) && ingress.SameBackends(a.Backends, b.Backends)
}

// sameHost reports whether two tables differ, in the host's namespace, in their
// published ports alone.
func sameHost(a, b *ingress.Table) bool {
	return a.Ingress.Link == b.Ingress.Link && a.Ingress.Addr == b.Ingress.Addr && a.Ingress.Addr6 == b.Ingress.Addr6 &&
		reflect.DeepEqual(a.Gateway, b.Gateway) && reflect.DeepEqual(a.Underlay, b.Underlay)
}

// sameTable reports whether two tables are one wish.
func sameTable(a, b *ingress.Table) bool {
	if !sameHost(a, b) || !reflect.DeepEqual(a.Ingress, b.Ingress) || !reflect.DeepEqual(a.Router, b.Router) || !reflect.DeepEqual(a.Ends, b.Ends) || len(a.Networks) != len(b.Networks) {
		return false
	}
	for i := range a.Networks {
		edits, ok := ingress.Changes(a.Networks[i].Services, b.Networks[i].Services, 0)
		if !ok || len(edits) > 0 || !a.Networks[i].SameBut(&b.Networks[i]) {
			return false
		}
	}
	old, now, ok := changedPorts(a.Published, b.Published, 0)
	return ok && len(old)+len(now) == 0
}
