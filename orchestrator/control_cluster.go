package orchestrator

import (
	"context"
	"fmt"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// minNodeDownAfter is the shortest NodeDownAfter: agents report every second
// or so, and one late report must not move a node's tasks.
const minNodeDownAfter = 2 * time.Second

// Cluster implements wire.Clusters. The tokens are in it; the server strips
// them for callers that are not managers.
func (m *Manager) Cluster(ctx context.Context) (weft.Cluster, error) {
	return read(m, ctx, func(v *state.Snapshot, _ *term) (weft.Cluster, error) {
		c, ok := v.Cluster()
		if !ok {
			return c, fmt.Errorf("cluster object %w", weft.ErrNotFound)
		}
		c.CAKey = nil
		return c, nil
	})
}

// UpdateCluster implements wire.Clusters.
func (m *Manager) UpdateCluster(ctx context.Context, index uint64, u weft.ClusterUpdate) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.updateCluster(ctx, index, u)
	})
	return err
}

func (t *term) updateCluster(ctx context.Context, index uint64, u weft.ClusterUpdate) error {
	c, ok := t.store.View().Cluster()
	if !ok {
		return fmt.Errorf("cluster object %w", weft.ErrNotFound)
	}
	switch {
	case c.Meta.Index != index:
		return fmt.Errorf("update cluster: it was read at %d and has changed at %d: %w", index, c.Meta.Index, weft.ErrOutOfSequence)
	case u.Spec.TaskHistory < 0:
		return fmt.Errorf("update cluster: Orchestration.TaskHistoryRetentionLimit: %d is negative: %w", u.Spec.TaskHistory, weft.ErrInvalid)
	case u.Spec.NodeDownAfter < minNodeDownAfter:
		return fmt.Errorf("update cluster: Dispatcher.HeartbeatPeriod: %s is below %s: %w", u.Spec.NodeDownAfter, minNodeDownAfter, weft.ErrInvalid)
	}
	c.Spec = u.Spec
	if u.RotateKeys {
		now := time.Now()
		if why := keysUnsettled(t.store.View(), c, now); why != "" {
			return fmt.Errorf("rotate the keys of encrypted networks: %s: %w", why, weft.ErrConflict)
		}
		nextEpoch(&c, now)
		// A change of gossip's keys that is under way is new enough.
		if len(c.GossipReads) == 0 {
			if err := t.gossipStep(t.store.View(), now).begin(&c); err != nil {
				return fmt.Errorf("rotate the keys of gossip: %w", err)
			}
		}
	}
	for _, r := range []struct {
		asked bool
		token *string
	}{{u.RotateWorker, &c.Tokens.Worker}, {u.RotateManager, &c.Tokens.Manager}} {
		if !r.asked {
			continue
		}
		token, err := t.m.cfg.CA.NewToken(c)
		if err != nil {
			return fmt.Errorf("update cluster: draw join token: %w", err)
		}
		*r.token = token
	}
	if err := t.prop.one(ctx, []state.Change{{Cluster: &c}}); err != nil {
		return fmt.Errorf("update cluster: %w", err)
	}
	return nil
}
