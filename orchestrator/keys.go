package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// Our own choices.
const (
	// keyLife is how long a node's key for encrypted networks is the current
	// one. A key that leaks opens no traffic of the past: sessions have keys
	// of their own, changed every two minutes. A day bounds what somebody can
	// do in a node's name.
	keyLife = 24 * time.Hour
	// keySettle is the least time between two changes: by then every node has
	// published its key (1 s), heard of the others', tried a handshake with it
	// (again after 5 s) and read its result (5 s). A change takes the device of
	// the last epoch but one, which must not be in use any more.
	keySettle = 15 * time.Second
)

// rotateKeys begins a new epoch when the current one is old, and returns when
// to look again. Without an encrypted network nothing is changed.
func (t *term) rotateKeys(ctx context.Context, v *state.Snapshot, now time.Time) (time.Time, error) {
	c, ok := v.Cluster()
	if !ok || !slices.ContainsFunc(v.Networks(), func(n weft.Network) bool { return n.Spec.Encrypted() }) {
		return time.Time{}, nil // the next network wakes the loop
	}
	began := c.KeyEpochAt
	if began.IsZero() {
		began = c.Meta.CreatedAt
	}
	if due := began.Add(keyLife); now.Before(due) {
		return due, nil
	}
	if keysUnsettled(v, c, now) != "" {
		return now.Add(keySettle), nil
	}
	nextEpoch(&c, now)
	if err := t.prop.one(ctx, []state.Change{{Cluster: &c}}); err != nil {
		return time.Time{}, fmt.Errorf("rotate the keys of encrypted networks: %w", err)
	}
	t.log.Info("keys of encrypted networks are changed", "epoch", c.KeyEpoch)
	return now.Add(keyLife), nil
}

func nextEpoch(c *weft.Cluster, now time.Time) {
	c.KeyEpoch++
	c.KeyEpochAt = now.UTC().Round(0)
}

// keysUnsettled says why a new epoch must wait; "" = it need not. Nodes that are
// down are not waited for: they meet the others again by the newest keys.
func keysUnsettled(v *state.Snapshot, c weft.Cluster, now time.Time) string {
	if wait := keySettle - now.Sub(c.KeyEpochAt); wait > 0 {
		return fmt.Sprintf("the last change is being taken up: try again in %s", wait.Round(time.Second))
	}
	for _, n := range v.Nodes() {
		has := slices.ContainsFunc(n.Status.Keys, func(k weft.NodeKey) bool { return k.Epoch == c.KeyEpoch })
		if n.Status.State == weft.NodeReady && len(n.Status.Keys) > 0 && !has {
			return fmt.Sprintf("node %s has not yet taken up the last change", nodeName(n))
		}
	}
	return ""
}
