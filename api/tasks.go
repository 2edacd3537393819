package api

import (
	"cmp"
	"context"
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// taskView joins tasks with what their JSON repeats: the spec version they run
// and the networks they are on.
type taskView struct {
	specs    map[specKey]*weft.ServiceSpec
	networks map[weft.ID]*weft.Network
}

type specKey struct {
	service weft.ID
	version uint64
}

func (s *Server) taskView(ctx context.Context, list *weft.TaskList) (*taskView, error) {
	v := &taskView{specs: map[specKey]*weft.ServiceSpec{}, networks: map[weft.ID]*weft.Network{}}
	for i := range list.Specs {
		sv := &list.Specs[i]
		v.specs[specKey{sv.Service, sv.Version}] = &sv.Spec
	}
	nets, err := s.cfg.Networks.Networks(ctx)
	if err != nil {
		return nil, err
	}
	for i := range nets {
		v.networks[nets[i].ID] = &nets[i]
	}
	return v, nil
}

// spec is what a task runs. A task whose version is missing (removed between
// two reads) is shown without it.
func (v *taskView) spec(t *weft.Task) *weft.ServiceSpec {
	if s := v.specs[specKey{t.Service, t.SpecVersion}]; s != nil {
		return s
	}
	return &weft.ServiceSpec{}
}

func (v *taskView) docker(t *weft.Task) swarm.Task {
	out := swarm.Task{
		ID:           string(t.ID),
		Meta:         dockerMeta(t.Meta),
		Annotations:  swarm.Annotations{Labels: map[string]string{}},
		Spec:         dockerTaskSpec(v.spec(t)),
		ServiceID:    string(t.Service),
		Slot:         int(t.Slot),
		NodeID:       string(t.Node),
		Status:       dockerTaskStatus(t),
		DesiredState: swarm.TaskState(t.Desired.String()),
		Volumes:      []swarm.VolumeAttachment{},
	}
	for _, a := range t.Attachments {
		na := swarm.NetworkAttachment{Network: swarm.Network{ID: string(a.Network)}}
		na.Addresses = append(na.Addresses, a.Addrs()...)
		if n := v.networks[a.Network]; n != nil {
			na.Network = swarmNetwork(n)
		}
		out.NetworksAttachments = append(out.NetworksAttachments, na)
	}
	return out
}

func dockerTaskStatus(t *weft.Task) swarm.TaskStatus {
	st := &t.Status
	out := swarm.TaskStatus{
		Timestamp: st.At,
		State:     swarm.TaskState(st.State.String()),
		Message:   st.Message,
		Err:       st.Err,
	}
	if st.State >= weft.TaskAssigned && !st.State.Ended() {
		out.PortStatus.Ports = dockerPorts(t.Ports)
	}
	// A container exists from the end of preparing; before, there is nothing
	// that `docker inspect` could find.
	if (st.State >= weft.TaskReady && st.State <= weft.TaskFailed) || st.PID != 0 {
		out.ContainerStatus = &swarm.ContainerStatus{ContainerID: weft.ContainerID(t.ID), PID: int(st.PID)}
		if st.ExitKnown {
			out.ContainerStatus.ExitCode = int(st.ExitCode)
		}
	}
	return out
}

func (s *Server) taskList(c *call) error {
	f, err := c.filters("id", "name", "service", "node", "label", "desired-state", "_up-to-date", "runtime")
	if err != nil {
		return err
	}
	list, keep, err := s.selectTasks(c.Context(), f)
	if err != nil {
		return err
	}
	view, err := s.taskView(c.Context(), &list)
	if err != nil {
		return err
	}
	slices.SortStableFunc(list.Tasks, func(a, b weft.Task) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Slot, b.Slot),
			b.Meta.CreatedAt.Compare(a.Meta.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	out := []swarm.Task{}
	for i := range list.Tasks {
		t := &list.Tasks[i]
		if keep(t, view.spec(t)) {
			out = append(out, view.docker(t))
		}
	}
	return c.json(out)
}

// selectTasks reads the tasks that the service and node filters select and
// returns a test for the other filters.
func (s *Server) selectTasks(ctx context.Context, f filters) (weft.TaskList, func(*weft.Task, *weft.ServiceSpec) bool, error) {
	none := weft.TaskList{}
	if err := f.oneOf("desired-state", "running", "shutdown", "accepted", "ready", "remove"); err != nil {
		return none, nil, err
	}
	if err := f.oneOf("runtime", "container", "plugin"); err != nil {
		return none, nil, err
	}
	upToDate, _, err := f.flag("_up-to-date")
	if err != nil {
		return none, nil, err
	}
	sel, err := s.taskFilter(ctx, f)
	if err != nil {
		return none, nil, err
	}
	current := map[weft.ID]*weft.ServiceSpec{}
	if upToDate {
		services, err := s.cfg.Services.Services(ctx)
		if err != nil {
			return none, nil, err
		}
		for i := range services {
			current[services[i].ID] = &services[i].Spec
		}
	}
	list, err := s.cfg.Tasks.Tasks(ctx, sel)
	// A task of an older version is up to date as long as nothing has changed
	// that concerns it: scaling replaces no task.
	isCurrent := func(t *weft.Task, spec *weft.ServiceSpec) bool {
		now := current[t.Service]
		return now != nil && !weft.NeedsRestart(spec, now)
	}
	keep := func(t *weft.Task, spec *weft.ServiceSpec) bool {
		return f.prefix("id", string(t.ID)) && f.prefix("name", t.Name(spec.Name), spec.Name) &&
			f.labels("label", spec.Labels) && f.has("desired-state", t.Desired.String()) &&
			f.has("runtime", "container") &&
			(!upToDate || isCurrent(t, spec))
	}
	return list, keep, err
}

// taskFilter turns the names in the filters into ids. The id of a service that
// has just been removed still selects its last tasks.
func (s *Server) taskFilter(ctx context.Context, f filters) (weft.TaskFilter, error) {
	var out weft.TaskFilter
	for _, ref := range f["service"] {
		v, err := s.cfg.Services.Service(ctx, ref)
		switch {
		case err == nil:
			out.Services = append(out.Services, v.ID)
		case statusOf(err) == 404 && weft.ID(ref).Valid():
			out.Services = append(out.Services, weft.ID(ref))
		default:
			return out, err
		}
	}
	for _, ref := range f["node"] {
		n, err := s.node(ctx, ref)
		switch {
		case err == nil:
			out.Nodes = append(out.Nodes, n.ID)
		case statusOf(err) == 404 && weft.ID(ref).Valid():
			out.Nodes = append(out.Nodes, weft.ID(ref))
		default:
			return out, err
		}
	}
	return out, nil
}

// task finds one task by id, name or beginning of its id.
func (s *Server) task(ctx context.Context, ref string) (weft.Task, *taskView, error) {
	list, err := s.cfg.Tasks.Tasks(ctx, weft.TaskFilter{})
	if err != nil {
		return weft.Task{}, nil, err
	}
	view, err := s.taskView(ctx, &list)
	if err != nil {
		return weft.Task{}, nil, err
	}
	i, err := resolve("task", ref, len(list.Tasks), func(i int) named {
		t := &list.Tasks[i]
		return named{string(t.ID), t.Name(view.spec(t).Name)}
	})
	if err != nil {
		return weft.Task{}, nil, err
	}
	return list.Tasks[i], view, nil
}

func (s *Server) taskInspect(c *call) error {
	t, view, err := s.task(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	return c.json(view.docker(&t))
}
