package native

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/vxlan"
)

// Our own choices.
const (
	// period is the pause between two checks of a way, and so how long an
	// echo is waited for. periodPerWay stretches it, so that a node makes
	// fifty checks a second at most.
	period       = time.Second
	periodPerWay = 20 * time.Millisecond
	// maxMisses checks in a row without an echo end a proof: packets are lost
	// for up to four periods on a way that begins to drop them. Two would let
	// a loss of 5 % each way end one in two minutes, three one in a quarter of an
	// hour; it costs nothing but the gain.
	maxMisses = 3
	// minHits checks in a row must have their echo for a proof. Each proof that
	// ends doubles them, up to maxHits: a way that comes and goes is left
	// alone. A proof that has held for steady begins anew.
	minHits, maxHits = 3, 48
	steady           = 10 * time.Minute
	// maxSilence is the longest pause between two checks of a way that has
	// never an echo: a node that runs the bridge engine stays one.
	maxSilence = 10 * time.Second
)

// core holds all ways. It is pure: what it needs of the world is passed in. The
// caller serializes.
type core struct {
	draw func() uint64
	pick func(n int) int // one of [0, n)
	ways map[vxlan.NativeWay]*way
}

// way is what is known of one:
//
//	          need echoes in a row
//	unproven ─────────────────────► proven
//	         ◄─────────────────────
//	          maxMisses in a row
type way struct {
	ends   vxlan.NativeEnds
	proven bool
	told   bool // what was last reported
	since  time.Time
	hits   int
	misses int
	need   int // hits that prove it
	due    time.Time
	// open are the probes of the check that is under way, one of a family.
	open []vxlan.NativeProbe
}

func newCore(draw func() uint64, pick func(int) int) *core {
	return &core{draw: draw, pick: pick, ways: map[vxlan.NativeWay]*way{}}
}

// watch replaces the ways. A new one is checked at once.
func (c *core) watch(now time.Time, ways map[vxlan.NativeWay]vxlan.NativeEnds) {
	for k, ends := range ways {
		if c.ways[k] == nil {
			c.ways[k] = &way{need: minHits, due: now, since: now}
		}
		c.ways[k].ends = ends
	}
	maps.DeleteFunc(c.ways, func(k vxlan.NativeWay, _ *way) bool { _, ok := ways[k]; return !ok })
}

// step concludes checks whose time is over and returns the probes of the next
// ones, in the order of ways. echoed is asked of each probe once.
func (c *core) step(now time.Time, echoed func(vxlan.NativeProbe) bool) []vxlan.NativeProbe {
	pause := max(period, time.Duration(len(c.ways))*periodPerWay)
	var out []vxlan.NativeProbe
	for _, k := range slices.SortedFunc(maps.Keys(c.ways), compareWays) {
		w := c.ways[k]
		if now.Before(w.due) {
			continue
		}
		w.conclude(now, echoed)
		w.open = c.check(k, w.ends)
		w.due = now.Add(w.rest(pause))
		out = append(out, w.open...)
	}
	return out
}

// check is a probe of each family that can go, between addresses that chance
// picks: what a segment lets pass of one pair only is not proven for long.
func (c *core) check(k vxlan.NativeWay, ends vxlan.NativeEnds) []vxlan.NativeProbe {
	var out []vxlan.NativeProbe
	for _, is4 := range []bool{true, false} {
		fits := func(all []netip.Addr) (fit []netip.Addr) {
			for _, a := range all {
				if a = a.Unmap(); a.Is4() == is4 && vxlan.NativeFamily(a, k.VTEP) {
					fit = append(fit, a)
				}
			}
			return fit
		}
		from, to := fits(ends.From), fits(ends.To)
		if len(from) > 0 && len(to) > 0 {
			out = append(out, vxlan.NativeProbe{NativeWay: k, From: from[c.pick(len(from))], To: to[c.pick(len(to))], ID: c.draw()})
		}
	}
	return out
}

// conclude counts the check that is over. One of an address that is gone says
// nothing.
func (w *way) conclude(now time.Time, echoed func(vxlan.NativeProbe) bool) {
	if len(w.open) == 0 {
		return
	}
	all := true
	for _, p := range w.open {
		is := echoed(p)
		if !is && !(slices.Contains(w.ends.From, p.From) && slices.Contains(w.ends.To, p.To)) {
			return
		}
		all = all && is
	}
	if !all {
		w.hits, w.misses = 0, w.misses+1
	} else {
		w.hits, w.misses = w.hits+1, 0
	}
	switch {
	case !w.proven && w.hits >= w.need:
		w.proven, w.since = true, now
	case w.proven && w.misses >= maxMisses:
		w.need = min(2*w.need, maxHits)
		if now.Sub(w.since) >= steady {
			w.need = minHits
		}
		w.proven, w.since = false, now
	}
}

// rest is the pause before the next check.
func (w *way) rest(pause time.Duration) time.Duration {
	if w.proven || w.misses <= maxMisses {
		return pause
	}
	return max(pause, min(maxSilence, pause<<min(w.misses-maxMisses, 8)))
}

// change is news of a way.
type change struct {
	way    vxlan.NativeWay
	proven bool
}

// news are the ways that are not as they were last reported. A way that is not
// watched any more is no news.
func (c *core) news() []change {
	var out []change
	for _, k := range slices.SortedFunc(maps.Keys(c.ways), compareWays) {
		if w := c.ways[k]; w.proven != w.told {
			w.told = w.proven
			out = append(out, change{k, w.proven})
		}
	}
	return out
}

// proven are the ways that may be used.
func (c *core) proven() map[vxlan.NativeWay]bool {
	out := map[vxlan.NativeWay]bool{}
	for k, w := range c.ways {
		if w.proven {
			out[k] = true
		}
	}
	return out
}

// next is when step has something to do again; zero without ways.
func (c *core) next() time.Time {
	var at time.Time
	for _, w := range c.ways {
		if at.IsZero() || w.due.Before(at) {
			at = w.due
		}
	}
	return at
}

func compareWays(a, b vxlan.NativeWay) int {
	if a.VNI != b.VNI {
		if a.VNI < b.VNI {
			return -1
		}
		return 1
	}
	return a.VTEP.Compare(b.VTEP)
}
