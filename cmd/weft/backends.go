package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/api"
	"github.com/weftnet/weft/orchestrator/wire"
)

// apiConfig gives the API what it needs: cluster-wide calls go to the leader
// through this node's membership, node-local ones to its agent and runtime.
func apiConfig(ms *membership, d *containerd.Driver, log *slog.Logger) api.Config {
	c := clusterCalls{ms}
	return api.Config{
		Swarm: ms, Services: c, Tasks: c, Nodes: c, Networks: c,
		Containers: nodeContainers{ms}, Images: nodeImages{d}, Repairs: ms.repairs, Drains: ms.drains, Ways: nodeWays{ms}, Log: log,
	}
}

// nodeWays is what this node's member, if it is one now, knows of its ways.
type nodeWays struct{ ms *membership }

// Ways implements api.WayLog.
func (n nodeWays) Ways() []weft.Way {
	m, err := n.ms.member()
	if err != nil {
		return nil
	}
	d := m.data.Load()
	if d == nil || d.natives == nil {
		return nil
	}
	return d.natives.Ways()
}

// clusterCalls finds the way to the leader anew for each call.
type clusterCalls struct{ ms *membership }

// ask runs one call on the leader.
func ask[T any](c clusterCalls, f func(wire.Control) (T, error)) (T, error) {
	ctl, err := c.ms.control()
	if err != nil {
		var none T
		return none, err
	}
	return f(ctl)
}

// tell is ask for calls without an answer.
func tell(c clusterCalls, f func(wire.Control) error) error {
	_, err := ask(c, func(ctl wire.Control) (struct{}, error) { return struct{}{}, f(ctl) })
	return err
}

func (c clusterCalls) Services(ctx context.Context) ([]weft.Service, error) {
	return ask(c, func(l wire.Control) ([]weft.Service, error) { return l.Services(ctx) })
}

func (c clusterCalls) Service(ctx context.Context, ref string) (weft.Service, error) {
	return ask(c, func(l wire.Control) (weft.Service, error) { return l.Service(ctx, ref) })
}

func (c clusterCalls) CreateService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error) {
	return ask(c, func(l wire.Control) (weft.Service, error) { return l.CreateService(ctx, spec) })
}

func (c clusterCalls) UpdateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error) {
	return ask(c, func(l wire.Control) (weft.Service, error) { return l.UpdateService(ctx, id, index, spec) })
}

func (c clusterCalls) RollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error) {
	return ask(c, func(l wire.Control) (weft.Service, error) { return l.RollbackService(ctx, id, index) })
}

func (c clusterCalls) RemoveService(ctx context.Context, id weft.ID) error {
	return tell(c, func(l wire.Control) error { return l.RemoveService(ctx, id) })
}

func (c clusterCalls) Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error) {
	return ask(c, func(l wire.Control) (weft.TaskList, error) { return l.Tasks(ctx, f) })
}

func (c clusterCalls) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return tell(c, func(l wire.Control) error { return l.TaskLogs(ctx, tasks, o, f) })
}

func (c clusterCalls) Nodes(ctx context.Context) ([]weft.Node, error) {
	return ask(c, func(l wire.Control) ([]weft.Node, error) { return l.Nodes(ctx) })
}

func (c clusterCalls) UpdateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error {
	return tell(c, func(l wire.Control) error { return l.UpdateNode(ctx, id, index, spec) })
}

func (c clusterCalls) RemoveNode(ctx context.Context, id weft.ID, force bool) error {
	return tell(c, func(l wire.Control) error { return l.RemoveNode(ctx, id, force) })
}

func (c clusterCalls) Networks(ctx context.Context) ([]weft.Network, error) {
	return ask(c, func(l wire.Control) ([]weft.Network, error) { return l.Networks(ctx) })
}

func (c clusterCalls) CreateNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error) {
	return ask(c, func(l wire.Control) (weft.Network, error) { return l.CreateNetwork(ctx, spec) })
}

func (c clusterCalls) RemoveNetwork(ctx context.Context, id weft.ID) error {
	return tell(c, func(l wire.Control) error { return l.RemoveNetwork(ctx, id) })
}

// nodeContainers are the containers of this node. A node in no cluster has
// none: all containers belong to services.
type nodeContainers struct{ ms *membership }

func (n nodeContainers) Containers(ctx context.Context) ([]weft.Container, error) {
	m, err := n.ms.member()
	var outside *notMember
	if errors.As(err, &outside) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return m.agent.Containers(ctx)
}

func (n nodeContainers) ContainerLogs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	m, err := n.ms.member()
	if err != nil {
		return err
	}
	return m.agent.ContainerLogs(ctx, task, o, f)
}

func (n nodeContainers) StopContainer(ctx context.Context, task weft.ID, grace time.Duration) error {
	m, err := n.ms.member()
	if err != nil {
		return err
	}
	return m.agent.StopContainer(ctx, task, grace)
}

func (n nodeContainers) KillContainer(ctx context.Context, task weft.ID, signal string) error {
	m, err := n.ms.member()
	if err != nil {
		return err
	}
	return m.agent.KillContainer(ctx, task, signal)
}

func (n nodeContainers) RemoveContainer(ctx context.Context, task weft.ID, force bool) error {
	m, err := n.ms.member()
	if err != nil {
		return err
	}
	return m.agent.RemoveContainer(ctx, task, force)
}

func (n nodeContainers) WaitContainer(ctx context.Context, task weft.ID) (int, error) {
	m, err := n.ms.member()
	if err != nil {
		return 0, err
	}
	return m.agent.WaitContainer(ctx, task)
}

// Exec translates the API's terminal sizes to the runtime's; the relay ends
// with the call.
func (n nodeContainers) Exec(ctx context.Context, task weft.ID, e api.Exec) (int, error) {
	m, err := n.ms.member()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group
	spec := runtime.ExecSpec{
		ID: e.ID, Cmd: e.Cmd, Env: e.Env, Dir: e.Dir, User: e.User, TTY: e.TTY, Privileged: e.Privileged, Started: e.Started,
	}
	if e.Resize != nil {
		sizes := make(chan runtime.Size)
		spec.Resize = sizes
		g.Go(func() error { relaySizes(ctx, e.Resize, sizes); return nil })
	}
	code, err := m.agent.Exec(ctx, task, spec, runtime.Streams{Stdin: e.Stdin, Stdout: e.Stdout, Stderr: e.Stderr})
	cancel()
	return code, errors.Join(err, g.Wait())
}

// relaySizes closes out when in is closed or ctx ends.
func relaySizes(ctx context.Context, in <-chan api.TermSize, out chan<- runtime.Size) {
	defer close(out)
	for {
		select {
		case <-ctx.Done():
			return
		case s, ok := <-in:
			if !ok {
				return
			}
			select {
			case out <- runtime.Size{Width: s.Width, Height: s.Height}:
			case <-ctx.Done():
				return
			}
		}
	}
}

// nodeImages is the image store of this node.
type nodeImages struct{ d *containerd.Driver }

func (n nodeImages) Images(ctx context.Context) ([]weft.Image, error) { return n.d.Images(ctx) }

func (n nodeImages) LoadImage(ctx context.Context, r io.Reader) ([]string, error) {
	return n.d.Load(ctx, r)
}

func (n nodeImages) RemoveImage(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error) {
	return n.d.RemoveImage(ctx, ref, force)
}

func (n nodeImages) PullImage(ctx context.Context, ref, auth string, report func(id, status string, current, total int64)) error {
	return n.d.Pull(ctx, ref, auth, func(p runtime.Progress) { report(p.ID, p.Status, p.Current, p.Total) })
}

func (n nodeImages) TagImage(ctx context.Context, ref, name string) error {
	return n.d.Tag(ctx, ref, name)
}
