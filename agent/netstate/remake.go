package netstate

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// take brings the endpoints of cells up to date. Lists that were given out stay as
// they were.
func (d *deriver) take(t *touched) {
	d.endpoints = nil // of a whole derivation alone
	for _, p := range t.removed {
		of := d.byService[p.network]
		of[p.Service] = slices.DeleteFunc(slices.Clone(of[p.Service]), func(e endpoint) bool { return e.Task == p.Task && e.Addr == p.Addr })
		if len(of[p.Service]) == 0 {
			delete(of, p.Service)
		}
	}
	for _, p := range t.added {
		of := d.byService[p.network]
		if of == nil {
			of = map[weft.ID][]endpoint{}
			d.byService[p.network] = of
		}
		of[p.Service] = append(slices.Clip(of[p.Service]), p.endpoint)
		slices.SortFunc(of[p.Service], byTask)
	}
}

func byTask(a, b endpoint) int { return cmp.Or(cmp.Compare(a.Task, b.Task), a.Addr.Compare(b.Addr)) }

// remade is the Output of the present input: of the last one, with what a change
// touched made again. was are the services of the last input.
func (d *Deriver) remade(t *touched, was []Service) Output {
	out := d.out
	out.Overlay.Networks = maps.Clone(out.Overlay.Networks)
	out.Ingress.Networks = slices.Clone(out.Ingress.Networks)
	out.Names.Networks = maps.Clone(out.Names.Networks)
	at := -1 // of n among those that are carried
	for _, n := range d.d.in.Networks {
		if !d.d.carried(n) {
			continue
		}
		at++
		some := t.on(n)
		if len(some) == 0 && !t.local[n.ID] {
			continue
		}
		out.Overlay.Networks[n.VNI] = d.remadeOverlay(n, t, some, was)
		out.Ingress.Networks[at] = d.remadeBalanced(n, out.Ingress.Networks[at], t, some)
		if n.Spec.Ingress {
			d.d.mesh = remake(d.d.mesh, func(i int) weft.ID { return d.d.mesh[i].Service }, some, ofServices(d.d, func(s *Service) []ingress.Published {
				return d.d.serviceInMesh(n, s)
			}))
			if t.local[n.ID] {
				out.Ingress.Ingress.Tasks = d.d.entryTasks(n)
			}
			continue
		}
		out.Names.Networks[n.ID] = d.remadeNames(n, out.Names.Networks[n.ID], some)
	}
	out.Ingress.Published = d.remadePublished(t)
	if t.anyLocal {
		if g := d.d.gateway(); !reflect.DeepEqual(g, out.Ingress.Gateway) {
			out.Ingress.Gateway = g
		}
	}
	if t.anyLocal || len(t.services) > 0 {
		if ends := d.d.ends(); !reflect.DeepEqual(ends, out.Ingress.Ends) {
			out.Ingress.Ends = ends
		}
	}
	return out
}

// on are the services whose part of a network is touched, in order. The mesh has
// ports of services that say nothing else of its network.
func (t *touched) on(n weft.Network) []weft.ID {
	ids := map[weft.ID]bool{}
	for c := range t.cells {
		if c.network == n.ID {
			ids[c.service] = true
		}
	}
	if n.Spec.Ingress {
		maps.Copy(ids, t.services)
	}
	return slices.Sorted(maps.Keys(ids))
}

// remake is a list whose elements are of owners in the order of ids, with those of
// some owners, in order, made anew by of. Lists that are empty are nil.
func remake[T any](list []T, owner func(i int) weft.ID, some []weft.ID, of func(weft.ID) []T) []T {
	out := make([]T, 0, len(list)+len(some))
	from := 0
	for _, id := range some {
		to := from
		for to < len(list) && owner(to) < id {
			to++
		}
		out = append(out, list[from:to]...)
		for to < len(list) && owner(to) == id {
			to++
		}
		out = append(out, of(id)...)
		from = to
	}
	if out = append(out, list[from:]...); len(out) == 0 {
		return nil
	}
	return out
}

// ofServices is f of the service that has an id, nothing of one that is gone.
func ofServices[T any](d *deriver, f func(*Service) []T) func(weft.ID) []T {
	return func(id weft.ID) []T {
		if s := d.service(id); s != nil {
			return f(s)
		}
		return nil
	}
}

// edited is a list in order without what drop says and with more, which is in order.
func edited[T any](list []T, drop func(*T) bool, more []T, compare func(a, b T) int) []T {
	out := make([]T, 0, len(list)+len(more))
	for i := range list {
		if drop(&list[i]) {
			continue
		}
		for len(more) > 0 && compare(more[0], list[i]) < 0 {
			out, more = append(out, more[0]), more[1:]
		}
		out = append(out, list[i])
	}
	if out = append(out, more...); len(out) == 0 {
		return nil
	}
	return out
}

func (d *Deriver) remadeOverlay(n weft.Network, t *touched, some []weft.ID, was []Service) vxlan.Network {
	o := d.out.Overlay.Networks[n.VNI]
	if t.local[n.ID] {
		o.Ports = d.d.ports(n)
	}
	gone := map[netip.Addr]bool{}
	var peers []vxlan.Peer
	for _, p := range t.removed {
		if p.network == n.ID && !p.local {
			for _, a := range p.Addrs() {
				gone[a] = true
			}
		}
	}
	for _, p := range t.added {
		if p.network == n.ID && !p.local {
			peers = appendPeers(peers, p.Addrs(), weft.EndpointMAC(p.Task, p.Addr), p.vtep)
		}
	}
	if len(gone)+len(peers) > 0 {
		d.d.setWays(n, peers, o.MTU)
		slices.SortFunc(peers, byPeer)
		o.Peers = edited(o.Peers, func(p *vxlan.Peer) bool { return gone[p.Addr] }, peers, byPeer)
	}
	before := deriver{in: Input{Services: was}}
	clear(gone)
	var vips []vxlan.VIP
	for _, id := range some {
		if s := before.service(id); s != nil {
			for _, v := range s.VIPs {
				if v.Network == n.ID {
					for _, a := range bare(v.Addrs()) {
						gone[a] = true
					}
				}
			}
		}
		if s := d.d.service(id); s != nil {
			vips = append(vips, d.d.vips(n, s, o.MTU)...)
		}
	}
	if len(gone)+len(vips) > 0 {
		slices.SortFunc(vips, byVIP)
		o.VIPs = edited(o.VIPs, func(v *vxlan.VIP) bool { return gone[v.Addr] }, vips, byVIP)
	}
	return o
}

func (d *Deriver) remadeBalanced(n weft.Network, b ingress.Network, t *touched, some []weft.ID) ingress.Network {
	if t.local[n.ID] {
		d.d.localEnds(n, &b)
	}
	last := b.Services
	b.Services = remake(last, func(i int) weft.ID { return last[i].ID }, some, ofServices(d.d, func(s *Service) []ingress.Service {
		return d.d.balancedService(n, s)
	}))
	return b
}

func (d *Deriver) remadeNames(n weft.Network, nn dns.Network, some []weft.ID) dns.Network {
	ids := d.links.names[n.ID]
	owner := func(i int) weft.ID { return ids[i] }
	nn.Services = remake(nn.Services, owner, some, ofServices(d.d, func(s *Service) []dns.Service { return d.d.serviceNames(n, s) }))
	d.links.names[n.ID] = remake(ids, owner, some, ofServices(d.d, func(s *Service) []weft.ID {
		if !s.isOn(n.ID) {
			return nil
		}
		return []weft.ID{s.ID}
	}))
	return nn
}

// isOn reports whether the service has names on a network.
func (s *Service) isOn(network weft.ID) bool {
	return slices.ContainsFunc(s.Networks, func(t weft.NetworkTarget) bool { return t.Network == network })
}

// remadePublished are the published ports, of which those of mode host are made
// again each time: they may stand in the way of any other.
func (d *Deriver) remadePublished(t *touched) []ingress.Published {
	hadHost := d.links.hasHost
	d.links.hasHost = d.d.hasHostPorts()
	if hadHost || d.links.hasHost {
		return d.d.published(d.d.mesh)
	}
	var more []ingress.Published
	ids := map[weft.ID]bool{}
	for c := range t.cells {
		ids[c.service] = true
	}
	maps.Copy(ids, t.services)
	for _, r := range d.d.mesh {
		if ids[r.Service] {
			more = append(more, r)
		}
	}
	slices.SortStableFunc(more, byPort)
	return edited(d.out.Ingress.Published, func(r *ingress.Published) bool { return ids[r.Service] }, more, byPort)
}

func (d *deriver) hasHostPorts() bool {
	return slices.ContainsFunc(d.in.Local, func(t LocalTask) bool { return len(t.Task.Ports) > 0 })
}
