package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// What an engine takes to hold many services, besides traffic.
const (
	fillMany = "program-10000" // processor time from nothing, of manyServices with backendsEach
	fillOne  = "change-one"    // of one of them, a backend of which has gone and another come
	// What the kernel keeps: without any service, for a service of one backend, and for
	// each backend more.
	fillEmpty   = "kernel-empty"
	fillService = "kernel-service"
	fillBackend = "kernel-backend"
	// What weft keeps itself of the same: the wish, and what the engine knows it has left.
	fillModel = "weft-model"
)

var fillingMetrics = []metric{
	{fillMany, "ms", false}, {fillOne, "ms", false},
	{fillEmpty, "MiB", false}, {fillService, "B", false}, {fillBackend, "B", false}, {fillModel, "MiB", false},
}

func fillingNames() (out []string) {
	for _, m := range fillingMetrics {
		out = append(out, m.Name)
	}
	return out
}

// fillingCases are the engines that are filled.
var fillingCases = []string{vipEBPF, vipIPVS, vipNFT}

func isFilledCase(name string) bool { return slices.Contains(fillingCases, name) }

// fillingLimits are in milliseconds, of which each is 10^6 instructions here: no processor
// is so slow, so that what holds here holds. eBPF's (500 and 1) are too near for that,
// and are ingress/bpf's benchmarks' to tell.
var fillingLimits = []limit{
	{Case: vipIPVS, Metric: fillMany, Most: 20_000},
	{Case: vipIPVS, Metric: fillOne, Most: 10},
	{Case: vipNFT, Metric: fillMany, Most: 10_000},
	{Case: vipNFT, Metric: fillOne, Most: 10},
}

// changesEach is how many single changes are made, of which the median counts: some of
// them meet the collector of garbage.
const changesEach = 9

// fill has a new engine of a case on a host of its own hold many services, and puts what
// it takes into out.
func (g *ground) fill(ctx context.Context, name string, out sample) (err error) {
	own := &ground{dir: filepath.Join(g.dir, "fill"), log: g.log, paths: map[string]path{}}
	own.later(func() error { return os.RemoveAll(own.dir) })
	defer func() { err = errors.Join(err, own.close()) }()
	h, err := own.hosts(name)
	if err != nil {
		return err
	}
	c := vipPath{vipCase: vipCases[slices.IndexFunc(vipCases, func(c vipCase) bool { return c.name == name })], path: name, network: weft.NewID()}
	for i := range c.ports {
		ns, err := own.namespace(fmt.Sprintf("%s%d", name, i))
		if err != nil {
			return err
		}
		task := weft.NewID()
		c.ports[i] = vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(i), MAC: weft.EndpointMAC(task, taskOn(i))}
	}
	engine, table, err := own.vipNetwork(ctx, c, 0, h[0])
	if err != nil {
		return err
	}
	// The calling goroutine has its thread to itself inside netns.Do.
	return netns.Do(h[0], func() error {
		return filling{engine, table, manyServices, ingresstest.SettledMemory}.measure(ctx, out)
	})
}

// filling is an engine that is to hold so many services, on a network that is there.
type filling struct {
	engine ingress.Engine
	table  ingress.Table
	count  int
	memory func(context.Context) (int64, error) // the kernel's
}

// measure works in the calling thread's namespace.
func (f filling) measure(ctx context.Context, out sample) error {
	engine, table := f.engine, f.table
	apply := func(services []ingress.Service) (time.Duration, error) {
		table.Networks = slices.Clone(table.Networks)
		table.Networks[0].Services = services
		start := processorTime()
		err := engine.Apply(ctx, table)
		return processorTime() - start, err
	}
	if err := engine.Probe(ctx); err != nil {
		return err
	}
	before, err := f.memory(ctx)
	if err != nil {
		return err
	}
	if _, err := apply(nil); err != nil {
		return err
	}
	empty, err := f.memory(ctx)
	if err != nil {
		return err
	}
	if _, err := apply(otherServices(f.count, 1)); err != nil {
		return err
	}
	one, err := f.memory(ctx)
	if err != nil {
		return err
	}
	if _, err := apply(nil); err != nil { // what is changed in place may leave holes
		return err
	}
	bare := heap()
	services := otherServices(f.count, backendsEach)
	took, err := apply(services)
	if err != nil {
		return err
	}
	out[fillMany] = milliseconds(took)
	// How a service is changed depends on how long ago the last whole pass was: nothing
	// that waits may come between.
	var ones []float64
	for i := range changesEach {
		services = slices.Clone(services)
		s := &services[(i+1)*f.count/(changesEach+1)]
		s.Backends = append(slices.Clone(s.Backends[1:]), s.Backends[0])
		last := &s.Backends[backendsEach-1]
		last.Task = weft.ID(fmt.Sprintf("other%020d", i))
		last.MAC = weft.EndpointMAC(last.Task, last.Addr)
		if took, err = apply(services); err != nil {
			return err
		}
		ones = append(ones, milliseconds(took))
	}
	out[fillOne], _, _ = spread(ones)
	out[fillModel] = float64(heap()-bare) / (1 << 20)
	runtime.KeepAlive(engine)
	ten, err := f.memory(ctx)
	if err != nil {
		return err
	}
	out[fillEmpty] = float64(empty-before) / (1 << 20)
	out[fillService] = float64(one-empty) / float64(f.count)
	out[fillBackend] = float64(ten-one) / float64(f.count*(backendsEach-1))
	return nil
}

// heap is what this process has reachable, in bytes.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what the first one has only marked for finalisers
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// processorTime is that of all threads of this process: an engine's own, and what the
// collector of garbage does for it.
func processorTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return 0 // it is refused nowhere
	}
	return time.Duration(ts.Nano())
}
