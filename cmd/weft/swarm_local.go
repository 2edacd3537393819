package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan/linux"
)

// Bounds of becoming and ceasing to be a member.
const (
	initTimeout  = 20 * time.Second // a manager alone elects itself in about a second
	joinTimeout  = 30 * time.Second // until the leader has sent the first assignments
	leaveTimeout = 60 * time.Second // until all containers are gone
	// departTimeout is for telling the leader, without whom a node leaves as
	// well.
	departTimeout = 5 * time.Second
)

// Local implements api.Swarm.
func (ms *membership) Local() weft.LocalInfo {
	d, err := describeNode(ms.cfg, ms.engines)
	info := weft.LocalInfo{State: weft.LocalInactive, Description: d, DataRoot: ms.cfg.DataRoot}
	if err != nil {
		info.Error = err.Error()
	}
	ms.mu.Lock()
	m, failure := ms.current, ms.failure
	ms.mu.Unlock()
	_, info.Engines = ms.engines.verdicts()
	if m != nil {
		if d := m.data.Load(); d != nil {
			info.Engines = append(slices.Clone(info.Engines), d.crypt.Choices()...)
		}
	}
	if m == nil || failure != nil {
		if failure != nil {
			info.State, info.Error = weft.LocalError, failure.Error()
		} else if s := ms.onDisk(); s != nil {
			info.State, info.Node, info.Addr = weft.LocalPending, s.Node, s.Advertise.Addr()
			info.Manager, info.Managers = s.Role == weft.RoleManager, s.Managers
		}
		return info
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	info.Node, info.Addr = m.state.Node, m.state.Advertise.Addr()
	info.Manager, info.Managers = m.state.Role == weft.RoleManager, m.state.Managers
	info.State = weft.LocalPending
	if m.heard {
		info.State = weft.LocalActive
	}
	if err := m.creds.Expired(); err != nil {
		info.State, info.Error = weft.LocalError, weft.Text(err)
	}
	return info
}

// Init implements api.Swarm.
func (ms *membership) Init(ctx context.Context, r weft.InitRequest) (weft.ID, error) {
	ms.change.Lock()
	defer ms.change.Unlock()
	if err := ms.mustBeFree(); err != nil {
		return "", err
	}
	if r.ForceNewCluster {
		return "", fmt.Errorf("ForceNewCluster: %w yet", weft.ErrUnsupported)
	}
	listen := listenAddr(r.ListenAddr)
	advertise, err := advertiseAddr(r.AdvertiseAddr, listen)
	if err != nil {
		return "", err
	}
	state := memberState{Version: memberVersion, Node: weft.NewID(), Role: weft.RoleManager,
		Listen: listen, Advertise: advertise, DataPath: r.DataPathAddr, Managers: []netip.AddrPort{advertise}}
	if !state.DataPath.IsValid() {
		state.DataPath = advertise.Addr()
	}
	if err := checkDataPath(state.DataPath); err != nil {
		return "", err
	}
	boot, err := newCluster(r, &state)
	if err != nil {
		return "", err
	}
	if boot.Node.Description, err = describeNode(ms.cfg, ms.engines); err != nil {
		return "", err
	}
	if boot.Node.Description.UsedPrefixes, err = ms.cfg.usedPrefixes(); err != nil {
		return "", err
	}
	if boot.Node.Description.Addrs, err = linux.HostAddrs(); err != nil {
		return "", err
	}
	if err := ms.checkPorts(state); err != nil {
		return "", err
	}
	if err := ms.become(ctx, state, boot, initTimeout); err != nil {
		return "", err
	}
	return state.Node, nil
}

// newCluster draws the secrets of a new cluster, signs this node's certificate
// into the request, and completes state with what the cluster decides.
func newCluster(r weft.InitRequest, state *memberState) (*clusterBoot, error) {
	c := weft.Cluster{
		ID: weft.NewID(), Spec: weft.DefaultClusterSpec(), AddrPools: r.AddrPools, MaskLength: r.MaskLength,
		ULA: weft.NewULA(), DataPathPort: r.DataPathPort, GossipKey: make([]byte, 32),
	}
	if len(c.AddrPools) == 0 {
		c.AddrPools = weft.DefaultAddrPools()
	}
	if c.MaskLength == 0 {
		c.MaskLength = weft.DefaultMaskLength
	}
	if c.DataPathPort == 0 {
		c.DataPathPort = weft.VXLANPort
	}
	if _, err := rand.Read(c.GossipKey); err != nil {
		return nil, fmt.Errorf("draw gossip key: %w", err)
	}
	now := time.Now()
	root, err := ca.NewRoot(string(c.ID), now)
	if err != nil {
		return nil, err
	}
	c.CACert, c.CAKey = root.Cert, root.Key
	for _, t := range []*string{&c.Tokens.Worker, &c.Tokens.Manager} {
		if *t, err = (authority{}).NewToken(c); err != nil {
			return nil, err
		}
	}
	key, csr, err := ca.NewCSR()
	if err != nil {
		return nil, err
	}
	cert, err := (authority{}).Sign(c, csr, state.Node, weft.RoleManager)
	if err != nil {
		return nil, err
	}
	state.Cluster = wire.ClusterView{ID: c.ID, DataPathPort: c.DataPathPort, GossipKey: c.GossipKey, AddrPools: c.AddrPools}
	return &clusterBoot{
		Bootstrap: orchestrator.Bootstrap{Cluster: c, Node: weft.Node{
			ID: state.Node, Spec: weft.NodeSpec{Role: weft.RoleManager, Availability: r.Availability},
			Status: weft.NodeStatus{Addr: state.Advertise.Addr()}, DataPath: state.DataPath,
		}},
		bundle: ca.Bundle{Cert: cert, Key: key, CA: root.Cert},
	}, nil
}

// clusterBoot is a new cluster with the certificate of its first node.
type clusterBoot struct {
	orchestrator.Bootstrap
	bundle ca.Bundle
}

// become makes this node what state says and waits, as long as limit says, until the leader
// has spoken to it. When that fails, nothing of it stays.
func (ms *membership) become(ctx context.Context, state memberState, boot *clusterBoot, limit time.Duration) (err error) {
	defer func() {
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
			defer cancel()
			// The second end is for one that was resumed before it was forgotten.
			err = errors.Join(err, ms.end(undo), forgetMember(ms.cfg.DataRoot), ms.end(undo))
			if boot.Cluster.ID == "" {
				ms.giveBack(undo, state, boot.bundle)
			}
		}
	}()
	if err := ca.Save(pkiDir(ms.cfg.DataRoot), boot.bundle); err != nil {
		return err
	}
	addrs, err := linux.HostAddrs()
	if err != nil {
		return err
	}
	state = state.note(addrs)
	if err := state.save(ms.cfg.DataRoot); err != nil {
		return err
	}
	var b *orchestrator.Bootstrap
	if boot.Cluster.ID != "" {
		b = &boot.Bootstrap
	}
	m, err := ms.newMember(ctx, state, b)
	if err != nil {
		return err
	}
	if _, err := m.makeEngines(ctx); err != nil { // here, where it refuses to become a member
		return errors.Join(err, m.ln.Close())
	}
	if err := ms.start(ctx, m); err != nil {
		return err
	}
	// The leader's time begins here: what this node's kernel took to be probed is not its.
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-m.stage.learned:
		if m.manager != nil {
			return m.manager.AwaitVote(ctx)
		}
		return nil
	case <-m.stage.ended:
		if f := ms.failed(); f != nil {
			return f
		}
		return fmt.Errorf("%w: the daemon is stopping", weft.ErrUnavailable)
	case <-ctx.Done():
		if f := ms.failed(); f != nil {
			return f
		}
		hint := ""
		if state.Advertise.Port() != state.Listen.Port() {
			hint = fmt.Sprintf("; nodes dial %s (--advertise-addr), this one listens on %s", state.Advertise, state.Listen)
		}
		return fmt.Errorf("%w: the leader sent this node nothing within %s%s; see the daemon's log", weft.ErrUnavailable, limit, hint)
	}
}

// giveBack tells the cluster that a node which it has admitted does not come: its
// address, and a manager's place in the Raft group, are then free for the next
// try. Without an answer the node stays listed until somebody removes it.
func (ms *membership) giveBack(ctx context.Context, state memberState, b ca.Bundle) {
	ctx, cancel := context.WithTimeout(ctx, departTimeout)
	defer cancel()
	creds, err := ca.NewCredentials(b, time.Now)
	if err == nil {
		err = depart(ctx, state, creds, ms.log)
	}
	if err != nil {
		ms.log.Warn("tell the leader that this node does not join", weft.KeyNode, state.Node, weft.KeyErr, err)
	}
}

// depart tells the leader, by connections of its own, that this node leaves.
func depart(ctx context.Context, state memberState, creds *ca.Credentials, log *slog.Logger) error {
	client, err := wire.NewClient(wire.ClientConfig{Credentials: creds, Managers: func() []netip.AddrPort { return state.Managers }, Log: log})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return client.Run(ctx) })
	err = client.Depart(ctx, state.Node)
	cancel()
	return errors.Join(err, g.Wait())
}

// Join implements api.Swarm.
func (ms *membership) Join(ctx context.Context, r weft.JoinRequest) error {
	ms.change.Lock()
	defer ms.change.Unlock()
	if err := ms.mustBeFree(); err != nil {
		return err
	}
	state := memberState{Version: memberVersion, Listen: listenAddr(r.ListenAddr)}
	if err := ms.checkPorts(state); err != nil {
		return err
	}
	advertise := joinAddr(r.AdvertiseAddr, state.Listen)
	if vtep := explicitDataPath(r.DataPathAddr, advertise); vtep.IsValid() {
		if err := checkDataPath(vtep); err != nil {
			return err
		}
	}
	d, err := describeNode(ms.cfg, ms.engines)
	if err != nil {
		return err
	}
	joined, err := wire.Join(ctx, wire.JoinParams{
		Remotes: r.Remotes, Token: r.Token, Hostname: d.Hostname, Advertise: advertise,
		DataPath: r.DataPathAddr, Availability: r.Availability,
	})
	if err != nil {
		return err
	}
	state.Node, state.Role, state.Cluster = joined.Node, joined.Role, joined.Cluster
	if state.Advertise = advertise; advertise.Addr().IsUnspecified() {
		state.Advertise = netip.AddrPortFrom(joined.Addr, advertise.Port())
	}
	if state.DataPath = r.DataPathAddr; !state.DataPath.IsValid() {
		state.DataPath = state.Advertise.Addr()
	}
	for _, n := range joined.Managers {
		if n.Manager.IsValid() {
			state.Managers = append(state.Managers, n.Manager)
		}
	}
	if len(state.Managers) == 0 {
		state.Managers = []netip.AddrPort{joined.Via}
	}
	return ms.become(ctx, state, &clusterBoot{bundle: joined.Bundle}, joinTimeout)
}

// explicitDataPath is the VTEP that a join request names; invalid when it leaves
// that to the manager, which takes the address it sees.
func explicitDataPath(told netip.Addr, advertise netip.AddrPort) netip.Addr {
	if told.IsValid() || advertise.Addr().IsUnspecified() {
		return told
	}
	return advertise.Addr()
}

// checkDataPath refuses a VTEP that no link of this host has: VXLAN would send
// from nowhere, and nothing would say so.
func checkDataPath(a netip.Addr) error {
	if _, err := linux.UnderlayMTU(a); err != nil {
		return fmt.Errorf("%w: overlay traffic cannot use %s: no link of this host has that address; name one with --data-path-addr: %w", weft.ErrInvalid, a, err)
	}
	return nil
}

// Leave implements api.Swarm. The host's tasks end, and everything that weft
// made for them goes.
func (ms *membership) Leave(ctx context.Context, force bool) error {
	ms.change.Lock()
	defer ms.change.Unlock()
	state, err := loadMember(ms.cfg.DataRoot)
	if err != nil {
		return err
	}
	if state == nil {
		return &notMember{}
	}
	if state.Role == weft.RoleManager && !force {
		return fmt.Errorf("%w: this node is a manager: leaving may cost the cluster its quorum, and the last manager takes the whole cluster state with it; use --force to leave all the same", weft.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	if err := ms.driver.Ready(ctx); err != nil {
		return err // containers could not be removed
	}
	m, err := ms.member()
	if err != nil {
		return ms.leaveDead(ctx, *state)
	}
	departCtx, done := context.WithTimeout(ctx, departTimeout)
	if err := m.agent.Withdraw(departCtx); err != nil {
		ms.log.Warn("withdraw endpoints", weft.KeyErr, err)
	}
	// A report after the departure would make the node ready again.
	if err := m.retire(departCtx); err != nil {
		ms.log.Warn("end the agent", weft.KeyErr, err)
	}
	if err := m.client.Depart(departCtx, state.Node); err != nil {
		ms.log.Warn("tell the leader of the departure", weft.KeyErr, err)
	}
	done()
	m.gossip.Leave()
	if err := ms.end(ctx); err != nil {
		return err
	}
	return errors.Join(m.remove(ctx), forgetMember(ms.cfg.DataRoot), ms.forgetFailure())
}

// leaveDead leaves with a member that does not run, for example because its port
// is taken: nobody can be told, but the host is cleaned all the same.
func (ms *membership) leaveDead(ctx context.Context, state memberState) error {
	m, err := ms.compose(ctx, state)
	if err != nil {
		ms.log.Warn("what the node made on its host cannot be removed", weft.KeyErr, err)
		return errors.Join(forgetMember(ms.cfg.DataRoot), ms.forgetFailure())
	}
	return errors.Join(m.remove(ctx), forgetMember(ms.cfg.DataRoot), ms.forgetFailure())
}

func (ms *membership) forgetFailure() error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.failure = nil
	return nil
}

// Cluster implements api.Swarm.
func (ms *membership) Cluster(ctx context.Context) (weft.Cluster, error) {
	c, err := ms.control()
	if err != nil {
		return weft.Cluster{}, err
	}
	return c.Cluster(ctx)
}

// UpdateCluster implements api.Swarm.
func (ms *membership) UpdateCluster(ctx context.Context, index uint64, u weft.ClusterUpdate) error {
	c, err := ms.control()
	if err != nil {
		return err
	}
	return c.UpdateCluster(ctx, index, u)
}

func (ms *membership) mustBeFree() error {
	state, err := loadMember(ms.cfg.DataRoot)
	if err != nil {
		return err
	}
	if state != nil {
		return fmt.Errorf("%w: This node is already part of a swarm. Use \"weft swarm leave\" to leave this swarm and join another one", weft.ErrUnavailable)
	}
	return nil
}

// checkPorts finds out before anything is made whether the node's ports are
// free: cluster port, gossip and VXLAN.
func (ms *membership) checkPorts(s memberState) error {
	gossipAddr := netip.AddrPortFrom(s.bind().Addr(), weft.GossipPort).String()
	tcp := func(addr, what string) error {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return portError(err, "TCP "+addr, what)
		}
		return ln.Close()
	}
	udp := func(addr, what string) error {
		pc, err := net.ListenPacket("udp", addr)
		if err != nil {
			return portError(err, "UDP "+addr, what)
		}
		return pc.Close()
	}
	port := s.Cluster.DataPathPort
	if port == 0 {
		port = weft.VXLANPort
	}
	if err := tcp(s.bind().String(), "the cluster port"); err != nil {
		return err
	}
	if err := tcp(gossipAddr, "gossip"); err != nil {
		return err
	}
	if err := udp(gossipAddr, "gossip"); err != nil {
		return err
	}
	all := netip.IPv4Unspecified()
	if s.DataPath.Is6() && !s.DataPath.Is4In6() {
		all = netip.IPv6Unspecified()
	}
	return udp(netip.AddrPortFrom(all, port).String(), "overlay traffic (VXLAN)")
}

func portError(err error, port, what string) error {
	if errors.Is(err, os.ErrPermission) || strings.Contains(err.Error(), "cannot assign") {
		return fmt.Errorf("%w: listen on %s for %s: %w: use an address of this host with --listen-addr", weft.ErrInvalid, port, what, err)
	}
	return fmt.Errorf("%w: %s, needed for %s, is taken by another program: end that program or choose another address", weft.ErrConflict, port, what)
}

func listenAddr(a netip.AddrPort) netip.AddrPort {
	if !a.Addr().IsValid() {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), weft.ClusterPort)
	}
	if a.Port() == 0 {
		return netip.AddrPortFrom(a.Addr(), weft.ClusterPort)
	}
	return a
}

// advertiseAddr is what others dial: the address given, else the one listened on,
// else the only one the host has, of IPv4 if it has any; the port is that
// listened on unless one is given.
func advertiseAddr(told, listen netip.AddrPort) (netip.AddrPort, error) {
	if a := joinAddr(told, listen); !a.Addr().IsUnspecified() {
		return a, nil
	}
	candidates, err := linux.AddrCandidates()
	if err != nil {
		return netip.AddrPort{}, err
	}
	if four := slices.DeleteFunc(slices.Clone(candidates), netip.Addr.Is6); len(four) > 0 {
		candidates = four
	}
	switch len(candidates) {
	case 1:
		return netip.AddrPortFrom(candidates[0], listen.Port()), nil
	case 0:
		return netip.AddrPort{}, fmt.Errorf("%w: this host has no address that others could reach: give one with --advertise-addr", weft.ErrInvalid)
	}
	return netip.AddrPort{}, fmt.Errorf("%w: this host has several addresses (%v): choose one with --advertise-addr", weft.ErrInvalid, candidates)
}

// joinAddr is advertiseAddr for a node that joins: an unspecified address stands
// for the one that the manager sees.
func joinAddr(told, listen netip.AddrPort) netip.AddrPort {
	switch {
	case !told.Addr().IsValid():
		return listen
	case told.Port() == 0:
		return netip.AddrPortFrom(told.Addr(), listen.Port())
	}
	return told
}
