// Package runtimetest has what tests need of a container runtime: a conformance
// suite that every implementation passes, an implementation in memory (Memory)
// and one that runs plain processes (Process). It is run by tests only.
package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Target is what the suite drives.
type Target interface {
	runtime.Runtime
	runtime.Execer
	runtime.Logs
}

// Harness tells the suite how to use an implementation. All commands are the
// Args of a specification; the image must have no entrypoint.
type Harness struct {
	// New returns a runtime without containers; it may be the same one each time.
	New   func(t *testing.T) Target
	Image string
	// Sleep runs until SIGTERM, then exits 7. Stubborn ignores SIGTERM.
	// Both have printed "ready\n" to stdout once they behave so.
	Sleep, Stubborn []string
	// Exit ends with the code.
	Exit func(code int) []string
	// Print writes lines out1, err1, out2 to stdout, stderr, stdout and ends with 0.
	Print []string
	// Missing cannot be executed; nil skips the case where all can.
	Missing []string
	// Echo is an exec command that copies stdin to stdout and ends with 5
	// at its end.
	Echo []string
}

const bound = 30 * time.Second

// Run runs the conformance suite.
func Run(t *testing.T, h Harness) {
	for _, c := range []struct {
		name string
		f    func(context.Context, *testing.T, Harness, Target)
	}{
		{"life", testLife}, {"idempotent", testIdempotent}, {"exit codes", testExitCodes},
		{"wait before start", testWaitBeforeStart}, {"wait ends with its context", testWaitContext},
		{"stop", testStop}, {"stop kills the stubborn", testStopKills}, {"signal", testSignal},
		{"remove running", testRemoveRunning}, {"remove wakes waiters", testRemoveWakes},
		{"missing container", testMissing}, {"ended is not restarted", testNoRestart},
		{"bad specification", testBadSpec}, {"logs", testLogs}, {"logs follow", testLogsFollow},
		{"exec", testExec}, {"exec ends with its context", testExecContext},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), bound)
			defer cancel()
			c.f(ctx, t, h, h.New(t))
		})
	}
}

// make creates a container and sees to its removal.
func (h Harness) make(ctx context.Context, t *testing.T, r Target, args []string) weft.ID {
	t.Helper()
	id := weft.NewID()
	s := runtime.Spec{Task: id, Name: "svc.1." + string(id), Image: h.Image, Args: args, Hostname: "box", Labels: map[string]string{"k": "v"}}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bound)
		defer cancel()
		if err := r.Remove(ctx, id); err != nil {
			t.Errorf("remove: %v", err)
		}
		if err := r.RemoveLogs(ctx, id); err != nil {
			t.Errorf("remove logs: %v", err)
		}
	})
	if err := r.Create(ctx, s); err != nil {
		t.Fatalf("create: %v", err)
	}
	return id
}

// start makes and starts one that prints "ready", and waits for that.
func (h Harness) start(ctx context.Context, t *testing.T, r Target, args []string) weft.ID {
	t.Helper()
	id := h.make(ctx, t, r, args)
	if _, err := r.Start(ctx, id); err != nil {
		t.Fatalf("start: %v", err)
	}
	AwaitLine(ctx, t, r, id, "ready\n")
	return id
}

// AwaitLine blocks until a container has printed the line.
func AwaitLine(ctx context.Context, t *testing.T, r runtime.Logs, id weft.ID, line string) {
	t.Helper()
	found := errors.New("found")
	var other []byte
	err := r.Logs(ctx, id, weft.LogOptions{Stdout: true, Stderr: true, Follow: true, Tail: -1}, func(rec weft.LogRecord) error {
		if string(rec.Line) == line {
			return found
		}
		other = append(other, rec.Line...)
		return nil
	})
	if !errors.Is(err, found) {
		t.Fatalf("container did not print %q: %v; it printed %q", line, err, other)
	}
}

func status(ctx context.Context, t *testing.T, r Target, id weft.ID) (runtime.Status, bool) {
	t.Helper()
	all, err := r.List(ctx)
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	i := slices.IndexFunc(all, func(s runtime.Status) bool { return s.Task == id })
	if i < 0 {
		return runtime.Status{}, false
	}
	return all[i], true
}

func wantState(ctx context.Context, t *testing.T, r Target, id weft.ID, want runtime.State) runtime.Status {
	t.Helper()
	st, ok := status(ctx, t, r, id)
	if !ok || st.State != want {
		t.Fatalf("state %v (listed %v), want %v", st.State, ok, want)
	}
	return st
}

func testLife(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Sleep)
	st := wantState(ctx, t, r, id, runtime.Created)
	if st.Spec.Name != "svc.1."+string(id) || st.Spec.Labels["k"] != "v" || !slices.Equal(st.Spec.Args, h.Sleep) {
		t.Errorf("specification came back as %+v", st.Spec)
	}
	if st.CreatedAt.IsZero() {
		t.Error("no time of creation")
	}
	pid, err := r.Start(ctx, id)
	if err != nil || pid <= 0 {
		t.Fatalf("start: pid %d, %v", pid, err)
	}
	st = wantState(ctx, t, r, id, runtime.Running)
	if st.PID != pid || st.StartedAt.Before(st.CreatedAt.Add(-time.Second)) || st.LogPath == "" {
		t.Errorf("running as %+v, want pid %d", st, pid)
	}
	AwaitLine(ctx, t, r, id, "ready\n")
	exit, err := r.Stop(ctx, id, bound)
	if err != nil || exit.Code != 7 || !exit.Known || exit.OOM || exit.At.IsZero() {
		t.Fatalf("stop: %+v, %v; want code 7", exit, err)
	}
	st = wantState(ctx, t, r, id, runtime.Exited)
	if st.Exit.Code != 7 || !st.Exit.Known || st.PID != 0 {
		t.Errorf("exited as %+v", st)
	}
	if err := r.Remove(ctx, id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if _, ok := status(ctx, t, r, id); ok {
		t.Error("listed after its removal")
	}
}

func testIdempotent(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Sleep)
	if err := r.Create(ctx, runtime.Spec{Task: id, Image: h.Image, Args: h.Sleep}); err != nil {
		t.Errorf("create again: %v", err)
	}
	pid, err := r.Start(ctx, id)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	if again, err := r.Start(ctx, id); err != nil || again != pid {
		t.Errorf("start again: pid %d, %v; want %d", again, err, pid)
	}
	AwaitLine(ctx, t, r, id, "ready\n")
	for range 2 {
		if exit, err := r.Stop(ctx, id, bound); err != nil || exit.Code != 7 {
			t.Errorf("stop: %+v, %v", exit, err)
		}
	}
	for range 2 {
		if err := r.Remove(ctx, id); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
}

func testExitCodes(ctx context.Context, t *testing.T, h Harness, r Target) {
	for _, code := range []int{0, 1, 42} {
		id := h.make(ctx, t, r, h.Exit(code))
		if _, err := r.Start(ctx, id); err != nil {
			t.Fatalf("start: %v", err)
		}
		for range 2 { // the exit stays until the container is removed
			if exit, err := r.Wait(ctx, id); err != nil || exit.Code != code || !exit.Known {
				t.Errorf("exit %d came back as %+v, %v", code, exit, err)
			}
		}
	}
}

func testWaitBeforeStart(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Exit(3))
	got := make(chan error, 1)
	go func() {
		exit, err := r.Wait(ctx, id)
		if err == nil && exit.Code != 3 {
			err = fmt.Errorf("exit %+v, want code 3", exit)
		}
		got <- err
	}()
	if _, err := r.Start(ctx, id); err != nil {
		t.Errorf("start: %v", err)
	}
	if err := <-got; err != nil {
		t.Errorf("wait: %v", err)
	}
}

func testWaitContext(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.start(ctx, t, r, h.Sleep)
	wctx, cancel := context.WithCancel(ctx)
	got := make(chan error, 1)
	go func() { _, err := r.Wait(wctx, id); got <- err }()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("wait ended with %v", err)
	}
	wantState(ctx, t, r, id, runtime.Running)
}

func testStop(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Sleep)
	if _, err := r.Stop(ctx, id, time.Second); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("stop of a container never started: %v", err)
	}
}

func testStopKills(ctx context.Context, t *testing.T, h Harness, r Target) {
	for _, grace := range []time.Duration{10 * time.Millisecond, 0} {
		id := h.start(ctx, t, r, h.Stubborn)
		exit, err := r.Stop(ctx, id, grace)
		if err != nil || exit.Code != 137 || !exit.Known {
			t.Errorf("stop within %s: %+v, %v; want code 137", grace, exit, err)
		}
	}
}

func testSignal(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.start(ctx, t, r, h.Sleep)
	if err := r.Signal(ctx, id, "SIGNONSENSE"); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("unknown signal: %v", err)
	}
	if err := r.Signal(ctx, id, "SIGTERM"); err != nil {
		t.Fatalf("signal: %v", err)
	}
	if exit, err := r.Wait(ctx, id); err != nil || exit.Code != 7 {
		t.Errorf("after SIGTERM: %+v, %v", exit, err)
	}
	if err := r.Signal(ctx, id, "SIGTERM"); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("signal to an ended container: %v", err)
	}
}

func testRemoveRunning(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.start(ctx, t, r, h.Stubborn)
	if err := r.Remove(ctx, id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if _, ok := status(ctx, t, r, id); ok {
		t.Error("listed after its removal")
	}
	var n int
	err := r.Logs(ctx, id, weft.LogOptions{Stdout: true, Tail: -1}, func(weft.LogRecord) error { n++; return nil })
	if err != nil || n != 1 {
		t.Errorf("log after removal: %d lines, %v; want 1", n, err)
	}
}

func testRemoveWakes(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Sleep)
	got := make(chan error, 1)
	go func() { _, err := r.Wait(ctx, id); got <- err }()
	if err := r.Remove(ctx, id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if err := <-got; !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("wait ended with %v, want not found", err)
	}
}

func testMissing(ctx context.Context, t *testing.T, _ Harness, r Target) {
	id := weft.NewID()
	_, startErr := r.Start(ctx, id)
	_, waitErr := r.Wait(ctx, id)
	_, stopErr := r.Stop(ctx, id, time.Second)
	_, execErr := r.Exec(ctx, id, runtime.ExecSpec{ID: "x", Cmd: []string{"true"}}, runtime.Streams{})
	logsErr := r.Logs(ctx, id, weft.LogOptions{Stdout: true, Tail: -1}, func(weft.LogRecord) error { return nil })
	for name, err := range map[string]error{
		"start": startErr, "wait": waitErr, "stop": stopErr, "exec": execErr, "logs": logsErr,
		"signal": r.Signal(ctx, id, "SIGTERM"),
	} {
		if !errors.Is(err, weft.ErrNotFound) {
			t.Errorf("%s: %v, want not found", name, err)
		}
	}
	if err := r.Remove(ctx, id); err != nil {
		t.Errorf("remove: %v", err)
	}
	if err := r.RemoveLogs(ctx, id); err != nil {
		t.Errorf("remove logs: %v", err)
	}
}

func testNoRestart(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Exit(0))
	if _, err := r.Start(ctx, id); err != nil {
		t.Fatalf("start: %v", err)
	}
	if _, err := r.Wait(ctx, id); err != nil {
		t.Fatalf("wait: %v", err)
	}
	if _, err := r.Start(ctx, id); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("start of an ended container: %v", err)
	}
}

func testBadSpec(ctx context.Context, t *testing.T, h Harness, r Target) {
	for name, s := range map[string]runtime.Spec{
		"task id":     {Task: "../x", Image: h.Image, Args: h.Sleep},
		"no task id":  {Image: h.Image, Args: h.Sleep},
		"stop signal": {Task: weft.NewID(), Image: h.Image, Args: h.Sleep, StopSignal: "SIGNONSENSE"},
	} {
		if err := r.Create(ctx, s); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
		if _, ok := status(ctx, t, r, s.Task); ok {
			t.Errorf("%s: something was made", name)
		}
	}
	if h.Missing == nil {
		return
	}
	id := h.make(ctx, t, r, h.Missing)
	if _, err := r.Start(ctx, id); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("command that does not exist: %v, want invalid", err)
	}
	wantState(ctx, t, r, id, runtime.Created)
}

func testLogs(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Print)
	if _, err := r.Start(ctx, id); err != nil {
		t.Fatalf("start: %v", err)
	}
	if _, err := r.Wait(ctx, id); err != nil {
		t.Fatalf("wait: %v", err)
	}
	read := func(o weft.LogOptions) string {
		t.Helper()
		var out []string
		err := r.Logs(ctx, id, o, func(rec weft.LogRecord) error {
			if rec.Task != id || rec.Time.IsZero() || rec.Stderr != strings.HasPrefix(string(rec.Line), "err") {
				t.Errorf("record %+v", rec)
			}
			out = append(out, string(rec.Line))
			return nil
		})
		if err != nil {
			t.Fatalf("logs: %v", err)
		}
		slices.SortStableFunc(out, func(a, b string) int { return strings.Compare(b[:3], a[:3]) }) // the order between the two streams is open
		return strings.Join(out, "")
	}
	// Following an ended container ends; it also waits for the last lines.
	if got := read(weft.LogOptions{Stdout: true, Stderr: true, Tail: -1, Follow: true}); got != "out1\nout2\nerr1\n" {
		t.Errorf("all: %q", got)
	}
	if got := read(weft.LogOptions{Stdout: true, Tail: -1}); got != "out1\nout2\n" {
		t.Errorf("stdout: %q", got)
	}
	if got := read(weft.LogOptions{Stdout: true, Tail: 1}); got != "out2\n" {
		t.Errorf("last line: %q", got)
	}
	if got := read(weft.LogOptions{Stderr: true, Tail: -1}); got != "err1\n" {
		t.Errorf("stderr: %q", got)
	}
	if got := read(weft.LogOptions{Stdout: true, Tail: -1, Since: time.Now().Add(time.Hour)}); got != "" {
		t.Errorf("since: %q", got)
	}
	stop := errors.New("stop")
	if err := r.Logs(ctx, id, weft.LogOptions{Stdout: true, Tail: -1}, func(weft.LogRecord) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("error of the callback: %v", err)
	}
}

func testLogsFollow(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.start(ctx, t, r, h.Sleep)
	lctx, cancel := context.WithCancel(ctx)
	err := r.Logs(lctx, id, weft.LogOptions{Stdout: true, Tail: -1, Follow: true}, func(weft.LogRecord) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("follow ended with %v", err)
	}
	done := make(chan error, 1)
	go func() {
		done <- r.Logs(ctx, id, weft.LogOptions{Stdout: true, Tail: 0, Follow: true}, func(weft.LogRecord) error { return nil })
	}()
	if err := r.Remove(ctx, id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("follow of a removed container: %v", err)
	}
}

func testExec(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.make(ctx, t, r, h.Sleep)
	if _, err := r.Exec(ctx, id, runtime.ExecSpec{ID: "early", Cmd: h.Echo}, runtime.Streams{}); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("exec before start: %v", err)
	}
	if _, err := r.Start(ctx, id); err != nil {
		t.Fatalf("start: %v", err)
	}
	var out bytes.Buffer
	pid := 0
	code, err := r.Exec(ctx, id, runtime.ExecSpec{ID: "x1", Cmd: h.Echo, Started: func(p int) { pid = p }},
		runtime.Streams{Stdin: strings.NewReader("hello\n"), Stdout: &out})
	if err != nil || code != 5 || out.String() != "hello\n" || pid <= 0 {
		t.Errorf("exec: code %d, %v, output %q, pid %d", code, err, out.String(), pid)
	}
	if _, err := r.Exec(ctx, id, runtime.ExecSpec{ID: "x2"}, runtime.Streams{}); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("exec of nothing: %v", err)
	}
	if h.Missing != nil {
		if _, err := r.Exec(ctx, id, runtime.ExecSpec{ID: "x3", Cmd: h.Missing}, runtime.Streams{}); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("exec of a missing command: %v", err)
		}
	}
}

func testExecContext(ctx context.Context, t *testing.T, h Harness, r Target) {
	id := h.start(ctx, t, r, h.Sleep)
	ectx, cancel := context.WithCancel(ctx)
	_, err := r.Exec(ectx, id, runtime.ExecSpec{ID: "x1", Cmd: h.Sleep, Started: func(int) { cancel() }}, runtime.Streams{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("exec ended with %v", err)
	}
	wantState(ctx, t, r, id, runtime.Running)
}
