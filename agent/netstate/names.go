package netstate

import (
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
)

// names are the records of the networks on which a task here may ask. The
// ingress network has none: it is the way in, not a place to talk.
func (d *deriver) names() dns.Records {
	out := dns.Records{Networks: map[weft.ID]dns.Network{}}
	for _, n := range d.in.Networks {
		if len(d.local[n.ID]) == 0 || n.Spec.Ingress {
			continue
		}
		nn := dns.Network{Name: n.Spec.Name}
		for _, s := range n.Spec.Subnets {
			nn.Subnets = append(nn.Subnets, s.Prefix)
		}
		for i := range d.in.Services {
			nn.Services = append(nn.Services, d.serviceNames(n, &d.in.Services[i])...)
		}
		out.Networks[n.ID] = nn
	}
	return out
}

// serviceNames are those of a service on a network; none if it is not on it.
func (d *deriver) serviceNames(n weft.Network, s *Service) []dns.Service {
	i := slices.IndexFunc(s.Networks, func(t weft.NetworkTarget) bool { return t.Network == n.ID })
	if i < 0 {
		return nil
	}
	sn := dns.Service{Name: s.Name, Aliases: s.Networks[i].Aliases, Ports: portNames(s.Ports)}
	if s.Mode == weft.EndpointVIP {
		for _, v := range s.VIPs {
			if v.Network == n.ID {
				sn.VIP = append(sn.VIP, bare(v.Addrs())...)
			}
		}
	}
	for _, e := range d.of(n.ID, s.ID) {
		task := weft.Task{ID: e.Task, Slot: e.Slot, Node: e.owner}
		id := weft.ContainerID(e.Task)
		sn.Tasks = append(sn.Tasks, dns.Task{
			Slot: e.Slot, Host: d.hosts[e.owner], Addrs: e.Addrs(), Ready: e.State == weft.EndpointReady,
			Names: []string{task.Name(s.Name), id[:12], id},
		})
	}
	return []dns.Service{sn}
}

// portNames are the ports that SRV questions may ask for by name: those that the
// service's specification names. Their numbers are those inside the tasks.
func portNames(ports []weft.PortSpec) []dns.Port {
	var out []dns.Port
	for _, p := range ports {
		if p.Name != "" {
			out = append(out, dns.Port{Name: p.Name, Protocol: p.Protocol, Port: p.Target})
		}
	}
	return out
}
