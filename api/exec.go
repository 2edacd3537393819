package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/weftnet/weft"
)

// execTable holds the processes that clients have created, until some time
// after their end: the docker command asks for the exit code afterwards.
type execTable struct {
	mu   sync.Mutex // guards: byID and the entries in it
	byID map[string]*execEntry
}

// execEntry is one exec: created, then started once, then ended.
type execEntry struct {
	spec      container.ExecCreateRequest
	id        string
	container string
	task      weft.ID
	created   time.Time

	isStarted, isEnded bool
	pid, exitCode      int
	ended              time.Time
	// resize is made at creation, has room for one size, and is never
	// closed: the reader ends with the process.
	resize chan TermSize
}

// How long entries stay. An entry is small; the bounds only stop a client that
// creates and never starts.
const (
	execKept    = 10 * time.Minute
	maxExecs    = 4096
	exitNoStart = 126 // as a shell: found, cannot be run
	exitNoFile  = 127 // as a shell: not found
)

func (t *execTable) add(e *execEntry) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, old := range t.byID {
		stale := old.isEnded && e.created.Sub(old.ended) > execKept ||
			!old.isStarted && e.created.Sub(old.created) > execKept
		if stale {
			delete(t.byID, id)
		}
	}
	if len(t.byID) >= maxExecs {
		return fmt.Errorf("%d execs exist already on this node: wait until some are forgotten (%s after their end): %w", maxExecs, execKept, weft.ErrUnavailable)
	}
	t.byID[e.id] = e
	return nil
}

// get returns a copy of the entry.
func (t *execTable) get(id string) (execEntry, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byID[id]
	if e == nil {
		return execEntry{}, notFoundf("No such exec instance: %s", id)
	}
	return *e, nil
}

// update changes an entry under the lock.
func (t *execTable) update(id string, f func(*execEntry) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byID[id]
	if e == nil {
		return notFoundf("No such exec instance: %s", id)
	}
	return f(e)
}

// of lists the running execs of a container.
func (t *execTable) of(containerID string) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []string
	for id, e := range t.byID {
		if e.container == containerID && e.isStarted && !e.isEnded {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func newExecID() string {
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(fmt.Sprintf("read random bytes: %v", err)) // the kernel's source cannot fail after boot
	}
	return hex.EncodeToString(b[:])
}

func (s *Server) execCreate(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	// Detach is sent here by older clients; the one of start counts.
	var body container.ExecCreateRequest
	if err := decode(c, &body, "Detach"); err != nil {
		return err
	}
	if len(body.Cmd) == 0 || body.Cmd[0] == "" {
		return invalidf("No exec command specified")
	}
	if ct.State.Status != running {
		return fmt.Errorf("container %s is not running: %w", ct.ID, weft.ErrConflict)
	}
	e := &execEntry{
		spec: body, id: newExecID(), container: ct.ID, task: ct.Task, created: time.Now(),
		resize: make(chan TermSize, 1),
	}
	if size := body.ConsoleSize; size != nil {
		e.resize <- TermSize{Height: uint16(size[0]), Width: uint16(size[1])}
	}
	if err := s.execs.add(e); err != nil {
		return err
	}
	writeJSON(c.w, http.StatusCreated, container.ExecCreateResponse{ID: e.id})
	return nil
}

func (s *Server) execStart(c *call) error {
	var body container.ExecStartRequest
	if err := decode(c, &body); err != nil {
		return err
	}
	id := c.vars["id"]
	e, err := s.execs.get(id)
	if err != nil {
		return err
	}
	if body.Tty != e.spec.Tty && !body.Detach {
		return invalidf("Tty: exec %s was created with Tty %t", id[:12], e.spec.Tty)
	}
	err = s.execs.update(id, func(e *execEntry) error {
		if e.isStarted {
			return fmt.Errorf("exec %s has already been started: %w", id, weft.ErrConflict)
		}
		e.isStarted = true
		return nil
	})
	if err != nil {
		return err
	}
	if body.Detach {
		return s.execDetached(c, e)
	}
	h, err := hijack(c, streamType(e.spec.Tty, c.version))
	if err != nil {
		s.endExec(e.id, exitNoStart)
		return err
	}
	defer func() { _ = h.conn.Close() }() // the end of the stream tells the client
	stdout, stderr := outputs(h.conn, e.spec.Tty)
	run := e.process()
	if e.spec.AttachStdout {
		run.Stdout = stdout
	}
	if e.spec.AttachStderr && !e.spec.Tty {
		run.Stderr = stderr
	}
	if e.spec.AttachStdin {
		run.Stdin = h.in
	}
	// Not the request's context: net/http ends that when a read of the
	// connection meets its end, which is only the end of stdin here. As with
	// Docker, a process outlives a client that goes away.
	if err := s.runExec(lifetime(c.Request), e, run); err != nil {
		// The status is sent: as Docker, the text goes where errors go.
		_, _ = fmt.Fprintf(stderr, "%s\r\n", messageOf(err))
		return fmt.Errorf("exec in container %s: %w", e.container[:12], err)
	}
	return nil
}

// process is the entry as the back end sees it, without streams.
func (e *execEntry) process() Exec {
	run := Exec{
		ID: e.id, Cmd: e.spec.Cmd, Env: e.spec.Env, Dir: e.spec.WorkingDir, User: e.spec.User,
		TTY: e.spec.Tty, Privileged: e.spec.Privileged,
	}
	if e.spec.Tty {
		run.Resize = e.resize
	}
	return run
}

// execDetached starts a process that nobody reads and answers once it runs.
// The process belongs to the server's life, not to the request's.
func (s *Server) execDetached(c *call, e execEntry) error {
	run := e.process()
	run.Stdout, run.Stderr = io.Discard, io.Discard
	started := make(chan struct{})
	var once sync.Once
	run.Started = func(int) { once.Do(func() { close(started) }) }
	ended := make(chan error, 1) // holds the one result
	ctx := lifetime(c.Request)
	s.running.Add(1) // Serve waits for it
	go func() {
		defer s.running.Done()
		ended <- s.runExec(ctx, e, run)
	}()
	select {
	case <-started:
		return c.status(http.StatusOK)
	case err := <-ended:
		if err != nil {
			return err
		}
		return c.status(http.StatusOK)
	}
}

// runExec runs to the end and records pid and exit code.
func (s *Server) runExec(ctx context.Context, e execEntry, run Exec) error {
	chained := run.Started
	run.Started = func(pid int) {
		_ = s.execs.update(e.id, func(e *execEntry) error { e.pid = pid; return nil }) // forgotten: nobody asks
		if chained != nil {
			chained(pid)
		}
	}
	code, err := s.cfg.Containers.Exec(ctx, e.task, run)
	if err != nil {
		code = exitNoStart
		if text := err.Error(); strings.Contains(text, "not found") || strings.Contains(text, "no such file") {
			code = exitNoFile
		}
	}
	s.endExec(e.id, code)
	if errors.Is(err, context.Canceled) {
		return nil // the daemon ends
	}
	return err
}

func (s *Server) endExec(id string, code int) {
	_ = s.execs.update(id, func(e *execEntry) error { // forgotten: nobody asks
		e.isEnded, e.exitCode, e.ended, e.pid = true, code, time.Now(), 0
		return nil
	})
}

func (s *Server) execResize(c *call) error {
	e, err := s.execs.get(c.vars["id"])
	if err != nil {
		return err
	}
	h, herr := strconv.ParseUint(c.query.Get("h"), 10, 16)
	w, werr := strconv.ParseUint(c.query.Get("w"), 10, 16)
	if herr != nil || werr != nil {
		return invalidf("h and w must be the height and width of the terminal in characters")
	}
	if !e.spec.Tty {
		return fmt.Errorf("exec %s has no terminal: %w", e.id[:12], weft.ErrConflict)
	}
	// Only the newest size matters: take out one that nobody has read.
	err = s.execs.update(e.id, func(e *execEntry) error {
		select {
		case <-e.resize:
		default:
		}
		e.resize <- TermSize{Width: uint16(w), Height: uint16(h)} // room: we are the only sender
		return nil
	})
	if err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

func (s *Server) execInspect(c *call) error {
	e, err := s.execs.get(c.vars["id"])
	if err != nil {
		return err
	}
	privileged := e.spec.Privileged
	out := container.ExecInspectResponse{
		ID: e.id, ContainerID: e.container, Running: e.isStarted && !e.isEnded, Pid: e.pid, CanRemove: e.isEnded,
		OpenStdin: e.spec.AttachStdin, OpenStdout: e.spec.AttachStdout, OpenStderr: e.spec.AttachStderr,
		ProcessConfig: &container.ExecProcessConfig{
			Tty: e.spec.Tty, Entrypoint: e.spec.Cmd[0], Arguments: e.spec.Cmd[1:], Privileged: &privileged, User: e.spec.User,
		},
	}
	if e.isEnded {
		out.ExitCode = &e.exitCode
	}
	return c.json(out)
}
