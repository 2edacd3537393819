package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Our own choices: 500 requests over 10 s are few enough not to load the
// machine and show a gap of 20 ms. A killed daemon is back within a second or
// two, as under systemd with Restart=always; one that is away for longer counts
// as a lost node, whose tasks are meant to be replaced.
const (
	flowGap      = 20 * time.Millisecond
	flowRequests = 500
	killAfter    = 2 * time.Second // from the first request
	startAfter   = 3 * time.Second
	// requestTimeout lets a retransmission or two (1 s, 2 s: RFC 6298
	// section 2) save a request; a person would wait as long.
	requestTimeout = 4 * time.Second
	failoverPort   = "18070"
	failoverName   = "web"
)

// The metrics of failover.
const (
	failed    = "failed of 500"
	medianLat = "median latency"
	p99Lat    = "99 % latency"
	replaced  = "tasks replaced"
	// From the loss of power until three tasks run on the other hosts, and
	// until the last request that failed has ended.
	noticed   = "until replaced"
	recovered = "until last failure"
)

// failoverBench: what requests see while parts are killed.
func failoverBench() benchmark {
	return benchmark{
		Name: "failover",
		About: "50 requests per second for 10 s to the published port of every host, new connections, while a daemon is killed (SIGKILL after 2 s, started again after 3 s) or a host loses power, " +
			"against the same requests undisturbed; when a host is off only the others are asked",
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			o := &outage{field: f}
			err = f.guarded(ctx, func() error {
				if err := f.up(ctx, hosts); err != nil {
					return err
				}
				return o.restore(ctx)
			})
			if err != nil {
				return plan{}, err
			}
			const worker, manager = 2, 1
			return plan{
				Metrics: []metric{
					{failed, "requests", false}, {replaced, "tasks", false},
					{medianLat, "ms", true}, {p99Lat, "ms", true},
					{noticed, "s", false}, {recovered, "s", false},
				},
				Baseline: variant{"undisturbed", o.undisturbed},
				Cases: []variant{
					{"worker's daemon killed", func(ctx context.Context) (sample, error) {
						return o.disturbed(ctx, func(ctx context.Context) error { return o.killDaemon(ctx, worker) })
					}},
					{"worker's containerd killed", func(ctx context.Context) (sample, error) {
						return o.disturbed(ctx, func(ctx context.Context) error { return o.killContainerd(ctx, worker) })
					}},
					{"manager's daemon killed", func(ctx context.Context) (sample, error) {
						return o.disturbed(ctx, func(ctx context.Context) error { return o.killDaemon(ctx, manager) })
					}},
					{"worker host off", r.hostOff},
				},
				Limits: []limit{
					{Case: "worker's daemon killed", Metric: failed, EveryRound: true}, {Case: "worker's containerd killed", Metric: failed, EveryRound: true}, {Case: "manager's daemon killed", Metric: failed, EveryRound: true},
					{Case: "worker's daemon killed", Metric: replaced, EveryRound: true}, {Case: "worker's containerd killed", Metric: replaced, EveryRound: true}, {Case: "manager's daemon killed", Metric: replaced, EveryRound: true},
				},
				Close: f.down,
			}, nil
		},
	}
}

// outage is a lab with a service of three tasks, one per host.
type outage struct {
	*field
	made bool
}

// tasks are the running tasks of the service: task id to host name.
func (o *outage) tasks(ctx context.Context) (map[string]string, error) {
	c, err := o.api()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return o.running(ctx, c, failoverName)
}

// oneEach wants one task on every host.
func oneEach(tasks map[string]string) error {
	on := slices.Sorted(maps.Values(tasks))
	if !slices.Equal(on, []string{"h1", "h2", "h3"}) {
		return fmt.Errorf("tasks run on %q, one on each host wanted", on)
	}
	return nil
}

// restore makes the service anew unless it is whole, and waits until every
// host answers.
func (o *outage) restore(ctx context.Context) error {
	if err := o.awaitReady(ctx, hosts); err != nil {
		return err
	}
	if o.made {
		ts, err := o.tasks(ctx)
		if err != nil {
			return err
		}
		if oneEach(ts) == nil {
			return nil
		}
		if err := o.removeService(ctx, failoverName); err != nil {
			return err
		}
	}
	args, err := o.on(1, "service", "create", "--detach", "--name", failoverName, "--replicas", strconv.Itoa(replicas), "--publish", failoverPort+":80", image)
	if err != nil {
		return err
	}
	if _, err := o.cmd(ctx, args...); err != nil {
		return err
	}
	o.made = true
	err = await(ctx, func() error {
		ts, err := o.tasks(ctx)
		if err != nil {
			return err
		}
		return oneEach(ts)
	})
	if err != nil {
		return err
	}
	targets, err := o.targets(failoverPort, hosts)
	if err != nil {
		return err
	}
	_, err = watchAnswers(ctx, o.lab.ClientNetNS(), targets, time.Now())
	return err
}

func (o *outage) undisturbed(ctx context.Context) (sample, error) {
	return o.disturbed(ctx, func(context.Context) error { return nil })
}

// disturbed sends the requests while disturb runs, then waits until the cluster
// is whole and counts the tasks that were replaced.
func (o *outage) disturbed(ctx context.Context, disturb func(context.Context) error) (sample, error) {
	if err := o.restore(ctx); err != nil {
		return nil, fmt.Errorf("restore the service: %w", err)
	}
	before, err := o.tasks(ctx)
	if err != nil {
		return nil, err
	}
	targets, err := o.targets(failoverPort, hosts)
	if err != nil {
		return nil, err
	}
	var got outcome
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		var err error
		got, err = flow(gctx, newProbe(o.lab.ClientNetNS(), requestTimeout), targets, flowRequests, flowGap)
		return err
	})
	g.Go(func() error { return disturb(gctx) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := o.awaitReady(ctx, hosts); err != nil {
		return nil, err
	}
	gone := 0
	err = await(ctx, func() error {
		after, err := o.tasks(ctx)
		if err != nil {
			return err
		}
		if len(after) != replicas {
			return fmt.Errorf("%d of %d tasks run", len(after), replicas)
		}
		gone = 0
		for id := range before {
			if _, ok := after[id]; !ok {
				gone++
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	o.tell(got)
	out := got.sample()
	out[replaced] = float64(gone)
	return out, nil
}

// sample of the metrics that every case has.
func (o outcome) sample() sample {
	return sample{
		failed:    float64(o.Failed),
		medianLat: percentile(o.Latencies, 50).Seconds() * 1000,
		p99Lat:    percentile(o.Latencies, 99).Seconds() * 1000,
	}
}

// tell says why requests failed, if any did.
func (o *outage) tell(got outcome) {
	if got.Failed > 0 {
		fmt.Fprintf(o.log, "[%d refused, %d timed out, another: %v] ", got.Refused, got.TimedOut, got.Other)
	}
}

// killDaemon kills the daemon of a host, and starts it again later. Its
// containers are left alone.
func (o *outage) killDaemon(ctx context.Context, host int) error {
	if err := pause(ctx, killAfter); err != nil {
		return err
	}
	pid, err := o.daemon(ctx, host)
	if err != nil {
		return err
	}
	if err := kill(pid); err != nil {
		return fmt.Errorf("kill the daemon of h%d: %w", host, err)
	}
	if err := pause(ctx, startAfter-killAfter); err != nil {
		return err
	}
	_, err = o.cmd(ctx, "lab", "start", "--name", o.name, "h"+strconv.Itoa(host))
	return err
}

// killContainerd kills the container supervisor of a host; the daemon starts
// another.
func (o *outage) killContainerd(ctx context.Context, host int) error {
	if err := pause(ctx, killAfter); err != nil {
		return err
	}
	h, err := o.host(host)
	if err != nil {
		return err
	}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range files {
		args, err := os.ReadFile(file)
		if err != nil || !isSupervisor(string(args), h.Paths.ExecRoot) {
			continue // ended, or something else
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil {
			err = kill(pid)
		}
		if err != nil {
			return fmt.Errorf("kill containerd of h%d: %w", host, err)
		}
		return nil
	}
	return fmt.Errorf("no containerd runs on h%d", host)
}

// isSupervisor knows the containerd of a host by its command line, arguments
// that end with a zero byte each. It need not be a child of the daemon: one
// that was killed leaves it to its successor.
func isSupervisor(cmdline, execRoot string) bool {
	name, rest, _ := strings.Cut(cmdline, "\x00")
	return strings.HasSuffix(name, "containerd") && strings.Contains(rest, execRoot+"/")
}

// daemon is the process id of the daemon of a host.
func (o *outage) daemon(ctx context.Context, host int) (int, error) {
	list, _, err := o.lab.List(ctx)
	if err != nil {
		return 0, err
	}
	if pid := list[host-1].PID; pid != 0 {
		return pid, nil
	}
	return 0, fmt.Errorf("the daemon of h%d does not run", host)
}

// kill sends SIGKILL to a process that was seen to be there a moment ago.
func kill(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}

// hostOff cuts the power of the last host of a lab of its own while the others
// are asked, until its task runs elsewhere.
func (r *rig) hostOff(ctx context.Context) (sample, error) {
	f, err := r.field("-off")
	if err != nil {
		return nil, err
	}
	o := &outage{field: f}
	var out sample
	err = f.once(ctx, func() error {
		if err := f.up(ctx, hosts); err != nil {
			return err
		}
		return o.restore(ctx)
	}, func() error {
		var err error
		out, err = o.powerCut(ctx, "h3")
		return err
	})
	return out, err
}

// powerCut measures while victim, the last host, goes off.
func (o *outage) powerCut(ctx context.Context, victim string) (sample, error) {
	targets, err := o.targets(failoverPort, hosts-1)
	if err != nil {
		return nil, err
	}
	c, err := o.api()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var got outcome
	var moved time.Duration
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		var err error
		got, err = flow(gctx, newProbe(o.lab.ClientNetNS(), requestTimeout), targets, flowRequests, flowGap)
		return err
	})
	g.Go(func() error {
		if err := pause(gctx, killAfter); err != nil {
			return err
		}
		t0 := time.Now()
		if _, err := o.cmd(gctx, "lab", "kill", "--name", o.name, victim); err != nil {
			return err
		}
		err := o.awaitMoved(gctx, c, victim)
		moved = time.Since(t0)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	o.tell(got)
	out := got.sample()
	out[noticed] = moved.Seconds()
	out[recovered] = max(0, got.LastFail-killAfter).Seconds()
	return out, nil
}

// awaitMoved waits until all tasks run, none of them on victim.
func (o *outage) awaitMoved(ctx context.Context, c *client.Client, victim string) error {
	return await(ctx, func() error {
		ts, err := o.running(ctx, c, failoverName)
		if err != nil {
			return err
		}
		on := slices.Sorted(maps.Values(ts))
		if len(on) != replicas || slices.Contains(on, victim) {
			return fmt.Errorf("tasks run on %q", on)
		}
		return nil
	})
}
