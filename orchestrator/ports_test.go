package orchestrator

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

func hostPort(published uint16) weft.PortSpec {
	return weft.PortSpec{Protocol: weft.TCP, Target: 80, Published: published, Mode: weft.PublishHost}
}

func meshPort(published uint16) weft.PortSpec {
	return weft.PortSpec{Protocol: weft.TCP, Target: 80, Published: published}
}

// publisher creates services that publish ports.
func publisher(r *rig) func(name string, replicas uint64, labels map[string]string, ports ...weft.PortSpec) (weft.Service, error) {
	return func(name string, replicas uint64, labels map[string]string, ports ...weft.PortSpec) (weft.Service, error) {
		s := webSpec(name, replicas)
		s.Ports, s.Labels = ports, labels
		return r.leader().CreateService(r.ctx, s)
	}
}

func TestPublishedPortsAreJudged(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := r.worker(1)
		defer w.crash()
		local := netip.MustParseAddr("127.0.0.1")
		w.listen(weft.Listener{Protocol: weft.TCP, Port: 9100, Addr: local}, weft.Listener{Protocol: weft.TCP, Port: 9101, Addr: local}, weft.Listener{Protocol: weft.SCTP, Port: 9200, Addr: netip.IPv6Unspecified()})
		time.Sleep(time.Second)
		publish := publisher(r)
		must := func(_ weft.Service, err error) { t.Helper(); r.must(err) }
		refused := func(what string, err error, sentinel error, words ...string) {
			t.Helper()
			wantErr(t, what, err, sentinel, words...)
		}
		ip := func(port int, a string) map[string]string {
			return map[string]string{fmt.Sprintf("weft.publish.%d.ip", port): a}
		}
		media := weft.PortSpec{Protocol: weft.UDP, Target: 10000, Published: 10000, Count: 10001}
		must(publish("web", 0, nil, meshPort(8080)))
		must(publish("media", 0, nil, media))
		must(publish("own", 0, nil, hostPort(8090)))
		must(publish("admin", 0, ip(8100, "127.0.0.1"), meshPort(8100)))
		must(publish("front", 0, ip(8100, "10.99.1.1"), meshPort(8100)))
		must(publish("by-link", 0, map[string]string{"weft.publish.8110.interface": "eth0"}, meshPort(8110)))
		must(publish("beside-link", 0, ip(8110, "127.0.0.1"), meshPort(8110)))
		must(publish("beside-socket", 0, ip(9100, "10.99.1.1"), meshPort(9100)))
		must(publish("own-too", 0, nil, hostPort(8090))) // a matter of nodes

		_, err := publish("x", 0, nil, meshPort(8080))
		refused("a service's port", err, weft.ErrConflict, "service x: EndpointSpec.Ports[0].PublishedPort:", "8080/tcp is already in use by service web")
		_, err = publish("x", 0, nil, meshPort(8079), weft.PortSpec{Protocol: weft.UDP, Target: 1, Published: 19999, Count: 5})
		refused("a part of a range", err, weft.ErrConflict, "EndpointSpec.Ports[1].PublishedPort:", "19999-20003/udp is already in use by service media: 19999-20000/udp")
		_, err = publish("x", 0, nil, hostPort(8080))
		refused("mode host on a port of the mesh", err, weft.ErrConflict, "8080/tcp is already in use by service web")
		_, err = publish("x", 0, nil, meshPort(8090))
		refused("mesh on a port in mode host", err, weft.ErrConflict, "8090/tcp is already in use by service own (mode host)")
		_, err = publish("x", 0, nil, hostPort(weft.GossipPort))
		refused("weft's own port in mode host", err, weft.ErrConflict, "7946/tcp is already in use by weft itself")
		_, err = publish("x", 0, nil, meshPort(8100))
		refused("all addresses beside bound ones", err, weft.ErrConflict, "8100/tcp is already in use by service admin")
		_, err = publish("x", 0, ip(8100, "10.99.1.1"), meshPort(8100))
		refused("the same address", err, weft.ErrConflict, "8100/tcp is already in use by service front")
		_, err = publish("x", 0, ip(8110, "10.99.1.1"), meshPort(8110))
		refused("an address that a link may have", err, weft.ErrConflict, "8110/tcp is already in use by service by-link")
		_, err = publish("x", 0, nil, meshPort(22))
		refused("a socket", err, weft.ErrConflict, "22/tcp is already in use by a listening socket of node w1")
		_, err = publish("x", 0, nil, meshPort(9101))
		refused("a socket on one address", err, weft.ErrConflict, "9101/tcp is already in use by the socket 127.0.0.1:9101 of node w1")
		_, err = publish("x", 0, nil, weft.PortSpec{Protocol: weft.SCTP, Target: 1, Published: 9200})
		refused("an SCTP socket", err, weft.ErrConflict, "9200/sctp is already in use by the socket [::]:9200 of node w1")
		_, err = publish("x", 0, ip(8120, "192.0.2.7"), meshPort(8120))
		refused("an address of no node", err, weft.ErrInvalid, `Labels["weft.publish.8120.ip"]: no node has the address 192.0.2.7: w1 has 10.99.1.1`)
		_, err = publish("x", 0, map[string]string{"weft.publish.8120.interface": "eth7"}, meshPort(8120))
		refused("an interface of no node", err, weft.ErrInvalid, `Labels["weft.publish.8120.interface"]: no node has an address on an interface eth7`)
		_, err = publish("x", 0, map[string]string{"weft.publish.81.ip": "10.99.1.1"}, meshPort(8120))
		refused("a label of no port", err, weft.ErrInvalid, `Labels["weft.publish.81.ip"]`)

		in, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "in", Internal: true})
		r.must(err)
		s := webSpec("x", 0)
		s.Networks, s.Ports = []weft.NetworkTarget{{Network: in.ID}}, []weft.PortSpec{hostPort(8130)}
		_, err = r.leader().CreateService(r.ctx, s)
		refused("mode host on internal networks", err, weft.ErrInvalid, "EndpointSpec.Ports[0].PublishMode: host needs a way")

		// A later bind is a warning on the node.
		w.listen(weft.Listener{Protocol: weft.TCP, Port: 8080, Addr: netip.IPv4Unspecified()}, weft.Listener{Protocol: weft.TCP, Port: 8100, Addr: netip.MustParseAddr("10.99.1.9")})
		time.Sleep(time.Second)
		nodes, err := r.leader().Nodes(r.ctx)
		r.must(err)
		i := slices.IndexFunc(nodes, func(n weft.Node) bool { return n.ID == w.id })
		if got, want := nodes[i].Status.Message, "port 8080/tcp of service web is also held by the socket 0.0.0.0:8080 of the host"; got != want {
			t.Errorf("message %q, want %q", got, want)
		}
		// So is a rule of the host's firewall that names one, while it is there.
		w.listen()
		w.filter(weft.InputRule{Protocol: weft.UDP, First: 8080, Last: 8080, Chain: "chain a"}, weft.InputRule{Protocol: weft.TCP, First: 8000, Last: 8099, Chain: "chain INPUT of table ip filter"},
			weft.InputRule{Protocol: weft.TCP, First: 9000, Last: 9000, Chain: "chain b"})
		message := func() string {
			time.Sleep(time.Second)
			nodes, err := r.leader().Nodes(r.ctx)
			r.must(err)
			return nodes[slices.IndexFunc(nodes, func(n weft.Node) bool { return n.ID == w.id })].Status.Message
		}
		if got, want := message(), "port 8080/tcp of service web is named by a rule of chain INPUT of table ip filter of the host, which published ports do not pass: say who may ask with the label weft.publish.8080.allow"; got != want {
			t.Errorf("message %q, want %q", got, want)
		}
		w.filter()
		if got := message(); got != "" {
			t.Errorf("message %q when the rules have gone", got)
		}
		w.listen(weft.Listener{Protocol: weft.TCP, Port: 8080, Addr: netip.IPv4Unspecified()})
		time.Sleep(time.Second)
		// It is no reason to refuse the service anything else.
		web, err := r.leader().Service(r.ctx, "web")
		r.must(err)
		up := web.Spec
		up.Replicas = 1
		_, err = r.leader().UpdateService(r.ctx, web.ID, web.Meta.Index, up)
		r.must(err)
		// A node may use a port that the service is bound beside, and not its own.
		wantErr(t, "cluster port that is published", func() error { _, err := r.admit("worker-token", "0.0.0.0:8080"); return err }(), weft.ErrConflict, "service web")
		_, err = r.admit("worker-token", "0.0.0.0:8090")
		r.must(err)
	})
}

func TestChosenPortsStay(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m := r.leader()
		publish := publisher(r)
		chosen := func(target uint16) weft.PortSpec { return weft.PortSpec{Protocol: weft.TCP, Target: target} }
		_, err := publish("first", 0, nil, meshPort(30001))
		r.must(err)
		// Neighbouring targets come to neighbouring ports, whatever their order.
		svc, err := publish("many", 0, nil, chosen(8002), chosen(8000), chosen(9000), chosen(8001))
		r.must(err)
		numbers := func(s weft.Service) string {
			var out []string
			for _, p := range s.Ports {
				out = append(out, fmt.Sprintf("%d:%d", p.Published, p.Target))
			}
			return strings.Join(out, " ")
		}
		if got, want := numbers(svc), "30004:8002 30002:8000 30000:9000 30003:8001"; got != want {
			t.Errorf("chosen %s, want %s", got, want)
		}
		spec := svc.Spec
		spec.Labels = map[string]string{"weft.publish.8000.allow": "10.0.0.0/8"}
		spec.Ports = append([]weft.PortSpec{chosen(7000)}, spec.Ports...)
		spec.Ports = append(spec.Ports, chosen(8000)) // a second one for the same target
		svc, err = m.UpdateService(r.ctx, svc.ID, svc.Meta.Index, spec)
		r.must(err)
		if got, want := numbers(svc), "30005:7000 30004:8002 30002:8000 30000:9000 30003:8001 30006:8000"; got != want {
			t.Errorf("after an update %s, want %s", got, want)
		}
		if len(svc.Ports[2].Allow) != 1 || len(svc.Ports[5].Allow) != 1 || len(svc.Ports[1].Allow) != 0 {
			t.Errorf("allow of %+v", svc.Ports)
		}
		run, err := publish("run", 0, nil, weft.PortSpec{Protocol: weft.TCP, Target: 100, Count: 50})
		r.must(err)
		if p := run.Ports[0]; p.Published != 30007 || p.Count != 50 {
			t.Errorf("a range came to %+v", p)
		}
		_, err = publish("huge", 0, nil, weft.PortSpec{Protocol: weft.TCP, Target: 100, Count: 2800})
		wantErr(t, "more than there are", err, weft.ErrUnavailable, "no 2800 automatic ports", "EndpointSpec.Ports[0].PublishedPort")
	})
}

// waiting are the reasons for which tasks of a service are pending.
func waiting(r *rig, service weft.ID) []string {
	r.t.Helper()
	list, err := r.leader().Tasks(r.ctx, weft.TaskFilter{Services: []weft.ID{service}})
	r.must(err)
	var out []string
	for _, k := range list.Tasks {
		if k.Status.State == weft.TaskPending && k.Desired <= weft.TaskRunning {
			out = append(out, k.Status.Err)
		}
	}
	return out
}

func TestModeHost(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := []*agent{r.worker(1), r.worker(2)}
		defer w[0].crash()
		defer w[1].crash()
		publish := publisher(r)
		web, err := publish("web", 3, nil, hostPort(8080))
		r.must(err)
		if len(web.VIPs) != 0 {
			t.Errorf("a service without the mesh has addresses %v", web.VIPs)
		}
		tasks := r.waitRunning(web.ID, 2, w...)
		for _, k := range tasks {
			if len(k.Ports) != 1 || k.Ports[0].Published != 8080 || len(k.Attachments) != 0 {
				t.Errorf("task %+v", k)
			}
		}
		if tasks[0].Node == tasks[1].Node {
			t.Error("two tasks with one port share a node")
		}
		if got := waiting(r, web.ID); len(got) != 1 || !strings.Contains(got[0], "by service web, and likewise on 1 more") || !strings.Contains(got[0], "port 8080/tcp (mode host) is in use on w") {
			t.Errorf("waiting: %q", got)
		}
		// What a task gets from the automatic range is its own; the mesh keeps off it.
		var auto weft.Service
		auto, err = publish("auto", 4, nil, hostPort(0), weft.PortSpec{Protocol: weft.UDP, Target: 53, Published: 53, Mode: weft.PublishHost})
		r.must(err)
		r.waitRunning(auto.ID, 2, w...) // UDP 53 is one to a node
		spec := auto.Spec
		spec.Ports = spec.Ports[:1]
		cur, err := r.leader().Service(r.ctx, "auto")
		r.must(err)
		_, err = r.leader().UpdateService(r.ctx, auto.ID, cur.Meta.Index, spec)
		r.must(err)
		time.Sleep(time.Minute)
		used := map[string]bool{}
		var one uint16
		for _, k := range r.waitRunning(auto.ID, 4, w...) {
			if len(k.Ports) != 1 || k.Ports[0].Published < weft.FirstPublishedPort || used[fmt.Sprint(k.Node, k.Ports[0].Published)] {
				t.Errorf("task on %s has %+v", k.Node, k.Ports)
			}
			one = k.Ports[0].Published
			used[fmt.Sprint(k.Node, one)] = true
		}
		mesh, err := publish("mesh", 0, nil, weft.PortSpec{Protocol: weft.TCP, Target: 80})
		r.must(err)
		if p := mesh.Ports[0].Published; used[fmt.Sprint(w[0].id, p)] || used[fmt.Sprint(w[1].id, p)] {
			t.Errorf("the mesh took %d, which a task has", p)
		}
		_, err = publish("x", 0, nil, meshPort(one))
		wantErr(t, "the mesh asks for a task's port", err, weft.ErrConflict, "task auto.", "(mode host)")

		// A node goes on listing the port until the task has ended, and a socket
		// of the host counts as well.
		w[0].listen(weft.Listener{Protocol: weft.TCP, Port: 8085, Addr: netip.IPv4Unspecified()})
		time.Sleep(time.Second)
		late, err := publish("late", 2, nil, hostPort(8085))
		r.must(err)
		r.waitRunning(late.ID, 1, w[1])
		if got := waiting(r, late.ID); len(got) != 1 || !strings.Contains(got[0], "port 8085/tcp (mode host) is in use on w") {
			t.Errorf("waiting: %q", got)
		}
		w[0].listen()
		r.waitRunning(late.ID, 2, w...)
	})
}

// TestPortsNeverClash makes, edits and removes services at random, several at a
// time, and asks: has any node a port twice?
func TestPortsNeverClash(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := []*agent{r.worker(1), r.worker(2), r.worker(3)}
		for _, a := range w {
			defer a.crash()
		}
		m := r.leader()
		rnd := rand.New(rand.NewPCG(1, 2))
		draw := func() weft.ServiceSpec {
			s := webSpec(fmt.Sprintf("s%d", rnd.IntN(12)), uint64(rnd.IntN(4)))
			s.Labels = map[string]string{}
			for range 1 + rnd.IntN(2) {
				p := weft.PortSpec{Protocol: weft.TCP, Target: uint16(80 + rnd.IntN(3)), Mode: weft.PublishMode(rnd.IntN(2)), Count: uint16(rnd.IntN(3))}
				if rnd.IntN(2) == 0 {
					p.Published = uint16(30000 + rnd.IntN(6))
				}
				s.Ports = append(s.Ports, p)
			}
			if p := s.Ports[0]; p.Published != 0 && rnd.IntN(3) == 0 {
				s.Labels[fmt.Sprintf("weft.publish.%d.ip", p.Published)] = []string{"127.0.0.1", "10.99.1.1"}[rnd.IntN(2)]
			}
			return s
		}
		known := []error{weft.ErrConflict, weft.ErrInvalid, weft.ErrNotFound, weft.ErrOutOfSequence}
		expected := func(err error) {
			if err != nil && !slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }) {
				t.Error(err)
			}
		}
		edit := func(spec weft.ServiceSpec, kind int) {
			old, err := m.Service(r.ctx, spec.Name)
			switch {
			case err != nil:
				_, err = m.CreateService(r.ctx, spec)
			case kind == 0:
				err = m.RemoveService(r.ctx, old.ID)
			default:
				_, err = m.UpdateService(r.ctx, old.ID, old.Meta.Index, spec)
			}
			expected(err)
		}
		placed := 0
		for range 120 {
			done := make(chan struct{})
			const atOnce = 3
			for range atOnce {
				spec, kind := draw(), rnd.IntN(4)
				go func() { edit(spec, kind); done <- struct{}{} }()
			}
			for range atOnce {
				<-done
			}
			time.Sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
			placed += checkPorts(t, m.Store().View())
		}
		if placed < 100 {
			t.Errorf("only %d ports in mode host were looked at", placed)
		}
	})
}

// checkPorts fails on two holders of one port, and counts those in mode host.
func checkPorts(t *testing.T, v *state.Snapshot) int {
	t.Helper()
	type holder struct {
		Port          weft.PortSpec
		Service, Task weft.ID // a task of mode host, else the mesh
	}
	var mesh []holder
	for _, s := range v.Services() {
		for _, p := range s.Ports {
			if p.Mode != weft.PublishIngress {
				continue
			}
			for _, h := range mesh {
				if p.Published == 0 || h.Port.Clashes(&p) {
					t.Fatalf("service %s: %+v, %+v", s.Spec.Name, p, h)
				}
			}
			mesh = append(mesh, holder{Port: p, Service: s.ID})
		}
	}
	n := 0
	for _, node := range v.Nodes() {
		all := slices.Clone(mesh)
		for _, k := range v.TasksOfNode(node.ID) {
			for _, p := range k.Ports {
				if k.Status.State < weft.TaskAssigned || k.Status.State.Ended() {
					continue
				}
				for _, h := range all {
					// A service that moves its own port takes over from its
					// tasks, and any from tasks that are ending.
					makesWay := h.Task != "" || h.Service != k.Service && k.Desired <= weft.TaskRunning
					if p.Published == 0 || makesWay && h.Port.Clashes(&p) {
						t.Fatalf("node %s: %+v of task %s, %+v", node.Description.Hostname, p, k.ID, h)
					}
				}
				all = append(all, holder{p, k.Service, k.ID})
				n++
			}
		}
	}
	return n
}

// BenchmarkOneMorePort is what the leader does about ports for one more service
// among many, two of them ranges.
func BenchmarkOneMorePort(b *testing.B) {
	const services = 2000
	s := state.New()
	var changes []state.Change
	for i := range services {
		p := meshPort(uint16(20000 + i))
		changes = append(changes, state.Change{Service: &weft.Service{ID: weft.NewID(), SpecVersion: 1, Spec: weft.ServiceSpec{Name: fmt.Sprint("s", i), Ports: []weft.PortSpec{p}}, Ports: []weft.PortSpec{p}}})
	}
	media := weft.PortSpec{Protocol: weft.UDP, Target: 10000, Published: 10000, Count: 10001}
	changes = append(changes, state.Change{Service: &weft.Service{ID: weft.NewID(), SpecVersion: 1, Spec: weft.ServiceSpec{Name: "media", Ports: []weft.PortSpec{media}}, Ports: []weft.PortSpec{media}}})
	entry, err := state.EncodeEntry([]state.Command{{Changes: changes}})
	if err != nil {
		b.Fatal(err)
	}
	if errs, err := s.Apply(1, entry); err != nil || errors.Join(errs...) != nil {
		b.Fatal(err, errs)
	}
	v := s.View()
	for b.Loop() {
		if _, err := choosePorts(v, weft.Cluster{DataPathPort: 4789}, &weft.ServiceSpec{Name: "new", Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80}, meshPort(9000)}}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
