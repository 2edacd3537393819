package dns

import (
	"strings"
	"sync"
	"time"
)

// noteEvery is how often operators are told the same at most, our own choice.
const noteEvery = 30 * time.Second

// quiet keeps what happens often from being logged as often. It may be used by any
// goroutine; its zero value has said nothing yet.
type quiet struct {
	mu   sync.Mutex // guards: said
	said time.Time
}

// due tells whether it is time for a line of the log, which is then taken as written.
func (q *quiet) due(now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.said.IsZero() && now.Sub(q.said) < noteEvery {
		return false
	}
	q.said = now
	return true
}

// refuse counts what the task has beyond its limit, and tells operators whose it is:
// inside the task it looks like a resolver that fails.
func (t *session) refuse(limit string, most int) {
	t.s.stats.refused.Add(1)
	if t.noted.due(time.Now()) {
		t.s.cfg.Log.Warn("a task is over a limit of the resolver, what goes beyond is refused",
			"container", t.container(), "limit", limit, "most", most)
	}
}

// container is the task's name for operators.
func (t *session) container() string { return strings.TrimSuffix(t.view.ptr, ".") }
