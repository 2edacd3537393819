package orchestrator

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// reachableFor is how long a manager counts as reachable after its last answer
// to the leader's heartbeats, which come ten times per heartbeat timeout.
const reachableFor = 3 * time.Second

// Nodes implements wire.Nodes. Status.Seen and the manager's part are from the
// leader's memory.
func (m *Manager) Nodes(ctx context.Context) ([]weft.Node, error) {
	return read(m, ctx, func(v *state.Snapshot, t *term) ([]weft.Node, error) {
		nodes := v.Nodes()
		networks := v.Networks()
		for i := range nodes {
			t.decorate(&nodes[i], time.Now())
			refuseNetworks(&nodes[i], networks)
		}
		warnPorts(v, nodes)
		return nodes, nil
	})
}

// refuseNetworks says in a node's message which networks its host leaves no room
// for.
func refuseNetworks(n *weft.Node, networks []weft.Network) {
	if n.Status.State != weft.NodeReady || n.Status.Message != "" {
		return
	}
	var refused []string
	for i := range networks {
		if used, ok := n.Conflict(&networks[i]); ok {
			refused = append(refused, fmt.Sprintf("network %s (%s) is refused here: it overlaps %s in use on the host",
				networks[i].Spec.Name, networks[i].Spec.Subnets[0].Prefix, used))
		}
	}
	n.Status.Message = strings.Join(refused, "; ")
}

func (t *term) decorate(n *weft.Node, now time.Time) {
	if seen := t.live.when(n.ID); !seen.After(now) { // a grace is not a sign
		n.Status.Seen = seen
	}
	if n.Manager == nil {
		return
	}
	s := *n.Manager
	s.Leader = n.ID == t.m.cfg.Node
	s.Reachable = s.Leader || now.Sub(t.m.peers.progress(raft.ServerID(n.ID)).heard) < reachableFor
	n.Manager = &s
}

// UpdateNode implements wire.Nodes.
func (m *Manager) UpdateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.updateNode(ctx, id, index, spec)
	})
	return err
}

func (t *term) updateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error {
	n, ok := t.store.View().Node(id)
	if !ok {
		return fmt.Errorf("node %s %w", id, weft.ErrNotFound)
	}
	if n.Meta.Index != index {
		return fmt.Errorf("update node %s: it was read at %d and has changed at %d: %w", nodeName(n), index, n.Meta.Index, weft.ErrOutOfSequence)
	}
	if spec.Role != n.Spec.Role {
		return fmt.Errorf("update node %s: Role: a %s cannot become a %s yet; remove the node and join it again with the other token: %w", nodeName(n), n.Spec.Role, spec.Role, weft.ErrUnsupported)
	}
	if spec.Availability > weft.AvailabilityDrain {
		return fmt.Errorf("update node %s: Availability: %d is not active, pause or drain: %w", nodeName(n), spec.Availability, weft.ErrInvalid)
	}
	n.Spec = spec
	if err := t.prop.one(ctx, []state.Change{{Node: &n}}); err != nil {
		return fmt.Errorf("update node %s: %w", nodeName(n), err)
	}
	return nil
}

// RemoveNode implements wire.Nodes.
func (m *Manager) RemoveNode(ctx context.Context, id weft.ID, force bool) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.removeNode(ctx, id, force)
	})
	return err
}

func (t *term) removeNode(ctx context.Context, id weft.ID, force bool) error {
	n, ok := t.store.View().Node(id)
	if !ok {
		return fmt.Errorf("node %s %w", id, weft.ErrNotFound)
	}
	t.decorate(&n, time.Now())
	switch {
	case n.Manager != nil && n.Manager.Leader:
		return fmt.Errorf("remove node %s: it leads the cluster; let it leave instead ('weft swarm leave' there): %w", nodeName(n), weft.ErrConflict)
	case n.Manager != nil && n.Manager.Reachable:
		return fmt.Errorf("remove node %s: it is a manager and reachable; let it leave first ('weft swarm leave' there): %w", nodeName(n), weft.ErrConflict)
	case n.Manager != nil && !force:
		return fmt.Errorf("remove node %s: it is a manager that did not leave; use force if it is lost for good: %w", nodeName(n), weft.ErrConflict)
	case n.Status.State != weft.NodeDown && !force:
		return fmt.Errorf("remove node %s: it is %s and not down; drain it and let it leave first, or use force: %w", nodeName(n), n.Status.State, weft.ErrConflict)
	}
	if err := t.prop.one(ctx, []state.Change{{Delete: &state.Ref{Kind: state.KindNode, ID: id}}}); err != nil {
		return fmt.Errorf("remove node %s: %w", nodeName(n), err)
	}
	return nil
}
