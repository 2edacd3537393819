package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// Our own choices.
const (
	replicas = 3
	// probeTimeout of one attempt while nothing may answer yet. A refused
	// connection ends at once; this is for lost packets.
	probeTimeout = 300 * time.Millisecond
	// firstPort that create publishes; each run takes the next one, so that
	// no run meets what is left of the one before.
	firstPort = 18080
	image     = "weft/whoami"
)

// The metrics of create.
const (
	someHost  = "first host answers"
	everyHost = "all hosts answer"
	everyTask = "all tasks answered"
)

// createBench: how long a person waits for a service.
func createBench() benchmark {
	const (
		plain = "3 runc containers"
		warm  = "service create"
		cold  = "first service create"
	)
	return benchmark{
		Name:  "create",
		About: "service create of three replicas until the published port answers from outside on every host, on a running lab and (first) on a new one, against three plain runc containers with the same program started one after another until each has answered",
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			fresh, err := r.field("-new")
			if err != nil {
				return plan{}, err
			}
			s := &serviceRuns{port: firstPort}
			var b *bundle
			err = f.guarded(ctx, func() error {
				if err := f.up(ctx, hosts); err != nil {
					return err
				}
				if err := f.awaitReady(ctx, hosts); err != nil {
					return err
				}
				if _, err := s.create(ctx, f); err != nil {
					return err
				}
				b, err = newBundle(r.weft, f.lab.ClientNetNS())
				return err
			})
			if err != nil {
				return plan{}, err
			}
			return plan{
				Metrics:  []metric{{someHost, "s", true}, {everyHost, "s", true}, {everyTask, "s", true}},
				Baseline: variant{plain, b.run},
				Cases: []variant{
					{warm, func(ctx context.Context) (sample, error) { return s.create(ctx, f) }},
					{cold, func(ctx context.Context) (sample, error) {
						var out sample
						err := fresh.once(ctx, func() error { return fresh.up(ctx, hosts) }, func() error {
							err := fresh.awaitReady(ctx, hosts)
							if err == nil {
								out, err = s.create(ctx, fresh)
							}
							return err
						})
						return out, err
					}},
				},
				Limits: []limit{{Case: warm, Metric: everyHost, Most: 1.5}},
				Close:  func(ctx context.Context) error { return errors.Join(b.remove(), fresh.down(ctx), f.down(ctx)) },
			}, nil
		},
	}
}

// serviceRuns counts through the published ports.
type serviceRuns struct{ port int }

// create makes a service as a person types it, measures, and removes it. The
// clock starts before the command does: its own start belongs to the wait.
func (s *serviceRuns) create(ctx context.Context, f *field) (sample, error) {
	s.port++
	port := strconv.Itoa(s.port)
	name := "web" + port
	targets, err := f.targets(port, hosts)
	if err != nil {
		return nil, err
	}
	args, err := f.on(1, "service", "create", "--detach", "--name", name, "--replicas", strconv.Itoa(replicas), "--publish", port+":80", image)
	if err != nil {
		return nil, err
	}
	t0 := time.Now()
	var seen arrivals
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := f.cmd(gctx, args...)
		return err
	})
	g.Go(func() error {
		var err error
		seen, err = watchAnswers(gctx, f.lab.ClientNetNS(), targets, t0)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err // the service goes with the lab
	}
	return seen.sample(), f.removeService(ctx, name)
}

// targets are ADDRESS:PORT of the first n hosts.
func (f *field) targets(port string, n int) ([]string, error) {
	list, err := f.lab.Hosts()
	if err != nil {
		return nil, err
	}
	if n > len(list) {
		return nil, fmt.Errorf("lab %s has %d hosts, %d wanted", f.name, len(list), n)
	}
	var out []string
	for _, h := range list[:n] {
		out = append(out, net.JoinHostPort(h.Addr.String(), port))
	}
	return out, nil
}

// removeService removes a service and waits until its containers are gone:
// their end must not be a part of the next measurement.
func (f *field) removeService(ctx context.Context, name string) error {
	args, err := f.on(1, "service", "rm", name)
	if err != nil {
		return err
	}
	if _, err := f.cmd(ctx, args...); err != nil {
		return err
	}
	return f.awaitContainers(ctx, 0)
}

// arrivals are the times of first answers, by target and by task.
type arrivals struct{ byTarget, byTask map[string]time.Duration }

// sample turns arrivals into the metrics of create.
func (a arrivals) sample() sample {
	first, last, tasks := time.Duration(0), time.Duration(0), time.Duration(0)
	for d := range maps.Values(a.byTarget) {
		if first == 0 || d < first {
			first = d
		}
		last = max(last, d)
	}
	for d := range maps.Values(a.byTask) {
		tasks = max(tasks, d)
	}
	return sample{someHost: first.Seconds(), everyHost: last.Seconds(), everyTask: tasks.Seconds()}
}

// watchAnswers asks every target in turn until each has answered and answers
// of as many different containers as there are replicas were seen.
func watchAnswers(ctx context.Context, file string, targets []string, t0 time.Time) (arrivals, error) {
	c := newProbe(file, probeTimeout)
	a := arrivals{map[string]time.Duration{}, map[string]time.Duration{}}
	var last error
	for {
		for _, target := range targets {
			// One that answered is only asked again for its tasks.
			if _, ok := a.byTarget[target]; ok && len(a.byTarget) < len(targets) {
				continue
			}
			got, err := ask(ctx, c, target)
			if err != nil {
				last = err
				continue
			}
			took := time.Since(t0)
			if _, ok := a.byTarget[target]; !ok {
				a.byTarget[target] = took
			}
			if _, ok := a.byTask[got.Host]; !ok {
				a.byTask[got.Host] = took
			}
		}
		if len(a.byTarget) == len(targets) && len(a.byTask) >= replicas {
			return a, nil
		}
		if err := pause(ctx, pollEvery); err != nil {
			return arrivals{}, fmt.Errorf("%w: %d of %d hosts and %d of %d tasks have answered; last: %w", err, len(a.byTarget), len(targets), len(a.byTask), replicas, last)
		}
	}
}
