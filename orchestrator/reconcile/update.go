package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// Messages of UpdateStatus, Docker's words.
const (
	updateRunning = "update in progress"
	updateDone    = "update completed"
)

// rollout is what update learns from one look at all places.
type rollout struct {
	pending  []*slot // on an outdated specification, not begun
	stopped  []*slot // begun: the outdated task has stopped
	inFlight int     // begun, not settled
	outdated bool    // anything outdated is left
	// running is when the last current task began to run; settled when the
	// next group may begin (Delay).
	running, settled time.Time
}

// update moves places from outdated specifications to the current one,
// Parallelism at a time, and keeps the status. The state is all in the tasks:
// a new leader goes on where the old one stopped.
func (p *plan) update(keys []key) {
	r := p.survey(keys)
	st := p.Service.Update
	if r.outdated && st.State != weft.UpdateRunning && st.State != weft.UpdatePaused {
		st = weft.UpdateStatus{State: weft.UpdateRunning, StartedAt: p.Now, Message: updateRunning}
	}
	if st.State == weft.UpdateRunning {
		if t := p.failure(st); t != nil {
			st.State = weft.UpdatePaused
			st.Message = fmt.Sprintf("update paused due to failure or early termination of task %s", t.ID)
		} else {
			p.advance(&r)
			p.finish(&r, &st)
		}
	}
	if st != p.Service.Update {
		p.out.Update = &st
	}
}

func (p *plan) survey(keys []key) rollout {
	var r rollout
	for _, k := range keys {
		s := p.slots[k]
		if s.unwanted {
			continue // out of reach; its turn comes with the node
		}
		n := s.newest()
		switch {
		case s.current != nil:
			if t := s.current; t.Status.State != weft.TaskRunning {
				r.inFlight++
			} else if at := p.since(t); at.Add(p.spec.Update.Delay).After(p.Now) {
				r.inFlight++
				r.settled = later(r.settled, at.Add(p.spec.Update.Delay))
				r.running = later(r.running, at)
			} else {
				r.running = later(r.running, at)
			}
			r.outdated = r.outdated || s.old != nil
		case s.old != nil:
			r.pending = append(r.pending, s)
		case n == nil:
			r.inFlight++ // a new place
		case s.stopping:
			r.inFlight++
			r.outdated = r.outdated || p.isOutdated(n.SpecVersion)
		case !p.isOutdated(n.SpecVersion):
			if _, again := p.restart(s, n); again || !selfEnded(n) {
				r.inFlight++
			}
		case n.Status.State == weft.TaskShutdown:
			r.stopped = append(r.stopped, s)
			r.inFlight++
			r.outdated = true
		default:
			r.pending = append(r.pending, s)
		}
	}
	r.outdated = r.outdated || len(r.pending) > 0
	return r
}

// advance begins as many places as Parallelism leaves room for: those where
// nothing runs first, for they have nothing to lose.
func (p *plan) advance(r *rollout) {
	for _, s := range r.stopped {
		s.fresh = true
	}
	idle := func(s *slot) int {
		switch {
		case s.old == nil:
			return 0
		case s.old.Status.State != weft.TaskRunning:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(r.pending, func(a, b *slot) int { return cmp.Compare(idle(a), idle(b)) })
	limit := p.spec.Update.Parallelism
	for len(r.pending) > 0 && (limit == 0 || uint64(r.inFlight) < limit) {
		s := r.pending[0]
		r.pending = r.pending[1:]
		r.inFlight++
		switch {
		case s.old == nil:
			s.fresh = true
		case p.spec.Update.StartFirst && s.old.Status.State == weft.TaskRunning:
			s.fresh = true
		default:
			s.fresh = p.stop(s, s.old)
			s.stopping = !s.fresh
			s.old = nil
		}
	}
	if limit > 0 && len(r.pending) > 0 && !r.settled.IsZero() {
		p.again(r.settled)
	}
}

// finish declares the update done when every place runs the current
// specification and has done so for Monitor.
func (p *plan) finish(r *rollout, st *weft.UpdateStatus) {
	if r.outdated || r.inFlight > 0 && r.settled.IsZero() {
		return
	}
	end := later(r.settled, r.running.Add(p.monitor()))
	if end.After(p.Now) || r.inFlight > 0 {
		p.again(end)
		return
	}
	st.State, st.EndedAt, st.Message = weft.UpdateDone, p.Now, updateDone
}

func (p *plan) monitor() time.Duration {
	if m := p.spec.Update.Monitor; m > 0 {
		return m
	}
	return weft.DefaultUpdate.Monitor
}

// failure returns a task that fails the update, if there is one: made by it,
// and ended in failure within Monitor of its start.
//
// When a task began to run is not recorded once it has ended. With one place
// at a time it follows from the order: the next place is begun when the one
// before it runs. With more in flight every failure counts while the update
// goes on: a pause too many costs a command, one too few a service.
func (p *plan) failure(st weft.UpdateStatus) *weft.Task {
	var worst *weft.Task
	for i := range p.Tasks {
		t := &p.Tasks[i]
		if !failed(t) || p.isOutdated(t.SpecVersion) || t.Meta.CreatedAt.Before(st.StartedAt) {
			continue
		}
		if p.spec.Update.Parallelism == 1 && t.Status.State == weft.TaskFailed {
			if began, ok := p.nextBegan(t); ok && t.Status.At.Sub(began) > p.monitor() {
				continue
			}
		}
		if worst == nil || t.ID < worst.ID {
			worst = t
		}
	}
	return worst
}

// nextBegan is when the first task of the current specification after t was
// created at another place.
func (p *plan) nextBegan(t *weft.Task) (time.Time, bool) {
	var first time.Time
	for i := range p.Tasks {
		o := &p.Tasks[i]
		if (o.Slot == t.Slot && o.Node == t.Node) || (o.Slot == t.Slot && t.Slot != 0) || p.isOutdated(o.SpecVersion) ||
			!o.Meta.CreatedAt.After(t.Meta.CreatedAt) {
			continue
		}
		if first.IsZero() || o.Meta.CreatedAt.Before(first) {
			first = o.Meta.CreatedAt
		}
	}
	return first, !first.IsZero()
}

// isOutdated reports whether tasks of a spec version must be replaced to run
// the current one.
func (p *plan) isOutdated(version uint64) bool {
	out, ok := p.outdated[version]
	if !ok {
		spec := p.Specs[version]
		out = spec == nil || NeedsRestart(spec, p.spec)
		p.outdated[version] = out
	}
	return out
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
