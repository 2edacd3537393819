package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/moby/sys/signal"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Memory is a runtime in memory: no process, no file. Safe for concurrent use,
// and for testing/synctest bubbles: it makes no goroutine and waits only on
// channels and timers.
//
// Its containers understand these Args; everything else means "sleep":
//
//	sleep            prints ready; SIGTERM ends it with 7
//	stubborn         prints ready; only SIGKILL ends it
//	exit N           ends at once with N
//	print            prints out1, err1 (to stderr), out2; ends with 0
//	missing          cannot be started
//
// and Exec understands "sleep", "missing" and "echo" (copies stdin, ends with 5).
type Memory struct {
	Node weft.ID

	*MemoryImages

	// mu guards: everything below.
	mu      sync.Mutex
	all     map[weft.ID]*memContainer
	logs    map[weft.ID]*memLog
	nextPID int
	fail    map[string]error
}

type memContainer struct {
	runtime.Status
	started, done chan struct{} // closed at start or removal, at exit or removal
	removed       bool
}

type memLog struct {
	records []weft.LogRecord
	grown   chan struct{} // closed and replaced at each record
}

// NewMemory returns a runtime without containers and with no image.
func NewMemory(node weft.ID) *Memory {
	return &Memory{
		Node: node, MemoryImages: NewMemoryImages(), nextPID: 1000,
		all: make(map[weft.ID]*memContainer), logs: make(map[weft.ID]*memLog), fail: make(map[string]error),
	}
}

// Fail makes every later call of a method ("Create", "Start", "Stop", …) return
// err; nil heals it.
func (m *Memory) Fail(method string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail[method] = err
}

// Exit ends a running container from inside, as a crash would; it reports
// whether one ran.
func (m *Memory) Exit(task weft.ID, code int, oom bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.all[task]
	if c == nil || c.State != runtime.Running {
		return false
	}
	m.endLocked(c, runtime.Exit{Code: code, Known: true, OOM: oom, At: time.Now()})
	return true
}

// Lose ends every running container with an unknown exit, as a reboot would.
func (m *Memory) Lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.all {
		if c.State == runtime.Running {
			m.endLocked(c, runtime.Exit{Code: -1})
			c.State = runtime.Lost
		}
	}
}

// Print appends a line to a container's log.
func (m *Memory) Print(task weft.ID, stderr bool, line string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.printLocked(task, stderr, line)
}

func (m *Memory) printLocked(task weft.ID, stderr bool, line string) {
	l := m.logs[task]
	if l == nil {
		return
	}
	l.records = append(l.records, weft.LogRecord{Task: task, Node: m.Node, Stderr: stderr, Time: time.Now(), Line: []byte(line)})
	close(l.grown)
	l.grown = make(chan struct{})
}

func (m *Memory) endLocked(c *memContainer, e runtime.Exit) {
	c.State, c.PID, c.Exit = runtime.Exited, 0, e
	close(c.done)
}

func notFound(task weft.ID) error {
	return fmt.Errorf("container of task %s: %w", task, weft.ErrNotFound)
}

func checkSpec(s runtime.Spec) error {
	if s.Task == "" || !isFileName(string(s.Task)) {
		return fmt.Errorf("task id %q: %w", s.Task, weft.ErrInvalid)
	}
	if s.StopSignal != "" {
		if _, err := signal.ParseSignal(s.StopSignal); err != nil {
			return fmt.Errorf("stop signal %q: %w", s.StopSignal, weft.ErrInvalid)
		}
	}
	return nil
}

func isFileName(s string) bool {
	for _, r := range s {
		if (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' {
			return false
		}
	}
	return s[0] != '-'
}

// Create implements runtime.Runtime.
func (m *Memory) Create(ctx context.Context, s runtime.Spec) error {
	if err := errors.Join(ctx.Err(), checkSpec(s)); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail["Create"]; err != nil {
		return err
	}
	if m.all[s.Task] != nil {
		return nil
	}
	m.all[s.Task] = &memContainer{
		Status:  runtime.Status{Task: s.Task, CreatedAt: time.Now(), Spec: s, LogPath: "memory:" + string(s.Task)},
		started: make(chan struct{}), done: make(chan struct{}),
	}
	if m.logs[s.Task] == nil {
		m.logs[s.Task] = &memLog{grown: make(chan struct{})}
	}
	return nil
}

// Start implements runtime.Runtime.
func (m *Memory) Start(ctx context.Context, task weft.ID) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.all[task]
	switch err := errors.Join(ctx.Err(), m.fail["Start"]); {
	case err != nil:
		return 0, err
	case c == nil:
		return 0, notFound(task)
	case c.State == runtime.Running:
		return c.PID, nil
	case c.State != runtime.Created:
		return 0, fmt.Errorf("start container of task %s: it has ended; remove it: %w", task, weft.ErrConflict)
	}
	args := append(append([]string{}, c.Spec.Args...), "", "")
	if args[0] == "missing" {
		return 0, fmt.Errorf("start container of task %s: executable not found: %w", task, weft.ErrInvalid)
	}
	m.nextPID++
	pid := m.nextPID
	c.State, c.PID, c.StartedAt = runtime.Running, pid, time.Now()
	close(c.started)
	switch args[0] {
	case "exit":
		code, err := strconv.Atoi(args[1])
		if err != nil {
			return 0, fmt.Errorf("exit %q: %w", args[1], weft.ErrInvalid)
		}
		m.endLocked(c, runtime.Exit{Code: code, Known: true, At: time.Now()})
	case "print":
		m.printLocked(task, false, "out1\n")
		m.printLocked(task, true, "err1\n")
		m.printLocked(task, false, "out2\n")
		m.endLocked(c, runtime.Exit{Known: true, At: time.Now()})
	default:
		m.printLocked(task, false, "ready\n")
	}
	return pid, nil
}

// Wait implements runtime.Runtime.
func (m *Memory) Wait(ctx context.Context, task weft.ID) (runtime.Exit, error) {
	m.mu.Lock()
	c := m.all[task]
	m.mu.Unlock()
	if c == nil {
		return runtime.Exit{}, notFound(task)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for task %s: %w", task, ctx.Err())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.removed && c.State != runtime.Exited && c.State != runtime.Lost {
		return runtime.Exit{}, notFound(task)
	}
	return c.Exit, nil
}

// Stop implements runtime.Runtime.
func (m *Memory) Stop(ctx context.Context, task weft.ID, grace time.Duration) (runtime.Exit, error) {
	m.mu.Lock()
	c, err := m.all[task], m.fail["Stop"]
	if err == nil && c != nil && c.State == runtime.Created {
		err = fmt.Errorf("stop task %s: its container has not been started: %w", task, weft.ErrConflict)
	}
	if err == nil && c == nil {
		err = notFound(task)
	}
	if err != nil {
		m.mu.Unlock()
		return runtime.Exit{}, err
	}
	m.signalLocked(c, false)
	m.mu.Unlock()
	gctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	exit, err := m.Wait(gctx, task)
	if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return exit, err
	}
	m.mu.Lock()
	m.signalLocked(c, true)
	m.mu.Unlock()
	return m.Wait(ctx, task)
}

func (m *Memory) signalLocked(c *memContainer, kill bool) {
	stubborn := len(c.Spec.Args) > 0 && c.Spec.Args[0] == "stubborn"
	switch {
	case c.State != runtime.Running:
	case kill:
		m.endLocked(c, runtime.Exit{Code: 137, Known: true, At: time.Now()})
	case !stubborn:
		m.endLocked(c, runtime.Exit{Code: 7, Known: true, At: time.Now()})
	}
}

// Signal implements runtime.Runtime; only SIGTERM and SIGKILL have an effect.
func (m *Memory) Signal(ctx context.Context, task weft.ID, name string) error {
	sig, err := signal.ParseSignal(name)
	if err != nil {
		return fmt.Errorf("signal %q is unknown: %w", name, weft.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.all[task]
	switch err := errors.Join(ctx.Err(), m.fail["Signal"]); {
	case err != nil:
		return err
	case c == nil:
		return notFound(task)
	case c.State != runtime.Running:
		return fmt.Errorf("signal task %s: its container is not running: %w", task, weft.ErrConflict)
	}
	if n := signal.SignalMap["TERM"]; sig == n || sig == signal.SignalMap["KILL"] {
		m.signalLocked(c, sig != n)
	}
	return nil
}

// Remove implements runtime.Runtime.
func (m *Memory) Remove(ctx context.Context, task weft.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(ctx.Err(), m.fail["Remove"]); err != nil {
		return err
	}
	c := m.all[task]
	if c == nil {
		return nil
	}
	m.signalLocked(c, true)
	c.removed = true
	if c.State == runtime.Created {
		close(c.started)
		close(c.done)
	}
	delete(m.all, task)
	return nil
}

// List implements runtime.Runtime.
func (m *Memory) List(ctx context.Context) ([]runtime.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(ctx.Err(), m.fail["List"]); err != nil {
		return nil, err
	}
	out := make([]runtime.Status, 0, len(m.all))
	for _, c := range m.all {
		out = append(out, c.Status)
	}
	return out, nil
}

// Exec implements runtime.Execer.
func (m *Memory) Exec(ctx context.Context, task weft.ID, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	m.mu.Lock()
	c := m.all[task]
	var err error
	switch {
	case len(s.Cmd) == 0:
		err = fmt.Errorf("exec in task %s: no command specified: %w", task, weft.ErrInvalid)
	case c == nil:
		err = notFound(task)
	case c.State != runtime.Running:
		err = fmt.Errorf("exec in task %s: its container is not running: %w", task, weft.ErrConflict)
	case s.Cmd[0] == "missing":
		err = fmt.Errorf("exec in task %s: executable not found: %w", task, weft.ErrInvalid)
	}
	if err == nil {
		err = m.fail["Exec"]
	}
	m.nextPID++
	pid := m.nextPID
	m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if s.Started != nil {
		s.Started(pid)
	}
	if s.Cmd[0] == "echo" {
		if st.Stdin != nil && st.Stdout != nil {
			if _, err := io.Copy(st.Stdout, st.Stdin); err != nil {
				return 0, fmt.Errorf("exec in task %s: %w", task, err)
			}
		}
		return 5, nil
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-c.done:
		return 137, nil
	}
}

// Logs implements runtime.Logs.
func (m *Memory) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	m.mu.Lock()
	l, c := m.logs[task], m.all[task]
	if l == nil {
		m.mu.Unlock()
		return notFound(task)
	}
	next := selectRecords(l.records, o)
	seen := len(l.records)
	m.mu.Unlock()
	if o.Tail >= 0 {
		next = next[max(0, len(next)-o.Tail):]
	}
	for {
		for _, r := range next {
			if err := f(r); err != nil {
				return err
			}
		}
		if !o.Follow {
			return nil
		}
		m.mu.Lock()
		grown := l.grown
		next, seen = selectRecords(l.records[seen:], o), len(l.records)
		m.mu.Unlock()
		if len(next) > 0 {
			continue
		}
		if c == nil || isClosed(c.done) {
			return nil
		}
		select {
		case <-grown:
		case <-c.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func selectRecords(all []weft.LogRecord, o weft.LogOptions) []weft.LogRecord {
	var out []weft.LogRecord
	for _, r := range all {
		if (r.Stderr && o.Stderr || !r.Stderr && o.Stdout) && !r.Time.Before(o.Since) && (o.Until.IsZero() || !r.Time.After(o.Until)) {
			out = append(out, r)
		}
	}
	return out
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// RemoveLogs implements runtime.Logs.
func (m *Memory) RemoveLogs(ctx context.Context, task weft.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.logs, task)
	return ctx.Err()
}
