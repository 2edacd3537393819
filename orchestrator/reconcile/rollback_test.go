package reconcile

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// twin judges an update by all that ever happened, where the reconciler has only
// the records that are left.
type twin struct {
	w     *world
	state weft.UpdateState
	// down is how many places may be without a task at a time for the update's
	// sake: the most of the policies so far.
	down int
}

func drawPolicy(t *rapid.T, name string, actions int) weft.UpdateConfig {
	return weft.UpdateConfig{
		Parallelism: rapid.Uint64Range(0, 3).Draw(t, name+" parallelism"), Monitor: 2 * time.Second,
		Delay:           rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(t, name+" delay"),
		StartFirst:      rapid.Bool().Draw(t, name+" start first"),
		OnFailure:       weft.UpdateFailure(rapid.IntRange(0, actions).Draw(t, name+" action")),
		MaxFailureRatio: rapid.SampledFrom([]float64{0, 0, 0.2, 0.5, 1}).Draw(t, name+" ratio"),
	}
}

// TestAnyOrderOfFailures: whatever fails when, and whenever a person asks for the
// way back, an update never takes more places down than Parallelism allows, none
// and no more beside them with start-first, fails exactly when more places have
// failed than are tolerated, and ends.
func TestAnyOrderOfFailures(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		spec := replicated(rapid.Uint64Range(1, 5).Draw(rt, "replicas"))
		spec.Update, spec.Rollback = drawPolicy(rt, "update", 2), drawPolicy(rt, "rollback", 1)
		spec.Restart.Delay = time.Second
		w := newWorld(t, 3, spec)
		w.t = fataler{t, rt}
		w.hist = rapid.IntRange(0, 3).Draw(rt, "history")
		w.calm(nil)
		bad := map[startKey][]fate{}
		for n := range spec.Replicas {
			for _, image := range []string{"a", "b"} {
				k := startKey{n + 1, image}
				for range rapid.IntRange(0, 3).Draw(rt, "bad starts of "+image) {
					bad[k] = append(bad[k], fate(rapid.IntRange(0, int(fatesEnd)-1).Draw(rt, "fate")))
				}
			}
		}
		w.script = func(slot uint64, image string, n int) fate {
			if f := bad[startKey{slot, image}]; n < len(f) {
				return f[n]
			}
			return runs
		}
		w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
		tw := &twin{w: w}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		asks := rapid.IntRange(0, 2).Draw(rt, "rollbacks asked for")
		for step := 0; w.svc.Update.State.IsRunning() || step == 0 || asks > 0; step++ {
			if step > 4000 {
				rt.Fatalf("the update never ends\n%s", w.dump())
			}
			tw.look(rt)
			for _, x := range w.sortedTasks() {
				if random.IntN(4) > 0 && w.tasks[x.ID] != nil && w.advance(x) {
					tw.look(rt)
				}
			}
			w.now = w.now.Add(100 * time.Millisecond)
			if asks > 0 && random.IntN(40) == 0 {
				asks--
				if old := w.svc.Spec; w.svc.Previous != nil {
					w.rollback(weft.MessageRollbackAsked, &old)
					tw.state = weft.RollbackRunning
				}
			}
		}
		// What was bad is over: everybody runs, and after an update that ended, the
		// same.
		bad = nil
		end := w.svc.Update.State
		w.calm(func() {
			if w.svc.Update.State != end {
				rt.Fatalf("an update that ended as %d is %d\n%s", end, w.svc.Update.State, w.dump())
			}
		})
		all, current := w.running()
		if n := int(spec.Replicas); all < n || !end.IsPaused() && (all != n || current != n) {
			rt.Fatalf("%d run, %d of them current, want %d, update %d\n%s", all, current, n, end, w.dump())
		}
	})
}

// look has the reconciler look and compares.
func (tw *twin) look(t *rapid.T) {
	w := tw.w
	before := w.svc
	w.reconcile()
	if tw.state == weft.UpdateNone {
		tw.state = weft.UpdateRunning
	}
	n := int(w.svc.Spec.Replicas)
	if tw.state.IsRunning() && w.svc.Update.StartedAt.IsZero() {
		t.Fatalf("the update did not begin\n%s", w.dump())
	}
	was := before
	if was.Update.State == weft.UpdateNone {
		was.Update = w.svc.Update // it began in this look
	}
	policy := was.Spec.Policy(tw.state)
	tw.allow(policy, n)
	if failed := tw.failed(&was); tw.state.IsRunning() {
		switch {
		case failed == 0 || policy.OnFailure == weft.UpdateContinue || float64(failed) <= policy.MaxFailureRatio*float64(n):
			if w.svc.Update.State != tw.state {
				tw.done(t, failed)
			}
		case tw.state == weft.RollbackRunning:
			tw.state = weft.RollbackPaused
		case policy.OnFailure == weft.UpdateRollback && was.Previous != nil:
			tw.state = weft.RollbackRunning
		default:
			tw.state = weft.UpdatePaused
		}
	}
	if tw.state != w.svc.Update.State {
		t.Fatalf("the update is %d, by all that happened %d\n%s", w.svc.Update.State, tw.state, w.dump())
	}
	tw.allow(w.svc.Spec.Policy(tw.state), n)
	tw.bounds(t, n)
}

func (tw *twin) allow(p weft.UpdateConfig, n int) {
	switch {
	case !tw.state.IsRunning() || p.StartFirst:
	case p.Parallelism == 0:
		tw.down = n
	default:
		tw.down = max(tw.down, int(p.Parallelism))
	}
}

// failed counts places by the whole history.
func (tw *twin) failed(svc *weft.Service) int {
	places := map[uint64]bool{}
	for _, x := range tw.w.every {
		st := x.Status
		early := st.Ran.IsZero() || st.At.Sub(st.Ran) <= 2*time.Second
		if x.SpecVersion == svc.SpecVersion && !x.Meta.CreatedAt.Before(svc.Update.StartedAt) && selfEnded(x) && early {
			places[x.Slot] = true
		}
	}
	return len(places)
}

// done checks that an update that ended well had a right to.
func (tw *twin) done(t *rapid.T, failed int) {
	w := tw.w
	tw.state = map[weft.UpdateState]weft.UpdateState{weft.UpdateRunning: weft.UpdateDone, weft.RollbackRunning: weft.RollbackDone}[tw.state]
	_, current := w.running()
	if n := int(w.svc.Spec.Replicas); current < n-failed {
		t.Fatalf("%d of %d places are current, %d have failed, and the update is done\n%s", current, n, failed, w.dump())
	}
	for _, x := range w.tasks {
		if live(x) && NeedsRestart(w.specs[x.SpecVersion], &w.svc.Spec) {
			t.Fatalf("outdated task %s runs on, and the update is done\n%s", x.ID, w.dump())
		}
		if x.SpecVersion == w.svc.SpecVersion && x.Status.State == weft.TaskRunning && live(x) && w.now.Sub(x.Status.Ran) < w.svc.Spec.Policy(w.svc.Update.State).Monitor {
			t.Fatalf("task %s has not run for the time of watching\n%s", x.ID, w.dump())
		}
	}
}

// bounds checks what runs: a place is down for the update's sake when its running
// task was told to stop, and nothing has failed there since.
func (tw *twin) bounds(t *rapid.T, n int) {
	w := tw.w
	up, down, all := map[uint64]bool{}, 0, 0
	for _, x := range w.tasks {
		if live(x) && x.Status.State == weft.TaskRunning {
			up[x.Slot] = true
			all++
		}
	}
	for slot := range uint64(n) {
		if !up[slot+1] && w.stopped[slot+1] {
			down++
		}
	}
	if down > tw.down {
		t.Fatalf("%d places are down for the update's sake, allowed are %d\n%s", down, tw.down, w.dump())
	}
	if over := all - n; over > n || over > 0 && tw.most(n) < over {
		t.Fatalf("%d run beside %d\n%s", over, n, w.dump())
	}
}

// most is how many new tasks may run beside the old ones.
func (tw *twin) most(n int) int {
	out := 0
	for _, p := range []weft.UpdateConfig{tw.w.svc.Spec.Update, tw.w.svc.Spec.Rollback} {
		switch {
		case !p.StartFirst:
		case p.Parallelism == 0:
			out = n
		default:
			out = max(out, int(p.Parallelism))
		}
	}
	return out
}

// broken is a service of n whose image "b" fails at once.
func broken(t *testing.T, n uint64, action weft.UpdateFailure) *world {
	spec := replicated(n)
	spec.Update = weft.UpdateConfig{Parallelism: 1, Monitor: time.Second, OnFailure: action}
	w := newWorld(t, 2, spec)
	w.calm(nil)
	w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
	w.script = func(_ uint64, image string, _ int) fate {
		if image == "b" {
			return fails
		}
		return runs
	}
	return w
}

func TestFailedUpdateIsRolledBack(t *testing.T) {
	w := broken(t, 3, weft.UpdateRollback)
	untouched := only(t, w, 3)
	var messages []string
	w.calm(func() {
		if m := w.svc.Update.Message; len(messages) == 0 || messages[len(messages)-1] != m {
			messages = append(messages, m)
		}
		if all, _ := w.running(); all < 2 {
			t.Fatalf("%d of 3 run\n%s", all, w.dump())
		}
	})
	got := strings.Join(messages, "; ")
	if want := "update in progress; update rolled back due to failure or early termination of task task0"; !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "; rollback completed") {
		t.Errorf("messages %q", got)
	}
	if all, current := w.running(); all != 3 || current != 3 || w.svc.Update.State != weft.RollbackDone || w.svc.Spec.Container.Image != "a" || w.svc.Previous != nil {
		t.Errorf("%d run, %d current\n%s", all, current, w.dump())
	}
	if only(t, w, 3) != untouched {
		t.Error("a task that the update had not reached was replaced by its rollback")
	}
	// The record of what failed is still to be seen.
	seen := false
	for _, x := range w.tasks {
		seen = seen || x.Status.State == weft.TaskFailed
	}
	if !seen {
		t.Errorf("nobody can see what failed\n%s", w.dump())
	}
}

// TestRollbackThatFailsPauses: what fails on the way back is not rolled back again.
func TestRollbackThatFailsPauses(t *testing.T) {
	w := broken(t, 3, weft.UpdateRollback)
	w.script = func(uint64, string, int) fate { return fails }
	for range 100 {
		w.reconcile()
		for _, x := range w.sortedTasks() {
			w.advance(x)
		}
		w.now = w.now.Add(100 * time.Millisecond)
	}
	if st := w.svc.Update; st.State != weft.RollbackPaused || !strings.HasPrefix(st.Message, "rollback paused due to failure or early termination of task task0") {
		t.Errorf("update is %+v\n%s", st, w.dump())
	}
	if all, _ := w.running(); all != 2 {
		t.Errorf("%d run\n%s", all, w.dump())
	}
}

func TestNothingToGoBackTo(t *testing.T) {
	w := broken(t, 2, weft.UpdateRollback)
	w.svc.Previous = nil
	for range 20 {
		w.reconcile()
		for _, x := range w.sortedTasks() {
			w.advance(x)
		}
	}
	if st := w.svc.Update; st.State != weft.UpdatePaused || !strings.HasSuffix(st.Message, "; there is no previous specification to go back to") {
		t.Errorf("update is %+v\n%s", st, w.dump())
	}
}

// TestRollbackAsked: the two specifications change places, and asking again brings
// the newer one back.
func TestRollbackAsked(t *testing.T) {
	w := newWorld(t, 2, replicated(2))
	w.calm(nil)
	w.update(func(s *weft.ServiceSpec) { s.Container.Image, s.Replicas = "b", 3 })
	w.calm(nil)
	for i, want := range []string{"a", "b", "a"} {
		old := w.svc.Spec
		w.rollback(weft.MessageRollbackAsked, &old)
		w.calm(nil)
		n := map[string]int{"a": 2, "b": 3}[want]
		if all, current := w.running(); all != n || current != n || w.svc.Spec.Container.Image != want || w.svc.Update.State != weft.RollbackDone {
			t.Fatalf("rollback %d: %d run, %d current\n%s", i, all, current, w.dump())
		}
	}
}

// TestRollbackOfNoConcernToTasks: a number of replicas is gone back to at once.
func TestRollbackOfNoConcernToTasks(t *testing.T) {
	w := newWorld(t, 2, replicated(2))
	w.calm(nil)
	before := only(t, w, 1)
	w.update(func(s *weft.ServiceSpec) { s.Replicas = 4 })
	w.calm(nil)
	w.now = w.now.Add(time.Minute)
	w.rollback(weft.MessageRollbackAsked, nil)
	w.reconcile()
	if only(t, w, 1) != before || w.svc.Update.State != weft.RollbackDone || w.svc.Update.Message != weft.MessageRollbackDone {
		t.Errorf("update is %+v\n%s", w.svc.Update, w.dump())
	}
}

// TestOutlivedTaskDoesNotComeBack: with start-first the old task runs beside the
// new one that fails. After the rollback it is the place's own: when it crashes it
// is the one that is restarted, whatever was tried beside it.
func TestOutlivedTaskDoesNotComeBack(t *testing.T) {
	for _, state := range []weft.UpdateState{weft.RollbackDone, weft.RollbackPaused} {
		w := broken(t, 2, weft.UpdateRollback)
		w.svc.Previous.Update.StartFirst, w.svc.Spec.Update.StartFirst = true, true
		w.calm(nil)
		if w.svc.Update.State != weft.RollbackDone {
			t.Fatalf("update is %+v\n%s", w.svc.Update, w.dump())
		}
		w.svc.Update.State = state
		w.set(only(t, w, 1), weft.TaskFailed)
		w.reconcile()
		next := only(t, w, 1)
		if w.specs[next.SpecVersion].Container.Image != "a" || next.NotBefore.Sub(w.now) != weft.DefaultRestartDelay || w.svc.Update.State != state {
			t.Errorf("the place goes on with %+v\n%s", next, w.dump())
		}
	}
}

// TestOnePlaceFailsOnce: a place that fails again and again is one failure, and a
// task that ran for longer than Monitor is none, with any Parallelism.
func TestOnePlaceFailsOnce(t *testing.T) {
	for _, c := range []struct {
		fates []fate // of the first starts at place 1
		ratio float64
		want  weft.UpdateState
	}{
		{[]fate{fails, fails, failsEarly, failsEarly}, 0.34, weft.UpdateDone},
		{[]fate{fails, failsLate, failsLate}, 0.2, weft.UpdatePaused},
		{[]fate{completes}, 0, weft.UpdatePaused},
		{[]fate{failsLate, failsLate, failsLate}, 0, weft.UpdateDone},
	} {
		for parallelism := range uint64(4) {
			t.Run(fmt.Sprint(c.fates, parallelism), func(t *testing.T) {
				spec := replicated(3)
				spec.Update = weft.UpdateConfig{Parallelism: parallelism, Monitor: time.Second, MaxFailureRatio: c.ratio, Delay: 3 * time.Second}
				spec.Restart.Delay = time.Millisecond
				w := newWorld(t, 3, spec)
				w.hist = 0
				w.calm(nil)
				w.update(func(s *weft.ServiceSpec) { s.Container.Image = "b" })
				w.script = func(slot uint64, image string, n int) fate {
					if slot == 1 && image == "b" && n < len(c.fates) {
						return c.fates[n]
					}
					return runs
				}
				for range 400 {
					w.reconcile()
					for _, x := range w.sortedTasks() {
						w.advance(x)
					}
					w.now = w.now.Add(50 * time.Millisecond)
				}
				if w.svc.Update.State != c.want {
					t.Errorf("update is %+v\n%s", w.svc.Update, w.dump())
				}
			})
		}
	}
}
