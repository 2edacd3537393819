package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// Input is a snapshot around one service.
type Input struct {
	// Service as stored. Whoever stores a new specification for which
	// NeedsRestart holds against the one before zeroes Service.Update in
	// the same command: a paused update stays paused until then.
	Service weft.Service
	Removed bool        // the service is to go, with all its tasks
	Tasks   []weft.Task // all records of the service, in any order
	// Specs are the versions that Tasks refer to. A task whose version is
	// missing counts as outdated.
	Specs   map[uint64]*weft.ServiceSpec
	Nodes   []weft.Node // of the cluster; a node that is not here is gone for good
	Now     time.Time
	History int // ended tasks that each slot keeps
}

// Output is the change to propose. Applying it and reconciling again at the
// same time gives an empty output.
type Output struct {
	// Create are new tasks. The caller draws their IDs, allocates their
	// addresses and then sets them pending; all else is filled in.
	Create  []weft.Task
	Desired []DesiredChange
	// Delete are records that no agent has to confirm.
	Delete []weft.ID
	// Update is the new status of the rolling update; nil = unchanged.
	Update *weft.UpdateStatus
	// Rollback asks to give the service its previous specification, because
	// the update has failed; it says why ("due to failure of …"). Nothing else
	// is in the output then: the next look sees to the tasks. "" = no.
	Rollback string
	// Again is when to reconcile even if nothing happens; zero = never.
	Again time.Time
}

// DesiredChange sets the desired state of a task; it only ever grows.
type DesiredChange struct {
	Task  weft.ID
	State weft.TaskState // TaskShutdown or TaskRemove
}

// Empty reports whether there is nothing to propose.
func (o *Output) Empty() bool {
	return len(o.Create) == 0 && len(o.Desired) == 0 && len(o.Delete) == 0 && o.Update == nil && o.Rollback == ""
}

// Reconcile compares what a service asks for with what it has.
//
// A replicated service has Replicas slots with one live task each; scaling up
// takes the lowest free numbers, scaling down removes slots without a running
// task first and then from the nodes with most tasks of the service. A global
// service has one task per node that is ready, active and satisfies the
// constraints. A task that ended is replaced as the restart policy says; one
// whose node is down, drained or gone is replaced at once.
func Reconcile(in Input) Output {
	p := newPlan(in)
	if in.Removed {
		for i := range in.Tasks {
			p.remove(&in.Tasks[i])
		}
		return p.out
	}
	p.gather()
	if in.Service.Spec.Mode == weft.ModeGlobal {
		p.scaleGlobal()
	} else {
		p.scaleReplicated()
	}
	keys := p.sortedKeys()
	for _, k := range keys {
		p.settle(p.slots[k])
	}
	p.update(keys)
	if p.out.Rollback != "" {
		return Output{Rollback: p.out.Rollback}
	}
	for _, k := range keys {
		p.fill(p.slots[k])
		p.trim(p.slots[k])
	}
	return p.out
}

// key names a place for one task: a slot of a replicated service, a node of a
// global one.
type key struct {
	slot uint64
	node weft.ID
}

// slot is a place with its tasks, newest first, those to be removed left out. A
// task of an outdated specification that had ended before one of the current did is
// behind all others: after a rollback the place belongs to the older task that has
// outlived it.
type slot struct {
	key   key
	tasks []*weft.Task
	// removing is set when an earlier task of the place is being removed
	// and may still run.
	removing bool
	// unwanted places get no new task.
	unwanted bool

	// Set by settle:
	current *weft.Task // live, of the current specification
	old     *weft.Task // live, of an outdated one
	// stopping: no task is live and the newest has yet to end.
	stopping bool

	// fresh is set by update: the place gets a task of the current
	// specification now, beside the old one if that is live.
	fresh bool
}

func (s *slot) newest() *weft.Task {
	if len(s.tasks) == 0 {
		return nil
	}
	return s.tasks[0]
}

func (s *slot) live() *weft.Task {
	if s.current != nil {
		return s.current
	}
	return s.old
}

type plan struct {
	Input
	out         Output
	spec        *weft.ServiceSpec
	nodes       map[weft.ID]*weft.Node
	slots       map[key]*slot
	outdated    map[uint64]bool // spec version to NeedsRestart, filled on demand
	constraints weft.Constraints
	// policy is that of the update or of the rollback, whichever it is.
	policy weft.UpdateConfig
	// failed are the tasks that fail an update that goes on, by place; set by
	// update.
	failed map[key]*weft.Task
}

func newPlan(in Input) *plan {
	p := &plan{
		Input: in, spec: &in.Service.Spec, policy: in.Service.Spec.Policy(in.Service.Update.State),
		nodes:    make(map[weft.ID]*weft.Node, len(in.Nodes)),
		slots:    make(map[key]*slot),
		outdated: map[uint64]bool{in.Service.SpecVersion: false},
	}
	for i := range in.Nodes {
		p.nodes[in.Nodes[i].ID] = &in.Nodes[i]
	}
	return p
}

// gather sorts the tasks into their places.
func (p *plan) gather() {
	for i := range p.Tasks {
		t := &p.Tasks[i]
		k := key{slot: t.Slot}
		if p.spec.Mode == weft.ModeGlobal {
			k = key{node: t.Node}
		}
		if t.Desired == weft.TaskRemove {
			p.remove(t)
			if !p.over(t) {
				p.slot(k).removing = true
			}
			continue
		}
		s := p.slot(k)
		s.tasks = append(s.tasks, t)
	}
	for _, s := range p.slots {
		slices.SortFunc(s.tasks, func(a, b *weft.Task) int {
			return cmp.Or(cmp.Compare(b.SpecVersion, a.SpecVersion),
				b.Meta.CreatedAt.Compare(a.Meta.CreatedAt), cmp.Compare(b.ID, a.ID))
		})
		p.outlived(s)
	}
}

// outlived puts the tasks of outdated specifications behind all others that had
// ended before one of the current did. The order is that of the log, which no
// leader's clock can change.
func (p *plan) outlived(s *slot) {
	var last uint64 // change of a current task that has ended
	for _, t := range s.tasks {
		if t.Status.State.Ended() && !p.isOutdated(t.SpecVersion) {
			last = max(last, t.Meta.Index)
		}
	}
	slices.SortStableFunc(s.tasks, func(a, b *weft.Task) int {
		behind := func(t *weft.Task) int {
			if t.Status.State.Ended() && t.Meta.Index < last && p.isOutdated(t.SpecVersion) {
				return 1
			}
			return 0
		}
		return cmp.Compare(behind(a), behind(b))
	})
}

func (p *plan) slot(k key) *slot {
	s := p.slots[k]
	if s == nil {
		s = &slot{key: k}
		p.slots[k] = s
	}
	return s
}

func (p *plan) sortedKeys() []key {
	return slices.SortedFunc(maps.Keys(p.slots), func(a, b key) int {
		return cmp.Or(cmp.Compare(a.slot, b.slot), cmp.Compare(a.node, b.node))
	})
}

// unclaimed reports whether no agent has the task or ever will: it was never
// assigned, or its node is no longer part of the cluster.
func (p *plan) unclaimed(t *weft.Task) bool {
	return t.Status.State < weft.TaskAssigned || t.Node == "" || p.nodes[t.Node] == nil
}

// over reports whether nothing of the task can run any more.
func (p *plan) over(t *weft.Task) bool { return t.Status.State.Ended() || p.unclaimed(t) }

// live: meant to run and not ended.
func live(t *weft.Task) bool { return t.Desired <= weft.TaskRunning && !t.Status.State.Ended() }

// lost reports whether the task's node cannot be counted on to run it.
func (p *plan) lost(t *weft.Task) bool {
	if t.Node == "" {
		return false
	}
	n := p.nodes[t.Node]
	return n == nil || n.Status.State == weft.NodeDown
}

func (p *plan) drained(t *weft.Task) bool {
	n := p.nodes[t.Node]
	return n != nil && n.Spec.Availability == weft.AvailabilityDrain
}

// stop ends a live task and reports whether it is over at once: a task that no
// agent has needs no confirmation and leaves no record.
func (p *plan) stop(s *slot, t *weft.Task) bool {
	if p.unclaimed(t) {
		p.out.Delete = append(p.out.Delete, t.ID)
		s.tasks = slices.DeleteFunc(s.tasks, func(x *weft.Task) bool { return x == t })
		return true
	}
	p.desire(t, weft.TaskShutdown)
	return false
}

// remove takes the task and its remains away.
func (p *plan) remove(t *weft.Task) {
	if p.unclaimed(t) || t.Status.State == weft.TaskRemove {
		p.out.Delete = append(p.out.Delete, t.ID)
		return
	}
	p.desire(t, weft.TaskRemove)
}

func (p *plan) desire(t *weft.Task, s weft.TaskState) {
	if t.Desired < s {
		p.out.Desired = append(p.out.Desired, DesiredChange{Task: t.ID, State: s})
	}
}

// again asks for another look at t.
func (p *plan) again(t time.Time) {
	if t.After(p.Now) && (p.out.Again.IsZero() || t.Before(p.out.Again)) {
		p.out.Again = t
	}
}

// since is when the task entered its state, as far as the leader can trust the
// node's clock: not before the report was stored, not in the future.
func (p *plan) since(t *weft.Task) time.Time {
	at := t.Status.At
	if t.Meta.UpdatedAt.After(at) {
		at = t.Meta.UpdatedAt
	}
	if at.After(p.Now) {
		at = p.Now
	}
	return at
}
