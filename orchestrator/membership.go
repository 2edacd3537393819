package orchestrator

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/dispatch"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Admit implements wire.Membership.
func (m *Manager) Admit(ctx context.Context, r wire.AdmitRequest, remote netip.Addr) (wire.AdmitResponse, error) {
	return write(m, ctx, func(ctx context.Context, t *term) (wire.AdmitResponse, error) {
		return t.admit(ctx, r, remote)
	})
}

func (t *term) admit(ctx context.Context, r wire.AdmitRequest, remote netip.Addr) (wire.AdmitResponse, error) {
	var none wire.AdmitResponse
	v := t.store.View()
	c, ok := v.Cluster()
	if !ok {
		return none, fmt.Errorf("cluster object %w", weft.ErrNotFound)
	}
	if r.Version != wire.ProtocolVersion {
		return none, fmt.Errorf("join: this node speaks protocol version %d, the cluster %d; install the same release of weft: %w", r.Version, wire.ProtocolVersion, weft.ErrInvalid)
	}
	role, err := t.m.cfg.CA.VerifyToken(c, r.Token)
	if err != nil {
		return none, fmt.Errorf("join: %w", err)
	}
	// The address is checked against all others, and the port against what
	// services publish: one at a time.
	release, err := t.edit(ctx)
	if err != nil {
		return none, fmt.Errorf("join: %w", err)
	}
	defer release()
	v = t.store.View()
	n, err := joiner(v, r, remote, role)
	if err != nil {
		return none, err
	}
	cert, err := t.m.cfg.CA.Sign(c, r.CSR, n.ID, role)
	if err != nil {
		return none, fmt.Errorf("join: sign certificate: %w", err)
	}
	ingress, ok := v.Ingress()
	if !ok {
		return none, fmt.Errorf("join: the ingress network %w", weft.ErrNotFound)
	}
	at, err := t.alloc.attach(n.ID, []weft.Network{ingress})
	if err != nil {
		return none, fmt.Errorf("join: choose ingress address: %w", t.explainFull(v, ingress, "another node"))
	}
	n.IngressAddr, n.IngressAddr6 = at[0].Addr, at[0].Addr6
	if err := t.prop.one(ctx, []state.Change{{Node: &n}}); err != nil {
		t.alloc.release(t.store.View(), n.ID)
		return none, fmt.Errorf("join: store node: %w", err)
	}
	t.log.Info("node admitted", weft.KeyNode, n.ID, "role", role, "hostname", r.Hostname, "addr", n.Status.Addr)
	return wire.AdmitResponse{
		Node: n.ID, Role: role, Cert: cert, CACert: c.CACert, Addr: n.Status.Addr,
		Managers: managers(t.store.View()), Cluster: dispatch.ClusterView(c),
	}, nil
}

// joiner is the record of a new node.
func joiner(v *state.Snapshot, r wire.AdmitRequest, remote netip.Addr, role weft.Role) (weft.Node, error) {
	adv, err := advertised(r.Advertise, remote)
	if err != nil {
		return weft.Node{}, err
	}
	if r.Availability > weft.AvailabilityDrain {
		return weft.Node{}, fmt.Errorf("join: Availability: %d is not active, pause or drain: %w", r.Availability, weft.ErrInvalid)
	}
	if err := checkAddr(v, adv); err != nil {
		return weft.Node{}, fmt.Errorf("join: %w", err)
	}
	n := weft.Node{
		ID:          weft.NewID(),
		Spec:        weft.NodeSpec{Role: role, Availability: r.Availability},
		Description: weft.NodeDescription{Hostname: r.Hostname},
		Status:      weft.NodeStatus{Addr: adv.Addr(), ClusterPort: adv.Port()},
		DataPath:    r.DataPath,
	}
	if !n.DataPath.IsValid() || n.DataPath.IsUnspecified() {
		n.DataPath = adv.Addr()
	}
	if err := checkFamily(v, &n); err != nil {
		return n, err
	}
	if role == weft.RoleManager {
		n.Manager = &weft.ManagerStatus{Addr: adv}
	}
	return n, nil
}

// advertised completes the address that a joining node told: it may leave the
// address to the one its request came from, the port to the usual one.
func advertised(told netip.AddrPort, remote netip.Addr) (netip.AddrPort, error) {
	addr, port := told.Addr().Unmap(), told.Port()
	if !addr.IsValid() || addr.IsUnspecified() {
		addr = remote.Unmap()
	}
	if port == 0 {
		port = weft.ClusterPort
	}
	if !addr.IsValid() {
		return netip.AddrPort{}, fmt.Errorf("join: AdvertiseAddr: none was given and none can be derived: %w", weft.ErrInvalid)
	}
	return netip.AddrPortFrom(addr, port), nil
}

// checkAddr refuses an address that another node has, and a cluster port at
// which the routing mesh would take the node's own traffic.
func checkAddr(v *state.Snapshot, adv netip.AddrPort) error {
	if o := holder(v.Nodes(), adv.Addr()); o != nil {
		var what, advice string
		switch {
		case o.Status.State == weft.NodeReady:
			what, advice = "which is ready", "let it leave first if this host takes its place, else give this one an address of its own ('--advertise-addr')"
		case o.Manager != nil:
			what, advice = "a manager", fmt.Sprintf("if it is lost for good, remove it first ('weft node rm --force %s')", o.ID.Short())
		default:
			what, advice = "which was admitted and has not connected yet", fmt.Sprintf("try again in %s, or remove it first ('weft node rm --force %s')", admitGrace, o.ID.Short())
		}
		return fmt.Errorf("AdvertiseAddr: %s is the address of node %s (%s), %s; %s: %w", adv.Addr(), nodeName(*o), o.ID.Short(), what, advice, weft.ErrConflict)
	}
	own := weft.PortSpec{Protocol: weft.TCP, Published: adv.Port()}
	for _, s := range v.Services() {
		for _, p := range s.Ports {
			// A port in mode host keeps off a node that needs it for itself.
			if p.Mode == weft.PublishIngress && p.Clashes(&own) {
				return fmt.Errorf("ListenAddr: every node answers for service %s on port %d: choose another with '--listen-addr': %w", s.Spec.Name, adv.Port(), weft.ErrConflict)
			}
		}
	}
	return nil
}

// holder is the node that an address belongs to; nil = it is free. The port does
// not tell nodes apart: gossip and overlay traffic have the same on all. A worker
// that is down holds no address: its host was set up anew, or another has its
// address now. A manager does, because it is in the Raft group until it is
// removed.
func holder(nodes []weft.Node, addr netip.Addr) *weft.Node {
	for i := range nodes {
		n := &nodes[i]
		has := n.Status.Addr == addr || n.Manager != nil && n.Manager.Addr.Addr() == addr
		if has && (n.Status.State != weft.NodeDown || n.Manager != nil) {
			return n
		}
	}
	return nil
}

// checkFamily refuses a node that the others could build no tunnel to: those go
// from IPv4 to IPv4 or from IPv6 to IPv6.
func checkFamily(v *state.Snapshot, n *weft.Node) error {
	for _, o := range v.Nodes() {
		theirs, own := o.DataPath.Unmap(), n.DataPath.Unmap()
		if o.Status.State == weft.NodeDown || !theirs.IsValid() || theirs.Is4() == own.Is4() {
			continue
		}
		family := "IPv4"
		if theirs.Is6() {
			family = "IPv6"
		}
		return fmt.Errorf("join: DataPathAddr: this node would carry the overlay over %s, and node %s does over %s; all nodes of a cluster need tunnel addresses of one family: give an %s address of this host with --data-path-addr, or with --advertise-addr: %w",
			own, nodeName(o), theirs, family, weft.ErrInvalid)
	}
	return nil
}

func managers(v *state.Snapshot) []wire.NodeView {
	var out []wire.NodeView
	for _, n := range v.Nodes() {
		if n.Manager != nil {
			out = append(out, dispatch.NodeView(n))
		}
	}
	return out
}

// Check refuses callers that are no members any more: a removed node's
// certificate is good until it expires. It is wire.ServerConfig.Check. Only the
// leader knows for certain who is a member; a follower carries out no call of
// its own and sends the caller to the leader.
func (m *Manager) Check(_ context.Context, caller ca.Identity) error {
	t, err := m.leading()
	if err != nil {
		return nil
	}
	if _, ok := t.store.View().Node(caller.Node); !ok {
		return fmt.Errorf("node %s was removed from this cluster; leave it there ('weft swarm leave --force') and join again: %w", caller.Node, weft.ErrForbidden)
	}
	return nil
}

// Renew implements wire.Membership.
func (m *Manager) Renew(ctx context.Context, node weft.ID, csr []byte) ([]byte, error) {
	return read(m, ctx, func(v *state.Snapshot, t *term) ([]byte, error) {
		n, ok := v.Node(node)
		if !ok {
			return nil, fmt.Errorf("renew certificate: node %s %w in this cluster: it was removed: %w", node, weft.ErrNotFound, weft.ErrForbidden)
		}
		c, ok := v.Cluster()
		if !ok {
			return nil, fmt.Errorf("cluster object %w", weft.ErrNotFound)
		}
		cert, err := t.m.cfg.CA.Sign(c, csr, node, n.Spec.Role)
		if err != nil {
			return nil, fmt.Errorf("renew certificate of node %s: %w", nodeName(n), err)
		}
		return cert, nil
	})
}

// Depart implements wire.Membership. A manager is out of the Raft group when it
// returns. The leader cannot take itself out: it hands leadership over and
// answers wire.NotLeader, so that its call goes to the successor.
func (m *Manager) Depart(ctx context.Context, node weft.ID) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.depart(ctx, node)
	})
	return err
}

func (t *term) depart(ctx context.Context, id weft.ID) error {
	n, ok := t.store.View().Node(id)
	if !ok {
		return nil // removed already; leaving twice does no harm
	}
	if n.Manager != nil {
		voters, err := t.voters()
		if err != nil {
			return err
		}
		if voters == 1 && id == t.m.cfg.Node {
			return fmt.Errorf("leave: node %s is the last manager; the cluster ends with it, use force to end it: %w", nodeName(n), weft.ErrConflict)
		}
		if id == t.m.cfg.Node {
			if err := t.raft.LeadershipTransfer().Error(); err != nil {
				return fmt.Errorf("leave: hand leadership over: %w: %w", weft.ErrUnavailable, err)
			}
			return t.m.notLeader(t.raft)
		}
	}
	down := weft.NodeDown
	err := t.prop.one(ctx, []state.Change{{NodeStatus: &state.NodeStatus{
		Node: id, State: &down, Message: state.Departed, DropManager: true,
	}}})
	if err != nil {
		return fmt.Errorf("leave: %w", err)
	}
	t.log.Info("node left", weft.KeyNode, id)
	if n.Manager == nil {
		return nil
	}
	return t.leaveGroup(ctx, id)
}
