package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/dispatch"
	"github.com/weftnet/weft/orchestrator/state"
)

const (
	// barrierTimeout bounds how long a new leader waits for the entries of
	// its predecessors.
	barrierTimeout = 30 * time.Second
	// ingressBits of the ingress network: every task of a service with
	// published ports and every node has an address on it.
	ingressBits = 16
)

// term is the memory of one term of leadership. Everything in it is built from
// the state when the term begins and forgotten when it ends.
type term struct {
	m     *Manager
	ctx   context.Context
	raft  *raft.Raft
	store *state.Store
	log   *slog.Logger

	prop     *proposer
	alloc    *allocator
	live     *liveness
	dispatch *dispatch.Dispatcher
	// gossipSettled is when all nodes were first seen to send by the newest
	// gossip key; zero while they do not. The loop's own.
	gossipSettled time.Time
	// confirmed has a token when nodes may have dropped what rests, or have
	// told of other keys of gossip.
	confirmed chan struct{}
	// editing holds one token while nobody edits services or networks or is
	// admitted: each is checked against all others, so they go one at a time.
	editing chan struct{}
}

// runTerm leads until ctx ends or something fails.
func (m *Manager) runTerm(ctx context.Context, r *raft.Raft) error {
	g, ctx := errgroup.WithContext(ctx)
	t := &term{m: m, ctx: ctx, raft: r, store: m.store, log: m.cfg.Log, editing: make(chan struct{}, 1), confirmed: make(chan struct{}, 1)}
	t.editing <- struct{}{}
	t.prop = newProposer(ctx, r)
	g.Go(func() error { return t.prop.run(ctx) })
	g.Go(func() error {
		if err := t.prepare(ctx); err != nil {
			return err
		}
		g.Go(func() error { return t.dispatch.Run(ctx) })
		g.Go(func() error { return t.runLoop(ctx) })
		g.Go(func() error { return t.runGroup(ctx) })
		m.set(func() { m.term = t })
		<-ctx.Done()
		m.set(func() { m.term = nil })
		return nil
	})
	return g.Wait()
}

// prepare brings the state up to date and builds the term's memory.
func (t *term) prepare(ctx context.Context) error {
	if err := t.raft.Barrier(barrierTimeout).Error(); err != nil {
		return fmt.Errorf("apply the entries of earlier terms: %w", err)
	}
	if _, ok := t.store.View().Cluster(); !ok {
		if err := t.found(ctx); err != nil {
			return err
		}
	}
	v := t.store.View()
	c, _ := v.Cluster()
	t.alloc = newAllocator(v)
	t.live = newLiveness(v, c.Spec.NodeDownAfter, t.m.wokeBy(time.Now()), time.Now(), t.m.cfg.Heard)
	t.dispatch = dispatch.New(dispatch.Config{
		Store: t.store, Propose: t.prop.one, Seen: t.live.seen, Confirmed: t.lookAgain, Log: t.log,
	})
	return nil
}

// found stores the first objects of a new cluster.
func (t *term) found(ctx context.Context) error {
	b := t.m.cfg.Bootstrap
	if b == nil {
		return errors.New("the log has no cluster object: the initialisation of this cluster was cut off; leave and initialise again")
	}
	used := append([]netip.Prefix{weft.GatewayPool(), weft.GatewayPool6()}, b.Node.Description.UsedPrefixes...)
	subnet, err := pickIngress(b.Cluster, used)
	if err != nil {
		return fmt.Errorf("choose subnet of the ingress network: %w", err)
	}
	cluster, node := b.Cluster, b.Node
	ingress := weft.NetworkSpec{Name: weft.IngressName, Driver: weft.DriverOverlay, Ingress: true, Subnets: []weft.Subnet{subnet}}
	if cluster.ULA.IsValid() {
		six, err := ipam.Pick6(cluster.ULA, used)
		if err != nil {
			return fmt.Errorf("choose IPv6 subnet of the ingress network: %w", err)
		}
		ingress.IPv6 = true
		ingress.Subnets = append(ingress.Subnets, weft.Subnet{Prefix: six, Gateway: six.Addr().Next()})
	}
	at, err := newFamilies(ingress).next("")
	if err != nil {
		return fmt.Errorf("choose ingress address of node %s: %w", b.Node.ID, err)
	}
	cluster.Meta = weft.Meta{}
	node.Meta = weft.Meta{}
	node.Spec.Role = weft.RoleManager
	node.Manager = &weft.ManagerStatus{Addr: t.m.cfg.Addr}
	if !node.Status.Addr.IsValid() {
		node.Status.Addr = t.m.cfg.Addr.Addr()
	}
	node.Status.ClusterPort = t.m.cfg.Addr.Port()
	if !node.DataPath.IsValid() {
		node.DataPath = node.Status.Addr
	}
	node.IngressAddr, node.IngressAddr6 = at.Addr, at.Addr6
	err = t.prop.one(ctx, []state.Change{
		{Cluster: &cluster},
		{Network: &weft.Network{
			ID: weft.NewID(), VNI: weft.IngressVNI, Spec: ingress,
		}},
		{Node: &node},
	})
	if err != nil {
		return fmt.Errorf("store the new cluster: %w", err)
	}
	return nil
}

// enter begins a call on the leader: the returned context ends with the caller
// or the term, whichever is first.
func (m *Manager) enter(ctx context.Context) (*term, context.Context, context.CancelFunc, error) {
	t, err := m.leading()
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(t.ctx, cancel)
	return t, ctx, func() { unhook(); cancel() }, nil
}

// write runs f on the leader.
func write[T any](m *Manager, ctx context.Context, f func(ctx context.Context, t *term) (T, error)) (T, error) {
	var zero T
	t, inner, done, err := m.enter(ctx)
	if err != nil {
		return zero, err
	}
	defer done()
	v, err := f(inner, t)
	if err != nil {
		return zero, t.explain(ctx, err)
	}
	return v, nil
}

// read runs f on a view that is at least as new as every write answered before
// the call.
func read[T any](m *Manager, ctx context.Context, f func(v *state.Snapshot, t *term) (T, error)) (T, error) {
	var zero T
	t, inner, done, err := m.enter(ctx)
	if err != nil {
		return zero, err
	}
	defer done()
	if err := t.verify(inner); err != nil {
		return zero, err
	}
	return f(t.store.View(), t)
}

// verify asks a majority whether this member still leads: another leader may
// have been elected and have answered writes that this one has not seen.
func (t *term) verify(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		if t.ctx.Err() != nil {
			return t.m.notLeader(t.raft)
		}
		return err
	}
	// It cannot wait for long: without a majority the lease runs out, and
	// the leader steps down and answers. However it is lost, nothing was
	// done: the caller may ask the next leader.
	if err := t.raft.VerifyLeader().Error(); err != nil {
		return t.m.notLeader(t.raft)
	}
	return nil
}

// explain turns the cancellation that the end of the term caused into an answer
// that the caller can act on.
func (t *term) explain(outer context.Context, err error) error {
	if t.ctx.Err() == nil || outer.Err() != nil || !errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("leadership was lost while the call was under way; it may or may not have been done: %w", weft.ErrUnavailable)
}

// edit waits for its turn to edit services or networks, or to admit a node.
func (t *term) edit(ctx context.Context) (release func(), err error) {
	select {
	case <-t.editing:
		return func() { t.editing <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
