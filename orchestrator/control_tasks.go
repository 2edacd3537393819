package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Tasks implements wire.Tasks.
func (m *Manager) Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error) {
	return read(m, ctx, func(v *state.Snapshot, _ *term) (weft.TaskList, error) { return selectTasks(v, f), nil })
}

func selectTasks(v *state.Snapshot, f weft.TaskFilter) weft.TaskList {
	var all []weft.Task
	switch {
	case len(f.Services) > 0:
		for _, id := range unique(f.Services) {
			all = append(all, v.TasksOfService(id)...)
		}
	case len(f.Nodes) > 0:
		for _, id := range unique(f.Nodes) {
			all = append(all, v.TasksOfNode(id)...)
		}
	default:
		all = v.Tasks()
	}
	type key struct {
		service weft.ID
		version uint64
	}
	list := weft.TaskList{Tasks: []weft.Task{}}
	have := map[key]bool{}
	for _, t := range all {
		if len(f.Nodes) > 0 && !slices.Contains(f.Nodes, t.Node) {
			continue
		}
		list.Tasks = append(list.Tasks, t)
		k := key{t.Service, t.SpecVersion}
		if have[k] {
			continue
		}
		have[k] = true
		if s, ok := v.Spec(k.service, k.version); ok {
			list.Specs = append(list.Specs, s)
		}
	}
	return list
}

func unique(ids []weft.ID) []weft.ID {
	out := slices.Clone(ids)
	slices.Sort(out)
	return slices.Compact(out)
}

// TaskLogs implements wire.Tasks: it asks the agents of all nodes that run the
// tasks at once and calls f for one record at a time. A node that cannot be
// asked does not silence the others; it is in the error at the end.
func (m *Manager) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	_, err := read(m, ctx, func(v *state.Snapshot, t *term) (struct{}, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(t.ctx, cancel)()
		return struct{}{}, t.logs(ctx, v, tasks, o, f)
	})
	return err
}

func (t *term) logs(ctx context.Context, v *state.Snapshot, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex // guards: f's calls, errs, stopped
		errs    []error
		stopped error
	)
	one := func(r weft.LogRecord) error {
		mu.Lock()
		defer mu.Unlock()
		if stopped != nil {
			return stopped
		}
		if stopped = f(r); stopped != nil {
			cancel() // the reader is gone: no agent needs to go on
		}
		return stopped
	}
	agents := map[weft.ID]wire.Agent{}
	for _, id := range unique(tasks) {
		task, ok := v.Task(id)
		if !ok {
			return fmt.Errorf("task %s %w", id, weft.ErrNotFound)
		}
		if task.Node == "" {
			continue // it has not run anywhere
		}
		agent, ok := agents[task.Node]
		if !ok {
			var err error
			if agent, err = t.agent(ctx, v, task.Node); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
			agents[task.Node] = agent // nil: reported once
		}
		if agent == nil {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := agent.Logs(ctx, id, o, one); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("read logs of task %s on node %s: %w", id, task.Node, err))
			}
		}()
	}
	wg.Wait()
	if stopped != nil {
		return stopped
	}
	return errors.Join(errs...)
}

func (t *term) agent(ctx context.Context, v *state.Snapshot, id weft.ID) (wire.Agent, error) {
	n, ok := v.Node(id)
	if !ok {
		return nil, fmt.Errorf("read logs: node %s %w", id, weft.ErrNotFound)
	}
	if n.Status.State == weft.NodeDown {
		return nil, fmt.Errorf("read logs: node %s is down: %w", nodeName(n), weft.ErrUnavailable)
	}
	a, err := t.m.cfg.Logs(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("reach agent of node %s: %w", nodeName(n), err)
	}
	return a, nil
}

// Session implements wire.Dispatcher.
func (m *Manager) Session(ctx context.Context, node weft.ID, r wire.SessionRequest, send func(wire.Assignments) error) error {
	t, err := m.leading()
	if err != nil {
		return err
	}
	return t.dispatch.Session(ctx, node, r, send) // it ends with the term by itself
}

// Report implements wire.Dispatcher.
func (m *Manager) Report(ctx context.Context, node weft.ID, r wire.Report) error {
	t, err := m.leading()
	if err != nil {
		return err
	}
	return t.dispatch.Report(ctx, node, r)
}
