package agent

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestModeHostReachesTheBalancer: a task's own port leads to its address behind the
// gateway bridge, on the addresses that this host has, and outlives the daemon.
func TestModeHostReachesTheBalancer(t *testing.T) {
	for name, removed := range map[string]bool{"removed": true, "adopted": false} {
		t.Run(name, func(t *testing.T) { modeHost(t, removed) })
	}
}

func modeHost(t *testing.T, removed bool) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		one.Ports = []weft.PortSpec{
			{Protocol: weft.TCP, Target: 80, Published: 8080, Mode: weft.PublishHost, Interface: "eth0"},
			{Protocol: weft.UDP, Target: 53, Published: 53, Mode: weft.PublishHost, IPs: []netip.Addr{vtepB}},
		}
		want := []ingress.Published{{
			Service: svc, Protocol: weft.TCP, Port: 8080, Target: 80, IPs: []netip.Addr{vtepA}, Host: true,
			Backends: []ingress.Backend{{Task: one.ID, Addr: netip.MustParseAddr("172.31.0.9")}},
		}}
		if hasIPv6() {
			want[0].Backends[0].Addr6 = netip.MustParseAddr("fd77:6566:7467::ac1f:9")
		}
		published := func() []ingress.Published {
			r.balancer.mu.Lock()
			defer r.balancer.mu.Unlock()
			return r.balancer.table.Published
		}
		kill, s := r.running(one)
		if got := published(); !reflect.DeepEqual(got, want) {
			t.Errorf("published %+v\nwant %+v", got, want)
		}
		if removed {
			s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskRemove)}}
			settle(5 * time.Second)
			if got := published(); len(got) != 0 {
				t.Errorf("after the task: %+v", got)
			}
			return
		}
		kill()
		r.balancer.table = ingress.Table{}
		r.start()
		settle(time.Second)
		if got := published(); !reflect.DeepEqual(got, want) {
			t.Errorf("the next daemon publishes %+v\nwant %+v", got, want)
		}
	})
}

// TestAddrsAreReported: and the rules of the firewall, each once while it stays.
func TestAddrsAreReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var told [][]weft.HostAddr
		var rules [][]weft.InputRule
		r.leader.onReport(func(_ context.Context, rep wire.Report) error {
			if rep.Addrs != nil {
				told = append(told, rep.Addrs)
			}
			if rep.InputRules != nil {
				rules = append(rules, rep.InputRules)
			}
			return nil
		})
		r.running(testTask(1, front))
		settle(20 * time.Second)
		if !reflect.DeepEqual(told, [][]weft.HostAddr{hostAddrs}) {
			t.Errorf("told %v, want %v once", told, hostAddrs)
		}
		if !reflect.DeepEqual(rules, [][]weft.InputRule{hostRules}) {
			t.Errorf("told %v, want %v once", rules, hostRules)
		}
	})
}

// TestLaterBindIsLogged: what a process of the host binds although this node
// publishes it is said once, with the service and the socket.
func TestLaterBindIsLogged(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		web := weft.Listener{Protocol: weft.TCP, Port: 8080, Addr: netip.IPv4Unspecified()}
		r.running(testTask(1, front))
		settle(10 * time.Second)
		first := r.log.String()
		r.setListeners([]weft.Listener{web}, nil)
		settle(20 * time.Second)
		if r.log.String() != first {
			t.Errorf("logged %s", strings.TrimPrefix(r.log.String(), first))
		}
		// Now a service asks for it, and a task of mode host for another.
		m := r.agent.model.Load()
		a := wire.Assignments{Seq: m.Seq + 1, Services: []wire.ServiceView{{ID: svc, Name: "web", Ports: []weft.PortSpec{
			{Protocol: weft.TCP, Target: 80, Published: 8000, Count: 100},
			{Protocol: weft.TCP, Target: 80, Published: 8080, IPs: []netip.Addr{vtepB}}, // of another host
		}}}}
		next, err := m.apply(a)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := next.bound([]weft.Listener{web}, hostAddrs), []string{"8080/tcp of service web, by the socket 0.0.0.0:8080"}; !slices.Equal(got, want) {
			t.Errorf("bound %q, want %q", got, want)
		}
		r.agent.adopt(next, true)
		settle(20 * time.Second)
		if n := strings.Count(r.log.String(), "8080/tcp of service web, by the socket 0.0.0.0:8080"); n != 1 {
			t.Errorf("said %d times:\n%s", n, r.log.String())
		}
	})
}

// TestUnansweredPortIsLogged: what this node cannot answer is said once, with the service,
// and again when it was answered in between.
func TestUnansweredPortIsLogged(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		lack := func(why string) {
			r.balancer.mu.Lock()
			r.balancer.lacks = why
			r.balancer.mu.Unlock()
			settle(20 * time.Second)
		}
		said := func() int {
			return strings.Count(r.log.String(), `msg="a published port is not answered on this node" service=web port="5060/sctp at [10.99.0.1]" reason="no SCTP here"`)
		}
		lack("no SCTP here")
		one := testTask(1, front)
		one.Ports = []weft.PortSpec{
			{Protocol: weft.TCP, Target: 80, Published: 8080, Mode: weft.PublishHost},
			{Protocol: weft.SCTP, Target: 5060, Published: 5060, Mode: weft.PublishHost, IPs: []netip.Addr{vtepA}},
		}
		r.running(one)
		settle(20 * time.Second)
		if n := said(); n != 1 || strings.Contains(r.log.String(), "8080/tcp") {
			t.Errorf("said %d times, want once, of SCTP alone:\n%s", n, r.log.String())
		}
		lack("")
		lack("no SCTP here")
		if n := said(); n != 2 {
			t.Errorf("said %d times, want once more:\n%s", n, r.log.String())
		}
	})
}
