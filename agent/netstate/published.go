package netstate

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// IsBound reports whether any port that this node may publish is bound to some
// addresses of its host: then Derive needs HostAddrs.
func (in *Input) IsBound() bool {
	isBound := func(p weft.PortSpec) bool { return p.IsBound() }
	return slices.ContainsFunc(in.Services, func(s Service) bool { return slices.ContainsFunc(s.Ports, isBound) }) ||
		slices.ContainsFunc(in.Local, func(t LocalTask) bool { return slices.ContainsFunc(t.Task.Ports, isBound) })
}

// bound are the addresses of this host that a port is bound to; none of a port that
// is on all of them. It reports false when the host has none of them: then the port
// is not published here, which is not to say on all addresses.
func (d *deriver) bound(p *weft.PortSpec) (ips []netip.Addr, here bool) {
	if !p.IsBound() {
		return nil, true
	}
	for _, a := range p.IPs {
		if a.Is4() && a.IsLoopback() || slices.ContainsFunc(d.in.HostAddrs, func(h weft.HostAddr) bool { return h.Addr == a }) {
			ips = append(ips, a)
		}
	}
	if p.Interface != "" {
		for _, h := range d.in.HostAddrs {
			if h.Interface == p.Interface {
				ips = append(ips, h.Addr)
			}
		}
		if p.Interface == "lo" {
			ips = append(ips, netip.AddrFrom4([4]byte{127, 0, 0, 1})) // at ::1 nothing can be answered
		}
		slices.SortFunc(ips, netip.Addr.Compare)
		ips = slices.Compact(ips)
	}
	return ips, len(ips) > 0
}

func (d *deriver) rule(s *Service, p *weft.PortSpec) (ingress.Published, bool) {
	ips, here := d.bound(p)
	r := ingress.Published{
		Service: s.ID, Protocol: p.Protocol, Port: p.Published, Target: p.Target,
		IPs: ips, Allow: p.Allow, HideClient: s.HideClient,
	}
	if p.Ports() > 1 {
		r.Count = uint16(p.Ports())
	}
	return r, here
}

// inMesh are the ports of mode ingress, neighbours as one rule.
func (d *deriver) inMesh(n weft.Network) []ingress.Published {
	var out []ingress.Published
	for i := range d.in.Services {
		out = append(out, d.serviceInMesh(n, &d.in.Services[i])...)
	}
	return out
}

func (d *deriver) serviceInMesh(n weft.Network, s *Service) (out []ingress.Published) {
	if !weft.InMesh(s.Ports) {
		return nil
	}
	backends := d.backends(n.ID, s.ID)
	for _, p := range weft.JoinPorts(s.Ports) {
		if p.Mode != weft.PublishIngress || p.Published == 0 {
			continue
		}
		if r, here := d.rule(s, &p); here {
			r.Backends = backends
			// Between nodes such a network takes its own addresses only.
			r.HideClient = r.HideClient || n.Spec.Encrypted()
			out = append(out, r)
		}
	}
	return out
}

// published adds what this node's tasks publish in mode host, in the order of
// ports. No two rules of the result are about one port of one address: the leader
// gives a port to one holder, and when it goes from one to the other, the tasks of
// mode host have it until they drain.
func (d *deriver) published(mesh []ingress.Published) []ingress.Published {
	var own, draining []ingress.Published
	for _, r := range d.ofTasks() {
		switch {
		case len(r.Backends) == 0 || !r.Backends[0].Draining:
			if !clashesAny(&r, own) {
				own = append(own, r)
			}
		default:
			draining = append(draining, r)
		}
	}
	out := slices.Clone(own)
	for _, r := range mesh {
		out = append(out, without(r, own)...)
	}
	for _, r := range draining {
		if !clashesAny(&r, out) {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, byPort)
	return out
}

func byPort(a, b ingress.Published) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol), slices.CompareFunc(a.IPs, b.IPs, netip.Addr.Compare),
		cmp.Compare(a.Service, b.Service), cmp.Compare(a.Target, b.Target))
}

// ofTasks are the rules of this node's tasks, those that serve first.
func (d *deriver) ofTasks() []ingress.Published {
	var out []ingress.Published
	for _, t := range d.in.Local {
		for _, p := range t.Task.Ports {
			// Its service may be gone already; then nobody says any more
			// that clients are hidden.
			s := Service{ID: t.Task.Service}
			if has := d.service(s.ID); has != nil {
				s = *has
			}
			r, here := d.rule(&s, &p)
			if !here || !t.Gateway.IsValid() || p.Published == 0 {
				continue
			}
			r.Host = true
			if t.State != weft.EndpointStarting {
				r.Backends = []ingress.Backend{{Task: t.Task.ID, Addr: t.Gateway, Addr6: d.twin(&t), Draining: t.State == weft.EndpointDraining}}
			}
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(a, b ingress.Published) int { return cmp.Compare(len(b.Backends), len(a.Backends)) })
	return out
}

// service is a service of the Input; nil = there is none.
func (d *deriver) service(id weft.ID) *Service {
	i, ok := slices.BinarySearchFunc(d.in.Services, id, func(s Service, id weft.ID) int { return cmp.Compare(s.ID, id) })
	if !ok {
		return nil
	}
	return &d.in.Services[i]
}

// twin is the IPv6 address of a task behind the gateway bridge; invalid on a host
// without IPv6.
func (d *deriver) twin(t *LocalTask) netip.Addr {
	if d.in.NoIPv6 {
		return netip.Addr{}
	}
	return weft.GatewayTwin(t.Gateway)
}

// legs are the gateway legs of the tasks that publish ports in mode host, which are
// asked over IPv6 there. A leg has its address before the task takes connections.
func (d *deriver) legs() []ingress.EntryTask {
	var out []ingress.EntryTask
	for i := range d.in.Local {
		t := &d.in.Local[i]
		isHost := func(p weft.PortSpec) bool { return p.Published != 0 }
		if a := d.twin(t); a.IsValid() && slices.ContainsFunc(t.Task.Ports, isHost) {
			out = append(out, ingress.EntryTask{Task: t.Task.ID, NetNS: t.NetNS, Link: weft.GatewayLeg, Addr6: netip.PrefixFrom(a, weft.GatewayPool6().Bits())})
		}
	}
	return out
}

// specOf is where a rule stands, as the leader compares it. Its addresses are all
// there is to tell: an interface is resolved by now.
func specOf(r *ingress.Published) *weft.PortSpec {
	return &weft.PortSpec{Protocol: r.Protocol, Published: r.Port, Target: r.Target, Count: r.Count, IPs: r.IPs}
}

func clash(a, b *ingress.Published) bool {
	if a.Protocol != b.Protocol || int(a.Port)+int(max(a.Count, 1)) <= int(b.Port) || int(b.Port)+int(max(b.Count, 1)) <= int(a.Port) {
		return false
	}
	return specOf(a).Clashes(specOf(b))
}

func clashesAny(r *ingress.Published, list []ingress.Published) bool {
	return slices.ContainsFunc(list, func(o ingress.Published) bool { return clash(r, &o) })
}

// without is a rule but for the ports of others: nothing, or one or more parts.
func without(r ingress.Published, others []ingress.Published) []ingress.Published {
	i := slices.IndexFunc(others, func(o ingress.Published) bool { return clash(&r, &o) })
	if i < 0 {
		return []ingress.Published{r}
	}
	mine, other := specOf(&r), specOf(&others[i])
	var out []ingress.Published
	part := func(first, last int) {
		if n := last - first + 1; n > 0 {
			q := r
			q.Port, q.Target, q.Count = uint16(first), r.Target+uint16(first-int(r.Port)), 0
			if n > 1 {
				q.Count = uint16(n)
			}
			out = append(out, without(q, others[i+1:])...)
		}
	}
	part(int(r.Port), int(other.Published)-1)
	part(other.LastPublished()+1, mine.LastPublished())
	return out
}
