package gossip

import (
	"context"
	"flag"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// quietFor is how long the long form of TestDeadNodeOnSockets waits for false alarms.
var quietFor = flag.Duration("quiet", 10*time.Minute, "time without deaths, with -long")

// lossy is a transport of real sockets that loses a part of what it sends.
type lossy struct {
	*sockets
	loss float64
}

func (l *lossy) WriteTo(b []byte, addr string) (time.Time, error) {
	return l.WriteToAddress(b, memberlist.Address{Addr: addr})
}

func (l *lossy) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	if rand.Float64() < l.loss {
		return time.Now(), nil
	}
	return l.sockets.WriteToAddress(b, a)
}

// socketNode is a node of TestDeadNodeOnSockets.
type socketNode struct {
	*Gossip
	addr netip.AddrPort
	stop context.CancelFunc
	done chan error
}

func startSocketNode(t *testing.T, a *authority, n int, addr netip.AddrPort, seeds func() []netip.AddrPort) *socketNode {
	t.Helper()
	inner, err := openSockets(addr, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	g, err := New(Config{
		Node: nodeID(n), Advertise: addr, VTEP: testVTEP(n), Keys: testKeys(), Identity: a.of(nodeID(n)),
		Log: slog.New(slog.DiscardHandler), Transport: &lossy{inner, 0.1}, Seeds: seeds,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	r := &socketNode{Gossip: g, addr: addr, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- g.Run(ctx) }()
	g.Attach(testNets())
	g.Publish(endpoints(n))
	return r
}

// end stops a node without a word.
func (r *socketNode) end(t *testing.T) {
	t.Helper()
	r.stop()
	if err := <-r.done; err != nil {
		t.Error(err)
	}
}

// goneLimit is how soon a dead node's entries are gone everywhere, as is asked of it.
const goneLimit = 1500 * time.Millisecond

// loadCores keeps each core busy with two other processes until the test ends.
func loadCores(t *testing.T) {
	t.Helper()
	for range 2 * runtime.NumCPU() {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Wait() }) // it was killed: the context ends before
	}
}

// TestDeadNodeOnSockets is TestDeadNode on real sockets and in real time, at 10 % loss
// of datagrams. Its long form is 20 nodes for ten minutes and 30 deaths, beside two busy
// loops a core. The short form holds no time against anyone.
func TestDeadNodeOnSockets(t *testing.T) {
	size, quiet, deaths := 5, 2*time.Second, 1
	if *Long {
		size, quiet, deaths = 20, *quietFor, 30
		loadCores(t)
	}
	a := newAuthority(t)
	nodes := map[int]*socketNode{}
	start := func(n int, addr netip.AddrPort) {
		var seeds []netip.AddrPort
		for _, r := range nodes {
			seeds = append(seeds, r.addr)
		}
		nodes[n] = startSocketNode(t, a, n, addr, func() []netip.AddrPort { return seeds })
	}
	whole := func() bool {
		for _, r := range nodes {
			if m, _ := r.Members(); len(m) != len(nodes) {
				return false
			}
			for n := range nodes {
				if count(r.Gossip, n) != n {
					return false
				}
			}
		}
		return true
	}
	meet := func(what string) {
		t.Helper()
		for limit := time.Now().Add(30 * time.Second); !whole(); pauseFor(5 * time.Millisecond) {
			if time.Now().After(limit) {
				for n, r := range nodes {
					m, _ := r.Members()
					all, _ := r.Snapshot()
					t.Logf("node %d sees %d members and %d endpoints, %+v", n, len(m), len(all), r.Stats())
				}
				t.Fatalf("waited 30 s for %s", what)
			}
		}
	}
	for n := 1; n <= size; n++ {
		start(n, freePort(t))
	}
	meet("the nodes to meet")
	sum := func(of func(Stats) uint64) (all uint64) {
		for _, r := range nodes {
			all += of(r.Stats())
		}
		return all
	}
	silences := func(s Stats) uint64 { return s.Silences }
	before, alarms := sum(silences), 0
	for end := time.Now().Add(quiet); time.Now().Before(end); pauseFor(10 * time.Millisecond) {
		if !whole() {
			alarms++
		}
	}
	after := sum(silences)
	t.Logf("%d nodes at 10 %% loss for %v: %d false alarms, %d doubts, something was out of sight for %d hundredths of a second",
		size, quiet, after-before, sum(func(s Stats) uint64 { return s.Doubts }), alarms)
	if after != before || alarms > 0 {
		t.Error("false alarms")
	}
	var took []time.Duration
	for i := range deaths {
		pauseFor(time.Duration(rand.IntN(1000)) * time.Millisecond)
		n := 1 + i%size
		dead := nodes[n]
		delete(nodes, n)
		began := time.Now()
		dead.end(t)
		for _, r := range nodes {
			await(t, "the dead node's entries to vanish", func() (bool, <-chan struct{}) {
				_, changed := r.Snapshot()
				return count(r.Gossip, n) == 0, changed
			})
		}
		took = append(took, time.Since(began))
		start(n, dead.addr)
		meet("it to return")
	}
	slices.Sort(took)
	t.Logf("%d deaths: entries gone everywhere after %v (median), the slowest %v", deaths, took[deaths/2], took[max(0, deaths-5):])
	if worst := took[deaths-1]; *Long && worst >= goneLimit {
		t.Errorf("the slowest took %v, want less than %v", worst, goneLimit)
	}
	for _, r := range nodes {
		r.end(t)
	}
}

// pauseFor waits in real time.
func pauseFor(d time.Duration) { <-time.After(d) }
