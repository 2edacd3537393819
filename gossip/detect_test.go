package gossip

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Long is of all tests of the folder.
var Long = flag.Bool("long", false, "also what takes minutes")

// TestDeadNode: at 10 % loss nobody who is alive is thought dead, and a dead node is
// out of sight of all in time.
func TestDeadNode(t *testing.T) {
	sizes := []int{5, 10, 20}
	if *Long {
		sizes = append(sizes, 50)
	}
	for _, nodes := range sizes {
		t.Run(fmt.Sprintf("%d nodes", nodes), func(t *testing.T) { deadNode(t, nodes) })
	}
}

func deadNode(t *testing.T, nodes int) {
	quiet, crashes := time.Minute*10/time.Duration(nodes), 3
	if *Long {
		quiet, crashes = 10*time.Minute, 20
	}
	synctest.Test(t, func(t *testing.T) {
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
			n := 1 + (4+i)%nodes
			c.crash(n)
			worst = max(worst, c.await(6*time.Second, "the dead node's entries to vanish", func() bool { return c.allHave(n, 0) }))
			c.start(n).Publish(endpoints(1))
			c.await(5*time.Second, "it to return", func() bool { return c.allHave(n, 1) && c.allSee(nodes) })
		}
		if worst >= 1500*time.Millisecond {
			t.Errorf("the slowest dead node was out of sight after %v, want less than 1.5 s", worst)
		}
		var st Stats
		for _, r := range c.nodes {
			st.Doubts, st.FramesSent = st.Doubts+r.Stats().Doubts, st.FramesSent+r.Stats().FramesSent
		}
		t.Logf("%d frames, %d doubts", st.FramesSent, st.Doubts)
		t.Logf("%d nodes at 10 %% loss: no false alarm in %v, slowest of %d dead nodes out of sight after %v", nodes, quiet, crashes, worst)
	})
}

// TestDoubted: readers are told of a silent member before it is out of sight, in time
// to ask on another way, and its endpoints stay until then.
func TestDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 5)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		c.await(time.Second, "all tables", func() bool { return c.allHave(3, 3) })
		isDoubted := func() (all bool) {
			all = true
			for _, r := range c.nodes {
				members, _ := r.Members()
				all = all && slices.ContainsFunc(members, func(m Member) bool { return m.ID == nodeID(3) && m.Doubted })
			}
			return all
		}
		_, changed := c.nodes[1].Snapshot()
		c.crash(3)
		c.await(1100*time.Millisecond, "all to doubt it", isDoubted)
		if !c.allHave(3, 3) {
			t.Error("it is out of sight, and was only doubted")
		}
		select {
		case <-changed:
			t.Error("a doubt has woken readers of endpoints")
		default:
		}
		d := c.await(time.Second, "its entries to vanish", func() bool { return c.allHave(3, 0) })
		if d < 300*time.Millisecond {
			t.Errorf("it was given up %v after the last began to doubt: no time to ask its host", d)
		}
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
