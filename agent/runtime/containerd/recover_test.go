package containerd_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
)

// serverPID is the pid of the host's containerd.
func (h *host) serverPID(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(h.cfg.ExecRoot + "/containerd/pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// killServer kills the server and waits until another one runs.
func (h *host) killServer(ctx context.Context, t *testing.T) {
	t.Helper()
	old := h.serverPID(t)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for h.serverPID(t) == old {
		tick(ctx, t)
	}
	if err := h.Ready(ctx); err != nil {
		t.Fatal(err)
	}
}

func tick(ctx context.Context, t *testing.T) {
	t.Helper()
	timer := time.NewTimer(5 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	case <-timer.C:
	}
}

func (h *host) start(ctx context.Context, t *testing.T, args ...string) (weft.ID, int) {
	t.Helper()
	id := weft.NewID()
	if err := h.Create(ctx, runtime.Spec{Task: id, Image: "busybox", Args: args}); err != nil {
		t.Fatal(err)
	}
	pid, err := h.Start(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return id, pid
}

func (h *host) state(ctx context.Context, t *testing.T, id weft.ID) runtime.Status {
	t.Helper()
	all, err := h.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Task == id {
			return s
		}
	}
	t.Fatalf("task %s is not listed", id)
	return runtime.Status{}
}

const sleeper = `trap 'exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done`

func TestServerKilled(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	live, pid := h.start(ctx, t, "sh", "-c", sleeper)
	runtimetest.AwaitLine(ctx, t, h, live, "ready\n")
	fifo := t.TempDir() + "/go"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	dying := weft.NewID() // ends while the server is away, with a line in the log
	if err := h.Create(ctx, runtime.Spec{
		Task: dying, Image: "busybox", Args: []string{"sh", "-c", "echo ready; read x </go; echo late; exit 42"},
		Files: map[string]string{"/go": fifo},
	}); err != nil {
		t.Fatal(err)
	}
	dyingPID, err := h.Start(ctx, dying)
	if err != nil {
		t.Fatal(err)
	}
	runtimetest.AwaitLine(ctx, t, h, dying, "ready\n")
	first := h.Driver
	waited := make(chan runtime.Exit, 1)
	go func() {
		exit, err := first.Wait(ctx, live)
		if err == nil {
			t.Errorf("wait went on after the daemon's end: %+v", exit)
		}
		waited <- exit
	}()

	h.stop(t) // the supervisor ends, so the server stays away
	if err := syscall.Kill(h.serverPID(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit := <-waited; exit.Known { // Run has ended: Wait must say so, not invent an exit
		t.Errorf("wait returned exit %+v", exit)
	}
	if err := os.WriteFile(fifo, []byte("x\n"), 0); err != nil {
		t.Fatal(err)
	}
	for {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(dyingPID) + "/stat")
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			break
		}
		tick(ctx, t)
	}
	h.run(t)
	if st := h.state(ctx, t, live); st.State != runtime.Running || st.PID != pid {
		t.Errorf("running container came back as %+v", st)
	}
	if st := h.state(ctx, t, dying); st.State != runtime.Exited || st.Exit.Code != 42 || !st.Exit.Known {
		t.Errorf("container that ended meanwhile came back as %+v", st)
	}
	runtimetest.AwaitLine(ctx, t, h, dying, "late\n")
	if exit, err := h.Stop(ctx, live, time.Minute); err != nil || exit.Code != 7 {
		t.Errorf("stop after adoption: %+v, %v", exit, err)
	}
}

func TestServerRestartedBySupervisor(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, pid := h.start(ctx, t, "sh", "-c", sleeper)
	runtimetest.AwaitLine(ctx, t, h, id, "ready\n")
	got := make(chan error, 1)
	go func() {
		exit, err := h.Wait(ctx, id)
		if err == nil && (exit.Code != 7 || !exit.Known) {
			err = errors.New("wrong exit")
		}
		got <- err
	}()
	for range 2 {
		h.killServer(ctx, t)
		if st := h.state(ctx, t, id); st.State != runtime.Running || st.PID != pid {
			t.Fatalf("after the server's death: %+v", st)
		}
	}
	if err := h.Signal(ctx, id, "SIGTERM"); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("wait across two deaths of the server: %v", err)
	}
}

func TestDaemonRestartAdoptsServer(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, pid := h.start(ctx, t, "sh", "-c", sleeper)
	created := weft.NewID()
	if err := h.Create(ctx, runtime.Spec{Task: created, Image: "busybox", Args: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	server := h.serverPID(t)
	h.stop(t)
	h.run(t)
	if now := h.serverPID(t); now != server {
		t.Errorf("server %d was not adopted, %d runs", server, now)
	}
	if st := h.state(ctx, t, id); st.State != runtime.Running || st.PID != pid || st.StartedAt.IsZero() {
		t.Errorf("running container came back as %+v", st)
	}
	if st := h.state(ctx, t, created); st.State != runtime.Created {
		t.Errorf("created container came back as %+v", st)
	}
	h.killServer(ctx, t) // an adopted server is supervised as well
}

func TestShimKilled(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, _ := h.start(ctx, t, "sh", "-c", sleeper)
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(b, []byte("containerd-shim-runc-v2\x00")) || !bytes.Contains(b, []byte(id)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	exit, err := h.Wait(ctx, id)
	if err != nil || exit.Known {
		t.Errorf("wait: %+v, %v; want an unknown exit", exit, err)
	}
	if st := h.state(ctx, t, id); st.State != runtime.Lost {
		t.Errorf("state %+v, want lost", st)
	}
	if _, err := h.Start(ctx, id); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("start of a lost container: %v", err)
	}
	if err := h.Remove(ctx, id); err != nil {
		t.Errorf("remove: %v", err)
	}
}

func TestShutdownWithDeadServer(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	h.start(t.Context(), t, "sh", "-c", "trap '' TERM; while :; do sleep 1000; done")
	server := h.serverPID(t)
	h.stop(t)
	if err := syscall.Kill(server, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// The clean-up of newHost shuts down and finds every trace.
}

// TestCreateAfterAnUnfinishedOne: a daemon that is killed while it creates a
// container leaves a snapshot and no record.
func TestCreateAfterAnUnfinishedOne(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := runtime.Spec{Task: weft.NewID(), Image: "busybox", Args: []string{"sh", "-c", "exit 3"}}
	if err := h.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(h.cfg.ExecRoot + "/containerd/c.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.ContainerService().Delete(namespaces.WithNamespace(ctx, "weft"), string(s.Task)); err != nil {
		t.Fatal(err)
	}
	if err := h.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Start(ctx, s.Task); err != nil {
		t.Fatal(err)
	}
	if exit, err := h.Wait(ctx, s.Task); err != nil || exit.Code != 3 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if err := h.Remove(ctx, s.Task); err != nil {
		t.Error(err)
	}
}
