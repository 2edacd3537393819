//go:build !race

// One goroutine: there is nothing for the race detector to see, and it takes ten
// times as long with it.

package gossip_test

import (
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/gossip/gossiptest"
)

func formed(t *testing.T, n int, seed uint64) *gossiptest.Sim {
	s, err := gossiptest.Formed(n, seed)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestOneEndpoint: a new endpoint is on all of 200 nodes within 10 ms without
// loss, and within 250 ms with 10 % loss.
func TestOneEndpoint(t *testing.T) {
	const nodes = 200
	s := formed(t, nodes, 1)
	task := 0 // no set is written twice
	for _, k := range []struct {
		loss         float64
		writes       int
		p99, slowest time.Duration
	}{
		{0, 50, 10 * time.Millisecond, 10 * time.Millisecond},
		{0.02, 50, 250 * time.Millisecond, 250 * time.Millisecond},
		{0.1, 100, 250 * time.Millisecond, 250 * time.Millisecond},
	} {
		s.Loss = k.loss
		var took []time.Duration
		for w := range k.writes {
			task += 20
			d, err := s.Spread(s.Rand.IntN(nodes), gossiptest.Endpoints(task, 1+w%20))
			if err != nil {
				t.Fatal(err)
			}
			took = append(took, d)
			if err := s.Run(time.Duration(s.Rand.IntN(300)) * time.Millisecond); err != nil {
				t.Fatal(err)
			}
		}
		slices.Sort(took)
		p50, p99, worst := took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
		t.Logf("%d nodes, %3.0f %% loss, %d writes, on all nodes after: p50 %v, p99 %v, worst %v", nodes, 100*k.loss, k.writes, p50, p99, worst)
		if p99 >= k.p99 || worst >= k.slowest {
			t.Errorf("want p99 below %v and worst below %v", k.p99, k.slowest)
		}
	}
}

// TestBurst: 10,000 endpoints at once on 50 nodes are everywhere within 100 ms at
// 2 % loss.
func TestBurst(t *testing.T) {
	const nodes, each = 50, 200
	for _, loss := range []float64{0, 0.02} {
		s := formed(t, nodes, 2)
		s.Loss = loss
		clear(s.Datagrams)
		clear(s.Streams)
		d, err := s.Burst(each)
		if err != nil {
			t.Fatal(err)
		}
		bytes, streams := 0, 0
		for i := range nodes {
			bytes, streams = bytes+s.Datagrams[i], streams+s.Streams[i]
		}
		t.Logf("%d endpoints at once on %d nodes at %.0f %% loss: everywhere after %v; each node sent %d kB of datagrams, %d kB by stream",
			nodes*each, nodes, 100*loss, d, bytes/nodes/1000, streams/nodes/1000)
		if d >= 100*time.Millisecond {
			t.Error("want less than 100 ms")
		}
	}
}

// TestIdleTraffic: a cluster at rest with 100,000 endpoints costs each node less
// than 50 B/s.
func TestIdleTraffic(t *testing.T) {
	const nodes, each = 10, 10_000
	s := formed(t, nodes, 3)
	if _, err := s.Burst(each); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	perNode, err := s.AtRest(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d nodes at rest with %d endpoints: %.1f B/s for each node", nodes, nodes*each, perNode)
	if perNode >= 50 {
		t.Error("want less than 50 B/s")
	}
}

// TestMemory: what a node keeps of others' endpoints of IPv4, with all of the
// 16 bytes of a task's name. Certificates are short but where it says so.
func TestMemory(t *testing.T) {
	for _, k := range []struct {
		name  string
		p     gossiptest.Population
		limit float64
		long  bool
	}{
		{"100,000: 50 networks, 20 owners, services of 10 tasks to an owner", gossiptest.Population{Networks: 50, Owners: 20, Each: 100, PerService: 10}, 32, false},
		{"100,000: 5 networks, 200 owners, one task of each service to an owner", gossiptest.Population{Networks: 5, Owners: 200, Each: 100, PerService: 1}, 32, false},
		{"100,000: 5 networks, 1,000 owners, one task of each service to an owner", gossiptest.Population{Networks: 5, Owners: 1000, Each: 20, PerService: 1}, 32, false},
		{"100,000: the same, any slot to any owner", gossiptest.Population{Networks: 5, Owners: 1000, Each: 20, PerService: 1, Shuffled: true}, 32, true},
		{"100,000: the same, with certificates of 500 bytes", gossiptest.Population{Networks: 5, Owners: 1000, Each: 20, PerService: 1, Shuffled: true, Certificate: 500}, 0, true},
		{"1,000,000: 50 networks, 20 owners, services of 10 tasks to an owner", gossiptest.Population{Networks: 50, Owners: 20, Each: 1000, PerService: 10}, 20, false},
		{"1,000,000: 50 networks, 100 owners, services of 10 tasks to an owner", gossiptest.Population{Networks: 50, Owners: 100, Each: 200, PerService: 10}, 20, true},
		{"1,000,000: 5 networks, 1,000 owners, one task of each service to an owner", gossiptest.Population{Networks: 5, Owners: 1000, Each: 200, PerService: 1}, 20, false},
		{"1,000,000: the same, any slot to any owner, certificates of 500 bytes", gossiptest.Population{Networks: 5, Owners: 1000, Each: 200, PerService: 1, Shuffled: true, Certificate: 500}, 20, true},
	} {
		if k.long && !*gossip.Long {
			continue
		}
		c, err := k.p.Measure()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f B for each endpoint, applied in %v", k.name, c.Bytes, c.Apply)
		if k.limit > 0 && c.Bytes >= k.limit {
			t.Errorf("want less than %.0f B", k.limit)
		}
	}
}

// TestForming: nodes that all join at once know all within 5 s.
func TestForming(t *testing.T) {
	for _, loss := range []float64{0, 0.1} {
		const nodes = 200
		if loss == 0 && !*gossip.Long {
			continue
		}
		s := gossiptest.New(nodes, 5)
		s.Loss = loss
		d, err := s.Form()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d nodes that begin at once know all tables after %v at %.0f %% loss (once they know who is alive)", nodes, d, 100*loss)
		if d >= 5*time.Second {
			t.Error("want less than 5 s")
		}
	}
}
