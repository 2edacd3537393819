package orchestrator

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// tiny is a network that has five addresses to give, and a spec on it.
func (r *rig) tiny() (weft.Network, func(name string, replicas uint64) weft.ServiceSpec) {
	r.t.Helper()
	n, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "tiny", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.70.0.0/29")}}})
	r.must(err)
	return n, func(name string, replicas uint64) weft.ServiceSpec {
		s := webSpec(name, replicas)
		s.Networks = []weft.NetworkTarget{{Network: "tiny"}}
		return s
	}
}

// freeze stops a node's data plane: it goes on reporting, and carries nothing
// out any more.
func (a *agent) freeze(is bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.frozen = is
	if !is {
		a.index = a.newest
	}
}

// resting is how many addresses of a network rest, once the leader's loop and
// the state say the same.
func (r *rig) resting(n weft.Network) (count int) {
	r.t.Helper()
	t, err := r.leader().leading()
	r.must(err)
	r.eventually(5*time.Second, "the leader's loop has seen the newest state", func() error {
		count = len(t.store.View().Resting(n.ID))
		if inLoop := t.alloc.usage(n).resting; inLoop != count {
			return fmt.Errorf("%d rest by its count, %d by the state", inLoop, count)
		}
		return nil
	})
	return count
}

func TestFullNetworkIsAnErrorOfTheCall(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := r.worker(1)
		defer w.crash()
		_, on := r.tiny()
		create := func(s weft.ServiceSpec) error {
			_, err := r.leader().CreateService(r.ctx, s)
			return err
		}
		wantErr(t, "too many tasks", create(on("web", 5)), weft.ErrUnavailable,
			"service web", "network tiny", "10.70.0.0/29", "the 6 addresses", "of 5 addresses 0 are in use, 0 rest, 5 are free", "holders: none", "larger subnet")
		web, err := r.leader().CreateService(r.ctx, on("web", 3))
		r.must(err)
		r.waitRunning(web.ID, 3)
		wantErr(t, "second service", create(on("db", 1)), weft.ErrUnavailable,
			"service db", "of 5 addresses 4 are in use, 0 rest, 1 are free", "holders: service web 4")
		dnsrr := on("db", 1)
		dnsrr.EndpointMode = weft.EndpointDNSRR
		r.must(create(dnsrr)) // without an address of its own it fits
		scale := func(n uint64, image string) error {
			cur, err := r.leader().Service(r.ctx, "web")
			r.must(err)
			cur.Spec.Replicas, cur.Spec.Container.Image = n, image
			_, err = r.leader().UpdateService(r.ctx, web.ID, cur.Meta.Index, cur.Spec)
			return err
		}
		r.eventually(5*time.Second, "the network is full", func() error {
			if err := scale(4, "weft/whoami"); err == nil || !strings.Contains(err.Error(), "5 are in use, 0 rest, 0 are free; holders: service web 4, service db 1") {
				return fmt.Errorf("scaling up: %w", err)
			}
			return nil
		})
		r.must(scale(3, "weft/whoami:2")) // every task is replaced, each when there is room
		r.eventually(time.Minute, "all tasks are replaced", func() error {
			s, err := r.leader().Service(r.ctx, "web")
			r.must(err)
			if s.Update.State != weft.UpdateDone {
				return fmt.Errorf("update is %+v", s.Update)
			}
			return nil
		})
		r.checkAllocator()
	})
}

func TestFreedAddressesRestUntilTheyAreDropped(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		a, b := r.worker(1), r.worker(2)
		defer a.crash()
		defer b.crash()
		n, on := r.tiny()
		web, err := r.leader().CreateService(r.ctx, on("web", 4))
		r.must(err)
		r.waitRunning(web.ID, 4, a, b)
		b.freeze(true)
		r.must(r.leader().RemoveService(r.ctx, web.ID))
		r.eventually(5*time.Second, "all addresses rest", func() error {
			if got := r.resting(n); got != 5 {
				return fmt.Errorf("%d rest", got)
			}
			return nil
		})
		_, err = r.leader().CreateService(r.ctx, on("db", 4))
		wantErr(t, "only resting addresses", err, weft.ErrUnavailable, "network tiny", "of 5 addresses 0 are in use, 5 rest", "every node has dropped them, within 1m0s", "0 are free")
		time.Sleep(50 * time.Second)
		if got := r.resting(n); got != 5 {
			t.Fatalf("%d of 5 addresses rest while a node has not dropped them", got)
		}
		b.freeze(false)
		r.eventually(time.Second, "the node's word ends the rest", func() error {
			if got := r.resting(n); got != 0 {
				return fmt.Errorf("%d rest", got)
			}
			return nil
		})
		db, err := r.leader().CreateService(r.ctx, on("db", 4))
		r.must(err)
		r.waitRunning(db.ID, 4)
		r.checkAllocator()

		// A node that never says so is waited for as long as the bound, one
		// that is down not at all.
		b.freeze(true)
		r.must(r.leader().RemoveService(r.ctx, db.ID))
		start := time.Now()
		r.eventually(70*time.Second, "the rest is over", func() error {
			if got := r.resting(n); got != 0 {
				return fmt.Errorf("%d rest", got)
			}
			return nil
		})
		if d := time.Since(start); d < restBound-time.Second {
			t.Errorf("addresses rested for %s only", d)
		}
		b.freeze(false)
		last, err := r.leader().CreateService(r.ctx, on("last", 4))
		r.must(err)
		r.waitRunning(last.ID, 4, a, b)
		b.crash()
		r.eventually(30*time.Second, "the silent node is down", func() error {
			nodes, err := r.leader().Nodes(r.ctx)
			r.must(err)
			for _, n := range nodes {
				if n.ID == b.id && n.Status.State == weft.NodeDown {
					return nil
				}
			}
			return errors.New("it is not")
		})
		r.must(r.leader().RemoveService(r.ctx, last.ID))
		r.eventually(weft.ServiceNameTTL+time.Second, "the addresses of the live node's tasks are free", func() error {
			lead, err := r.leader().leading()
			r.must(err)
			if u := lead.alloc.usage(n); u.held != 2 || u.resting != 0 { // a lost node's tasks may run on
				return fmt.Errorf("usage is %+v", u)
			}
			return nil
		})
		b.start()
	})
}

// Names that led to an address may be remembered for a while after everything
// else has been dropped.
func TestAddressesRestAsLongAsTheirNames(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		a := r.worker(1)
		defer a.crash()
		n, on := r.tiny()
		web, err := r.leader().CreateService(r.ctx, on("web", 4))
		r.must(err)
		r.waitRunning(web.ID, 4, a)
		freed := map[bool]time.Time{} // by whether a task had it
		r.must(r.leader().RemoveService(r.ctx, web.ID))
		lead, err := r.leader().leading()
		r.must(err)
		for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
			for _, k := range lead.store.View().Resting(n.ID) {
				if _, ok := freed[k.Task]; !ok {
					freed[k.Task] = time.Now()
				}
			}
			rest := map[bool]int{}
			for _, k := range lead.store.View().Resting(n.ID) {
				rest[k.Task]++
			}
			for _, isTask := range []bool{true, false} {
				since, ok := freed[isTask]
				ttl, full := weft.ServiceNameTTL, 1
				if isTask {
					ttl, full = weft.TaskNameTTL, 4
				}
				switch d := time.Since(since); {
				case !ok:
				case d < ttl-300*time.Millisecond && rest[isTask] == 0:
					t.Fatalf("task %v: addresses are free after %s", isTask, d)
				case d > ttl+time.Second && rest[isTask] != 0:
					t.Fatalf("task %v: %d of %d addresses rest after %s", isTask, rest[isTask], full, d)
				}
			}
		}
		if len(freed) != 2 {
			t.Errorf("seen at rest: %v", freed)
		}
	})
}

func TestRestSurvivesTheLeader(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		a := r.worker(1)
		defer a.crash()
		n, on := r.tiny()
		web, err := r.leader().CreateService(r.ctx, on("web", 4))
		r.must(err)
		r.waitRunning(web.ID, 4, a)
		a.freeze(true)
		r.must(r.leader().RemoveService(r.ctx, web.ID))
		r.eventually(5*time.Second, "all addresses rest", func() error {
			if got := r.resting(n); got != 5 {
				return fmt.Errorf("%d rest", got)
			}
			return nil
		})
		r.stop(r.leader())
		if got := r.resting(n); got != 5 {
			t.Fatalf("%d of 5 addresses rest under the next leader", got)
		}
		_, err = r.leader().CreateService(r.ctx, on("db", 1))
		wantErr(t, "only resting addresses", err, weft.ErrUnavailable, "5 rest")
		r.checkAllocator()
		time.Sleep(30 * time.Second)
		if got := r.resting(n); got != 5 {
			t.Fatalf("%d of 5 addresses rest while a node has not dropped them", got)
		}
		a.freeze(false)
		r.eventually(5*time.Second, "the node's word ends the rest", func() error {
			if got := r.resting(n); got != 0 {
				return fmt.Errorf("%d rest", got)
			}
			return nil
		})
		db, err := r.leader().CreateService(r.ctx, on("db", 4))
		r.must(err)
		r.waitRunning(db.ID, 4, a)
		r.checkAllocator()
	})
}

func TestNumbersOfARemovedNetworkRest(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		a := r.worker(1)
		defer a.crash()
		time.Sleep(time.Second)
		old, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "old"})
		r.must(err)
		a.freeze(true)
		// A node that has carried out all that it was told of has nothing of a
		// network that it was told nothing of. This one has not.
		_, err = r.leader().CreateService(r.ctx, webSpec("busy", 1))
		r.must(err)
		r.eventually(5*time.Second, "the node is told of more than it carries out", func() error {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.newest == a.index {
				return errors.New("it is not")
			}
			return nil
		})
		r.must(r.leader().RemoveNetwork(r.ctx, old.ID))
		r.stop(r.leader())
		next, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "next"})
		r.must(err)
		if next.VNI == old.VNI || next.Spec.Subnets[0].Prefix == old.Spec.Subnets[0].Prefix {
			t.Errorf("network next took over VNI %d, subnet %s", next.VNI, next.Spec.Subnets[0].Prefix)
		}
		a.freeze(false)
		r.eventually(restBound+5*time.Second, "the numbers are free", func() error {
			lead, err := r.leader().leading()
			r.must(err)
			if n := lead.store.View().RestingNetworks(); len(n) != 0 {
				return fmt.Errorf("%d rest", len(n))
			}
			return nil
		})
		third, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "third"})
		r.must(err)
		if third.VNI != old.VNI {
			t.Errorf("VNI %d, want %d again", third.VNI, old.VNI)
		}
	})
}

// With pools that are used up but for a subnet that rests, the call says so.
func TestOnlyARestingSubnetIsLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		c := testCluster()
		c.AddrPools = []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("10.60.0.0/20")}
		r.bootWith(c, 1)
		a := r.worker(1)
		defer a.crash()
		time.Sleep(time.Second)
		a.freeze(true)
		m := r.leader()
		n, err := m.CreateNetwork(r.ctx, weft.NetworkSpec{Name: "only"})
		r.must(err)
		_, err = m.CreateNetwork(r.ctx, weft.NetworkSpec{Name: "more"})
		wantErr(t, "pools are used up", err, weft.ErrUnavailable, "network more", "10.60.0.0/20", "in the way")
		r.must(m.RemoveNetwork(r.ctx, n.ID))
		_, err = m.CreateNetwork(r.ctx, weft.NetworkSpec{Name: "more"})
		wantErr(t, "the subnet rests", err, weft.ErrUnavailable, "network more", "10.60.0.0/20 is free but rests")
		a.freeze(false)
		r.eventually(5*time.Second, "the subnet is free", func() error {
			_, err := m.CreateNetwork(r.ctx, weft.NetworkSpec{Name: "more"})
			return err
		})
	})
}

// A node that joins with a range that a network has already joins all the same;
// the network is refused on it by name, the ingress network, too.
func TestNetworkIsRefusedOnAHostThatUsesItsRange(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.leader(), r.ctx
		front, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "front"}) // 10.0.0.0/20
		r.must(err)
		good := r.worker(1)
		bad := r.worker(2, netip.MustParsePrefix("10.0.3.0/24"), netip.MustParsePrefix("10.255.7.0/24"))
		defer good.crash()
		defer bad.crash()
		time.Sleep(time.Second)
		create := func(name string, mode weft.ServiceMode, edit func(*weft.ServiceSpec)) weft.ID {
			s := webSpec(name, 4)
			if s.Mode = mode; mode == weft.ModeGlobal {
				s.Replicas = 0
			}
			edit(&s)
			svc, err := m.CreateService(ctx, s)
			r.must(err)
			return svc.ID
		}
		onFront := func(s *weft.ServiceSpec) { s.Networks = []weft.NetworkTarget{{Network: "front"}} }
		r.waitRunning(create("web", weft.ModeReplicated, onFront), 4, good)
		r.waitRunning(create("published", weft.ModeReplicated, func(s *weft.ServiceSpec) { s.Ports = []weft.PortSpec{{Target: 80}} }), 4, good)
		r.waitRunning(create("plain", weft.ModeGlobal, func(*weft.ServiceSpec) {}), 2, good, bad)
		every := create("every", weft.ModeGlobal, onFront)
		r.waitRunning(every, 1, good)
		list, err := m.Tasks(ctx, weft.TaskFilter{Services: []weft.ID{every}})
		r.must(err)
		for _, k := range list.Tasks {
			if k.Node == bad.id && !strings.Contains(k.Status.Err, "network front (10.0.0.0/20) overlaps 10.0.3.0/24 in use on node w2") {
				t.Errorf("the task of %s says %q", bad.name, k.Status.Err)
			}
		}
		nodes, err := m.Nodes(ctx)
		r.must(err)
		for _, n := range nodes {
			msg := n.Status.Message
			if n.ID == bad.id && (!strings.Contains(msg, "network front (10.0.0.0/20) is refused here: it overlaps 10.0.3.0/24") ||
				!strings.Contains(msg, "network ingress (10.255.0.0/16) is refused here: it overlaps 10.255.7.0/24")) || n.ID == good.id && msg != "" {
				t.Errorf("node %s says %q", n.Description.Hostname, msg)
			}
		}
		v := m.Store().View()
		in, _ := v.Ingress()
		for _, c := range []struct {
			a    *agent
			want bool
		}{{good, true}, {bad, false}} {
			c.a.mu.Lock()
			if got := c.a.networks[in.ID]; got != c.want || c.a.networks[front.ID] != c.want {
				t.Errorf("node %s is told of the ingress network: %v, of front: %v; want %v", c.a.name, got, c.a.networks[front.ID], c.want)
			}
			c.a.mu.Unlock()
		}
		// What any node uses is in nobody's way from now on.
		next, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "next"})
		r.must(err)
		if p := next.Spec.Subnets[0].Prefix; p.String() != "10.0.16.0/20" {
			t.Errorf("network next has %s", p)
		}
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "x", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.99.1.0/24")}}})
		wantErr(t, "the nodes' own addresses", err, weft.ErrConflict, "the address of node w", "10.99.1.")
	})
}

func TestFullErrorIsStable(t *testing.T) {
	n := weft.Network{Spec: weft.NetworkSpec{Name: "net", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.70.0.0/29")}}}}
	p := n.Spec.Subnets[0].Prefix
	one := &fullError{net: n, usage: occupancy{subnet: p, size: 5, held: 3, resting: 2}}
	two := &fullError{net: n, usage: occupancy{subnet: p, size: 5, held: 4, resting: 1}}
	if one.Error() != two.Error() || !errors.Is(one, weft.ErrUnavailable) {
		t.Errorf("the status of a task that waits would change all the time: %q, %q", one, two)
	}
	if got := weft.Text(one); !strings.HasSuffix(got, "at most 1m0s") || !strings.Contains(got, "network net: subnet 10.70.0.0/29") {
		t.Errorf("people read %q", got)
	}
}

// TestRestDoesNotFloodTheLog: however many tasks end at once, what they had
// costs no entry each, neither to lay down nor to release.
func TestRestDoesNotFloodTheLog(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		var nodes []*agent
		for i := range 4 {
			a := r.worker(i + 1)
			defer a.crash()
			nodes = append(nodes, a)
		}
		n, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "front"})
		r.must(err)
		const tasks = 2000
		spec := webSpec("web", tasks)
		spec.Networks = []weft.NetworkTarget{{Network: "front"}}
		web, err := r.leader().CreateService(r.ctx, spec)
		r.must(err)
		r.waitRunning(web.ID, tasks, nodes...)
		lead, err := r.leader().leading()
		r.must(err)
		before := lead.store.Index()
		r.must(r.leader().RemoveService(r.ctx, web.ID))
		most := 0
		r.eventually(30*time.Second, "all addresses have rested", func() error {
			most = max(most, len(lead.store.View().Resting(n.ID)))
			if u := lead.alloc.usage(n); u.held+u.resting != 0 {
				return fmt.Errorf("usage is %+v", u)
			}
			return nil
		})
		entries := lead.store.Index() - before
		t.Logf("%d tasks ended and rested, %d at a time, with %d entries of the log", tasks, most, entries)
		if most < tasks/2 || entries > tasks/20 {
			t.Errorf("%d entries for %d tasks, of which %d rested at a time", entries, tasks, most)
		}
	})
}

// BenchmarkLookAtWhatRests is one look of the leader's loop, of which there are
// at most 20 a second, at the addresses of 10,000 tasks on 100 nodes.
func BenchmarkLookAtWhatRests(b *testing.B) {
	s := state.New()
	net := weft.Network{ID: "n", VNI: 4097, Spec: weft.NetworkSpec{Name: "front", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.0.0.0/16")}}}}
	changes := []state.Change{{Network: &net}, {Service: &weft.Service{ID: "s", SpecVersion: 1, Spec: weft.ServiceSpec{Name: "web"}}}}
	for i := range 100 {
		changes = append(changes, state.Change{Node: &weft.Node{ID: weft.ID(fmt.Sprintf("n%d", i)), Status: weft.NodeStatus{State: weft.NodeReady}}})
	}
	addr := netip.MustParseAddr("10.0.0.2")
	for i := range 10_000 {
		id := weft.ID(fmt.Sprintf("t%d", i))
		changes = append(changes, state.Change{Task: &weft.Task{ID: id, Service: "s", SpecVersion: 1, Node: "n0", Status: weft.TaskStatus{State: weft.TaskAssigned},
			Attachments: []weft.Attachment{{Network: "n", Addr: netip.PrefixFrom(addr, 16)}}}}, state.Change{Delete: &state.Ref{Kind: state.KindTask, ID: id}})
		addr = addr.Next()
	}
	e, err := state.EncodeEntry([]state.Command{{At: time.Unix(1, 0).UTC(), Changes: changes}})
	if err != nil {
		b.Fatal(err)
	}
	if errs, err := s.Apply(1, e); err != nil || errs[0] != nil {
		b.Fatal(err, errs)
	}
	v, r, now := s.View(), &rests{}, time.Now()
	for b.Loop() {
		if out, _ := r.plan(v, nil, now); len(out.Addrs) != 0 {
			b.Fatal("nobody has confirmed")
		}
	}
}
