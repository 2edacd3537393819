package gossip

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestCoreAsksLittleOfTheSilent: 200 members of whom none answers, as where they have no
// processor, are not asked for all their tables again and again.
func TestCoreAsksLittleOfTheSilent(t *testing.T) {
	c, now := newCore(nodeID(3), 1, unproven{}, rand.New(rand.NewPCG(1, 1))), time.Unix(1000, 0)
	var ids []weft.ID
	for n := range 200 {
		ids = append(ids, nodeID(n))
	}
	c.setLive(now, ids)
	for range 10 {
		for second := now.Add(time.Second); ; {
			if next := c.deadline(); next.IsZero() || !next.Before(second) {
				now = second
				break
			} else if now.Before(next) {
				now = next
			}
			c.advance(now)
			c.take()
		}
		c.tick(now)
		c.take()
	}
	if c.counts.wants < 200 || c.counts.wants > 1000 {
		t.Errorf("it has asked %d times in ten seconds, want at least once for each and 1,000 times at most", c.counts.wants)
	}
	// One that gets answers asks for as much again as it is told of.
	c.wanting.got = 100
	if c.wanting.late(0); c.wanting.size < 100 {
		t.Errorf("after 100 answers it asks for %d at a time", c.wanting.size)
	}
}
