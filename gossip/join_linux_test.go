package gossip

import (
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// joinLimit is when nodes that begin at once must all know each other.
const joinLimit = 5 * time.Second

// TestJoinAtOnce: nodes that begin at the same moment and know one other each, the
// same one, are all seen by all within joinLimit: membership by serf itself, over
// links that lose nothing and links that lose a tenth.
func TestJoinAtOnce(t *testing.T) {
	nodes := 50
	if *Long {
		nodes = 200
	}
	for _, loss := range []float64{0, 0.1} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, 1)
			defer c.close()
			c.f.mu.Lock()
			c.f.loss = loss
			c.f.mu.Unlock()
			before, began := cpuTime(t), time.Now()
			for n := 2; n <= nodes; n++ {
				c.start(n)
			}
			c.await(time.Minute, "their one seed to see all", func() bool { m, _ := c.nodes[1].Members(); return len(m) == nodes })
			seed := time.Since(began)
			c.await(time.Minute, "all to see all", func() bool { return c.allSee(nodes) })
			all, used := time.Since(began), (cpuTime(t)-before)/time.Duration(nodes)
			t.Logf("%d nodes that join one at once, %.0f %% loss: it sees all after %v, all see all after %v; %v of processor time for a node",
				nodes, 100*loss, seed, all, used)
			if all >= joinLimit {
				t.Errorf("want less than %v", joinLimit)
			}
		})
	}
}

// cpuTime is what the process has used.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
