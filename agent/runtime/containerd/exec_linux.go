package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Exec implements runtime.Execer. A container that does not run:
// weft.ErrConflict. A command that cannot be executed: weft.ErrInvalid.
func (d *Driver) Exec(ctx context.Context, task weft.ID, s runtime.ExecSpec, streams runtime.Streams) (int, error) {
	if len(s.Cmd) == 0 {
		return 0, fmt.Errorf("exec in task %s: no command specified: %w", task, weft.ErrInvalid)
	}
	nctx, c, err := d.conn(ctx)
	if err != nil {
		return 0, err
	}
	ctr, err := c.LoadContainer(nctx, string(task))
	if err != nil {
		return 0, wrap(err, "exec in task %s", task)
	}
	t, err := ctr.Task(nctx, nil)
	if errdefs.IsNotFound(err) {
		return 0, fmt.Errorf("exec in task %s: its container is not running: %w", task, weft.ErrConflict)
	}
	if err != nil {
		return 0, wrap(err, "exec in task %s", task)
	}
	st, err := t.Status(nctx)
	if err != nil {
		return 0, wrap(err, "exec in task %s", task)
	}
	if st.Status != client.Running {
		return 0, fmt.Errorf("exec in task %s: its container is %s, not running: %w", task, st.Status, weft.ErrConflict)
	}
	full, err := ctr.Spec(nctx)
	if err != nil {
		return 0, wrap(err, "exec in task %s", task)
	}
	proc, err := execProcess(full.Process, s, "/proc/"+strconv.Itoa(int(t.Pid()))+"/root")
	if err != nil {
		return 0, fmt.Errorf("exec in task %s: %w", task, err)
	}
	code, err := d.runExec(nctx, t, execRun{spec: s, process: proc, streams: streams})
	return code, wrap(startError(err), "exec in task %s", task)
}

// execProcess derives the process of an exec from the container's own.
func execProcess(own *specs.Process, s runtime.ExecSpec, root string) (*specs.Process, error) {
	p := *own
	p.Args, p.Terminal = s.Cmd, s.TTY
	p.Env = append(append([]string{}, own.Env...), s.Env...) // the last one of a name wins in runc
	if s.TTY {
		p.Env = append([]string{"TERM=xterm"}, p.Env...)
		p.ConsoleSize = firstSize(s.Resize)
	}
	if s.Dir != "" {
		p.Cwd = workDir(s.Dir, "")
	}
	if s.User != "" {
		u, err := lookupUser(root, s.User)
		if err != nil {
			return nil, err
		}
		p.User = u
	}
	caps := *own.Capabilities
	switch {
	case s.Privileged:
		// Not all that the kernel knows: the daemon may run with fewer, and
		// what it lacks it cannot give.
		all, err := cap.Current()
		if err != nil {
			return nil, fmt.Errorf("read the daemon's own capabilities: %w", err)
		}
		caps = specs.LinuxCapabilities{Bounding: all, Permitted: all, Effective: all}
	case p.User.UID == 0:
		caps.Permitted, caps.Effective = caps.Bounding, caps.Bounding
	default:
		caps.Permitted, caps.Effective = nil, nil
	}
	p.Capabilities = &caps
	return &p, nil
}

// firstSize is the size that a terminal has before its process starts, so that
// the process never sees one without; nil = none is known yet.
func firstSize(sizes <-chan runtime.Size) *specs.Box {
	select {
	case size, ok := <-sizes:
		if ok {
			return &specs.Box{Height: uint(size.Height), Width: uint(size.Width)}
		}
	default:
	}
	return nil
}

type execRun struct {
	spec    runtime.ExecSpec
	process *specs.Process
	streams runtime.Streams
}

func (d *Driver) runExec(ctx context.Context, t client.Task, r execRun) (code int, err error) {
	// The shim opens both outputs, wanted or not.
	if r.streams.Stdout == nil {
		r.streams.Stdout = io.Discard
	}
	if r.streams.Stderr == nil {
		r.streams.Stderr = io.Discard
	}
	opts := []cio.Opt{cio.WithStreams(r.streams.Stdin, r.streams.Stdout, r.streams.Stderr), cio.WithFIFODir(d.execDir("exec"))}
	if r.spec.TTY {
		opts = append(opts, cio.WithTerminal)
	}
	var closer *stdinCloser
	if r.streams.Stdin != nil {
		closer = &stdinCloser{r: r.streams.Stdin, eof: make(chan struct{})}
		opts[0] = cio.WithStreams(closer, r.streams.Stdout, r.streams.Stderr)
	}
	id := r.spec.ID
	if id == "" {
		id = string(weft.NewID())
	}
	p, err := t.Exec(ctx, id, r.process, cio.NewCreator(opts...))
	if err != nil {
		return 0, err
	}
	started := false
	defer func() {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		var how []client.ProcessDeleteOpts
		if started {
			how = append(how, client.WithProcessKill)
		}
		if _, derr := p.Delete(rctx, how...); derr != nil && !errdefs.IsNotFound(derr) {
			err = errors.Join(err, fmt.Errorf("delete exec: %w", derr))
		}
	}()
	// Waits and kills must not end with ctx: its end is what they react to.
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	exited, err := p.Wait(wctx)
	if err != nil {
		return 0, err
	}
	if err := p.Start(ctx); err != nil {
		return 0, err
	}
	started = true
	if r.spec.Started != nil {
		r.spec.Started(int(p.Pid()))
	}
	return d.followExec(ctx, p, exited, r.spec.Resize, closer)
}

// followExec serves an exec until it ends. When ctx ends it kills it.
func (d *Driver) followExec(ctx context.Context, p client.Process, exited <-chan client.ExitStatus, resize <-chan runtime.Size, in *stdinCloser) (int, error) {
	var eof <-chan struct{}
	if in != nil {
		eof = in.eof
	}
	done := ctx.Done()
	for {
		select {
		case st := <-exited:
			code, _, err := st.Result()
			if ctx.Err() != nil {
				return 0, ctx.Err()
			}
			if err != nil {
				return 0, err
			}
			p.IO().Wait() // the rest of its output
			return int(code), nil
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			if err := p.Resize(ctx, uint32(size.Width), uint32(size.Height)); err != nil && !errdefs.IsNotFound(err) && ctx.Err() == nil {
				d.log.Warn("cannot resize terminal", weft.KeyErr, err)
			}
		case <-eof:
			eof = nil
			if err := p.CloseIO(ctx, client.WithStdinCloser); err != nil && !errdefs.IsNotFound(err) && ctx.Err() == nil {
				d.log.Warn("cannot close stdin of exec", weft.KeyErr, err)
			}
		case <-done:
			done = nil
			kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			children := descendants(int(p.Pid()))
			err := p.Kill(kctx, syscall.SIGKILL)
			cancel()
			for _, pid := range children { // they hold its output open
				if kerr := syscall.Kill(pid, syscall.SIGKILL); kerr != nil && !errors.Is(kerr, syscall.ESRCH) {
					err = errors.Join(err, kerr)
				}
			}
			if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, os.ErrProcessDone) {
				return 0, errors.Join(ctx.Err(), err)
			}
		}
	}
}

// stdinCloser tells when the caller's stdin has ended.
type stdinCloser struct {
	r   interface{ Read([]byte) (int, error) }
	eof chan struct{} // closed by Read at the first error, which ends the copy
}

func (s *stdinCloser) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if err != nil {
		close(s.eof)
	}
	return n, err
}

// descendants lists the processes below pid, by the kernel's list of children
// (proc(5), /proc/pid/task/tid/children).
func descendants(pid int) []int {
	var all []int
	lists, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	if err != nil {
		return nil
	}
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			continue // ended meanwhile
		}
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil && child > 1 {
				all = append(append(all, child), descendants(child)...)
			}
		}
	}
	return all
}
