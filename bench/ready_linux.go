package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/vxlan/netns"
)

// Our own choices.
const (
	// readyHosts is the size of the cluster, readyChanges how many tasks come in a
	// run, one after the other, on each host in turn.
	readyHosts   = 5
	readyChanges = 10
	// askEvery is the resolution. It also is what the asking costs: a hundredth of
	// a processor for each host.
	askEvery   = time.Millisecond
	askTimeout = 5 * time.Second // for a lost datagram: there is none
	// readyAgain lets what follows a removed task pass.
	readyAgain = 300 * time.Millisecond
	// The line of a daemon that says when a task can serve.
	readyLine = "task can serve"
)

// The metrics of ready. Those of the node itself are of weft only.
const (
	everyP50, everyP99, everyWorst = "every node: p50", "every node: p99", "every node: worst"
	ownP50, ownWorst               = "own node: p50", "own node: worst"
)

// readyBench: how long a new task has no name.
func readyBench() benchmark {
	const (
		raw   = "a datagram to each host"
		named = "a task's name on each host"
	)
	return benchmark{
		Name: "ready",
		About: fmt.Sprintf("from the moment at which a node knows that a new task can serve until the resolver of a container on each of %d hosts names it, asked every %v, %d tasks a run; "+
			"against a datagram from one host to each until a program there has read it", readyHosts, askEvery, readyChanges),
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			w := &readyRuns{field: f}
			if err := f.guarded(ctx, func() error { return w.prepare(ctx) }); err != nil {
				return plan{}, err
			}
			return plan{
				Metrics:  []metric{{everyP50, "ms", true}, {everyP99, "ms", true}, {everyWorst, "ms", true}, {ownP50, "ms", false}, {ownWorst, "ms", false}},
				Baseline: variant{raw, w.raw},
				Cases:    []variant{{named, w.named}},
				Limits:   []limit{{Case: named, Metric: everyP50, Most: 20}, {Case: named, Metric: everyP99, Most: 20}},
				Close:    f.down,
			}, nil
		},
	}
}

// readyRuns is a lab with a task on each host that asks its resolver.
type readyRuns struct {
	*field
	askers []string // network namespaces of tasks, by host
	came   int      // tasks
}

const (
	readyNetwork = "front"
	readyAsker   = "asker"
)

// readyService is that whose only task runs on a host, counted from 0.
func readyService(host int) string { return "s" + strconv.Itoa(host+1) }

func (w *readyRuns) weft(ctx context.Context, args ...string) error {
	line, err := w.on(1, args...)
	if err == nil {
		_, err = w.cmd(ctx, line...)
	}
	return err
}

// prepare makes the lab, whose daemons say when a task can serve.
func (w *readyRuns) prepare(ctx context.Context) error {
	if _, err := w.cmd(ctx, "lab", "up", "--name", w.name, "--hosts", strconv.Itoa(readyHosts), "--daemon-log-level", "debug"); err != nil {
		return err
	}
	if err := w.awaitReady(ctx, readyHosts); err != nil {
		return err
	}
	if err := w.weft(ctx, "network", "create", "--driver", "overlay", readyNetwork); err != nil {
		return err
	}
	if err := w.weft(ctx, "service", "create", "--detach", "--name", readyAsker, "--mode", "global", "--network", readyNetwork, image); err != nil {
		return err
	}
	if err := w.awaitContainers(ctx, 1); err != nil {
		return err
	}
	for n := range readyHosts {
		ns, err := w.namespace(ctx, n+1)
		if err != nil {
			return err
		}
		w.askers = append(w.askers, ns)
		// The service is known before: a name of nobody would be asked of the host's nameserver.
		if err := w.weft(ctx, "service", "create", "--detach", "--name", readyService(n), "--replicas", "0",
			"--constraint", "node.hostname==h"+strconv.Itoa(n+1), "--network", readyNetwork, image); err != nil {
			return err
		}
	}
	// The first task of a service on a host prepares what others find there.
	_, err := w.tasks(ctx, readyHosts)
	return err
}

// namespace is that of the only container of a host.
func (w *readyRuns) namespace(ctx context.Context, n int) (string, error) {
	h, err := w.host(n)
	if err != nil {
		return "", err
	}
	c, err := client.New(client.WithHost("unix://" + h.Paths.Socket))
	if err != nil {
		return "", fmt.Errorf("make API client of %s: %w", h.Name, err)
	}
	defer c.Close()
	list, err := c.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil || len(list.Items) != 1 {
		return "", fmt.Errorf("%d containers are on %s, 1 expected: %w", len(list.Items), h.Name, err)
	}
	got, err := c.ContainerInspect(ctx, list.Items[0].ID, client.ContainerInspectOptions{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/ns/net", got.Container.State.Pid), nil
}

// named has tasks come, one after the other.
func (w *readyRuns) named(ctx context.Context) (sample, error) {
	seen, err := w.tasks(ctx, readyChanges)
	if err != nil {
		return nil, err
	}
	var every, own []time.Duration
	for _, s := range seen {
		own = append(own, s.took[s.owner])
		every = append(every, slices.Max(s.took))
	}
	out := everyNode(every)
	slices.Sort(own)
	out[ownP50], out[ownWorst] = inMS(own[len(own)/2]), inMS(own[len(own)-1])
	return out, nil
}

func inMS(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func everyNode(took []time.Duration) sample {
	slices.Sort(took)
	return sample{everyP50: inMS(took[len(took)/2]), everyP99: inMS(took[len(took)*99/100]), everyWorst: inMS(took[len(took)-1])}
}

// arrival is a task that came: the host, from 0, and when the resolver of each named it, since
// it could serve.
type arrival struct {
	owner int
	took  []time.Duration
}

func (w *readyRuns) tasks(ctx context.Context, n int) ([]arrival, error) {
	var out []arrival
	for range n {
		a, err := w.arrives(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
		if err := pause(ctx, readyAgain); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// arrives has a service get its only task, sees it named, and takes it away.
func (w *readyRuns) arrives(ctx context.Context) (arrival, error) {
	owner := w.came % readyHosts
	w.came++
	name := readyService(owner)
	h, err := w.host(owner + 1)
	if err != nil {
		return arrival{}, err
	}
	log, err := os.Open(h.Paths.Log)
	if err != nil {
		return arrival{}, err
	}
	defer log.Close()
	if _, err := log.Seek(0, 2); err != nil {
		return arrival{}, err
	}
	at := make([]time.Time, readyHosts)
	g, gctx := errgroup.WithContext(ctx)
	for i, ns := range w.askers {
		g.Go(func() (err error) {
			at[i], err = askUntilNamed(gctx, ns, "tasks."+name)
			return err
		})
	}
	g.Go(func() error {
		return w.weft(gctx, "service", "scale", "--detach", name+"=1")
	})
	if err := g.Wait(); err != nil {
		return arrival{}, err
	}
	ready, err := canServe(bufio.NewScanner(log))
	if err != nil {
		return arrival{}, fmt.Errorf("read %s: %w", h.Paths.Log, err)
	}
	a := arrival{owner: owner}
	for _, t := range at {
		a.took = append(a.took, t.Sub(ready))
	}
	if err := w.weft(ctx, "service", "scale", "--detach", name+"=0"); err != nil {
		return arrival{}, err
	}
	return a, w.awaitContainers(ctx, 1)
}

// canServe reads from a daemon's log when its newest task could serve.
func canServe(lines *bufio.Scanner) (at time.Time, err error) {
	for lines.Scan() {
		stamp, ok := strings.CutPrefix(lines.Text(), "time=")
		if !ok || !strings.Contains(stamp, readyLine) {
			continue
		}
		stamp, _, _ = strings.Cut(stamp, " ")
		if at, err = time.Parse(time.RFC3339Nano, stamp); err != nil {
			return at, err
		}
	}
	if at.IsZero() {
		err = fmt.Errorf("no line says %q", readyLine)
	}
	return at, errors.Join(err, lines.Err())
}

// askUntilNamed asks the resolver of a namespace for a name's addresses until there
// are some, and returns when their answer was read.
func askUntilNamed(ctx context.Context, ns, name string) (time.Time, error) {
	var conn net.Conn
	if err := netns.Do(ns, func() (err error) {
		conn, err = net.Dial("udp", "127.0.0.11:53")
		return err
	}); err != nil {
		return time.Time{}, err
	}
	defer conn.Close()
	question, answer := question(name), make([]byte, 512)
	for {
		if err := conn.SetDeadline(time.Now().Add(askTimeout)); err != nil {
			return time.Time{}, err
		}
		if _, err := conn.Write(question); err != nil {
			return time.Time{}, err
		}
		n, err := conn.Read(answer)
		if err != nil {
			return time.Time{}, err
		}
		// RFC 1035 section 4.1.1: ANCOUNT.
		if n >= 12 && binary.BigEndian.Uint16(answer[6:]) > 0 {
			return time.Now(), nil
		}
		if err := pause(ctx, askEvery); err != nil {
			return time.Time{}, err
		}
	}
}

// question asks for addresses of IPv4 (RFC 1035 section 4.1).
func question(name string) []byte {
	b := []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0, 0, 1, 0, 1)
}

// raw sends a datagram from one host to a program on each, this one's too.
func (w *readyRuns) raw(ctx context.Context) (sample, error) {
	var socks []net.PacketConn
	defer func() {
		for _, s := range socks {
			s.Close()
		}
	}()
	for i := range readyHosts {
		h, err := w.host(i + 1)
		if err != nil {
			return nil, err
		}
		if err := netns.Do(h.Paths.NetNS, func() error {
			s, err := net.ListenPacket("udp", net.JoinHostPort(h.Addr.String(), "0"))
			if err == nil {
				socks = append(socks, s)
			}
			return err
		}); err != nil {
			return nil, err
		}
	}
	var took []time.Duration
	for n := range 10 * readyChanges {
		began := time.Now()
		at := make([]time.Time, readyHosts)
		g, _ := errgroup.WithContext(ctx)
		for i, s := range socks {
			g.Go(func() error {
				if err := s.SetReadDeadline(began.Add(askTimeout)); err != nil {
					return err
				}
				_, _, err := s.ReadFrom(make([]byte, 1))
				at[i] = time.Now()
				return err
			})
			if _, err := socks[n%readyHosts].WriteTo([]byte{0}, s.LocalAddr()); err != nil {
				return nil, errors.Join(err, g.Wait())
			}
		}
		if err := g.Wait(); err != nil {
			return nil, err
		}
		took = append(took, slices.MaxFunc(at, time.Time.Compare).Sub(began))
		if err := pause(ctx, 10*askEvery); err != nil {
			return nil, err
		}
	}
	return everyNode(took), nil
}
