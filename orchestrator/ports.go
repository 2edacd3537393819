package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/state"
)

// Published ports are chosen and judged here, from a view without memory. Ports of
// mode ingress belong to the cluster and are settled when a service is edited;
// those of mode host belong to a node and go with the task that is placed there.

// choosePorts fills in the published ports of a service. old is the stored version
// on an update (its choices stay where they can), else nil.
func choosePorts(v *state.Snapshot, c weft.Cluster, spec *weft.ServiceSpec, old *weft.Service) ([]weft.PortSpec, error) {
	if len(spec.Ports) == 0 {
		return nil, nil
	}
	if err := checkBound(v, spec, old); err != nil {
		return nil, err
	}
	// What the mesh must keep off, and what a port in mode host must: others in
	// mode host are a matter of nodes.
	others := otherServices(v, old)
	all, err := portsInUse(v, c, others, old)
	if err != nil {
		return nil, err
	}
	mesh := all // needed only if a port is of mode host
	if len(spec.HostPorts()) > 0 {
		if mesh, err = meshPorts(c, others); err != nil {
			return nil, err
		}
	}
	out := append([]weft.PortSpec(nil), spec.Ports...)
	me := "service " + spec.Name
	kept := keeper{old: old}
	refuse := func(i int, err error) error {
		return fmt.Errorf("service %s: %s.PublishedPort: %w", spec.Name, weft.PortField(spec.Ports, i), err)
	}
	for i, p := range out { // asked ones first, so that no choice takes them
		if p.Mode == weft.PublishHost {
			if p.Published != 0 {
				if err := mesh.Take(p, me); err != nil {
					return nil, refuse(i, err)
				}
				if err := all.Hold(p, me); err != nil {
					return nil, refuse(i, err)
				}
			}
			continue
		}
		if p.Published == 0 {
			out[i].Published = kept.port(p)
		}
		if out[i].Published == 0 {
			continue
		}
		if err := all.Take(out[i], me); err != nil {
			if p.Published == 0 {
				out[i].Published = 0 // what was chosen is not to be had any more: choose anew
				continue
			}
			return nil, refuse(i, err)
		}
	}
	for _, run := range runs(out) {
		if err := pick(all, out, run, me); err != nil {
			return nil, refuse(run[0], err)
		}
	}
	return out, nil
}

// runs are the ports of the mesh that are yet to be chosen, neighbouring targets
// together: they get neighbouring ports, so that they are one rule.
func runs(ports []weft.PortSpec) [][]int {
	var open []int
	for i := range ports {
		if ports[i].Published == 0 && ports[i].Mode == weft.PublishIngress {
			open = append(open, i)
		}
	}
	slices.SortStableFunc(open, func(i, j int) int {
		return cmp.Or(cmp.Compare(ports[i].Protocol, ports[j].Protocol), cmp.Compare(ports[i].Target, ports[j].Target))
	})
	var out [][]int
	for _, i := range open {
		if n := len(out); n > 0 {
			last := &ports[out[n-1][len(out[n-1])-1]]
			next := weft.JoinPorts([]weft.PortSpec{numbered(*last, 1), numbered(ports[i], 1+last.Ports())})
			if len(next) == 1 {
				out[n-1] = append(out[n-1], i)
				continue
			}
		}
		out = append(out, []int{i})
	}
	return out
}

func numbered(p weft.PortSpec, published int) weft.PortSpec {
	p.Published = uint16(published)
	return p
}

// pick chooses the published ports of one run: in a row, or else each by itself.
func pick(ports *ipam.Ports, list []weft.PortSpec, run []int, me string) error {
	whole := list[run[0]]
	n := 0
	for _, i := range run {
		n += list[i].Ports()
	}
	whole.Count = uint16(n)
	if first, err := ports.Pick(whole, me); err == nil || len(run) == 1 {
		for _, i := range run {
			list[i].Published = first
			first += uint16(list[i].Ports())
		}
		return err
	}
	for _, i := range run {
		var err error
		if list[i].Published, err = ports.Pick(list[i], me); err != nil {
			return err
		}
	}
	return nil
}

// keeper finds what the stored version of a service had chosen; each choice is
// kept once.
type keeper struct {
	old  *weft.Service
	used map[int]bool
}

func (k *keeper) port(p weft.PortSpec) uint16 {
	if k.old == nil {
		return 0
	}
	for i, o := range k.old.Spec.Ports {
		same := o.Published == 0 && o.Mode == p.Mode && o.Protocol == p.Protocol && o.Target == p.Target && o.Ports() == p.Ports() && o.Name == p.Name
		if same && i < len(k.old.Ports) && !k.used[i] {
			if k.used == nil {
				k.used = map[int]bool{}
			}
			k.used[i] = true
			return k.old.Ports[i].Published
		}
	}
	return 0
}

// otherServices are all services but one.
func otherServices(v *state.Snapshot, but *weft.Service) []weft.Service {
	return slices.DeleteFunc(v.Services(), func(s weft.Service) bool { return but != nil && s.ID == but.ID })
}

// meshPorts are the ports that no node may give to anything else: weft's own, and
// those in mode ingress of the services.
func meshPorts(c weft.Cluster, services []weft.Service) (*ipam.Ports, error) {
	ports := ipam.NewPorts()
	for _, o := range []weft.PortSpec{
		{Protocol: weft.TCP, Published: weft.ClusterPort}, {Protocol: weft.TCP, Published: weft.GossipPort},
		{Protocol: weft.UDP, Published: weft.GossipPort}, {Protocol: weft.UDP, Published: c.DataPathPort},
	} {
		if err := ports.Hold(o, "weft itself"); err != nil {
			return nil, fmt.Errorf("reserve weft's own ports: %w", err)
		}
	}
	holdServices(ports, services, weft.PublishIngress, "")
	return ports, nil
}

func holdServices(ports *ipam.Ports, services []weft.Service, mode weft.PublishMode, note string) {
	for i := range services {
		if s := &services[i]; len(s.Ports) > 0 {
			holdAll(ports, s.Ports, mode, "service "+s.Spec.Name+note)
		}
	}
}

// holdAll notes the ports of one mode. A record that is not valid, of another
// version's making, holds nothing.
func holdAll(ports *ipam.Ports, list []weft.PortSpec, mode weft.PublishMode, by string) {
	for _, p := range list {
		if p.Mode == mode && p.Published != 0 {
			_ = ports.Hold(p, by) //nolint:errcheck // see above
		}
	}
}

// portsInUse are all of the cluster: meshPorts, ports in mode host, and what the
// nodes need for themselves or have reported; without those of the service that is
// edited.
func portsInUse(v *state.Snapshot, c weft.Cluster, others []weft.Service, but *weft.Service) (*ipam.Ports, error) {
	ports, err := meshPorts(c, others)
	if err != nil {
		return nil, err
	}
	holdServices(ports, others, weft.PublishHost, " (mode host)")
	for _, t := range v.TasksWithPorts("") {
		// Those of the service itself make way, and so do those that are
		// ending: they take no new connections.
		if t.Desired > weft.TaskRunning || but != nil && t.Service == but.ID {
			continue
		}
		svc, _ := v.Service(t.Service)
		holdAll(ports, t.Ports, weft.PublishHost, fmt.Sprintf("task %s (mode host)", t.Name(svc.Spec.Name)))
	}
	// What has come to hold a port of the service since it got it is a warning,
	// and no reason to refuse it another replica.
	var has []weft.PortSpec
	if but != nil {
		has = but.Ports
	}
	for _, n := range v.Nodes() {
		holdNode(ports, &n, has)
	}
	return ports, nil
}

// holdNode notes what a node's host has for itself. What a node that is down has
// reported is old, but its cluster port stays. What clashes with one of but is left
// out.
func holdNode(ports *ipam.Ports, n *weft.Node, but []weft.PortSpec) {
	if state.HasDeparted(n) {
		return
	}
	for i, h := range n.HostPorts() {
		if i == 0 && h.Port.Published == weft.ClusterPort || i > 0 && n.Status.State == weft.NodeDown {
			continue // the usual cluster port is weft's own already
		}
		if slices.ContainsFunc(but, func(p weft.PortSpec) bool {
			return p.Mode == weft.PublishIngress && p.Published != 0 && p.Clashes(&h.Port)
		}) {
			continue
		}
		_ = ports.Hold(h.Port, h.By+" of node "+nodeName(*n)) //nolint:errcheck // a socket of a protocol that cannot be published is in nobody's way
	}
}

// checkBound refuses an address or interface that no node has; what the stored
// version was bound to already stays, for nodes come and go.
func checkBound(v *state.Snapshot, spec *weft.ServiceSpec, old *weft.Service) error {
	var nodes []weft.Node
	for i := range spec.Ports {
		p := &spec.Ports[i]
		if !p.IsBound() || old != nil && slices.ContainsFunc(old.Spec.Ports, func(o weft.PortSpec) bool {
			return slices.Equal(o.IPs, p.IPs) && o.Interface == p.Interface
		}) {
			continue
		}
		if nodes == nil {
			nodes = slices.DeleteFunc(v.Nodes(), func(n weft.Node) bool { return state.HasDeparted(&n) })
		}
		for _, a := range p.IPs {
			if !slices.ContainsFunc(nodes, func(n weft.Node) bool { return n.HasAddr(a) }) {
				return fmt.Errorf("service %s: Labels[%q]: no node has the address %s: %s: %w", spec.Name, spec.PublishLabel(p, weft.PublishIP), a, addrList(nodes), weft.ErrInvalid)
			}
		}
		if p.Interface != "" && !slices.ContainsFunc(nodes, func(n weft.Node) bool { return n.HasLink(p.Interface) }) {
			return fmt.Errorf("service %s: Labels[%q]: no node has an address on an interface %s: %w", spec.Name, spec.PublishLabel(p, weft.PublishInterface), p.Interface, weft.ErrInvalid)
		}
	}
	return nil
}

// addrList is what could be written instead, of as many nodes as fit a sentence.
func addrList(nodes []weft.Node) string {
	const enough = 3
	var out []string
	slices.SortFunc(nodes, func(a, b weft.Node) int { return cmp.Compare(nodeName(a), nodeName(b)) })
	for i := range nodes {
		var own []string
		for _, h := range nodes[i].Description.Addrs {
			own = append(own, h.Addr.String())
		}
		if len(own) > 0 && len(out) < enough {
			out = append(out, nodeName(nodes[i])+" has "+strings.Join(own[:min(enough, len(own))], ", "))
		}
	}
	if len(out) == 0 {
		return "none has told its addresses"
	}
	return strings.Join(out, "; ")
}

// checkWayIn refuses a port in mode host on tasks that the host has no way to.
func checkWayIn(v *state.Snapshot, spec *weft.ServiceSpec) error {
	i := slices.IndexFunc(spec.Ports, func(p weft.PortSpec) bool { return p.Mode == weft.PublishHost })
	if i < 0 || len(spec.Networks) == 0 {
		return nil
	}
	for _, t := range spec.Networks {
		if n, ok := v.Network(t.Network); !ok || !n.Spec.Internal {
			return nil
		}
	}
	return fmt.Errorf("service %s: %s.PublishMode: host needs a way from the host to the task, and all networks of the service are internal: publish in mode ingress, or add a network that is not internal: %w",
		spec.Name, weft.PortField(spec.Ports, i), weft.ErrInvalid)
}

// warnPorts says in the nodes' messages which published ports a process of the host
// has bound since, as what comes to one of them may be answered by either, and which a
// rule of the host's firewall names that they do not pass.
func warnPorts(v *state.Snapshot, nodes []weft.Node) {
	mesh := ipam.NewPorts()
	holdServices(mesh, v.Services(), weft.PublishIngress, "")
	for i := range nodes {
		n := &nodes[i]
		if n.Status.State != weft.NodeReady || len(n.Status.Listeners)+len(n.Description.InputRules) == 0 {
			continue
		}
		own := ipam.NewPorts()
		for _, t := range v.TasksWithPorts(n.ID) {
			s, _ := v.Service(t.Service)
			holdAll(own, t.Ports, weft.PublishHost, "service "+s.Spec.Name+" (mode host)")
		}
		for _, h := range n.HostPorts()[1:] { // but the cluster port
			by, taken := mesh.Holder(h.Port, "")
			if !taken {
				by, taken = own.Holder(h.Port, "")
			}
			if taken && n.Publishes(&by.Port) {
				addMessage(n, fmt.Sprintf("port %s of %s is also held by %s of the host", h.Port, by.By, h.By))
			}
		}
		for _, rule := range n.Description.InputRules {
			by, taken := mesh.Holder(rule.Ports(), "")
			if !taken {
				by, taken = own.Holder(rule.Ports(), "")
			}
			if taken && n.Publishes(&by.Port) {
				addMessage(n, fmt.Sprintf("port %s of %s is named by a rule of %s of the host, which published ports do not pass: say who may ask with the label weft.publish.%d.allow", by.Port, by.By, rule.Chain, by.Port.Published))
			}
		}
	}
}

func addMessage(n *weft.Node, text string) {
	if n.Status.Message != "" {
		text = n.Status.Message + "; " + text
	}
	n.Status.Message = text
}
