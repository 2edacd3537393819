package agent

import (
	"fmt"
	"log/slog"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// boundPorts logs what the host's processes bind although this node publishes it: a
// port is refused to a service that somebody has, not to a process that comes
// later. Each is said once, until it has ended.
type boundPorts struct {
	log  *slog.Logger
	said []string
}

// look compares with what the host listens on, and its addresses.
func (b *boundPorts) look(m *model, listeners []weft.Listener, addrs []weft.HostAddr) {
	now := m.bound(listeners, addrs)
	for _, text := range now {
		if !slices.Contains(b.said, text) {
			b.log.Warn("a process of the host has bound a published port: what comes to it may be answered by either", "port", text)
		}
	}
	b.said = now
}

// bound are the ports that this node publishes and somebody has, with who.
func (m *model) bound(listeners []weft.Listener, addrs []weft.HostAddr) []string {
	if len(listeners) == 0 {
		return nil
	}
	host := weft.Node{Status: weft.NodeStatus{Listeners: listeners}, Description: weft.NodeDescription{Addrs: addrs}}
	held := host.HostPorts()[1:] // but the cluster port
	var out []string
	note := func(p weft.PortSpec, service weft.ID) {
		if p.Published == 0 || !host.Publishes(&p) {
			return
		}
		for _, h := range held {
			if p.Clashes(&h.Port) {
				out = append(out, fmt.Sprintf("%s of service %s, by %s", h.Port, m.Services[service].Name, h.By))
			}
		}
	}
	for id, s := range m.Services {
		for _, p := range s.Ports {
			if p.Mode == weft.PublishIngress {
				note(p, id)
			}
		}
	}
	for _, t := range m.Tasks {
		for _, p := range t.Ports {
			if t.Desired <= weft.TaskRunning && !t.Status.State.Ended() {
				note(p, t.Service)
			}
		}
	}
	slices.Sort(out)
	return out
}

// sayUnanswered logs the published ports that the balancer does not answer on this node.
// Each is said once, until it is answered or gone. It is called by the pass.
func (p *plane) sayUnanswered(ports []ingress.Unanswered) {
	said := p.hands.unanswered
	p.hands.unanswered = nil
	for i := range ports {
		u := &ports[i]
		port := weft.PortSpec{Protocol: u.Protocol, Published: u.Port, Count: u.Count}.String()
		if len(u.Addrs) > 0 {
			port += fmt.Sprintf(" at %v", u.Addrs)
		}
		key := fmt.Sprint(u.Service, port, u.Reason)
		if p.hands.unanswered == nil {
			p.hands.unanswered = map[string]bool{}
		}
		if p.hands.unanswered[key] = true; !said[key] {
			p.log.Warn("a published port is not answered on this node", weft.KeyService, p.serviceName(u.Service), "port", port, "reason", u.Reason)
		}
	}
}

// serviceName is what people call a service; one that is gone has its id alone.
func (p *plane) serviceName(id weft.ID) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.model; s != nil && s.Services[id].Name != "" {
		return s.Services[id].Name
	}
	return string(id)
}
