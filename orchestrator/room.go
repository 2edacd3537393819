package orchestrator

import (
	"fmt"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// checkRoom refuses a service that its networks could never hold beside the
// others, so that the caller hears it and not only who looks at the tasks.
// Addresses that rest count as room: they come back. old is the stored spec of
// a service that is edited, nil for a new one: an edit that asks for no more
// than before is not refused.
func (t *term) checkRoom(v *state.Snapshot, id weft.ID, spec, old *weft.ServiceSpec) error {
	networks, err := serviceNetworks(v, spec)
	if err != nil {
		return err
	}
	for _, n := range networks {
		mine := wanted(v, spec, n.ID)
		if old != nil && mine <= wanted(v, old, n.ID) {
			continue
		}
		u := t.alloc.usage(n)
		promised := 0
		for _, s := range v.Services() {
			if s.ID != id {
				promised += wanted(v, &s.Spec, n.ID)
			}
		}
		if mine+promised+u.held <= u.size {
			continue // whoever holds what: there is room
		}
		if others := t.others(v, id, n.ID); mine+others > u.size {
			return fmt.Errorf("service %s: %w", spec.Name, t.explainFull(v, n, fmt.Sprintf(
				"the %d addresses that it asks for beside the %d promised to others", mine, others)))
		}
	}
	return nil
}

// wanted is how many addresses a service takes on a network: one per task and
// its own. A global service is counted at the nodes that are there.
func wanted(v *state.Snapshot, spec *weft.ServiceSpec, network weft.ID) int {
	on := false
	for _, n := range spec.Networks {
		on = on || n.Network == network
	}
	if in, ok := v.Ingress(); ok && in.ID == network {
		on = spec.HasIngressPorts()
	}
	if !on {
		return 0
	}
	n := int(spec.Replicas)
	if spec.Mode == weft.ModeGlobal {
		n = globalTasks(v, spec)
	}
	if spec.EndpointMode == weft.EndpointVIP {
		n++
	}
	return n
}

func globalTasks(v *state.Snapshot, spec *weft.ServiceSpec) int {
	constraints, err := weft.ParseConstraints(spec.Constraints)
	if err != nil {
		return 0
	}
	n := 0
	for _, node := range v.Nodes() {
		if node.Status.State == weft.NodeReady && node.Spec.Availability == weft.AvailabilityActive && constraints.Match(&node) {
			n++
		}
	}
	return n
}

// others is how many addresses of a network all but one service hold or are
// promised, whichever is more, for each of them. Tasks of removed services are
// about to give theirs back.
func (t *term) others(v *state.Snapshot, but, network weft.ID) int {
	held := t.alloc.heldBy(v, network)
	sum := 0
	for _, s := range v.Services() {
		if s.ID != but {
			sum += max(wanted(v, &s.Spec, network), held[s.ID])
		}
	}
	for _, n := range v.Nodes() {
		sum += held[n.ID]
	}
	return sum
}

// heldBy counts the addresses held on a network by service (its own and its
// tasks') and by node.
func (a *allocator) heldBy(v *state.Snapshot, network weft.ID) map[weft.ID]int {
	out := map[weft.ID]int{}
	a.mu.Lock()
	defer a.mu.Unlock()
	for owner, list := range a.held {
		for _, h := range list {
			if h.Network != network {
				continue
			}
			id := owner
			if t, ok := v.Task(owner); ok {
				id = t.Service
			}
			out[id]++
		}
	}
	return out
}

// usage is that of a network's subnet.
func (a *allocator) usage(n weft.Network) occupancy {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.spaceLocked(n).usage()
}
