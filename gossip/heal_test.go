package gossip

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealsForGood: what a cut has taken out of sight is back soon after it, and stays:
// suspicions of membership from before the heal must not come true after it.
func TestHealsForGood(t *testing.T) {
	five := testAddr(5).String()
	ways := map[string]func(from, to string) bool{
		"both ways":       func(from, to string) bool { return from == five || to == five },
		"it hears nobody": func(_, to string) bool { return to == five },
		"nobody hears it": func(from, _ string) bool { return from == five },
	}
	for way, cut := range ways {
		for _, length := range []time.Duration{2, 3, 4, 20} {
			length *= time.Second
			t.Run(fmt.Sprintf("%s for %s", way, length), func(t *testing.T) { healsForGood(t, 5, cut, length) })
		}
	}
}

// TestManyHealForGood: the same where many are apart from many, so that there are more
// to make up with than exchanges are allowed.
func TestManyHealForGood(t *testing.T) {
	const members, few = 24, 8
	apart := map[string]bool{}
	for n := 1; n <= few; n++ {
		apart[testAddr(n).String()] = true
	}
	ways := map[string]func(from, to string) bool{
		"both ways":       func(from, to string) bool { return apart[from] != apart[to] },
		"few hear nobody": func(from, to string) bool { return apart[to] && !apart[from] },
	}
	for way, cut := range ways {
		for _, length := range []time.Duration{3, 20} {
			length *= time.Second
			t.Run(fmt.Sprintf("%s for %s", way, length), func(t *testing.T) { healsForGood(t, members, cut, length) })
		}
	}
}

func healsForGood(t *testing.T, members int, cut func(from, to string) bool, length time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, members)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		whole := func() bool { return c.allSee(members) && c.allHaveAll() }
		c.await(5*time.Second, "all tables", whole)
		time.Sleep(3 * time.Second)
		c.f.setCut(cut)
		time.Sleep(length)
		c.f.setCut(nil)
		healed := c.await(15*time.Second, "the cut to heal", whole)
		var gone, last time.Duration
		for began := time.Now(); time.Since(began) < 20*time.Second; time.Sleep(5 * time.Millisecond) {
			if !whole() {
				gone += 5 * time.Millisecond
				last = time.Since(began)
			}
		}
		t.Logf("healed after %v", healed)
		if gone > 0 {
			t.Errorf("after it was whole again, something was out of sight for %v in all, last after %v", gone, last)
		}
	})
}

// TestLateSeed: a node that all have for a seed, and that is late, is not joined by all for
// that: it would be late for having too much to do.
func TestLateSeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const members = 24
		c := newCluster(t, members)
		defer c.close()
		time.Sleep(2 * newcomerFor)
		joins := func() (n uint64) {
			for _, r := range c.nodes {
				n += r.Stats().Joins
			}
			return n
		}
		late := testAddr(1).String()
		var got uint64 // while it is late
		for range 5 {
			c.f.setCut(func(from, to string) bool { return from == late || to == late })
			c.await(5*time.Second, "the late one to be out of sight", func() bool { return c.seenBy(1) == 0 })
			before := joins()
			time.Sleep(2 * tickInterval) // seeds are looked at meanwhile
			got += joins() - before
			c.f.setCut(nil)
			c.await(5*time.Second, "all to see it again", func() bool { return c.allSee(members) })
			time.Sleep(5 * time.Second)
		}
		t.Logf("%d nodes, one late five times: %d joins", members, got)
		if limit := uint64(5 * 5); got > limit {
			t.Errorf("%d joins, want %d at most", got, limit)
		}
	})
}
