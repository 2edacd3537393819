package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// What weft's engines are measured in besides traffic.
const (
	programMany = "program-1000" // a network of as many is programmed
	programOne  = "change-1"     // one endpoint of them moves
	ofThread    = "-cpu"         // the thread's time on a processor, not the clock's
	manyPeers   = 1000
)

// trafficLimits are what the paths are wanted to reach, as ratios of operations
// for the same work of the processor.
var trafficLimits = []limit{
	{Case: pathEBPF, Metric: string(rr), Over: pathRaw, Least: 0.88},
	{Case: pathEBPF, Metric: string(crr), Over: pathRaw, Least: 0.87},
	{Case: pathEBPF, Metric: string(udp), Over: pathRaw, Least: 0.76},
	{Case: pathEBPF, Metric: string(bulk), Over: pathRaw, Least: 0.93},
	{Case: pathEBPF, Metric: string(rr), Over: pathRouted, Least: 1.10},
	{Case: pathEBPF, Metric: string(crr), Over: pathRouted, Least: 1.10},
	{Case: pathBridge, Metric: string(rr), Over: pathRaw, Least: 0.68},
	{Case: pathBridge, Metric: string(crr), Over: pathRaw, Least: 0.64},
	{Case: pathCrowd, Metric: string(rr), Over: pathEBPF, Least: 0.98},
	{Case: pathCrowd, Metric: string(udp), Over: pathEBPF, Least: 0.98},
}

// programLimits are in milliseconds.
var programLimits = []limit{
	{Case: pathEBPF, Metric: programMany, Most: 50},
	{Case: pathEBPF, Metric: programOne, Most: 1},
	{Case: pathBridge, Metric: programMany, Most: 50},
	{Case: pathBridge, Metric: programOne, Most: 1},
}

// trafficPairs are the ratios between cases.
var trafficPairs = []pair{{pathEBPF, pathRouted}, {pathCrowd, pathEBPF}}

// trafficChoices are all paths and metrics, and the paths that are measured when
// none is named.
func trafficChoices(usual []string) choices {
	c := choices{Cases: casePaths, Usual: usual}
	for _, p := range patterns {
		c.Metrics = append(c.Metrics, string(p))
	}
	return c
}

// programChoices adds the programming of endpoints, which takes real time.
func programChoices() choices {
	c := trafficChoices(casePaths)
	c.Metrics = append(c.Metrics, programMany, programOne)
	return c
}

// hostCounts are the operations of one run on this machine's own kernel: about 50 ms,
// so that the paths follow each other closely. Many rounds then make a median.
var hostCounts = map[pattern]int{rr: 3000, crr: 800, udp: 800 * window, bulk: 192 << 10}

// dataplaneBench: the paths on this machine's kernel, by CPU time.
func dataplaneBench() benchmark {
	return benchmark{
		Name:    "dataplane",
		About:   "the data plane's paths in namespaces on one core: operations per CPU-second of client, server and softirq thread, against host to host; and milliseconds to program endpoints",
		Choices: programChoices(),
		Linked:  true,
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			core := runtime.NumCPU() - 1
			g, err := newGround(ctx, slog.New(slog.NewTextHandler(r.log, nil)), r.cases)
			if err != nil {
				return plan{}, err
			}
			g.core = core
			p, err := trafficPlan(ctx, g, g.openers(r.cases), r.metrics, onCore(core, hostCounts))
			if err != nil {
				return plan{}, errors.Join(err, g.close())
			}
			p.Limits = limitsOn(slices.Concat(trafficLimits, programLimits), pathRaw, r.cases, r.metrics)
			return p, nil
		},
	}
}

// meter makes one run of a pattern and gives operations per second of work.
type meter func(ctx context.Context, w *way, p pattern) (float64, error)

// opener starts both ends of a path.
type opener struct {
	name string
	open func(context.Context) (*way, error)
}

// openers of raw and the other paths of g.
func (g *ground) openers(names []string) []opener {
	var out []opener
	for _, name := range append([]string{pathRaw}, names...) {
		p := g.paths[name]
		out = append(out, opener{name, func(ctx context.Context) (*way, error) { return p.open(ctx, g.core) }})
	}
	return out
}

// trafficPlan opens every path, of which the first is the baseline, and measures
// the patterns on each, and the programming of weft's engines. Its Close closes g,
// too.
func trafficPlan(ctx context.Context, g *ground, list []opener, metrics []string, meter meter) (plan, error) {
	p := plan{Restless: true, Own: nicOwn(namesOf(list)), Pairs: slices.Concat(trafficPairs, nicPairs, cryptPairs, servicePairs, dockerPairs, meshPairs)}
	var ways []*way
	closeWays := func() error {
		var errs []error
		for _, w := range ways {
			errs = append(errs, w.close())
		}
		return errors.Join(errs...)
	}
	p.Close = func(context.Context) error { return errors.Join(closeWays(), g.close()) }
	var wanted []pattern
	for _, m := range patterns {
		if slices.Contains(metrics, string(m)) {
			wanted = append(wanted, m)
			p.Metrics = append(p.Metrics, metric{string(m), unitOf(m), true})
		}
	}
	isProgrammed := slices.Contains(metrics, programMany) || slices.Contains(metrics, programOne)
	if isProgrammed {
		p.Metrics = append(p.Metrics, metric{programMany, "ms", false}, metric{programOne, "ms", false},
			metric{programMany + ofThread, "ms", false}, metric{programOne + ofThread, "ms", false})
	}
	isFilled := slices.ContainsFunc(fillingMetrics, func(m metric) bool { return slices.Contains(metrics, m.Name) })
	if isFilled {
		p.Metrics = append(p.Metrics, fillingMetrics...)
	}
	for i, o := range list {
		w, err := o.open(ctx)
		if err != nil {
			return plan{}, errors.Join(err, closeWays())
		}
		ways = append(ways, w)
		v := variant{o.name, func(ctx context.Context) (sample, error) {
			out := sample{}
			for _, m := range wanted {
				var err error
				if out[string(m)], err = meter(ctx, w, m); err != nil {
					return nil, fmt.Errorf("%s: %w", m, err)
				}
			}
			if isProgrammed && (o.name == pathBridge || o.name == pathEBPF) {
				return out, g.program(ctx, o.name, out)
			}
			if isFilled && isFilledCase(o.name) {
				return out, g.fill(ctx, o.name, out)
			}
			return out, nil
		}}
		if i == 0 {
			p.Baseline = v
		} else {
			p.Cases = append(p.Cases, v)
		}
	}
	return p, nil
}

func namesOf(list []opener) []string {
	var out []string
	for _, o := range list {
		out = append(out, o.name)
	}
	return out
}

func unitOf(p pattern) string {
	if p == bulk {
		return "KiB/s"
	}
	return "1/s"
}

// program has an engine of a new host program many endpoints, and then one of
// them again, and puts the milliseconds of either into out.
func (g *ground) program(ctx context.Context, name string, out sample) (err error) {
	own := &ground{dir: filepath.Join(g.dir, "program"), log: g.log, paths: map[string]path{}}
	own.later(func() error { return os.RemoveAll(own.dir) })
	defer func() { err = errors.Join(err, own.close()) }()
	h, err := own.hosts(name)
	if err != nil {
		return err
	}
	ns, err := own.namespace("task")
	if err != nil {
		return err
	}
	k, err := own.engine(name, 0)
	if err != nil {
		return err
	}
	task := weft.NewID()
	n := network(weft.NewID(), 0, vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(0), MAC: weft.EndpointMAC(task, taskOn(0))})
	// The calling goroutine has its thread to itself inside netns.Do.
	apply := func(name string, n vxlan.Network) error {
		start, used := time.Now(), threadTime()
		err := k.Apply(ctx, only(n))
		out[name], out[name+ofThread] = milliseconds(time.Since(start)), milliseconds(threadTime()-used)
		return err
	}
	return netns.Do(h[0], func() error {
		own.later(func() error {
			return netns.Do(h[0], func() error { return k.Apply(context.WithoutCancel(ctx), vxlan.State{}) })
		})
		// The network itself is there before: programs and devices are made once.
		n.Peers = others(1, 0)
		if err := k.Apply(ctx, only(n)); err != nil {
			return err
		}
		n.Peers = others(1+manyPeers, 0)
		if err := apply(programMany, n); err != nil {
			return err
		}
		n.Peers = slices.Clone(n.Peers)
		moved := &n.Peers[manyPeers/2]
		moved.MAC = weft.EndpointMAC("moved", moved.Addr)
		return apply(programOne, n)
	})
}

func milliseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// threadTime is the calling thread's CPU time.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0 // it is refused nowhere
	}
	return time.Duration(ts.Nano())
}

// onCore measures by the CPU time of both ends and of the softirq thread, which
// all run on one core.
func onCore(core int, counts map[pattern]int) meter {
	return func(_ context.Context, w *way, p pattern) (float64, error) {
		soft, err := softirqThread(core)
		if err != nil {
			return 0, err
		}
		var used [2]time.Duration
		var errs []error
		at := 0
		s, err := w.client.run(p, counts[p], func() {
			for _, pid := range []int{w.client.cmd.Process.Pid, w.server.cmd.Process.Pid, soft} {
				d, err := cpuTime(pid)
				used[at], errs = used[at]+d, append(errs, err)
			}
			at++
		})
		if err := errors.Join(append(errs, err)...); err != nil {
			return 0, err
		}
		if used[1] <= used[0] {
			return 0, fmt.Errorf("%d operations took no CPU time", s.Ops)
		}
		return float64(s.Ops) / (used[1] - used[0]).Seconds(), nil
	}
}

// cpuTime of all threads of a process, to the nanosecond.
func cpuTime(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err == nil && len(files) == 0 {
		err = os.ErrNotExist
	}
	if err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	var sum time.Duration
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a thread that has ended
		}
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		first, _, _ := strings.Cut(string(b), " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %s holds %q", pid, f, b)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// softirqThread is the process of a core's softirq thread.
func softirqThread(core int) (int, error) {
	want := fmt.Sprintf("ksoftirqd/%d", core)
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return 0, err
	}
	for _, f := range names {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == want {
			return strconv.Atoi(strings.Split(f, "/")[2])
		}
	}
	return 0, fmt.Errorf("no %s: the CPU time of packets cannot be told", want)
}
