package gossip

import (
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// The first write after a rest is told at once; what follows closely is gathered.
func TestCoreTellsAtOnce(t *testing.T) {
	w := newWorld(t, 1)
	w.start(1, 1)
	w.start(2, 1)
	w.attach(2, []weft.ID{netID(0), netID(1), netID(2)})
	w.publish(2, nil)
	w.publish(1, []weft.Endpoint{endpoint(1)})
	w.pass(time.Second)
	c := w.nodes[1]
	told := func(want uint64) {
		t.Helper()
		before := c.last.counter
		c.advance(w.now)
		if got := c.last.counter - before; got != want {
			t.Errorf("%d states are told, want %d", got, want)
		}
	}
	w.publish(1, []weft.Endpoint{endpoint(1), endpoint(4)})
	told(1)
	for i := range 5 {
		w.now = w.now.Add(coalesceFor / 10)
		w.publish(1, []weft.Endpoint{endpoint(1), endpoint(4), endpoint(7 + 3*i)})
		told(0)
	}
	w.now = w.now.Add(coalesceFor / 2)
	told(1)
	w.now = w.now.Add(coalesceFor)
	told(0)
	w.publish(1, []weft.Endpoint{endpoint(1)})
	told(1)
}
