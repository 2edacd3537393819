package agent

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
)

// boxesGap is how long sandboxes go unread when no wish changes: what somebody else
// broke is repaired within it. A failure waits as long: nobody waits for it, and a
// reading of a hundred sandboxes takes 50 ms of a processor.
const boxesGap = planeMaxGap

// boxes holds what this node wants of its sandboxes and keeps them so. It is not
// part of a pass of the plane, which tasks wait for. All methods may be called from
// any goroutine; run is called once.
type boxes struct {
	maker sandbox.Maker
	log   *slog.Logger
	wake  chan struct{} // capacity 1; sent to by whoever changes a wish; never closed

	mu    sync.Mutex // guards: specs
	specs map[weft.ID]sandbox.Spec
}

func newBoxes(cfg Config) *boxes {
	return &boxes{maker: cfg.Sandbox, log: cfg.Log, wake: make(chan struct{}, 1), specs: map[weft.ID]sandbox.Spec{}}
}

// add takes a sandbox that is there. spec is asked for under the lock, so that it
// is of a model that follow is not done with; false = leave this one alone.
func (b *boxes) add(task weft.ID, spec func() (sandbox.Spec, bool)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s, ok := spec(); ok {
		b.specs[task] = s
	}
}

// drop leaves a sandbox alone from now on: it is about to go. A reading that is on
// its way makes nothing that Destroy does not remove.
func (b *boxes) drop(task weft.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.specs, task)
}

// follow takes the wishes anew.
func (b *boxes) follow(spec func(task weft.ID) (sandbox.Spec, bool)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for task, old := range b.specs {
		s, ok := spec(task)
		if !ok || reflect.DeepEqual(s, old) {
			continue
		}
		b.specs[task] = s
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
}

func (b *boxes) wanted() []sandbox.Spec {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.specs), func(x, y sandbox.Spec) int { return cmp.Compare(x.Task, y.Task) })
}

// run keeps the sandboxes until ctx ends: at once, after a change, and every
// boxesGap.
func (b *boxes) run(ctx context.Context) error {
	var last string // error that was logged
	for {
		err := b.maker.Keep(ctx, b.wanted())
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != last:
			b.log.Error("keep sandboxes", weft.KeyErr, err)
			last = err.Error()
		case err == nil && last != "":
			b.log.Info("sandboxes are kept again")
			last = ""
		}
		timer := time.NewTimer(boxesGap)
		select {
		case <-ctx.Done():
		case <-b.wake:
		case <-timer.C:
		}
		timer.Stop()
		if !sleep(ctx, planeMinGap) {
			return nil
		}
	}
}

// box is what the sandbox of a task should be by model m. It says no of a task
// whose service or network the leader has removed: it is about to end, and its open
// flows have its addresses until then. A service without networks is not sent, and
// has no addresses.
func (a *Agent) box(m *model, task weft.ID) (sandbox.Spec, bool) {
	t, ok := m.Tasks[task]
	if !ok || len(t.Attachments) > 0 && !hasKey(m.Services, t.Service) {
		return sandbox.Spec{}, false
	}
	c := newController(a, m, t)
	return c.sandbox(m), c.complete(m) == nil
}
