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
	// nearerFor is how long managers must be nearer before less will do: on a lossy link
	// each second measures another distance.
	nearerFor = time.Minute
)

// patience is how long to wait for a word of the leader when the farthest manager is a
// round trip away; at least base.
func patience(base, round time.Duration) time.Duration {
	return max(base, min(roundsUnheard*round, maxHeartbeat))
}

// leash is how long a leader may be unheard now. It grows at once, and shrinks to the
// longest that was wanted in nearerFor. Differences of a fifth are let be.
type leash struct {
	is    time.Duration
	since time.Time     // of when less has been wanted, if low > 0
	low   time.Duration // the longest since then
}

// follow takes what is wanted at a moment, and says whether is has changed.
func (l *leash) follow(want time.Duration, now time.Time) bool {
	switch {
	case want > l.is+l.is/5:
		l.is, l.low = want, 0
		return true
	case want >= l.is-l.is/5:
		l.low = 0
	case l.low == 0:
		l.since, l.low = now, want
	default:
		l.low = max(l.low, want)
		if now.Sub(l.since) >= nearerFor {
			l.is, l.low = l.low, 0
			return true
		}
	}
	return false
}

// followDistance keeps Raft's heartbeat and election timeouts in step with what the
// transport measures, until ctx ends.
func (m *Manager) followDistance(ctx context.Context, r *raft.Raft, w *watched) error {
	tick := time.NewTicker(distanceEvery)
	defer tick.Stop()
	l := leash{is: r.ReloadableConfig().HeartbeatTimeout}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := time.Now()
		if !l.follow(patience(m.cfg.Timing.Heartbeat, w.farthest(now)), now) {
			continue
		}
		c := r.ReloadableConfig()
		c.HeartbeatTimeout, c.ElectionTimeout = l.is, l.is
		if err := r.ReloadConfig(c); err != nil {
			return fmt.Errorf("set the timeouts of raft to %s: %w", l.is, err)
		}
		m.cfg.Log.Info("managers are far apart or near again: a leader may be unheard for another time", "heartbeat", l.is)
	}
}
