package gossip

import (
	"time"

	"github.com/weftnet/weft"
)

// Bounds of the updates that cannot be used yet. They are not proven, so whoever has the
// cluster's key can send any number of them.
const (
	// maxWaiting updates of one table wait for what they are based on, or for their
	// owner's certificate.
	maxWaiting = 8
	// waitingBytes are kept of all of them; what is refused is asked for later.
	waitingBytes = 32 << 20
	// waitFor is for how long, from the first of a table on: larger than what a repair
	// takes that brings what they wait for.
	waitFor = 10 * time.Second
)

// waiting are updates, in one part, that cannot be used yet.
type waiting struct {
	byKey map[key]*waiters
	bytes int // of all bodies
}

type waiters struct {
	since   time.Time
	updates []*update
}

func newWaiting() waiting { return waiting{byKey: map[key]*waiters{}} }

// hold keeps an update, if there is room; since counts for the first one of a table.
func (w *waiting) hold(since time.Time, k key, m *update) {
	of := w.byKey[k]
	if of == nil {
		of = &waiters{since: since}
	}
	if len(of.updates) >= maxWaiting || w.bytes+len(m.body) > waitingBytes {
		return
	}
	of.updates = append(of.updates, m)
	w.byKey[k] = of
	w.bytes += len(m.body)
}

// take returns those of a table, which are no longer kept, and since when they waited.
func (w *waiting) take(k key) (updates []*update, since time.Time) {
	of := w.byKey[k]
	if of == nil {
		return nil, time.Time{}
	}
	delete(w.byKey, k)
	for _, m := range of.updates {
		w.bytes -= len(m.body)
	}
	return of.updates, of.since
}

// drop forgets those of a network.
func (w *waiting) drop(network weft.ID) {
	w.forget(func(k key, _ *waiters) bool { return k.network == network })
}

// sweep forgets those whose time is over.
func (w *waiting) sweep(now time.Time) {
	w.forget(func(_ key, of *waiters) bool { return now.Sub(of.since) >= waitFor })
}

func (w *waiting) forget(which func(key, *waiters) bool) {
	for k, of := range w.byKey {
		if which(k, of) {
			w.take(k)
		}
	}
}
