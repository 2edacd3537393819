package schedule

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// naive places the tasks one by one by the rule in Schedule's comment.
func naive(in Input) map[weft.ID]map[weft.ID]int {
	type state struct {
		n      NodeInfo
		by     map[weft.ID]int
		tasks  int
		cpu, m int64
		ports  []weft.PortSpec
	}
	var nodes []*state
	for _, n := range in.Nodes {
		st := &state{n: n, by: map[weft.ID]int{}, tasks: n.Tasks, cpu: n.Node.Description.NanoCPUs - n.Reserved.NanoCPUs, m: n.Node.Description.MemoryBytes - n.Reserved.MemoryBytes}
		for k, v := range n.ByService {
			st.by[k] = v
		}
		for _, h := range slices.Concat(n.Ports, n.Node.HostPorts()) {
			st.ports = append(st.ports, h.Port)
		}
		nodes = append(nodes, st)
	}
	slices.SortFunc(nodes, func(a, b *state) int {
		if a.n.Node.ID < b.n.Node.ID {
			return -1
		}
		return 1
	})
	out := map[weft.ID]map[weft.ID]int{} // per group's first task: node to tasks
	for _, g := range in.Groups {
		cs, _ := weft.ParseConstraints(g.Spec.Constraints)
		got := map[weft.ID]int{}
		if len(g.Tasks) > 0 {
			out[g.Tasks[0].ID] = got
		}
		for _, t := range g.Tasks {
			if t.NotBefore.After(in.Now) {
				continue
			}
			var best *state
			for _, s := range nodes {
				r := g.Spec.Reservations
				if s.n.Node.Spec.Availability != weft.AvailabilityActive || s.n.Node.Status.State != weft.NodeReady ||
					!cs.Match(&s.n.Node) || r.NanoCPUs > 0 && s.cpu < r.NanoCPUs || r.MemoryBytes > 0 && s.m < r.MemoryBytes {
					continue
				}
				if g.Spec.Mode == weft.ModeGlobal && s.n.Node.ID != t.Node {
					continue
				}
				if slices.ContainsFunc(s.n.Node.Description.UsedPrefixes, func(p netip.Prefix) bool {
					return slices.ContainsFunc(g.Networks, func(n weft.Network) bool { return n.Spec.Subnets[0].Prefix.Overlaps(p) })
				}) {
					continue
				}
				if slices.ContainsFunc(g.Spec.Ports, func(p weft.PortSpec) bool {
					return p.Mode == weft.PublishHost && p.Published != 0 && slices.ContainsFunc(s.ports, func(q weft.PortSpec) bool { return p.Clashes(&q) })
				}) {
					continue
				}
				if best == nil || s.by[g.Service] < best.by[g.Service] ||
					s.by[g.Service] == best.by[g.Service] && s.tasks < best.tasks {
					best = s
				}
			}
			if best == nil {
				got[""]++
				continue
			}
			best.by[g.Service]++
			best.tasks++
			best.cpu -= g.Spec.Reservations.NanoCPUs
			best.m -= g.Spec.Reservations.MemoryBytes
			for _, p := range g.Spec.Ports {
				if p.Mode == weft.PublishHost && p.Published != 0 {
					best.ports = append(best.ports, p)
				}
			}
			got[best.n.Node.ID]++
		}
	}
	return out
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func network(subnet string) weft.Network {
	return weft.Network{Spec: weft.NetworkSpec{Name: "net", Subnets: []weft.Subnet{{Prefix: pfx(subnet)}}}}
}

// drawPorts draws published ports of few numbers, most of them in mode host.
func drawPorts(t *rapid.T, most int) []weft.PortSpec {
	if rapid.Bool().Draw(t, "no ports") {
		return nil
	}
	var out []weft.PortSpec
	for range rapid.IntRange(0, most).Draw(t, "ports") {
		p := weft.PortSpec{
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.TCP, weft.UDP}).Draw(t, "protocol"), Target: 80,
			Published: uint16(rapid.SampledFrom([]int{0, 8001, 8002, 8003, 8004}).Draw(t, "published")),
			Count:     uint16(rapid.IntRange(0, 2).Draw(t, "count")),
			Mode:      rapid.SampledFrom([]weft.PublishMode{weft.PublishHost, weft.PublishHost, weft.PublishIngress}).Draw(t, "mode"),
			IPs:       rapid.SampledFrom([][]netip.Addr{nil, {netip.MustParseAddr("10.0.0.1")}, {netip.MustParseAddr("10.0.0.2")}}).Draw(t, "ips"),
		}
		// A service does not publish a port twice, as validation has seen to.
		if !slices.ContainsFunc(out, func(o weft.PortSpec) bool { o.IPs = nil; return o.Clashes(&p) }) {
			out = append(out, p)
		}
	}
	return out
}

func drawInput(t *rapid.T) Input {
	in := Input{Now: time.Unix(1000, 0)}
	for i := range rapid.IntRange(0, 6).Draw(t, "nodes") {
		n := NodeInfo{ByService: map[weft.ID]int{}}
		n.Node.ID = weft.ID(fmt.Sprintf("n%d", i))
		n.Node.Status.State = rapid.SampledFrom([]weft.NodeState{weft.NodeReady, weft.NodeReady, weft.NodeReady, weft.NodeDown}).Draw(t, "state")
		n.Node.Spec.Availability = rapid.SampledFrom([]weft.Availability{0, 0, 0, 1, 2}).Draw(t, "avail")
		n.Node.Spec.Labels = map[string]string{"zone": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "zone")}
		n.Node.Description.NanoCPUs = rapid.Int64Range(0, 20).Draw(t, "cpu")
		n.Node.Description.MemoryBytes = rapid.Int64Range(0, 20).Draw(t, "mem")
		n.Node.Description.UsedPrefixes = rapid.SampledFrom([][]netip.Prefix{nil, nil, {pfx("192.168.0.0/24")}, {pfx("10.0.3.0/24")}, {pfx("10.0.0.0/8")}}).Draw(t, "used")
		n.Reserved.NanoCPUs = rapid.Int64Range(0, 5).Draw(t, "reserved")
		for _, p := range drawPorts(t, 2) {
			n.Ports = append(n.Ports, weft.HeldPort{Port: p, By: "service other"})
		}
		if rapid.IntRange(0, 4).Draw(t, "listens") == 0 {
			n.Node.Status.Listeners = []weft.Listener{{Protocol: weft.TCP, Port: 8002, Addr: rapid.SampledFrom([]netip.Addr{{}, netip.IPv4Unspecified(), netip.MustParseAddr("10.0.0.1")}).Draw(t, "at")}}
		}
		for s := range 2 {
			c := rapid.IntRange(0, 4).Draw(t, "count")
			n.ByService[weft.ID(fmt.Sprintf("s%d", s))] = c
			n.Tasks += c
		}
		in.Nodes = append(in.Nodes, n)
	}
	next := 0
	for range rapid.IntRange(0, 4).Draw(t, "groups") {
		g := Group{Service: weft.ID(fmt.Sprintf("s%d", rapid.IntRange(0, 2).Draw(t, "service"))), Spec: &weft.ServiceSpec{}}
		g.Spec.Reservations.NanoCPUs = rapid.Int64Range(0, 4).Draw(t, "rcpu")
		g.Spec.Reservations.MemoryBytes = rapid.Int64Range(0, 4).Draw(t, "rmem")
		g.Spec.Constraints = rapid.SampledFrom([][]string{nil, {"node.labels.zone==a"}, {"node.labels.zone!=a"}, {"node.id!=n0"}}).Draw(t, "constraint")
		g.Spec.Ports = drawPorts(t, 3)
		for _, p := range rapid.SampledFrom([][]string{nil, {"10.0.0.0/20"}, {"10.9.0.0/20", "10.0.0.0/20"}}).Draw(t, "networks") {
			g.Networks = append(g.Networks, network(p))
		}
		if rapid.IntRange(0, 3).Draw(t, "mode") == 0 {
			g.Spec.Mode = weft.ModeGlobal
		}
		for i := range rapid.IntRange(0, 25).Draw(t, "tasks") {
			x := weft.Task{ID: weft.ID(fmt.Sprintf("t%03d", next)), Slot: uint64(i + 1)}
			next++
			if g.Spec.Mode == weft.ModeGlobal {
				x.Node = weft.ID(fmt.Sprintf("n%d", rapid.IntRange(0, 7).Draw(t, "on")))
			}
			if rapid.IntRange(0, 5).Draw(t, "late") == 0 {
				x.NotBefore = in.Now.Add(time.Duration(rapid.IntRange(0, 1).Draw(t, "by")))
			}
			g.Tasks = append(g.Tasks, x)
		}
		in.Groups = append(in.Groups, g)
	}
	return in
}

func TestAgreesWithNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		want := naive(in)
		got := map[weft.ID]map[weft.ID]int{}
		first := map[weft.ID]weft.ID{}
		late := map[weft.ID]bool{}
		for _, g := range in.Groups {
			for _, x := range g.Tasks {
				first[x.ID] = g.Tasks[0].ID
				late[x.ID] = x.NotBefore.After(in.Now)
			}
			if len(g.Tasks) > 0 {
				got[g.Tasks[0].ID] = map[weft.ID]int{}
			}
		}
		seen := map[weft.ID]bool{}
		for _, d := range Schedule(in) {
			if seen[d.Task] || late[d.Task] || (d.Node == "") != (d.Reason != "") {
				t.Fatalf("bad decision %+v", d)
			}
			seen[d.Task] = true
			got[first[d.Task]][d.Node]++
		}
		for id, l := range late {
			if l == seen[id] {
				t.Fatalf("task %s: late %v, decided %v", id, l, seen[id])
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got  %v\nwant %v", got, want)
		}
		slices.Reverse(in.Nodes)
		a := Schedule(in)
		slices.Reverse(in.Nodes)
		if b := Schedule(in); !slices.Equal(a, b) {
			t.Fatal("depends on the order of the nodes")
		}
	})
}

func ready(id string) NodeInfo {
	n := NodeInfo{Node: weft.Node{ID: weft.ID(id)}}
	n.Node.Status.State = weft.NodeReady
	n.Node.Description.NanoCPUs = 2e9
	return n
}

func TestReasons(t *testing.T) {
	down, drained := ready("a"), ready("b")
	down.Node.Status.State = weft.NodeDown
	drained.Node.Spec.Availability = weft.AvailabilityDrain
	big := weft.ServiceSpec{Reservations: weft.Resources{NanoCPUs: 3e9}}
	picky := weft.ServiceSpec{Constraints: []string{"node.labels.disk==ssd"}}
	global := weft.ServiceSpec{Mode: weft.ModeGlobal}
	listens, held := ready("c"), ready("d")
	listens.Node.Description.Hostname = "h3"
	listens.Node.Status.Listeners = []weft.Listener{{Protocol: weft.TCP, Port: 8080, Addr: netip.MustParseAddr("127.0.0.1")}}
	held.Ports = []weft.HeldPort{{Port: weft.PortSpec{Protocol: weft.TCP, Published: 8000, Count: 100}, By: "service web"}}
	host := weft.ServiceSpec{Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: 8080, Mode: weft.PublishHost}}}
	cluster := weft.ServiceSpec{Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: weft.ClusterPort, Mode: weft.PublishHost}}}
	for _, c := range []struct {
		name  string
		nodes []NodeInfo
		spec  weft.ServiceSpec
		want  string
	}{
		{"no nodes", nil, weft.ServiceSpec{}, "no suitable node"},
		{"constraints", []NodeInfo{ready("c"), ready("d"), ready("e")}, picky, "no suitable node (scheduling constraints not satisfied on 3 nodes)"},
		{"resources", []NodeInfo{ready("c"), ready("d")}, big, "no suitable node (insufficient resources on 2 nodes)"},
		{"unavailable", []NodeInfo{down}, big, "no suitable node (1 node not available for new tasks)"},
		{"commonest first", []NodeInfo{down, drained, ready("c")}, big, "no suitable node (2 nodes not available for new tasks; insufficient resources on 1 node)"},
		{"socket of the host", []NodeInfo{listens}, host, "no suitable node (port 8080/tcp (mode host) is in use on h3 by the socket 127.0.0.1:8080)"},
		{"port of another", []NodeInfo{held, listens}, host, "no suitable node (port 8080/tcp (mode host) is in use on h3 by the socket 127.0.0.1:8080, and likewise on 1 more)"},
		{"range of another", []NodeInfo{held}, host, "no suitable node (port 8080/tcp (mode host) is in use on d by service web)"},
		{"cluster port", []NodeInfo{ready("c")}, cluster, "no suitable node (port 2377/tcp (mode host) is in use on c by the cluster port)"},
		{"global on a lost node", []NodeInfo{ready("c")}, global, "no suitable node (1 node not available for new tasks)"},
		{"bad constraint", []NodeInfo{ready("c")}, weft.ServiceSpec{Constraints: []string{"x"}}, `invalid argument: constraint "x": write KEY==VALUE or KEY!=VALUE`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Schedule(Input{Nodes: c.nodes, Groups: []Group{{Spec: &c.spec, Service: "s", Tasks: []weft.Task{{ID: "t", Node: "x"}}}}})
			if len(got) != 1 || got[0].Node != "" || got[0].Reason != c.want {
				t.Errorf("got %+v, want reason %q", got, c.want)
			}
		})
	}
}

// A host that uses part of a network's range for something else cannot run its
// tasks, and the reason says which.
func TestConflictsAreNamed(t *testing.T) {
	a, b, c := ready("a"), ready("b"), ready("c")
	a.Node.Description.UsedPrefixes = []netip.Prefix{pfx("192.168.0.0/24"), pfx("10.0.3.7/24")}
	a.Node.Description.Hostname = "h1"
	b.Node.Description.UsedPrefixes = []netip.Prefix{pfx("10.0.0.0/8")}
	in := Input{Nodes: []NodeInfo{a, b}, Groups: []Group{{Spec: &weft.ServiceSpec{}, Service: "s", Tasks: []weft.Task{{ID: "t"}}, Networks: []weft.Network{network("10.0.0.0/20")}}}}
	want := "no suitable node (network net (10.0.0.0/20) overlaps 10.0.3.0/24 in use on node h1, and likewise on 1 more)"
	if got := Schedule(in); got[0].Reason != want {
		t.Errorf("got %+v, want reason %q", got, want)
	}
	in.Nodes = append(in.Nodes, c)
	if got := Schedule(in); got[0].Node != "c" {
		t.Errorf("got %+v, want node c", got)
	}
}

func TestPartlyFull(t *testing.T) {
	spec := weft.ServiceSpec{Reservations: weft.Resources{NanoCPUs: 1e9}}
	tasks := make([]weft.Task, 5)
	for i := range tasks {
		tasks[i].ID = weft.ID(fmt.Sprint("t", i))
	}
	got := Schedule(Input{Nodes: []NodeInfo{ready("a"), ready("b")}, Groups: []Group{{Spec: &spec, Service: "s", Tasks: tasks}}})
	want := []Decision{{"t0", "a", ""}, {"t1", "b", ""}, {"t2", "a", ""}, {"t3", "b", ""}, {"t4", "", "no suitable node (insufficient resources on 2 nodes)"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestHostPortsAreOneToANode: more replicas than nodes wait, and say for what; the
// tasks that are placed count in the same call and by what the caller tells.
func TestHostPortsAreOneToANode(t *testing.T) {
	spec := weft.ServiceSpec{Name: "web", Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: 8080, Mode: weft.PublishHost}}}
	other := weft.ServiceSpec{Name: "other", Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 81, Published: 8080, Mode: weft.PublishHost}}}
	group := func(s *weft.ServiceSpec, id weft.ID, n int) Group {
		g := Group{Spec: s, Service: id}
		for i := range n {
			g.Tasks = append(g.Tasks, weft.Task{ID: weft.ID(fmt.Sprint(id, i))})
		}
		return g
	}
	got := Schedule(Input{Nodes: []NodeInfo{ready("a"), ready("b")}, Groups: []Group{group(&spec, "web", 3), group(&other, "o", 1)}})
	want := []Decision{
		{"web0", "a", ""}, {"web1", "b", ""},
		{"web2", "", "no suitable node (port 8080/tcp (mode host) is in use on a by a task of the service itself, and likewise on 1 more)"},
		{"o0", "", "no suitable node (port 8080/tcp (mode host) is in use on a by service web, and likewise on 1 more)"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	// A port that is to be chosen keeps nobody out.
	spec.Ports[0].Published = 0
	for _, d := range Schedule(Input{Nodes: []NodeInfo{ready("a")}, Groups: []Group{group(&spec, "web", 3)}}) {
		if d.Node != "a" {
			t.Errorf("chosen port: %+v", d)
		}
	}
}

// A full node must not hide that a much fuller one still has room.
func TestRoomOnlyOnTheFullest(t *testing.T) {
	a, b := ready("a"), ready("b")
	a.Node.Description.NanoCPUs, b.Node.Description.NanoCPUs = 1e9, 9e9
	b.ByService, b.Tasks = map[weft.ID]int{"s": 100}, 100
	spec := weft.ServiceSpec{Reservations: weft.Resources{NanoCPUs: 1e9}}
	tasks := make([]weft.Task, 5)
	n := 0
	for _, d := range Schedule(Input{Nodes: []NodeInfo{a, b}, Groups: []Group{{Spec: &spec, Service: "s", Tasks: tasks}}}) {
		if d.Node != "" {
			n++
		}
	}
	if n != 5 {
		t.Errorf("%d of 5 tasks placed", n)
	}
}

func benchInput(nodes, services, each int) Input {
	in := Input{Now: time.Unix(1000, 0)}
	for i := range nodes {
		n := ready(fmt.Sprintf("n%05d", i))
		n.Node.Description.NanoCPUs = 1e15
		n.Node.Spec.Labels = map[string]string{"disk": []string{"ssd", "hdd"}[i%2], "zone": fmt.Sprint(i % 10)}
		in.Nodes = append(in.Nodes, n)
	}
	for s := range services {
		g := Group{Service: weft.ID(fmt.Sprint("s", s)), Spec: &weft.ServiceSpec{Constraints: []string{"node.labels.disk==ssd"}, Reservations: weft.Resources{NanoCPUs: 1e6}}}
		for i := range each {
			g.Tasks = append(g.Tasks, weft.Task{ID: weft.ID(fmt.Sprintf("t%d-%d", s, i)), Slot: uint64(i + 1)})
		}
		in.Groups = append(in.Groups, g)
	}
	return in
}

func BenchmarkSchedule(b *testing.B) {
	for _, c := range []struct{ nodes, services, each int }{{1000, 100, 1000}, {1000, 1, 100000}, {1000, 1000, 100}} {
		b.Run(fmt.Sprintf("nodes=%d/services=%d/each=%d", c.nodes, c.services, c.each), func(b *testing.B) {
			in := benchInput(c.nodes, c.services, c.each)
			b.ReportAllocs()
			start := cpuTime(b)
			for b.Loop() {
				if len(Schedule(in)) != c.services*c.each {
					b.Fatal("tasks are missing")
				}
			}
			used := cpuTime(b) - start
			b.ReportMetric(float64(used.Nanoseconds())/float64(b.N)/float64(c.services*c.each), "cpu-ns/task")
		})
	}
}
