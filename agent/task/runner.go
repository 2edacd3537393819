package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weftnet/weft"
)

// Config of a Runner. Task, Controller, Report and Log must be set.
type Config struct {
	// Task as last recorded on this node: after a restart of the daemon its
	// status is where the Runner goes on.
	Task       weft.Task
	Controller Controller
	// Report records a new status before the next step is taken, and passes
	// it on. It is called from Run only, never concurrently; an error is
	// logged and the report repeated.
	Report func(ctx context.Context, st weft.TaskStatus) error
	Log    *slog.Logger
	// RetryMin and RetryMax bound the pause before a failed step is
	// repeated; it doubles. Defaults 100 ms and 10 s: short enough for a
	// restarting runtime, long enough to leave a broken one alone.
	RetryMin, RetryMax time.Duration
	// RetryTold is the pause from which on a step that keeps failing is logged,
	// once for each reason. Default 1 s: nothing is heard of a runtime that
	// restarts, and an operator hears of the rest within seconds.
	RetryTold time.Duration
}

// Runner drives one task. Create it with NewRunner and call Run once; Desire
// and Status may be called at any time from any goroutine.
type Runner struct {
	cfg     Config
	changed chan struct{} // one token: the desired state has grown; never closed

	mu sync.Mutex // guards: task, interrupt
	// task is the newest desired state and status.
	task weft.Task
	// interrupt ends the step under way; nil between steps.
	interrupt context.CancelFunc
}

// NewRunner checks the configuration and sets defaults; it starts nothing.
func NewRunner(cfg Config) (*Runner, error) {
	if cfg.Task.ID == "" || cfg.Controller == nil || cfg.Report == nil || cfg.Log == nil {
		return nil, fmt.Errorf("%w: runner needs Task, Controller, Report and Log", weft.ErrInvalid)
	}
	if cfg.RetryMin <= 0 {
		cfg.RetryMin = 100 * time.Millisecond
	}
	if cfg.RetryMax < cfg.RetryMin {
		cfg.RetryMax = max(10*time.Second, cfg.RetryMin)
	}
	if cfg.RetryTold <= 0 {
		cfg.RetryTold = time.Second
	}
	return &Runner{cfg: cfg, task: cfg.Task, changed: make(chan struct{}, 1)}, nil
}

// Desire raises the desired state; a smaller one is ignored, for a task never
// goes back. Preparing, starting and waiting are interrupted when the task is
// to stop. It does not block.
func (r *Runner) Desire(s weft.TaskState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s <= r.task.Desired {
		return
	}
	stop := s >= weft.TaskShutdown && r.task.Desired < weft.TaskShutdown
	r.task.Desired = s
	if stop && r.interrupt != nil {
		r.interrupt()
	}
	select {
	case r.changed <- struct{}{}:
	default: // a token is there already
	}
}

// Status is the status last reported.
func (r *Runner) Status() weft.TaskStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.task.Status
}

// Run drives the task until it is removed (nil) or ctx ends (ctx's error).
// The end of ctx leaves the container as it is, for the next Run to adopt.
func (r *Runner) Run(ctx context.Context) error {
	pause, released, told := r.cfg.RetryMin, false, ""
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		status, next := r.step(ctx)
		if err := r.record(ctx, status); err != nil {
			return err
		}
		if next == Retry {
			// Not what comes right by itself, as while the runtime starts.
			if pause >= r.cfg.RetryTold && status.Err != told {
				r.cfg.Log.Warn("a step of a task keeps failing", weft.KeyTask, r.cfg.Task.ID, weft.KeyErr, status.Err)
				told = status.Err
			}
			if err := r.sleep(ctx, pause); err != nil {
				return err
			}
			pause = min(2*pause, r.cfg.RetryMax)
			continue
		}
		if next == Done {
			return nil
		}
		if status.State.Ended() && status.State != weft.TaskRemove && !released {
			// The end was reported first: the leader need not wait for
			// the sandbox to go.
			if err := r.cfg.Controller.Release(ctx); err != nil && !errors.Is(err, weft.ErrNotFound) {
				if ctx.Err() == nil {
					r.cfg.Log.Warn("cannot release an ended task, trying again", weft.KeyTask, r.cfg.Task.ID, weft.KeyErr, err)
				}
				if err := r.sleep(ctx, pause); err != nil {
					return err
				}
				pause = min(2*pause, r.cfg.RetryMax)
				continue
			}
			released = true
		}
		pause = r.cfg.RetryMin
		if next == Idle {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-r.changed:
			}
		}
	}
}

// step takes one step under a context that Desire can end.
func (r *Runner) step(ctx context.Context) (weft.TaskStatus, Next) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.mu.Lock()
	t := r.task
	r.interrupt = cancel
	r.mu.Unlock()
	st, next := Step(ctx, &t, r.cfg.Controller)
	r.mu.Lock()
	r.interrupt = nil
	r.mu.Unlock()
	return st, next
}

// record reports a changed status until it is taken.
func (r *Runner) record(ctx context.Context, st weft.TaskStatus) error {
	r.mu.Lock()
	same := st == r.task.Status
	r.mu.Unlock()
	if same {
		return nil
	}
	for pause := r.cfg.RetryMin; ; pause = min(2*pause, r.cfg.RetryMax) {
		err := r.cfg.Report(ctx, st)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.cfg.Log.Warn("cannot record the state of a task, trying again", weft.KeyTask, r.cfg.Task.ID, weft.KeyErr, err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
	r.mu.Lock()
	r.task.Status = st
	r.mu.Unlock()
	return nil
}

// sleep waits for a pause, or less if the desired state has changed.
func (r *Runner) sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-r.changed:
	case <-timer.C:
	}
	return nil
}
