package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
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

// Ids: nodes n1…n3, services s1…s3, networks i (ingress), w1, w2, tasks t1…t20.

func id(kind string, n int) weft.ID { return weft.ID(fmt.Sprintf("%s%d", kind, n)) }

// world applies commands to a store, as Raft would.
type world struct {
	tb    interface{ Fatal(...any) }
	store *state.Store
	mu    sync.Mutex // guards: index, tasks
	index uint64
	tasks map[weft.ID]bool // that there have been
}

func newWorld(tb interface{ Fatal(...any) }) *world {
	return &world{tb: tb, store: state.New(), tasks: map[weft.ID]bool{}}
}

// now is the index of the last change.
func (w *world) now() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.index
}

func (w *world) do(changes ...state.Change) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.index++
	b, err := state.EncodeEntry([]state.Command{{At: time.Unix(int64(w.index), 0).UTC(), Changes: changes}})
	if err != nil {
		w.tb.Fatal(err)
	}
	errs, err := w.store.Apply(w.index, b)
	if err != nil {
		w.tb.Fatal(err)
	}
	for _, c := range changes {
		if c.Task != nil && errs[0] == nil {
			w.tasks[c.Task.ID] = true
		}
	}
	return errs[0]
}

func (w *world) must(changes ...state.Change) {
	if err := w.do(changes...); err != nil {
		w.tb.Fatal(err)
	}
}

func network(name string, vni uint32) state.Change {
	p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(vni), 0, 0}), 16)
	return state.Change{Network: &weft.Network{ID: weft.ID(name), VNI: vni, Spec: weft.NetworkSpec{Name: name, Subnets: []weft.Subnet{{Prefix: p, Gateway: p.Addr().Next()}}}}}
}

func node(n int) state.Change {
	return state.Change{Node: &weft.Node{ID: id("n", n), Description: weft.NodeDescription{Hostname: fmt.Sprint("h", n)}, Status: weft.NodeStatus{State: weft.NodeReady}}}
}

func service(n int, published bool, networks ...weft.ID) *weft.Service {
	s := &weft.Service{ID: id("s", n), SpecVersion: 1, Spec: weft.ServiceSpec{Name: fmt.Sprint("svc", n)}}
	if n == 2 {
		s.Spec.Labels = map[string]string{"weft.drain": "25s"}
	}
	for _, i := range networks {
		s.Spec.Networks = append(s.Spec.Networks, weft.NetworkTarget{Network: i})
	}
	if published {
		s.Spec.Ports = []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: uint16(30000 + n)}}
		s.Ports = s.Spec.Ports
	}
	return s
}

func task(n, svc, on int, networks ...weft.ID) *weft.Task {
	t := &weft.Task{ID: id("t", n), Service: id("s", svc), SpecVersion: 1, Slot: uint64(n), Node: id("n", on), Desired: weft.TaskRunning, Status: weft.TaskStatus{State: weft.TaskAssigned}}
	for _, i := range networks {
		t.Attachments = append(t.Attachments, weft.Attachment{Network: i, Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 16)})
	}
	return t
}

func (w *world) base() {
	w.must(network("i", weft.IngressVNI), network("w1", 4097), network("w2", 4098), node(1), node(2), node(3),
		state.Change{Cluster: &weft.Cluster{ID: "c", GossipKey: []byte("k")}})
}

// known is what an agent has made of messages.
type known struct {
	Tasks    map[weft.ID]weft.Task
	Specs    map[SpecKey]weft.SpecVersion
	Networks map[weft.ID]weft.Network
	Services map[weft.ID]wire.ServiceView
	Nodes    map[weft.ID]wire.NodeView
	Cluster  wire.ClusterView
	Ended    map[weft.ID]struct{}
}

// take applies a message as an agent does. Specs go with the last task that
// uses them.
func take(s known, a wire.Assignments) known {
	if a.Full {
		s = known{}
	}
	n := known{Tasks: put(s.Tasks, a.Tasks, a.GoneTasks, func(t weft.Task) weft.ID { return t.ID }),
		Networks: put(s.Networks, a.Networks, a.GoneNetworks, func(n weft.Network) weft.ID { return n.ID }),
		Services: put(s.Services, a.Services, a.GoneServices, func(v wire.ServiceView) weft.ID { return v.ID }),
		Nodes:    put(s.Nodes, a.Nodes, a.GoneNodes, func(v wire.NodeView) weft.ID { return v.ID }),
		Specs:    maps.Clone(s.Specs), Cluster: s.Cluster, Ended: maps.Clone(s.Ended)}
	if n.Ended == nil {
		n.Ended = map[weft.ID]struct{}{}
	}
	for _, i := range a.Ended {
		n.Ended[i] = struct{}{}
	}
	for _, i := range a.GoneEnded {
		delete(n.Ended, i)
	}
	if n.Specs == nil {
		n.Specs = map[SpecKey]weft.SpecVersion{}
	}
	for _, v := range a.Specs {
		n.Specs[SpecKey{v.Service, v.Version}] = v
	}
	maps.DeleteFunc(n.Specs, func(k SpecKey, _ weft.SpecVersion) bool {
		for _, t := range n.Tasks {
			if t.Service == k.Service && t.SpecVersion == k.Version {
				return false
			}
		}
		return true
	})
	if a.Cluster != nil {
		n.Cluster = *a.Cluster
	}
	return n
}

func put[T any](old map[weft.ID]T, puts []T, gone []weft.ID, key func(T) weft.ID) map[weft.ID]T {
	m := maps.Clone(old)
	if m == nil {
		m = map[weft.ID]T{}
	}
	for _, v := range puts {
		m[key(v)] = v
	}
	for _, i := range gone {
		delete(m, i)
	}
	return m
}

// drawChange draws a change; many are refused by the state, which is fine.
func drawChange(t *rapid.T, w *world) state.Change {
	n := rapid.IntRange(1, 3)
	nets := rapid.SliceOfNDistinct(rapid.SampledFrom([]weft.ID{"w1", "w2"}), 0, 2, rapid.ID[weft.ID])
	v := w.store.View()
	switch rapid.IntRange(0, 10).Draw(t, "kind") {
	case 0, 1:
		s := service(n.Draw(t, "service"), rapid.Bool().Draw(t, "published"), nets.Draw(t, "nets")...)
		if old, ok := v.Service(s.ID); ok {
			s.Meta.Index, s.SpecVersion = old.Meta.Index, old.SpecVersion+1
		}
		return state.Change{Service: s}
	case 2, 3:
		k := task(rapid.IntRange(1, 20).Draw(t, "task"), n.Draw(t, "service"), n.Draw(t, "node"), nets.Draw(t, "nets")...)
		if s, ok := v.Service(k.Service); ok {
			k.SpecVersion = s.SpecVersion
		}
		if rapid.Bool().Draw(t, "global") {
			k.Status.State = weft.TaskPending
		}
		if w.tasks[k.ID] { // ids of tasks are never used twice
			return state.Change{TaskDesired: &state.TaskDesired{Task: k.ID, Desired: weft.TaskRemove}}
		}
		return state.Change{Task: k}
	case 4:
		if rapid.Bool().Draw(t, "assign") {
			return state.Change{TaskAssign: &state.TaskAssign{Task: id("t", rapid.IntRange(1, 20).Draw(t, "task")), Node: id("n", n.Draw(t, "node"))}}
		}
		return state.Change{Delete: &state.Ref{Kind: state.KindTask, ID: id("t", rapid.IntRange(1, 20).Draw(t, "task"))}}
	case 5:
		return state.Change{Delete: &state.Ref{Kind: state.KindService, ID: id("s", n.Draw(t, "service"))}}
	case 6:
		return state.Change{TaskStatus: &state.TaskStatus{Task: id("t", rapid.IntRange(1, 20).Draw(t, "task")), Node: id("n", n.Draw(t, "node")),
			Status: weft.TaskStatus{State: rapid.SampledFrom([]weft.TaskState{weft.TaskRunning, weft.TaskFailed}).Draw(t, "state")}}}
	case 7:
		return state.Change{TaskDesired: &state.TaskDesired{Task: id("t", rapid.IntRange(1, 20).Draw(t, "task")), Desired: weft.TaskShutdown}}
	case 8:
		return state.Change{NodeStatus: &state.NodeStatus{Node: id("n", n.Draw(t, "node")), Session: &state.NodeSession{
			Addr: netip.AddrFrom4([4]byte{10, 99, 0, byte(n.Draw(t, "addr"))})}}}
	case 9:
		return state.Change{Release: &state.Release{Addrs: []state.Rested{{
			Network: rapid.SampledFrom([]weft.ID{"i", "w1", "w2"}).Draw(t, "net"), Index: rapid.Uint64Range(0, w.now()).Draw(t, "index"),
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 6).Draw(t, "addr"))})}}}}}
	default:
		name := rapid.SampledFrom([]string{"w1", "w2"}).Draw(t, "net")
		if _, ok := v.Network(weft.ID(name)); ok {
			return state.Change{Delete: &state.Ref{Kind: state.KindNetwork, ID: weft.ID(name)}}
		}
		return network(name, map[string]uint32{"w1": 4097, "w2": 4098}[name])
	}
}

// TestIncrementsEqualFullSet: whatever happens, and however many changes one
// increment covers, an agent that applied the increments knows what an agent
// that has just connected is told.
func TestIncrementsEqualFullSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.base()
		me := id("n", 1)
		sent := Compute(w.store.View(), me)
		told := take(known{}, sent.Full())
		var sh *shared
		for range 25 {
			for range rapid.IntRange(1, 4).Draw(t, "changes") {
				_ = w.do(drawChange(t, w)) // refusals are part of the game
			}
			// As sessions do: with what the last ones have in common.
			v := w.store.View()
			sh = share(v, sh)
			next, whole := compute(v, sh, me, sent), Compute(v, me)
			if now := Diff(whole, next); !reflect.DeepEqual(now, wire.Assignments{}) || !reflect.DeepEqual(next.Full(), whole.Full()) {
				t.Fatalf("made of the last one\n%+v\nwhole\n%+v", next.Full(), whole.Full())
			}
			inc := Diff(sent, next)
			now := inc
			now.GoneEnded = nil // can wait
			if Empty(inc) != reflect.DeepEqual(now, wire.Assignments{}) {
				t.Fatalf("Empty is wrong about %+v", inc)
			}
			told = take(told, inc)
			fresh := take(known{}, next.Full())
			if !reflect.DeepEqual(told, fresh) {
				t.Fatalf("increment %+v\nleads to %+v\nfull set is %+v", inc, told, fresh)
			}
			if again := Diff(next, Compute(w.store.View(), me)); !Empty(again) {
				t.Fatalf("nothing happened, and the increment is %+v", again)
			}
			sent = next
			slowCheck(t, w.store.View(), me, fresh)
		}
	})
}

// slowCheck states what a set must hold in other words than compute.
func slowCheck(t *rapid.T, v *state.Snapshot, me weft.ID, s known) {
	on := map[weft.ID]bool{"i": true}
	for _, k := range v.Tasks() {
		_, has := s.Tasks[k.ID]
		if has != (k.Node == me && k.Status.State >= weft.TaskAssigned) {
			t.Fatalf("task %s of node %s: in the set is %v", k.ID, k.Node, has)
		}
		if has && !k.Status.State.Ended() {
			for _, a := range k.Attachments {
				on[a.Network] = true
			}
		}
	}
	for _, n := range v.Networks() {
		if _, has := s.Networks[n.ID]; has != on[n.ID] {
			t.Fatalf("network %s: in the set is %v", n.ID, has)
		}
	}
	for _, svc := range v.Services() {
		want := len(svc.Ports) > 0
		for _, n := range svc.Spec.Networks {
			want = want || on[n.Network]
		}
		if _, has := s.Services[svc.ID]; has != want {
			t.Fatalf("service %s: in the set is %v", svc.ID, has)
		}
		if got := s.Services[svc.ID].Drain; want && got.String() != cmp.Or(svc.Spec.Labels["weft.drain"], "0s") {
			t.Fatalf("service %s: drain time is %s, labels %v", svc.ID, got, svc.Spec.Labels)
		}
	}
	ended := 0
	for _, r := range v.AllResting() {
		_, has := s.Ended[r.Owner]
		if has != (r.Task && on[r.Network]) && !elsewhere(v, r, on) {
			t.Fatalf("%s, of %s, rests on %s: told is %v", r.Addr, r.Owner, r.Network, has)
		}
		if has {
			ended++
		}
	}
	if len(s.Ended) > ended {
		t.Fatalf("ended tasks %v, of which not all have an address that rests", s.Ended)
	}
	if len(s.Nodes) != len(v.Nodes()) {
		t.Fatalf("%d of %d nodes", len(s.Nodes), len(v.Nodes()))
	}
}

// elsewhere reports whether the owner of r has another address that rests, on a
// network of on.
func elsewhere(v *state.Snapshot, r state.RestingAddr, on map[weft.ID]bool) bool {
	for _, o := range v.AllResting() {
		if o.Owner == r.Owner && o.Task && on[o.Network] {
			return true
		}
	}
	return false
}

func start(t *testing.T, w *world) (*Dispatcher, context.Context, func()) {
	ctx, cancel := context.WithCancel(t.Context())
	d := New(Config{Store: w.store, Seen: func(weft.ID) {}, Log: discard(),
		Propose: func(_ context.Context, c []state.Change) error { return w.do(c...) }})
	done := make(chan struct{})
	go func() { defer close(done); d.Run(ctx) }()
	return d, ctx, func() { cancel(); <-done }
}

func discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

var hello = wire.SessionRequest{Version: wire.ProtocolVersion}

func TestSlowAgentGetsOneIncrement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.base()
		w.must(state.Change{Service: service(1, false, "w1")})
		d, ctx, stop := start(t, w)
		defer stop()
		gate := make(chan struct{})
		var got []wire.Assignments
		done := make(chan error, 1)
		sctx, cancel := context.WithCancel(ctx)
		go func() {
			done <- d.Session(sctx, "n1", hello, func(a wire.Assignments) error {
				<-gate
				got = append(got, a)
				return nil
			})
		}()
		synctest.Wait() // the full set is being sent
		for i := 1; i <= 6; i++ {
			w.must(state.Change{Task: task(i, 1, 1, "w1")})
		}
		gate <- struct{}{}
		gate <- struct{}{}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(got) != 2 || !got[0].Full || got[0].Seq != 1 || got[1].Full || got[1].Seq != 2 || len(got[1].Tasks) != 6 {
			t.Errorf("sent %+v", got)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("session ended with %v", err)
		}
	})
}

func TestOnlyConcernedSessionsWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.base()
		w.must(state.Change{Service: service(1, false, "w1")})
		d, ctx, stop := start(t, w)
		count := map[weft.ID]*int{"n1": new(int), "n2": new(int)}
		var wg sync.WaitGroup
		errs := map[weft.ID]error{}
		var mu sync.Mutex // guards: errs
		for n, c := range count {
			wg.Go(func() {
				err := d.Session(ctx, n, hello, func(wire.Assignments) error { *c++; return nil })
				mu.Lock()
				errs[n] = err
				mu.Unlock()
			})
		}
		settle := func() (int, int) {
			time.Sleep(time.Second)
			synctest.Wait()
			a, b := *count["n1"], *count["n2"]
			*count["n1"], *count["n2"] = 0, 0
			return a, b
		}
		settle()
		for _, c := range []struct {
			name   string
			change state.Change
			n1, n2 int
		}{
			{"a task of n1", state.Change{Task: task(1, 1, 1, "w1")}, 1, 0},
			{"its state", state.Change{TaskStatus: &state.TaskStatus{Task: "t1", Node: "n1", Status: weft.TaskStatus{State: weft.TaskRunning}}}, 0, 0},
			{"listeners", state.Change{NodeStatus: &state.NodeStatus{Node: "n2", Listeners: &[]weft.Listener{{Protocol: weft.TCP, Port: 1}}}}, 0, 0},
			{"progress of an update", state.Change{ServiceUpdate: &state.ServiceUpdate{Service: "s1", SpecVersion: 1, Update: weft.UpdateStatus{State: weft.UpdateDone}}}, 0, 0},
			{"a published service", state.Change{Service: service(2, true)}, 1, 1},
			{"a service on w2, where nobody is", state.Change{Service: service(3, false, "w2")}, 0, 0},
			{"a new node", node(4), 1, 1},
		} {
			w.must(c.change)
			if a, b := settle(); a != c.n1 || b != c.n2 {
				t.Errorf("%s: n1 got %d, n2 got %d messages, want %d and %d", c.name, a, b, c.n1, c.n2)
			}
		}
		w.must(state.Change{Delete: &state.Ref{Kind: state.KindNode, ID: "n1"}})
		settle()
		mu.Lock()
		if !errors.Is(errs["n1"], weft.ErrNotFound) {
			t.Errorf("session of a removed node: %v", errs["n1"])
		}
		mu.Unlock()
		stop()
		wg.Wait()
		if !errors.Is(errs["n2"], weft.ErrUnavailable) && !errors.Is(errs["n2"], context.Canceled) {
			t.Errorf("session at the end of the term: %v", errs["n2"])
		}
	})
}

func TestSessionRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.base()
		d, ctx, stop := start(t, w)
		nothing := func(wire.Assignments) error { return nil }
		if err := d.Session(ctx, "n1", wire.SessionRequest{Version: 99}, nothing); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("other version: %v", err)
		}
		if err := d.Session(ctx, "n9", hello, nothing); !errors.Is(err, weft.ErrNotFound) {
			t.Errorf("unknown node: %v", err)
		}
		broken := errors.New("pipe")
		if err := d.Session(ctx, "n1", hello, func(wire.Assignments) error { return broken }); !errors.Is(err, broken) {
			t.Errorf("broken stream: %v", err)
		}
		first := make(chan error, 1)
		go func() { first <- d.Session(ctx, "n1", hello, nothing) }()
		synctest.Wait()
		second := make(chan error, 1)
		go func() { second <- d.Session(ctx, "n1", hello, nothing) }()
		if err := <-first; !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("session replaced by a newer: %v", err)
		}
		stop()
		<-second
		if err := d.Session(ctx, "n1", hello, nothing); err == nil {
			t.Error("a session opens after the end of the term")
		}
	})
}

func TestReport(t *testing.T) {
	w := newWorld(t)
	w.base()
	w.must(state.Change{Service: service(1, false, "w1")}, state.Change{Task: task(1, 1, 1, "w1")}, state.Change{Task: task(2, 1, 2, "w1")})
	var proposed [][]state.Change
	var seen []weft.ID
	d := New(Config{Store: w.store, Seen: func(n weft.ID) { seen = append(seen, n) }, Log: discard(),
		Propose: func(_ context.Context, c []state.Change) error { proposed = append(proposed, c); return w.do(c...) }})
	running := wire.TaskReport{Task: "t1", Status: weft.TaskStatus{State: weft.TaskRunning, At: time.Now()}}
	report := func(r wire.Report) error { return d.Report(t.Context(), "n1", r) }
	if err := report(wire.Report{Tasks: []wire.TaskReport{running, {Task: "t9", Status: running.Status}}, Listeners: []weft.Listener{{Protocol: weft.TCP, Port: 22}}}); err != nil {
		t.Fatal(err)
	}
	if len(proposed) != 1 || len(proposed[0]) != 2 {
		t.Errorf("proposed %+v", proposed)
	}
	before := w.store.Index()
	if err := report(wire.Report{Tasks: []wire.TaskReport{running}}); err != nil || w.store.Index() != before {
		t.Errorf("a repeated report was proposed again (%v)", err)
	}
	if err := report(wire.Report{Tasks: []wire.TaskReport{{Task: "t2", Status: running.Status}}}); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("report about another node's task: %v", err)
	}
	if err := d.Report(t.Context(), "n9", wire.Report{}); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("report of an unknown node: %v", err)
	}
	down := weft.NodeDown
	w.must(state.Change{NodeStatus: &state.NodeStatus{Node: "n1", State: &down}})
	if err := report(wire.Report{}); err != nil {
		t.Fatal(err)
	}
	if n, _ := w.store.View().Node("n1"); n.Status.State != weft.NodeReady {
		t.Error("a node that is heard again stays down")
	}
	if !slices.Equal(seen, []weft.ID{"n1", "n1", "n1", "n9", "n1"}) {
		t.Errorf("seen %v", seen)
	}
}

// A node that leaves still ends its tasks and says so: that must not bring it
// back, or it gets new ones.
func TestDepartedNodeStaysDown(t *testing.T) {
	w := newWorld(t)
	w.base()
	w.must(state.Change{Service: service(1, false, "w1")}, state.Change{Task: task(1, 1, 1, "w1")})
	d := New(Config{Store: w.store, Seen: func(weft.ID) {}, Log: discard(),
		Propose: func(_ context.Context, c []state.Change) error { return w.do(c...) }})
	down := weft.NodeDown
	w.must(state.Change{NodeStatus: &state.NodeStatus{Node: "n1", State: &down, Message: state.Departed, DropManager: true}})
	ended := wire.TaskReport{Task: "t1", Status: weft.TaskStatus{State: weft.TaskShutdown, At: time.Now()}}
	if err := d.Report(t.Context(), "n1", wire.Report{Tasks: []wire.TaskReport{ended}}); err != nil {
		t.Fatal(err)
	}
	if k, _ := w.store.View().Task("t1"); k.Status.State != weft.TaskShutdown {
		t.Errorf("the end of its task was not taken: %+v", k.Status)
	}
	err := d.Session(t.Context(), "n1", hello, func(wire.Assignments) error { return errors.New("it got assignments") })
	if !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("session of a node that has left: %v", err)
	}
	if n, _ := w.store.View().Node("n1"); n.Status.State != weft.NodeDown || n.Status.Message != state.Departed {
		t.Errorf("a node that has left is %s (%s)", n.Status.State, n.Status.Message)
	}
}

// The leader dials a node at the port that its newest session told.
func TestSessionTellsClusterPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.base()
		d, ctx, stop := start(t, w)
		defer stop()
		for _, c := range []struct {
			port, want uint16
		}{
			{4377, 4377}, {0, 4377}, {5377, 5377}, // 0: the session of an older release
		} {
			r := hello
			r.Addr, r.Port = netip.MustParseAddr("10.99.0.1"), c.port
			if err := d.Session(ctx, "n1", r, func(wire.Assignments) error { return io.ErrClosedPipe }); !errors.Is(err, io.ErrClosedPipe) {
				t.Fatal(err)
			}
			n, _ := w.store.View().Node("n1")
			if got := n.ClusterAddr(); got != netip.AddrPortFrom(r.Addr, c.want) {
				t.Errorf("after a session with port %d: %s", c.port, got)
			}
		}
	})
}
