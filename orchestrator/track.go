package orchestrator

import (
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/schedule"
	"github.com/weftnet/weft/orchestrator/state"
)

// tracker is what the leader's loop remembers between passes, so that a pass
// costs what changed and not what exists. It belongs to the loop's goroutine.
type tracker struct {
	tasks map[weft.ID]tracked
	usage map[weft.ID]*nodeUsage
	// pending tasks have no node yet, or (global) are not assigned yet.
	pending map[weft.ID]struct{}
	// dirty services need a reconciliation; timers say when others will.
	dirty  map[weft.ID]struct{}
	timers map[weft.ID]time.Time
	// place is set when a pending task may find a node that it did not
	// find before; placeAt is when the next of them may be placed that is
	// held back until then.
	place   bool
	placeAt time.Time
}

// tracked is a task's part in the sums.
type tracked struct {
	service, node weft.ID
	res           weft.Resources
	counts        bool // wanted to run: counts for the spread
	ports         []weft.PortSpec
}

type nodeUsage struct {
	tasks     int
	byService map[weft.ID]int
	reserved  weft.Resources
	// ports in mode host, by task.
	ports map[weft.ID]tracked
}

func newTracker() *tracker {
	return &tracker{
		tasks: map[weft.ID]tracked{}, usage: map[weft.ID]*nodeUsage{},
		pending: map[weft.ID]struct{}{}, dirty: map[weft.ID]struct{}{}, timers: map[weft.ID]time.Time{},
	}
}

// update takes in what changed up to the view v. gone is called for every task
// that has ended or was deleted.
func (k *tracker) update(c *state.Changed, v *state.Snapshot, gone func(weft.ID)) {
	if c.All {
		*k = *newTracker()
		for _, s := range v.Services() {
			k.dirty[s.ID] = struct{}{}
		}
		for _, t := range v.Tasks() {
			k.dirty[t.Service] = struct{}{}
			k.task(v, t.ID, &t, gone)
		}
		k.place = true
		return
	}
	for id := range c.Services {
		k.dirty[id] = struct{}{}
	}
	for id := range c.Tasks {
		if t, ok := v.Task(id); ok {
			k.task(v, id, &t, gone)
		} else {
			k.task(v, id, nil, gone)
		}
	}
	if len(c.Nodes) > 0 {
		k.place = true
		for _, s := range v.Services() {
			if s.Spec.Mode == weft.ModeGlobal {
				k.dirty[s.ID] = struct{}{}
			}
		}
		for id := range c.Nodes {
			for _, t := range v.TasksOfNode(id) {
				k.dirty[t.Service] = struct{}{}
			}
		}
	}
	if c.Cluster {
		k.place = true
	}
}

func (k *tracker) task(v *state.Snapshot, id weft.ID, t *weft.Task, gone func(weft.ID)) {
	if old, ok := k.tasks[id]; ok {
		k.add(old, -1)
		delete(k.usage[old.node].ports, id)
		delete(k.tasks, id)
	}
	delete(k.pending, id)
	if t == nil || t.Status.State.Ended() {
		k.place = true // its node has room now
		gone(id)
		return
	}
	if t.Status.State < weft.TaskAssigned && t.Desired <= weft.TaskRunning {
		k.pending[id] = struct{}{}
		k.place = true
	}
	if t.Node == "" || t.Status.State < weft.TaskAssigned {
		return
	}
	n := tracked{service: t.Service, node: t.Node, counts: t.Desired <= weft.TaskRunning, ports: t.Ports}
	if s, ok := v.Spec(t.Service, t.SpecVersion); ok {
		n.res = s.Spec.Reservations
	}
	k.tasks[id] = n
	k.add(n, 1)
	if len(n.ports) > 0 {
		k.usage[n.node].ports[id] = n
	}
}

func (k *tracker) add(t tracked, n int) {
	u := k.usage[t.node]
	if u == nil {
		u = &nodeUsage{byService: map[weft.ID]int{}, ports: map[weft.ID]tracked{}}
		k.usage[t.node] = u
	}
	u.reserved.NanoCPUs += int64(n) * t.res.NanoCPUs
	u.reserved.MemoryBytes += int64(n) * t.res.MemoryBytes
	if !t.counts {
		return
	}
	u.tasks += n
	if u.byService[t.service] += n; u.byService[t.service] == 0 {
		delete(u.byService, t.service)
	}
}

// nodes is the scheduler's view of the nodes.
func (k *tracker) nodes(v *state.Snapshot) []schedule.NodeInfo {
	nodes := v.Nodes()
	out := make([]schedule.NodeInfo, len(nodes))
	for i, n := range nodes {
		out[i] = schedule.NodeInfo{Node: n, ByService: map[weft.ID]int{}}
		if u := k.usage[n.ID]; u != nil {
			out[i].Tasks, out[i].ByService, out[i].Reserved = u.tasks, maps.Clone(u.byService), u.reserved
			out[i].Ports = u.held(v)
		}
	}
	return out
}

// held are the ports in mode host of a node's tasks, in the order of tasks.
func (u *nodeUsage) held(v *state.Snapshot) []weft.HeldPort {
	var out []weft.HeldPort
	for _, id := range sortedIDs(u.ports) {
		t := u.ports[id]
		by := "a task of a removed service"
		if s, ok := v.Service(t.service); ok {
			by = "service " + s.Spec.Name
		}
		for _, p := range t.ports {
			out = append(out, weft.HeldPort{Port: p, By: by})
		}
	}
	return out
}

// due marks what has become due, and answers when the next will.
func (k *tracker) due(now time.Time) (next time.Time) {
	if !k.placeAt.IsZero() && !k.placeAt.After(now) {
		k.place, k.placeAt = true, time.Time{}
	}
	next = k.placeAt
	for id, at := range k.timers {
		if !at.After(now) {
			k.dirty[id] = struct{}{}
			delete(k.timers, id)
			continue
		}
		next = earlier(next, at)
	}
	return next
}

// earlier is the earlier of two times, of which zero means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func sortedIDs[T any](m map[weft.ID]T) []weft.ID { return slices.Sorted(maps.Keys(m)) }
