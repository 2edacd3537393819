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
	log   *slog.Logger
	since time.Time

	mu     sync.Mutex // guards: counts
	counts map[string]weft.RepairCount
}

// NewRepairs starts counting.
func NewRepairs(log *slog.Logger) *Repairs {
	return &Repairs{log: log, since: time.Now(), counts: map[string]weft.RepairCount{}}
}

// Record takes one repair. It does not block.
func (r *Repairs) Record(x weft.Repair) {
	r.log.Info("repaired", "kind", x.Kind, "object", x.Object, "reason", x.Reason)
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.counts[x.Kind]
	r.counts[x.Kind] = weft.RepairCount{Kind: x.Kind, Count: c.Count + 1, Last: time.Now(), Object: x.Object, Reason: x.Reason}
}

// Repairs returns the counts by kind, and since when they are counted.
func (r *Repairs) Repairs() (since time.Time, counts []weft.RepairCount) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.counts {
		counts = append(counts, c)
	}
	slices.SortFunc(counts, func(a, b weft.RepairCount) int { return cmp.Compare(a.Kind, b.Kind) })
	return r.since, counts
}
