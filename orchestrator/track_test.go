package orchestrator

import (
	"maps"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// TestTrackerEqualsRecount: the sums that the leader's loop keeps in step are
// those that a new leader would count.
func TestTrackerEqualsRecount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := state.New()
		sub := s.Subscribe()
		defer sub.Close()
		var index uint64
		apply := func(c ...state.Change) {
			index++
			b, err := state.EncodeEntry([]state.Command{{Changes: c}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Apply(index, b); err != nil {
				t.Fatal(err)
			}
		}
		ids := func(kind string) *rapid.Generator[weft.ID] {
			return rapid.SampledFrom([]weft.ID{weft.ID(kind + "1"), weft.ID(kind + "2"), weft.ID(kind + "3")})
		}
		states := rapid.SampledFrom([]weft.TaskState{weft.TaskPending, weft.TaskAssigned, weft.TaskRunning, weft.TaskFailed})
		ports := rapid.SampledFrom([][]weft.PortSpec{nil, {{Protocol: weft.TCP, Target: 80, Published: 8080, Mode: weft.PublishHost}},
			{{Protocol: weft.TCP, Target: 80, Published: 8081}, {Protocol: weft.UDP, Target: 80, Published: 8080}}})
		k := newTracker()
		for range 30 {
			for range rapid.IntRange(1, 3).Draw(t, "changes") {
				switch rapid.IntRange(0, 6).Draw(t, "kind") {
				case 0:
					apply(state.Change{Node: &weft.Node{ID: ids("n").Draw(t, "node")}})
				case 1:
					id := ids("s").Draw(t, "service")
					apply(state.Change{Service: &weft.Service{ID: id, SpecVersion: 1, Spec: weft.ServiceSpec{Name: string(id),
						Reservations: weft.Resources{NanoCPUs: 5, MemoryBytes: 7}}}})
				case 2:
					n := weft.Task{ID: ids("t").Draw(t, "task"), Service: ids("s").Draw(t, "service"), SpecVersion: 1, Desired: weft.TaskRunning}
					if n.Status.State = states.Draw(t, "state"); n.Status.State > weft.TaskPending {
						n.Node = ids("n").Draw(t, "node")
						n.Ports = ports.Draw(t, "ports")
					}
					apply(state.Change{Task: &n})
				case 3:
					apply(state.Change{TaskStatus: &state.TaskStatus{Task: ids("t").Draw(t, "task"), Status: weft.TaskStatus{State: states.Draw(t, "state")}}})
				case 4:
					apply(state.Change{TaskDesired: &state.TaskDesired{Task: ids("t").Draw(t, "task"), Desired: weft.TaskShutdown}})
				case 5:
					apply(state.Change{TaskAssign: &state.TaskAssign{Task: ids("t").Draw(t, "task"), Node: ids("n").Draw(t, "node"), Ports: ports.Draw(t, "ports")}})
				default:
					kind := rapid.SampledFrom([]state.Kind{state.KindNode, state.KindTask, state.KindService}).Draw(t, "delete")
					apply(state.Change{Delete: &state.Ref{Kind: kind, ID: ids(string(kind[:1])).Draw(t, "id")}})
				}
			}
			c := sub.Take()
			v := s.View()
			k.update(&c, v, func(weft.ID) {})
			fresh := newTracker()
			fresh.update(&state.Changed{All: true}, v, func(weft.ID) {})
			if !reflect.DeepEqual(k.nodes(v), fresh.nodes(v)) {
				t.Fatalf("sums are %+v, recounted %+v", k.nodes(v), fresh.nodes(v))
			}
			if !maps.Equal(k.pending, fresh.pending) {
				t.Fatalf("pending %v, recounted %v", k.pending, fresh.pending)
			}
		}
	})
}

func TestPickIngress(t *testing.T) {
	p := netip.MustParsePrefix
	for _, c := range []struct {
		name        string
		pools, used []netip.Prefix
		want        string
	}{
		{"free", weft.DefaultAddrPools(), nil, "10.255.0.0/16"},
		{"route over it", weft.DefaultAddrPools(), []netip.Prefix{p("10.0.0.0/9"), p("10.255.3.0/24")}, "10.128.0.0/16"},
		{"all of 10 taken", weft.DefaultAddrPools(), []netip.Prefix{p("10.0.0.0/8")}, "172.16.0.0/16"},
		{"own pools", []netip.Prefix{p("100.64.0.0/10")}, nil, "100.64.0.0/16"},
		{"small pool", []netip.Prefix{p("10.255.4.0/22")}, nil, "10.255.4.0/22"},
	} {
		s, err := pickIngress(weft.Cluster{AddrPools: c.pools}, c.used)
		if err != nil || s.Prefix.String() != c.want || s.Gateway != s.Prefix.Addr().Next() {
			t.Errorf("%s: %v, %v; want %s", c.name, s, err, c.want)
		}
	}
	if _, err := pickIngress(weft.Cluster{AddrPools: []netip.Prefix{p("10.255.0.0/16")}}, []netip.Prefix{p("10.0.0.0/8")}); err == nil {
		t.Error("a taken pool gave an ingress network")
	}
}

func TestSilent(t *testing.T) {
	now := time.Unix(1000, 0)
	l := &liveness{last: map[weft.ID]time.Time{"a": now.Add(-6 * time.Second), "b": now.Add(-time.Second), "gone": now}}
	ready := func(id weft.ID) weft.Node {
		return weft.Node{ID: id, Status: weft.NodeStatus{State: weft.NodeReady}}
	}
	down, again := l.silent([]weft.Node{ready("a"), ready("b"), {ID: "c"}}, 5*time.Second, now)
	if len(down) != 1 || down[0] != "a" || !again.Equal(now.Add(4*time.Second)) {
		t.Errorf("down %v, again %v", down, again)
	}
	if !l.when("gone").IsZero() {
		t.Error("a removed node is remembered")
	}
	// Whom gossip hears has twice as long: its way is whole, and TCP is about to find out.
	l.heard = func(id weft.ID) bool { return id == "a" }
	nodes := []weft.Node{ready("a"), ready("b")}
	if down, again := l.silent(nodes, 5*time.Second, now); len(down) != 0 || !again.Equal(now.Add(4*time.Second)) {
		t.Errorf("heard by gossip: down %v, again %v", down, again)
	}
	l.last["b"] = now.Add(4 * time.Second)
	for range 4 { // it looks often enough itself
		now = now.Add(time.Second)
		down, _ = l.silent(nodes, 5*time.Second, now)
	}
	if len(down) != 1 || down[0] != "a" {
		t.Errorf("heard by gossip alone for twice the limit: down %v, want a", down)
	}
}

// A leader that was not running itself, because its machine had no time or its
// disk hung, has heard nobody and must not take all nodes for down.
func TestSilenceOfTheLeaderItself(t *testing.T) {
	const limit = 5 * time.Second
	now := time.Unix(1000, 0)
	nodes := []weft.Node{{ID: "a", Status: weft.NodeStatus{State: weft.NodeReady}}, {ID: "b", Status: weft.NodeStatus{State: weft.NodeReady}}}
	l := &liveness{last: map[weft.ID]time.Time{"a": now, "b": now}}
	look := func(d time.Duration) []weft.ID {
		now = now.Add(d)
		down, _ := l.silent(nodes, limit, now)
		return down
	}
	look(0)
	if down := look(20 * time.Second); len(down) != 0 {
		t.Errorf("after 20 s in which the leader stood still, %v are down", down)
	}
	l.last["b"] = now.Add(time.Second) // b goes on, a was lost meanwhile
	var down []weft.ID
	for range limit / (limit / looksPerLimit) {
		if len(down) != 0 {
			t.Errorf("%v down before its time", down)
		}
		down = look(limit / looksPerLimit)
	}
	if len(down) != 1 || down[0] != "a" {
		t.Errorf("%s after the leader is back, %v are down, want a", limit, down)
	}
}

// The loop may look at a view in which a network is not there yet that an edit
// has just made and given addresses of.
func TestAllocatorKeepsNetworksNewerThanTheView(t *testing.T) {
	s := state.New()
	before := s.View()
	a := newAllocator(before)
	n := weft.Network{ID: "n", VNI: 4097, Spec: weft.NetworkSpec{Name: "front", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.70.0.0/24")}}}}
	b, err := state.EncodeEntry([]state.Command{{At: time.Unix(1, 0).UTC(), Changes: []state.Change{{Network: &n}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(7, b); err != nil {
		t.Fatal(err)
	}
	n, _ = s.View().Network("n")
	first, err := a.attach("web", []weft.Network{n})
	if err != nil {
		t.Fatal(err)
	}
	a.follow(before)
	second, err := a.attach("db", []weft.Network{n})
	if err != nil {
		t.Fatal(err)
	}
	if first[0] == second[0] {
		t.Errorf("web and db both have %s", first[0].Addr)
	}
}
