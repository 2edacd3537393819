package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
	"github.com/weftnet/weft/orchestrator/wire"
)

// fakeExecs answers "check" commands as the test says.
type fakeExecs struct {
	*runtimetest.Memory

	mu   sync.Mutex // guards: all below
	code int
	err  error
	hang bool // until its context ends
	out  string
	runs int
}

func (f *fakeExecs) Exec(ctx context.Context, task weft.ID, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	if len(s.Cmd) == 0 || s.Cmd[len(s.Cmd)-1] != "check" {
		return f.Memory.Exec(ctx, task, s, st)
	}
	f.mu.Lock()
	f.runs++
	code, err, hang, out := f.code, f.err, f.hang, f.out
	f.mu.Unlock()
	if _, werr := st.Stdout.Write([]byte(out)); werr != nil {
		return 0, werr
	}
	if hang {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return code, err
}

func (f *fakeExecs) set(code int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.code, f.err = code, err
}

func (f *fakeExecs) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.runs
}

var testCheck = weft.HealthCheck{
	Test: []string{weft.HealthCmd, "check"}, Interval: 10 * time.Second, Timeout: 2 * time.Second,
	StartPeriod: 30 * time.Second, StartInterval: time.Second, Retries: 3,
}

// checked begins one task with a check.
func checked(r *rig, h weft.HealthCheck) (kill func(), s *fakeSession) {
	r.t.Helper()
	kill = r.start()
	s = <-r.leader.sessions
	a := full(testTask(1, front))
	a.Specs[0].Spec.Container.Health = h
	s.send <- a
	settle(100 * time.Millisecond)
	return kill, s
}

func (r *rig) endpointState() weft.EndpointState {
	r.t.Helper()
	own := r.table.ownEndpoints()
	if len(own) != 1 {
		r.t.Fatalf("endpoints %+v", own)
	}
	return own[0].State
}

func (r *rig) wantHealth(want weft.HealthStatus, streak, results int) {
	r.t.Helper()
	list, err := r.agent.Containers(context.Background())
	if err != nil || len(list) != 1 {
		r.t.Fatal(err, len(list))
	}
	h := list[0].State.Health
	if h.Status != want || h.FailingStreak != streak || len(h.Log) != results {
		r.t.Fatalf("health %+v, want %s with %d failures and %d results", h, want, streak, results)
	}
}

func TestTaskIsReadyWhenHealthy(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.execs.set(1, nil)
		r.execs.out = "not yet\n"
		checked(r, testCheck)
		r.wantState(testID("t1"), weft.TaskStarting)
		r.wantHealth(weft.HealthStarting, 0, 0)
		settle(20*time.Second + 500*time.Millisecond) // failures of the start period do not count
		r.wantState(testID("t1"), weft.TaskStarting)
		r.wantHealth(weft.HealthStarting, 0, 5)
		if n := r.execs.count(); n != 20 {
			t.Errorf("%d runs in 20 s of the start period", n)
		}
		if s := r.endpointState(); s != weft.EndpointStarting {
			t.Errorf("endpoint is %d", s)
		}
		r.execs.set(0, nil)
		settle(time.Second)
		r.wantState(testID("t1"), weft.TaskRunning)
		r.wantHealth(weft.HealthHealthy, 0, 5)
		if s := r.endpointState(); s != weft.EndpointReady {
			t.Errorf("endpoint is %d", s)
		}
		before := r.execs.count()
		settle(100 * time.Second)
		if n := r.execs.count() - before; n != 10 {
			t.Errorf("%d runs in 100 s", n)
		}
	})
}

func TestUnhealthyTaskLeavesAndFails(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		checked(r, testCheck)
		settle(2 * time.Second)
		r.wantState(testID("t1"), weft.TaskRunning)
		r.execs.out = "no database\n"
		r.execs.set(3, nil)
		settle(21 * time.Second)
		r.wantState(testID("t1"), weft.TaskRunning)
		r.wantHealth(weft.HealthHealthy, 2, 3)
		r.execs.set(0, nil)
		settle(10 * time.Second)
		r.wantHealth(weft.HealthHealthy, 0, 4)
		r.execs.set(3, nil)
		r.journal.clear()
		settle(31 * time.Second)
		r.wantState(testID("t1"), weft.TaskFailed)
		if got := r.leader.status(testID("t1")).Err; got != "unhealthy container: 3 checks in a row failed, the last with exit 3: no database" {
			t.Errorf("error %q", got)
		}
		r.journal.inOrder(t, "publish draining:t1", "stop t1 within 1s", "destroy t1")
	})
}

func TestNeverHealthyTaskFails(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(f *fakeExecs)
		want string
	}{
		"fails":        {func(f *fakeExecs) { f.code = 1 }, "exit 1"},
		"hangs":        {func(f *fakeExecs) { f.hang, f.out = true, "waiting" }, "exit -1: Health check exceeded timeout (2s): waiting"},
		"cannot begin": {func(f *fakeExecs) { f.err = fmt.Errorf("exec: no such file: %w", weft.ErrInvalid) }, "exit -1: exec: no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				c.set(&r.execs)
				h := testCheck
				h.StartPeriod = 0
				checked(r, h)
				settle(29 * time.Second)
				r.wantState(testID("t1"), weft.TaskStarting)
				settle(10 * time.Second)
				r.wantState(testID("t1"), weft.TaskFailed)
				if got := r.leader.status(testID("t1")).Err; !strings.HasSuffix(got, "the last with "+c.want) {
					t.Errorf("error %q", got)
				}
				if slices.Contains(r.leader.states(testID("t1")), weft.TaskRunning) || strings.Contains(r.journal.String(), "publish ready") {
					t.Error("it was said to run")
				}
				r.journal.inOrder(t, "start t1", "stop t1", "destroy t1")
			})
		})
	}
}

// TestWhatSaysNothingOfHealth: a runtime that is away, and a container that ends
// by itself, are no failures of the check.
func TestWhatSaysNothingOfHealth(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		checked(r, testCheck)
		settle(2 * time.Second)
		r.execs.set(0, fmt.Errorf("%w: restarting", weft.ErrUnavailable))
		settle(5 * time.Minute)
		r.wantState(testID("t1"), weft.TaskRunning)
		r.wantHealth(weft.HealthHealthy, 0, 1)
		r.rt.Exit(testID("t1"), 4, false)
		settle(time.Second)
		r.wantState(testID("t1"), weft.TaskFailed)
		if st := r.leader.status(testID("t1")); st.ExitCode != 4 || !st.ExitKnown {
			t.Errorf("status %+v", st)
		}
	})
}

func TestEndWhileStartingIsThatEnd(t *testing.T) {
	for _, code := range []int{0, 4} {
		bubble(t, func(t *testing.T, r *rig) {
			r.execs.set(1, nil)
			checked(r, testCheck)
			settle(2 * time.Second)
			r.rt.Exit(testID("t1"), code, false)
			settle(time.Second)
			want := map[int]weft.TaskState{0: weft.TaskComplete, 4: weft.TaskFailed}[code]
			r.wantState(testID("t1"), want)
			if slices.Contains(r.leader.states(testID("t1")), weft.TaskRunning) {
				t.Error("it was said to run")
			}
		})
	}
}

func TestShutdownWhileStarting(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.execs.set(1, nil)
		_, s := checked(r, testCheck)
		settle(2 * time.Second)
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(testTask(1, front), weft.TaskShutdown)}}
		settle(time.Second)
		r.wantState(testID("t1"), weft.TaskShutdown)
	})
}

// TestRestartOfTheDaemonIsNoFailure: a healthy task stays healthy and in the
// balancers, one that starts goes on starting, whatever the check says at first.
func TestRestartOfTheDaemonIsNoFailure(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, _ := checked(r, testCheck)
		settle(2 * time.Second)
		r.wantState(testID("t1"), weft.TaskRunning)
		kill()
		time.Sleep(time.Hour)
		r.execs.set(1, nil)
		r.journal.clear()
		r.start()
		settle(21 * time.Second) // two failures
		r.wantState(testID("t1"), weft.TaskRunning)
		r.wantHealth(weft.HealthHealthy, 2, 2)
		if s := r.endpointState(); s != weft.EndpointReady || strings.Contains(r.journal.String(), "publish starting") {
			t.Errorf("endpoint is %d:\n%s", s, r.journal)
		}
		r.execs.set(0, nil)
		settle(10 * time.Second)
		r.wantHealth(weft.HealthHealthy, 0, 3)
	})
	bubble(t, func(t *testing.T, r *rig) {
		r.execs.set(1, nil)
		kill, _ := checked(r, testCheck)
		settle(2 * time.Second)
		kill()
		time.Sleep(5 * time.Second)
		r.start()
		settle(5*time.Second + 500*time.Millisecond)
		r.wantHealth(weft.HealthStarting, 0, 5)
		r.execs.set(0, nil)
		settle(time.Second)
		if s := r.endpointState(); s != weft.EndpointReady {
			t.Errorf("endpoint is %d", s)
		}
	})
}

func TestImagesCheckIsHonoured(t *testing.T) {
	for name, c := range map[string]struct {
		service, image weft.HealthCheck
		shell          []string
		want           []string
	}{
		"image":        {image: testCheck, want: []string{"check"}},
		"shell":        {image: weft.HealthCheck{Test: []string{weft.HealthShell, "check"}}, want: []string{"/bin/sh", "-c", "check"}},
		"own shell":    {image: weft.HealthCheck{Test: []string{weft.HealthShell, "check"}}, shell: []string{"bash"}, want: []string{"bash", "check"}},
		"turned off":   {service: weft.HealthCheck{Test: []string{weft.HealthNone}}, image: testCheck},
		"service's":    {service: weft.HealthCheck{Test: []string{weft.HealthCmd, "mine", "check"}}, image: testCheck, want: []string{"mine", "check"}},
		"none at all":  {},
		"image's NONE": {image: weft.HealthCheck{Test: []string{weft.HealthNone}}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				r.rt.Add(weft.Image{ID: "sha256:" + strings.Repeat("0", 63) + "2", Tags: []string{"weft/whoami:latest"}, Config: weft.ImageConfig{Health: c.image, Shell: c.shell}})
				checked(r, c.service)
				settle(time.Minute)
				r.wantState(testID("t1"), weft.TaskRunning)
				list, err := r.rt.List(t.Context())
				if err != nil || len(list) != 1 {
					t.Fatal(err, len(list))
				}
				var got []string
				if s := &list[0].Spec; len(s.Health.Test) > 0 {
					got = healthCommand(s)
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("runs %q, want %q", got, c.want)
				}
				if (r.execs.count() > 0) != (c.want != nil) {
					t.Errorf("%d runs", r.execs.count())
				}
			})
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	h := &headBuffer{}
	for range 3 {
		if n, err := h.Write([]byte(strings.Repeat("x", 3000))); n != 3000 || err != nil {
			t.Fatal(n, err)
		}
	}
	if n := len(h.String()); n != maxHealthOutput {
		t.Errorf("%d bytes are kept", n)
	}
}

// TestHealthAgainstSlowTwin: the state is what the whole history says.
func TestHealthAgainstSlowTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		check := weft.HealthCheck{
			Interval: time.Duration(rapid.IntRange(1, 20).Draw(t, "interval")) * time.Second, StartInterval: time.Duration(rapid.IntRange(1, 20).Draw(t, "start interval")) * time.Second,
			StartPeriod: time.Duration(rapid.IntRange(0, 60).Draw(t, "start period")) * time.Second, Retries: rapid.IntRange(1, 4).Draw(t, "retries"),
		}
		was := rapid.Bool().Draw(t, "was healthy")
		started := time.Unix(1000, 0)
		now := started.Add(time.Duration(rapid.IntRange(0, 50).Draw(t, "begun")) * time.Second)
		h := newHealthCore(check, started, now, was)
		var all []weft.HealthResult
		for range rapid.IntRange(0, 12).Draw(t, "runs") {
			prev := now
			state, streak := slowHealth(check, started, was, all)
			pause := check.Interval
			if state == weft.HealthStarting && now.Sub(started) < check.StartPeriod {
				pause = check.StartInterval
			}
			if !h.next.Equal(prev.Add(pause)) || h.state.Status != state || h.state.FailingStreak != streak {
				t.Fatalf("after %+v: %+v at %s, want %s (%d) at %s", all, h.state, h.next, state, streak, prev.Add(pause))
			}
			if state == weft.HealthUnhealthy {
				break
			}
			r := weft.HealthResult{Start: h.next, End: h.next.Add(time.Duration(rapid.IntRange(0, 5).Draw(t, "took")) * time.Second), ExitCode: rapid.IntRange(-1, 1).Draw(t, "code")}
			now = r.End
			if rapid.IntRange(0, 4).Draw(t, "unknown") == 0 {
				h.later(now)
				continue
			}
			all = append(all, r)
			h.result(r)
		}
		if n := len(h.state.Log); n != min(len(all), 5) || n > 0 && !slices.Equal(h.state.Log, all[len(all)-n:]) {
			t.Fatalf("log %+v of %+v", h.state.Log, all)
		}
	})
}

// slowHealth looks at all results: the failures since the last success count,
// but for those of the start period when nothing has succeeded.
func slowHealth(c weft.HealthCheck, started time.Time, was bool, all []weft.HealthResult) (weft.HealthStatus, int) {
	last, healthy := 0, was
	for i, r := range all {
		if r.ExitCode == 0 {
			last, healthy = i+1, true
		}
	}
	streak := 0
	for _, r := range all[last:] {
		if healthy || r.Start.Sub(started) >= c.StartPeriod {
			streak++
		}
	}
	switch {
	case streak >= c.Retries:
		return weft.HealthUnhealthy, streak
	case healthy:
		return weft.HealthHealthy, streak
	}
	return weft.HealthStarting, streak
}

// TestAdoptionListsOnce: the checks of all adopted tasks come from one list.
func TestAdoptionListsOnce(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var all []weft.Task
		for n := range 9 {
			all = append(all, testTask(n+1, front))
		}
		kill, _ := r.running(all...)
		kill()
		time.Sleep(time.Minute)
		r.lists.Store(0)
		r.start()
		settle(500 * time.Millisecond)
		if n := r.lists.Load(); n != 1 {
			t.Errorf("%d lists for %d tasks", n, len(all))
		}
	})
}

// TestNothingIsAskedBeforeNames: between its start and its names a task waits for
// nobody. What its check is was observed before it was started.
func TestNothingIsAskedBeforeNames(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.mute.armed.Store(true)
		r.start()
		s := <-r.leader.sessions
		s.send <- full(testTask(1, front))
		settle(time.Second)
		r.wantState(testID("t1"), weft.TaskRunning)
		r.wantNamed("started", []uint64{1}, nil)
	})
	bubble(t, func(t *testing.T, r *rig) {
		r.mute.armed.Store(true)
		checked(r, testCheck)
		if got := r.endpointState(); got != weft.EndpointStarting {
			t.Errorf("the endpoint is %v before the check has run", got)
		}
		settle(testCheck.StartPeriod + 2*testCheck.Interval)
		r.wantState(testID("t1"), weft.TaskRunning)
	})
}
