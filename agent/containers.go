package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/vxlan"
)

// The node's own containers, as the API shows them. All of them belong to
// tasks; whoever stops or kills one acts on the container alone, and the
// restart policy of its service decides what follows.

// Containers lists the containers of this node, the newest first.
func (a *Agent) Containers(ctx context.Context) ([]weft.Container, error) {
	list, err := a.cfg.Runtime.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	m := a.model.Load()
	out := make([]weft.Container, 0, len(list))
	for _, s := range list {
		c := m.container(a.cfg.Node, s)
		c.State.Health = a.healths.of(s.Task)
		out = append(out, c)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Created.After(out[j].Created) })
	return out, nil
}

func (m *model) container(node weft.ID, s runtime.Status) weft.Container {
	c := weft.Container{
		ID: weft.ContainerID(s.Task), Name: s.Spec.Name, Task: s.Task, Service: s.Spec.Service, Node: node,
		Image: s.Spec.Image, Command: append(append([]string{}, s.Spec.Entrypoint...), s.Spec.Args...),
		Labels: s.Spec.Labels, Created: s.CreatedAt, LogPath: s.LogPath,
		State: weft.ContainerState{
			Status: stateWord(s.State), PID: s.PID, ExitCode: s.Exit.Code, OOMKilled: s.Exit.OOM,
			StartedAt: s.StartedAt, FinishedAt: s.Exit.At,
		},
		Spec: weft.ContainerSpec{
			Image: s.Spec.Image, Entrypoint: s.Spec.Entrypoint, Args: s.Spec.Args, Env: s.Spec.Env,
			Dir: s.Spec.Dir, User: s.Spec.User, Hostname: s.Spec.Hostname, Labels: s.Spec.Labels,
			Mounts: s.Spec.Mounts, StopSignal: s.Spec.StopSignal, TTY: s.Spec.TTY, ReadOnly: s.Spec.ReadOnly,
			Health: s.Spec.Health,
		},
		Limits:   s.Spec.Limits,
		Networks: map[string]weft.Attachment{},
	}
	if t, ok := m.Tasks[s.Task]; ok {
		c.Ports = t.Ports
		for _, at := range t.Attachments {
			if n, ok := m.Networks[at.Network]; ok {
				c.Networks[n.Spec.Name] = at
			}
		}
		if sv, ok := m.Specs[specKey{t.Service, t.SpecVersion}]; ok {
			c.Image = sv.Spec.Container.Image // as typed, not as resolved here
			c.Spec.StopGrace = sv.Spec.Container.StopGrace
		}
	}
	return c
}

func stateWord(s runtime.State) string {
	switch s {
	case runtime.Created:
		return "created"
	case runtime.Running:
		return "running"
	case runtime.Exited:
		return "exited"
	default:
		return "lost"
	}
}

// ContainerLogs reads the log of a container of this node.
func (a *Agent) ContainerLogs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return a.cfg.Logs.Logs(ctx, task, o, func(r weft.LogRecord) error {
		r.Task, r.Node = task, a.cfg.Node
		return f(r)
	})
}

// StopContainer ends a container by its stop signal, then by SIGKILL after grace.
func (a *Agent) StopContainer(ctx context.Context, task weft.ID, grace time.Duration) error {
	if _, err := a.cfg.Runtime.Stop(ctx, task, grace); err != nil {
		return fmt.Errorf("stop container %s: %w", weft.ContainerID(task)[:12], err)
	}
	return nil
}

// KillContainer sends a signal by name.
func (a *Agent) KillContainer(ctx context.Context, task weft.ID, signal string) error {
	return a.cfg.Runtime.Signal(ctx, task, signal)
}

// RemoveContainer forgets an ended container; a running one only with force.
// A task that still belongs to a service cannot be removed quietly: it is
// killed and the service's restart policy acts.
func (a *Agent) RemoveContainer(ctx context.Context, task weft.ID, force bool) error {
	list, err := a.cfg.Runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, s := range list {
		if s.Task != task {
			continue
		}
		if s.State == runtime.Running && !force {
			return fmt.Errorf("%w: container %s is running: stop it first or force removal", weft.ErrConflict, weft.ContainerID(task)[:12])
		}
		if s.State == runtime.Running {
			if err := a.cfg.Runtime.Signal(ctx, task, "SIGKILL"); err != nil {
				return err
			}
			if _, err := a.cfg.Runtime.Wait(ctx, task); err != nil {
				return err
			}
		}
		return a.cfg.Runtime.Remove(ctx, task)
	}
	return fmt.Errorf("container %s: %w", weft.ContainerID(task)[:12], weft.ErrNotFound)
}

// WaitContainer blocks until the container has ended.
func (a *Agent) WaitContainer(ctx context.Context, task weft.ID) (int, error) {
	exit, err := a.cfg.Runtime.Wait(ctx, task)
	if err != nil {
		return 0, err
	}
	return exit.Code, nil
}

// Exec runs a further process in a container of this node.
func (a *Agent) Exec(ctx context.Context, task weft.ID, s runtime.ExecSpec, io runtime.Streams) (int, error) {
	return a.cfg.Execer.Exec(ctx, task, s, io)
}

// RemoveAll takes away everything that tasks left on this host: containers,
// logs, sandboxes, networks, and what the agent remembers. It is called after Run has ended, when the node
// leaves its cluster. It goes on past errors and returns them joined.
func (a *Agent) RemoveAll(ctx context.Context) error {
	var errs []error
	list, err := a.cfg.Runtime.List(ctx)
	errs = append(errs, err)
	for _, s := range list {
		errs = append(errs, a.cfg.Runtime.Remove(ctx, s.Task), a.cfg.Logs.RemoveLogs(ctx, s.Task))
	}
	boxes, err := a.cfg.Sandbox.List(ctx)
	errs = append(errs, err)
	for _, b := range boxes {
		errs = append(errs, a.cfg.Sandbox.Destroy(ctx, b.Task))
	}
	engines, err := a.cfg.Engines(ctx)
	if err == nil {
		err = engines.Overlay.Apply(ctx, vxlan.State{})
	}
	errs = append(errs, err)
	for _, path := range []string{a.modelPath(), a.endpointsPath(), a.tasks.statusDir()} {
		errs = append(errs, os.RemoveAll(path))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove what tasks left: %w", err)
	}
	return nil
}
