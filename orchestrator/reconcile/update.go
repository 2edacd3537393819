package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// rollout is what update learns from one look at all places.
type rollout struct {
	pending  []*slot // on an outdated specification, not begun
	stopped  []*slot // begun: the outdated task has stopped
	inFlight int     // begun, not settled
	outdated bool    // anything outdated is left
	again    []*slot // the new task failed, the old one runs on, and its time has come
	// stuck has failed where the old task runs on, and has no successor.
	stuck *weft.Task
	// running is when the last current task began to run; settled when the
	// next group may begin (Delay).
	running, settled time.Time
}

// update moves places from outdated specifications to the current one,
// Parallelism at a time, and keeps the status. The state is all in the tasks:
// a new leader goes on where the old one stopped.
//
//	none ──► running ──► done          rollback running ──► rollback done
//	            │                        ▲    │
//	            ├──► paused              │    └──► rollback paused
//	            └────────────────────────┘ OnFailure is UpdateRollback
//
// A person may begin the second row from any state; a new specification leads
// from any to the first.
func (p *plan) update(keys []key) {
	st := p.Service.Update
	p.failed = p.failures(st)
	r := p.survey(keys)
	if r.outdated && !st.State.IsRunning() && !st.State.IsPaused() {
		st = weft.UpdateStatus{State: weft.UpdateRunning, StartedAt: p.Now, Message: weft.MessageUpdateRunning}
		p.policy = p.spec.Policy(st.State)
		p.failed = p.failures(st) // as the next look will find them
		r = p.survey(keys)
	}
	if st.State.IsRunning() {
		switch t := worst(p.failed); {
		case !p.policy.Tolerates(len(p.failed), len(keys)):
			p.fail(&st, fmt.Sprintf("due to failure or early termination of task %s", t.ID))
		case r.stuck != nil:
			p.pause(&st, fmt.Sprintf("as task %s failed and the restart policy allows no other", r.stuck.ID))
		default:
			p.advance(&r)
			p.finish(&r, &st)
		}
	}
	if !st.State.IsRunning() {
		p.failed = nil
	}
	if st != p.Service.Update {
		p.out.Update = &st
	}
}

// fail ends what has failed more often than it may: by a pause, or by the way back.
func (p *plan) fail(st *weft.UpdateStatus, why string) {
	switch {
	case p.policy.OnFailure != weft.UpdateRollback || st.State.IsRollback():
		p.pause(st, why)
	case p.Service.Previous == nil:
		p.pause(st, why+"; there is no previous specification to go back to")
	default:
		p.out.Rollback = why
	}
}

func (p *plan) pause(st *weft.UpdateStatus, why string) {
	st.State, st.Message = weft.UpdatePaused, "update paused "+why
	if p.Service.Update.State.IsRollback() {
		st.State, st.Message = weft.RollbackPaused, "rollback paused "+why
	}
}

// worst is the task that is named for all: the one of the smallest id.
func worst(failed map[key]*weft.Task) *weft.Task {
	var out *weft.Task
	for _, t := range failed {
		if out == nil || t.ID < out.ID {
			out = t
		}
	}
	return out
}

// survey looks at all places. One whose new task has failed, and that failure is
// tolerated, holds up no other.
func (p *plan) survey(keys []key) rollout {
	var r rollout
	for _, k := range keys {
		s := p.slots[k]
		if s.unwanted {
			continue // out of reach; its turn comes with the node
		}
		n := s.newest()
		switch t := p.failed[k]; {
		case t != nil && !s.stopping && (s.current == nil || s.current.Status.State != weft.TaskRunning):
			if at := p.since(t).Add(p.policy.Delay); at.After(p.Now) {
				r.inFlight++
				r.settled = later(r.settled, at)
			}
			if s.old != nil {
				r.outdated = true
				p.retry(s, &r)
			}
		case s.current != nil:
			if t := s.current; t.Status.State != weft.TaskRunning {
				r.inFlight++
			} else if at := p.since(t); at.Add(p.policy.Delay).After(p.Now) {
				r.inFlight++
				r.settled = later(r.settled, at.Add(p.policy.Delay))
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

// retry tries again at a place where the old task runs on because the new one
// has failed, as the restart policy says.
func (p *plan) retry(s *slot, r *rollout) {
	n := s.newest()
	if s.current != nil || !selfEnded(n) {
		return // one is on its way
	}
	at, ok := p.restart(s, n)
	switch {
	case !ok:
		r.stuck = n
	case at.After(p.Now):
		p.again(at)
	default:
		r.again = append(r.again, s)
	}
}

// advance begins as many places as Parallelism leaves room for: those where
// nothing runs first, for they have nothing to lose.
func (p *plan) advance(r *rollout) {
	for _, s := range append(r.stopped, r.again...) {
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
	limit := p.policy.Parallelism
	for len(r.pending) > 0 && (limit == 0 || uint64(r.inFlight) < limit) {
		s := r.pending[0]
		r.pending = r.pending[1:]
		r.inFlight++
		switch {
		case s.old == nil:
			s.fresh = true
		case p.policy.StartFirst && s.old.Status.State == weft.TaskRunning:
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
	st.EndedAt = p.Now
	if st.State.IsRollback() {
		st.State, st.Message = weft.RollbackDone, weft.MessageRollbackDone
	} else {
		st.State, st.Message = weft.UpdateDone, weft.MessageUpdateDone
	}
}

func (p *plan) monitor() time.Duration {
	if m := p.policy.Monitor; m > 0 {
		return m
	}
	return weft.DefaultUpdate.Monitor
}

// failures are the places where a task fails the update: made by it, and ended by
// itself within Monitor of the time when it began to run, or before. However often
// that happens at one place, it is one failure; of its tasks the newest such.
func (p *plan) failures(st weft.UpdateStatus) map[key]*weft.Task {
	out := map[key]*weft.Task{}
	if !st.State.IsRunning() {
		return out
	}
	for k, s := range p.slots {
		for _, t := range s.tasks {
			if !selfEnded(t) || p.isOutdated(t.SpecVersion) || t.Meta.CreatedAt.Before(st.StartedAt) ||
				!t.Status.Ran.IsZero() && t.Status.At.Sub(t.Status.Ran) > p.monitor() {
				continue
			}
			// The newest of a place says when it has settled.
			if o := out[k]; o == nil || p.since(t).After(p.since(o)) || p.since(t).Equal(p.since(o)) && t.ID > o.ID {
				out[k] = t
			}
		}
	}
	return out
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
