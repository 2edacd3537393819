package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/task"
)

// sweepRetry is the pause before what belongs to no task is looked for again
// after a failure. Such remains harm nobody, so there is no hurry.
const sweepRetry = 5 * time.Second

// tasks runs one task.Runner per task of the model.
type tasks struct {
	a    *Agent
	wake chan struct{} // capacity 1; never closed

	// mu guards: model, fromLeader, swept, runners, last, draining. It is held while
	// a status goes to the outbox, so that the outbox sees them in the order
	// in which they were recorded.
	mu         sync.Mutex
	model      *model
	fromLeader bool // the leader has spoken in this run
	swept      bool // the sweep has begun
	runners    map[weft.ID]*task.Runner
	// last is the last recorded status of each task. A removed one stays
	// while the leader lists it, so that it is not begun again.
	last map[weft.ID]weft.TaskStatus
	// draining is when tasks began to drain; kept in their files.
	draining map[weft.ID]time.Time
}

func newTasks(a *Agent) *tasks {
	return &tasks{
		a: a, wake: make(chan struct{}, 1), model: newModel(),
		runners: map[weft.ID]*task.Runner{}, last: map[weft.ID]weft.TaskStatus{}, draining: map[weft.ID]time.Time{},
	}
}

// setModel takes what this node is assigned. It does not block.
func (t *tasks) setModel(m *model, fromLeader bool) {
	t.mu.Lock()
	t.model = m
	t.fromLeader = t.fromLeader || fromLeader
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run starts runners for new tasks and passes desired states on, until ctx
// ends. Runners run in g.
func (t *tasks) run(ctx context.Context, g *errgroup.Group) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wake:
		}
		if err := t.reconcile(ctx, g); err != nil {
			return err
		}
	}
}

func (t *tasks) reconcile(ctx context.Context, g *errgroup.Group) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, w := range t.model.Tasks {
		if r, ok := t.runners[id]; ok {
			r.Desire(w.Desired)
			continue
		}
		if t.last[id].State == weft.TaskRemove {
			continue
		}
		r, err := t.newRunnerLocked(w)
		if err != nil {
			return err
		}
		t.runners[id] = r
		g.Go(func() error { return t.drive(ctx, id, r) })
	}
	for id, r := range t.runners {
		if _, listed := t.model.Tasks[id]; !listed {
			r.Desire(weft.TaskRemove)
		}
	}
	t.forgetLocked()
	if t.fromLeader && !t.swept {
		t.swept = true
		g.Go(func() error { return t.runSweep(ctx) })
	}
	return nil
}

// forgetLocked drops what was recorded of tasks that are gone on both sides.
func (t *tasks) forgetLocked() {
	for id := range t.last {
		_, listed := t.model.Tasks[id]
		_, runs := t.runners[id]
		if !listed && !runs {
			delete(t.last, id)
			delete(t.draining, id)
		}
	}
}

// drive runs one task to its removal or to the end of ctx.
func (t *tasks) drive(ctx context.Context, id weft.ID, r *task.Runner) error {
	if err := r.Run(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("run task %s: %w", id, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.runners, id)
	t.forgetLocked()
	return nil
}

// newRunnerLocked goes on where the last run of the daemon stopped. Only a
// state of another version ends the agent; one that cannot be read is as one
// that was never written: every step may be repeated.
func (t *tasks) newRunnerLocked(w weft.Task) (*task.Runner, error) {
	log := t.a.cfg.Log.With(weft.KeyTask, w.ID)
	switch st, err := t.loadStatus(w.ID); {
	case errors.Is(err, weft.ErrUnsupported):
		return nil, err
	case err != nil:
		log.Error("state of a task is lost, its steps are repeated", weft.KeyErr, err)
	case st != nil:
		w.Status = st.Status
		if !st.Drain.IsZero() {
			t.draining[w.ID] = st.Drain
		}
	}
	t.last[w.ID] = w.Status
	return task.NewRunner(task.Config{
		Task: w, Controller: newController(t.a, t.model, w), Log: log,
		Report: func(_ context.Context, s weft.TaskStatus) error { return t.report(w.ID, s) },
	})
}

// report records a status and passes it on; a task that runs enters the
// balancers and names.
func (t *tasks) report(id weft.ID, s weft.TaskStatus) error {
	if s.State == weft.TaskRemove {
		if err := os.Remove(t.statusPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget task %s: %w", id, err)
		}
	} else if err := t.save(id, s); err != nil {
		return fmt.Errorf("record state of task %s: %w", id, err)
	}
	if s.State == weft.TaskRunning && !s.Unhealthy {
		t.a.plane.setReady(id)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last[id] = s
	t.a.outbox.put(id, s)
	return nil
}

func (t *tasks) save(id weft.ID, s weft.TaskStatus) error {
	t.mu.Lock()
	since := t.draining[id]
	t.mu.Unlock()
	return saveFile(t.statusPath(id), storedStatus{Version: statusVersion, Status: s, Drain: since})
}

// beginDrain is when a task began to drain: now, or in an earlier run of the daemon.
// It is called by the task's runner, as report is, so that nobody else writes the
// file. A disk that cannot be written to costs no more than the memory.
func (t *tasks) beginDrain(id weft.ID, now time.Time) time.Time {
	t.mu.Lock()
	since, known := t.draining[id]
	if known = known && !since.After(now); !known { // a clock that was set back must not add to it
		since = now
		t.draining[id] = now
	}
	last := t.last[id]
	t.mu.Unlock()
	if known {
		return since
	}
	if err := t.save(id, last); err != nil {
		t.a.cfg.Log.Warn("remember when a task began to drain", weft.KeyTask, id, weft.KeyErr, err)
	}
	return since
}

// reportAll puts every task's state into the outbox: a new session may be with
// a leader that missed some.
func (t *tasks) reportAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, s := range t.last {
		t.a.outbox.put(id, s)
	}
}

func (t *tasks) owns(id weft.ID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.runners[id]
	return ok
}

// runSweep removes, once, what belongs to no task: what a daemon left that was
// killed between recording and making, or that was away while the leader
// forgot the task. It begins when the leader has said what is assigned.
func (t *tasks) runSweep(ctx context.Context) error {
	for {
		err := t.sweep(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		t.a.cfg.Log.Error("remove what belongs to no task, trying again", weft.KeyErr, err)
		if !sleep(ctx, sweepRetry) {
			return nil
		}
	}
}

// sweep lists first and asks for the owner afterwards: whatever is listed was
// made by a task whose runner stood in the table before.
func (t *tasks) sweep(ctx context.Context) error {
	var found []weft.ID
	list, err := t.a.cfg.Runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, s := range list {
		found = append(found, s.Task)
	}
	boxes, err := t.a.cfg.Sandbox.List(ctx)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	for _, b := range boxes {
		found = append(found, b.Task)
	}
	stored, err := t.storedStatuses()
	if err != nil {
		return err
	}
	var errs []error
	seen := map[weft.ID]bool{}
	for _, id := range append(found, stored...) {
		if seen[id] || t.owns(id) {
			continue
		}
		seen[id] = true
		t.a.cfg.Log.Info("remove what belongs to no task", weft.KeyTask, id)
		c := newController(t.a, newModel(), weft.Task{ID: id})
		if err := c.Remove(ctx); err != nil {
			errs = append(errs, fmt.Errorf("remove stray task %s: %w", id, err))
			continue
		}
		if err := os.Remove(t.statusPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("forget task %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// statusVersion is the version of a stored task state.
const statusVersion = 1

// storedStatus is the file of one task's last state.
type storedStatus struct {
	Version int
	Status  weft.TaskStatus
	// Drain is when the task began to drain: its drain time goes on over the
	// end of the daemon. Zero = it does not.
	Drain time.Time `json:",omitzero"`
}

const statusSuffix = ".json"

func (t *tasks) statusDir() string { return filepath.Join(t.a.cfg.StateDir, "tasks") }

func (t *tasks) statusPath(id weft.ID) string {
	return filepath.Join(t.statusDir(), string(id)+statusSuffix)
}

// loadStatus returns nil for a task that was not begun.
func (t *tasks) loadStatus(id weft.ID) (*storedStatus, error) {
	var s storedStatus
	found, err := loadFile(t.statusPath(id), statusVersion, &s)
	if err != nil || !found {
		return nil, err
	}
	return &s, nil
}

// resumeState is how far the endpoints of a task may be used when the daemon
// comes back.
func (t *tasks) resumeState(w weft.Task) weft.EndpointState {
	st, err := t.loadStatus(w.ID)
	switch {
	case w.Desired >= weft.TaskShutdown, err == nil && st != nil && st.Status.Unhealthy:
		return weft.EndpointDraining
	case err == nil && st != nil && st.Status.State == weft.TaskRunning:
		return weft.EndpointReady
	}
	return weft.EndpointStarting // the runner looks further, and logs what it cannot read
}

// storedStatuses are the tasks of which a state is recorded.
func (t *tasks) storedStatuses() ([]weft.ID, error) {
	entries, err := os.ReadDir(t.statusDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list states of tasks: %w", err)
	}
	var out []weft.ID
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), statusSuffix); ok {
			out = append(out, weft.ID(id))
		}
	}
	return out, nil
}
