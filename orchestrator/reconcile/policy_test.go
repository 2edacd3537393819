package reconcile

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// An update with faults pauses exactly when more places fail than are tolerated;
// else it reaches every other place, and places where the new task fails keep the
// old one if it may run beside it.
func TestFailurePolicy(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		spec := weft.ServiceSpec{Name: "web", Container: weft.ContainerSpec{Image: "a"}}
		spec.Replicas = rapid.Uint64Range(1, 6).Draw(rt, "replicas")
		spec.Update = weft.UpdateConfig{
			Parallelism: rapid.Uint64Range(0, 3).Draw(rt, "parallelism"), Monitor: time.Second,
			Delay:           rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "delay"),
			StartFirst:      rapid.Bool().Draw(rt, "startFirst"),
			OnFailure:       weft.UpdateFailure(rapid.IntRange(0, 1).Draw(rt, "continue")),
			MaxFailureRatio: rapid.SampledFrom([]float64{0, 0.2, 0.5, 1}).Draw(rt, "ratio"),
		}
		w := newWorld(t, 3, spec)
		w.t = fataler{t, rt}
		w.hist = rapid.IntRange(0, 3).Draw(rt, "history")
		w.calm(nil)
		w.brokenAt = map[uint64]bool{}
		for n := range spec.Replicas {
			if rapid.IntRange(0, 2).Draw(rt, "broken") == 0 {
				w.brokenAt[n+1] = true
			}
		}
		w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
		least := int(spec.Replicas)
		for range 900 { // broken places are tried for ever, so calm would not end
			w.reconcile()
			for _, x := range w.sortedTasks() {
				w.advance(x)
			}
			w.now = w.now.Add(50 * time.Millisecond)
			all, _ := w.running()
			least = min(least, all)
		}
		n, bad := int(spec.Replicas), len(w.brokenAt)
		tolerated := bad == 0 || spec.Update.OnFailure == weft.UpdateContinue || float64(bad) <= spec.Update.MaxFailureRatio*float64(n)
		all, current := w.running()
		switch st := w.svc.Update.State; {
		case !tolerated && st != weft.UpdatePaused:
			rt.Fatalf("%d of %d places fail, and the update is %d\n%s", bad, n, st, w.dump())
		case !tolerated:
		case current != n-bad:
			rt.Fatalf("%d of %d places are current, %d cannot be\n%s", current, n, bad, w.dump())
		case spec.Update.StartFirst && (all != n || least < n):
			rt.Fatalf("%d of %d places run, at least %d did\n%s", all, n, least, w.dump())
		case spec.Update.StartFirst && bad > 0 && st != weft.UpdateRunning, (!spec.Update.StartFirst || bad == 0) && st != weft.UpdateDone:
			rt.Fatalf("the update is %d\n%s", st, w.dump())
		}
		// What was broken heals: the update, or its retries, reach all places.
		w.brokenAt = nil
		if w.svc.Update.State == weft.UpdatePaused {
			w.update(func(s *weft.ServiceSpec) { s.Container.Image = "c" })
		}
		w.calm(nil)
		if all, current := w.running(); all != n || current != n || w.svc.Update.State != weft.UpdateDone {
			rt.Fatalf("%d running, %d current after healing, want %d\n%s", all, current, n, w.dump())
		}
	})
}

// An old task that runs on because the new one failed, and is not tried again,
// ends the update by a pause: it would go on for ever.
func TestStuckUpdatePauses(t *testing.T) {
	spec := replicated(2)
	spec.Update = weft.UpdateConfig{Parallelism: 1, Monitor: time.Second, StartFirst: true, OnFailure: weft.UpdateContinue}
	spec.Restart.Condition = weft.RestartNone
	w := newWorld(t, 2, spec)
	w.calm(nil)
	w.brokenAt = map[uint64]bool{2: true}
	w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
	w.calm(nil)
	if all, _ := w.running(); all != 2 || w.svc.Update.State != weft.UpdatePaused || only(t, w, 2).SpecVersion != 1 {
		t.Errorf("%d running, update %+v\n%s", all, w.svc.Update, w.dump())
	}
}
