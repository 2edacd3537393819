package reconcile

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// world is a small cluster: it applies outputs as the leader would and plays
// scheduler and agents.
type world struct {
	t     testing.TB
	now   time.Time
	svc   weft.Service
	specs map[uint64]*weft.ServiceSpec
	tasks map[weft.ID]*weft.Task
	nodes map[weft.ID]*weft.Node
	next  int
	gone  bool
	// broken spec versions fail as soon as they start.
	broken map[uint64]bool
	// brokenAt are slots where every version but the first does.
	brokenAt map[uint64]bool
	hist     int
	again    time.Time
	index    uint64          // of the log
	every    []*weft.Task    // all that there ever were
	stopped  map[uint64]bool // the last thing that happened at a place: its running task was told to stop
	// script gives the fate of the n-th start of an image at a place; nil = runs.
	script func(slot uint64, image string, n int) fate
	starts map[startKey]int
	fates  map[weft.ID]fate
}

// fate is how a task goes on after it was prepared.
type fate uint8

const (
	runs       fate = iota
	fails           // before it runs
	failsEarly      // within Monitor
	completes       // so, too, with success
	failsLate
	fatesEnd
)

type startKey struct {
	slot  uint64
	image string
}

// begin draws the fate of a task that starts.
func (w *world) begin(t *weft.Task) {
	if w.script == nil {
		w.set(t, weft.TaskRunning)
		return
	}
	k := startKey{t.Slot, w.specs[t.SpecVersion].Container.Image}
	w.fates[t.ID] = w.script(k.slot, k.image, w.starts[k])
	w.starts[k]++
	if w.fates[t.ID] == fails {
		w.set(t, weft.TaskFailed)
	} else {
		w.set(t, weft.TaskRunning)
	}
}

// end ends a task that runs when it is fated to, and reports whether it did.
func (w *world) end(t *weft.Task) bool {
	ran := w.now.Sub(t.Status.Ran)
	switch f := w.fates[t.ID]; {
	case f == failsEarly && ran > w.svc.Spec.Update.Monitor/4, f == failsLate && ran > w.svc.Spec.Update.Monitor*3/2:
		w.set(t, weft.TaskFailed)
	case f == completes && ran > w.svc.Spec.Update.Monitor/4:
		w.set(t, weft.TaskComplete)
	default:
		return false
	}
	return true
}

func newWorld(t testing.TB, nodes int, spec weft.ServiceSpec) *world {
	spec.Defaults()
	w := &world{
		t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		svc:   weft.Service{ID: "svc", Spec: spec, SpecVersion: 1},
		specs: map[uint64]*weft.ServiceSpec{1: &spec},
		tasks: map[weft.ID]*weft.Task{}, nodes: map[weft.ID]*weft.Node{},
		broken: map[uint64]bool{}, hist: 2, starts: map[startKey]int{}, stopped: map[uint64]bool{}, fates: map[weft.ID]fate{},
	}
	for i := range nodes {
		id := weft.ID(fmt.Sprintf("node%d", i))
		w.nodes[id] = &weft.Node{ID: id, Status: weft.NodeStatus{State: weft.NodeReady}}
	}
	return w
}

func (w *world) sortedTasks() []*weft.Task {
	var out []*weft.Task
	for _, t := range w.tasks {
		out = append(out, t)
	}
	slices.SortFunc(out, func(a, b *weft.Task) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}

func (w *world) input() Input {
	in := Input{Service: w.svc, Removed: w.gone, Specs: w.specs, Now: w.now, History: w.hist}
	for _, t := range w.sortedTasks() {
		in.Tasks = append(in.Tasks, *t)
	}
	for _, n := range w.nodes {
		in.Nodes = append(in.Nodes, *n)
	}
	return in
}

// reconcile applies one output and checks that a second look changes nothing.
func (w *world) reconcile() {
	out := Reconcile(w.input())
	w.apply(out)
	for out.Rollback != "" { // the next look sees to the tasks
		out = Reconcile(w.input())
		w.apply(out)
	}
	if again := Reconcile(w.input()); !again.Empty() {
		w.t.Fatalf("not idempotent:\nfirst  %+v\nsecond %+v\n%s", out, again, w.dump())
	}
	w.again = out.Again
	if !out.Again.IsZero() && !out.Again.After(w.now) {
		w.t.Fatalf("asks for a look in the past: %v", out.Again)
	}
	w.check()
}

func (w *world) apply(out Output) {
	seen := map[weft.ID]bool{}
	w.index++
	if out.Rollback != "" {
		if w.svc.Previous == nil || len(out.Desired)+len(out.Create)+len(out.Delete) > 0 || out.Update != nil {
			w.t.Fatalf("bad rollback %+v\n%s", out, w.dump())
		}
		w.rollback("update rolled back "+out.Rollback, nil)
	}
	for _, d := range out.Desired {
		t := w.tasks[d.Task]
		if t == nil || d.State <= t.Desired || seen[d.Task] {
			w.t.Fatalf("bad desired change %+v (task %+v)\n%s", d, t, w.dump())
		}
		seen[d.Task] = true
		if live(t) && t.Status.State == weft.TaskRunning {
			w.stopped[t.Slot] = true
		}
		t.Desired = d.State
		t.Meta.UpdatedAt, t.Meta.Index = w.now, w.index
	}
	for _, id := range out.Delete {
		t := w.tasks[id]
		if t == nil || seen[id] {
			w.t.Fatalf("bad delete of %s\n%s", id, w.dump())
		}
		if w.nodes[t.Node] != nil && t.Status.State >= weft.TaskAssigned && t.Status.State != weft.TaskRemove {
			w.t.Fatalf("deleted task %s behind its agent's back\n%s", id, w.dump())
		}
		delete(w.tasks, id)
	}
	for _, t := range out.Create {
		w.next++
		t.Meta.Index = w.index
		t.ID = weft.ID(fmt.Sprintf("task%05d", w.next))
		if w.specs[t.SpecVersion] == nil || t.Desired != weft.TaskRunning || t.Service != "svc" {
			w.t.Fatalf("bad task %+v", t)
		}
		w.tasks[t.ID] = &t
		w.every = append(w.every, &t)
	}
	if out.Update != nil {
		w.svc.Update = *out.Update
	}
}

// check holds what must be true at all times.
func (w *world) check() {
	live := map[key][]*weft.Task{}
	slots := map[uint64]bool{}
	for _, t := range w.tasks {
		if t.Desired <= weft.TaskRunning && !t.Status.State.Ended() {
			k := key{slot: t.Slot}
			if w.svc.Spec.Mode == weft.ModeGlobal {
				k.node = t.Node
			}
			live[k] = append(live[k], t)
		}
		if t.Desired < weft.TaskRemove {
			slots[t.Slot] = true
		}
	}
	for k, ts := range live {
		most := 1
		if w.svc.Spec.Policy(w.svc.Update.State).StartFirst {
			most = 2
		}
		if len(ts) > most {
			w.t.Fatalf("%d live tasks at %v\n%s", len(ts), k, w.dump())
		}
	}
	if w.gone && len(live) > 0 {
		w.t.Fatalf("live tasks in a removed service\n%s", w.dump())
	}
	if !w.gone && w.svc.Spec.Mode == weft.ModeReplicated && uint64(len(slots)) != w.svc.Spec.Replicas {
		w.t.Fatalf("%d slots, want %d\n%s", len(slots), w.svc.Spec.Replicas, w.dump())
	}
}

func (w *world) set(t *weft.Task, s weft.TaskState) {
	ran := t.Status.Ran
	if s == weft.TaskRunning {
		ran = w.now
	}
	w.index++
	t.Status = weft.TaskStatus{State: s, At: w.now, Ran: ran}
	t.Meta.UpdatedAt, t.Meta.Index = w.now, w.index
	if selfEnded(t) {
		w.stopped[t.Slot] = false
	}
}

// rollback gives the service its previous specification, as the leader does.
func (w *world) rollback(message string, previous *weft.ServiceSpec) {
	spec := *w.svc.Previous
	w.svc.Spec, w.svc.Previous = spec, previous
	w.svc.SpecVersion++
	w.specs[w.svc.SpecVersion] = &spec
	w.svc.Update = weft.UpdateStatus{State: weft.RollbackRunning, StartedAt: w.now, Message: message}
}

// place plays the scheduler: first fit by count.
func (w *world) place(t *weft.Task) {
	if t.NotBefore.After(w.now) {
		return
	}
	var best weft.ID
	least := 1 << 30
	for id, n := range w.nodes {
		if n.Status.State != weft.NodeReady || n.Spec.Availability != weft.AvailabilityActive {
			continue
		}
		if t.Slot == 0 && id != t.Node {
			continue
		}
		c := 0
		for _, o := range w.tasks {
			if o.Node == id && live(o) {
				c++
			}
		}
		if c < least || c == least && id < best {
			best, least = id, c
		}
	}
	if best != "" {
		t.Node = best
		w.set(t, weft.TaskAssigned)
	}
}

// advance moves one task one step; a silent node's tasks do not move.
func (w *world) advance(t *weft.Task) bool {
	if t.Status.State < weft.TaskAssigned {
		w.place(t)
		return t.Status.State >= weft.TaskAssigned
	}
	n := w.nodes[t.Node]
	if n == nil || n.Status.State == weft.NodeDown {
		return false
	}
	st := t.Status.State
	switch {
	case t.Desired == weft.TaskRemove && st == weft.TaskRemove:
		return false
	case t.Desired == weft.TaskRemove && st.Ended():
		w.set(t, weft.TaskRemove)
	case st.Ended():
		return false
	case t.Desired >= weft.TaskShutdown:
		w.set(t, weft.TaskShutdown)
	case st == weft.TaskAssigned:
		w.set(t, weft.TaskStarting)
	case st == weft.TaskStarting && (w.broken[t.SpecVersion] || w.brokenAt[t.Slot] && t.SpecVersion > 1):
		w.set(t, weft.TaskFailed)
	case st == weft.TaskStarting:
		w.begin(t)
	default:
		return w.end(t)
	}
	return true
}

// calm lets everything run until nothing changes any more, without faults.
func (w *world) calm(each func()) {
	for range 5000 {
		w.reconcile()
		if each != nil {
			each()
		}
		moved := false
		for _, t := range w.sortedTasks() {
			if w.tasks[t.ID] != nil && w.advance(t) {
				moved = true
				w.reconcile()
				if each != nil {
					each()
				}
			}
		}
		if moved {
			w.now = w.now.Add(10 * time.Millisecond)
			continue
		}
		if w.again.IsZero() {
			return
		}
		w.now = w.again
	}
	w.t.Fatalf("does not come to rest\n%s", w.dump())
}

func (w *world) update(f func(*weft.ServiceSpec)) {
	spec := w.svc.Spec
	f(&spec)
	if NeedsRestart(&w.svc.Spec, &spec) {
		w.svc.Update = weft.UpdateStatus{}
	}
	prev := w.svc.Spec
	w.svc.Previous, w.svc.Spec = &prev, spec
	w.svc.SpecVersion++
	w.specs[w.svc.SpecVersion] = &spec
}

func (w *world) running() (all, current int) {
	for _, t := range w.tasks {
		if live(t) && t.Status.State == weft.TaskRunning {
			all++
			if !NeedsRestart(w.specs[t.SpecVersion], &w.svc.Spec) {
				current++
			}
		}
	}
	return all, current
}

func (w *world) dump() string {
	s := fmt.Sprintf("now %v version %d update %+v\n", w.now.Format("05.000"), w.svc.SpecVersion, w.svc.Update)
	for _, t := range w.sortedTasks() {
		s += fmt.Sprintf("  %s slot %d v%d node %q desired %s state %s\n", t.ID, t.Slot, t.SpecVersion, t.Node, t.Desired, t.Status.State)
	}
	return s
}
