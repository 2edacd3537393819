package orchestrator

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// How long a leader may be unheard depends on how far the managers are from each other:
// with 100 ms between them and 5 % loss, one lost packet is a silence of 0.6 s.
const (
	// roundsUnheard round trips may pass without a word of the leader.
	roundsUnheard = 5
	// maxHeartbeat bounds what distance adds, for a site that is slow and not far.
	maxHeartbeat = 3 * time.Second
	// distanceEvery is the time between two looks, distanceFor how long what was
	// measured counts: a follower measures when it stands for election only.
	distanceEvery = time.Second
	distanceFor   = 5 * time.Minute
)

// patience is how long to wait for a word of the leader when the farthest manager is a
// round trip away; at least base.
func patience(base, round time.Duration) time.Duration {
	return max(base, min(roundsUnheard*round, maxHeartbeat))
}

// followDistance keeps Raft's heartbeat and election timeouts in step with what the
// transport measures, until ctx ends. Differences of a fifth are let be.
func (m *Manager) followDistance(ctx context.Context, r *raft.Raft, w *watched) error {
	tick := time.NewTicker(distanceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		c := r.ReloadableConfig()
		want := patience(m.cfg.Timing.Heartbeat, w.farthest(time.Now()))
		if d := want - c.HeartbeatTimeout; d.Abs() <= c.HeartbeatTimeout/5 {
			continue
		}
		c.HeartbeatTimeout, c.ElectionTimeout = want, want
		if err := r.ReloadConfig(c); err != nil {
			return fmt.Errorf("set the timeouts of raft to %s: %w", want, err)
		}
		m.cfg.Log.Info("managers are far apart or near again: a leader may be unheard for another time", "heartbeat", want)
	}
}
