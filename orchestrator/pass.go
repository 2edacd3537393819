package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/reconcile"
	"github.com/weftnet/weft/orchestrator/schedule"
	"github.com/weftnet/weft/orchestrator/state"
)

// pass collects the decisions about one view. All changes about one service
// become one command and all commands one log entry: a service whose command is
// refused, because it changed meanwhile, holds back no other.
type pass struct {
	*term
	view *state.Snapshot
	k    *tracker
	now  time.Time
	// created tasks are not in the view yet, so they get their node before
	// they are stored.
	created []*weft.Task
	changes map[weft.ID][]state.Change // by service
	// full networks: what one task did not get, the next need not ask for.
	full map[weft.ID]error
	// settled gives the turn to edit back, which a pass takes that chooses
	// ports; nil = none was taken.
	settled func()
}

func (p *pass) run(ctx context.Context) error {
	c, _ := p.view.Cluster()
	nodes := p.view.Nodes()
	for _, id := range sortedIDs(p.k.dirty) {
		if err := p.service(ctx, id, nodes, c.Spec.TaskHistory); err != nil {
			return err
		}
	}
	if p.k.place || len(p.created) > 0 {
		return p.place(ctx)
	}
	return nil
}

func (p *pass) add(service weft.ID, c state.Change) {
	p.changes[service] = append(p.changes[service], c)
}

// service reconciles one service and gives its new tasks ids and addresses.
func (p *pass) service(ctx context.Context, id weft.ID, nodes []weft.Node, history int) error {
	svc, ok := p.view.Service(id)
	tasks := p.view.TasksOfService(id)
	if !ok && len(tasks) == 0 {
		delete(p.k.dirty, id)
		delete(p.k.timers, id)
		return nil
	}
	specs := map[uint64]*weft.ServiceSpec{}
	for _, s := range p.view.Specs(id) {
		specs[s.Version] = &s.Spec
	}
	if !ok {
		svc.ID = id // reconcile sees a removed service as no more than its id
	}
	out := reconcile.Reconcile(reconcile.Input{
		Service: svc, Removed: !ok, Tasks: tasks, Specs: specs, Nodes: nodes, Now: p.now, History: history,
	})
	if out.Rollback != "" {
		return p.rollback(ctx, svc, out.Rollback)
	}
	for _, d := range out.Desired {
		p.add(id, state.Change{TaskDesired: &state.TaskDesired{Task: d.Task, Desired: d.State}})
	}
	for _, task := range out.Delete {
		p.add(id, state.Change{Delete: &state.Ref{Kind: state.KindTask, ID: task}})
	}
	for i := range out.Create {
		p.create(svc, &out.Create[i])
	}
	if out.Update != nil && *out.Update != svc.Update {
		p.add(id, state.Change{ServiceUpdate: &state.ServiceUpdate{Service: id, SpecVersion: svc.SpecVersion, Update: *out.Update}})
	}
	delete(p.k.timers, id)
	if !out.Again.IsZero() {
		p.k.timers[id] = out.Again
	}
	return nil
}

func (p *pass) create(svc weft.Service, t *weft.Task) {
	t.ID = weft.NewID()
	t.Service = svc.ID
	t.NotBefore = t.NotBefore.UTC().Round(0)
	t.Status = weft.TaskStatus{State: weft.TaskNew, At: p.now.UTC().Round(0), Message: "created"}
	p.created = append(p.created, t)
	at, err := p.attach(t.ID, svc)
	if err != nil {
		t.Status.Err = err.Error()
		return
	}
	t.Attachments = at
	t.Status.State, t.Status.Message = weft.TaskPending, "pending task scheduling"
}

// attach gives a task its addresses on the networks of its service.
func (p *pass) attach(task weft.ID, svc weft.Service) ([]weft.Attachment, error) {
	networks, err := serviceNetworks(p.view, &svc.Spec)
	if err != nil || len(networks) == 0 {
		return nil, err
	}
	for _, n := range networks {
		if err := p.full[n.ID]; err != nil {
			return nil, err
		}
	}
	at, err := p.alloc.attach(task, networks)
	var full *fullError
	if errors.As(err, &full) {
		p.full[full.net.ID] = err
	}
	return at, err
}

// place looks for a node for every task that waits for one. It fails only when ctx
// ends.
func (p *pass) place(ctx context.Context) error {
	p.k.placeAt = time.Time{}
	byID := map[weft.ID]*weft.Task{}
	fresh := map[weft.ID]bool{}
	groups := map[state.Ref]*schedule.Group{}
	var order []state.Ref
	consider := func(t *weft.Task) {
		if t.NotBefore.After(p.now) {
			p.k.placeAt = earlier(p.k.placeAt, t.NotBefore)
			return
		}
		spec, ok := p.view.Spec(t.Service, t.SpecVersion)
		if !ok {
			return // its service went; the reconciliation removes it
		}
		byID[t.ID] = t
		k := state.Ref{ID: t.Service, Index: t.SpecVersion}
		g := groups[k]
		if g == nil {
			g = &schedule.Group{Spec: &spec.Spec, Service: t.Service}
			g.Networks, _ = serviceNetworks(p.view, &spec.Spec) //nolint:errcheck // a network that is gone conflicts with nothing
			groups[k] = g
			order = append(order, k)
		}
		g.Tasks = append(g.Tasks, *t)
	}
	for _, id := range sortedIDs(p.k.pending) {
		if t, ok := p.view.Task(id); ok && p.attachLate(&t) {
			consider(&t)
		}
	}
	for _, t := range p.created {
		fresh[t.ID] = true
		if t.Status.State == weft.TaskPending {
			consider(t)
		}
	}
	in := schedule.Input{Now: p.now, Nodes: p.k.nodes(p.view)}
	for _, k := range order {
		in.Groups = append(in.Groups, *groups[k])
	}
	decisions := schedule.Schedule(in)
	ports := newPortChooser(p, in.Nodes)
	for _, d := range decisions {
		if t := byID[d.Task]; t != nil {
			ports.want(t, d.Node)
		}
	}
	if err := ports.choose(ctx); err != nil {
		return err
	}
	for _, d := range decisions {
		t := byID[d.Task]
		if t == nil {
			continue
		}
		d = ports.settle(d)
		if d.Node == "" && ports.asks(t) {
			p.k.placeAt = earlier(p.k.placeAt, p.now.Add(portRetry))
		}
		p.decide(t, d, fresh[t.ID], ports.of[t.ID])
	}
	for _, t := range p.created {
		p.add(t.Service, state.Change{Task: t})
	}
	return nil
}

// attachLate tries again for a task that found a network full. It reports
// whether the task has its addresses now.
func (p *pass) attachLate(t *weft.Task) bool {
	if t.Status.State != weft.TaskNew {
		return true
	}
	svc, ok := p.view.Service(t.Service)
	if !ok {
		return false
	}
	at, err := p.attach(t.ID, svc)
	if err != nil {
		if t.Status.Err != err.Error() {
			s := t.Status
			s.Err = err.Error()
			p.add(t.Service, state.Change{TaskStatus: &state.TaskStatus{Task: t.ID, Status: s}})
		}
		return false
	}
	t.Attachments, t.Status.State = at, weft.TaskPending
	p.add(t.Service, state.Change{TaskAttach: &state.TaskAttach{Task: t.ID, Attachments: at}})
	return true
}

func (p *pass) decide(t *weft.Task, d schedule.Decision, fresh bool, ports []weft.PortSpec) {
	now := p.now.UTC().Round(0)
	switch {
	case d.Node != "" && fresh:
		t.Node, t.Ports = d.Node, ports
		t.Status = weft.TaskStatus{State: weft.TaskAssigned, At: now, Message: "scheduler assigned task to node"}
	case d.Node != "":
		p.add(t.Service, state.Change{TaskAssign: &state.TaskAssign{Task: t.ID, Node: d.Node, Ports: ports}})
	case fresh:
		t.Status.Err = d.Reason
	case t.Status.Err != d.Reason:
		p.add(t.Service, state.Change{TaskStatus: &state.TaskStatus{Task: t.ID, Node: t.Node, Status: weft.TaskStatus{
			State: weft.TaskPending, At: now, Message: "pending task scheduling", Err: d.Reason,
		}}})
	}
}

// commit proposes what was decided. Services whose command was refused stay
// dirty, and addresses chosen for refused tasks are free again.
func (p *pass) commit(ctx context.Context) error {
	var ids []weft.ID
	var cmds [][]state.Change
	for _, id := range sortedIDs(p.changes) {
		ids = append(ids, id)
		cmds = append(cmds, p.changes[id])
	}
	failed := map[weft.ID]bool{}
	var errs []error
	for i, err := range p.prop.each(ctx, cmds) {
		if err != nil {
			failed[ids[i]] = true
			errs = append(errs, fmt.Errorf("store decisions about service %s: %w", ids[i], err))
		}
	}
	for _, t := range p.created {
		if failed[t.Service] {
			p.alloc.release(p.store.View(), t.ID)
		}
	}
	for id := range p.k.dirty {
		if !failed[id] {
			delete(p.k.dirty, id)
		}
	}
	if len(failed) == 0 {
		p.k.place = false
	}
	return errors.Join(errs...)
}
