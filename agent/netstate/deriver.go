package netstate

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/weftnet/weft"
)

// Deriver is Derive for one Input after the other. What it returns equals what
// Derive returns. Where a few services, endpoints or local tasks have changed, the
// rest is that of the last Output: the very same slices where nothing of a list has
// changed, so that who compares two Outputs has little to do. It keeps its Inputs
// and Outputs, which must not be written any more. The zero value is ready; it is
// not safe for concurrent use.
//
// A part of an Output depends on one service and its endpoints on one network, a
// cell, as long as no address has two claims. So a change is: the cells that differ
// are made again, and lists get what is new at its place. All is made again where
// anything else of the Input differs, and where parts depend on one another: an
// address with two claims, networks that are encrypted or do without encapsulation,
// and a network that this node begins or ceases to carry.
type Deriver struct {
	d     *deriver // of the last Input; its endpoints are not kept
	out   Output
	links links
	// wholes counts how often all was made.
	wholes int
}

// links are what a change needs to know of the last Input.
type links struct {
	// claims count who says of an address that it is his, by network.
	claims map[addrOn]int
	// names are the services of the Output's names, by network, in their order.
	names map[weft.ID][]weft.ID
	// hasHost: a local task has ports of mode host.
	hasHost bool
}

type addrOn struct {
	network weft.ID
	addr    netip.Addr
}

// Derive is the function Derive.
func (d *Deriver) Derive(in Input) Output {
	in = inOrder(in)
	published := publish(in)
	if in.NoIPv6 {
		in = withoutIPv6(in)
	}
	if slices.Equal(published, d.out.Publish) {
		published = d.out.Publish
	}
	if d.d != nil && sameRest(&d.d.in, &in) {
		if out, ok := d.change(in); ok {
			out.Publish = published
			d.out = out
			return out
		}
	}
	d.wholes++
	d.d, d.out = newDeriver(in), Output{}
	d.out = d.d.derive(published)
	d.links = d.d.links(&d.out)
	return d.out
}

// inOrder is an Input whose lists are in the order of ids; those that are already
// are not copied.
func inOrder(in Input) Input {
	in.Networks = sorted(in.Networks, func(n *weft.Network) weft.ID { return n.ID })
	in.Services = sorted(in.Services, func(s *Service) weft.ID { return s.ID })
	in.Nodes = sorted(in.Nodes, func(n *Node) weft.ID { return n.ID })
	in.Local = sorted(in.Local, func(t *LocalTask) weft.ID { return t.Task.ID })
	return in
}

// sorted is list in the order of keys: list itself if it is.
func sorted[T any](list []T, key func(*T) weft.ID) []T {
	isSorted := true
	for i := 1; i < len(list) && isSorted; i++ {
		isSorted = key(&list[i-1]) <= key(&list[i])
	}
	if isSorted {
		return list
	}
	out := slices.Clone(list)
	slices.SortStableFunc(out, func(a, b T) int { return cmp.Compare(key(&a), key(&b)) })
	return out
}

// sameRest reports whether two Inputs in order differ in services, endpoints and
// local tasks at most.
func sameRest(a, b *Input) bool {
	x, y := *a, *b
	x.Services, x.Endpoints, x.Local = nil, nil, nil
	y.Services, y.Endpoints, y.Local = nil, nil, nil
	return reflect.DeepEqual(&x, &y)
}

// cell is a service on a network.
type cell struct{ network, service weft.ID }

// touched is what a change is about.
type touched struct {
	cells    map[cell]bool
	services map[weft.ID]bool // that differ themselves
	// local networks are those of which a local task came, went or changed in more
	// than its state; anyLocal is set of any change of a local task.
	local    map[weft.ID]bool
	anyLocal bool
	// gone and come are the claims of addresses.
	gone, come []addrOn
	// removed and added are endpoints that count.
	removed, added []placed
}

// placed is an endpoint on its network.
type placed struct {
	network weft.ID
	endpoint
}

func (t *touched) endpoint(e placed, list *[]placed, claims *[]addrOn) {
	*list = append(*list, e)
	t.cells[cell{e.network, e.Service}] = true
	for _, a := range e.Addrs() {
		*claims = append(*claims, addrOn{e.network, a.Unmap()})
	}
}

// service notes a service that was, or is.
func (t *touched) service(s *Service, claims *[]addrOn) {
	t.services[s.ID] = true
	for _, v := range s.VIPs {
		t.cells[cell{v.Network, s.ID}] = true
		for _, a := range bare(v.Addrs()) {
			*claims = append(*claims, addrOn{v.Network, a.Unmap()})
		}
	}
	for _, n := range s.Networks {
		t.cells[cell{n.Network, s.ID}] = true
	}
}

// change makes the next Output of the last one; false, and then nothing is changed,
// if all must be made again.
func (d *Deriver) change(in Input) (Output, bool) {
	t := d.differences(&in)
	if len(t.cells)+len(t.services) == 0 && !t.anyLocal {
		d.d.in = in
		return d.out, true
	}
	if !d.isApart(t) || !d.sameCarried(&in, t) {
		return Output{}, false
	}
	for _, c := range t.gone {
		if d.links.claims[c]--; d.links.claims[c] == 0 {
			delete(d.links.claims, c)
		}
	}
	for _, c := range t.come {
		d.links.claims[c]++
	}
	was := d.d.in.Services
	d.d.in = in
	if t.anyLocal {
		d.d.local = localByNetwork(in)
	}
	d.d.take(t)
	return d.remade(t, was), true
}

// differences are what tells in from the last Input.
func (d *Deriver) differences(in *Input) *touched {
	t := &touched{cells: map[cell]bool{}, services: map[weft.ID]bool{}, local: map[weft.ID]bool{}}
	was, is := only(d.d.in.Services, in.Services, func(s *Service) weft.ID { return s.ID }, (*Service).Equal)
	for _, s := range was {
		t.service(s, &t.gone)
	}
	for _, s := range is {
		t.service(s, &t.come)
	}
	had, has := only(d.d.in.Local, in.Local, func(l *LocalTask) weft.ID { return l.Task.ID }, sameLocal)
	before := make(map[weft.ID]*LocalTask, len(had))
	note := func(l *LocalTask, list *[]placed, claims *[]addrOn) {
		t.anyLocal = true
		for _, a := range l.Task.Attachments {
			t.endpoint(placed{a.Network, d.d.localEnd(l, a)}, list, claims)
		}
	}
	for _, l := range had {
		before[l.Task.ID] = l
		note(l, &t.removed, &t.gone)
	}
	turned := make([]*LocalTask, 0, len(had)+len(has))
	for _, l := range has {
		note(l, &t.added, &t.come)
		if was := before[l.Task.ID]; was != nil && sameButState(was, l) {
			delete(before, l.Task.ID) // of one that only gets ready its endpoints alone differ
			continue
		}
		turned = append(turned, l)
	}
	for _, l := range slices.AppendSeq(turned, maps.Values(before)) {
		for _, a := range l.Task.Attachments {
			t.local[a.Network] = true
		}
	}
	gone, come := changedEndpoints(d.d.in.Endpoints, in.Endpoints)
	for _, e := range gone {
		if p, ok := d.counts(e); ok {
			t.endpoint(p, &t.removed, &t.gone)
		}
	}
	for _, e := range come {
		if p, ok := d.counts(e); ok {
			t.endpoint(p, &t.added, &t.come)
		}
	}
	return t
}

// counts is an endpoint of another node as it stands on its network, unless another
// has a better claim to its addresses.
func (d *Deriver) counts(e *weft.OwnedEndpoint) (placed, bool) {
	return placed{e.Network, d.d.remoteEnd(e)}, d.d.isEligible(e)
}

// isApart reports whether no address that a change is about has, or had, another
// claim; those of services of which only endpoints have changed are among them.
func (d *Deriver) isApart(t *touched) bool {
	less := map[addrOn]int{}
	for _, c := range t.gone {
		if d.links.claims[c] != 1 {
			return false
		}
		less[c] = 1
	}
	for c := range t.cells {
		if s := d.d.service(c.service); s != nil && !t.services[c.service] {
			for _, v := range s.VIPs {
				for _, a := range bare(v.Addrs()) {
					if d.links.claims[addrOn{v.Network, a.Unmap()}] != 1 {
						return false
					}
				}
			}
		}
	}
	seen := make(map[addrOn]bool, len(t.come))
	for _, c := range t.come {
		if d.links.claims[c]-less[c] != 0 || seen[c] {
			return false
		}
		seen[c] = true
	}
	return len(less) == len(t.gone)
}

// sameCarried reports whether this node carries the same networks as before, and
// none of those that a change is about is one whose parts depend on one another.
func (d *Deriver) sameCarried(in *Input, t *touched) bool {
	had := map[weft.ID]bool{}
	for id, list := range d.d.local {
		had[id] = len(list) > 0
	}
	has := map[weft.ID]bool{}
	for i := range in.Local {
		for _, a := range in.Local[i].Task.Attachments {
			has[a.Network] = true
		}
	}
	if !maps.Equal(had, has) {
		return false
	}
	about := maps.Clone(t.local)
	for c := range t.cells {
		about[c.network] = true
	}
	meshes := 0
	for _, n := range in.Networks {
		if n.Spec.Ingress {
			meshes++
		}
		isCarried := n.Spec.Ingress || has[n.ID]
		if about[n.ID] && isCarried && (n.Spec.Encrypted() || d.d.takesNative(n) || d.d.carried(n) && d.out.Overlay.Networks[n.VNI].ID != n.ID) {
			return false
		}
	}
	return meshes <= 1
}

// only is what one of two lists, both in the order of keys, has alone, or otherwise
// than the other.
func only[T any](was, is []T, key func(*T) weft.ID, same func(a, b *T) bool) (gone, come []*T) {
	was, is = trimmed(was, is, same)
	for len(was)+len(is) > 0 {
		switch {
		case len(is) == 0 || len(was) > 0 && key(&was[0]) < key(&is[0]):
			gone, was = append(gone, &was[0]), was[1:]
		case len(was) == 0 || key(&is[0]) < key(&was[0]):
			come, is = append(come, &is[0]), is[1:]
		default:
			if !same(&was[0], &is[0]) {
				gone, come = append(gone, &was[0]), append(come, &is[0])
			}
			was, is = was[1:], is[1:]
		}
	}
	return gone, come
}

// trimmed are two lists without what both begin and end with.
func trimmed[T any](a, b []T, same func(x, y *T) bool) (restA, restB []T) {
	if len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) {
		return nil, nil
	}
	for len(a) > 0 && len(b) > 0 && same(&a[0], &b[0]) {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && same(&a[len(a)-1], &b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return a, b
}

// changedEndpoints are the endpoints that only one of two lists has. One that stands
// twice is told as often.
func changedEndpoints(was, is []weft.OwnedEndpoint) (gone, come []*weft.OwnedEndpoint) {
	was, is = trimmed(was, is, func(a, b *weft.OwnedEndpoint) bool { return *a == *b })
	if len(was)+len(is) == 0 {
		return nil, nil
	}
	had := make(map[weft.OwnedEndpoint]int, len(was))
	for i := range was {
		had[was[i]]++
	}
	for i := range is {
		if had[is[i]] > 0 {
			had[is[i]]--
			continue
		}
		come = append(come, &is[i])
	}
	for i := range was {
		if had[was[i]] > 0 {
			had[was[i]]--
			gone = append(gone, &was[i])
		}
	}
	return gone, come
}

// Equal reports whether two services say the same. Lists that are the very same are
// not looked at.
func (s *Service) Equal(o *Service) bool {
	return s.ID == o.ID && s.Name == o.Name && s.Mode == o.Mode && s.HideClient == o.HideClient &&
		sameList(s.VIPs, o.VIPs, func(x, y weft.VIP) bool { return x == y }) && sameList(s.Ports, o.Ports, weft.PortSpec.Equal) &&
		sameList(s.Networks, o.Networks, func(x, y weft.NetworkTarget) bool {
			return x.Network == y.Network && slices.Equal(x.Aliases, y.Aliases)
		})
}

func sameList[T any](a, b []T, same func(x, y T) bool) bool {
	if len(a) != len(b) {
		return false
	}
	return len(a) == 0 || &a[0] == &b[0] || slices.EqualFunc(a, b, same)
}

func sameLocal(a, b *LocalTask) bool { return a.State == b.State && sameButState(a, b) }

// sameButState compares what is derived of a local task.
func sameButState(a, b *LocalTask) bool {
	return a.Task.ID == b.Task.ID && a.Task.Service == b.Task.Service && a.Task.Slot == b.Task.Slot &&
		a.NetNS == b.NetNS && a.Gateway == b.Gateway && sameList(a.Task.Ports, b.Task.Ports, weft.PortSpec.Equal) &&
		sameList(a.Task.Attachments, b.Task.Attachments, func(x, y weft.Attachment) bool { return x == y })
}

// links of a derivation that was made whole.
func (d *deriver) links(out *Output) links {
	l := links{claims: map[addrOn]int{}, names: map[weft.ID][]weft.ID{}, hasHost: d.hasHostPorts()}
	t := touched{cells: map[cell]bool{}, services: map[weft.ID]bool{}}
	for i := range d.in.Services {
		t.service(&d.in.Services[i], &t.come)
	}
	for i := range d.in.Endpoints {
		if e := &d.in.Endpoints[i]; d.isEligible(e) {
			t.endpoint(placed{e.Network, d.remoteEnd(e)}, &t.added, &t.come)
		}
	}
	for i := range d.in.Local {
		for _, a := range d.in.Local[i].Task.Attachments {
			t.endpoint(placed{a.Network, d.localEnd(&d.in.Local[i], a)}, &t.added, &t.come)
		}
	}
	for _, c := range t.come {
		l.claims[c]++
	}
	for _, n := range d.in.Nodes {
		for _, m := range d.in.Networks {
			if !m.Spec.Ingress {
				continue
			}
			at := weft.Attachment{Network: m.ID, Addr: n.IngressAddr, Addr6: n.IngressAddr6}
			for _, p := range at.Addrs() {
				l.claims[addrOn{m.ID, p.Addr().Unmap()}]++
			}
		}
	}
	for id := range out.Names.Networks {
		for i := range d.in.Services {
			if s := &d.in.Services[i]; s.isOn(id) {
				l.names[id] = append(l.names[id], s.ID)
			}
		}
	}
	return l
}
