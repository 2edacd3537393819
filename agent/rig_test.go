package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// Address plan: hosts 10.99.0.N; network "front" (VNI 4097) 10.0.16.0/20,
// "back" (4098) 10.0.32.0/20.
var (
	nodeA = testID("a")
	nodeB = testID("b")
	svc   = testID("s")
	front = weft.Network{ID: testID("f"), VNI: 4097, Spec: weft.NetworkSpec{Name: "front", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.0.16.0/20")}}}}
	back  = weft.Network{ID: testID("k"), VNI: 4098, Spec: weft.NetworkSpec{Name: "back", Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.0.32.0/20")}}}}
	portA = uint16(4377) // cluster port of a
	vtepA = netip.MustParseAddr("10.99.0.1")
	vtepB = netip.MustParseAddr("10.99.0.2")
)

// testID makes a valid identifier that begins with s.
func testID(s string) weft.ID { return weft.ID((s + strings.Repeat("0", 25))[:25]) }

func testSpec(version uint64, args ...string) weft.SpecVersion {
	return weft.SpecVersion{Service: svc, Version: version, Spec: weft.ServiceSpec{
		Name: "web", Container: weft.ContainerSpec{Image: "weft/whoami", Args: args, StopGrace: time.Second},
	}}
}

// testTask is a task of the service "web" on one network; n is its slot and the
// end of its address.
func testTask(n int, network weft.Network) weft.Task {
	addr := network.Spec.Subnets[0].Prefix.Addr().As4()
	addr[3] = byte(n)
	return weft.Task{
		ID: testID(fmt.Sprintf("t%d", n)), Service: svc, SpecVersion: 1, Slot: uint64(n), Node: nodeA, Desired: weft.TaskRunning,
		Status:      weft.TaskStatus{State: weft.TaskAssigned},
		Attachments: []weft.Attachment{{Network: network.ID, Addr: netip.PrefixFrom(netip.AddrFrom4(addr), 20)}},
	}
}

func desired(t weft.Task, s weft.TaskState) weft.Task {
	t.Desired = s
	return t
}

// full is a leader's first message.
func full(tasks ...weft.Task) wire.Assignments {
	vip := weft.VIP{Network: front.ID, Addr: netip.MustParsePrefix("10.0.16.200/20")}
	return wire.Assignments{
		Seq: 1, Full: true, Tasks: tasks, Specs: []weft.SpecVersion{testSpec(1)}, Networks: []weft.Network{front, back},
		Services: []wire.ServiceView{{ID: svc, Name: "web", VIPs: []weft.VIP{vip}, Networks: []weft.NetworkTarget{{Network: front.ID}, {Network: back.ID}}}},
		Nodes: []wire.NodeView{
			{ID: nodeA, Hostname: "a", Addr: vtepA, DataPath: vtepA, Manager: netip.AddrPortFrom(vtepA, 2377)},
			{ID: nodeB, Hostname: "b", Addr: vtepB, DataPath: vtepB},
		},
		Cluster: &wire.ClusterView{ID: testID("c"), DataPathPort: 4789},
	}
}

// rig is the world around an agent: it outlives it, as a host outlives a daemon.
type rig struct {
	t   testing.TB
	dir string

	rt       *runtimetest.Memory
	boxes    *fakeBoxes
	kernel   *fakeKernel
	balancer *fakeBalancer
	table    *fakeTable
	leader   *fakeLeader
	sockets  *fakeSockets
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	inside   dialInside
	hostDial dns.Dial // to nameservers; nil = as it is
	resolv   string   // path of the host's resolver file; "" = an empty one
	journal  *journal
	log      lockedBuffer
	routes   vxlantest.Router
	paths    *fakePaths
	natives  Natives                        // nil = none
	overlay  vxlan.Kernel                   // instead of kernel; nil = that
	agent    *Agent                         // the last one started
	prefixes func() ([]netip.Prefix, error) // nil = not asked
	// engineGate is waited for by what asks for the engines; nil = at once.
	engineGate func(context.Context) error
	keys       func(epoch uint64) ([]weft.NodeKey, error)
	gossipKeys func(weft.GossipRing) error
	neighbour  func(node weft.ID, addr netip.AddrPort) wire.Agent // nil = nobody is asked
	conns      fakeConns
	execs      fakeExecs
	lists      atomic.Int32 // of containers
	mute       muting

	mu        sync.Mutex // guards: listeners, listenErr
	listeners []weft.Listener
	listenErr error
}

func newRig(t testing.TB) *rig {
	j := &journal{}
	r := &rig{
		t: t, dir: t.TempDir(), rt: runtimetest.NewMemory(nodeA), journal: j,
		boxes: &fakeBoxes{all: map[weft.ID]sandbox.Sandbox{}, journal: j}, kernel: &fakeKernel{journal: j, fail: map[uint32]error{}},
		balancer: &fakeBalancer{journal: j}, table: newFakeTable(j),
		leader: &fakeLeader{sessions: make(chan *fakeSession, 16), state: map[weft.ID]weft.TaskStatus{}}, sockets: &fakeSockets{},
		dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no route to host") },
		inside: func(context.Context, string, string, string) (net.Conn, error) {
			return nil, errors.New("no route to host")
		},
		paths: newFakePaths(),
	}
	r.paths.link.Store(1500)
	r.execs.Memory = r.rt
	return r
}

// hostAddrs of the rig's host.
var hostAddrs = []weft.HostAddr{{Interface: "eth0", Addr: vtepA}}

// hostRules are of the firewall of the rig's host.
var hostRules = []weft.InputRule{{Protocol: weft.TCP, First: 22, Last: 22, Chain: "chain INPUT of table ip filter"}}

func (r *rig) config() Config {
	names, err := dns.New(dns.Config{Log: slog.New(slog.DiscardHandler), ResolvConf: cmp.Or(r.resolv, "/dev/null"), Dial: r.hostDial})
	if err != nil {
		r.t.Fatal(err)
	}
	return Config{
		Node: nodeA, StateDir: r.dir, NetNSDir: "/ns", VTEP: vtepA, Addr: netip.AddrPortFrom(vtepA, portA),
		Underlay: r.paths,
		Runtime:  &loggedRuntime{r.rt, r.journal, &r.lists, &r.mute}, Execer: &r.execs, Logs: r.rt, Images: r.rt,
		Sandbox: r.boxes, Engines: r.engines, Names: names, Gossip: r.table, Leader: r.leader,
		Describe: func() (weft.NodeDescription, error) {
			d := weft.NodeDescription{Hostname: "a", Addrs: hostAddrs, InputRules: hostRules}
			var err error
			if r.prefixes != nil {
				d.UsedPrefixes, err = r.prefixes()
			}
			return d, err
		},
		Listeners: r.readListeners, Keys: r.keys, GossipKeys: r.gossipKeys, Neighbour: r.neighbour,
		HostAddrs: func() ([]weft.HostAddr, error) { return hostAddrs, nil },
		Log:       slog.New(slog.NewTextHandler(&r.log, nil)),
	}
}

// lockedBuffer takes a log that several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex // guards: b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (r *rig) engines(ctx context.Context) (Engines, error) {
	if r.engineGate != nil {
		if err := r.engineGate(ctx); err != nil {
			return Engines{}, err
		}
	}
	overlay := vxlan.Kernel(r.kernel)
	if r.overlay != nil {
		overlay = r.overlay
	}
	return Engines{Overlay: vxlan.Routed{Kernel: overlay, Router: &r.routes}, Balancer: r.balancer, Natives: r.natives}, nil
}

func (r *rig) setListeners(l []weft.Listener, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listeners, r.listenErr = l, err
}

func (r *rig) readListeners() ([]weft.Listener, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.listeners, r.listenErr
}

// start runs an agent; the function that it returns ends it, as kill -9 would
// end a daemon: whatever it holds in memory is gone.
func (r *rig) start() (kill func()) {
	r.t.Helper()
	a, err := New(r.config())
	if err != nil {
		r.t.Fatal(err)
	}
	a.listen, a.dial, a.linger.dial, a.busy = r.sockets.listen, r.inside, r.dial, r.conns.count
	r.agent = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	synctest.Wait()
	var once sync.Once
	kill = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				r.t.Errorf("the agent ended with %v", err)
			}
			if n := r.sockets.opened(); n != 0 {
				r.t.Errorf("%d resolvers are open after the agent's end", n)
			}
		})
	}
	r.t.Cleanup(kill)
	return kill
}

// settle lets everything that is due within d happen.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (r *rig) wantState(task weft.ID, want weft.TaskState) {
	r.t.Helper()
	if got := r.leader.status(task); got.State != want {
		r.t.Fatalf("the leader knows task %s as %v (%s), want %v", task.Short(), got.State, got.Err, want)
	}
}
