package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Address plan: manager i has 10.99.0.i:2377, admitted nodes 10.99.1.i.

// rig is a cluster of managers over raft's in-memory network. It is used inside
// a synctest bubble.
type rig struct {
	t        *testing.T
	ctx      context.Context
	log      *slog.Logger
	managers []*member
	logs     func(ctx context.Context, n weft.Node) (wire.Agent, error)
	// way is how long a message between managers takes, one way; nil: no time.
	way func() time.Duration
}

type member struct {
	*Manager
	id     weft.ID
	addr   netip.AddrPort
	tr     *raft.InmemTransport
	stores *Stores
	up     atomic.Bool // for agents, which run beside the test
	cancel context.CancelFunc
	done   chan error // closed after Run's result
}

func testLog() *slog.Logger {
	if os.Getenv("WEFT_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, ctx: t.Context(), log: testLog()}
	r.logs = func(context.Context, weft.Node) (wire.Agent, error) { return nil, weft.ErrUnavailable }
	return r
}

func memStores() *Stores {
	s := raft.NewInmemStore()
	return &Stores{Log: s, Stable: s, Snapshots: raft.NewInmemSnapshotStore()}
}

func testCluster() weft.Cluster {
	return weft.Cluster{
		ID: weft.NewID(), Spec: weft.DefaultClusterSpec(), AddrPools: weft.DefaultAddrPools(),
		MaskLength: weft.DefaultMaskLength, DataPathPort: weft.VXLANPort,
		CACert: []byte("cert"), CAKey: []byte("key"), GossipKey: []byte("gossip"),
		Tokens: weft.JoinTokens{Worker: "worker-token", Manager: "manager-token"},
	}
}

// fakeCA admits by plain tokens and "signs" by naming the node.
type fakeCA struct{}

func (fakeCA) VerifyToken(c weft.Cluster, token string) (weft.Role, error) {
	switch token {
	case c.Tokens.Worker:
		return weft.RoleWorker, nil
	case c.Tokens.Manager:
		return weft.RoleManager, nil
	}
	return 0, fmt.Errorf("join token is wrong: %w", weft.ErrForbidden)
}

func (fakeCA) Sign(_ weft.Cluster, csr []byte, node weft.ID, role weft.Role) ([]byte, error) {
	return fmt.Appendf(nil, "%s %s %s", csr, node, role), nil
}

func (fakeCA) NewToken(weft.Cluster) (string, error) { return "token-" + string(weft.NewID()), nil }

func managerAddr(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 99, 0, byte(i)}), weft.ClusterPort)
}

// start runs a member with its stores; boot makes the first one.
func (r *rig) start(m *member, boot *Bootstrap) {
	r.t.Helper()
	_, m.tr = raft.NewInmemTransportWithTimeout(raft.ServerAddress(m.addr.String()), 200*time.Millisecond)
	for _, o := range r.managers {
		if o != m && o.cancel != nil {
			o.tr.Connect(m.tr.LocalAddr(), m.tr)
			m.tr.Connect(o.tr.LocalAddr(), o.tr)
		}
	}
	var tr raft.Transport = m.tr
	if r.way != nil {
		tr = &lateTransport{InmemTransport: m.tr, way: r.way}
	}
	mgr, err := New(Config{
		Node: m.id, Addr: m.addr, Transport: tr, Stores: m.stores, Bootstrap: boot,
		CA: fakeCA{}, Logs: func(ctx context.Context, n weft.Node) (wire.Agent, error) { return r.logs(ctx, n) },
		Log: r.log.With("member", m.addr.Addr().String()),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	m.Manager = mgr
	ctx, cancel := context.WithCancel(r.ctx)
	done := make(chan error, 1) // m may be started again before this run has closed it
	m.cancel, m.done = cancel, done
	m.up.Store(true)
	go func() {
		done <- mgr.Run(ctx)
		close(done)
	}()
}

func (r *rig) stop(m *member) {
	r.t.Helper()
	m.up.Store(false)
	m.cancel()
	if err := <-m.done; err != nil {
		r.t.Errorf("member %s: Run: %v", m.addr, err)
	}
	m.cancel = nil
	for _, o := range r.managers {
		if o != m && o.cancel != nil {
			o.tr.Disconnect(m.tr.LocalAddr())
		}
	}
	if err := m.tr.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) stopAll() {
	for _, m := range r.managers {
		if m.cancel != nil {
			r.stop(m)
		}
	}
}

// boot starts n managers that form a cluster.
func (r *rig) boot(n int) {
	r.t.Helper()
	r.bootWith(testCluster(), n)
}

func (r *rig) bootWith(c weft.Cluster, n int) {
	r.t.Helper()
	first := &member{id: weft.NewID(), addr: managerAddr(1), stores: memStores()}
	r.managers = append(r.managers, first)
	r.start(first, &Bootstrap{Cluster: c, Node: weft.Node{ID: first.id, Description: weft.NodeDescription{Hostname: "m1"}}})
	r.must(first.Await(r.within(10 * time.Second)))
	for i := 2; i <= n; i++ {
		r.join(i)
	}
}

func (r *rig) join(i int) *member {
	r.t.Helper()
	l := r.leader()
	resp, err := l.Admit(r.ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "manager-token", CSR: []byte("csr"),
		Hostname: fmt.Sprintf("m%d", i), Advertise: managerAddr(i)}, netip.Addr{})
	r.must(err)
	m := &member{id: resp.Node, addr: managerAddr(i), stores: memStores()}
	r.managers = append(r.managers, m)
	r.start(m, nil)
	r.eventually(20*time.Second, "manager gets its vote", func() error {
		t, err := r.leader().leading()
		if err != nil {
			return err
		}
		f := t.raft.GetConfiguration()
		if err := f.Error(); err != nil {
			return err
		}
		for _, s := range f.Configuration().Servers {
			if s.ID == raft.ServerID(m.id) && s.Suffrage == raft.Voter {
				return nil
			}
		}
		return errors.New("no voter yet")
	})
	return m
}

func (r *rig) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(r.ctx, d)
	r.t.Cleanup(cancel)
	return ctx
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// eventually waits in virtual time.
func (r *rig) eventually(d time.Duration, what string, check func() error) {
	r.t.Helper()
	end := time.Now().Add(d)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("%s: not within %s: %v", what, d, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// leader is the member that answers reads.
func (r *rig) leader() *member {
	r.t.Helper()
	var found *member
	r.eventually(20*time.Second, "a leader answers", func() error {
		for _, m := range r.managers {
			if m.cancel == nil {
				continue
			}
			if _, err := m.Cluster(r.ctx); err == nil {
				found = m
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return found
}

// cut takes a member off the network in both directions.
func (r *rig) cut(m *member) {
	m.tr.DisconnectAll()
	for _, o := range r.managers {
		if o != m && o.cancel != nil {
			o.tr.Disconnect(m.tr.LocalAddr())
		}
	}
}

func (r *rig) heal(m *member) {
	for _, o := range r.managers {
		if o != m && o.cancel != nil {
			o.tr.Connect(m.tr.LocalAddr(), m.tr)
			m.tr.Connect(o.tr.LocalAddr(), o.tr)
		}
	}
}

// agent is a node that obeys: it runs what it is told at once and reports.
type agent struct {
	r    *rig
	id   weft.ID
	name string
	addr netip.Addr
	port uint16         // told when a session opens; changed only while it is stopped
	used []netip.Prefix // on its host
	// addrs of its host.
	addrs []weft.HostAddr

	// mu guards: fields below.
	mu       sync.Mutex
	tasks    map[weft.ID]weft.Task
	networks map[weft.ID]bool
	states   map[weft.ID]weft.TaskState // last to report
	index    uint64                     // of the assignments that are carried out
	newest   uint64                     // and of those that were heard
	frozen   bool                       // the data plane stands still
	listens  []weft.Listener            // besides TCP 22
	rules    []weft.InputRule
	ring     weft.GossipRing
	keyless  bool // it is of a version that cannot change keys of gossip
	stuck    bool // it takes no keys up
	cancel   context.CancelFunc
	done     chan struct{}
}

// worker joins; used are ranges in use on its host.
func (r *rig) worker(i int, used ...netip.Prefix) *agent {
	r.t.Helper()
	addr := netip.AddrFrom4([4]byte{10, 99, 1, byte(i)})
	resp, err := r.leader().Admit(r.ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "worker-token", CSR: []byte("csr"),
		Hostname: fmt.Sprintf("w%d", i)}, addr)
	r.must(err)
	a := &agent{r: r, id: resp.Node, name: fmt.Sprintf("w%d", i), addr: addr, used: used, addrs: []weft.HostAddr{{Interface: "eth0", Addr: addr}}, tasks: map[weft.ID]weft.Task{}, states: map[weft.ID]weft.TaskState{}}
	a.start()
	return a
}

func (a *agent) start() {
	ctx, cancel := context.WithCancel(a.r.ctx)
	a.cancel, a.done = cancel, make(chan struct{})
	go func() {
		defer close(a.done)
		var wg sync.WaitGroup
		wg.Go(func() { a.sessions(ctx) })
		wg.Go(func() { a.reports(ctx) })
		wg.Wait()
	}()
}

// crash is a stop without a word.
func (a *agent) crash() {
	a.cancel()
	<-a.done
}

func (a *agent) anyLeader(f func(m *member) error) {
	for _, m := range a.r.managers {
		if m.up.Load() && f(m) == nil {
			return
		}
	}
}

func (a *agent) sessions(ctx context.Context) {
	for ctx.Err() == nil {
		a.anyLeader(func(m *member) error {
			return m.Session(ctx, a.id, wire.SessionRequest{Version: wire.ProtocolVersion, Description: weft.NodeDescription{
				Hostname: a.name, NanoCPUs: 4e9, MemoryBytes: 8 << 30, UsedPrefixes: a.used, Addrs: a.addrs,
			}, Addr: a.addr, Port: a.port}, a.take)
		})
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (a *agent) take(s wire.Assignments) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s.Full {
		a.tasks, a.networks = map[weft.ID]weft.Task{}, map[weft.ID]bool{}
	}
	for _, n := range s.Networks {
		a.networks[n.ID] = true
	}
	for _, id := range s.GoneNetworks {
		delete(a.networks, id)
	}
	broken := map[weft.ID]uint64{} // the version of a service that does not run
	for _, v := range s.Specs {
		if v.Spec.Container.Image == brokenImage {
			broken[v.Service] = v.Version
		}
	}
	for _, t := range s.Tasks {
		a.tasks[t.ID] = t
		switch {
		case t.Desired == weft.TaskRunning && broken[t.Service] == t.SpecVersion && t.SpecVersion > 0:
			a.states[t.ID] = weft.TaskFailed
		case t.Desired == weft.TaskRemove:
			a.states[t.ID] = weft.TaskRemove
		case t.Desired >= weft.TaskShutdown:
			a.states[t.ID] = weft.TaskShutdown
		case !t.Status.State.Ended() && a.states[t.ID] < weft.TaskRunning:
			a.states[t.ID] = weft.TaskRunning
		}
	}
	if s.Cluster != nil && !a.stuck {
		a.ring = s.Cluster.GossipRing()
	}
	if a.newest = s.Index; !a.frozen {
		a.index = s.Index
	}
	for _, id := range s.GoneTasks {
		delete(a.tasks, id)
		delete(a.states, id)
	}
	return nil
}

func (a *agent) reports(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(250 * time.Millisecond):
		}
		a.mu.Lock()
		rep := wire.Report{Listeners: append([]weft.Listener{{Protocol: weft.TCP, Port: 22}}, a.listens...)}
		rep.Applied, rep.InputRules = a.index, a.rules
		if len(a.ring.Sends.Key) > 0 && !a.keyless {
			e := a.ring.Epochs()
			rep.Gossip = &e
		}
		for id, s := range a.states {
			rep.Tasks = append(rep.Tasks, wire.TaskReport{Task: id, Status: weft.TaskStatus{State: s, At: time.Unix(1, 0), Message: "by the fake"}})
		}
		a.mu.Unlock()
		a.anyLeader(func(m *member) error { return m.Report(ctx, a.id, rep) })
	}
}

// listen replaces what its host listens on besides TCP 22.
func (a *agent) listen(l ...weft.Listener) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.listens = l
}

// filter replaces the rules of its host's firewall.
func (a *agent) filter(rules ...weft.InputRule) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rules = append([]weft.InputRule{}, rules...)
}

// fail makes a running task end with an error.
func (a *agent) fail(id weft.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.states[id] = weft.TaskFailed
}

// brokenImage ends as soon as it starts, on all agents.
const brokenImage = "weft/broken"

func webSpec(name string, replicas uint64) weft.ServiceSpec {
	return weft.ServiceSpec{Name: name, Replicas: replicas, Container: weft.ContainerSpec{Image: "weft/whoami"}}
}

// running lists the tasks of a service that are running and wanted.
func (r *rig) running(service weft.ID) []weft.Task {
	r.t.Helper()
	list, err := r.leader().Tasks(r.ctx, weft.TaskFilter{Services: []weft.ID{service}})
	r.must(err)
	var out []weft.Task
	for _, t := range list.Tasks {
		if t.Status.State == weft.TaskRunning && t.Desired == weft.TaskRunning {
			out = append(out, t)
		}
	}
	return out
}

func (r *rig) waitRunning(service weft.ID, n int, on ...*agent) []weft.Task {
	r.t.Helper()
	var got []weft.Task
	r.eventually(60*time.Second, fmt.Sprintf("%d tasks run", n), func() error {
		got = r.running(service)
		if len(got) != n {
			return fmt.Errorf("%d of %d run", len(got), n)
		}
		for _, t := range got {
			if len(on) == 0 {
				continue
			}
			ok := false
			for _, a := range on {
				ok = ok || a.id == t.Node
			}
			if !ok {
				return fmt.Errorf("task %s runs on %s", t.ID, t.Node)
			}
		}
		return nil
	})
	return got
}

func snapshotBytes(t *testing.T, s *state.Store) string {
	t.Helper()
	var b writer
	if err := s.View().Persist(&b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
