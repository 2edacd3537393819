package orchestrator

import (
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// liveness is when each node was last heard in this term. It is not in the
// log: that would be a write per node and heartbeat.
type liveness struct {
	// mu guards: last, looked.
	mu     sync.Mutex
	last   map[weft.ID]time.Time
	looked time.Time          // the last call of silent; zero = none yet
	heard  func(weft.ID) bool // Config.Heard
}

// looksPerLimit is how often the loop looks for silent nodes within the time
// that makes a node one. Two looks further apart than twice that mean that the
// leader itself stood still.
const looksPerLimit = 4

// admitGrace is how long an admitted node may take to open its first session: as
// long as the join itself waits for it.
const admitGrace = 30 * time.Second

// wakeGrace is how long nodes may be silent after a manager that was started again
// has first known a leader. All hosts may have lost their power at once: they boot,
// probe their kernels and take up their containers at different speeds, and the
// managers elect long before. Docker gives nodes as long after any election.
const wakeGrace = 30 * time.Second

// newLiveness gives every node of the state a grace: a new leader has heard
// nobody yet, and agents need time to find it. woke is when a manager that was
// started again first knew a leader; zero = it was not started again.
func newLiveness(v *state.Snapshot, limit time.Duration, woke, now time.Time, heard func(weft.ID) bool) *liveness {
	l := &liveness{last: map[weft.ID]time.Time{}, heard: heard}
	from := now.Add(limit)
	if awake := woke.Add(wakeGrace - limit); !woke.IsZero() && awake.After(from) {
		from = awake
	}
	for _, n := range v.Nodes() {
		l.last[n.ID] = from
	}
	return l
}

// seen notes a sign of life.
func (l *liveness) seen(node weft.ID) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.After(l.last[node]) {
		l.last[node] = now
	}
}

// when is the time of the last sign; zero if there was none.
func (l *liveness) when(node weft.ID) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last[node]
}

// silent lists, in the order of ids, the ready nodes that were not heard for
// longer than limit, or twice as long if gossip hears them, and those that never were
// within admitGrace, and when to look again. If this process stood still, its own silence
// is not held against the nodes: they get the whole limit again.
func (l *liveness) silent(nodes []weft.Node, limit time.Duration, now time.Time) (down []weft.ID, again time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	stalled := !l.looked.IsZero() && now.Sub(l.looked) > 2*limit/looksPerLimit
	l.looked = now
	known := make(map[weft.ID]struct{}, len(nodes))
	for _, n := range nodes {
		known[n.ID] = struct{}{}
		last, ok := l.last[n.ID]
		if ok && stalled && last.Before(now) {
			last = now
			l.last[n.ID] = now
		}
		if !ok {
			// It became ready by a command that this term did not see.
			last = now
			l.last[n.ID] = now
		}
		var end time.Time
		switch n.Status.State {
		case weft.NodeReady:
			if end = last.Add(limit); !now.Before(end) && l.heard != nil && l.heard(n.ID) {
				end = last.Add(2 * limit)
			}
		case weft.NodeUnknown:
			end = last.Add(admitGrace)
		default:
			continue
		}
		if !now.Before(end) {
			down = append(down, n.ID)
		} else if again.IsZero() || end.Before(again) {
			again = end
		}
	}
	for id := range l.last {
		if _, ok := known[id]; !ok {
			delete(l.last, id)
		}
	}
	slices.Sort(down)
	return down, again
}
