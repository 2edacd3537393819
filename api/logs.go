package api

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
)

// logTime is RFC 3339 with all nine digits, so that lines align and sort.
const logTime = "2006-01-02T15:04:05.000000000Z07:00"

// logRequest is the query of a logs call.
type logRequest struct {
	weft.LogOptions
	timestamps, details bool
}

func (c *call) logRequest() (logRequest, error) {
	r := logRequest{
		LogOptions: weft.LogOptions{
			Stdout: c.bool("stdout"), Stderr: c.bool("stderr"), Follow: c.bool("follow"), Tail: -1,
		},
		timestamps: c.bool("timestamps"), details: c.bool("details"),
	}
	if !r.Stdout && !r.Stderr {
		return r, invalidf("Bad parameters: you must choose at least one stream")
	}
	if tail := c.query.Get("tail"); tail != "" && tail != "all" {
		n, err := strconv.Atoi(tail)
		if err != nil {
			return r, invalidf("tail: %q must be a number of lines or all", tail)
		}
		if n >= 0 { // Docker takes a negative number as all
			r.Tail = n
		}
	}
	var err error
	if r.Since, err = queryTime("since", c.query.Get("since")); err != nil {
		return r, err
	}
	r.Until, err = queryTime("until", c.query.Get("until"))
	return r, err
}

// queryTime reads SECONDS[.NANOSECONDS] since 1970, or RFC 3339; "" and "0"
// are no bound.
func queryTime(name, text string) (time.Time, error) {
	if text == "" || text == "0" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
		return t, nil
	}
	whole, frac, _ := strings.Cut(text, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	var nsec int64
	if err == nil && frac != "" {
		if len(frac) > 9 {
			frac = frac[:9]
		}
		nsec, err = strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64)
	}
	if err != nil || nsec < 0 {
		return time.Time{}, invalidf("%s: %q must be seconds since 1970 or an RFC 3339 time", name, text)
	}
	return time.Unix(sec, nsec), nil
}

// format is one line as it goes out: [time ][details ]line.
func (r *logRequest) format(rec weft.LogRecord, details string) []byte {
	var b []byte
	if r.timestamps {
		b = append(rec.Time.UTC().AppendFormat(b, logTime), ' ')
	}
	if r.details {
		b = append(append(b, details...), ' ')
	}
	return append(b, rec.Line...)
}

func (s *Server) containerLogs(c *call) error {
	r, err := c.logRequest()
	if err != nil {
		return err
	}
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	f, err := startStream(c.w, streamType(ct.Spec.TTY, c.version))
	if err != nil {
		return err
	}
	stdout, stderr := outputs(f, ct.Spec.TTY)
	err = s.cfg.Containers.ContainerLogs(c.Context(), ct.Task, r.LogOptions, func(rec weft.LogRecord) error {
		// A container's own log has no details: Docker prints the space.
		return writeRecord(stdout, stderr, rec, r.format(rec, ""))
	})
	return s.endOfLogs(c.Context(), stderr, err)
}

func writeRecord(stdout, stderr io.Writer, rec weft.LogRecord, line []byte) error {
	w := stdout
	if rec.Stderr {
		w = stderr
	}
	_, err := w.Write(line)
	return err
}

// endOfLogs tells the reader why a log stopped early: the status is long sent.
// A client that has gone away is no error.
func (s *Server) endOfLogs(ctx context.Context, stderr io.Writer, err error) error {
	if err == nil || ctx.Err() != nil {
		return nil
	}
	_, werr := fmt.Fprintf(stderr, "read logs: %s\n", messageOf(err))
	if werr != nil {
		return nil // gone too
	}
	return err
}

func (s *Server) serviceLogs(c *call) error {
	r, err := c.logRequest()
	if err != nil {
		return err
	}
	v, err := s.cfg.Services.Service(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	f, err := startStream(c.w, streamType(false, c.version)) // no service has a terminal
	if err != nil {
		return err
	}
	l := &clusterLogs{s: s, r: r, tasks: weft.TaskFilter{Services: []weft.ID{v.ID}}, nodes: map[weft.ID]weft.Task{}}
	l.stdout, l.stderr = outputs(f, false)
	return s.endOfLogs(c.Context(), l.stderr, l.run(c.Context()))
}

func (s *Server) taskLogs(c *call) error {
	r, err := c.logRequest()
	if err != nil {
		return err
	}
	t, _, err := s.task(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	f, err := startStream(c.w, streamType(false, c.version))
	if err != nil {
		return err
	}
	l := &clusterLogs{s: s, r: r, nodes: map[weft.ID]weft.Task{t.ID: t}}
	l.stdout, l.stderr = outputs(f, false)
	return s.endOfLogs(c.Context(), l.stderr, l.read(c.Context(), []weft.ID{t.ID}))
}

// clusterLogs merges the logs of tasks, wherever they run.
type clusterLogs struct {
	s              *Server
	r              logRequest
	tasks          weft.TaskFilter
	stdout, stderr io.Writer // safe for concurrent use

	mu    sync.Mutex // guards: nodes
	nodes map[weft.ID]weft.Task
}

// newTaskEvery is how often a followed service is asked for tasks that were
// started meanwhile. A second is what a person notices; each look costs one
// read of the task list.
const newTaskEvery = time.Second

// run reads the logs of a service's tasks; following, also of those that
// replace them later.
func (l *clusterLogs) run(ctx context.Context) error {
	fresh, err := l.newTasks(ctx)
	if err != nil {
		return err
	}
	if !l.r.Follow {
		return l.read(ctx, fresh)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		tick := time.NewTicker(newTaskEvery)
		defer tick.Stop()
		for first := true; ; first = false {
			if ids := fresh; len(ids) > 0 {
				isFirst := first
				g.Go(func() error { return l.follow(ctx, ids, isFirst) })
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
			if fresh, err = l.newTasks(ctx); err != nil {
				return err
			}
		}
	})
	return g.Wait()
}

// follow reads some tasks to their end. Those that came later are shown whole.
func (l *clusterLogs) follow(ctx context.Context, ids []weft.ID, isFirst bool) error {
	if isFirst {
		return l.read(ctx, ids)
	}
	later := &clusterLogs{s: l.s, r: l.r, stdout: l.stdout, stderr: l.stderr, nodes: map[weft.ID]weft.Task{}}
	later.r.Tail = -1
	l.mu.Lock()
	for _, id := range ids {
		later.nodes[id] = l.nodes[id]
	}
	l.mu.Unlock()
	return later.read(ctx, ids)
}

// newTasks lists the tasks not seen before that have, or may have, a log.
func (l *clusterLogs) newTasks(ctx context.Context) ([]weft.ID, error) {
	list, err := l.s.cfg.Tasks.Tasks(ctx, l.tasks)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var ids []weft.ID
	for _, t := range list.Tasks {
		if _, isSeen := l.nodes[t.ID]; !isSeen && t.Node != "" && t.Status.State >= weft.TaskStarting {
			l.nodes[t.ID] = t
			ids = append(ids, t.ID)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (l *clusterLogs) read(ctx context.Context, ids []weft.ID) error {
	if len(ids) == 0 {
		return nil
	}
	return l.s.cfg.Tasks.TaskLogs(ctx, ids, l.r.LogOptions, func(rec weft.LogRecord) error {
		return writeRecord(l.stdout, l.stderr, rec, l.r.format(rec, l.details(rec)))
	})
}

// details are the attributes that the docker command turns into the name of
// the task before each line.
func (l *clusterLogs) details(rec weft.LogRecord) string {
	l.mu.Lock()
	t := l.nodes[rec.Task]
	l.mu.Unlock()
	node := rec.Node
	if node == "" {
		node = t.Node
	}
	const prefix = "com.docker.swarm."
	return fmt.Sprintf("%snode.id=%s,%sservice.id=%s,%stask.id=%s", prefix, node, prefix, t.Service, prefix, rec.Task)
}
