package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Address plan: as in cluster_test.go; joining nodes come from 10.99.2.1.

var joinerAddr = netip.MustParseAddr("10.99.2.1")

// admit asks the leader for a node with an advertised address ("" = none).
func (r *rig) admit(token, advertise string) (wire.AdmitResponse, error) {
	req := wire.AdmitRequest{Version: wire.ProtocolVersion, Token: token, CSR: []byte("csr"), Hostname: "new"}
	if advertise != "" {
		req.Advertise = netip.MustParseAddrPort(advertise)
	}
	return r.leader().Admit(r.ctx, req, joinerAddr)
}

// node is the leader's record.
func (r *rig) node(id weft.ID) weft.Node {
	r.t.Helper()
	nodes, err := r.leader().Nodes(r.ctx)
	r.must(err)
	for _, n := range nodes {
		if n.ID == id {
			return n
		}
	}
	r.t.Fatalf("node %s is missing", id)
	return weft.Node{}
}

func (r *rig) waitState(id weft.ID, want weft.NodeState) {
	r.t.Helper()
	r.eventually(2*admitGrace, fmt.Sprintf("node is %s", want), func() error {
		if got := r.node(id).Status; got.State != want {
			return fmt.Errorf("it is %s (%s)", got.State, got.Message)
		}
		return nil
	})
}

// TestAdmittedAddress: what a joining node leaves open is completed, and its
// record says where it is dialled.
func TestAdmittedAddress(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		for _, tc := range []struct{ token, advertise, want string }{
			{"worker-token", "", "10.99.2.1:2377"},
			{"worker-token", "0.0.0.0:4377", "10.99.2.1:4377"},
			{"worker-token", "[::]:4377", "10.99.2.1:4377"},
			{"worker-token", "10.99.2.7:4378", "10.99.2.7:4378"},
			{"worker-token", "[::ffff:10.99.2.7]:4378", "10.99.2.7:4378"},
			{"manager-token", "0.0.0.0:5377", "10.99.2.1:5377"},
			{"manager-token", "10.99.2.7:5378", "10.99.2.7:5378"},
		} {
			resp, err := r.admit(tc.token, tc.advertise)
			r.must(err)
			n := r.node(resp.Node)
			if got := n.ClusterAddr().String(); got != tc.want || resp.Addr != n.Status.Addr || n.DataPath != n.Status.Addr {
				t.Errorf("%s with %q is dialled at %s (answer %s, VTEP %s), want %s", tc.token, tc.advertise, got, resp.Addr, n.DataPath, tc.want)
			}
			if isManager := n.Spec.Role == weft.RoleManager; isManager != (n.Manager != nil) || isManager && n.Manager.Addr.String() != tc.want {
				t.Errorf("%s with %q is manager %+v", tc.token, tc.advertise, n.Manager)
			}
			r.must(r.leader().RemoveNode(r.ctx, resp.Node, true))
		}
	})
}

// TestAddressOfAnother: two nodes never live at one address, whatever their
// ports: gossip and overlay traffic have the same port on all.
func TestAddressOfAnother(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := r.worker(1) // 10.99.1.1
		r.waitState(w.id, weft.NodeReady)
		for _, token := range []string{"worker-token", "manager-token"} {
			for _, port := range []uint16{weft.ClusterPort, 4377} {
				_, err := r.admit(token, fmt.Sprintf("10.99.1.1:%d", port))
				wantErr(t, token+" at the address of a ready worker", err, weft.ErrConflict, "AdvertiseAddr", "10.99.1.1", "w1", w.id.Short(), "ready")
				_, err = r.admit(token, fmt.Sprintf("%s:%d", managerAddr(1).Addr(), port))
				wantErr(t, token+" at the address of a manager", err, weft.ErrConflict, "AdvertiseAddr", "m1", "node rm --force")
			}
		}
		// The same node comes back: nobody else has its address.
		w.crash()
		r.waitState(w.id, weft.NodeDown)
		w.start()
		r.waitState(w.id, weft.NodeReady)

		// A worker that is silent for good was replaced on its host.
		w.crash()
		r.waitState(w.id, weft.NodeDown)
		second, err := r.admit("worker-token", "10.99.1.1:2377")
		r.must(err)
		// Which has the address from the start, and for as long as it is
		// expected.
		_, err = r.admit("worker-token", "10.99.1.1:2377")
		wantErr(t, "address of a node that was just admitted", err, weft.ErrConflict, "new", "not connected", second.Node.Short())
		r.waitState(second.Node, weft.NodeDown)
		if m := r.node(second.Node).Status.Message; m != "never connected" {
			t.Errorf("a node that never came is down: %q", m)
		}
		third, err := r.admit("worker-token", "10.99.1.1:2377")
		r.must(err)

		// One that says that it leaves has no address at once.
		r.must(r.leader().Depart(r.ctx, third.Node))
		_, err = r.admit("worker-token", "10.99.1.1:2377")
		r.must(err)
	})
}

// TestAddressOfLostManager: a manager keeps its address while it is in the Raft
// group, and a member that comes back under its id needs no admission.
func TestAddressOfLostManager(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		lost := r.managers[2]
		r.stop(lost)
		r.waitState(lost.id, weft.NodeDown)
		_, err := r.admit("manager-token", lost.addr.String())
		wantErr(t, "address of a lost manager", err, weft.ErrConflict, "m3", "node rm --force "+lost.id.Short())
		r.start(lost, nil)
		r.eventually(20*time.Second, "the manager is back", func() error {
			if s := r.node(lost.id).Manager; s == nil || !s.Reachable {
				return fmt.Errorf("it is %+v", s)
			}
			return nil
		})
		r.stop(lost)
		r.eventually(20*time.Second, "the manager can be removed", func() error { return r.leader().RemoveNode(r.ctx, lost.id, true) })
		_, err = r.admit("manager-token", lost.addr.String())
		r.must(err)
	})
}

// TestSameAddressAtOnce: of many that ask at the same moment one is admitted.
func TestSameAddressAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		l := r.leader()
		const rounds, joiners = 20, 8
		for round := range rounds {
			addr := netip.AddrFrom4([4]byte{10, 99, 3, byte(round + 1)})
			errs := make([]error, joiners)
			var wg sync.WaitGroup
			for i := range errs {
				token := []string{"manager-token", "worker-token"}[i%2]
				wg.Go(func() {
					_, errs[i] = l.Admit(r.ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: token, CSR: []byte("csr"),
						Hostname: "new", Advertise: netip.AddrPortFrom(addr, uint16(4377+i%3))}, netip.Addr{})
				})
			}
			wg.Wait()
			admitted := 0
			for i, err := range errs {
				if err == nil {
					admitted++
					continue
				}
				wantErr(t, fmt.Sprintf("joiner %d", i), err, weft.ErrConflict, addr.String())
			}
			if admitted != 1 {
				t.Errorf("round %d: %d of %d were admitted", round, admitted, joiners)
			}
		}
		nodes, err := l.Nodes(r.ctx)
		r.must(err)
		if len(nodes) != rounds+1 {
			t.Errorf("%d nodes after %d rounds", len(nodes), rounds)
		}
	})
}

// TestClusterPortsAreNotPublished: the routing mesh takes what comes to a
// published port, so no node may need it for itself.
func TestClusterPortsAreNotPublished(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m := r.leader()
		publish := func(name string, port uint16, p weft.Protocol) error {
			s := webSpec(name, 0)
			s.Ports = []weft.PortSpec{{Protocol: p, Target: 80, Published: port}}
			_, err := m.CreateService(r.ctx, s)
			return err
		}
		r.must(publish("web", 4377, weft.TCP))
		_, err := r.admit("worker-token", "0.0.0.0:4377")
		wantErr(t, "cluster port that is published", err, weft.ErrConflict, "ListenAddr", "4377", "service web")
		r.must(publish("names", 4378, weft.UDP))
		resp, err := r.admit("worker-token", "0.0.0.0:4378")
		r.must(err)
		wantErr(t, "publish a node's cluster port", publish("other", 4378, weft.TCP), weft.ErrConflict, "4378", "cluster port of node new")
		wantErr(t, "publish the usual cluster port", publish("other", weft.ClusterPort, weft.TCP), weft.ErrConflict, "weft itself")
		r.must(m.Depart(r.ctx, resp.Node))
		r.must(publish("other", 4378, weft.TCP))
	})
}

// TestLogsAreAskedAtTheClusterPort: who reads a task's logs is handed the record
// with the port that the node's session told.
func TestLogsAreAskedAtTheClusterPort(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := r.worker(1)
		defer w.crash()
		svc, err := r.leader().CreateService(r.ctx, webSpec("web", 1))
		r.must(err)
		tasks := r.waitRunning(svc.ID, 1, w)
		asked := errors.New("asked")
		var at netip.AddrPort
		r.logs = func(_ context.Context, n weft.Node) (wire.Agent, error) {
			at = n.ClusterAddr()
			return nil, asked
		}
		read := func() netip.AddrPort {
			if err := r.leader().TaskLogs(r.ctx, []weft.ID{tasks[0].ID}, weft.LogOptions{}, nil); !errors.Is(err, asked) {
				t.Fatalf("logs: %v", err)
			}
			return at
		}
		if got := read(); got.String() != "10.99.1.1:2377" {
			t.Errorf("logs are asked at %s", got)
		}
		w.crash()
		w.port = 4377
		w.start()
		r.eventually(10*time.Second, "the leader has the new port", func() error {
			if got := read(); got.String() != "10.99.1.1:4377" {
				return fmt.Errorf("logs are asked at %s", got)
			}
			return nil
		})
	})
}

// TestHolderAgainstScan compares holder with the sentence it implements, over
// random clusters of few addresses.
func TestHolderAgainstScan(t *testing.T) {
	addr := func(t *rapid.T, label string) netip.Addr {
		if n := rapid.IntRange(0, 3).Draw(t, label); n > 0 {
			return netip.AddrFrom4([4]byte{10, 99, 0, byte(n)})
		}
		return netip.Addr{}
	}
	rapid.Check(t, func(t *rapid.T) {
		var nodes []weft.Node
		free := map[netip.Addr]bool{}
		for i := range rapid.IntRange(0, 5).Draw(t, "nodes") {
			n := weft.Node{ID: weft.ID(fmt.Sprint("n", i)), Status: weft.NodeStatus{
				Addr:    addr(t, "addr"),
				State:   rapid.SampledFrom([]weft.NodeState{weft.NodeUnknown, weft.NodeReady, weft.NodeDown, weft.NodeDisconnected}).Draw(t, "state"),
				Message: rapid.SampledFrom([]string{"", state.Departed}).Draw(t, "message"),
			}}
			if rapid.Bool().Draw(t, "manager") {
				n.Manager = &weft.ManagerStatus{Addr: netip.AddrPortFrom(addr(t, "manager addr"), 5377)}
			}
			nodes = append(nodes, n)
		}
		for i := range 3 {
			a := netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})
			free[a] = true
			for _, n := range nodes {
				isDown := n.Status.State == weft.NodeDown
				if n.Manager != nil && (n.Manager.Addr.Addr() == a || n.Status.Addr == a) || !isDown && n.Status.Addr == a {
					free[a] = false
				}
			}
			if got := holder(nodes, a); (got == nil) != free[a] {
				t.Fatalf("%s: holder is %+v, free: %v", a, got, free[a])
			}
		}
	})
}
