package reconcile

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// Random events, then calm: the service must end up exactly as asked, and the
// invariants of world.check must hold after every single step.
func TestConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		spec := weft.ServiceSpec{Name: "web", Container: weft.ContainerSpec{Image: "a"}}
		global := rapid.Bool().Draw(rt, "global")
		if global {
			spec.Mode = weft.ModeGlobal
		} else {
			spec.Replicas = rapid.Uint64Range(0, 5).Draw(rt, "replicas")
		}
		spec.Update = weft.UpdateConfig{
			Parallelism: rapid.Uint64Range(0, 2).Draw(rt, "parallelism"),
			Monitor:     5 * time.Second,
			Delay:       rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "delay"),
			StartFirst:  rapid.Bool().Draw(rt, "startFirst"),
		}
		nodes := rapid.IntRange(1, 4).Draw(rt, "nodes")
		w := newWorld(t, nodes, spec)
		w.t = fataler{t, rt}
		w.hist = rapid.IntRange(0, 3).Draw(rt, "history")
		added := 0
		node := func() *weft.Node {
			return w.nodes[weft.ID(fmt.Sprintf("node%d", rapid.IntRange(0, nodes-1).Draw(rt, "node")))]
		}
		task := func() *weft.Task {
			if ts := w.sortedTasks(); len(ts) > 0 {
				return ts[rapid.IntRange(0, len(ts)-1).Draw(rt, "task")]
			}
			return nil
		}
		for range rapid.IntRange(0, 60).Draw(rt, "events") {
			switch rapid.SampledFrom([]string{"step", "step", "step", "step", "all", "fail", "node", "avail", "scale", "image", "label", "time", "replace"}).Draw(rt, "event") {
			case "step":
				if x := task(); x != nil {
					w.advance(x)
				}
			case "all":
				for _, x := range w.sortedTasks() {
					w.advance(x)
				}
			case "fail":
				x := task()
				if x != nil && x.Status.State >= weft.TaskAssigned && !x.Status.State.Ended() && w.nodes[x.Node] != nil && w.nodes[x.Node].Status.State != weft.NodeDown {
					w.set(x, rapid.SampledFrom([]weft.TaskState{weft.TaskFailed, weft.TaskComplete, weft.TaskRejected}).Draw(rt, "end"))
				}
			case "node":
				if n := node(); n != nil {
					n.Status.State = rapid.SampledFrom([]weft.NodeState{weft.NodeReady, weft.NodeDown, weft.NodeUnknown}).Draw(rt, "state")
				}
			case "avail":
				if n := node(); n != nil {
					n.Spec.Availability = weft.Availability(rapid.IntRange(0, 2).Draw(rt, "availability"))
				}
			case "replace": // a node leaves for good, another comes
				if n := node(); n != nil {
					delete(w.nodes, n.ID)
					added++
					id := weft.ID(fmt.Sprintf("new%d", added))
					w.nodes[id] = &weft.Node{ID: id, Status: weft.NodeStatus{State: weft.NodeReady}}
				}
			case "scale":
				if !global {
					r := rapid.Uint64Range(0, 6).Draw(rt, "to")
					w.update(func(s *weft.ServiceSpec) { s.Replicas = r })
				}
			case "image":
				img := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "image")
				w.update(func(s *weft.ServiceSpec) { s.Container.Image = img })
			case "label":
				w.update(func(s *weft.ServiceSpec) { s.Labels = map[string]string{"n": fmt.Sprint(w.next)} })
			case "time":
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 20).Draw(rt, "seconds")) * time.Second)
			}
			w.reconcile()
		}
		for _, n := range w.nodes {
			n.Status.State, n.Spec.Availability = weft.NodeReady, weft.AvailabilityActive
		}
		w.calm(nil)
		want := int(w.svc.Spec.Replicas)
		if global {
			want = len(w.nodes)
		}
		all, current := w.running()
		if w.svc.Update.State == weft.UpdateRunning {
			rt.Fatalf("update never ends\n%s", w.dump())
		}
		if paused := w.svc.Update.State == weft.UpdatePaused; all != want && !(paused && spec.Update.StartFirst && all >= want) || current != want && !paused {
			rt.Fatalf("%d running, %d current, want %d\n%s", all, current, want, w.dump())
		}
		ended := map[key]int{}
		for _, x := range w.tasks {
			if x.Status.State.Ended() {
				ended[key{x.Slot, map[bool]weft.ID{true: x.Node}[global]}]++
			} else if !live(x) {
				rt.Fatalf("task %s still stopping\n%s", x.ID, w.dump())
			}
		}
		for k, n := range ended {
			if n > w.hist {
				rt.Fatalf("%d ended tasks at %v, history is %d\n%s", n, k, w.hist, w.dump())
			}
		}
		w.gone = true
		w.calm(nil)
		if len(w.tasks) != 0 {
			rt.Fatalf("removed service leaves tasks\n%s", w.dump())
		}
	})
}

// An update without faults never takes more from the service than Parallelism
// allows, and ends done.
func TestUpdateBounds(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		spec := weft.ServiceSpec{Name: "web", Container: weft.ContainerSpec{Image: "a"}}
		spec.Replicas = rapid.Uint64Range(1, 8).Draw(rt, "replicas")
		spec.Update = weft.UpdateConfig{
			Parallelism: rapid.Uint64Range(1, 4).Draw(rt, "parallelism"), Monitor: time.Second,
			StartFirst: rapid.Bool().Draw(rt, "startFirst"),
		}
		w := newWorld(t, 3, spec)
		w.t = fataler{t, rt}
		w.calm(nil)
		w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
		n, par := int(spec.Replicas), int(spec.Update.Parallelism)
		w.calm(func() {
			all, _ := w.running()
			low, high := n-par, n
			if spec.Update.StartFirst {
				low, high = n, n+par
			}
			if all < low || all > high {
				rt.Fatalf("%d running, allowed %d to %d\n%s", all, low, high, w.dump())
			}
		})
		if all, current := w.running(); all != n || current != n || w.svc.Update.State != weft.UpdateDone {
			rt.Fatalf("%d running, %d current, want %d, update %+v", all, current, n, w.svc.Update)
		}
	})
}

// fataler lets world fail the rapid test it runs in, so that it shrinks.
type fataler struct {
	testing.TB
	rt *rapid.T
}

func (f fataler) Fatalf(format string, args ...any) { f.rt.Fatalf(format, args...) }
