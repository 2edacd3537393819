package task

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
)

// fake is a node's half of one task. Its fields are used by one Runner at a
// time and by the test between synctest.Wait calls.
type fake struct {
	mu       sync.Mutex // guards: calls, errs
	phase    Phase
	exit     chan Exit // closed never; one exit at most
	last     Exit
	calls    []string
	errs     map[string][]error // per method, consumed from the front
	prepTook time.Duration
	healthy  chan struct{} // nil = at once
	log      bytes.Buffer
}

func newFake() *fake { return &fake{exit: make(chan Exit, 1), errs: map[string][]error{}} }

// called is what was called so far, while the task may go on.
func (f *fake) called() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fake) did(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.calls, name)
}

func (f *fake) call(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name)
	if e := f.errs[name]; len(e) > 0 {
		f.errs[name] = e[1:]
		return e[0]
	}
	return nil
}

func (f *fake) Prepare(ctx context.Context) error {
	if err := f.call("prepare"); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(f.prepTook):
	}
	if f.phase == Absent {
		f.phase = Created
	}
	return nil
}

func (f *fake) Observe(context.Context) (Observed, error) {
	return Observed{Phase: f.phase, PID: 7, Exit: f.last}, f.call("observe")
}

func (f *fake) Start(context.Context) (int, error) {
	if err := f.call("start"); err != nil {
		return 0, err
	}
	f.phase = Running
	return 7, nil
}

func (f *fake) AwaitReady(ctx context.Context) error {
	if f.healthy != nil {
		select {
		case <-f.healthy:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return f.call("await")
}

func (f *fake) Wait(ctx context.Context) (Exit, error) {
	if err := f.call("wait"); err != nil {
		return Exit{}, err
	}
	if f.phase == Absent {
		return Exit{}, weft.ErrNotFound
	}
	select {
	case e := <-f.exit:
		f.phase, f.last = Exited, e
		return e, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

func (f *fake) Shutdown(context.Context) (Exit, error) {
	if err := f.call("shutdown"); err != nil {
		return Exit{}, err
	}
	if f.phase == Running {
		f.phase, f.last = Exited, Exit{Code: 143, Known: true}
	}
	return f.last, nil
}

func (f *fake) EndUnhealthy(context.Context) (Exit, error) {
	if err := f.call("end"); err != nil {
		return Exit{}, err
	}
	f.phase, f.last = Exited, Exit{Code: 137, Known: true}
	return f.last, nil
}

func (f *fake) Release(context.Context) error { return f.call("release") }

func (f *fake) Remove(context.Context) error {
	if err := f.call("remove"); err != nil {
		return err
	}
	f.phase = Absent
	return nil
}

// run starts a Runner; the returned function ends it and gives Run's error.
func run(t *testing.T, f *fake, start weft.Task) (*Runner, *[]weft.TaskStatus, func() error) {
	t.Helper()
	start.ID = "task1"
	reports := new([]weft.TaskStatus)
	r, err := NewRunner(Config{Task: start, Controller: f, Log: slog.New(slog.NewTextHandler(&f.log, nil)),
		Report: func(_ context.Context, st weft.TaskStatus) error {
			if err := f.call("report"); err != nil {
				return err
			}
			*reports = append(*reports, st)
			return nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	synctest.Wait()
	return r, reports, func() error { cancel(); return <-done }
}

func states(rs []weft.TaskStatus) string {
	var out []string
	for _, r := range rs {
		if n := len(out); n == 0 || out[n-1] != r.State.String() {
			out = append(out, r.State.String())
		}
	}
	return strings.Join(out, " ")
}

func assigned(desired weft.TaskState) weft.Task {
	return weft.Task{Desired: desired, Status: weft.TaskStatus{State: weft.TaskAssigned}}
}

func TestLifeToTheEnd(t *testing.T) {
	for _, c := range []struct {
		name string
		exit Exit
		want weft.TaskState
		err  string
	}{
		{"success", Exit{Known: true}, weft.TaskComplete, ""},
		{"failure", Exit{Code: 3, Known: true}, weft.TaskFailed, "task: non-zero exit (3)"},
		{"unknown", Exit{}, weft.TaskFailed, "the container ended; its exit code is not known"},
		{"out of memory", Exit{Code: 137, Known: true, OOM: true}, weft.TaskFailed, "the container ran out of memory: raise its limit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				r, reports, stop := run(t, f, assigned(weft.TaskRunning))
				if st := r.Status(); st.State != weft.TaskRunning || st.PID != 7 {
					t.Fatalf("status %+v", st)
				}
				f.exit <- c.exit
				synctest.Wait()
				if st := r.Status(); st.State != c.want || st.Err != c.err || st.ExitCode != c.exit.Code || st.PID != 0 {
					t.Errorf("status %+v", st)
				}
				if got, want := states(*reports), "accepted preparing ready starting running "+c.want.String(); got != want {
					t.Errorf("states %q, want %q", got, want)
				}
				if i := slices.Index(f.calls, "release"); i < 0 || f.calls[i-1] != "report" {
					t.Errorf("the end must be reported, then the sandbox released: %v", f.calls)
				}
				r.Desire(weft.TaskRemove)
				synctest.Wait()
				if st := r.Status(); st.State != weft.TaskRemove || st.ExitCode != c.exit.Code || f.phase != Absent {
					t.Errorf("removed: %+v, phase %d", st, f.phase)
				}
				if err := stop(); err != nil {
					t.Errorf("run: %v", err)
				}
			})
		})
	}
}

func TestStopsAtReadyUntilWanted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		r, _, stop := run(t, f, assigned(weft.TaskReady))
		if st := r.Status().State; st != weft.TaskReady || f.phase != Created {
			t.Fatalf("state %s, phase %d", st, f.phase)
		}
		r.Desire(weft.TaskRunning)
		synctest.Wait()
		if st := r.Status().State; st != weft.TaskRunning {
			t.Fatalf("state %s", st)
		}
		r.Desire(weft.TaskReady) // smaller: ignored
		synctest.Wait()
		if st := r.Status().State; st != weft.TaskRunning {
			t.Fatalf("state %s", st)
		}
		if err := stop(); !errors.Is(err, context.Canceled) || f.phase != Running {
			t.Errorf("run: %v, phase %d: the end of the daemon must not stop the container", err, f.phase)
		}
	})
}

func TestPrepareErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want weft.TaskState
	}{
		{fmt.Errorf("pull x: %w", weft.ErrNotFound), weft.TaskRejected},
		{fmt.Errorf("mount y: %w", weft.ErrInvalid), weft.TaskRejected},
		{errors.New("odd"), weft.TaskRejected},
		{fmt.Errorf("runtime: %w", weft.ErrUnavailable), weft.TaskPreparing},
	} {
		t.Run(c.err.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.errs["prepare"] = []error{c.err}
				r, _, stop := run(t, f, assigned(weft.TaskRunning))
				if st := r.Status(); st.State != c.want || !strings.Contains(st.Err, weft.Text(c.err)) {
					t.Errorf("status %+v", st)
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if st := r.Status(); c.want == weft.TaskPreparing && (st.State != weft.TaskRunning || st.Err != "") {
					t.Errorf("after a pause: %+v", st)
				}
				stop()
			})
		})
	}
}

func TestRetriesBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		for range 1000 {
			f.errs["prepare"] = append(f.errs["prepare"], weft.ErrUnavailable)
		}
		r, _, stop := run(t, f, assigned(weft.TaskRunning))
		time.Sleep(time.Minute)
		synctest.Wait()
		// 100 ms doubling to 10 s: 7 pauses make 12.7 s, then one per 10 s.
		if n := 1000 - len(f.errs["prepare"]); n < 10 || n > 14 {
			t.Errorf("%d attempts in a minute", n)
		}
		if n := strings.Count(f.log.String(), "a step of a task keeps failing"); n != 1 {
			t.Errorf("the same failure is logged %d times, want once:\n%s", n, f.log.String())
		}
		r.Desire(weft.TaskShutdown) // must not wait for the pause
		synctest.Wait()
		if st := r.Status().State; st != weft.TaskShutdown {
			t.Errorf("state %s", st)
		}
		stop()
	})
}

// TestShortTroubleIsNoNews: what comes right while the runtime starts is not
// logged for each task of a node.
func TestShortTroubleIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.errs["prepare"] = []error{weft.ErrUnavailable, weft.ErrUnavailable, weft.ErrUnavailable}
		r, _, stop := run(t, f, assigned(weft.TaskRunning))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := r.Status().State; st != weft.TaskRunning || f.log.Len() > 0 {
			t.Errorf("state %s; log: %s", st, f.log.String())
		}
		stop()
	})
}

func TestShutdownInterrupts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.prepTook = time.Hour
		r, reports, stop := run(t, f, assigned(weft.TaskRunning))
		r.Desire(weft.TaskShutdown)
		synctest.Wait()
		if got := states(*reports); got != "accepted preparing shutdown" {
			t.Errorf("states %q", got)
		}
		for _, st := range *reports {
			if st.Err != "" {
				t.Errorf("an interrupted step is no error: %+v", st)
			}
		}
		stop()
	})
}

func TestStopOfARunningTaskKeepsItsExit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.errs["shutdown"] = []error{weft.ErrUnavailable, errors.New("busy")}
		r, _, stop := run(t, f, assigned(weft.TaskRunning))
		r.Desire(weft.TaskShutdown)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := r.Status(); st.State != weft.TaskShutdown || st.ExitCode != 143 || !st.ExitKnown {
			t.Errorf("status %+v", st)
		}
		r.Desire(weft.TaskRemove)
		synctest.Wait()
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestNeverRunsAheadOfTheRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.errs["report"] = []error{errors.New("disk full"), errors.New("disk full"), errors.New("disk full")}
		_, _, stop := run(t, f, assigned(weft.TaskRunning))
		if f.did("prepare") {
			t.Error("prepared before the task was recorded")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if f.phase != Running {
			t.Errorf("phase %d after the disk has room", f.phase)
		}
		stop()
	})
}

// The daemon dies at any state; what it finds when it comes back may be one
// step further than its record.
func TestAdoption(t *testing.T) {
	for _, c := range []struct {
		record weft.TaskState
		phase  Phase
		last   Exit
		want   weft.TaskState
		starts int
	}{
		{weft.TaskPreparing, Running, Exit{}, weft.TaskRunning, 0},
		{weft.TaskReady, Running, Exit{}, weft.TaskRunning, 0},
		{weft.TaskStarting, Created, Exit{}, weft.TaskRunning, 1},
		{weft.TaskStarting, Running, Exit{}, weft.TaskRunning, 0},
		{weft.TaskStarting, Exited, Exit{Code: 1, Known: true}, weft.TaskFailed, 0},
		{weft.TaskStarting, Exited, Exit{Known: true}, weft.TaskComplete, 0},
		{weft.TaskStarting, Lost, Exit{}, weft.TaskFailed, 0},
		{weft.TaskStarting, Absent, Exit{}, weft.TaskFailed, 0},
		{weft.TaskRunning, Running, Exit{}, weft.TaskRunning, 0},
		{weft.TaskRunning, Absent, Exit{}, weft.TaskFailed, 0},
	} {
		t.Run(fmt.Sprintf("%s phase %d", c.record, c.phase), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.phase, f.last = c.phase, c.last
				r, _, stop := run(t, f, weft.Task{Desired: weft.TaskRunning, Status: weft.TaskStatus{State: c.record}})
				starts := 0
				for _, x := range f.calls {
					if x == "start" {
						starts++
					}
				}
				if st := r.Status(); st.State != c.want || starts != c.starts {
					t.Errorf("status %+v after %v", st, f.calls)
				}
				stop()
			})
		})
	}
}

func TestDecideNeverGoesBack(t *testing.T) {
	all := []weft.TaskState{weft.TaskNew, weft.TaskPending, weft.TaskAssigned, weft.TaskAccepted, weft.TaskPreparing, weft.TaskReady,
		weft.TaskStarting, weft.TaskRunning, weft.TaskComplete, weft.TaskShutdown, weft.TaskFailed, weft.TaskRejected, weft.TaskRemove}
	for _, desired := range []weft.TaskState{weft.TaskReady, weft.TaskRunning, weft.TaskShutdown, weft.TaskRemove} {
		for _, state := range all {
			f := newFake()
			f.phase = Created
			f.exit <- Exit{Known: true}
			tk := weft.Task{Desired: desired, Status: weft.TaskStatus{State: state}}
			st, next := Step(t.Context(), &tk, f)
			if st.State < state || next == Again && st.State == state {
				t.Errorf("desired %s: %s became %s (%d)", desired, state, st.State, next)
			}
			if (next == Done) != (desired == weft.TaskRemove && state == weft.TaskRemove) {
				t.Errorf("desired %s, state %s: done is %v", desired, state, next == Done)
			}
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	if _, err := NewRunner(Config{}); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func TestWaitsUntilReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.healthy = make(chan struct{})
		r, reports, stop := run(t, f, assigned(weft.TaskRunning))
		time.Sleep(time.Minute)
		synctest.Wait()
		if st := r.Status().State; st != weft.TaskStarting {
			t.Errorf("state %s before it is healthy", st)
		}
		close(f.healthy)
		synctest.Wait()
		if got := states(*reports); got != "accepted preparing ready starting running" {
			t.Errorf("states %q", got)
		}
		stop()
	})
}

func TestHowReadinessEnds(t *testing.T) {
	for _, c := range []struct {
		err  error
		exit Exit
		want weft.TaskState
		text string
	}{
		{fmt.Errorf("%w: exit 1", ErrUnhealthy), Exit{}, weft.TaskFailed, "unhealthy container: exit 1"},
		{ErrEnded, Exit{Known: true}, weft.TaskComplete, ""},
		{ErrEnded, Exit{Known: true, Code: 3}, weft.TaskFailed, "task: non-zero exit (3)"},
		{weft.ErrUnavailable, Exit{}, weft.TaskRunning, ""}, // once
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			f.errs["await"] = []error{c.err}
			f.healthy = make(chan struct{})
			r, _, stop := run(t, f, assigned(weft.TaskRunning))
			if errors.Is(c.err, ErrEnded) {
				f.phase, f.last = Exited, c.exit
			}
			close(f.healthy)
			time.Sleep(time.Second)
			synctest.Wait()
			if st := r.Status(); st.State != c.want || st.Err != c.text {
				t.Errorf("%v: %+v", c.err, st)
			}
			stop()
		})
	}
}

func TestUnhealthyWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.errs["wait"] = []error{fmt.Errorf("%w: exit 1", ErrUnhealthy)}
		r, reports, stop := run(t, f, assigned(weft.TaskRunning))
		if st := r.Status(); st.State != weft.TaskFailed || st.Err != "unhealthy container: exit 1" {
			t.Errorf("%+v after %q", st, states(*reports))
		}
		stop()
	})
}

// TestUnhealthyIsRecordedThenStopped, while it starts and while it runs, and again by
// the next daemon.
func TestUnhealthyIsRecordedThenStopped(t *testing.T) {
	why := fmt.Errorf("%w: 3 checks in a row failed", ErrUnhealthy)
	for _, method := range []string{"await", "wait"} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.errs[method] = []error{why}
				f.errs["end"] = []error{fmt.Errorf("runtime: %w", weft.ErrUnavailable), errors.New("busy")}
				r, reports, stop := run(t, f, assigned(weft.TaskRunning))
				st := r.Status()
				want := weft.TaskStarting
				if method == "wait" {
					want = weft.TaskRunning
				}
				if !st.Unhealthy || st.State != want || !strings.HasPrefix(st.Err, "unhealthy container: 3 checks in a row failed; stop: ") {
					t.Errorf("status %+v", st)
				}
				if calls := f.called(); !slices.Contains(calls, "end") || calls[slices.Index(calls, "end")-1] != "report" {
					t.Errorf("the verdict must be recorded, then it is stopped: %v", calls)
				}
				time.Sleep(2 * time.Second)
				synctest.Wait()
				st = r.Status()
				if st.State != weft.TaskFailed || st.Unhealthy || st.Err != "unhealthy container: 3 checks in a row failed" || st.ExitCode != 137 || !st.ExitKnown {
					t.Errorf("status %+v of %+v", st, *reports)
				}
				if st.Ran.IsZero() != (method == "await") {
					t.Errorf("it ran at %s", st.Ran)
				}
				stop()
			})
		})
	}
	for desired, call := range map[weft.TaskState]string{weft.TaskRunning: "end", weft.TaskShutdown: "shutdown"} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			f.phase = Running
			r, _, stop := run(t, f, weft.Task{Desired: desired, Status: weft.TaskStatus{State: weft.TaskRunning, Unhealthy: true, Err: "unhealthy container"}})
			if !f.did(call) || f.did("wait") || !r.Status().State.Ended() {
				t.Errorf("desired %s: %v, status %+v", desired, f.called(), r.Status())
			}
			stop()
		})
	}
}
