package dispatch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// slowNode is an agent whose data plane is some messages behind what it heard.
type slowNode struct {
	id weft.ID
	d  *Dispatcher

	mu      sync.Mutex // guards: fields below
	heard   []wire.Assignments
	applied known
	index   uint64
}

func (n *slowNode) send(a wire.Assignments) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heard = append(n.heard, a)
	return nil
}

// catchUp carries up to k messages out and says so.
func (n *slowNode) catchUp(ctx context.Context, k int, behind ...weft.ID) error {
	n.mu.Lock()
	for ; k > 0 && len(n.heard) > 0; k-- {
		n.applied, n.index = take(n.applied, n.heard[0]), n.heard[0].Index
		n.heard = n.heard[1:]
	}
	r := wire.Report{Applied: n.index, Behind: behind}
	n.mu.Unlock()
	return n.d.Report(ctx, n.id, r)
}

// holds reports whether the data plane of the node could still lead a packet for
// a resting address to its former holder.
func (n *slowNode) holds(r state.RestingAddr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, on := n.applied.Networks[r.Network]; !on {
		return false
	}
	if r.Task {
		_, told := n.applied.Ended[r.Owner]
		return !told
	}
	return slices.ContainsFunc(n.applied.Services[r.Owner].VIPs, func(v weft.VIP) bool {
		return v.Network == r.Network && v.Addr.Addr() == r.Addr
	})
}

// TestProgressIsNeverMoreThanWasCarriedOut: whatever happens, and however far
// the nodes are behind, none is taken to have dropped what it still holds; and
// when all have caught up, all have dropped everything.
func TestProgressIsNeverMoreThanWasCarriedOut(t *testing.T) {
	for seed := range uint64(150) { // rapid's own loop does not run in a bubble
		bits := make([]byte, 1<<16)
		r := rand.NewChaCha8([32]byte{byte(seed)})
		if _, err := r.Read(bits); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			rapid.MakeFuzz(func(rt *rapid.T) { lagging(t, rt) })(t, bits)
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		})
	}
}

// lagging is one history of slow nodes.
func lagging(t *testing.T, rt *rapid.T) {
	w := newWorld(rt)
	w.base()
	ctx, cancel := context.WithCancel(t.Context())
	d := New(Config{Store: w.store, Seen: func(weft.ID) {}, Log: discard(),
		Propose: func(_ context.Context, c []state.Change) error { return w.do(c...) }})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { d.Run(ctx) })
	var nodes []*slowNode
	for i := range 3 {
		n := &slowNode{id: id("n", i+1), d: d}
		nodes = append(nodes, n)
		wg.Go(func() { d.Session(ctx, n.id, hello, n.send) })
	}
	check := func(when string) (open int) {
		synctest.Wait()
		p := d.Progress()
		for _, r := range w.store.View().AllResting() {
			for _, n := range nodes {
				has := p[n.id].Has(r.Network, r.Index)
				if has && n.holds(r) {
					rt.Fatalf("%s: %s has dropped %s of %s on %s, says its progress; it holds it", when, n.id, r.Addr, r.Owner, r.Network)
				}
				if !has {
					open++
				}
			}
		}
		return open
	}
	settle := func() { time.Sleep(time.Second); synctest.Wait() }
	tasks := 0
	for range 25 {
		switch rapid.IntRange(0, 4).Draw(rt, "op") {
		case 0, 1:
			c := drawChange(rt, w)
			if c.Task != nil { // ids of tasks are never used twice
				tasks++
				c.Task.ID = weft.ID(fmt.Sprintf("t%d.%d", tasks, tasks))
			}
			if c.Service != nil && rapid.Bool().Draw(rt, "vip") {
				for _, n := range c.Service.Spec.Networks {
					c.Service.VIPs = append(c.Service.VIPs, weft.VIP{Network: n.Network, Addr: task(9, 1, 1, n.Network).Attachments[0].Addr})
				}
			}
			_ = w.do(c)
		case 2:
			all := w.store.View().Tasks()
			if len(all) > 0 {
				k := rapid.SampledFrom(all).Draw(rt, "task")
				_ = w.do(state.Change{TaskStatus: &state.TaskStatus{Task: k.ID, Node: k.Node, Status: weft.TaskStatus{State: weft.TaskShutdown}}})
			}
		case 3:
			n := nodes[rapid.IntRange(0, len(nodes)-1).Draw(rt, "node")] // a drawn pointer would be printed whole, while others write
			if err := n.catchUp(ctx, rapid.IntRange(0, 3).Draw(rt, "messages")); err != nil {
				rt.Fatal(err)
			}
		default:
			settle()
		}
		check("under way")
	}
	settle()
	for _, n := range nodes {
		if err := n.catchUp(ctx, 1000); err != nil {
			rt.Fatal(err)
		}
	}
	if open := check("at rest"); open != 0 {
		rt.Fatalf("%d addresses wait for nodes that have carried out everything", open)
	}
}

func TestProgressOfOneNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.base()
		w.must(state.Change{Service: service(1, false, "w1")}, state.Change{Task: task(1, 1, 1, "w1")}, state.Change{Task: task(2, 1, 2, "w1")})
		ctx, cancel := context.WithCancel(t.Context())
		calls := 0
		d := New(Config{Store: w.store, Seen: func(weft.ID) {}, Log: discard(), Confirmed: func() { calls++ },
			Propose: func(_ context.Context, c []state.Change) error { return w.do(c...) }})
		var wg sync.WaitGroup
		wg.Go(func() { d.Run(ctx) })
		defer wg.Wait()
		defer cancel()
		n := &slowNode{id: "n1", d: d}
		if len(d.Progress()) != 0 {
			t.Error("a node without a session has progress")
		}
		sctx, end := context.WithCancel(ctx)
		closed := make(chan error, 1)
		go func() { closed <- d.Session(sctx, "n1", hello, n.send) }()
		settle := func() { time.Sleep(time.Second); synctest.Wait() }
		settle()
		has := func(network weft.ID) bool { return d.Progress()["n1"].Has(network, w.now()) }
		want := func(when string, w1, w2 bool) {
			t.Helper()
			if has("w1") != w1 || has("w2") != w2 {
				t.Errorf("%s: w1 %v, w2 %v; want %v, %v", when, has("w1"), has("w2"), w1, w2)
			}
		}
		want("nothing reported", false, false)
		n.catchUp(ctx, 9)
		want("all carried out", true, true)
		w.must(state.Change{TaskStatus: &state.TaskStatus{Task: "t2", Node: "n2", Status: weft.TaskStatus{State: weft.TaskFailed}}})
		want("a task elsewhere ends; n1 is not on w2", false, true)
		settle()
		want("it was told", false, false) // until the message is carried out, nothing is sure
		n.catchUp(ctx, 9, "w1")
		want("w1 is broken there", false, true)
		before := calls
		n.catchUp(ctx, 0)
		want("w1 is mended", true, true)
		if calls != before+1 {
			t.Errorf("the leader was told %d times", calls-before)
		}
		w.must(state.Change{Service: service(2, false)}) // wakes everyone, concerns nobody here
		want("nothing of it is for n1", false, true)
		settle()
		want("and n1 need not hear of it", true, true)
		end()
		if err := <-closed; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if len(d.Progress()) != 0 {
			t.Error("a node has progress after its session")
		}
	})
}
