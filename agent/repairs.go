package agent

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
)

// Repairs counts by kind what the engines have put right, and logs each once.
// It lives as long as the daemon, longer than any Agent. Safe for concurrent
// use.
type Repairs struct {
	log *slog.Logger
	tally
}

// NewRepairs starts counting.
func NewRepairs(log *slog.Logger) *Repairs { return &Repairs{log, newTally()} }

// Record takes one repair. It does not block.
func (r *Repairs) Record(x weft.Repair) {
	r.log.Info("repaired", "kind", x.Kind, "object", x.Object, "reason", x.Reason)
	r.add(x)
}

// Repairs returns the counts by kind, and since when they are counted.
func (r *Repairs) Repairs() (since time.Time, counts []weft.RepairCount) { return r.read() }

// tally counts by kind and keeps the last of each. Safe for concurrent use.
type tally struct {
	since time.Time

	mu     *sync.Mutex // guards: counts
	counts map[string]weft.RepairCount
}

func newTally() tally {
	return tally{since: time.Now(), mu: &sync.Mutex{}, counts: map[string]weft.RepairCount{}}
}

func (t *tally) add(x weft.Repair) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.counts[x.Kind]
	t.counts[x.Kind] = weft.RepairCount{Kind: x.Kind, Count: c.Count + 1, Last: time.Now(), Object: x.Object, Reason: x.Reason}
}

func (t *tally) read() (since time.Time, counts []weft.RepairCount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.counts {
		counts = append(counts, c)
	}
	slices.SortFunc(counts, func(a, b weft.RepairCount) int { return cmp.Compare(a.Kind, b.Kind) })
	return t.since, counts
}
