package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/task"
)

// Our own choices, as Docker's.
const (
	// maxHealthOutput bounds what is kept of a run's output.
	maxHealthOutput = 4096
	// statusFresh is how old a list of containers may be that tells what check a
	// container was made with.
	statusFresh = time.Second
	// maxHealthReason bounds what the state of a task says of it.
	maxHealthReason = 200
)

// healths are the states of all checks, for whoever shows containers. Safe for
// concurrent use.
type healths struct {
	mu  sync.Mutex // guards: all
	all map[weft.ID]weft.Health
}

func (h *healths) set(task weft.ID, s weft.Health) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all[task] = s
}

func (h *healths) of(task weft.ID) weft.Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.all[task]
}

func (h *healths) drop(task weft.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, task)
}

// healthOf is the check of a container of image, and what runs its line.
func healthOf(service weft.HealthCheck, image weft.ImageConfig) (check weft.HealthCheck, shell []string) {
	check, ok := service.Of(image.Health)
	if !ok || check.Test[0] != weft.HealthShell {
		return check, nil
	}
	if len(image.Shell) > 0 {
		return check, image.Shell
	}
	return check, []string{"/bin/sh", "-c"}
}

// healthCommand is what is run in the container.
func healthCommand(s *runtime.Spec) []string {
	return append(slices.Clone(s.Shell), s.Health.Test[1:]...)
}

// health is the check of a controller's container.
type health struct {
	seen    runtime.Status // when the container was last observed, or was started after that
	looked  bool           // core and command are right
	core    *healthCore
	command []string
}

// beginHealth finds the check that the container was made with, once.
func (c *controller) beginHealth(ctx context.Context, wasHealthy bool) error {
	if c.health.looked {
		return nil
	}
	s, found := c.health.seen, c.health.seen.State == runtime.Running
	if !found {
		var err error
		if s, found, err = c.a.statuses.of(ctx, c.a.cfg.Runtime, c.task.ID); err != nil {
			return fmt.Errorf("look for the health check: %w", err)
		}
	}
	if !found {
		return nil
	}
	c.health.looked = true
	if len(s.Spec.Health.Test) > 1 {
		c.health.core = newHealthCore(s.Spec.Health, s.StartedAt, time.Now(), wasHealthy)
		c.health.command = healthCommand(&s.Spec)
		c.a.healths.set(c.task.ID, c.health.core.state)
	}
	return nil
}

// statuses are containers as last listed: a daemon that adopts a thousand tasks
// asks for each of them.
type statuses struct {
	mu   sync.Mutex // guards: at, last; held while listing, so that one list serves all who wait
	at   time.Time
	last []runtime.Status
}

// of is the status of a container that has been started; found is false when
// there is none. It is at most statusFresh old.
func (l *statuses) of(ctx context.Context, rt runtime.Runtime, task weft.ID) (s runtime.Status, found bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	find := func() bool {
		i := slices.IndexFunc(l.last, func(s runtime.Status) bool { return s.Task == task && s.State != runtime.Created })
		if i >= 0 {
			s = l.last[i]
		}
		return i >= 0
	}
	if time.Since(l.at) < statusFresh && find() {
		return s, true, nil
	}
	if l.last, err = rt.List(ctx); err != nil {
		return s, false, err
	}
	l.at = time.Now()
	found = find()
	return s, found, nil
}

// AwaitReady implements task.Readiness: first the task can serve, then everybody
// leads to it.
func (c *controller) AwaitReady(ctx context.Context) error {
	if err := c.awaitHealthy(ctx); err != nil {
		return err
	}
	return c.a.arrive(ctx, c.task)
}

func (c *controller) awaitHealthy(ctx context.Context) error {
	if err := c.beginHealth(ctx, false); err != nil || c.health.core == nil {
		return err
	}
	_, err := c.watch(ctx, func(s weft.HealthStatus) bool { return s != weft.HealthStarting })
	switch {
	case c.health.core.state.Status == weft.HealthHealthy:
		return nil
	case c.health.core.state.Status == weft.HealthUnhealthy:
		return c.verdict()
	case err == nil:
		return task.ErrEnded
	}
	return err
}

// Wait implements task.Controller. What is recorded as running was healthy.
func (c *controller) Wait(ctx context.Context) (task.Exit, error) {
	if err := c.beginHealth(ctx, true); err != nil {
		return task.Exit{}, err
	}
	if c.health.core == nil {
		e, err := c.a.cfg.Runtime.Wait(ctx, c.task.ID)
		return exitOf(e), err
	}
	e, err := c.watch(ctx, func(s weft.HealthStatus) bool { return s == weft.HealthUnhealthy })
	if c.health.core.state.Status == weft.HealthUnhealthy {
		return task.Exit{}, c.verdict()
	}
	return exitOf(e), err
}

// watch waits for the end of the process and runs its check meanwhile, until
// the state is enough or ctx ends.
func (c *controller) watch(ctx context.Context, enough func(weft.HealthStatus) bool) (exit runtime.Exit, err error) {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		exit, err = c.a.cfg.Runtime.Wait(inner, c.task.ID)
	})
	h := c.health.core
	for !enough(h.state.Status) && sleep(inner, time.Until(h.next)) {
		if r, known := c.probe(inner); known {
			h.result(r)
			c.a.healths.set(c.task.ID, h.state)
		} else {
			h.later(time.Now())
		}
	}
	cancel()
	wg.Wait()
	return exit, err
}

// probe runs the check once. It is not known how that went when the runtime is
// away, or the container ends by itself: that says nothing of its health.
func (c *controller) probe(ctx context.Context) (r weft.HealthResult, known bool) {
	timeout := c.health.core.check.Timeout
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out := &headBuffer{}
	r.Start = time.Now()
	code, err := c.a.cfg.Execer.Exec(within, c.task.ID, runtime.ExecSpec{Cmd: c.health.command}, runtime.Streams{Stdout: out, Stderr: out})
	r.End, r.ExitCode, r.Output = time.Now(), code, out.String()
	switch {
	case ctx.Err() != nil:
		return r, false
	case within.Err() != nil:
		r.ExitCode, r.Output = -1, strings.TrimSuffix(fmt.Sprintf("Health check exceeded timeout (%s): %s", timeout, r.Output), ": ")
	case errors.Is(err, weft.ErrUnavailable), errors.Is(err, weft.ErrNotFound), errors.Is(err, weft.ErrConflict):
		return r, false
	case err != nil: // the command cannot be run
		r.ExitCode, r.Output = -1, weft.Text(err)
	}
	return r, true
}

// verdict is why the task is unhealthy.
func (c *controller) verdict() error {
	log := c.health.core.state.Log
	last := log[len(log)-1]
	why := fmt.Sprintf("exit %d", last.ExitCode)
	if out := strings.TrimSpace(last.Output); out != "" {
		why += ": " + out[:min(len(out), maxHealthReason)]
	}
	return fmt.Errorf("%w: %d checks in a row failed, the last with %s", task.ErrUnhealthy, c.health.core.state.FailingStreak, why)
}

// EndUnhealthy implements task.Readiness: the task leaves all tables, then it is
// stopped. It has no drain time: who is not well does not finish what it began.
func (c *controller) EndUnhealthy(ctx context.Context) (task.Exit, error) {
	if c.health.core == nil { // the last daemon found it out
		c.a.healths.set(c.task.ID, weft.Health{Status: weft.HealthUnhealthy})
	}
	if gen, attached := c.a.plane.drain(c.task.ID); attached {
		if err := c.awaitPlane(ctx, gen); err != nil && ctx.Err() == nil {
			c.a.cfg.Log.Warn("take out unhealthy task", weft.KeyTask, c.task.ID, weft.KeyErr, err)
		}
		c.a.confirm(ctx, c.task, drains())
	}
	if ctx.Err() != nil { // the next daemon goes on
		return task.Exit{}, ctx.Err()
	}
	e, err := c.a.cfg.Runtime.Stop(ctx, c.task.ID, c.spec.Container.StopGrace)
	return exitOf(e), err
}

// headBuffer keeps the beginning of what is written. Safe for concurrent use.
type headBuffer struct {
	mu sync.Mutex // guards: b
	b  []byte
}

func (h *headBuffer) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.b = append(h.b, p[:min(len(p), maxHealthOutput-len(h.b))]...)
	return len(p), nil
}

func (h *headBuffer) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.ToValidUTF8(string(h.b), "\ufffd")
}
