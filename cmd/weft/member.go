package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/orchestrator"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/wg"
)

// member is this node as part of one cluster: everything that runs between
// joining and leaving. It is made by membership and run once.
type member struct {
	cfg     daemonConfig
	log     *slog.Logger
	engines *engines
	able    func() // called when the engines are made
	repairs *agent.Repairs
	drains  *agent.Drains
	creds   *ca.Credentials
	client  *wire.Client
	peers   *wire.Peers

	manager *orchestrator.Manager // nil on workers
	raft    *wire.Raft
	server  *wire.Server
	ln      net.Listener
	under   *underlay
	gossip  *gossip.Gossip
	agent   *agent.Agent
	renewal *ca.Renewal
	boxes   *sandbox.Linux

	firewall nft.InputRules // of the host

	stage stage

	// making is held while data is made.
	making sync.Mutex
	data   atomic.Pointer[dataPlane] // nil until the engines are made

	// mu guards: state.Managers, state.Cluster, state.Links, heard. The rest of state stays
	// as it was at the start.
	mu    sync.Mutex
	state memberState
	heard bool
}

// dataPlane are the engines of a member.
type dataPlane struct {
	overlay vxlan.Kernel
	service ingress.Engine
	crypt   *wg.Engine
	natives *natives // nil where the overlay engine always encapsulates
}

// stage tells how far a member's life has come.
type stage struct {
	named   chan struct{} // closed when the names of tasks that run already are answered
	learned chan struct{} // closed by the first word from the leader
	ended   chan struct{} // closed by membership.serve when run has returned
	// retiring is closed by retire, retired by runAgent at its end.
	retiring, retired chan struct{}
	retireOnce        sync.Once
	namedOnce         sync.Once
}

// newMember composes the node's parts and takes its port; nothing runs yet.
// boot is set by the one who initialises a cluster.
func (ms *membership) newMember(ctx context.Context, state memberState, boot *orchestrator.Bootstrap) (*member, error) {
	m, err := ms.compose(ctx, state)
	if err != nil {
		return nil, err
	}
	if err := m.makeServer(boot); err != nil {
		return nil, err
	}
	if m.ln, err = wire.Listen(ctx, state.bind()); err != nil {
		return nil, err
	}
	return m, nil
}

// compose makes a member that has no port: enough to remove what it left.
func (ms *membership) compose(ctx context.Context, state memberState) (*member, error) {
	cfg, d := ms.cfg, ms.driver
	bundle, err := ca.Load(pkiDir(cfg.DataRoot))
	if err != nil {
		return nil, err
	}
	m := &member{cfg: cfg, state: state, engines: ms.engines, able: ms.able, repairs: ms.repairs, stage: stage{
		named: make(chan struct{}), learned: make(chan struct{}), ended: make(chan struct{}), retiring: make(chan struct{}), retired: make(chan struct{}),
	}, log: ms.log.With(weft.KeyNode, state.Node)}
	if m.creds, err = ca.NewCredentials(bundle, time.Now); err != nil {
		return nil, err
	}
	m.peers = wire.NewPeers(m.creds)
	m.drains = ms.drains
	if m.client, err = wire.NewClient(wire.ClientConfig{Credentials: m.creds, Managers: m.reachable, Log: m.log}); err != nil {
		return nil, err
	}
	if m.renewal, err = ca.NewRenewal(ca.RenewalConfig{Credentials: m.creds, Dir: pkiDir(cfg.DataRoot), Sign: m.sign, Log: m.log}); err != nil {
		return nil, err
	}
	return m, m.makeNode(d)
}

// makeNode composes what every node has, but for the engines: those take long.
func (m *member) makeNode(d *containerd.Driver) error {
	s := m.state
	dir := netnsDir(m.cfg.ExecRoot)
	var err error
	if m.boxes, err = sandbox.New(sandbox.Config{Node: s.Node, NetNSDir: dir, FilesDir: filepath.Join(m.cfg.DataRoot, "sandbox"), Repaired: m.repairs.Record, Log: m.log}); err != nil {
		return err
	}
	names, err := dns.New(dns.Config{Log: m.log, ResolvConf: m.cfg.ResolvConf})
	if err != nil {
		return err
	}
	if m.under, err = newUnderlay(s, m.log); err != nil {
		return err
	}
	m.gossip, err = gossip.New(gossip.Config{
		Node: s.Node, Bind: netip.AddrPortFrom(s.bind().Addr(), weft.GossipPort),
		Advertise: netip.AddrPortFrom(s.Advertise.Addr(), weft.GossipPort),
		VTEP:      s.DataPath, Seeds: m.seeds, Keys: s.Cluster.GossipRing(), Identity: gossipIdentity{m.creds},
		Guest: m.under.guest(), Log: m.log,
	})
	if err != nil {
		return err
	}
	m.agent, err = agent.New(agent.Config{
		Node: s.Node, StateDir: filepath.Join(m.cfg.DataRoot, "agent"), NetNSDir: dir,
		VTEP: s.DataPath, Addr: s.Advertise, Underlay: m.under,
		Runtime: d, Execer: d, Logs: d, Images: d,
		Sandbox: m.boxes, Engines: m.agentEngines, Keys: m.keys, GossipKeys: m.gossipKeys, Names: names, Gossip: m.gossip, Leader: m.client,
		Neighbour: m.peers.Agent, Drains: m.drains,
		Describe: m.describe, Listeners: m.listeners, HostAddrs: linux.HostAddrs, Learned: m.learn, Log: m.log,
	})
	return err
}

// makeEngines makes the data plane once; after an error it may be called again.
func (m *member) makeEngines(ctx context.Context) (*dataPlane, error) {
	m.making.Lock()
	defer m.making.Unlock()
	if d := m.data.Load(); d != nil {
		return d, nil
	}
	cfg := engineConfig{Node: m.state.Node, Log: m.log, Repaired: m.repairs.Record}.in(m.cfg)
	overlay, service, err := m.engines.of(ctx, cfg)
	if err != nil {
		return nil, err
	}
	oldOverlay, oldService, err := m.engines.replaced(m.engineUser(), cfg)
	if err == nil && oldOverlay != nil {
		err = m.removeEngines(ctx, oldOverlay, oldService)
	}
	if err == nil {
		err = m.engineUser().keep(vxlan.Pair{Overlay: overlay.Name(), Service: service.Name()})
	}
	if err != nil {
		return nil, err
	}
	d, err := m.dataPlaneOf(ctx, overlay, service)
	if err != nil {
		return nil, err
	}
	m.data.Store(d)
	m.under.natives <- d.natives
	m.able()
	return d, nil
}

// dataPlaneOf wraps an overlay engine in what encrypts and what routes.
func (m *member) dataPlaneOf(ctx context.Context, overlay vxlan.Engine, service ingress.Engine) (*dataPlane, error) {
	crypt, err := m.makeCrypt(ctx, overlay)
	if err != nil {
		return nil, err
	}
	natives, err := newNatives(m.state.DataPath, overlay, m.log)
	if err != nil {
		return nil, err
	}
	return &dataPlane{overlay: vxlan.Routed{Kernel: crypt, Router: &linux.Router{}}, service: service, crypt: crypt, natives: natives}, nil
}

func (m *member) engineUser() engineUser { return engineUser{m.cfg.ExecRoot, m.state.Node} }

// agentEngines is agent.Config's Engines.
func (m *member) agentEngines(ctx context.Context) (agent.Engines, error) {
	m.stage.namedOnce.Do(func() { close(m.stage.named) })
	d, err := m.makeEngines(ctx)
	if err != nil {
		return agent.Engines{}, err
	}
	e := agent.Engines{Overlay: d.overlay, Balancer: d.service}
	if d.natives != nil {
		e.Natives = d.natives
	}
	return e, nil
}

// keys is agent.Config's Keys, asked for when the engines are made.
func (m *member) keys(epoch uint64) ([]weft.NodeKey, error) {
	if d := m.data.Load(); d != nil {
		return d.crypt.Keys(epoch)
	}
	return nil, nil
}

// gossipKeys is agent.Config's GossipKeys: all that members send each other by port
// 7946 follows.
func (m *member) gossipKeys(r weft.GossipRing) error {
	return errors.Join(m.gossip.SetKeys(r), m.under.SetKeys(r))
}

// makeCrypt wraps the overlay engine in the one that encrypts.
func (m *member) makeCrypt(ctx context.Context, overlay vxlan.Engine) (*wg.Engine, error) {
	crypt, err := wg.New(wg.Config{
		Node: m.state.Node, NetNSDir: netnsDir(m.cfg.ExecRoot), RunDir: filepath.Join(m.cfg.ExecRoot, "wg"), KeyFile: filepath.Join(m.cfg.DataRoot, "agent", "wireguard.json"),
		Port: m.cfg.CryptPort, Engine: m.cfg.CryptEngine, Overlay: overlay, Log: m.log,
	})
	if err != nil {
		return nil, err
	}
	return crypt, crypt.Probe(ctx)
}

// gossipHears is orchestrator.Config's Heard.
func (m *member) gossipHears(node weft.ID) bool {
	all, _ := m.gossip.Members()
	return slices.ContainsFunc(all, func(g gossip.Member) bool { return g.ID == node })
}

// managerConfig is what the manager of this node is given; the member's Raft must be there.
func (m *member) managerConfig(boot *orchestrator.Bootstrap) orchestrator.Config {
	return orchestrator.Config{
		Dir: m.cfg.DataRoot, Node: m.state.Node, Addr: m.state.Advertise, Stream: raftStream{m.raft},
		Bootstrap: boot, CA: authority{}, Logs: m.agentOf, Heard: m.gossipHears, Log: m.log,
	}
}

// makeServer composes the cluster port and, on a manager, what answers there.
func (m *member) makeServer(boot *orchestrator.Bootstrap) error {
	sc := wire.ServerConfig{Credentials: m.creds, Agent: agentLogs{m.agent}, Log: m.log}
	if m.state.Role == weft.RoleManager {
		m.raft = wire.NewRaft(m.creds, m.state.Advertise)
		mgr, err := orchestrator.New(m.managerConfig(boot))
		if err != nil {
			return err
		}
		m.manager = mgr
		sc.Control, sc.Dispatcher, sc.Membership, sc.Raft = mgr, mgr, mgr, m.raft
		sc.Check = mgr.Check
		sc.Join = wire.AdmitVia(mgr, m.client)
	}
	var err error
	m.server, err = wire.NewServer(sc)
	return err
}

// run serves until ctx ends or a part fails for good. The agent is first: names
// are what pauses while no daemon runs.
func (m *member) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.runAgent(ctx) })
	select {
	case <-m.stage.named:
	case <-ctx.Done():
	}
	g.Go(func() error { return m.server.Run(ctx, m.ln) })
	g.Go(func() error { return m.client.Run(ctx) })
	g.Go(func() error { return m.peers.Run(ctx) })
	if m.manager != nil {
		g.Go(func() error { return m.manager.Run(ctx) })
	}
	g.Go(func() error { return m.gossip.Run(ctx) })
	g.Go(func() error { return m.under.run(ctx) })
	g.Go(func() error { return m.watchAddrs(ctx) })
	g.Go(func() error { return m.renewal.Run(ctx) })
	return g.Wait()
}

// runAgent runs the agent until ctx ends or retire is called.
func (m *member) runAgent(ctx context.Context) error {
	defer close(m.stage.retired)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-m.stage.retiring:
		}
		return errRetired // ends the agent's context
	})
	g.Go(func() error { return m.agent.Run(ctx) })
	if err := g.Wait(); !errors.Is(err, errRetired) {
		return err
	}
	return nil
}

var errRetired = errors.New("the agent is not wanted any more")

// retire ends the agent alone, while the rest of the member goes on: a node
// that has said that it leaves must not be heard of again. It is called by
// Leave only.
func (m *member) retire(ctx context.Context) error {
	m.stage.retireOnce.Do(func() { close(m.stage.retiring) })
	select {
	case <-m.stage.retired:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end the agent: %w", ctx.Err())
	}
}

// remove takes away everything that the node made on its host.
func (m *member) remove(ctx context.Context) error {
	d, err := m.makeEngines(ctx)
	if err != nil {
		return fmt.Errorf("what the node made on its host cannot be removed: %w", err)
	}
	err = errors.Join(m.agent.RemoveAll(ctx), d.service.Close(ctx), m.boxes.Close(ctx))
	if err == nil {
		err = errors.Join(m.engineUser().forget(), m.engines.release(ctx), containerd.RemoveGroups(m.state.Node))
	}
	return err
}

// learn takes the leader's view of the cluster and keeps it for the next start.
func (m *member) learn(managers []netip.AddrPort, c wire.ClusterView) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.heard {
		m.heard = true
		close(m.stage.learned)
	}
	next := m.state
	if len(managers) > 0 {
		next.Managers = managers
	}
	next.Cluster = c
	if sameManagers(next.Managers, m.state.Managers) && reflect.DeepEqual(next.Cluster, m.state.Cluster) {
		return
	}
	m.state.Managers, m.state.Cluster = next.Managers, next.Cluster
	if err := next.save(m.cfg.DataRoot); err != nil {
		m.log.Error("remember managers", weft.KeyErr, err)
	}
}

func sameManagers(a, b []netip.AddrPort) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func (m *member) managers() []netip.AddrPort {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Managers
}

// reachable are the cluster ports of managers: those last told, and those at which gossip
// has a manager that was told elsewhere, the last one perhaps. Who answers there proves
// by its certificate that it is one.
func (m *member) reachable() []netip.AddrPort {
	out := slices.Clone(m.managers())
	ports := m.agent.ManagerPorts()
	members, _ := m.gossip.Members()
	for _, o := range members {
		if port, ok := ports[o.ID]; ok && o.ID != m.state.Node {
			if at := netip.AddrPortFrom(o.Addr, port); !slices.Contains(out, at) {
				out = append(out, at)
			}
		}
	}
	return out
}

// seeds are the gossip ports of the managers and of all nodes last heard of, but
// our own. The only manager has no other way to find its nodes again: they do
// not look for one that was away too shortly to be missed.
func (m *member) seeds() []netip.AddrPort {
	known := m.agent.Peers()
	for _, a := range m.managers() {
		known = append(known, a.Addr())
	}
	var out []netip.AddrPort
	for _, a := range known {
		s := netip.AddrPortFrom(a, weft.GossipPort)
		if a != m.state.Advertise.Addr() && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// agentOf reaches the agent of a node for the leader.
func (m *member) agentOf(_ context.Context, n weft.Node) (wire.Agent, error) {
	addr := n.ClusterAddr()
	if !addr.IsValid() {
		return nil, fmt.Errorf("%w: node %s has no address", weft.ErrUnavailable, n.Description.Hostname)
	}
	return m.peers.Agent(n.ID, addr), nil
}

// listeners are the host's, and this node's cluster port where it is not the one
// it advertises: a forwarded port says nothing of what is taken here.
func (m *member) listeners() ([]weft.Listener, error) {
	list, err := agent.HostListeners()
	if port := m.state.Listen.Port(); err == nil && port != m.state.Advertise.Port() {
		list = append(list, weft.Listener{Protocol: weft.TCP, Port: port})
	}
	return list, err
}

// describe says what this node is and which of its host's ranges are in use.
func (m *member) describe() (weft.NodeDescription, error) {
	d, err := describeNode(m.cfg, m.engines)
	if err != nil {
		return d, err
	}
	if d.UsedPrefixes, err = m.cfg.usedPrefixes(); err != nil {
		return d, err
	}
	if d.InputRules, err = m.firewall.Read(time.Now()); err != nil {
		m.log.Warn("the host's firewall is not looked at for published ports", weft.KeyErr, err)
	}
	d.Addrs, err = linux.HostAddrs()
	return d, err
}

// usedPrefixes are the ranges that no overlay may overlap: of the host's routes
// and addresses, and the resolvers, which may lie behind a default route.
func (c daemonConfig) usedPrefixes() ([]netip.Prefix, error) {
	out, err := linux.HostPrefixes()
	if err != nil {
		return nil, err
	}
	resolvers, err := dns.Nameservers(c.ResolvConf)
	if err != nil {
		return nil, err
	}
	for _, a := range resolvers {
		if p := netip.PrefixFrom(a.WithZone(""), a.BitLen()); !a.IsLoopback() && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out, nil
}

func describeNode(cfg daemonConfig, e *engines) (weft.NodeDescription, error) {
	d, err := agent.DescribeHost(cfg.Hostname)
	chosen, _ := e.verdicts()
	d.OverlayEngine, d.ServiceEngine = chosen.Overlay, chosen.Service
	return d, err
}

// sign has the cluster sign a request of this node.
func (m *member) sign(ctx context.Context, csr []byte) ([]byte, error) {
	if m.manager != nil {
		// A start is no failure to report: it takes an election.
		if err := m.manager.Await(ctx); err != nil {
			return nil, err
		}
		return wire.RenewVia(m.manager, m.client, m.state.Node)(ctx, csr)
	}
	return m.client.Renew(ctx, m.state.Node, csr)
}
