package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/agent/task"
)

// Our own choices.
const (
	// drainSpread is how long a task goes on serving after all have taken it
	// out of their tables: for what is on its way, and for connections that
	// wait to be accepted.
	drainSpread = 150 * time.Millisecond
	// planeWait bounds the wait for the data plane in front of a step that
	// can be repeated.
	planeWait = 10 * time.Second
)

// controller is task.Controller for one task on this node.
type controller struct {
	a    *Agent
	task weft.Task
	// spec is the zero value when the leader did not send it (known false):
	// enough to stop and remove, not to begin.
	spec  weft.ServiceSpec
	known bool

	image  weft.ImageConfig // set by Prepare
	health health           // see health.go
}

var _ task.Controller = (*controller)(nil)

func newController(a *Agent, m *model, t weft.Task) *controller {
	v, ok := m.Specs[specKey{t.Service, t.SpecVersion}]
	return &controller{a: a, task: t, spec: v.Spec, known: ok}
}

// Prepare implements task.Controller.
func (c *controller) Prepare(ctx context.Context) error {
	m := c.a.model.Load()
	if err := c.complete(m); err != nil {
		return err
	}
	image, err := c.a.cfg.Images.Ensure(ctx, c.spec.Container.Image, nil)
	if err != nil {
		return err
	}
	c.image = image.Config
	box, err := c.a.cfg.Sandbox.Make(ctx, c.sandbox(m))
	if err != nil {
		return err
	}
	c.a.boxes.add(c.task.ID, func() (sandbox.Spec, bool) { return c.a.box(c.a.model.Load(), c.task.ID) })
	gen := c.a.plane.attach(c.local(box, weft.EndpointStarting))
	if err := c.awaitPlane(ctx, gen); err != nil {
		return err
	}
	if err := c.a.resolvers.ensure(c.task.ID, box.NetNS, c.a.view(m, c.task, box)); err != nil {
		return err
	}
	return c.a.cfg.Runtime.Create(ctx, c.container(box))
}

// complete checks that the leader sent what the task refers to. It always does,
// in the message that brings the task; without it the task is rejected, so that
// the leader hears of it.
func (c *controller) complete(m *model) error {
	if !c.known {
		return fmt.Errorf("%w: version %d of service %s was not sent to this node", weft.ErrInvalid, c.task.SpecVersion, c.task.Service)
	}
	for _, at := range c.task.Attachments {
		if _, ok := m.Networks[at.Network]; !ok {
			return fmt.Errorf("%w: network %s of service %s was not sent to this node", weft.ErrInvalid, at.Network, c.spec.Name)
		}
	}
	return nil
}

// awaitPlane blocks until the data plane holds change gen. What it lacks may
// come right by itself, so the error says "try again"; what this node cannot do
// at all does not, and another node may.
func (c *controller) awaitPlane(ctx context.Context, gen uint64) error {
	ctx, cancel := context.WithTimeout(ctx, planeWait)
	defer cancel()
	err := c.a.plane.wait(ctx, gen, c.a.model.Load().vnis(c.task))
	if errors.Is(err, weft.ErrUnsupported) {
		return fmt.Errorf("network of task %s cannot be made on this node: %w", c.task.ID, err)
	}
	if err != nil {
		return fmt.Errorf("%w: network of task %s is not ready: %w", weft.ErrUnavailable, c.task.ID, err)
	}
	return nil
}

func (c *controller) local(box sandbox.Sandbox, s weft.EndpointState) netstate.LocalTask {
	return netstate.LocalTask{Task: c.task, NetNS: box.NetNS, Gateway: box.GatewayAddr.Addr(), State: s}
}

func (c *controller) hostname() string {
	if h := c.spec.Container.Hostname; h != "" {
		return h
	}
	return weft.ContainerID(c.task.ID)[:12]
}

// sandbox is what surrounds the container. A task has a way out unless all its
// networks are internal; one without networks has nothing else.
func (c *controller) sandbox(m *model) sandbox.Spec {
	k := &c.spec.Container
	s := sandbox.Spec{
		Task: c.task.ID, Hostname: c.hostname(), Hosts: map[string][]netip.Addr{},
		Search: k.DNS.SearchDomains(c.a.cfg.Names.HostSearch()), Options: k.DNS.Options,
	}
	own := 0
	for _, at := range c.task.Attachments {
		n, known := m.Networks[at.Network]
		if known && n.Spec.Ingress {
			continue
		}
		own++
		if _, named := s.Hosts[s.Hostname]; !named {
			for _, a := range at.Addrs() {
				s.Hosts[s.Hostname] = append(s.Hosts[s.Hostname], a.Addr())
			}
		}
		if !known || !n.Spec.Internal {
			s.Gateway = true
		}
	}
	if own == 0 {
		s.Gateway = true
	}
	for _, h := range k.Hosts {
		for _, name := range h.Names {
			s.Hosts[name] = append(s.Hosts[name], h.Addr)
		}
	}
	for _, v := range m.Services[c.task.Service].VIPs {
		for _, a := range v.Addrs() {
			s.VIPs = append(s.VIPs, a.Addr())
		}
	}
	return s
}

// container joins the service's wish with what the node has prepared.
func (c *controller) container(box sandbox.Sandbox) runtime.Spec {
	k := c.spec.Container
	name := c.task.Name(c.spec.Name)
	labels := maps.Clone(k.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, map[string]string{
		"com.docker.swarm.node.id":      string(c.a.cfg.Node),
		"com.docker.swarm.service.id":   string(c.task.Service),
		"com.docker.swarm.service.name": c.spec.Name,
		"com.docker.swarm.task":         "",
		"com.docker.swarm.task.id":      string(c.task.ID),
		"com.docker.swarm.task.name":    name,
	})
	check, shell := healthOf(k.Health, c.image)
	return runtime.Spec{
		Health: check, Shell: shell,
		Task: c.task.ID, Name: name, Node: c.a.cfg.Node, Service: c.task.Service,
		Image: k.Image, Entrypoint: k.Entrypoint, Args: k.Args, Env: k.Env, Dir: k.Dir, User: k.User,
		Hostname: c.hostname(), Labels: labels, Mounts: k.Mounts, StopSignal: k.StopSignal,
		TTY: k.TTY, ReadOnly: k.ReadOnly, Limits: c.spec.Limits, NetNS: box.NetNS,
		Files: map[string]string{
			"/etc/hosts": box.HostsPath, "/etc/resolv.conf": box.ResolvConfPath, "/etc/hostname": box.HostnamePath,
		},
		Cgroup: weft.CgroupPath(c.a.cfg.Node, c.task.ID),
	}
}

// Observe implements task.Controller.
func (c *controller) Observe(ctx context.Context) (task.Observed, error) {
	list, err := c.a.cfg.Runtime.List(ctx)
	if err != nil {
		return task.Observed{}, err
	}
	for _, s := range list {
		if s.Task != c.task.ID {
			continue
		}
		c.health.seen = s
		phase := map[runtime.State]task.Phase{
			runtime.Created: task.Created, runtime.Running: task.Running, runtime.Exited: task.Exited, runtime.Lost: task.Lost,
		}[s.State]
		return task.Observed{Phase: phase, PID: s.PID, Exit: exitOf(s.Exit)}, nil
	}
	return task.Observed{Phase: task.Absent}, nil
}

func exitOf(e runtime.Exit) task.Exit {
	return task.Exit{Code: int32(e.Code), Known: e.Known, OOM: e.OOM, At: e.At}
}

// Start implements task.Controller. What was observed before is true of what runs now,
// so that nothing has to be asked between here and the names of the task.
func (c *controller) Start(ctx context.Context) (int, error) {
	began := time.Now()
	pid, err := c.a.cfg.Runtime.Start(ctx, c.task.ID)
	if s := &c.health.seen; err == nil && s.Task == c.task.ID && s.State == runtime.Created {
		s.State, s.StartedAt, s.PID = runtime.Running, began, pid
	}
	return pid, err
}

// Shutdown implements task.Controller. The task leaves the tables of this node
// and of the others, and has its drain time, before it is signalled.
func (c *controller) Shutdown(ctx context.Context) (task.Exit, error) {
	seen, err := c.Observe(ctx)
	if err != nil {
		return task.Exit{}, err
	}
	if seen.Phase != task.Running {
		return seen.Exit, nil // known only of a container that has ended
	}
	began := c.a.tasks.beginDrain(c.task.ID, time.Now())
	if gen, attached := c.a.plane.drain(c.task.ID); attached {
		if err := c.awaitPlane(ctx, gen); err != nil {
			c.a.cfg.Log.Warn("drain task", weft.KeyTask, c.task.ID, weft.KeyErr, err)
		}
		if err := c.a.drain(ctx, c.task, began); err != nil {
			return task.Exit{}, err
		}
	}
	e, err := c.a.cfg.Runtime.Stop(ctx, c.task.ID, c.spec.Container.StopGrace)
	if errors.Is(err, weft.ErrNotFound) {
		return task.Exit{}, nil
	}
	return exitOf(e), err
}

// Release implements task.Controller: names and balancers first, then the
// overlay, then the namespace.
func (c *controller) Release(ctx context.Context) error {
	if gen, attached := c.a.plane.detach(c.task.ID); attached {
		if err := c.awaitPlane(ctx, gen); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// The namespace takes the task's ports with it; what else failed in
			// that pass is repeated by the plane.
			c.a.cfg.Log.Warn("detach task", weft.KeyTask, c.task.ID, weft.KeyErr, err)
		}
	}
	c.a.resolvers.close(c.task.ID)
	c.a.boxes.drop(c.task.ID)
	return c.a.cfg.Sandbox.Destroy(ctx, c.task.ID)
}

// Remove implements task.Controller.
func (c *controller) Remove(ctx context.Context) error {
	if err := c.a.cfg.Runtime.Remove(ctx, c.task.ID); err != nil {
		return err
	}
	if err := c.Release(ctx); err != nil {
		return err
	}
	c.a.healths.drop(c.task.ID) // until then it says why the task has ended
	return c.a.cfg.Logs.RemoveLogs(ctx, c.task.ID)
}
