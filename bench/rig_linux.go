package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/lab"
)

// Our own choices.
const (
	// labName begins the names of all labs that bench makes.
	labName = "bench"
	// hosts of a lab: the README's story has three.
	hosts = 3
	// commandGrace is what a weft command gets to tidy up after Ctrl-C.
	commandGrace = 20 * time.Second
	// pollEvery is how often a state is asked for that nobody announces. It
	// is the resolution of the times that end with such a state.
	pollEvery = 10 * time.Millisecond
)

// rig drives one build of weft.
type rig struct {
	weft string // absolute path of the binary
	log  io.Writer
	// cases and metrics are the parts that were chosen, of a benchmark with choices.
	cases, metrics []string
}

func newRig(o options) *rig {
	return &rig{weft: o.weft, log: o.stderr, cases: o.cases, metrics: o.metrics}
}

// cmd runs `weft ARGS` and gives its standard output. Ctrl-C at the terminal
// does not reach it by itself: when ctx ends it gets SIGINT and a grace, so
// that it never leaves half a lab behind.
func (r *rig) cmd(ctx context.Context, args ...string) (string, error) {
	c := exec.CommandContext(ctx, r.weft, args...)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGINT) }
	c.WaitDelay = commandGrace
	if err := c.Run(); err != nil {
		words := strings.TrimSpace(stdout.String() + "\n" + stderr.String())
		return stdout.String(), fmt.Errorf("weft %s: %w:\n%s", strings.Join(args, " "), err, lastLines(words, 20))
	}
	return stdout.String(), nil
}

// lastLines keeps an error readable.
func lastLines(s string, most int) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-most):], "\n")
}

// field is one lab of the rig.
type field struct {
	*rig
	name string
	lab  *lab.Lab
}

// field names a lab; it does not make it. A lab of that name must not be
// there: it is someone else's, or the rest of a run that was killed.
func (r *rig) field(suffix string) (*field, error) {
	f := &field{rig: r, name: labName + suffix}
	cfg := lab.DefaultConfig()
	cfg.Name, cfg.Binary, cfg.Cluster, cfg.Log = f.name, r.weft, noCluster{}, slog.New(slog.NewTextHandler(r.log, nil))
	var err error
	if f.lab, err = lab.New(cfg); err != nil {
		return nil, err
	}
	switch _, err := f.lab.Hosts(); {
	case err == nil:
		return nil, fmt.Errorf("lab %s exists: remove it with 'weft lab down --name %s': %w", f.name, f.name, weft.ErrConflict)
	case !errors.Is(err, weft.ErrNotFound):
		return nil, err
	}
	return f, nil
}

// up makes the lab with a cluster of n hosts, one of them a manager.
func (f *field) up(ctx context.Context, n int) error {
	_, err := f.cmd(ctx, "lab", "up", "--name", f.name, "--hosts", strconv.Itoa(n))
	return err
}

// down removes the lab; one that is not there is no error.
func (f *field) down(ctx context.Context) error {
	_, err := f.cmd(ctx, "lab", "down", "--name", f.name)
	return err
}

// guarded calls g, and removes the lab if g fails.
func (f *field) guarded(ctx context.Context, g func() error) error {
	if err := g(); err != nil {
		return errors.Join(err, closeBounded(ctx, f.down))
	}
	return nil
}

// once calls build, which makes the lab, then g, and removes the lab whatever
// happened.
func (f *field) once(ctx context.Context, build, g func() error) error {
	err := build()
	if err == nil {
		err = g()
	}
	return errors.Join(err, closeBounded(ctx, f.down))
}

// host n, from 1.
func (f *field) host(n int) (lab.Host, error) { return f.lab.Host("h" + strconv.Itoa(n)) }

// on is a weft command line that talks to the daemon of host n.
func (f *field) on(n int, args ...string) ([]string, error) {
	h, err := f.host(n)
	if err != nil {
		return nil, err
	}
	return append([]string{"-H", "unix://" + h.Paths.Socket}, args...), nil
}

// api is a client of the daemon of host 1, the manager. The caller closes it.
func (f *field) api() (*client.Client, error) {
	h, err := f.host(1)
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.WithHost("unix://" + h.Paths.Socket))
	if err != nil {
		return nil, fmt.Errorf("make API client of %s: %w", h.Paths.Socket, err)
	}
	return c, nil
}

// awaitReady waits until n nodes are ready.
func (f *field) awaitReady(ctx context.Context, n int) error {
	c, err := f.api()
	if err != nil {
		return err
	}
	defer c.Close()
	return await(ctx, func() error {
		list, err := c.NodeList(ctx, client.NodeListOptions{})
		if err != nil {
			return err
		}
		ready := 0
		for _, node := range list.Items {
			if node.Status.State == swarm.NodeStateReady {
				ready++
			}
		}
		if ready != n {
			return fmt.Errorf("%d of %d nodes are ready", ready, n)
		}
		return nil
	})
}

// awaitContainers waits until every host lists n containers. A daemon answers
// that once its container supervisor does.
func (f *field) awaitContainers(ctx context.Context, n int) error {
	list, err := f.lab.Hosts()
	if err != nil {
		return err
	}
	for _, h := range list {
		c, err := client.New(client.WithHost("unix://" + h.Paths.Socket))
		if err != nil {
			return fmt.Errorf("make API client of %s: %w", h.Name, err)
		}
		err = await(ctx, func() error {
			got, err := c.ContainerList(ctx, client.ContainerListOptions{})
			if err == nil && len(got.Items) != n {
				err = fmt.Errorf("%d containers are on %s, %d expected", len(got.Items), h.Name, n)
			}
			return err
		})
		if err := errors.Join(err, c.Close()); err != nil {
			return err
		}
	}
	return nil
}

// running are the tasks of a service that run and are meant to: task id to
// host name.
func (f *field) running(ctx context.Context, c *client.Client, service string) (map[string]string, error) {
	nodes, err := c.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	names := map[string]string{}
	for _, n := range nodes.Items {
		names[n.ID] = n.Description.Hostname
	}
	tasks, err := c.TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", service)})
	if err != nil {
		return nil, fmt.Errorf("list tasks of %s: %w", service, err)
	}
	out := map[string]string{}
	for _, t := range tasks.Items {
		if t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning {
			out[t.ID] = names[t.NodeID]
		}
	}
	return out, nil
}

// await repeats g until it succeeds, and says why it did not when ctx ends.
func await(ctx context.Context, g func() error) error {
	for {
		err := g()
		if err == nil {
			return nil
		}
		if waitErr := pause(ctx, pollEvery); waitErr != nil {
			return fmt.Errorf("%w; last: %w", waitErr, err)
		}
	}
}

// noCluster makes a lab leave its daemons alone: it says of every daemon that
// answers that it is a member. So package lab builds the same hosts, links and
// daemons as for a cluster, and what a cluster adds can be measured against
// them.
type noCluster struct{}

var _ lab.Cluster = noCluster{}

func (noCluster) Ping(ctx context.Context, socket string) error {
	c, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		return fmt.Errorf("make API client of %s: %w", socket, err)
	}
	defer c.Close()
	_, err = c.Ping(ctx, client.PingOptions{})
	return err
}

func (noCluster) Info(_ context.Context, socket string) (lab.NodeInfo, error) {
	// No node has this id. Cleaning up removes the cgroup of that name,
	// which does not exist.
	name := filepath.Base(filepath.Dir(socket))
	id := weft.ID("bench" + strings.Repeat("0", 20-len(name)) + name)
	return lab.NodeInfo{Node: id, State: weft.LocalActive, Manager: true}, nil
}

func (noCluster) Init(context.Context, string, netip.Addr) error { return weft.ErrUnsupported }
func (noCluster) Join(context.Context, string, lab.Join) error   { return weft.ErrUnsupported }

func (noCluster) Tokens(context.Context, string) (weft.JoinTokens, error) {
	return weft.JoinTokens{}, weft.ErrUnsupported
}
