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

// fill has new engines of a case hold many services, of one backend and of more, and puts
// what they take into out. Each is on a host of its own: what the last filling of a host
// has left to be freed, IPVS for two minutes (ip_vs.h: IP_VS_DEST_TRASH_PERIOD), would be
// counted as the next one's.
func (g *ground) fill(ctx context.Context, name string, out sample) error {
	one, err := g.fillAnew(ctx, name, 1, out)
	if err != nil {
		return err
	}
	all, err := g.fillAnew(ctx, name, backendsEach, out)
	if err != nil {
		return err
	}
	out[fillService] = float64(one) / manyServices
	out[fillBackend] = float64(all-one) / (manyServices * (backendsEach - 1))
	return nil
}

// fillAnew is what the kernel keeps for services of so many backends, in bytes. The rest
// of what it measures goes into out.
func (g *ground) fillAnew(ctx context.Context, name string, backends int, out sample) (held int64, err error) {
	own := &ground{dir: filepath.Join(g.dir, "fill"), log: g.log, paths: map[string]path{}}
	own.later(func() error { return os.RemoveAll(own.dir) })
	defer func() { err = errors.Join(err, own.close()) }()
	h, err := own.hosts(name)
	if err != nil {
		return 0, err
	}
	c := vipPath{vipCase: vipCases[slices.IndexFunc(vipCases, func(c vipCase) bool { return c.name == name })], path: name, network: weft.NewID()}
	for i := range c.ports {
		ns, err := own.namespace(fmt.Sprintf("%s%d", name, i))
		if err != nil {
			return 0, err
		}
		task := weft.NewID()
		c.ports[i] = vxlan.Port{Task: task, NetNS: ns, IfName: "eth0", Addr: taskPrefix(i), MAC: weft.EndpointMAC(task, taskOn(i))}
	}
	engine, table, err := own.vipNetwork(ctx, c, 0, h[0])
	if err != nil {
		return 0, err
	}
	// The calling goroutine has its thread to itself inside netns.Do.
	err = netns.Do(h[0], func() (err error) {
		held, err = filling{engine, table, manyServices, backends, ingresstest.SettledMemory}.measure(ctx, out)
		return err
	})
	return held, err
}

// filling is an engine that is to hold so many services of so many backends, on a network
// that is there.
type filling struct {
	engine          ingress.Engine
	table           ingress.Table
	count, backends int
	memory          func(context.Context) (int64, error) // the kernel's
}

// measure works in the calling thread's namespace, and says what the kernel keeps for the
// services.
func (f filling) measure(ctx context.Context, out sample) (held int64, err error) {
	apply := func(services []ingress.Service) (time.Duration, error) {
		f.table.Networks = slices.Clone(f.table.Networks)
		f.table.Networks[0].Services = services
		start := processorTime()
		err := f.engine.Apply(ctx, f.table)
		return processorTime() - start, err
	}
	if err := f.engine.Probe(ctx); err != nil {
		return 0, err
	}
	before, err := f.memory(ctx)
	if err != nil {
		return 0, err
	}
	if _, err := apply(nil); err != nil {
		return 0, err
	}
	empty, err := f.memory(ctx)
	if err != nil {
		return 0, err
	}
	out[fillEmpty] = float64(empty-before) / (1 << 20)
	bare := heap()
	services := otherServices(f.count, f.backends)
	took, err := apply(services)
	if err != nil {
		return 0, err
	}
	out[fillMany] = milliseconds(took)
	// How a service is changed depends on how long ago the last whole pass was: nothing
	// that waits may come between.
	var ones []float64
	for i := range changesEach {
		services = slices.Clone(services)
		s := &services[(i+1)*f.count/(changesEach+1)]
		s.Backends = append(slices.Clone(s.Backends[1:]), s.Backends[0])
		last := &s.Backends[f.backends-1]
		last.Task = weft.ID(fmt.Sprintf("other%020d", i))
		last.MAC = weft.EndpointMAC(last.Task, last.Addr)
		if took, err = apply(services); err != nil {
			return 0, err
		}
		ones = append(ones, milliseconds(took))
	}
	out[fillOne], _, _ = spread(ones)
	out[fillModel] = float64(heap()-bare) / (1 << 20)
	runtime.KeepAlive(f.engine)
	full, err := f.memory(ctx)
	return full - empty, err
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
