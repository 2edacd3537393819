//go:build !race

// One goroutine: there is nothing for the race detector to see, and it takes ten
// times as long with it.

package gossip

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestWatchLongWays: ways with a round trip of up to 800 ms are ways, as are nodes that
// need that long to answer, and no more is sent on them than on short ones, by much.
func TestWatchLongWays(t *testing.T) {
	for _, nodes := range []int{10, 30} {
		for _, delay := range []time.Duration{50, 100, 200, 260, 400} {
			delay *= time.Millisecond
			most := 16 // packets a second
			if delay > 200*time.Millisecond {
				most = 10
			}
			t.Run(fmt.Sprintf("%d nodes, %v", nodes, delay), func(t *testing.T) {
				w := newWatchNet(4, nodes, 0.05, delay)
				wrong, learns := 0, delay > 200*time.Millisecond
				w.verdict = func(by, of int) {
					// Few questions go into the time for a verdict, and one in ten has no answer.
					if wrong++; !learns && delay < 400*time.Millisecond || wrong > 10 {
						t.Errorf("node %d takes %d for silent", by, of)
					}
				}
				w.run(10 * time.Second)
				before := w.sent
				wrong, learns = 0, false
				w.run(10 * time.Minute)
				sent := (w.sent - before) / 600 / nodes
				if t.Logf("each node sends %d packets a second; %d times somebody was taken for silent", sent, wrong); sent > most {
					t.Errorf("that is more than %d", most)
				}
			})
		}
	}
}

// TestWatchBrokenPair: two that cannot reach each other believe those who can, and
// do not trouble them for ever.
func TestWatchBrokenPair(t *testing.T) {
	w := newWatchNet(5, 5, 0, 250*time.Microsecond)
	w.run(10 * time.Second)
	before := w.sent
	w.run(time.Minute)
	quiet := w.sent - before
	w.cut = func(from, to int) bool { return from == 0 && to == 1 || from == 1 && to == 0 }
	w.verdict = func(by, of int) { t.Errorf("node %d takes %d for silent, which three others hear", by, of) }
	w.run(time.Minute)
	before = w.sent
	w.run(time.Minute)
	if extra := w.sent - before - quiet; extra > quiet/4 {
		t.Errorf("%d packets a minute, %d more than with all ways", quiet+extra, extra)
	}
}

// TestWatchBrokenWays: a third of a crowd, among them those who watch it, cannot reach a
// member. Nobody who hears it goes by their word for longer than a question takes, and
// most of the time it is in sight of those who do not hear it, too; not where the word of
// one who hears it takes as long as they wait.
func TestWatchBrokenWays(t *testing.T) {
	for _, delay := range []time.Duration{250 * time.Microsecond, 100 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) { brokenWays(t, delay) })
	}
}

func brokenWays(t *testing.T, delay time.Duration) {
	const nodes, of = 30, 15
	w := newWatchNet(8, nodes, 0.02, delay)
	w.run(10 * time.Second)
	apart := func(n int) bool { return n >= of-5 && n < of+5 && n != of }
	w.cut = func(from, to int) bool { return from == of && apart(to) || to == of && apart(from) }
	var hearing, others time.Duration
	const step, length = 10 * time.Millisecond, 5 * time.Minute
	for range length / step {
		w.run(step)
		for _, x := range w.nodes {
			switch {
			case x.n == of || !x.w.isSilent(nodeID(of)):
			case apart(x.n):
				others += step
			default:
				hearing += step
			}
		}
	}
	hearing, others = hearing/(nodes-10), others/9
	t.Logf("in %v it was out of sight of those who hear it for %v each, of the others for %v", length, hearing, others)
	if hearing > length/1000 || delay < patienceMin/2 && others > length/20 {
		t.Error("it was out of sight for too long")
	}
}

// TestWatchPartition: both sides miss each other in time, and see each other again
// soon after.
func TestWatchPartition(t *testing.T) {
	for _, c := range []struct {
		nodes, left int
		limit       time.Duration // many neighbours go at once
	}{
		{7, 3, 1800 * time.Millisecond}, {16, 4, 1800 * time.Millisecond},
		{30, 10, 2200 * time.Millisecond}, {30, 15, 2200 * time.Millisecond}, {50, 5, 3 * time.Second},
	} {
		t.Run(fmt.Sprintf("%d of %d", c.left, c.nodes), func(t *testing.T) { watchPartition(t, c.nodes, c.left, c.limit) })
	}
}

func watchPartition(t *testing.T, nodes, few int, limit time.Duration) {
	w := newWatchNet(6, nodes, 0.1, 250*time.Microsecond)
	w.run(5 * time.Second)
	left := func(n int) bool { return n < few }
	w.cut = func(from, to int) bool { return left(from) != left(to) }
	w.verdict = func(by, of int) {
		if left(by) == left(of) {
			t.Errorf("node %d takes %d of its own side for silent", by, of)
		}
	}
	missed := func() (pairs int) {
		for _, x := range w.nodes {
			for _, y := range w.nodes {
				if left(x.n) != left(y.n) && x.w.isSilent(nodeID(y.n)) {
					pairs++
				}
			}
		}
		return pairs
	}
	began := w.now
	for missed() < 2*few*(nodes-few) && w.now.Sub(began) < 10*time.Second {
		w.run(5 * time.Millisecond)
	}
	took := w.now.Sub(began)
	w.run(20 * time.Second)
	w.cut = nil
	began = w.now
	for missed() > 0 && w.now.Sub(began) < 10*time.Second {
		w.run(5 * time.Millisecond)
	}
	t.Logf("each side misses the other after %v, and none %v after the heal", took, w.now.Sub(began))
	if took > limit || w.now.Sub(began) > 2*time.Second {
		t.Error("that is too late")
	}
}

// TestWatchDeadOnLongWays: a dead member is missed by all of a crowd on ways as long as
// those between continents, with the time an answer takes on top, and so are two at once,
// who would watch each other.
func TestWatchDeadOnLongWays(t *testing.T) {
	const way = 150 * time.Millisecond
	for _, dead := range [][]int{{3}, {3, 4}} {
		var took []time.Duration
		for seed := range uint64(10) {
			w := newWatchNet(seed, 100, 0.05, way)
			w.run(15 * time.Second)
			took = append(took, w.kill(t, dead...))
		}
		slices.Sort(took)
		t.Logf("%d of 100 nodes, %v there and back: missed by all after %v (median), %v (worst)", len(dead), 2*way, took[len(took)/2], took[len(took)-1])
		if worst := took[len(took)-1]; worst > 4*time.Second {
			t.Errorf("that took %v, want 4 s at most", worst)
		}
	}
}
