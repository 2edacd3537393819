package reconcile

import (
	"time"

	"github.com/weftnet/weft"
)

// selfEnded: the task ended without having been told to, so the restart policy
// decides; everything else is replaced at once.
func selfEnded(t *weft.Task) bool {
	switch t.Status.State {
	case weft.TaskComplete, weft.TaskFailed, weft.TaskRejected:
		return true
	}
	return false
}

// failed: by itself and not with success.
func failed(t *weft.Task) bool {
	return t.Status.State == weft.TaskFailed || t.Status.State == weft.TaskRejected
}

// restart says whether the newest task of a place, ended by itself, gets a
// successor, and not before when. Attempts are judged at the time of its end,
// so that the answer does not change later.
func (p *plan) restart(s *slot, t *weft.Task) (time.Time, bool) {
	r := p.spec.Restart
	switch {
	case r.Condition == weft.RestartNone:
		return time.Time{}, false
	case r.Condition == weft.RestartOnFailure && !failed(t):
		return time.Time{}, false
	}
	if r.MaxAttempts > 0 {
		var attempts uint64
		for _, e := range s.tasks {
			if e == t || e.SpecVersion != t.SpecVersion || !selfEnded(e) {
				continue
			}
			if r.Window == 0 || !e.Status.At.Before(t.Status.At.Add(-r.Window)) {
				attempts++
			}
		}
		if attempts >= r.MaxAttempts {
			return time.Time{}, false
		}
	}
	delay := r.Delay
	if delay == 0 {
		delay = weft.DefaultRestartDelay
	}
	return p.since(t).Add(delay), true
}

// fill creates the task that a place lacks.
func (p *plan) fill(s *slot) {
	if l := s.live(); l != nil {
		p.again(l.NotBefore)
		if !s.fresh {
			return
		}
	}
	if s.unwanted || s.stopping {
		return
	}
	version, notBefore := p.Service.SpecVersion, time.Time{}
	if n := s.newest(); n != nil && !s.fresh {
		if selfEnded(n) {
			var ok bool
			if notBefore, ok = p.restart(s, n); !ok {
				return
			}
		}
		// Only the update moves a place to another specification: a
		// crash must not spread one that is not proven yet.
		if p.isOutdated(n.SpecVersion) && p.Specs[n.SpecVersion] != nil {
			version = n.SpecVersion
		}
	}
	p.again(notBefore)
	s.fresh = true
	p.out.Create = append(p.out.Create, weft.Task{
		Meta:        weft.Meta{CreatedAt: p.Now, UpdatedAt: p.Now},
		Service:     p.Service.ID,
		Slot:        s.key.slot,
		SpecVersion: version,
		Node:        s.key.node,
		Desired:     weft.TaskRunning,
		Status:      weft.TaskStatus{State: weft.TaskNew, At: p.Now, Message: "created"},
		NotBefore:   notBefore,
	})
}

// trim keeps the newest records of ended tasks and removes the others. The
// last record of a place without a live task stays: it says why there is none.
func (p *plan) trim(s *slot) {
	keep := max(p.History, 0)
	if r := p.spec.Restart; r.MaxAttempts > 0 {
		// Attempts are counted by these records.
		keep = max(keep, int(min(r.MaxAttempts, maxAttemptRecords))+1)
	}
	if s.live() == nil && !s.fresh {
		keep = max(keep, 1)
	}
	for _, t := range s.tasks {
		if t == s.current || t == s.old || !p.over(t) {
			continue
		}
		if t == p.failed[s.key] { // an update's failures are counted by these
			keep = max(keep-1, 0)
			p.desire(t, weft.TaskShutdown)
			continue
		}
		// A record that nobody will ever end tells nothing worth keeping.
		if keep == 0 || !t.Status.State.Ended() {
			p.remove(t)
			continue
		}
		keep--
		p.desire(t, weft.TaskShutdown)
	}
}

// maxAttemptRecords bounds the history that a large MaxAttempts keeps alive;
// validation refuses larger values.
const maxAttemptRecords = weft.MaxRestartAttempts
