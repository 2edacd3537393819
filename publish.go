package weft

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// PublishMode says which nodes answer on a published port.
type PublishMode uint8

const (
	// PublishIngress: every node, whether it runs a task or not.
	PublishIngress PublishMode = iota
	// PublishHost: each node that runs a task, for that task alone. A node
	// has room for one task that wants the port.
	PublishHost
)

func (m PublishMode) String() string {
	if m == PublishHost {
		return "host"
	}
	return "ingress"
}

// HostAddr is an address of a node's host and the link that has it.
type HostAddr struct {
	Interface string
	Addr      netip.Addr
}

// HeldPort is a port, or a range of them, with who has it.
type HeldPort struct {
	Port PortSpec
	By   string // "service web", "the socket 0.0.0.0:22"
}

// Ports is how many ports p stands for, at least one.
func (p *PortSpec) Ports() int { return max(1, int(p.Count)) }

// LastPublished and LastTarget are the ends of the range; beyond 65535 in a spec
// that Validate refuses.
func (p *PortSpec) LastPublished() int { return int(p.Published) + p.Ports() - 1 }

// LastTarget is the last port in the container.
func (p *PortSpec) LastTarget() int { return int(p.Target) + p.Ports() - 1 }

// String is the published side as people write it: 8080/tcp, 10000-20000/udp.
func (p PortSpec) String() string {
	return rangeText(int(p.Published), p.LastPublished()) + "/" + string(p.Protocol)
}

// TargetText is the side of the container, likewise without the protocol.
func (p *PortSpec) TargetText() string { return rangeText(int(p.Target), p.LastTarget()) }

// PublishedText is the side of the host without the protocol.
func (p *PortSpec) PublishedText() string { return rangeText(int(p.Published), p.LastPublished()) }

func rangeText(first, last int) string {
	if first == last {
		return fmt.Sprint(first)
	}
	return fmt.Sprintf("%d-%d", first, last)
}

// Equal reports whether nothing tells the two apart. A range of one port and a
// port are the same.
func (p PortSpec) Equal(o PortSpec) bool {
	return p.Published == o.Published && p.Ports() == o.Ports() && p.sameOptions(&o) && p.Target == o.Target
}

// sameOptions compares all but the numbers.
func (p *PortSpec) sameOptions(o *PortSpec) bool {
	return p.Name == o.Name && p.Protocol == o.Protocol && p.Mode == o.Mode && p.Interface == o.Interface &&
		slices.Equal(p.IPs, o.IPs) && slices.Equal(p.Allow, o.Allow)
}

// sameWish reports whether a task of one is as good as a task of the other. Who
// may connect to a port of the mesh, and on which addresses, is no task's affair.
func (p PortSpec) sameWish(o PortSpec) bool {
	if p.Mode == PublishIngress && o.Mode == PublishIngress {
		p.IPs, p.Interface, p.Allow = o.IPs, o.Interface, o.Allow
	}
	return p.Equal(o)
}

// IsBound reports whether the port is on some addresses of a host only.
func (p *PortSpec) IsBound() bool { return len(p.IPs) > 0 || p.Interface != "" }

// Clashes reports whether a host cannot have both: they share a port of one
// protocol on an address. Neither may be one that is yet to be chosen.
func (p *PortSpec) Clashes(o *PortSpec) bool {
	return p.Protocol == o.Protocol && int(p.Published) <= o.LastPublished() && int(o.Published) <= p.LastPublished() && p.Meets(o)
}

// Meets reports whether the two may be bound to one address. Which addresses an
// interface has differs from node to node and in time, so it may have any but
// the loopback's, which is told from others.
func (p *PortSpec) Meets(o *PortSpec) bool {
	switch {
	case !p.IsBound() || !o.IsBound():
		return true
	case p.Interface != "" && o.Interface != "":
		return p.Interface == o.Interface
	case p.Interface != "":
		return mayHave(p.Interface, o.IPs)
	case o.Interface != "":
		return mayHave(o.Interface, p.IPs)
	}
	return slices.ContainsFunc(p.IPs, func(a netip.Addr) bool { return slices.Contains(o.IPs, a) })
}

func mayHave(link string, addrs []netip.Addr) bool {
	return slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !a.IsLoopback() || link == "lo" })
}

// ExpandPorts is the list in which each range of published ports stands as single
// ports, as Docker's clients write it. Ports that are yet to be chosen stay as
// they are, and so does a range that goes beyond the last port there is.
func ExpandPorts(ports []PortSpec) []PortSpec {
	out := make([]PortSpec, 0, len(ports))
	for _, p := range ports {
		if p.Ports() == 1 || p.Published == 0 || p.LastPublished() > maxPort || p.LastTarget() > maxPort {
			out = append(out, p)
			continue
		}
		for i := range p.Ports() {
			q := p
			q.Count = 0
			q.Target += uint16(i)
			q.Published += uint16(i)
			out = append(out, q)
		}
	}
	return out
}

// JoinPorts is the inverse of ExpandPorts: neighbours that differ in their numbers
// only become one range, whatever their order. A range stands where the first of
// its ports stood. Ports that are yet to be chosen stay single: what one of them
// gets must not depend on the others. The result has no Count of 1.
func JoinPorts(ports []PortSpec) []PortSpec {
	type place struct {
		PortSpec
		at int
	}
	list := make([]place, len(ports))
	for i, p := range ports {
		if p.Count == 1 {
			p.Count = 0
		}
		list[i] = place{p, i}
	}
	slices.SortStableFunc(list, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Mode, b.Mode), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Published, b.Published))
	})
	out := make([]place, 0, len(list))
	for _, p := range list {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if last.Published != 0 && p.Published != 0 && last.sameOptions(&p.PortSpec) &&
				last.LastPublished()+1 == int(p.Published) && last.LastTarget()+1 == int(p.Target) {
				last.Count = uint16(last.Ports() + p.Ports())
				last.at = min(last.at, p.at)
				continue
			}
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b place) int { return cmp.Compare(a.at, b.at) })
	joined := make([]PortSpec, len(out))
	for i := range out {
		joined[i] = out[i].PortSpec
	}
	return joined
}

// PortField is the path of the i-th of ports in Docker's JSON, where ranges stand
// as single ports: the index counts those before it.
func PortField(ports []PortSpec, i int) string {
	n := 0
	for j := range ports[:i] {
		if n++; ports[j].Published != 0 {
			n += ports[j].Ports() - 1
		}
	}
	return fmt.Sprintf("EndpointSpec.Ports[%d]", n)
}

// HasIngressPorts reports whether the routing mesh answers for the service: then
// its tasks have a leg on the ingress network.
func (s *ServiceSpec) HasIngressPorts() bool { return InMesh(s.Ports) }

// InMesh reports whether any of the ports is of mode ingress.
func InMesh(ports []PortSpec) bool {
	return slices.ContainsFunc(ports, func(p PortSpec) bool { return p.Mode == PublishIngress })
}

// HostPorts are the ports in mode host.
func (s *ServiceSpec) HostPorts() []PortSpec {
	var out []PortSpec
	for _, p := range s.Ports {
		if p.Mode == PublishHost {
			out = append(out, p)
		}
	}
	return out
}

func (s *ServiceSpec) validateEndpoint() error {
	if s.EndpointMode > EndpointDNSRR {
		return invalid("EndpointSpec.Mode", "must be vip or dnsrr")
	}
	if s.EndpointMode == EndpointDNSRR && s.HasIngressPorts() {
		return invalid("EndpointSpec.Mode", "dnsrr has no address that the routing mesh could send published ports to: use vip, or publish them in mode host")
	}
	for i := range s.Ports {
		if err := s.Ports[i].validate(PortField(s.Ports, i)); err != nil {
			return err
		}
	}
	return s.checkOverlaps()
}

func (p *PortSpec) validate(field string) error {
	switch {
	case !slices.Contains(protocols(), p.Protocol):
		return invalid(field+".Protocol", "%q: use tcp, udp or sctp", p.Protocol)
	case p.Mode > PublishHost:
		return invalid(field+".PublishMode", "must be ingress or host")
	case p.Target == 0:
		return invalid(field+".TargetPort", "0: must be 1 to 65535")
	case p.LastTarget() > maxPort:
		return invalid(field+".TargetPort", "a range of %d ports from %d on goes beyond %d", p.Ports(), p.Target, maxPort)
	case p.LastPublished() > maxPort:
		return invalid(field+".PublishedPort", "a range of %d ports from %d on goes beyond %d", p.Ports(), p.Published, maxPort)
	case len(p.Name) > maxObjectName || strings.ContainsFunc(p.Name, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return invalid(field+".Name", "%q: at most %d characters, none of them a control character", p.Name, maxObjectName)
	}
	return nil
}

const maxPort = 65535

func protocols() []Protocol { return []Protocol{TCP, UDP, SCTP} }

// checkOverlaps refuses a port that the service publishes twice. What a label says
// is said of a number, so no two of one number can be told apart by addresses.
func (s *ServiceSpec) checkOverlaps() error {
	order := make([]int, 0, len(s.Ports))
	for i := range s.Ports {
		if s.Ports[i].Published != 0 {
			order = append(order, i)
		}
	}
	slices.SortFunc(order, func(i, j int) int {
		a, b := &s.Ports[i], &s.Ports[j]
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Published, b.Published), cmp.Compare(i, j))
	})
	for k := 1; k < len(order); k++ {
		first, second := order[k-1], order[k]
		a, b := &s.Ports[first], &s.Ports[second]
		if a.Protocol == b.Protocol && a.LastPublished() >= int(b.Published) {
			if first > second {
				first, second = second, first
			}
			return invalid(PortField(s.Ports, second)+".PublishedPort", "%d/%s is already published by %s", b.Published, b.Protocol, PortField(s.Ports, first))
		}
	}
	return nil
}
