package schedule

import (
	"cmp"
	"fmt"

	"github.com/weftnet/weft"
)

// fixedPorts are the ports in mode host that every task of a group wants on its
// node: with one of them a node has room for one task.
func fixedPorts(spec *weft.ServiceSpec) []weft.PortSpec {
	var out []weft.PortSpec
	for _, p := range spec.Ports {
		if p.Mode == weft.PublishHost && p.Published != 0 {
			out = append(out, p)
		}
	}
	return out
}

func (l *leaf) name() string { return cmp.Or(l.node.Description.Hostname, string(l.node.ID)) }

// portsFree reports whether a task of the group at hand finds its ports on the
// leaf, and notes who has the first that it does not.
func (s *scheduler) portsFree(l *leaf, no *refusals) bool {
	if len(s.ports) == 0 {
		return true
	}
	for _, list := range [][]weft.HeldPort{l.node.HostPorts(), l.held, l.taken} {
		for i := range list {
			for k := range s.ports {
				if list[i].Port.Clashes(&s.ports[k]) {
					no.inUse(l, &s.ports[k], list[i].By)
					return false
				}
			}
		}
	}
	return true
}

// takePorts books what a task placed on the leaf takes.
func (s *scheduler) takePorts(l *leaf, g *Group) {
	for _, p := range s.ports {
		l.taken = append(l.taken, weft.HeldPort{Port: p, By: "service " + g.Spec.Name})
	}
}

func (r *refusals) inUse(l *leaf, p *weft.PortSpec, by string) {
	r.ports++
	if r.port == "" {
		r.port = fmt.Sprintf("port %s (mode host) is in use on %s by %s", p, l.name(), by)
	}
}
