package gossip

import (
	"context"
	"flag"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// Long is of all tests of the folder.
var Long = flag.Bool("long", false, "also what takes minutes")

// TestDeadNode: at 10 % loss nobody who is alive is thought dead for ten minutes,
// and a dead node is out of sight of all in time.
func TestDeadNode(t *testing.T) {
	quiet, crashes := time.Minute, 2
	if *Long {
		quiet, crashes = 10*time.Minute, 5
	}
	synctest.Test(t, func(t *testing.T) {
		const nodes = 10
		c := newCluster(t, nodes)
		defer c.close()
		c.f.mu.Lock()
		c.f.loss = 0.1
		c.f.mu.Unlock()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		alarms := 0
		for end := time.Now().Add(quiet); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if !c.allSee(nodes) {
				alarms++
			}
		}
		if alarms > 0 {
			t.Errorf("in %v somebody was thought dead for %d hundredths of a second", quiet, alarms)
		}
		var worst time.Duration
		for i := range crashes {
			c.crash(5 + i)
			worst = max(worst, c.await(6*time.Second, "the dead node's entries to vanish", func() bool { return c.allHave(5+i, 0) }))
			c.start(5 + i).Publish(endpoints(1))
			c.await(5*time.Second, "it to return", func() bool { return c.allHave(5+i, 1) && c.allSee(nodes) })
		}
		t.Logf("%d nodes at 10 %% loss: no false alarm in %v, slowest of %d dead nodes out of sight after %v", nodes, quiet, crashes, worst)
	})
}

// TestAddressChange: a node that comes back with another address is found there.
func TestAddressChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 4)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		c.await(time.Second, "all tables", func() bool { return c.allHave(3, 3) && c.allHave(4, 4) })
		c.crash(3)
		g, err := New(Config{
			Node: nodeID(3), Advertise: testAddr(33), VTEP: testVTEP(33), Keys: testKeys(), Identity: c.ca.of(nodeID(3)),
			Log: slog.New(slog.DiscardHandler), Transport: c.f.port(testAddr(33)),
			Seeds: func() []netip.AddrPort { return []netip.AddrPort{testAddr(1)} },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		moved := &running{Gossip: g, stop: stop, done: make(chan error, 1)}
		go func() { moved.done <- g.Run(ctx) }()
		c.nodes[3] = moved
		g.Attach(testNets())
		g.Publish(endpoints(7))
		d := c.await(10*time.Second, "the node at its new address", func() bool {
			for _, r := range c.nodes {
				n := 0
				all, _ := r.Snapshot()
				for _, e := range all {
					if e.Owner == nodeID(3) && e.VTEP == testVTEP(33) {
						n++
					}
				}
				if n != 7 {
					return false
				}
			}
			return true
		})
		t.Logf("a node that came back at once with another address is known there after %v", d)
		c.nodes[1].Publish(endpoints(9))
		c.await(time.Second, "news at the new address", func() bool { return c.allHave(1, 9) })
	})
}
