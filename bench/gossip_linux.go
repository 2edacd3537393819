package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/weftnet/weft/gossip/gossiptest"
)

// Cases of bench gossip: nodes on real sockets, and weft's table in virtual time.
const (
	tablePeer    = "networkdb"
	tableWeft    = "weft"
	tableVirtual = "virtual"
)

// tablePatience bounds one run of one case. 10, 50 and 200 nodes take 3 minutes on two cores.
const tablePatience = 10 * time.Minute

// networkDB is where the bench finds its peer.
const networkDB = "bin/networkdb"

// What is measured of a number of nodes on real sockets.
const (
	tableJoined = "joined" // from the start until every node knows every node's first endpoint
	tableP50    = "p50"    // of a change: until all other nodes see it
	tableP99    = "p99"
	tableWorst  = "worst"
	busyP50     = "busy p50" // the same while other endpoints come and go
	busyP99     = "busy p99"
	busyWorst   = "busy worst"
	tableCPU    = "CPU of a busy change" // of all nodes together
	tableBytes  = "traffic"              // of a node, while changes are made; IP headers counted
	burst10k    = "10k at once"
	burst1k     = "1k at once"
)

// What is measured in virtual time, without -metric.
const (
	virtualP50    = "200 virtual nodes: p50"
	virtualP99    = "200 virtual nodes: p99"
	virtualWorst  = "200 virtual nodes: worst"
	virtualLossy  = "200 virtual nodes with 10 % loss: worst"
	virtualForm   = "200 virtual nodes: joined"
	virtualBurst  = "50 virtual nodes with 2 % loss: 10k at once"
	restOf        = "at rest with %s"
	memoryOf100k  = "memory of 100k from 20 owners"
	memoryOf1m    = "memory of 1M from 20 owners"
	memoryOf1mOne = "memory of 1M from 1000 owners"
)

var restSizes = []struct {
	name string
	each int
}{{"1k", 100}, {"10k", 1000}, {"100k", 10_000}}

// Nodes of one process on real sockets: of bench gossip, and of bench gossipnodes.
var (
	tableSizes = []int{20}
	nodesSizes = []int{10, 50, 200}
)

func tableMetric(nodes int, name string) string { return fmt.Sprintf("%d nodes: %s", nodes, name) }

// tableMetrics are what is measured of nodes on real sockets. usual are the names of
// those without -metric: not burst1k, that NetworkDB can take part in.
func tableMetrics(sizes []int) (all []metric, usual []string) {
	for _, n := range sizes {
		for _, m := range []metric{
			{tableJoined, "s", true}, {tableP50, "ms", true}, {tableP99, "ms", true}, {tableWorst, "ms", true},
			{busyP50, "ms", true}, {busyP99, "ms", true}, {busyWorst, "ms", true}, {tableCPU, "CPU-ms", true},
			{tableBytes, "B/s of a node", true}, {burst10k, "ms", false}, {burst1k, "ms", true},
		} {
			if m.Name != burst1k {
				usual = append(usual, tableMetric(n, m.Name))
			}
			m.Name = tableMetric(n, m.Name)
			all = append(all, m)
		}
	}
	return all, usual
}

// virtualMetrics are what is measured of weft's table in virtual time.
func virtualMetrics() []metric {
	var all []metric
	for _, name := range []string{virtualP50, virtualP99, virtualWorst, virtualLossy, virtualForm, virtualBurst} {
		all = append(all, metric{name, "virtual ms", false})
	}
	for _, r := range restSizes {
		all = append(all, metric{fmt.Sprintf(restOf, r.name), "B/s of a node at rest", false})
	}
	for _, name := range []string{memoryOf100k, memoryOf1m, memoryOf1mOne} {
		all = append(all, metric{name, "B for an endpoint", false})
	}
	return all
}

// tableAbout says what is done with nodes on real sockets.
func tableAbout() string {
	return fmt.Sprintf("the endpoint table beside NetworkDB: nodes in one process each, encrypted, on loopback in a namespace, of which %d join at a time; %d changes, one every %v, until all other nodes see each, then %d while %d other endpoints a second come and go",
		joining, quietChanges, changeEvery, busyChanges, int(time.Second/churnEvery))
}

func gossipBench() benchmark {
	all, usual := tableMetrics(tableSizes)
	for _, m := range virtualMetrics() {
		all, usual = append(all, m), append(usual, m.Name)
	}
	return benchmark{
		Name:    "gossip",
		About:   fmt.Sprintf("%s; and weft's table in virtual time with links of %v", tableAbout(), gossiptest.Latency),
		Linked:  true,
		Choices: choices{Cases: []string{tableWeft, tableVirtual}, Usual: []string{tableWeft, tableVirtual}, Metrics: metricNames(all), UsualMetrics: usual},
		Prepare: func(_ context.Context, r *rig) (plan, error) { return prepareGossip(r, tableSizes, all) },
	}
}

func gossipNodesBench() benchmark {
	all, usual := tableMetrics(nodesSizes)
	return benchmark{
		Name:    "gossipnodes",
		About:   tableAbout() + "; few nodes, and more than the machine has processors for",
		Linked:  true,
		Choices: choices{Cases: []string{tableWeft}, Usual: []string{tableWeft}, Metrics: metricNames(all), UsualMetrics: usual},
		Prepare: func(_ context.Context, r *rig) (plan, error) { return prepareGossip(r, nodesSizes, all) },
	}
}

func metricNames(metrics []metric) []string {
	var out []string
	for _, m := range metrics {
		out = append(out, m.Name)
	}
	return out
}

func gossipLimits() []limit {
	out := []limit{
		{Case: tableWeft, Metric: tableMetric(20, tableP50), Most: 10},
		{Case: tableWeft, Metric: tableMetric(20, tableP99), Most: 50},
		{Case: tableWeft, Metric: tableMetric(20, burst10k), Most: 1000},
		{Case: tableVirtual, Metric: virtualP99, Most: 10},
		{Case: tableVirtual, Metric: virtualLossy, Most: 250},
		{Case: tableVirtual, Metric: virtualForm, Most: 5000},
		{Case: tableVirtual, Metric: virtualBurst, Most: 100},
		{Case: tableVirtual, Metric: memoryOf100k, Most: 32},
		{Case: tableVirtual, Metric: memoryOf1m, Most: 20},
		{Case: tableVirtual, Metric: memoryOf1mOne, Most: 20},
	}
	for _, r := range restSizes {
		out = append(out, limit{Case: tableVirtual, Metric: fmt.Sprintf(restOf, r.name), Most: 50})
	}
	return out
}

// prepareGossip prepares the measuring of what is chosen of all metrics.
func prepareGossip(r *rig, sizes []int, all []metric) (plan, error) {
	all = slices.DeleteFunc(slices.Clone(all), func(m metric) bool { return !slices.Contains(r.metrics, m.Name) })
	wanted := map[string]bool{}
	for _, m := range all {
		wanted[m.Name] = true
	}
	self, err := os.Executable()
	if err != nil {
		return plan{}, fmt.Errorf("find this program: %w", err)
	}
	peer, err := filepath.Abs(networkDB)
	if err == nil {
		_, err = os.Stat(peer)
	}
	if err != nil {
		return plan{}, fmt.Errorf("%w: build it with `go build -C bench/peers/networkdb -o ../../../%s .`", err, networkDB)
	}
	p := plan{
		Metrics: all, Limits: limitsOn(gossipLimits(), tablePeer, r.cases, r.metrics), Restless: true, Patience: tablePatience,
		Baseline: variant{tablePeer, func(ctx context.Context) (sample, error) {
			return measureTable(ctx, sizes, wanted, false, peer)
		}},
	}
	seed := uint64(0)
	for _, c := range r.cases {
		v := variant{c, func(ctx context.Context) (sample, error) {
			return measureTable(ctx, sizes, wanted, true, self, gossipWord)
		}}
		if c == tableVirtual {
			v.Run = func(context.Context) (sample, error) {
				seed++
				return measureVirtual(wanted, seed)
			}
		}
		p.Cases = append(p.Cases, v)
	}
	return p, nil
}

// measureTable measures what is wanted of nodes on real sockets. It takes minutes
// until NetworkDB has spread 10,000 endpoints: that only weft does.
func measureTable(ctx context.Context, sizes []int, wanted map[string]bool, isWeft bool, command ...string) (sample, error) {
	out := sample{}
	for _, n := range sizes {
		parts := map[string]bool{}
		for _, name := range []string{tableJoined, tableP50, tableP99, tableWorst, busyP50, busyP99, busyWorst, tableCPU, tableBytes, burst10k, burst1k} {
			parts[name] = wanted[tableMetric(n, name)] && (isWeft || name != burst10k)
		}
		got, err := runFleet(ctx, n, parts, exec.Command(command[0], command[1:]...))
		if err != nil {
			return nil, fmt.Errorf("%d nodes: %w", n, err)
		}
		for name, v := range got {
			if parts[name] {
				out[tableMetric(n, name)] = v
			}
		}
	}
	return out, nil
}

// measureVirtual measures what is wanted of weft's table in virtual time.
func measureVirtual(wanted map[string]bool, seed uint64) (sample, error) {
	out := sample{}
	ms := func(name string, d time.Duration) { out[name] = d.Seconds() * 1e3 }
	var errs []error
	part := func(f func() error, names ...string) {
		if slices.ContainsFunc(names, func(n string) bool { return wanted[n] }) {
			errs = append(errs, f())
		}
	}
	part(func() error {
		took, err := virtualChanges(seed, quietChanges, 0)
		ms(virtualP50, percentile(took, 50))
		ms(virtualP99, percentile(took, 99))
		ms(virtualWorst, percentile(took, 100))
		return err
	}, virtualP50, virtualP99, virtualWorst)
	part(func() error {
		took, err := virtualChanges(seed, busyChanges, 0.1)
		ms(virtualLossy, percentile(took, 100))
		return err
	}, virtualLossy)
	part(func() error {
		d, err := gossiptest.New(200, seed).Form()
		ms(virtualForm, d)
		return err
	}, virtualForm)
	part(func() error {
		s, err := gossiptest.Formed(50, seed)
		if err != nil {
			return err
		}
		s.Loss = 0.02
		d, err := s.Burst(200)
		ms(virtualBurst, d)
		return err
	}, virtualBurst)
	for _, r := range restSizes {
		name := fmt.Sprintf(restOf, r.name)
		part(func() error {
			v, err := virtualRest(seed, r.each)
			out[name] = v
			return err
		}, name)
	}
	for name, p := range map[string]gossiptest.Population{
		memoryOf100k:  {Networks: 50, Owners: 20, Each: 100, PerService: 10},
		memoryOf1m:    {Networks: 50, Owners: 20, Each: 1000, PerService: 10},
		memoryOf1mOne: {Networks: 5, Owners: 1000, Each: 200, PerService: 1},
	} {
		part(func() error {
			c, err := p.Measure()
			out[name] = c.Bytes
			return err
		}, name)
	}
	for name := range out {
		if !wanted[name] {
			delete(out, name)
		}
	}
	return out, errors.Join(errs...)
}

// virtualChanges are the times, in order, until changes of one of 200 nodes are on
// all.
func virtualChanges(seed uint64, changes int, loss float64) ([]time.Duration, error) {
	s, err := gossiptest.Formed(200, seed)
	if err != nil {
		return nil, err
	}
	s.Loss = loss
	var took []time.Duration
	for c := range changes {
		d, err := s.Spread(s.Rand.IntN(len(s.Nodes)), gossiptest.Endpoints(20*c, 1+c%20))
		if err != nil {
			return nil, err
		}
		took = append(took, d)
		if err := s.Run(changeEvery); err != nil {
			return nil, err
		}
	}
	slices.Sort(took)
	return took, nil
}

// virtualRest is what each of ten nodes sends that have so many endpoints each and
// change nothing.
func virtualRest(seed uint64, each int) (float64, error) {
	s, err := gossiptest.Formed(10, seed)
	if err != nil {
		return 0, err
	}
	if _, err := s.Burst(each); err != nil {
		return 0, err
	}
	if err := s.Run(10 * time.Second); err != nil {
		return 0, err
	}
	return s.AtRest(time.Minute)
}
