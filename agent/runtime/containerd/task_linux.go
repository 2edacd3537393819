package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/sys/signal"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Labels and the extension of our containers.
const (
	labelNode    = "weft.node"
	labelBoot    = "weft.boot"    // boot id: tells a container never started from one lost in a reboot
	labelImageID = "weft.image"   // digest of the image's configuration
	labelSignal  = "weft.signal"  // stop signal
	labelSpec    = "weft.spec"    // key of the extension
	specTypeURL  = "weft/spec/v1" // JSON of runtime.Spec; see testdata/spec-v1.json
)

// specExtension stores the runtime.Spec in containerd's record, so that both
// appear and vanish together.
type specExtension struct{ value []byte }

func (specExtension) GetTypeUrl() string { return specTypeURL }
func (e specExtension) GetValue() []byte { return e.value }

func encodeSpec(s runtime.Spec) (typeurl.Any, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode container specification: %w", err)
	}
	return specExtension{b}, nil
}

func decodeSpec(a typeurl.Any) (s runtime.Spec, err error) {
	if a == nil || a.GetTypeUrl() != specTypeURL {
		return s, fmt.Errorf("container record has no specification of version 1: %w", weft.ErrInvalid)
	}
	if err := json.Unmarshal(a.GetValue(), &s); err != nil {
		return s, fmt.Errorf("decode container specification: %w", err)
	}
	return s, nil
}

// taskLock lets one call at a time change a task.
type taskLock struct {
	token chan struct{} // capacity 1
	users int           // guarded by Driver.mu
}

func (d *Driver) lock(ctx context.Context, task weft.ID) (unlock func(), err error) {
	d.mu.Lock()
	l := d.tasks[task]
	if l == nil {
		l = &taskLock{token: make(chan struct{}, 1)}
		d.tasks[task] = l
	}
	l.users++
	d.mu.Unlock()
	leave := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(d.tasks, task)
		}
	}
	select {
	case l.token <- struct{}{}:
		return func() { <-l.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("task %s is busy: %w", task.Short(), ctx.Err())
	}
}

// startGate is closed when a task is started or removed, for those who wait for
// a container that is only created.
type startGate struct {
	open  chan struct{}
	users int // guarded by Driver.mu
}

func (d *Driver) joinGate(task weft.ID) (open <-chan struct{}, leave func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	g := d.starts[task]
	if g == nil {
		g = &startGate{open: make(chan struct{})}
		d.starts[task] = g
	}
	g.users++
	return g.open, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if g.users--; g.users == 0 && d.starts[task] == g {
			delete(d.starts, task)
		}
	}
}

func (d *Driver) openGate(task weft.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g := d.starts[task]; g != nil {
		close(g.open)
		delete(d.starts, task)
	}
}

// Start implements runtime.Runtime. A container that has run before is not
// started again (weft.ErrConflict).
func (d *Driver) Start(ctx context.Context, task weft.ID) (int, error) {
	unlock, err := d.lock(ctx, task)
	if err != nil {
		return 0, err
	}
	defer unlock()
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return 0, err
	}
	ctr, err := c.LoadContainer(ctx, string(task))
	if err != nil {
		return 0, wrap(err, "start container of task %s", task)
	}
	info, err := ctr.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return 0, wrap(err, "start container of task %s", task)
	}
	st, err := d.status(ctx, c, info)
	if err != nil {
		return 0, wrap(err, "start container of task %s", task)
	}
	switch st.State {
	case runtime.Running:
		return st.PID, nil
	case runtime.Exited, runtime.Lost:
		return 0, fmt.Errorf("start container of task %s: it has ended; remove it: %w", task, weft.ErrConflict)
	}
	pid, err := d.start(ctx, c, ctr, st.Spec)
	if err != nil {
		return 0, wrap(startError(err), "start container of task %s", task)
	}
	d.openGate(task)
	return pid, nil
}

func (d *Driver) start(ctx context.Context, c *client.Client, ctr client.Container, s runtime.Spec) (int, error) {
	id := string(s.Task)
	// An earlier Start may have died between create and start.
	if err := d.deleteTask(ctx, c, id); err != nil {
		return 0, err
	}
	// Without a sandbox record of the same id a restarted server forgets a
	// task that ended meanwhile, and its exit code with it.
	if err := d.putSandbox(ctx, c, id); err != nil {
		return 0, err
	}
	newIO := cio.BinaryIO
	if s.TTY {
		newIO = cio.TerminalBinaryIO
	}
	newTask := func() (client.Task, error) {
		return ctr.NewTask(ctx, newIO(d.libexec(loggerName), map[string]string{"dir": d.logDir(s.Task)}))
	}
	t, err := newTask()
	for try := 0; try < shimTries && shimEnded(err); try++ {
		if err := errors.Join(sleep(ctx, shimPause), d.deleteTask(ctx, c, id)); err != nil {
			return 0, err
		}
		t, err = newTask()
	}
	if err != nil {
		return 0, err
	}
	// The note goes first: if we die after Start, it says that the task ran.
	n := note{StartedAt: time.Now(), PID: int(t.Pid())}
	if err := d.notes.begin(s.Task, n); err != nil {
		return 0, errors.Join(err, d.deleteTask(context.WithoutCancel(ctx), c, id))
	}
	if err := t.Start(ctx); err != nil {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return 0, errors.Join(err, d.deleteTask(rctx, c, id), d.notes.forget(s.Task))
	}
	return n.PID, nil
}

// A shim that serves several containers (Config.Grouped) ends with the last of
// them. A container made at that moment is refused by the one that ends, and
// taken by the one that replaces it.
const (
	shimTries = 5
	shimPause = 50 * time.Millisecond
)

// shimEnded knows the two ways in which that shows: ttrpc's ErrClosed, if the
// shim was reached, and a socket at which nobody listens any more. Nothing but
// their words passes through the server.
func shimEnded(err error) bool {
	if err == nil {
		return false
	}
	text := err.Error()
	return strings.Contains(text, "ttrpc: closed") ||
		strings.Contains(text, "failed to create TTRPC connection") && strings.Contains(text, "connection refused")
}

// startError recognises a command that does not exist: that is the request's
// fault and repeating it cannot help.
func startError(err error) error {
	if err == nil {
		return nil
	}
	for _, text := range []string{"executable file not found", "no such file or directory", "permission denied", "is a directory", "exec format error"} {
		if strings.Contains(err.Error(), "exec:") && strings.Contains(err.Error(), text) {
			return fmt.Errorf("%w: %w", err, weft.ErrInvalid)
		}
	}
	return err
}

// Wait implements runtime.Runtime.
func (d *Driver) Wait(ctx context.Context, task weft.ID) (runtime.Exit, error) {
	for {
		exit, again, err := d.waitOnce(ctx, task)
		if !again {
			return exit, err
		}
		// The server went away or the task moved on: look again.
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return runtime.Exit{}, fmt.Errorf("wait for task %s: %w", task, err)
		}
		if err := d.Ready(ctx); err != nil {
			return runtime.Exit{}, fmt.Errorf("wait for task %s: %w", task, err)
		}
	}
}

func (d *Driver) waitOnce(ctx context.Context, task weft.ID) (exit runtime.Exit, again bool, err error) {
	open, leave := d.joinGate(task)
	defer leave()
	cctx, c, err := d.conn(ctx)
	if err != nil {
		return exit, d.current().err == nil, err
	}
	info, err := c.ContainerService().Get(cctx, string(task))
	if err != nil {
		return exit, transient(err), wrap(err, "wait for task %s", task)
	}
	st, err := d.status(cctx, c, info)
	if err != nil {
		return exit, transient(err), wrap(err, "wait for task %s", task)
	}
	switch st.State {
	case runtime.Exited, runtime.Lost:
		return st.Exit, false, nil
	case runtime.Created:
		select {
		case <-open:
			return exit, true, nil
		case <-ctx.Done():
			return exit, false, fmt.Errorf("wait for task %s: %w", task, ctx.Err())
		}
	}
	if _, err := c.TaskService().Wait(cctx, &tasks.WaitRequest{ContainerID: string(task)}); err != nil && ctx.Err() != nil {
		return exit, false, fmt.Errorf("wait for task %s: %w", task, ctx.Err())
	}
	return exit, true, nil // whatever it said: status tells the truth
}

func transient(err error) bool {
	return errdefs.IsUnavailable(err) || errors.Is(err, weft.ErrUnavailable)
}

// status joins containerd's record, its task and our note.
func (d *Driver) status(ctx context.Context, c *client.Client, info containers.Container) (runtime.Status, error) {
	r, err := c.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: info.ID})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return runtime.Status{}, err
	}
	if err != nil {
		return d.statusOf(info, nil)
	}
	return d.statusOf(info, r.Process)
}

// statusOf is the state machine's reading of three sources: p is nil when
// containerd has no task.
func (d *Driver) statusOf(info containers.Container, p *tasktypes.Process) (runtime.Status, error) {
	spec, err := decodeSpec(info.Extensions[labelSpec])
	if err != nil {
		return runtime.Status{}, fmt.Errorf("container %s: %w", info.ID, err)
	}
	st := runtime.Status{Task: weft.ID(info.ID), CreatedAt: info.CreatedAt, Spec: spec, LogPath: runtime.LogFile(d.logDir(weft.ID(info.ID)))}
	n, noted := d.notes.read(st.Task)
	st.StartedAt, st.PID = n.StartedAt, n.PID
	switch {
	case noted && n.Exit != nil:
		st.State, st.PID = runtime.Exited, 0
		st.Exit = n.Exit.known()
	case p != nil && p.Status == tasktypes.Status_STOPPED:
		st.State, st.PID = runtime.Exited, 0
		st.Exit = runtime.Exit{Code: int(p.ExitStatus), Known: true, At: exitTime(p.ExitedAt)}
		if !noted { // created, never started, and its runc init died
			st.State, st.Exit = runtime.Lost, runtime.Exit{Code: -1}
			break
		}
		st.Exit.OOM = oomKilled(spec.Cgroup)
		exit, err := d.notes.end(st.Task, exitNote{Code: st.Exit.Code, OOM: st.Exit.OOM, At: st.Exit.At})
		if err != nil {
			return runtime.Status{}, err
		}
		st.Exit = exit.known()
	case p != nil && noted && p.Status != tasktypes.Status_CREATED:
		st.State, st.PID = runtime.Running, int(p.Pid)
	case noted && p == nil, info.Labels[labelBoot] != d.bootID:
		st.State, st.PID, st.Exit = runtime.Lost, 0, runtime.Exit{Code: -1}
	default:
		st.State, st.PID = runtime.Created, 0
	}
	return st, nil
}

func exitTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Now()
	}
	return t.AsTime()
}

// List implements runtime.Runtime.
func (d *Driver) List(ctx context.Context) ([]runtime.Status, error) {
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return nil, err
	}
	// Records first: a task that ends in between is still listed.
	records, err := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelNode, string(d.cfg.Node)))
	if err != nil {
		return nil, wrap(err, "list containers")
	}
	r, err := c.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, wrap(errgrpc.ToNative(err), "list containers")
	}
	procs := make(map[string]*tasktypes.Process, len(r.Tasks))
	for _, p := range r.Tasks {
		procs[p.ID] = p // the server names the container here
	}
	all := make([]runtime.Status, 0, len(records))
	for _, rec := range records {
		p := procs[rec.ID]
		if p == nil { // created since the list, or skipped by it while it was changing
			st, err := d.status(ctx, c, rec)
			if err != nil {
				return nil, wrap(err, "list containers")
			}
			all = append(all, st)
			continue
		}
		st, err := d.statusOf(rec, p)
		if err != nil {
			return nil, wrap(err, "list containers")
		}
		all = append(all, st)
	}
	return all, nil
}

// Signal implements runtime.Runtime. A container that does not run:
// weft.ErrConflict.
func (d *Driver) Signal(ctx context.Context, task weft.ID, name string) error {
	sig, err := parseSignal(name)
	if err != nil {
		return err
	}
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return err
	}
	if _, err := c.ContainerService().Get(ctx, string(task)); err != nil {
		return wrap(err, "signal task %s", task)
	}
	err = d.kill(ctx, c, task, sig, false)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("signal task %s: its container is not running: %w", task, weft.ErrConflict)
	}
	return wrap(err, "signal task %s", task)
}

func parseSignal(name string) (syscall.Signal, error) {
	sig, err := signal.ParseSignal(name)
	if err != nil {
		return 0, fmt.Errorf("signal %q is unknown: %w", name, weft.ErrInvalid)
	}
	return sig, nil
}

func (d *Driver) kill(ctx context.Context, c *client.Client, task weft.ID, sig syscall.Signal, all bool) error {
	_, err := c.TaskService().Kill(ctx, &tasks.KillRequest{ContainerID: string(task), Signal: uint32(sig), All: all})
	return errgrpc.ToNative(err)
}

// Stop implements runtime.Runtime. A container that never started has nothing
// to stop: weft.ErrConflict.
func (d *Driver) Stop(ctx context.Context, task weft.ID, grace time.Duration) (runtime.Exit, error) {
	cctx, c, err := d.conn(ctx)
	if err != nil {
		return runtime.Exit{}, err
	}
	info, err := c.ContainerService().Get(cctx, string(task))
	if err != nil {
		return runtime.Exit{}, wrap(err, "stop task %s", task)
	}
	st, err := d.status(cctx, c, info)
	if err != nil {
		return runtime.Exit{}, wrap(err, "stop task %s", task)
	}
	switch st.State {
	case runtime.Exited, runtime.Lost:
		return st.Exit, nil
	case runtime.Created:
		return runtime.Exit{}, fmt.Errorf("stop task %s: its container has not been started: %w", task, weft.ErrConflict)
	}
	sig, err := parseSignal(info.Labels[labelSignal])
	if err != nil {
		return runtime.Exit{}, fmt.Errorf("stop task %s: %w", task, err)
	}
	if err := d.kill(cctx, c, task, sig, false); err != nil && !errdefs.IsNotFound(err) {
		return runtime.Exit{}, wrap(err, "stop task %s", task)
	}
	gctx, cancel := context.WithTimeout(ctx, grace)
	exit, err := d.Wait(gctx, task)
	cancel()
	if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return exit, err
	}
	if cctx, c, err = d.conn(ctx); err != nil {
		return runtime.Exit{}, err
	}
	if err := d.kill(cctx, c, task, syscall.SIGKILL, true); err != nil && !errdefs.IsNotFound(err) {
		return runtime.Exit{}, wrap(err, "kill task %s", task)
	}
	return d.Wait(ctx, task)
}

// Remove implements runtime.Runtime.
func (d *Driver) Remove(ctx context.Context, task weft.ID) error {
	if err := checkTask(task); err != nil {
		return err
	}
	unlock, err := d.lock(ctx, task)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return err
	}
	if err := d.remove(ctx, c, task); err != nil {
		return wrap(err, "remove container of task %s", task)
	}
	d.openGate(task)
	return nil
}

func (d *Driver) remove(ctx context.Context, c *client.Client, task weft.ID) error {
	id := string(task)
	if err := d.deleteTask(ctx, c, id); err != nil {
		return err
	}
	rec, err := c.ContainerService().Get(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	cgroup := weft.CgroupPath(d.cfg.Node, task)
	if err == nil {
		if s, err := decodeSpec(rec.Extensions[labelSpec]); err == nil && s.Cgroup != "" {
			cgroup = s.Cgroup
		}
		if err := c.ContainerService().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if err := c.SnapshotService(snapshotter).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := c.SandboxStore().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := removeCgroups(ctx, cgroup); err != nil {
		return err
	}
	if err := errors.Join(d.notes.forget(task), os.RemoveAll(d.dataDir("tasks", id, "volumes"))); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// deleteTask kills what runs and makes containerd forget the task.
func (d *Driver) deleteTask(ctx context.Context, c *client.Client, id string) error {
	r, err := c.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	if r.Process.Status != tasktypes.Status_STOPPED {
		// Ours to wait for: Delete refuses a task that still runs.
		if err := d.kill(ctx, c, weft.ID(id), syscall.SIGKILL, true); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if _, err := c.TaskService().Wait(ctx, &tasks.WaitRequest{ContainerID: id}); err != nil {
			if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	_, err = c.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// checkTask keeps a task's id usable as a file name and a containerd id.
func checkTask(task weft.ID) error {
	s := string(task)
	if s == "" || len(s) > 64 || s != filepath.Base(s) || strings.ContainsFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-'
	}) || s[0] == '-' {
		return fmt.Errorf("task id %q is not usable as a container's name: %w", s, weft.ErrInvalid)
	}
	return nil
}
