package agent

import (
	"time"

	"github.com/weftnet/weft"
)

// healthLog is how many results of a check are kept, Docker's number.
const healthLog = 5

// healthCore is the state machine of one container's check, without I/O,
// goroutine or clock:
//
//	            a run succeeds
//	starting ──────────────────► healthy
//	    │                        │     ▲ a run succeeds: the count of failures is 0
//	    │ Retries failures       │     │
//	    │ in a row, those of     ▼     │
//	    │ StartPeriod left out   failing (still healthy)
//	    ▼                        │
//	unhealthy ◄──────────────────┘ Retries failures in a row
//
// The task ends with unhealthy, so nothing leads out of it.
type healthCore struct {
	check   weft.HealthCheck
	started time.Time // of the container
	state   weft.Health
	next    time.Time // when the check is to be run
}

// newHealthCore begins to check at now; a container that was healthy when the
// last daemon ended is so until proven otherwise.
func newHealthCore(check weft.HealthCheck, started, now time.Time, wasHealthy bool) *healthCore {
	h := &healthCore{check: check, started: started, state: weft.Health{Status: weft.HealthStarting}}
	if wasHealthy {
		h.state.Status = weft.HealthHealthy
	}
	h.later(now)
	return h
}

// later puts the next run off: nothing is known of the one before, or it is over.
func (h *healthCore) later(now time.Time) {
	pause := h.check.Interval
	if h.isStarting(now) {
		pause = h.check.StartInterval
	}
	h.next = now.Add(pause)
}

// isStarting: a failure at t says nothing yet.
func (h *healthCore) isStarting(t time.Time) bool {
	return h.state.Status == weft.HealthStarting && t.Sub(h.started) < h.check.StartPeriod
}

// result takes one run.
func (h *healthCore) result(r weft.HealthResult) {
	log := append([]weft.HealthResult{}, h.state.Log...)
	if log = append(log, r); len(log) > healthLog {
		log = log[len(log)-healthLog:]
	}
	h.state.Log = log
	switch {
	case h.state.Status == weft.HealthUnhealthy:
	case r.ExitCode == 0:
		h.state.Status, h.state.FailingStreak = weft.HealthHealthy, 0
	case h.isStarting(r.Start):
	default:
		if h.state.FailingStreak++; h.state.FailingStreak >= h.check.Retries {
			h.state.Status = weft.HealthUnhealthy
		}
	}
	h.later(r.End)
}
