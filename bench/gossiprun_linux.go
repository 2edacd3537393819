package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Our own choices for the load.
const (
	// quietChanges in turn on all nodes, one every changeEvery: slow enough that
	// NetworkDB, which sends a packet of 1,400 bytes each 200 ms, keeps up.
	quietChanges = 100
	changeEvery  = 100 * time.Millisecond
	// busyChanges are measured while an endpoint is replaced every churnEvery.
	busyChanges = 50
	churnEvery  = 50 * time.Millisecond
	// lateAfter is how long the last change of a phase is waited for. One that is
	// not everywhere by then counts with the time it has had.
	lateAfter = 15 * time.Second
	// startFor bounds the joining, and burstFor the spread of a burst.
	startFor = 5 * time.Minute
	burstFor = 100 * time.Second
)

// fleetRun is a process of nodes that is driven.
type fleetRun struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string // closed with the process's output
	nodes int
	next  int // key
	turn  int // of churn
	began map[int]time.Duration
	left  map[int]int           // nodes that have not seen a key
	took  map[int]time.Duration // until all have
}

// runFleet measures parts with n nodes of one process. Without any it runs nothing.
func runFleet(ctx context.Context, n int, parts map[string]bool, cmd *exec.Cmd) (_ sample, err error) {
	any := func(names ...string) bool {
		return slices.ContainsFunc(names, func(name string) bool { return parts[name] })
	}
	out := sample{}
	if !any(tableJoined, tableP50, tableP99, tableWorst, tableBytes, busyP50, busyP99, busyWorst, tableCPU, burst10k, burst1k) {
		return out, nil
	}
	f, err := startFleet(cmd, n)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	joined, err := f.ask(ctx, startFor, "ready", "start %d", n)
	if err != nil {
		return nil, err
	}
	out[tableJoined] = joined.Seconds()
	ms := func(name string, d time.Duration) { out[name] = d.Seconds() * 1e3 }
	if any(tableP50, tableP99, tableWorst, tableBytes) {
		before, err := f.sent()
		if err != nil {
			return nil, err
		}
		start := time.Now()
		took, err := f.changes(ctx, quietChanges, 0)
		if err != nil {
			return nil, err
		}
		span := time.Since(start)
		after, err := f.sent()
		if err != nil {
			return nil, err
		}
		out[tableBytes] = float64(after-before) / float64(n) / span.Seconds()
		ms(tableP50, percentile(took, 50))
		ms(tableP99, percentile(took, 99))
		ms(tableWorst, percentile(took, 100))
	}
	if any(busyP50, busyP99, busyWorst, tableCPU) {
		before, err := ranFor(f.cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		took, err := f.changes(ctx, busyChanges, churnEvery)
		if err != nil {
			return nil, err
		}
		after, err := ranFor(f.cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		ms(busyP50, percentile(took, 50))
		ms(busyP99, percentile(took, 99))
		ms(busyWorst, percentile(took, 100))
		ms(tableCPU, (after-before)/time.Duration(busyChanges+int(busyChanges*changeEvery/churnEvery)))
	}
	for _, burst := range []struct {
		name  string
		total int
	}{{burst1k, 1000}, {burst10k, 10_000}} {
		if parts[burst.name] {
			d, err := f.ask(ctx, burstFor, "burst", "burst %d", burst.total/n)
			if err != nil {
				return nil, err
			}
			ms(burst.name, d)
		}
	}
	return out, nil
}

func startFleet(cmd *exec.Cmd, n int) (*fleetRun, error) {
	f := &fleetRun{cmd: cmd, nodes: n, next: n, lines: make(chan string, 1024), began: map[int]time.Duration{}, left: map[int]int{}, took: map[int]time.Duration{}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Setpgid: true}
	cmd.Stderr = os.Stderr
	var err error
	if f.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start nodes: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start nodes: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start nodes in a network namespace: %w", err)
	}
	go func() { // ends with the process, which close waits for
		for s := bufio.NewScanner(out); s.Scan(); {
			f.lines <- s.Text()
		}
		close(f.lines)
	}()
	return f, nil
}

// close ends the process; what it still says is of no use.
func (f *fleetRun) close() error {
	f.stdin.Close()
	late := time.AfterFunc(5*time.Second, func() { f.cmd.Process.Kill() })
	for range f.lines {
	}
	err := f.cmd.Wait()
	if !late.Stop() {
		return nil // it was tidying up
	}
	return err
}

// ask gives an order and waits for the answer that begins with word.
func (f *fleetRun) ask(ctx context.Context, limit time.Duration, word, order string, n int) (time.Duration, error) {
	if err := f.say(order, n); err != nil {
		return 0, err
	}
	end := time.NewTimer(limit)
	defer end.Stop()
	for {
		line, err := f.hear(ctx, end.C)
		if err != nil {
			return 0, fmt.Errorf("wait for %s: %w", word, err)
		}
		if ns, ok := strings.CutPrefix(line, word+" "); ok {
			d, err := strconv.ParseInt(ns, 10, 64)
			return time.Duration(d), err
		}
	}
}

func (f *fleetRun) say(order string, args ...any) error {
	if _, err := fmt.Fprintf(f.stdin, order+"\n", args...); err != nil {
		return fmt.Errorf("nodes take no orders: %w", err)
	}
	return nil
}

// errLate is the end of lateAfter.
var errLate = errors.New("it took too long")

func (f *fleetRun) hear(ctx context.Context, end <-chan time.Time) (string, error) {
	select {
	case line, ok := <-f.lines:
		if !ok {
			return "", errors.New("the nodes' process has ended")
		}
		return line, nil
	case <-end:
		return "", errLate
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// changes makes n changes, and others every churn if that is not 0, and returns
// the times until all other nodes had seen each, in order.
func (f *fleetRun) changes(ctx context.Context, n int, churn time.Duration) ([]time.Duration, error) {
	first, start := f.next, time.Now()
	tick := changeEvery
	if churn > 0 {
		tick = churn
	}
	for next := start; f.next < first+n; next = next.Add(tick) {
		if err := f.listen(ctx, next, false); err != nil {
			return nil, err
		}
		if churn > 0 {
			if err := f.swap(); err != nil {
				return nil, err
			}
		}
		if time.Duration(f.next-first)*changeEvery <= next.Sub(start) {
			f.left[f.next] = f.nodes - 1
			if err := f.say("put %d %d", f.next*7%f.nodes, f.next); err != nil {
				return nil, err
			}
			f.next++
		}
	}
	if err := f.listen(ctx, time.Now().Add(lateAfter), true); err != nil {
		return nil, err
	}
	var out []time.Duration
	for k := first; k < f.next; k++ {
		d, ok := f.took[k]
		if !ok {
			d = lateAfter + time.Duration(f.next-1-k)*changeEvery
			delete(f.left, k)
		}
		out = append(out, d)
	}
	slices.Sort(out)
	return out, nil
}

// swap replaces the endpoint that was swapped in on this node the last time.
func (f *fleetRun) swap() error {
	node, key := f.turn%f.nodes, quietKey+f.turn
	f.turn++
	if old := key - f.nodes; old >= quietKey {
		return f.say("swap %d %d %d", node, key, old)
	}
	return f.say("put %d %d", node, key)
}

// listen takes what nodes say until t; with all, no longer than until all nodes
// have seen all changes.
func (f *fleetRun) listen(ctx context.Context, t time.Time, all bool) error {
	end := time.NewTimer(time.Until(t))
	defer end.Stop()
	for !all || len(f.left) > 0 {
		line, err := f.hear(ctx, end.C)
		if errors.Is(err, errLate) {
			return nil
		}
		if err == nil {
			err = f.note(line)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// note takes a line of a change.
func (f *fleetRun) note(line string) error {
	word, args, err := order(line)
	if err != nil || len(args) != 2 {
		return fmt.Errorf("nodes say %q", line)
	}
	k, at := args[0], time.Duration(args[1])
	switch {
	case word == "put":
		f.began[k] = at
	case word == "seen" && f.left[k] > 0:
		if f.left[k]--; f.left[k] == 0 {
			delete(f.left, k)
			f.took[k] = at - f.began[k]
		}
	}
	return nil
}

// sent are the bytes that went over the loopback device of the nodes' namespace.
func (f *fleetRun) sent() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", f.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("read traffic: %w", err)
	}
	return loopbackBytes(string(b))
}

// loopbackBytes reads what lo has received in a file of proc_pid_net(5).
func loopbackBytes(dev string) (int64, error) {
	for line := range strings.Lines(dev) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "lo:"); ok {
			if fields := strings.Fields(rest); len(fields) > 0 {
				return strconv.ParseInt(fields[0], 10, 64)
			}
		}
	}
	return 0, errors.New("read traffic: there is no lo")
}
