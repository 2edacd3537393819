package bpf

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
)

// BenchmarkProgram writes the tables of many services, then changes one of them.
func BenchmarkProgram(b *testing.B) {
	bed := newBed(b, "")
	_, client := bed.task(0, 50)
	bed.apply()
	cgroup, err := CgroupOf(bed.nodes[0])
	if err != nil {
		b.Log("without sockets:", err)
	}
	const backends = 10
	for _, count := range []int{10, 1000, 10000} {
		services := manyServices(count, backends)
		table := func(s []ingress.Service) ingress.Table {
			return ingress.Table{Networks: []ingress.Network{{VNI: vni, NetNS: bed.dir, Bridge: "none", Tasks: []string{client}, Services: s}}}
		}
		e, err := New(Config{Node: bed.nodes[0], Dir: bed.mount(0), Cgroup: cgroup})
		must(b, err)
		b.Run(fmt.Sprintf("all/services-%d", count), func(b *testing.B) {
			var used time.Duration
			for b.Loop() {
				b.StopTimer()
				must(b, e.Apply(context.Background(), table(nil)))
				b.StartTimer()
				start := processTime()
				must(b, e.Apply(context.Background(), table(services)))
				used += processTime() - start
			}
			b.ReportMetric(float64(used.Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
		b.Run(fmt.Sprintf("change-1/services-%d", count), func(b *testing.B) {
			must(b, e.Apply(context.Background(), table(services)))
			for i := 0; b.Loop(); i++ {
				next := append([]ingress.Service(nil), services...)
				s := &next[count/2]
				s.Backends = append([]ingress.Backend(nil), s.Backends[:backends-1-i%2]...)
				must(b, e.Apply(context.Background(), table(next)))
			}
		})
		must(b, e.Close(context.Background()))
	}
}

func manyServices(count, backends int) []ingress.Service {
	services := make([]ingress.Service, count)
	vip, addr := netip.MustParseAddr("10.68.0.0"), netip.MustParseAddr("10.64.0.0")
	for i := range services {
		vip = vip.Next()
		services[i] = ingress.Service{ID: weft.ID(fmt.Sprintf("s%d", i)), VIP: vip, MAC: weft.VIPMAC("s", vip)}
		for j := range backends {
			addr = addr.Next()
			id := weft.ID(fmt.Sprintf("t%d-%d", i, j))
			services[i].Backends = append(services[i].Backends, ingress.Backend{Task: id, Addr: addr, MAC: weft.EndpointMAC(id, addr)})
		}
	}
	return services
}

// BenchmarkOneChanged changes one service among 10,000 of ten backends, with no pass
// over everything in between: one backend begins or ends to drain, one comes or goes
// (then the flows are read), the service comes or goes. A new table is made each time,
// of which the rest is the last one's.
func BenchmarkOneChanged(b *testing.B) {
	bed := newBed(b, "")
	_, client := bed.task(0, 50)
	bed.apply()
	cgroup, err := CgroupOf(bed.nodes[0])
	if err != nil {
		b.Log("without sockets:", err)
	}
	e, err := New(Config{Node: bed.nodes[0], Dir: bed.mount(0), Cgroup: cgroup})
	must(b, err)
	services := manyServices(10000, 10)
	apply := func(s []ingress.Service) {
		must(b, e.Apply(context.Background(), ingress.Table{Networks: []ingress.Network{{VNI: vni, NetNS: bed.dir, Bridge: "none", Tasks: []string{client}, Services: s}}}))
	}
	defer func() { must(b, e.Close(context.Background())) }()
	for _, c := range []struct {
		name   string
		change func(s []ingress.Service, turn int) []ingress.Service
	}{
		{"drains", func(s []ingress.Service, _ int) []ingress.Service {
			of := slices.Clone(s[5000].Backends)
			of[3].Draining = !of[3].Draining
			s[5000].Backends = of
			return s
		}},
		{"backend", func(s []ingress.Service, turn int) []ingress.Service {
			s[5000].Backends = slices.Clone(services[5000].Backends[:10-turn%2])
			return s
		}},
		{"service", func(s []ingress.Service, turn int) []ingress.Service {
			if turn%2 == 0 {
				return slices.Insert(s, 5000, services[5000])
			}
			return slices.Delete(s, 5000, 5001)
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			now := slices.Clone(services)
			apply(now)
			apply(now) // what the last one had read may be old by now
			e.whole.took, e.sockets.sweepAt = time.Hour, time.Time{}
			before, turn := e.express, 0
			var used time.Duration
			defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the copies below are the benchmark's garbage
			for b.Loop() {
				if turn++; turn%100 == 0 {
					b.StopTimer()
					runtime.GC()
					b.StartTimer()
				}
				now = c.change(slices.Clone(now), turn)
				start := processTime()
				apply(now)
				used += processTime() - start
			}
			b.ReportMetric(float64(used.Microseconds())/1000/float64(b.N), "cpu-ms/op")
			if e.express-before != turn {
				b.Errorf("%d of %d passes were express", e.express-before, turn)
			}
		})
	}
}

func processTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// BenchmarkMemory: what services take in the kernel.
func BenchmarkMemory(b *testing.B) {
	bed := newBed(b, "")
	_, client := bed.task(0, 50)
	bed.apply()
	e, err := New(Config{Node: bed.nodes[0], Dir: bed.mount(0)})
	must(b, err)
	defer func() { must(b, e.Close(context.Background())) }()
	ingresstest.MemoryOf(b, 10000, func(count, backends int) {
		table := ingress.Table{Networks: []ingress.Network{{VNI: vni, NetNS: bed.dir, Bridge: "none", Tasks: []string{client}}}}
		must(b, e.Apply(context.Background(), table))
		table.Networks[0].Services = manyServices(count, backends)
		must(b, e.Apply(context.Background(), table))
	})
}
