package apitest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api"
)

// Services lists all services by name.
func (c *Cluster) Services(context.Context) ([]weft.Service, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return values(c.services, func(a, b *weft.Service) int { return cmp.Compare(a.Spec.Name, b.Spec.Name) }), c.enter("Services")
}

// Service finds by id, name, or beginning of the id.
func (c *Cluster) Service(ctx context.Context, ref string) (weft.Service, error) {
	all, err := c.Services(ctx)
	if err != nil {
		return weft.Service{}, err
	}
	for _, match := range []func(*weft.Service) bool{
		func(s *weft.Service) bool { return string(s.ID) == ref },
		func(s *weft.Service) bool { return s.Spec.Name == ref },
		func(s *weft.Service) bool { return strings.HasPrefix(string(s.ID), ref) },
	} {
		for i := range all {
			if match(&all[i]) {
				return all[i], nil
			}
		}
	}
	return weft.Service{}, fmt.Errorf("service %s: %w", ref, weft.ErrNotFound)
}

// resolveLocked turns network names into ids.
func (c *Cluster) resolveLocked(spec *weft.ServiceSpec) error {
	targets := slices.Clone(spec.Networks)
	for i, t := range targets {
		found := false
		for id, n := range c.networks {
			if id == t.Network || n.Spec.Name == string(t.Network) {
				targets[i].Network, found = id, true
			}
		}
		if !found {
			return fmt.Errorf("network %s: %w", t.Network, weft.ErrNotFound)
		}
	}
	spec.Networks = targets
	return nil
}

// CreateService stores a service and runs its tasks.
func (c *Cluster) CreateService(_ context.Context, spec weft.ServiceSpec) (weft.Service, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.enter("CreateService"); err != nil {
		return weft.Service{}, err
	}
	for _, s := range c.services {
		if s.Spec.Name == spec.Name {
			return weft.Service{}, fmt.Errorf("service %s exists already: name conflicts with an existing object: %w", spec.Name, weft.ErrConflict)
		}
	}
	s := &weft.Service{ID: c.NewID(), Meta: c.metaLocked(), Spec: spec}
	if err := c.storeLocked(s, spec); err != nil {
		return weft.Service{}, err
	}
	c.services[s.ID] = s
	return *s, nil
}

// UpdateService stores a new version and replaces the tasks that changed.
func (c *Cluster) UpdateService(_ context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.services[id]
	if s == nil {
		return weft.Service{}, fmt.Errorf("service %s: %w", id, weft.ErrNotFound)
	}
	if err := c.touchLocked(&s.Meta, index); err != nil {
		return weft.Service{}, err
	}
	old := s.Spec
	s.Previous = &old
	now := c.Now()
	s.Update = weft.UpdateStatus{}
	if weft.NeedsRestart(&old, &spec) {
		s.Update = weft.UpdateStatus{State: weft.UpdateDone, StartedAt: now, EndedAt: now, Message: "update completed"}
	}
	return *s, c.storeLocked(s, spec)
}

// RollbackService gives a service its previous version back.
func (c *Cluster) RollbackService(_ context.Context, id weft.ID, index uint64) (weft.Service, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.services[id]
	if s == nil || s.Previous == nil {
		return weft.Service{}, fmt.Errorf("service %s does not have a previous spec: %w", id, weft.ErrInvalid)
	}
	if err := c.touchLocked(&s.Meta, index); err != nil {
		return weft.Service{}, err
	}
	old, now := s.Spec, c.Now()
	spec := *s.Previous
	s.Previous = &old
	s.Update = weft.UpdateStatus{State: weft.RollbackDone, StartedAt: now, EndedAt: now, Message: weft.MessageRollbackDone}
	return *s, c.storeLocked(s, spec)
}

// storeLocked makes spec the newest version of s and brings its tasks there.
func (c *Cluster) storeLocked(s *weft.Service, spec weft.ServiceSpec) error {
	if err := c.resolveLocked(&spec); err != nil {
		return err
	}
	spec.Defaults() // what labels say of ports
	keeps := s.SpecVersion > 0 && !weft.NeedsRestart(&s.Spec, &spec)
	s.Spec = spec
	s.SpecVersion++
	c.specs[s.ID] = append(c.specs[s.ID], weft.SpecVersion{Service: s.ID, Version: s.SpecVersion, Spec: spec})
	s.Ports, s.VIPs = slices.Clone(spec.Ports), nil
	for i := range s.Ports {
		if s.Ports[i].Published == 0 && s.Ports[i].Mode == weft.PublishIngress {
			s.Ports[i].Published = c.nextPort
			c.nextPort += uint16(s.Ports[i].Ports())
		}
	}
	if spec.EndpointMode == weft.EndpointVIP {
		for _, n := range spec.Networks {
			s.VIPs = append(s.VIPs, weft.VIP(c.addressesLocked(n.Network, 2)))
		}
	}
	replicas := spec.Replicas
	if spec.Mode == weft.ModeGlobal {
		replicas = 1
	}
	kept := map[uint64]bool{}
	for _, t := range c.tasks {
		if t.Service != s.ID || t.Desired != weft.TaskRunning {
			continue
		}
		if kept[t.Slot] = keeps && t.Slot <= replicas; !kept[t.Slot] {
			c.endLocked(t, weft.TaskShutdown, 0)
		}
	}
	for slot := range replicas {
		if slot++; !kept[slot] && !(kept[0] && spec.Mode == weft.ModeGlobal) {
			c.runLocked(s, slot)
		}
	}
	return nil
}

func (c *Cluster) runLocked(s *weft.Service, slot uint64) {
	t := &weft.Task{
		ID: c.NewID(), Meta: c.metaLocked(), Service: s.ID, Slot: slot, SpecVersion: s.SpecVersion, Node: c.node.ID,
		Desired: weft.TaskRunning, Status: weft.TaskStatus{State: weft.TaskRunning, At: c.Now(), Message: "started", PID: int32(1000 + slot)},
	}
	if s.Spec.Mode == weft.ModeGlobal {
		t.Slot = 0
	}
	t.Ports = s.Spec.HostPorts()
	for i := range t.Ports {
		if t.Ports[i].Published == 0 {
			t.Ports[i].Published = weft.LastPublishedPort
		}
	}
	for _, n := range s.Spec.Networks {
		t.Attachments = append(t.Attachments, c.addressesLocked(n.Network, byte(10+len(c.tasks))))
	}
	c.tasks[t.ID] = t
	c.changedLocked()
}

// addressesLocked are the addresses with this last byte on a network.
func (c *Cluster) addressesLocked(network weft.ID, last byte) weft.Attachment {
	at := weft.Attachment{Network: network}
	for _, is6 := range []bool{false, true} {
		s, ok := c.networks[network].Spec.Subnet(is6)
		if !ok {
			continue
		}
		b := s.Prefix.Addr().AsSlice()
		b[len(b)-1] = last
		a, _ := netip.AddrFromSlice(b)
		if p := netip.PrefixFrom(a, s.Prefix.Bits()); at.Addr.IsValid() {
			at.Addr6 = p
		} else {
			at.Addr = p
		}
	}
	return at
}

func (c *Cluster) endLocked(t *weft.Task, state weft.TaskState, code int32) {
	t.Desired = weft.TaskShutdown
	t.Status = weft.TaskStatus{State: state, At: c.Now(), Message: state.String(), ExitCode: code, ExitKnown: true}
	c.changedLocked()
}

func (c *Cluster) changedLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// RemoveService forgets a service and its tasks.
func (c *Cluster) RemoveService(_ context.Context, id weft.ID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.services, id)
	for tid, t := range c.tasks {
		if t.Service == id {
			delete(c.tasks, tid)
		}
	}
	c.changedLocked()
	return nil
}

// Tasks lists the tasks that f selects, with all spec versions.
func (c *Cluster) Tasks(_ context.Context, f weft.TaskFilter) (weft.TaskList, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out weft.TaskList
	for _, t := range values(c.tasks, func(a, b *weft.Task) int { return cmp.Compare(a.Meta.Index, b.Meta.Index) }) {
		if (len(f.Services) == 0 || slices.Contains(f.Services, t.Service)) && (len(f.Nodes) == 0 || slices.Contains(f.Nodes, t.Node)) {
			out.Tasks = append(out.Tasks, t)
		}
	}
	for _, v := range c.specs {
		out.Specs = append(out.Specs, v...)
	}
	return out, c.enter("Tasks")
}

// TaskLogs gives every task two lines, one on each stream; following, it waits
// until the task is no longer running.
func (c *Cluster) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	for _, id := range tasks {
		if err := c.ContainerLogs(ctx, id, weft.LogOptions{Stdout: o.Stdout, Stderr: o.Stderr, Tail: o.Tail}, f); err != nil {
			return err
		}
	}
	if !o.Follow {
		return nil
	}
	for _, id := range tasks {
		if _, err := c.WaitContainer(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// ContainerLogs is TaskLogs for one task.
func (c *Cluster) ContainerLogs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	c.mu.Lock()
	node, at := c.node.ID, c.Now()
	c.mu.Unlock()
	for _, isErr := range []bool{false, true} {
		if (isErr && !o.Stderr) || (!isErr && !o.Stdout) {
			continue
		}
		line := "out of " + string(task) + "\n"
		if isErr {
			line = "err of " + string(task) + "\n"
		}
		if err := f(weft.LogRecord{Task: task, Node: node, Stderr: isErr, Time: at, Line: []byte(line)}); err != nil {
			return err
		}
	}
	if o.Follow {
		_, err := c.WaitContainer(ctx, task)
		return err
	}
	return nil
}

// Containers shows every task of the node as a container.
func (c *Cluster) Containers(context.Context) ([]weft.Container, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []weft.Container{}
	for _, t := range c.tasks {
		var spec weft.ServiceSpec
		for _, v := range c.specs[t.Service] {
			if v.Version == t.SpecVersion {
				spec = v.Spec
			}
		}
		ct := weft.Container{
			ID: weft.ContainerID(t.ID), Name: t.Name(spec.Name), Task: t.ID, Service: t.Service, Node: t.Node,
			Image: spec.Container.Image, Command: slices.Clone(spec.Container.Args),
			Created: t.Meta.CreatedAt, Spec: spec.Container, Limits: spec.Limits, Networks: map[string]weft.Attachment{}, Ports: t.Ports,
			Labels: map[string]string{"com.docker.swarm.service.name": spec.Name},
			State:  weft.ContainerState{Status: "running", PID: int(t.Status.PID), StartedAt: t.Status.At},
		}
		if t.Status.State != weft.TaskRunning {
			ct.State = weft.ContainerState{Status: "exited", ExitCode: int(t.Status.ExitCode), FinishedAt: t.Status.At}
		}
		for _, a := range t.Attachments {
			if n := c.networks[a.Network]; n != nil {
				ct.Networks[n.Spec.Name] = a
			}
		}
		out = append(out, ct)
	}
	return out, nil
}

// StopContainer ends a task, which is not replaced.
func (c *Cluster) StopContainer(_ context.Context, task weft.ID, _ time.Duration) error {
	return c.end(task, weft.TaskComplete, 0)
}

// KillContainer ends a task with the code of SIGKILL.
func (c *Cluster) KillContainer(_ context.Context, task weft.ID, _ string) error {
	return c.end(task, weft.TaskFailed, 137)
}

func (c *Cluster) end(task weft.ID, state weft.TaskState, code int32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tasks[task]
	if t == nil {
		return fmt.Errorf("task %s: %w", task, weft.ErrNotFound)
	}
	c.endLocked(t, state, code)
	return nil
}

// RemoveContainer forgets a task.
func (c *Cluster) RemoveContainer(_ context.Context, task weft.ID, _ bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.tasks, task)
	c.changedLocked()
	return nil
}

// WaitContainer waits until a task does not run.
func (c *Cluster) WaitContainer(ctx context.Context, task weft.ID) (int, error) {
	for {
		c.mu.Lock()
		t, changed := c.tasks[task], c.changed
		if t == nil || t.Status.State != weft.TaskRunning {
			code := 0
			if t != nil {
				code = int(t.Status.ExitCode)
			}
			c.mu.Unlock()
			return code, nil
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-changed:
		}
	}
}

// Exec knows four programs: "cat" copies stdin, "echo" prints its arguments,
// "warn" prints them on stderr, "exit" ends with the code N. Others do not exist.
func (c *Cluster) Exec(ctx context.Context, _ weft.ID, e api.Exec) (int, error) {
	out, errOut := e.Stdout, e.Stderr
	if out == nil {
		out = io.Discard
	}
	if errOut == nil {
		errOut = out
	}
	start := func() {
		if e.Started != nil {
			e.Started(4242)
		}
	}
	switch e.Cmd[0] {
	case "cat":
		start()
		in := e.Stdin
		if in == nil {
			in = bytes.NewReader(nil)
		}
		if _, err := io.Copy(out, in); err != nil {
			return 0, err
		}
		// A real process needs its context until it has ended, too.
		return 0, ctx.Err()
	case "echo":
		start()
		_, err := fmt.Fprintln(out, strings.Join(e.Cmd[1:], " "))
		return 0, err
	case "warn":
		start()
		_, err := fmt.Fprintln(errOut, strings.Join(e.Cmd[1:], " "))
		return 0, err
	case "exit":
		start()
		code := 0
		_, err := fmt.Sscan(e.Cmd[1], &code)
		return code, err
	}
	return 0, fmt.Errorf("start %q: executable file not found in $PATH: %w", e.Cmd[0], weft.ErrInvalid)
}
