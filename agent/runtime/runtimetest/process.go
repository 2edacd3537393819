package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/signal"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Process is a runtime whose containers are plain processes of this machine:
// entrypoint and arguments are run as they are, without any isolation, with
// real logs and real signals. It needs no root. It knows nothing of images,
// mounts, users, limits or namespaces and refuses a specification that has
// mounts, limits or a user (weft.ErrUnsupported). Safe for concurrent use.
type Process struct {
	node weft.ID
	dir  string

	*MemoryImages

	// mu guards: all.
	mu  sync.Mutex
	all map[weft.ID]*proc
}

type proc struct {
	runtime.Status
	cmd           *exec.Cmd
	started, done chan struct{} // closed at start or removal; at exit or removal of one never started
}

// NewProcess returns a runtime that keeps its logs in dir.
func NewProcess(node weft.ID, dir string) *Process {
	return &Process{node: node, dir: dir, MemoryImages: NewMemoryImages(), all: make(map[weft.ID]*proc)}
}

func (p *Process) logDir(task weft.ID) string { return filepath.Join(p.dir, string(task)) }

func (p *Process) get(task weft.ID) (*proc, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.all[task]; c != nil {
		return c, nil
	}
	return nil, notFound(task)
}

// Create implements runtime.Runtime.
func (p *Process) Create(ctx context.Context, s runtime.Spec) error {
	if err := errors.Join(ctx.Err(), checkSpec(s)); err != nil {
		return err
	}
	if len(s.Mounts) > 0 || s.User != "" || s.Limits != (weft.Resources{}) || s.TTY || s.ReadOnly {
		return fmt.Errorf("plain process for task %s: mounts, user, limits, terminal and read-only root: %w", s.Task, weft.ErrUnsupported)
	}
	if len(s.Entrypoint)+len(s.Args) == 0 {
		return fmt.Errorf("plain process for task %s: no command specified: %w", s.Task, weft.ErrInvalid)
	}
	if err := os.MkdirAll(p.logDir(s.Task), 0o700); err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all[s.Task] == nil {
		p.all[s.Task] = &proc{
			Status:  runtime.Status{Task: s.Task, CreatedAt: time.Now(), Spec: s, LogPath: runtime.LogFile(p.logDir(s.Task))},
			started: make(chan struct{}), done: make(chan struct{}),
		}
	}
	return nil
}

// Start implements runtime.Runtime.
func (p *Process) Start(ctx context.Context, task weft.ID) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.all[task]
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case c == nil:
		return 0, notFound(task)
	case c.State == runtime.Running:
		return c.PID, nil
	case c.State != runtime.Created:
		return 0, fmt.Errorf("start task %s: it has ended; remove it: %w", task, weft.ErrConflict)
	}
	argv := append(append([]string{}, c.Spec.Entrypoint...), c.Spec.Args...)
	log, err := runtime.OpenLog(p.logDir(task), 0)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = append(os.Environ(), c.Spec.Env...), c.Spec.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, oerr := cmd.StdoutPipe()
	errOut, eerr := cmd.StderrPipe()
	if err := errors.Join(oerr, eerr); err != nil {
		return 0, errors.Join(err, log.Close())
	}
	if err := cmd.Start(); err != nil {
		return 0, errors.Join(fmt.Errorf("start task %s: %w: %w", task, err, weft.ErrInvalid), log.Close())
	}
	c.cmd, c.State, c.PID, c.StartedAt = cmd, runtime.Running, cmd.Process.Pid, time.Now()
	close(c.started)
	go p.reap(c, log, out, errOut) // ends with the process; Wait and Remove wait for it by done
	return c.PID, nil
}

// reap copies the output, then collects the process.
func (p *Process) reap(c *proc, log *runtime.LogWriter, out, errOut io.Reader) {
	var wg sync.WaitGroup
	wg.Go(func() { log.Copy(false, out) })
	wg.Go(func() { log.Copy(true, errOut) })
	wg.Wait()
	err := errors.Join(c.cmd.Wait(), log.Close())
	p.mu.Lock()
	defer p.mu.Unlock()
	c.State, c.PID, c.Exit = runtime.Exited, 0, runtime.Exit{Code: exitCode(c.cmd, err), Known: true, At: time.Now()}
	close(c.done)
}

func exitCode(cmd *exec.Cmd, err error) int {
	st := cmd.ProcessState
	if st == nil {
		return 255
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	if code := st.ExitCode(); code >= 0 || err == nil {
		return code
	}
	return 255
}

// Wait implements runtime.Runtime.
func (p *Process) Wait(ctx context.Context, task weft.ID) (runtime.Exit, error) {
	c, err := p.get(task)
	if err != nil {
		return runtime.Exit{}, err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for task %s: %w", task, ctx.Err())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.State != runtime.Exited {
		return runtime.Exit{}, notFound(task)
	}
	return c.Exit, nil
}

// Stop implements runtime.Runtime.
func (p *Process) Stop(ctx context.Context, task weft.ID, grace time.Duration) (runtime.Exit, error) {
	c, err := p.get(task)
	if err != nil {
		return runtime.Exit{}, err
	}
	p.mu.Lock()
	state, sig := c.State, syscall.SIGTERM
	if s := c.Spec.StopSignal; s != "" {
		sig, err = signal.ParseSignal(s)
	}
	p.mu.Unlock()
	if state == runtime.Created || err != nil {
		return runtime.Exit{}, errors.Join(err, fmt.Errorf("stop task %s: it has not been started: %w", task, weft.ErrConflict))
	}
	p.kill(c, sig)
	gctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	exit, err := p.Wait(gctx, task)
	if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return exit, err
	}
	p.kill(c, syscall.SIGKILL)
	return p.Wait(ctx, task)
}

// kill signals the process, with SIGKILL its whole group.
func (p *Process) kill(c *proc, sig syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.State != runtime.Running {
		return
	}
	pid := c.PID
	if sig == syscall.SIGKILL {
		pid = -pid
	}
	syscall.Kill(pid, sig) // it can only have ended, which reap sees
}

// Signal implements runtime.Runtime.
func (p *Process) Signal(ctx context.Context, task weft.ID, name string) error {
	sig, err := signal.ParseSignal(name)
	if err != nil {
		return fmt.Errorf("signal %q is unknown: %w", name, weft.ErrInvalid)
	}
	c, err := p.get(task)
	if err := errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	p.mu.Lock()
	state := c.State
	p.mu.Unlock()
	if state != runtime.Running {
		return fmt.Errorf("signal task %s: it is not running: %w", task, weft.ErrConflict)
	}
	p.kill(c, sig)
	return nil
}

// Remove implements runtime.Runtime.
func (p *Process) Remove(ctx context.Context, task weft.ID) error {
	c, err := p.get(task)
	if err != nil {
		return ctx.Err()
	}
	p.kill(c, syscall.SIGKILL)
	p.mu.Lock()
	delete(p.all, task)
	if c.State == runtime.Created {
		close(c.started)
		close(c.done)
	}
	p.mu.Unlock()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("remove task %s: %w", task, ctx.Err())
	}
}

// List implements runtime.Runtime.
func (p *Process) List(ctx context.Context) ([]runtime.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]runtime.Status, 0, len(p.all))
	for _, c := range p.all {
		out = append(out, c.Status)
	}
	return out, ctx.Err()
}

// Exec implements runtime.Execer; user, terminal and privileges are refused.
func (p *Process) Exec(ctx context.Context, task weft.ID, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	c, err := p.get(task)
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	state := c.State
	p.mu.Unlock()
	switch {
	case state != runtime.Running:
		return 0, fmt.Errorf("exec in task %s: it is not running: %w", task, weft.ErrConflict)
	case len(s.Cmd) == 0:
		return 0, fmt.Errorf("exec in task %s: no command specified: %w", task, weft.ErrInvalid)
	case s.TTY || s.User != "" || s.Privileged:
		return 0, fmt.Errorf("exec in task %s: terminal, user and privileges: %w", task, weft.ErrUnsupported)
	}
	cmd := exec.CommandContext(ctx, s.Cmd[0], s.Cmd[1:]...)
	cmd.Env, cmd.Dir = append(os.Environ(), append(c.Spec.Env, s.Env...)...), s.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = st.Stdin, st.Stdout, st.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("exec in task %s: %w: %w", task, err, weft.ErrInvalid)
	}
	if s.Started != nil {
		s.Started(cmd.Process.Pid)
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return exitCode(cmd, err), nil
}

// Logs implements runtime.Logs.
func (p *Process) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	if _, err := os.Stat(p.logDir(task)); err != nil {
		return fmt.Errorf("log of task %s: %w", task, weft.ErrNotFound)
	}
	read := runtime.LogRead{LogOptions: o, Task: task, Node: p.node}
	if c, err := p.get(task); err == nil {
		read.Ended = c.done
	} else {
		ended := make(chan struct{})
		close(ended)
		read.Ended = ended
	}
	return runtime.ReadLog(ctx, p.logDir(task), read, f)
}

// RemoveLogs implements runtime.Logs.
func (p *Process) RemoveLogs(ctx context.Context, task weft.ID) error {
	return errors.Join(ctx.Err(), os.RemoveAll(p.logDir(task)))
}
