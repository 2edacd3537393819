package pmtu

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const testPeriod = 5 * time.Second

// wire is a simulated path: what is larger than mtu vanishes, and so does a
// share of the rest; answers take rtt.
type wire struct {
	t        *rapid.T
	p        *path
	now      time.Time
	mtu      int // 0: the peer is away
	loss     int // percent of round trips
	rtt      time.Duration
	inFlight []answer
	sent     int
}

type answer struct {
	at, sent time.Time
	size     int
	search   uint64
}

// run lets d pass in steps of 10 ms.
func (w *wire) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(10 * time.Millisecond) {
		w.inFlight = slices.DeleteFunc(w.inFlight, func(a answer) bool {
			if a.at.After(w.now) {
				return false
			}
			if a.search == w.p.search {
				w.p.answered(w.now, a.size, w.now.Sub(a.sent))
			}
			return true
		})
		for _, size := range w.p.step(w.now, testPeriod) {
			w.sent++
			if size > w.p.cap || size < min(w.p.floor, w.p.cap) {
				w.t.Fatalf("sends %d bytes, with a link of %d and a floor of %d", size, w.p.cap, w.p.floor)
			}
			if size <= w.mtu && rapid.IntRange(0, 99).Draw(w.t, "loss") >= w.loss {
				w.inFlight = append(w.inFlight, answer{w.now.Add(w.rtt), w.now, size, w.p.search})
			}
		}
	}
}

func drawWire(t *rapid.T) *wire {
	w := &wire{t: t, now: time.Unix(1000, 0)}
	w.p = newPath(rapid.Bool().Draw(t, "IPv4"), w.now)
	w.change()
	w.rtt = time.Duration(rapid.SampledFrom([]int{0, 1, 40, 140, 600}).Draw(t, "rtt")) * time.Millisecond
	return w
}

// change makes own link and path others than before.
func (w *wire) change() {
	mtu := rapid.OneOf(rapid.IntRange(w.p.floor, 1600), rapid.IntRange(w.p.floor, 9300), rapid.SampledFrom([]int{9000, 1500, 1420, 1280}))
	w.mtu = mtu.Draw(w.t, "path")
	w.p.setCap(w.now, mtu.Draw(w.t, "link"))
}

// TestSearchFindsThePath: whatever happened before, a path that stays as it is
// and loses nothing is known to the byte, soon; a peer that is away changes
// nothing.
func TestSearchFindsThePath(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWire(t)
		if got := w.p.mtu(); got != min(assumed, w.p.cap) {
			t.Fatalf("%d of a path that nobody answered on, with a link of %d", got, w.p.cap)
		}
		for range rapid.IntRange(0, 3).Draw(t, "changes") {
			w.loss = rapid.SampledFrom([]int{0, 5, 50}).Draw(t, "loss")
			w.run(time.Duration(rapid.IntRange(0, 4000).Draw(t, "ms")) * time.Millisecond)
			w.change()
			if rapid.Bool().Draw(t, "told") {
				w.p.ask(w.now)
			}
		}
		w.loss = 0
		// A check, a search with all refinements, and the check after what
		// loss has spoilt.
		w.run(2*testPeriod + 20*maxPause)
		want := min(w.mtu, w.p.cap)
		if got := w.p.mtu(); got != want {
			t.Fatalf("found %d, want %d (path %d, link %d, floor %d)", got, want, w.mtu, w.p.cap, w.p.floor)
		}
		w.mtu = 0 // away
		w.run(3 * testPeriod)
		if got := w.p.mtu(); got != want {
			t.Fatalf("%d of a peer that is away, was %d", got, want)
		}
	})
}

// TestSearchIsQuick: on a path of 100 ms the right size is used within a second
// of the change that somebody told of, and at a common size.
func TestSearchIsQuick(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWire(t)
		w.mtu, w.rtt = 1500, time.Duration(rapid.IntRange(0, 10).Draw(t, "rtt"))*10*time.Millisecond
		w.p.setCap(w.now, 1500)
		w.run(3 * testPeriod)
		w.mtu = rapid.SampledFrom([]int{1492, 1450, 1420, 1400, 1280}).Draw(t, "narrow")
		w.p.ask(w.now)
		w.run(1200 * time.Millisecond)
		if got := w.p.mtu(); got != w.mtu {
			t.Fatalf("uses %d after 1.2 s, the path has %d", got, w.mtu)
		}
	})
}

// TestSearchIsCheap bounds the packets: one a period where the path is as wide
// as the link, a few where it is not, some tens for a search.
func TestSearchIsCheap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWire(t)
		w.rtt = 10 * time.Millisecond
		w.run(3 * testPeriod)
		w.sent = 0
		w.run(20 * testPeriod)
		limit := 21
		if w.mtu < w.p.cap {
			limit = 21 * (1 + 2*checkTries) // proven once; the link's size and one above, three times
		}
		if w.sent > limit {
			t.Fatalf("%d packets in 20 periods, want at most %d", w.sent, limit)
		}
		w.sent = 0
		w.change()
		w.p.ask(w.now)
		w.run(testPeriod)
		if w.sent > 150 {
			t.Fatalf("%d packets for one search", w.sent)
		}
	})
}

// TestSearchIsNotDriven: a peer cannot ask for a flood.
func TestSearchIsNotDriven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWire(t)
		w.mtu, w.rtt = w.p.cap, 0
		for range 500 {
			w.p.ask(w.now)
			w.run(10 * time.Millisecond)
		}
		if w.sent > 5*4+2 {
			t.Fatalf("%d packets in 5 s of being asked", w.sent)
		}
	})
}
