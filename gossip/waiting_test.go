package gossip

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// TestWaitingIsBounded: whatever comes, what waits is counted right, of one table and of
// all no more than is allowed, and gone when its time is over.
func TestWaitingIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, now := newWaiting(), time.Unix(1000, 0)
		began := map[key]time.Time{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 2000).Draw(t, "ms")) * time.Millisecond)
			k := key{netID(rapid.IntRange(0, 2).Draw(t, "network")), nodeID(rapid.IntRange(1, 3).Draw(t, "owner"))}
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0:
				w.take(k)
				delete(began, k)
			case 1:
				w.drop(k.network)
				for o := range began {
					if o.network == k.network {
						delete(began, o)
					}
				}
			case 2:
				w.sweep(now)
				for o, at := range began {
					if now.Sub(at) >= waitFor {
						delete(began, o)
					}
				}
			default:
				had := len(w.of(k))
				m := &update{body: make([]byte, rapid.SampledFrom([]int{0, 100, 5 << 20, 6 << 20}).Draw(t, "bytes"))}
				isFull := had >= maxWaiting || w.bytes+len(m.body) > waitingBytes
				w.hold(now, k, m)
				if kept := len(w.of(k)) > had; kept == isFull {
					t.Fatalf("%d of the table and %d bytes wait, another of %d is kept: %v", had, w.bytes, len(m.body), kept)
				}
				if _, ok := began[k]; !ok && !isFull {
					began[k] = now
				}
			}
			sum := 0
			for k := range w.byKey {
				for _, m := range w.of(k) {
					sum += len(m.body)
				}
			}
			if sum != w.bytes || sum > waitingBytes || len(w.byKey) != len(began) {
				t.Fatalf("%d bytes wait, counted as %d; %d tables, want %d", sum, w.bytes, len(w.byKey), len(began))
			}
		}
	})
}

// of are those of a table, which stay.
func (w *waiting) of(k key) []*update {
	if of := w.byKey[k]; of != nil {
		return of.updates
	}
	return nil
}

// TestCoreForgetsWhatWaits: what nobody proves is not kept for ever.
func TestCoreForgetsWhatWaits(t *testing.T) {
	w := newWorld(t, 1)
	w.start(1, 1)
	w.attach(1, []weft.ID{netID(0)})
	w.publish(1, nil)
	c := w.nodes[1]
	hold := func() {
		c.waiting.hold(w.now, key{netID(0), nodeID(9)}, &update{body: make([]byte, 1000)})
		if c.waiting.bytes != 1000 {
			t.Fatalf("%d bytes wait", c.waiting.bytes)
		}
	}
	hold()
	w.pass(waitFor)
	c.tick(w.now)
	if c.waiting.bytes != 0 {
		t.Errorf("%d bytes wait after %v", c.waiting.bytes, waitFor)
	}
	hold()
	w.attach(1, nil)
	w.pass(2 * time.Second)
	if c.waiting.bytes != 0 {
		t.Errorf("%d bytes wait for a network that was left", c.waiting.bytes)
	}
}
