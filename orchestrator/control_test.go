package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
)

// wantErr checks a sentinel and that the text names what it is about.
func wantErr(t *testing.T, what string, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Errorf("%s: %v, want %v", what, err, sentinel)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not name %q", what, err, w)
		}
	}
}

func TestServiceCalls(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		_, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "net"})
		r.must(err)
		w := r.worker(1)
		defer w.crash()
		time.Sleep(time.Second) // it has reported its listener, TCP 22

		spec := webSpec("web", 0)
		spec.Networks = []weft.NetworkTarget{{Network: "net"}}
		spec.Ports = []weft.PortSpec{{Target: 80}, {Target: 81, Published: 8081}}
		web, err := m.CreateService(ctx, spec)
		r.must(err)
		if web.Ports[0].Published != 30000 || web.Ports[1].Published != 8081 || web.Ports[0].Protocol != weft.TCP || web.SpecVersion != 1 {
			t.Errorf("stored %+v", web)
		}
		create := func(edit func(s *weft.ServiceSpec)) error {
			s := webSpec("other", 1)
			edit(&s)
			_, err := m.CreateService(ctx, s)
			return err
		}
		wantErr(t, "name taken", create(func(s *weft.ServiceSpec) { s.Name = "web" }), weft.ErrConflict, "web")
		wantErr(t, "network missing", create(func(s *weft.ServiceSpec) {
			s.Networks = []weft.NetworkTarget{{Network: "net"}, {Network: "nowhere"}}
		}), weft.ErrNotFound, "nowhere", "TaskTemplate.Networks[1].Target")
		wantErr(t, "ingress by hand", create(func(s *weft.ServiceSpec) {
			s.Networks = []weft.NetworkTarget{{Network: weft.IngressName}}
		}), weft.ErrForbidden, "ingress")
		port := func(p uint16) func(*weft.ServiceSpec) {
			return func(s *weft.ServiceSpec) { s.Ports = []weft.PortSpec{{Target: 80, Published: p}} }
		}
		wantErr(t, "port of a service", create(port(8081)), weft.ErrConflict, "8081", "service web")
		wantErr(t, "port of a process", create(port(22)), weft.ErrConflict, "22", "w1")
		wantErr(t, "weft's own port", create(port(2377)), weft.ErrConflict, "2377", "weft itself")
		wantErr(t, "dnsrr with ports", create(func(s *weft.ServiceSpec) { port(9000)(s); s.EndpointMode = weft.EndpointDNSRR }), weft.ErrInvalid)

		// Names.
		for _, ref := range []string{string(web.ID), "web", string(web.ID[:20])} {
			if s, err := m.Service(ctx, ref); err != nil || s.ID != web.ID {
				t.Errorf("Service(%s): %v", ref, err)
			}
		}
		_, err = m.Service(ctx, "we")
		wantErr(t, "name prefix", err, weft.ErrNotFound, "service we not found")
		_, err = m.Service(ctx, "")
		wantErr(t, "no name", err, weft.ErrInvalid)

		// Updates.
		up := web.Spec
		up.Replicas = 2
		_, err = m.UpdateService(ctx, web.ID, web.Meta.Index-1, up)
		wantErr(t, "stale update", err, weft.ErrOutOfSequence, "web")
		up.Name = "renamed"
		_, err = m.UpdateService(ctx, web.ID, web.Meta.Index, up)
		wantErr(t, "rename", err, weft.ErrInvalid, "renamed")
		up.Name = "web"
		scaled, err := m.UpdateService(ctx, web.ID, web.Meta.Index, up)
		r.must(err)
		if scaled.SpecVersion != 2 || scaled.Previous == nil || scaled.Previous.Replicas != 0 || !slices.Equal(scaled.VIPs, web.VIPs) ||
			!slices.EqualFunc(scaled.Ports, web.Ports, weft.PortSpec.Equal) || scaled.Update.State != weft.UpdateNone {
			t.Errorf("scaled service is %+v", scaled)
		}
		before := r.waitRunning(web.ID, 2)
		up.Replicas = 3
		up.Labels = map[string]string{"a": "b"}
		cur, err := m.Service(ctx, "web")
		r.must(err)
		_, err = m.UpdateService(ctx, web.ID, cur.Meta.Index, up)
		r.must(err)
		after := r.waitRunning(web.ID, 3)
		for _, b := range before {
			if !slices.ContainsFunc(after, func(a weft.Task) bool { return a.ID == b.ID }) {
				t.Errorf("scaling restarted task %s", b.ID)
			}
		}
		// A change of the image replaces every task, one VIP less frees it.
		cur, err = m.Service(ctx, "web")
		r.must(err)
		up = cur.Spec
		up.Container.Image = "weft/whoami:2"
		up.Ports = nil
		rolled, err := m.UpdateService(ctx, web.ID, cur.Meta.Index, up)
		r.must(err)
		if len(rolled.VIPs) != 1 || len(rolled.Ports) != 0 || rolled.VIPs[0] != web.VIPs[1] {
			t.Errorf("unpublished service is %+v", rolled)
		}
		r.eventually(2*time.Minute, "the update ends", func() error {
			s, err := m.Service(ctx, "web")
			r.must(err)
			run := r.running(web.ID)
			for _, k := range run {
				if k.SpecVersion != rolled.SpecVersion {
					return fmt.Errorf("task %s has version %d", k.ID, k.SpecVersion)
				}
			}
			if len(run) != 3 || s.Update.State != weft.UpdateDone {
				return fmt.Errorf("%d run, update is %+v", len(run), s.Update)
			}
			return nil
		})
		r.must(create(port(8081))) // free again
		r.checkAllocator()
	})
}

func TestNetworkCalls(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		nets, err := m.Networks(ctx)
		r.must(err)
		if len(nets) != 1 || nets[0].VNI != weft.IngressVNI || nets[0].Spec.Subnets[0].Prefix.String() != "10.255.0.0/16" {
			t.Fatalf("a new cluster has networks %+v", nets)
		}
		node, err := m.Nodes(ctx)
		r.must(err)
		if !nets[0].Spec.Subnets[0].Prefix.Contains(node[0].IngressAddr.Addr()) || node[0].IngressAddr.Bits() != 16 {
			t.Errorf("ingress address is %s", node[0].IngressAddr)
		}
		// A node with routes.
		resp, err := m.Admit(ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "worker-token", CSR: []byte("c")}, netip.MustParseAddr("10.99.1.1"))
		r.must(err)
		sctx, cancel := context.WithCancel(ctx)
		defer cancel()
		opened := make(chan struct{}, 8)
		go m.Session(sctx, resp.Node, wire.SessionRequest{Version: wire.ProtocolVersion, Description: weft.NodeDescription{
			Hostname: "w1", UsedPrefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("192.168.7.0/24")},
		}}, func(wire.Assignments) error { opened <- struct{}{}; return nil })
		<-opened
		sub := func(name, prefix, gw string) error {
			s := weft.Subnet{Prefix: netip.MustParsePrefix(prefix)}
			if gw != "" {
				s.Gateway = netip.MustParseAddr(gw)
			}
			_, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: name, Subnets: []weft.Subnet{s}})
			return err
		}
		auto, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "auto"})
		r.must(err)
		if p := auto.Spec.Subnets[0].Prefix; p.String() != "10.1.0.0/20" || auto.VNI != weft.FirstVNI || auto.Spec.Subnets[0].Gateway.String() != "10.1.0.1" {
			t.Errorf("automatic subnet is %s, VNI %d", p, auto.VNI)
		}
		wantErr(t, "name taken", sub("auto", "10.77.0.0/24", ""), weft.ErrConflict, "auto")
		wantErr(t, "overlaps a network", sub("x", "10.1.8.0/24", ""), weft.ErrConflict, "network auto")
		wantErr(t, "overlaps the gateway bridge", sub("x", "172.31.0.0/16", ""), weft.ErrConflict, "172.31.240.0/20", "gateway bridge")
		wantErr(t, "overlaps a route", sub("x", "192.168.0.0/16", ""), weft.ErrConflict, "192.168.7.0/24", "w1")
		wantErr(t, "host bits", sub("x", "10.77.0.1/24", ""), weft.ErrInvalid)
		wantErr(t, "foreign gateway", sub("x", "10.77.0.0/24", "10.78.0.1"), weft.ErrInvalid)
		r.must(sub("given", "10.77.0.0/24", "10.77.0.254"))
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "x", Ingress: true})
		wantErr(t, "second ingress", err, weft.ErrUnsupported)
		wantErr(t, "removal of ingress", m.RemoveNetwork(ctx, nets[0].ID), weft.ErrForbidden)
		wantErr(t, "removal of nothing", m.RemoveNetwork(ctx, "nothing"), weft.ErrNotFound, "nothing")

		// A removed network's numbers rest, but can be asked for.
		r.must(m.RemoveNetwork(ctx, auto.ID))
		time.Sleep(100 * time.Millisecond)
		next, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "next"})
		r.must(err)
		if next.VNI == auto.VNI || next.Spec.Subnets[0].Prefix == auto.Spec.Subnets[0].Prefix {
			t.Errorf("network next took over VNI %d, subnet %s at once", next.VNI, next.Spec.Subnets[0].Prefix)
		}
		r.must(sub("again", "10.1.0.0/20", ""))
	})
}

func TestNodeAndClusterCalls(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		m, ctx := r.leader(), r.ctx
		w := r.worker(1)
		time.Sleep(time.Second)
		find := func(id weft.ID) weft.Node {
			nodes, err := r.leader().Nodes(ctx)
			r.must(err)
			for _, n := range nodes {
				if n.ID == id {
					return n
				}
			}
			t.Fatalf("node %s is missing", id)
			return weft.Node{}
		}
		if n := find(w.id); n.Status.State != weft.NodeReady || n.Manager != nil || n.Status.Addr.String() != "10.99.1.1" || time.Since(n.Status.Seen) > time.Second {
			t.Errorf("worker is %+v", n)
		}
		for _, x := range r.managers {
			if n := find(x.id); n.Manager == nil || !n.Manager.Reachable || n.Manager.Leader != (x == m) {
				t.Errorf("manager %s is %+v", x.addr, n.Manager)
			}
		}
		n := find(w.id)
		promoted := n.Spec
		promoted.Role = weft.RoleManager
		wantErr(t, "promote", m.UpdateNode(ctx, w.id, n.Meta.Index, promoted), weft.ErrUnsupported, "w1")
		wantErr(t, "stale", m.UpdateNode(ctx, w.id, n.Meta.Index+1, n.Spec), weft.ErrOutOfSequence)
		wantErr(t, "remove a ready node", m.RemoveNode(ctx, w.id, false), weft.ErrConflict, "w1", "ready")
		wantErr(t, "remove the leader", m.RemoveNode(ctx, m.id, true), weft.ErrConflict)
		n.Spec.Labels = map[string]string{"disk": "ssd"}
		r.must(m.UpdateNode(ctx, w.id, n.Meta.Index, n.Spec))
		if find(w.id).Spec.Labels["disk"] != "ssd" {
			t.Error("label is not stored")
		}
		w.crash()
		r.eventually(30*time.Second, "the silent node is down", func() error {
			if s := find(w.id).Status.State; s != weft.NodeDown {
				return fmt.Errorf("it is %s", s)
			}
			return nil
		})
		cert := ca.Identity{Node: w.id, Role: weft.RoleWorker}
		r.must(m.Check(ctx, cert))
		r.must(m.RemoveNode(ctx, w.id, false))
		wantErr(t, "certificate of a removed node", m.Check(ctx, cert), weft.ErrForbidden, string(w.id), "removed")
		for _, x := range r.managers {
			if x != m { // it may be behind, and sends the caller to the leader
				r.must(x.Check(ctx, cert))
			}
		}

		// Joining.
		_, err := m.Admit(ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "wrong"}, netip.MustParseAddr("10.99.1.9"))
		wantErr(t, "wrong token", err, weft.ErrForbidden)
		_, err = m.Admit(ctx, wire.AdmitRequest{Version: 9, Token: "worker-token"}, netip.MustParseAddr("10.99.1.9"))
		wantErr(t, "other version", err, weft.ErrInvalid, "9")
		_, err = m.Admit(ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "manager-token", Advertise: managerAddr(2)}, netip.Addr{})
		wantErr(t, "address of another manager", err, weft.ErrConflict, "m2")

		// The cluster object.
		c, err := m.Cluster(ctx)
		r.must(err)
		if c.CAKey != nil || c.Tokens.Worker != "worker-token" {
			t.Errorf("cluster answers key %q, tokens %+v", c.CAKey, c.Tokens)
		}
		r.must(m.UpdateCluster(ctx, c.Meta.Index, weft.ClusterUpdate{Spec: c.Spec, RotateWorker: true}))
		wantErr(t, "stale rotation", m.UpdateCluster(ctx, c.Meta.Index, weft.ClusterUpdate{Spec: c.Spec}), weft.ErrOutOfSequence)
		_, err = m.Admit(ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "worker-token"}, netip.MustParseAddr("10.99.1.9"))
		wantErr(t, "rotated token", err, weft.ErrForbidden)
		if v, _ := m.Store().View().Cluster(); string(v.CAKey) != "key" {
			t.Error("the update lost the CA key")
		}

		// Leaving: a follower, then the leader, which hands over first.
		var follower *member
		for _, x := range r.managers {
			if x != m {
				follower = x
			}
		}
		r.must(m.Depart(ctx, follower.id))
		if n := find(follower.id); n.Status.State != weft.NodeDown || n.Manager != nil {
			t.Errorf("departed manager is %+v", n)
		}
		r.stop(follower)
		var nl *wire.NotLeader
		if err := m.Depart(ctx, m.id); !errors.As(err, &nl) || nl.Leader == m.addr {
			t.Fatalf("leader departs: %v", err)
		}
		r.eventually(10*time.Second, "the successor lets the old leader go", func() error {
			l := r.leader()
			if l == m {
				return errors.New("it still leads")
			}
			return l.Depart(ctx, m.id)
		})
		r.stop(m)
		last := r.leader()
		wantErr(t, "last manager leaves", last.Depart(ctx, last.id), weft.ErrConflict, "last manager")
	})
}

func TestTaskLogs(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := []*agent{r.worker(1), r.worker(2)}
		defer w[0].crash()
		defer w[1].crash()
		svc, err := r.managers[0].CreateService(r.ctx, webSpec("web", 4))
		r.must(err)
		var ids []weft.ID
		for _, k := range r.waitRunning(svc.ID, 4) {
			ids = append(ids, k.ID)
		}
		r.logs = func(_ context.Context, n weft.Node) (wire.Agent, error) {
			if n.ID == w[1].id {
				return nil, fmt.Errorf("dial: %w", weft.ErrUnavailable)
			}
			return fakeLogs{n.ID}, nil
		}
		got := map[weft.ID]int{}
		err = r.managers[0].TaskLogs(r.ctx, ids, weft.LogOptions{}, func(l weft.LogRecord) error { got[l.Task]++; return nil })
		wantErr(t, "one node unreachable", err, weft.ErrUnavailable, "w2")
		if len(got) != 2 {
			t.Errorf("records of %d tasks", len(got))
		}
		stop := errors.New("reader left")
		if err := r.managers[0].TaskLogs(r.ctx, ids, weft.LogOptions{Follow: true}, func(weft.LogRecord) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("reader leaves: %v", err)
		}
		err = r.managers[0].TaskLogs(r.ctx, []weft.ID{"none"}, weft.LogOptions{}, nil)
		wantErr(t, "unknown task", err, weft.ErrNotFound, "none")
	})
}

type fakeLogs struct{ node weft.ID }

func (f fakeLogs) Drain(context.Context, weft.ID, weft.ID) error { return weft.ErrUnsupported }

func (f fakeLogs) Arrive(context.Context, weft.ID, weft.ID, []weft.ID) error {
	return weft.ErrUnsupported
}

func (f fakeLogs) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, to func(weft.LogRecord) error) error {
	for i := range 3 {
		if err := to(weft.LogRecord{Task: task, Node: f.node, Line: fmt.Appendln(nil, i)}); err != nil {
			return err
		}
	}
	if o.Follow {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}
