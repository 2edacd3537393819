package gossip

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestFarNodes: with 100 ms between nodes, one way, and 5 % loss nobody who is alive
// is taken for dead. Nor with 260 ms, where no probe is answered in time, who is asked to
// probe in the place of another is too late at first, and everybody is suspect again and
// again. (With half of today's times, 130 ms, and 3 probes, not 4, membership took a live
// node for dead once in ten minutes.)
func TestFarNodes(t *testing.T) {
	for _, latency := range []time.Duration{100 * time.Millisecond, 260 * time.Millisecond} {
		t.Run(latency.String(), func(t *testing.T) { farNodes(t, latency) })
	}
}

func farNodes(t *testing.T, latency time.Duration) {
	quiet := time.Minute
	if *Long {
		quiet = 10 * time.Minute
	}
	synctest.Test(t, func(t *testing.T) {
		const nodes = 10
		c := newCluster(t, nodes)
		defer c.close()
		c.f.mu.Lock()
		c.f.loss, c.f.latency = 0.05, latency
		c.f.mu.Unlock()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		c.await(5*time.Second, "all tables", func() bool {
			for n := range c.nodes {
				if !c.allHave(n, n) {
					return false
				}
			}
			return true
		})
		alarms := 0
		for end := time.Now().Add(quiet); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if !c.allSee(nodes) {
				alarms++
			}
		}
		if alarms > 0 {
			t.Errorf("in %v somebody was thought dead for %d hundredths of a second", quiet, alarms)
		}
		c.crash(5)
		d := c.await(20*time.Second, "the dead node's entries to vanish", func() bool { return c.allHave(5, 0) })
		t.Logf("%d nodes %v apart at 5 %% loss: no false alarm in %v; a dead one out of sight after %v", nodes, latency, quiet, d)
	})
}
