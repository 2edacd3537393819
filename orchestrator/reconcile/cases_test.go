package reconcile

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

func replicated(n uint64) weft.ServiceSpec {
	return weft.ServiceSpec{Name: "web", Replicas: n, Container: weft.ContainerSpec{Image: "a"}}
}

func only(t *testing.T, w *world, slot uint64) *weft.Task {
	t.Helper()
	for _, x := range w.sortedTasks() {
		if x.Slot == slot && live(x) {
			return x
		}
	}
	t.Fatalf("no live task in slot %d\n%s", slot, w.dump())
	return nil
}

func TestRestartPolicy(t *testing.T) {
	for _, c := range []struct {
		name     string
		policy   weft.RestartPolicy
		end      weft.TaskState
		restarts int // of at most 6 ends, each 2 s after the start
		delay    time.Duration
	}{
		{"any after failure", weft.RestartPolicy{}, weft.TaskFailed, 6, 5 * time.Second},
		{"any after success", weft.RestartPolicy{Delay: time.Second}, weft.TaskComplete, 6, time.Second},
		{"on-failure after failure", weft.RestartPolicy{Condition: weft.RestartOnFailure}, weft.TaskRejected, 6, 5 * time.Second},
		{"on-failure after success", weft.RestartPolicy{Condition: weft.RestartOnFailure}, weft.TaskComplete, 0, 0},
		{"none", weft.RestartPolicy{Condition: weft.RestartNone}, weft.TaskFailed, 0, 0},
		{"three attempts", weft.RestartPolicy{MaxAttempts: 3}, weft.TaskFailed, 3, 5 * time.Second},
		{"three attempts in a short window", weft.RestartPolicy{MaxAttempts: 3, Window: 10 * time.Second}, weft.TaskFailed, 6, 5 * time.Second},
		{"three attempts in a long window", weft.RestartPolicy{MaxAttempts: 3, Window: time.Hour}, weft.TaskFailed, 3, 5 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := replicated(1)
			spec.Restart = c.policy
			w := newWorld(t, 1, spec)
			w.hist = 0
			w.calm(nil)
			restarts := 0
			for range 6 {
				x := only(t, w, 1)
				if x.NotBefore.IsZero() != (restarts == 0) {
					t.Fatalf("restart %d: not before %v", restarts, x.NotBefore)
				}
				w.now = w.now.Add(2 * time.Second)
				w.set(x, c.end)
				ended := w.now
				w.reconcile()
				if !slices.ContainsFunc(w.sortedTasks(), live) {
					break
				}
				restarts++
				if got := only(t, w, 1).NotBefore.Sub(ended); got != c.delay {
					t.Fatalf("delay %v, want %v", got, c.delay)
				}
				w.calm(nil)
			}
			w.now = w.now.Add(24 * time.Hour) // a refusal is for good
			w.calm(nil)
			if alive := slices.ContainsFunc(w.sortedTasks(), live); restarts != c.restarts || alive != (restarts == 6) {
				t.Errorf("%d restarts, want %d, alive %v\n%s", restarts, c.restarts, alive, w.dump())
			}
		})
	}
}

func TestSkewedClockDoesNotMoveTheRestart(t *testing.T) {
	for _, skew := range []time.Duration{-time.Hour, time.Hour} {
		w := newWorld(t, 1, replicated(1))
		w.calm(nil)
		x := only(t, w, 1)
		w.set(x, weft.TaskFailed)
		x.Status.At = w.now.Add(skew)
		w.reconcile()
		if got := only(t, w, 1).NotBefore.Sub(w.now); got != weft.DefaultRestartDelay {
			t.Errorf("skew %v: restart after %v", skew, got)
		}
	}
}

func TestLostAndDrainedNodes(t *testing.T) {
	for _, drain := range []bool{false, true} {
		w := newWorld(t, 2, replicated(2))
		w.calm(nil)
		old := only(t, w, 1)
		n := w.nodes[old.Node]
		if drain {
			n.Spec.Availability = weft.AvailabilityDrain
		} else {
			n.Status.State = weft.NodeDown
		}
		w.reconcile()
		repl := only(t, w, 1)
		if repl == old || !repl.NotBefore.IsZero() || old.Desired != weft.TaskShutdown {
			t.Fatalf("drain %v: not replaced at once\n%s", drain, w.dump())
		}
		w.calm(nil)
		if all, _ := w.running(); all != 2 {
			t.Fatalf("drain %v: %d running\n%s", drain, all, w.dump())
		}
		if !drain && old.Status.State != weft.TaskRunning {
			t.Fatal("a silent node's task cannot have moved")
		}
		n.Status.State, n.Spec.Availability = weft.NodeReady, weft.AvailabilityActive
		w.calm(nil)
		if old.Status.State != weft.TaskShutdown || only(t, w, 1) != repl {
			t.Errorf("drain %v: the orphan still runs, or its successor does not\n%s", drain, w.dump())
		}
	}
}

func TestGlobalKeepsTheTaskOfASilentNode(t *testing.T) {
	spec := weft.ServiceSpec{Name: "web", Mode: weft.ModeGlobal, Container: weft.ContainerSpec{Image: "a"}, Constraints: []string{"node.labels.x!=no"}}
	w := newWorld(t, 3, spec)
	w.nodes["node2"].Spec.Labels = map[string]string{"x": "no"}
	w.calm(nil)
	if all, _ := w.running(); all != 2 {
		t.Fatalf("%d running\n%s", all, w.dump())
	}
	before := w.dump()
	for _, s := range []weft.NodeState{weft.NodeDown, weft.NodeReady} {
		w.nodes["node0"].Status.State = s
		w.calm(nil)
		if w.dump() != before {
			t.Fatalf("%s:\n%s", s, w.dump())
		}
	}
	w.nodes["node0"].Spec.Labels = map[string]string{"x": "no"}
	w.calm(nil)
	if all, _ := w.running(); all != 1 {
		t.Errorf("a task stays where the constraint forbids it\n%s", w.dump())
	}
}

func TestScaleDownLevelsNodes(t *testing.T) {
	w := newWorld(t, 2, replicated(4))
	w.calm(nil)
	for _, x := range w.sortedTasks() { // slots 1, 2, 3 on node0, 4 on node1
		x.Node = map[bool]weft.ID{true: "node0", false: "node1"}[x.Slot < 4]
	}
	w.update(func(s *weft.ServiceSpec) { s.Replicas = 2 })
	w.calm(nil)
	only(t, w, 1)
	only(t, w, 4)
	w.update(func(s *weft.ServiceSpec) { s.Replicas = 3 })
	w.calm(nil)
	only(t, w, 2) // the lowest free number
}

func TestBrokenUpdatePauses(t *testing.T) {
	w := newWorld(t, 3, replicated(3))
	w.calm(nil)
	w.update(func(s *weft.ServiceSpec) { s.Container.Image = "broken" })
	w.broken[w.svc.SpecVersion] = true
	for range 200 { // broken tasks are restarted for ever, so calm would not end
		w.reconcile()
		for _, x := range w.sortedTasks() {
			w.advance(x)
		}
		w.now = w.now.Add(100 * time.Millisecond)
	}
	if all, current := w.running(); all != 2 || current != 0 || w.svc.Update.State != weft.UpdatePaused ||
		!strings.HasPrefix(w.svc.Update.Message, "update paused due to failure or early termination of task task0") {
		t.Fatalf("%d running, %d current\n%s", all, current, w.dump())
	}
	// A crash while paused must not spread the broken version.
	x := only(t, w, 3)
	w.set(x, weft.TaskFailed)
	w.reconcile()
	if only(t, w, 3).SpecVersion != 1 {
		t.Fatalf("the broken version spread\n%s", w.dump())
	}
	// Going back heals.
	w.update(func(s *weft.ServiceSpec) { s.Container.Image = "a" })
	w.calm(nil)
	if all, current := w.running(); all != 3 || current != 3 || w.svc.Update.State != weft.UpdateDone {
		t.Errorf("%d running, %d current\n%s", all, current, w.dump())
	}
}

func TestScalingAndLabelsLeaveTasksAlone(t *testing.T) {
	w := newWorld(t, 2, replicated(2))
	w.calm(nil)
	before := []*weft.Task{only(t, w, 1), only(t, w, 2)}
	w.update(func(s *weft.ServiceSpec) { s.Replicas, s.Labels = 3, map[string]string{"a": "b"} })
	w.calm(nil)
	if only(t, w, 1) != before[0] || only(t, w, 2) != before[1] || w.svc.Update.State != weft.UpdateNone {
		t.Errorf("tasks were replaced\n%s", w.dump())
	}
	w.update(func(s *weft.ServiceSpec) { s.ForceUpdate++ })
	w.calm(nil)
	if only(t, w, 1) == before[0] || w.svc.Update.State != weft.UpdateDone {
		t.Errorf("tasks were not replaced\n%s", w.dump())
	}
}

// Every field of a specification either makes tasks outdated or is listed as
// one that does not: a new field cannot be forgotten.
func TestNeedsRestartKnowsEveryField(t *testing.T) {
	leaderOnly := []string{"Name", "Labels", "Replicas", "Restart", "Update", "Rollback"}
	var change func(f reflect.Value)
	change = func(f reflect.Value) {
		switch f.Kind() {
		case reflect.String:
			f.SetString("x")
		case reflect.Bool:
			f.SetBool(true)
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
		case reflect.Map:
			f.Set(reflect.ValueOf(map[string]string{"x": "y"}))
		case reflect.Struct:
			change(f.Field(0))
		case reflect.Int64:
			f.SetInt(1)
		default:
			f.SetUint(1)
		}
	}
	check := func(field string, spec *weft.ServiceSpec) {
		if want := !slices.Contains(leaderOnly, field); NeedsRestart(&weft.ServiceSpec{}, spec) != want {
			t.Errorf("%s: want %v", field, want)
		}
	}
	for i := range reflect.TypeFor[weft.ServiceSpec]().NumField() {
		name := reflect.TypeFor[weft.ServiceSpec]().Field(i).Name
		if slices.Contains([]string{"Container", "Update", "Rollback", "Restart"}, name) {
			continue
		}
		var spec weft.ServiceSpec
		change(reflect.ValueOf(&spec).Elem().Field(i))
		check(name, &spec)
	}
	for i := range reflect.TypeFor[weft.ContainerSpec]().NumField() {
		var spec weft.ServiceSpec
		change(reflect.ValueOf(&spec.Container).Elem().Field(i))
		check("Container."+reflect.TypeFor[weft.ContainerSpec]().Field(i).Name, &spec)
	}
	check("Restart", &weft.ServiceSpec{Restart: weft.RestartPolicy{Delay: 1}})
	check("Update", &weft.ServiceSpec{Update: weft.UpdateConfig{Delay: 1}})
	check("Rollback", &weft.ServiceSpec{Rollback: weft.UpdateConfig{Delay: 1}})
	if NeedsRestart(&weft.ServiceSpec{}, &weft.ServiceSpec{Ports: []weft.PortSpec{}, Container: weft.ContainerSpec{Labels: map[string]string{}}}) {
		t.Error("absent and empty differ")
	}
}
