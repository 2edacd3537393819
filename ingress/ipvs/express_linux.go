package ipvs

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"time"

	kernel "github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// Our own choices.
const (
	// expressFor is how long after a pass over everything changes may be made
	// without another one: with the five seconds of the agent's timer, what
	// somebody breaks is still mended in ten. Where a pass over everything takes
	// long it is twice that, so that passes leave time for changes.
	expressFor = 4 * time.Second
	// expressMost is how many services may change so: beyond it a whole pass costs
	// little more for each.
	expressMost = 64
)

// drainsAll reports that the service begins or ends to take nothing new.
func drainsAll(x ingress.Edit) bool {
	was, is := x.Was != nil && allDrain(*x.Was), x.Is != nil && allDrain(*x.Is)
	return was != is
}

// applyExpress makes a change of a few services, whose entries it reads first: if one
// is not as it was left, or anything else speaks against it, it reports false and a
// pass over everything follows.
func (e *Engine) applyExpress(t ingress.Table) bool {
	if e.whole.IsZero() || time.Since(e.whole) > max(expressFor, 2*e.took) || len(t.Networks) != len(e.places) {
		return false
	}
	edits := map[string][]ingress.Edit{}
	many := 0
	for _, n := range t.Networks {
		p := e.places[n.NetNS]
		if p == nil || !sameNetwork(p.network, n) {
			return false
		}
		some, ok := ingress.Changes(p.network.Services, n.Services, expressMost)
		if many += len(some); !ok || many > expressMost {
			return false
		}
		if len(some) > 0 {
			edits[n.NetNS] = some
		}
	}
	if many == 0 {
		return false // somebody wants to know that all is well
	}
	for _, n := range t.Networks {
		if len(edits[n.NetNS]) == 0 {
			continue
		}
		if !e.expressNetwork(n, e.places[n.NetNS], edits[n.NetNS]) {
			e.whole = time.Time{}
			return false
		}
	}
	return true
}

func sameNetwork(a, b ingress.Network) bool {
	return a.VNI == b.VNI && a.Bridge == b.Bridge && a.IPv6 == b.IPv6 && slices.Equal(a.Ports, b.Ports) &&
		slices.EqualFunc(a.Speakers, b.Speakers, func(x, y ingress.Speaker) bool {
			return bytes.Equal(x.MAC, y.MAC) && slices.Equal(x.Addrs, y.Addrs)
		})
}

// expressNetwork makes the changes of one network, and files them as left.
func (e *Engine) expressNetwork(n ingress.Network, p *place, edits []ingress.Edit) bool {
	var was, is ingress.Network
	for _, x := range edits {
		if x.Was != nil {
			was.Services = append(was.Services, *x.Was)
		}
		if x.Is != nil {
			is.Services = append(is.Services, *x.Is)
		}
	}
	left, err := plan(was)
	if err != nil {
		return false
	}
	want, err := plan(is)
	if err != nil {
		return false
	}
	for k := range want.services {
		// Its number may be that of a service that does not change.
		if _, ours := left.services[k]; !ours && p.state.services[k] != nil {
			return false
		}
	}
	// Neighbours that nobody needs any more go with the next whole pass: of a few
	// services nobody can tell.
	left.neigh = map[netip.Addr]mac{}
	for a := range want.neigh {
		if m, ok := p.state.neigh[a]; ok {
			left.neigh[a] = m
		}
	}
	ops := diff(left, want)
	err = netns.Do(n.NetNS, func() error { return p.asLeft(left, want, ops) })
	if err == nil && slices.ContainsFunc(edits, drainsAll) {
		err = e.divert.Apply(p.diversion(n))
	}
	if err != nil {
		return false
	}
	for k := range left.services {
		delete(p.state.services, k)
	}
	for k, d := range want.services {
		p.state.services[k] = d
	}
	for _, o := range ops {
		switch {
		case o.neigh.IsValid():
			p.state.neigh[o.neigh] = o.mac
		case o.local.IsValid() && o.verb == remove:
			delete(p.state.local, o.local)
		case o.local.IsValid():
			p.state.local[o.local] = true
		}
	}
	p.network = n
	return true
}

// errOther says that something is not as it was left.
var errOther = errors.New("not as it was left")

// asLeft makes ops if the services that they are about are as they were left. It
// runs in the namespace.
func (p *place) asLeft(left, want state, ops []op) error {
	h, err := kernel.New("")
	if err != nil {
		return err
	}
	defer h.Close()
	touched := map[key]bool{}
	for _, s := range []state{left, want} {
		for k := range s.services {
			touched[k] = true
		}
	}
	for k := range touched {
		s := &kernel.Service{FWMark: k.mark, AddressFamily: unix.AF_INET, SchedName: roundRobin}
		if k.is6 {
			s.AddressFamily = unix.AF_INET6
		}
		have, err := readDests(h, s)
		if errors.Is(err, unix.ESRCH) {
			have, err = nil, nil // no such service
		}
		if err != nil {
			return err
		}
		if !slices.Equal(have, left.services[k]) {
			return errOther
		}
	}
	b := newBatcher(p.family, p.devices)
	defer b.close()
	return b.run(ops)
}
