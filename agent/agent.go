package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan"
)

// Config is what an agent stands on. All fields are required unless they say
// otherwise.
type Config struct {
	Node weft.ID
	// StateDir holds what must outlive the daemon: assignments and the last
	// state of each task.
	StateDir string
	// NetNSDir is where namespaces are named.
	NetNSDir string
	// VTEP is this node's tunnel address, Addr its advertised cluster port;
	// an invalid Addr leaves what the leader has.
	VTEP netip.Addr
	Addr netip.AddrPort
	// Underlay says how large packets may be.
	Underlay Underlay

	Runtime runtime.Runtime
	Execer  runtime.Execer
	Logs    runtime.Logs
	Images  runtime.Images
	Sandbox sandbox.Maker
	// Engines gives what makes networks and service addresses. It may take long:
	// Run calls it once, when the names of tasks that run already are answered
	// again, and ends with its error. RemoveAll calls it, too.
	Engines func(context.Context) (Engines, error)
	// Neighbour reaches the agent of another node by its cluster port; wire.Peers
	// has it. nil = nobody is asked to confirm that a task drains.
	Neighbour func(node weft.ID, addr netip.AddrPort) wire.Agent
	// Drains counts what became of draining tasks; nil = a new one.
	Drains *Drains

	Names  *dns.Server
	Gossip gossip.Table
	Leader Leader

	// Describe says what this node is; called when a session opens, and every
	// few seconds for the ranges that the host uses.
	Describe func() (weft.NodeDescription, error)
	// Listeners reads the ports that other programs of the host hold;
	// HostListeners is one.
	Listeners func() ([]weft.Listener, error)
	// HostAddrs reads the addresses of the host that ports can be bound to; see
	// weft.NodeDescription. Called by a pass of the data plane while a port is.
	HostAddrs func() ([]weft.HostAddr, error)
	// Keys returns this node's public keys for encrypted networks, with one of
	// the epoch among them; empty if it cannot encrypt. Nil is such a node.
	Keys func(epoch uint64) ([]weft.NodeKey, error)
	// GossipKeys takes the keys of gossip up; when it returns nil, all that comes
	// is read by them. Called with the same ring again and again; the first call
	// of a new one is soon after the leader has sent it. Nil: this node cannot
	// change them, and the leader is told nothing.
	GossipKeys func(weft.GossipRing) error
	// Learned is called with the managers' addresses and the cluster's view
	// whenever the leader sends them. It must not block.
	Learned func(managers []netip.AddrPort, c wire.ClusterView)

	Log *slog.Logger
}

// Underlay is the network between the nodes, as far as the size of its packets
// goes. All sizes are of whole IP packets in bytes. The methods may be called
// from any goroutine.
type Underlay interface {
	// MTU is that of this node's own link, read anew at each pass of the data
	// plane.
	MTU() (int, error)
	// Watch replaces the tunnel addresses of other nodes that matter. What is
	// known of others is forgotten. It does not block.
	Watch(vteps []netip.Addr)
	// MTUs are the largest packets that reach them, by tunnel address; one
	// that is missing is not known yet. The map is not to be written. The
	// channel is closed at the next change.
	MTUs() (mtus map[netip.Addr]int, changed <-chan struct{})
}

// Engines are what makes networks and service addresses.
type Engines struct {
	Overlay  vxlan.Kernel
	Balancer ingress.Engine
	// Natives proves to which nodes packets may go without encapsulation; nil =
	// the overlay engine cannot do without.
	Natives Natives
}

// Natives finds out to which nodes packets of a network may go without
// encapsulation. The methods may be called from any goroutine.
type Natives interface {
	// CutsTunnels reports whether this node's own link cuts large packets of
	// VXLAN itself, read anew at each pass of the data plane.
	CutsTunnels() (bool, error)
	// Watch replaces the ways that matter. What is known of others is
	// forgotten. It does not block.
	Watch(ways map[vxlan.NativeWay]vxlan.NativeEnds)
	// Proven are the ways on which packets were seen to arrive. The map is not
	// to be written. The channel is closed at the next change.
	Proven() (proven map[vxlan.NativeWay]bool, changed <-chan struct{})
}

// Leader is the agent's way to the leader; wire.Client is one.
type Leader interface {
	OpenSession(ctx context.Context, r wire.SessionRequest) (wire.Session, error)
	Report(ctx context.Context, node weft.ID, r wire.Report) error
}

// Agent runs one node's tasks. Make it with New, run it once with Run; the
// methods of containers.go may be called while it runs.
type Agent struct {
	cfg       Config
	linger    *linger
	plane     *plane
	boxes     *boxes
	outbox    *outbox
	resolvers *resolvers // set by Run before anything else runs
	tasks     *tasks
	listen    openSockets // listenIn, but for tests
	dial      dialInside  // dialIn, but for tests
	busy      countConns  // sandbox.Connections, but for tests
	healths   healths
	statuses  statuses
	model     atomic.Pointer[model] // written by Run, then by the session loop only
	file      modelFile             // of the session loop
	// heard is set once the model is of the leader, and not of the last run.
	heard atomic.Bool
}

// New checks the configuration; it does no I/O and starts nothing.
func New(cfg Config) (*Agent, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Drains == nil {
		cfg.Drains = NewDrains(cfg.Log)
	}
	a := &Agent{cfg: cfg, outbox: newOutbox(), listen: listenIn, dial: dialIn, busy: sandbox.Connections, healths: healths{all: map[weft.ID]weft.Health{}}}
	a.model.Store(newModel())
	a.linger = newLinger(cfg.Node, cfg.Gossip, a.endpointsPath(), cfg.Log)
	a.plane = newPlane(cfg, a.linger)
	a.plane.applied = a.outbox.kick
	a.boxes = newBoxes(cfg)
	a.tasks = newTasks(a)
	return a, nil
}

func (c Config) validate() error {
	if !c.Node.Valid() {
		return fmt.Errorf("%w: agent node id %q", weft.ErrInvalid, c.Node)
	}
	if !c.VTEP.IsValid() {
		return fmt.Errorf("%w: agent has no data path address", weft.ErrInvalid)
	}
	for _, f := range []struct {
		name    string
		missing bool
	}{
		{"StateDir", c.StateDir == ""}, {"NetNSDir", c.NetNSDir == ""}, {"Underlay", c.Underlay == nil},
		{"Runtime", c.Runtime == nil}, {"Execer", c.Execer == nil}, {"Logs", c.Logs == nil},
		{"Images", c.Images == nil}, {"Sandbox", c.Sandbox == nil}, {"Engines", c.Engines == nil},
		{"Names", c.Names == nil}, {"Gossip", c.Gossip == nil},
		{"Leader", c.Leader == nil}, {"Describe", c.Describe == nil}, {"Listeners", c.Listeners == nil}, {"HostAddrs", c.HostAddrs == nil},
		{"Log", c.Log == nil},
	} {
		if f.missing {
			return fmt.Errorf("%w: agent config has no %s", weft.ErrInvalid, f.name)
		}
	}
	return nil
}

// Run drives the node's tasks until ctx ends. Containers, their network and
// their logs stay when it returns: the next Run adopts them.
func (a *Agent) Run(ctx context.Context) error {
	inner, cancel := context.WithCancel(ctx)
	a.resolvers = newResolvers(inner, a.cfg.Names, a.listen, a.dial, a.cfg.Log)
	err := a.resume(inner)
	if err == nil {
		err = a.takeEngines(inner)
	}
	if err == nil {
		err = a.runLoops(inner)
	}
	cancel()
	a.resolvers.wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// takeEngines blocks until the data plane's engines are made.
func (a *Agent) takeEngines(ctx context.Context) error {
	e, err := a.cfg.Engines(ctx)
	a.plane.overlay, a.plane.balancer, a.plane.underlay.natives = e.Overlay, e.Balancer, e.Natives
	return err
}

func (a *Agent) runLoops(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.linger.run(ctx) })
	g.Go(func() error { return a.plane.run(ctx) })
	g.Go(func() error { return a.boxes.run(ctx) })
	g.Go(func() error { return a.runSessions(ctx) })
	g.Go(func() error { return a.tasks.run(ctx, g) })
	return g.Wait()
}

func (a *Agent) modelPath() string     { return filepath.Join(a.cfg.StateDir, "assignments.json") }
func (a *Agent) endpointsPath() string { return filepath.Join(a.cfg.StateDir, "endpoints.json") }

// resume puts the agent into the state that the last run left: what it knew of
// the cluster and of other nodes' endpoints, and what surrounds its containers.
func (a *Agent) resume(ctx context.Context) error {
	m, err := loadModel(a.modelPath())
	if errors.Is(err, errDamaged) {
		a.cfg.Log.Error("assignments are lost, waiting for the leader to send them again", weft.KeyErr, err)
	} else if err != nil {
		return err
	}
	if err := a.linger.restore(time.Now()); err != nil {
		return err
	}
	boxes, err := a.cfg.Sandbox.List(ctx)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	for _, b := range boxes {
		// Without a namespace there is nothing to resume.
		if t, ok := m.Tasks[b.Task]; ok && b.NetNS != "" {
			a.plane.attach(newController(a, m, t).local(b, a.tasks.resumeState(t)))
			a.boxes.add(t.ID, func() (sandbox.Spec, bool) { return a.box(m, t.ID) })
		}
	}
	a.adopt(m, false)
	a.plane.prime()
	// Names are the one thing that pauses while no daemon runs: they come
	// back before anything else is done.
	for _, b := range boxes {
		if t, ok := m.Tasks[b.Task]; ok && b.NetNS != "" {
			a.resolvers.resume(b.Task, b.NetNS, a.view(m, t, b))
		}
	}
	return nil
}

// Peers are the cluster addresses of all other nodes, as last heard from the
// leader: where gossip may find somebody when no manager is there. Nil before
// Run has read them.
func (a *Agent) Peers() []netip.Addr {
	var out []netip.Addr
	for id, n := range a.model.Load().Nodes {
		if id != a.cfg.Node && n.Addr.IsValid() {
			out = append(out, n.Addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// ManagerPorts are the cluster ports of the managers that the leader told last, by node.
func (a *Agent) ManagerPorts() map[weft.ID]uint16 {
	out := map[weft.ID]uint16{}
	for id, n := range a.model.Load().Nodes {
		if n.Manager.IsValid() {
			out[id] = n.Manager.Port()
		}
	}
	return out
}

// Withdraw takes this node's endpoints out of the others' tables for good and
// gives them time to see it. It is called while Run runs, when the node is
// about to leave its cluster: the others then do not take it for a node whose
// daemon alone is gone.
func (a *Agent) Withdraw(ctx context.Context) error {
	if err := a.plane.withdraw(ctx); err != nil {
		return fmt.Errorf("withdraw endpoints: %w", err)
	}
	if !sleep(ctx, drainSpread) {
		return ctx.Err()
	}
	return nil
}

// adopt makes a new model the node's own; fromLeader says that it is news and
// not what the last run remembered.
func (a *Agent) adopt(m *model, fromLeader bool) {
	before := a.model.Swap(m)
	if fromLeader {
		a.heard.Store(true)
		if before == nil || !before.Cluster.GossipRing().Equal(m.Cluster.GossipRing()) {
			a.outbox.kick() // with the next report the keys are taken up
		}
	}
	a.plane.setModel(m)
	a.boxes.follow(func(task weft.ID) (sandbox.Spec, bool) { return a.box(m, task) })
	a.tasks.setModel(m, fromLeader)
	if fromLeader && a.cfg.Learned != nil {
		var managers []netip.AddrPort
		for _, n := range m.managers() {
			managers = append(managers, n.Manager)
		}
		a.cfg.Learned(managers, m.Cluster)
	}
}

// Bounds of the pause between two sessions.
const (
	sessionRetryMin = 50 * time.Millisecond
	sessionRetryMax = time.Second
)

// runSessions keeps a session to the leader. Without one the node goes on with
// what it last knew.
func (a *Agent) runSessions(ctx context.Context) error {
	pause := sessionRetryMin
	for {
		began := time.Now()
		err := a.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > 10*sessionRetryMax {
			pause = sessionRetryMin
		}
		a.cfg.Log.Info("session to the leader ended", weft.KeyErr, err)
		if !sleep(ctx, pause) {
			return nil
		}
		pause = min(2*pause, sessionRetryMax)
	}
}

// session opens one session and serves it to its end.
func (a *Agent) session(ctx context.Context) error {
	d, err := a.cfg.Describe()
	if err != nil {
		return fmt.Errorf("describe node: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx) // a failed report ends the session's context
	s, err := a.cfg.Leader.OpenSession(ctx, wire.SessionRequest{
		Version: wire.ProtocolVersion, Description: d, DataPath: a.cfg.VTEP, Addr: a.cfg.Addr.Addr(), Port: a.cfg.Addr.Port(),
	})
	if err != nil {
		return fmt.Errorf("open session: %w", err)
	}
	a.tasks.reportAll()
	g.Go(func() error { return a.runReports(ctx) })
	g.Go(func() error { return a.receive(s) })
	return g.Wait()
}

// receive merges what the leader sends until the stream ends.
func (a *Agent) receive(s wire.Session) error {
	for first := true; ; first = false {
		as, err := s.Recv()
		if err != nil {
			return err
		}
		if first && !as.Full {
			return fmt.Errorf("%w: a session began with an increment", errGap)
		}
		m, err := a.model.Load().apply(as)
		if err != nil {
			return err
		}
		if err := a.file.save(a.modelPath(), m, as); err != nil {
			return err
		}
		a.adopt(m, true)
	}
}

// view is what a task may ask its resolver: the names of its own networks. What its
// clients append is what its sandbox was made with, also when the host's domains are
// others by now; those of its host that are real are the host's of now.
func (a *Agent) view(m *model, t weft.Task, box sandbox.Sandbox) dns.View {
	spec := m.Specs[specKey{t.Service, t.SpecVersion}].Spec
	host := a.cfg.Names.HostSearch()
	v := dns.View{
		Internal: true, Service: spec.Name,
		Search: spec.Container.DNS.SearchDomains(host), HostSearch: host, Nameservers: spec.Container.DNS.Nameservers,
	}
	if box.IsSearchKnown {
		v.Search = box.Search
	}
	for _, at := range t.Attachments {
		n, known := m.Networks[at.Network]
		if known && n.Spec.Ingress {
			continue
		}
		v.Networks = append(v.Networks, at.Network)
		for _, s := range n.Spec.Subnets {
			v.Near = append(v.Near, dns.Near{Network: at.Network, Subnet: s.Prefix})
		}
		for _, a := range at.Addrs() {
			v.Self.Addrs = append(v.Self.Addrs, a.Addr())
		}
		if !known || !n.Spec.Internal {
			v.Internal = false
		}
	}
	if len(v.Networks) == 0 {
		v.Internal = false
	}
	id := weft.ContainerID(t.ID)
	v.Self.Slot, v.Self.Host = t.Slot, m.Nodes[a.cfg.Node].Hostname
	v.Self.Names = []string{t.Name(spec.Name), id[:12], id}
	if h := spec.Container.Hostname; h != "" {
		v.Self.Names = append(v.Self.Names, h)
	}
	return v
}
