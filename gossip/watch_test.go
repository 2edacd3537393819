//go:build !race

// One goroutine: there is nothing for the race detector to see, and it takes ten
// times as long with it.

package gossip

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// watchNet is a number of watches in virtual time, with links that delay and lose,
// and nodes that die or get no processor for a while.
type watchNet struct {
	now   time.Time
	rand  *rand.Rand
	loss  float64
	delay time.Duration // one way
	cut   func(from, to int) bool
	nodes []*watchNode
	queue watchQueue
	sent  int
	cost  time.Duration // of each frame that is read or sent, for which its node does nothing else
	// shared is the cost of each frame for one processor that all nodes share.
	shared time.Duration
	// verdict is told each time a node takes another for silent.
	verdict func(by, of int)
}

type watchNode struct {
	w       *watch
	n       int
	isDead  bool
	stalled time.Time // until then it gets no processor
	inbox   []watchEvent
	silent  map[int]bool
}

type watchEvent struct {
	at       time.Time
	from, to int
	m        message
}

type watchQueue []watchEvent

func (q watchQueue) Len() int           { return len(q) }
func (q watchQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q watchQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *watchQueue) Push(x any)        { *q = append(*q, x.(watchEvent)) }
func (q *watchQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

func newWatchNet(seed uint64, n int, loss float64, delay time.Duration) *watchNet {
	w := &watchNet{now: time.Unix(1000, 0), rand: rand.New(rand.NewPCG(seed, 7)), loss: loss, delay: delay}
	for i := range n {
		w.nodes = append(w.nodes, &watchNode{n: i, silent: map[int]bool{}, w: newWatch(nodeID(i), rand.New(rand.NewPCG(seed, uint64(i))))})
		w.nodes[i].w.words = float64(max(wordsEach*n, wordsMin)) // they have been members for long
		w.nodes[i].w.wordsAt = w.now
	}
	w.members()
	for _, a := range w.nodes { // all have heard of all
		for _, b := range w.nodes {
			a.w.hear(w.now, nodeID(b.n))
		}
	}
	return w
}

// members tells everybody who is a member: all that live, and those in also.
func (w *watchNet) members(also ...int) {
	var ids []weft.ID
	for _, x := range w.nodes {
		if !x.isDead || slices.Contains(also, x.n) {
			ids = append(ids, nodeID(x.n))
		}
	}
	for _, x := range w.nodes {
		if !x.isDead {
			x.w.setMembers(w.now, ids)
		}
	}
}

func numberOf(id weft.ID) int { return watchNumbers[id] }

var watchNumbers = func() map[weft.ID]int {
	m := map[weft.ID]int{}
	for n := range 256 {
		m[nodeID(n)] = n
	}
	return m
}()

// run lets time go on.
func (w *watchNet) run(d time.Duration) {
	for end := w.now.Add(d); ; {
		next, who := end, (*watchNode)(nil)
		if len(w.queue) > 0 && w.queue[0].at.Before(next) {
			next = w.queue[0].at
		}
		for _, x := range w.nodes {
			if at := x.wakes(); !x.isDead && !at.IsZero() && at.Before(next) {
				next, who = at, x
			}
		}
		if !next.Before(end) {
			w.now = end
			return
		}
		w.now = latest(w.now, next)
		if who == nil {
			e := heap.Pop(&w.queue).(watchEvent)
			to := w.nodes[e.to]
			if to.isDead {
				continue
			}
			if to.inbox = append(to.inbox, e); w.now.Before(to.stalled) {
				continue
			}
			w.read(to)
			continue
		}
		// A node that wakes looks at its timers first, or at its queue.
		if w.rand.IntN(2) == 0 {
			w.read(who)
		}
		if !who.w.due.IsZero() && !w.now.Before(who.w.due) {
			who.w.advance(w.now)
		}
		w.flush(who)
		w.read(who)
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (x *watchNode) wakes() time.Time {
	switch {
	case len(x.inbox) > 0:
		return x.stalled
	case x.w.due.IsZero():
		return time.Time{}
	}
	return latest(x.w.due, x.stalled)
}

func (w *watchNet) read(x *watchNode) {
	all := x.inbox
	if w.cost+w.shared > 0 {
		all = all[:min(1, len(all))] // one at a time
	}
	for _, e := range all {
		w.spend(x)
		x.w.hear(w.now, nodeID(e.from))
		switch m := e.m.(type) {
		case knock:
			w.post(x.n, e.from, knocked(m))
		case knocked:
			x.w.answer(w.now, nodeID(e.from), m.number)
		case doubt, vouch:
			x.w.receive(w.now, nodeID(e.from), e.m)
		}
	}
	x.inbox = x.inbox[len(all):]
	w.flush(x)
}

// spend has a node's processor take the cost of a frame.
func (w *watchNet) spend(x *watchNode) {
	w.now = w.now.Add(w.shared)
	if w.cost > 0 {
		x.stalled = latest(x.stalled, w.now).Add(w.cost)
	}
}

func (w *watchNet) flush(x *watchNode) {
	for _, e := range x.w.take() {
		for _, id := range e.to {
			w.post(x.n, numberOf(id), e.m)
		}
	}
	if !x.w.changed {
		return
	}
	x.w.changed = false
	for _, y := range w.nodes {
		is := x.w.isSilent(nodeID(y.n))
		if is && !x.silent[y.n] && w.verdict != nil {
			w.verdict(x.n, y.n)
		}
		x.silent[y.n] = is
	}
}

func (w *watchNet) post(from, to int, m message) {
	w.sent++
	w.spend(w.nodes[from])
	if w.rand.Float64() >= w.loss && (w.cut == nil || !w.cut(from, to)) {
		heap.Push(&w.queue, watchEvent{w.now.Add(w.delay), from, to, m})
	}
}

// allSay reports whether all who live and run say the same of a node.
func (w *watchNet) allSay(of int, silent bool) bool {
	return !slices.ContainsFunc(w.nodes, func(x *watchNode) bool {
		return x.n != of && !x.isDead && x.w.isSilent(nodeID(of)) != silent
	})
}

// kill ends nodes and returns after what time all others take them for silent.
func (w *watchNet) kill(t *testing.T, dead ...int) time.Duration {
	t.Helper()
	for _, n := range dead {
		w.nodes[n].isDead = true
	}
	for began := w.now; ; w.run(5 * time.Millisecond) {
		if !slices.ContainsFunc(dead, func(n int) bool { return !w.allSay(n, true) }) {
			return w.now.Sub(began)
		}
		if w.now.Sub(began) > 10*time.Second {
			t.Fatalf("nodes %v have died and are not all missed", dead)
		}
	}
}

// revive starts a node again, with nothing of what it knew.
func (w *watchNet) revive(n int) {
	x := w.nodes[n]
	*x = watchNode{n: n, silent: map[int]bool{}, w: newWatch(nodeID(n), rand.New(rand.NewPCG(w.rand.Uint64(), 1)))}
	w.members()
	for _, y := range w.nodes {
		w.post(n, y.n, knock{}) // it comes with its table
	}
}

// TestWatchDead: a dead node is silent for all within 1.5 s, and nobody else is, with
// and without loss.
func TestWatchDead(t *testing.T) {
	deaths := 30
	if *Long {
		deaths = 300
	}
	sizes := []int{2, 3, 5, 10, 20, 50}
	if *Long {
		sizes = append(sizes, 200)
	}
	for _, nodes := range sizes {
		for _, loss := range []float64{0, 0.1} {
			t.Run(fmt.Sprintf("%d nodes, loss %.1f", nodes, loss), func(t *testing.T) {
				w := newWatchNet(1, nodes, loss, 250*time.Microsecond)
				dead := -1
				w.verdict = func(by, of int) {
					if of != dead {
						t.Errorf("at %v node %d takes %d for silent, which lives", w.now.Sub(time.Unix(1000, 0)), by, of)
					}
				}
				var took []time.Duration
				for range deaths {
					w.run(2*time.Second + time.Duration(w.rand.IntN(1000))*time.Millisecond)
					dead = w.rand.IntN(nodes)
					took = append(took, w.kill(t, dead))
					w.revive(dead)
					w.run(3 * time.Second)
					if !w.allSay(dead, false) {
						t.Errorf("node %d is back, and not all see it", dead)
					}
					dead = -1
				}
				slices.Sort(took)
				t.Logf("%d deaths: silent for all after %v (median), %v (worst)", deaths, took[deaths/2], took[deaths-1])
				if took[deaths-1] >= 1500*time.Millisecond {
					t.Errorf("the slowest death took %v, want less than 1.5 s", took[deaths-1])
				}
			})
		}
	}
}

// TestWatchStalls: nodes that get no processor for half a second to a second, some of
// them at once, are not taken for silent, and do not take others for silent.
func TestWatchStalls(t *testing.T) {
	length := 10 * time.Minute
	if *Long {
		length = time.Hour
	}
	for _, nodes := range []int{2, 3, 5, 10, 20, 50} {
		for _, loss := range []float64{0, 0.1} {
			t.Run(fmt.Sprintf("%d nodes, loss %.1f", nodes, loss), func(t *testing.T) {
				w := newWatchNet(2, nodes, loss, 250*time.Microsecond)
				alarms, stalls := 0, 0
				w.verdict = func(by, of int) { alarms++ }
				for end := w.now.Add(length); w.now.Before(end); {
					w.run(time.Duration(w.rand.IntN(1500)) * time.Millisecond)
					x := w.nodes[w.rand.IntN(nodes)]
					if w.now.After(x.stalled.Add(time.Second)) {
						stalls++
						x.stalled = w.now.Add(500*time.Millisecond + time.Duration(w.rand.IntN(500))*time.Millisecond)
					}
				}
				t.Logf("%d stalls, %d times somebody was taken for silent", stalls, alarms)
				if alarms > 0 {
					t.Error("false alarms")
				}
			})
		}
	}
}

// TestWatchStarved: nodes that get so little of loaded cores that a frame takes 1.5 ms.
// Some are late once. What is asked and said because of it must not take more of them than
// they have, or they are late for ever: fifty came to 657 frames a second each, and took
// each other for silent.
func TestWatchStarved(t *testing.T) {
	for _, c := range []struct {
		nodes, late  int
		cost, shared time.Duration
	}{
		{10, 2, 1500 * time.Microsecond, 0},
		{50, 10, 1500 * time.Microsecond, 0},
		{50, 50, 1500 * time.Microsecond, 0},
		{100, 20, 2 * time.Millisecond, 0},
		{200, 40, 0, 20 * time.Microsecond},
		{200, 200, 0, 20 * time.Microsecond},
		{200, 200, 0, 50 * time.Microsecond},
	} {
		w := newWatchNet(5, c.nodes, 0, 250*time.Microsecond)
		w.cost, w.shared = c.cost, c.shared
		alarms := 0
		w.verdict = func(by, of int) { alarms++ }
		rate := func() float64 {
			w.sent = 0
			w.run(10 * time.Second)
			return float64(w.sent) / 10 / float64(c.nodes)
		}
		calm := rate()
		for _, n := range w.rand.Perm(c.nodes)[:c.late] {
			w.nodes[n].stalled = w.now.Add(800 * time.Millisecond)
		}
		during, after := rate(), rate()
		t.Logf("%d nodes: each sends %.1f frames a second, %.1f in the ten seconds after %d were late, then %.1f; %d times somebody was taken for silent", c.nodes, calm, during, c.late, after, alarms)
		if after > 1.2*calm || alarms > 0 {
			t.Error("it does not come to rest, or somebody was taken for silent")
		}
	}
}

// TestWatchDeadAmongLate: where a fifth of all nodes get no processor at any time, for up to
// 0.3 s each, nobody's silence counts while it is late itself. A dead one is missed later
// then, but within bounds, and nobody who lives is.
func TestWatchDeadAmongLate(t *testing.T) {
	const nodes, deaths = 20, 100
	w := newWatchNet(9, nodes, 0.1, 250*time.Microsecond)
	dead := -1
	w.verdict = func(by, of int) {
		if of != dead {
			t.Errorf("node %d takes %d for silent, which lives", by, of)
		}
	}
	late := func() { // four of twenty are, on average
		if x := w.nodes[w.rand.IntN(nodes)]; w.rand.IntN(4) == 0 && w.now.After(x.stalled.Add(100*time.Millisecond)) {
			x.stalled = w.now.Add(time.Duration(50+w.rand.IntN(250)) * time.Millisecond)
		}
	}
	live := func(d time.Duration) {
		for end := w.now.Add(d); w.now.Before(end); w.run(10 * time.Millisecond) {
			late()
		}
	}
	var took []time.Duration
	for range deaths {
		live(4 * time.Second)
		dead = w.rand.IntN(nodes)
		w.nodes[dead].isDead = true
		began := w.now
		for !w.allSay(dead, true) {
			live(10 * time.Millisecond)
			if w.now.Sub(began) > 10*time.Second {
				t.Fatalf("node %d has died and is not missed", dead)
			}
		}
		took = append(took, w.now.Sub(began))
		w.revive(dead)
		live(2 * time.Second)
		dead = -1
	}
	slices.Sort(took)
	t.Logf("%d deaths: silent for all after %v (median), %v (nine in ten), %v (worst)", deaths, took[deaths/2], took[deaths*9/10], took[deaths-1])
	if took[deaths*9/10] >= 2300*time.Millisecond || took[deaths-1] >= 3*time.Second {
		t.Error("a dead node is missed too late")
	}
}

// TestWatchOwnStall: a node that was away for long hears the others first.
func TestWatchOwnStall(t *testing.T) {
	w := newWatchNet(3, 5, 0.1, 250*time.Microsecond)
	w.verdict = func(by, of int) {
		if by == 2 {
			t.Errorf("node 2 was away itself, and takes %d for silent", of)
		}
	}
	for range 20 {
		w.run(5 * time.Second)
		w.nodes[2].stalled = w.now.Add(8 * time.Second)
		w.run(8500 * time.Millisecond)
		if !w.allSay(2, false) {
			t.Error("it is back for half a second, and not all see it")
		}
	}
}

// TestWatchNeighboursDieTogether: the watchers of a node die with it, and others take
// their place one after the other, from both sides. 50 times for each number, of few and
// of a crowd.
func TestWatchNeighboursDieTogether(t *testing.T) {
	for _, dead := range [][]int{{3, 4}, {3, 4, 5}, {3, 4, 5, 6}, {2, 3, 4, 5, 6, 7}} {
		var took []time.Duration
		for seed := range uint64(100) {
			w := newWatchNet(seed, 12+int(seed%2)*18, 0.1, 250*time.Microsecond)
			w.run(2*time.Second + time.Duration(w.rand.IntN(1000))*time.Millisecond)
			took = append(took, w.kill(t, dead...))
		}
		slices.Sort(took)
		t.Logf("%d neighbours are silent for all after %v (median), %v (worst)", len(dead), took[len(took)/2], took[len(took)-1])
		if worst := took[len(took)-1]; worst > 1800*time.Millisecond {
			t.Errorf("%d neighbours took %v, want 1.8 s at most", len(dead), worst)
		}
	}
}

// TestWatchAtRest: two who watch each other need one question for both, so that a node
// sends and gets as many frames as it would if it watched one member alone.
func TestWatchAtRest(t *testing.T) {
	for _, nodes := range []int{2, 3, 10, 50} {
		w := newWatchNet(3, nodes, 0, 250*time.Microsecond)
		w.run(time.Second)
		w.sent = 0
		w.run(20 * time.Second)
		rate := float64(w.sent) / 20 / float64(nodes)
		t.Logf("%d nodes: each sends %.1f frames a second", nodes, rate)
		if rate > 14 {
			t.Errorf("of %d nodes each sends %.1f frames a second, want 14 at most", nodes, rate)
		}
	}
}

// TestWatchStranger: who was never heard may not know us yet, and is not doubted
// until somebody else does.
func TestWatchStranger(t *testing.T) {
	w := newWatch(nodeID(1), rand.New(rand.NewPCG(1, 1)))
	now := time.Unix(1000, 0)
	w.setMembers(now, []weft.ID{nodeID(2), nodeID(3)})
	w.hear(now, nodeID(3))
	spend := func(d time.Duration) {
		for end := now.Add(d); now.Before(end); {
			now = now.Add(10 * time.Millisecond)
			w.hear(now, nodeID(3))
			w.advance(now)
		}
	}
	if spend(10 * time.Second); w.isSilent(nodeID(2)) || w.isDoubted(nodeID(2)) {
		t.Error("doubted, and nobody has heard it before")
	}
	if !slices.ContainsFunc(w.take(), func(e envelope) bool { return isKnock(e.m) && e.to[0] == nodeID(2) }) {
		t.Error("it was not asked")
	}
	w.receive(now, nodeID(3), doubt{nodeID(2), tellsAfter})
	if spend(silentAfter - tellsAfter - 20*time.Millisecond); w.isSilent(nodeID(2)) {
		t.Error("taken for silent too early")
	}
	if spend(60 * time.Millisecond); !w.isSilent(nodeID(2)) {
		t.Error("not taken for silent although another doubts it")
	}
}

// TestWatchOneLiar: a member's word that others are silent is looked into, not believed.
func TestWatchOneLiar(t *testing.T) {
	for _, nodes := range []int{5, 30} {
		w := newWatchNet(8, nodes, 0.1, 250*time.Microsecond)
		w.verdict = func(by, of int) { t.Errorf("of %d node %d takes %d for silent", nodes, by, of) }
		for n := range 1000 {
			// Often, and then so rarely that its word is about a long silence.
			w.run(20*time.Millisecond + time.Duration(n/500)*2*time.Second)
			for to := range 4 { // of a crowd about one whom nobody told watches
				w.post(4, to, doubt{nodeID((to + max(1, nodes/2)) % nodes), time.Minute})
			}
		}
	}
}
