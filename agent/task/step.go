package task

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/weftnet/weft"
)

// Controller is what a task is made of on this node. All methods belong to one
// task, are idempotent, and may be repeated after a crash; they are never
// called concurrently. Errors are classed by sentinel: weft.ErrUnavailable is
// tried again, everything else ends the task while it is being prepared or
// started. A method that returns early because ctx ended says so with ctx's
// error.
type Controller interface {
	Readiness
	// Prepare makes everything but the process: image, sandbox, network,
	// container. With the container there it succeeds.
	Prepare(ctx context.Context) error
	// Observe tells what exists; it never changes anything.
	Observe(ctx context.Context) (Observed, error)
	// Start starts the prepared process.
	Start(ctx context.Context) (pid int, err error)
	// Wait blocks until the process has ended. A lost connection to the
	// runtime is not an exit; a container that is gone is weft.ErrNotFound, one
	// whose check has failed for good is ErrUnhealthy: it runs on.
	Wait(ctx context.Context) (Exit, error)
	// Shutdown stops the process, with its grace period, if there is one.
	Shutdown(ctx context.Context) (Exit, error)
	// Release gives back what an ended task must not hold: its sandbox and
	// its addresses. The container's record and logs stay.
	Release(ctx context.Context) error
	// Remove takes away everything, whatever state it is in.
	Remove(ctx context.Context) error
}

// Readiness says when a process that was started may be used.
type Readiness interface {
	// AwaitReady blocks until the started process can serve and is led to. One
	// that ends before is ErrEnded; one that will not be able to is
	// ErrUnhealthy, and runs on.
	AwaitReady(ctx context.Context) error
	// EndUnhealthy takes a task whose check has failed for good out of service
	// and stops its process. That it has failed is recorded before.
	EndUnhealthy(ctx context.Context) (Exit, error)
}

var (
	// ErrEnded: the process has ended; Observe tells how.
	ErrEnded = errors.New("the container has ended")
	// ErrUnhealthy: the check of the process has failed for good, Docker's
	// words. AwaitReady and Wait return it.
	ErrUnhealthy = errors.New("unhealthy container")
)

// Phase of a container.
type Phase uint8

const (
	Absent  Phase = iota // no container
	Created              // a container, not started
	Running
	Exited
	Lost // a record without a process, exit unknown
)

// Observed is the state of a task's container.
type Observed struct {
	Phase Phase
	PID   int  // in Running
	Exit  Exit // in Exited
}

// Exit of a container's first process.
type Exit struct {
	Code  int32
	Known bool
	OOM   bool
	At    time.Time // zero = not known; the time of asking is taken
}

// Action is what to do next for a task.
type Action uint8

const (
	ActNothing  Action = iota // until the desired state changes
	ActAccept                 // record the task
	ActBegin                  // announce preparing
	ActPrepare                // prepare
	ActAnnounce               // announce starting
	ActStart                  // start, or adopt what runs
	ActWait                   // wait for the end
	ActEnd                    // stop what is unhealthy
	ActShutdown               // stop
	ActRemove                 // take everything away
	ActDone                   // the record may be forgotten
)

// Decide is the state machine: the next action for a desired and an observed
// state.
func Decide(desired, state weft.TaskState) Action {
	switch {
	case desired >= weft.TaskRemove && state == weft.TaskRemove:
		return ActDone
	case desired >= weft.TaskRemove && state.Ended():
		return ActRemove
	case state.Ended():
		return ActNothing
	case desired >= weft.TaskShutdown:
		return ActShutdown
	case state < weft.TaskAccepted:
		return ActAccept
	case state == weft.TaskAccepted:
		return ActBegin
	case state == weft.TaskPreparing:
		return ActPrepare
	case state == weft.TaskReady && desired < weft.TaskRunning:
		return ActNothing
	case state == weft.TaskReady:
		return ActAnnounce
	case state == weft.TaskStarting:
		return ActStart
	}
	return ActWait
}

// Next says how to go on after a step.
type Next uint8

const (
	Again Next = iota // step again at once
	Idle              // step again when the desired state has changed
	Retry             // step again after a pause, or when the desired state has changed
	Done              // the task is gone
)

// next is Decide with the verdict of the check: what is unhealthy is stopped, but
// for what is to stop anyway.
func next(t *weft.Task) Action {
	act := Decide(t.Desired, t.Status.State)
	if t.Status.Unhealthy && (act == ActStart || act == ActWait) {
		return ActEnd
	}
	return act
}

// Step carries out one action and returns the status that follows. It blocks
// as long as the action does; when ctx ends meanwhile, the status is unchanged
// and the answer is Retry.
func Step(ctx context.Context, t *weft.Task, c Controller) (weft.TaskStatus, Next) {
	st := t.Status
	switch next(t) {
	case ActDone:
		return st, Done
	case ActNothing:
		return st, Idle
	case ActAccept:
		return enter(st, weft.TaskAccepted, "accepted"), Again
	case ActBegin:
		return enter(st, weft.TaskPreparing, "preparing"), Again
	case ActPrepare:
		return prepare(ctx, st, c)
	case ActAnnounce:
		return enter(st, weft.TaskStarting, "starting"), Again
	case ActStart:
		return start(ctx, st, c)
	case ActWait:
		return wait(ctx, st, c)
	case ActEnd:
		return end(ctx, st, c)
	case ActShutdown:
		exit, err := c.Shutdown(ctx)
		if err != nil && !errors.Is(err, weft.ErrNotFound) {
			return retry(ctx, st, "stop", err)
		}
		return ended(st, weft.TaskShutdown, "shutdown", exit), Again
	case ActRemove:
		if err := c.Remove(ctx); err != nil && !errors.Is(err, weft.ErrNotFound) {
			return retry(ctx, st, "remove", err)
		}
		st.State = weft.TaskRemove // keeps how it ended
		return st, Again
	}
	return st, Idle
}

func prepare(ctx context.Context, st weft.TaskStatus, c Controller) (weft.TaskStatus, Next) {
	err := c.Prepare(ctx)
	switch {
	case err == nil:
		return enter(st, weft.TaskReady, "prepared"), Again
	case ctx.Err() != nil || errors.Is(err, weft.ErrUnavailable):
		return retry(ctx, st, "prepare", err)
	}
	st = enter(st, weft.TaskRejected, "rejected")
	st.Err = weft.Text(err)
	return st, Again
}

// start starts the process once: one that runs is adopted, one that has run
// and ended is not started a second time.
func start(ctx context.Context, st weft.TaskStatus, c Controller) (weft.TaskStatus, Next) {
	o, err := c.Observe(ctx)
	if err != nil {
		return retry(ctx, st, "look for the container", err)
	}
	pid := o.PID
	switch o.Phase {
	case Running:
	case Exited:
		return exited(st, o.Exit), Again
	case Lost:
		return failed(st, "the container was lost while the node was restarting; its exit code is not known"), Again
	case Absent:
		return failed(st, "the container is gone; something outside weft removed it"), Again
	case Created:
		pid, err = c.Start(ctx)
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, weft.ErrUnavailable):
			return retry(ctx, st, "start", err)
		default:
			return failed(st, weft.Text(err)), Again
		}
	}
	switch err := c.AwaitReady(ctx); {
	case err == nil:
	case errors.Is(err, ErrEnded):
		if o, err = c.Observe(ctx); err == nil && o.Phase == Exited {
			return exited(st, o.Exit), Again
		}
		return retry(ctx, st, "look how the container ended", errors.Join(err, weft.ErrUnavailable))
	case ctx.Err() != nil || errors.Is(err, weft.ErrUnavailable):
		return retry(ctx, st, "wait until it is ready", err)
	case errors.Is(err, ErrUnhealthy):
		return unhealthy(st, err), Again
	default:
		return failed(st, weft.Text(err)), Again
	}
	st = enter(st, weft.TaskRunning, "started")
	st.PID = int32(pid)
	return st, Again
}

func wait(ctx context.Context, st weft.TaskStatus, c Controller) (weft.TaskStatus, Next) {
	exit, err := c.Wait(ctx)
	switch {
	case err == nil:
		return exited(st, exit), Again
	case ctx.Err() == nil && errors.Is(err, weft.ErrNotFound):
		return failed(st, "the container is gone; something outside weft removed it"), Again
	case errors.Is(err, ErrUnhealthy):
		return unhealthy(st, err), Again
	}
	return retry(ctx, st, "wait", err)
}

// unhealthy is the verdict, recorded before anything follows from it.
func unhealthy(st weft.TaskStatus, err error) weft.TaskStatus {
	st.Unhealthy, st.Err = true, weft.Text(err)
	return st
}

// notStopped stands in an unhealthy task's Err between the verdict and why the
// process is still there.
const notStopped = "; stop: "

func end(ctx context.Context, st weft.TaskStatus, c Controller) (weft.TaskStatus, Next) {
	why, _, _ := strings.Cut(st.Err, notStopped)
	exit, err := c.EndUnhealthy(ctx)
	if err != nil && !errors.Is(err, weft.ErrNotFound) {
		if ctx.Err() == nil {
			st.Err = why + notStopped + weft.Text(err) + " (is tried again)"
		}
		return st, Retry
	}
	st = ended(st, weft.TaskFailed, "failed", exit)
	st.Err = why
	return st, Again
}

// retry leaves the state and tells why nothing moves; the daemon's own end is
// no news about the task.
func retry(ctx context.Context, st weft.TaskStatus, verb string, err error) (weft.TaskStatus, Next) {
	if ctx.Err() == nil {
		st.Err = fmt.Sprintf("%s: %s (is tried again)", verb, weft.Text(err))
	}
	return st, Retry
}

func enter(st weft.TaskStatus, s weft.TaskState, message string) weft.TaskStatus {
	st.State, st.At, st.Message, st.Err, st.PID, st.Unhealthy = s, time.Now(), message, "", 0, false
	if s == weft.TaskRunning {
		st.Ran = st.At
	}
	return st
}

func failed(st weft.TaskStatus, why string) weft.TaskStatus {
	st = enter(st, weft.TaskFailed, "failed")
	st.Err = why
	return st
}

// exited is the end of a process that nobody asked to end.
func exited(st weft.TaskStatus, e Exit) weft.TaskStatus {
	if e.Known && e.Code == 0 && !e.OOM {
		return ended(st, weft.TaskComplete, "finished", e)
	}
	st = ended(st, weft.TaskFailed, "failed", e)
	switch {
	case e.OOM:
		st.Err = "the container ran out of memory: raise its limit"
	case e.Known:
		st.Err = fmt.Sprintf("task: non-zero exit (%d)", e.Code) // Docker's sentence
	default:
		st.Err = "the container ended; its exit code is not known"
	}
	return st
}

func ended(st weft.TaskStatus, s weft.TaskState, message string, e Exit) weft.TaskStatus {
	st = enter(st, s, message)
	st.ExitCode, st.ExitKnown = e.Code, e.Known
	if !e.At.IsZero() {
		st.At = e.At
	}
	return st
}
