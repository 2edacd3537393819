package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Config is what a Dispatcher stands on.
type Config struct {
	Store *state.Store
	// Propose commits changes as one command; it blocks until they are
	// applied.
	Propose func(ctx context.Context, changes []state.Change) error
	// Seen is told of every sign of life of a node. It must not block.
	Seen func(node weft.ID)
	// Confirmed is called when Progress may say more than before of a state
	// in which something rests, and when Gossip says something new; nil: nobody
	// asks. It must not block.
	Confirmed func()
	// MinGap is the shortest time between two increments of one session:
	// longer makes fewer, larger messages. Default 2 ms.
	MinGap time.Duration
	Log    *slog.Logger
}

// Dispatcher implements wire.Dispatcher for one term of leadership. Its methods
// are safe for concurrent use.
type Dispatcher struct {
	cfg Config

	// mu guards: sessions, the progress of each, reported, gossip, cache, ended.
	mu       sync.Mutex
	sessions map[*session]struct{}
	reported map[weft.ID]reported
	gossip   map[weft.ID]weft.GossipEpochs
	cache    *shared // the newest that anyone computed
	ended    bool
}

// session is one open stream.
type session struct {
	node weft.ID
	// wake holds at most one token; it is never closed.
	wake chan struct{}
	// end is closed by the dispatcher when its term is over, or when a
	// newer session of the same node has opened (reason says which; it is
	// written before the close).
	end    chan struct{}
	reason error
	// progress is guarded by the dispatcher's mu.
	progress progress
}

// New makes a dispatcher; Run must be running for sessions to get increments.
func New(cfg Config) *Dispatcher {
	if cfg.MinGap <= 0 {
		cfg.MinGap = 2 * time.Millisecond
	}
	if cfg.Confirmed == nil {
		cfg.Confirmed = func() {}
	}
	return &Dispatcher{cfg: cfg, sessions: map[*session]struct{}{}, reported: map[weft.ID]reported{}, gossip: map[weft.ID]weft.GossipEpochs{}}
}

// Run wakes the sessions whose data changed, until ctx ends; then it ends them
// all with weft.ErrUnavailable.
func (d *Dispatcher) Run(ctx context.Context) error {
	sub := d.cfg.Store.Subscribe()
	defer sub.Close()
	defer d.endAll(fmt.Errorf("leadership ended: %w", weft.ErrUnavailable))
	var told *shared // what the last wake-up of everyone was about
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sub.C():
			c := sub.Take()
			told = d.wake(&c, told)
		}
	}
}

// wake passes a token to each session that may have something to send. Tasks
// concern their node alone. Of the rest only a change of what other nodes see
// counts: a node's listeners or a rolling update's progress wake nobody.
// It returns what everyone has been told of by now.
func (d *Dispatcher) wake(c *state.Changed, told *shared) *shared {
	everyone := c.All
	if c.All || c.Cluster || len(c.Services)+len(c.Networks)+len(c.Nodes) > 0 {
		now := share(d.cfg.Store.View(), d.newest())
		everyone = everyone || told == nil || !sameShared(told, now)
		told = now
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if told != nil && (d.cache == nil || d.cache.index < told.index) {
		d.cache = told
	}
	for s := range d.sessions {
		_, tasks := c.TaskNodes[s.node]
		_, self := c.Nodes[s.node] // it may have been removed
		if everyone || tasks || self || s.progress.concerns(c) {
			select {
			case s.wake <- struct{}{}:
			default: // a token is there already
			}
		}
	}
	return told
}

func sameShared(a, b *shared) bool {
	return reflect.DeepEqual(a.nodes, b.nodes) && slices.EqualFunc(a.services, b.services, sameView) &&
		reflect.DeepEqual(a.cluster, b.cluster) && reflect.DeepEqual(a.ingress, b.ingress)
}

func sameView(a, b *wire.ServiceView) bool { return a == b || deepEqual(a, b) }

// newest is the newest shared part that anyone computed.
func (d *Dispatcher) newest() *shared {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cache
}

func (d *Dispatcher) endAll(reason error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	for s := range d.sessions {
		d.endLocked(s, reason)
	}
}

func (d *Dispatcher) endLocked(s *session, reason error) {
	s.reason = reason
	close(s.end)
	delete(d.sessions, s)
}

// Session implements wire.Dispatcher. A second session of a node ends the
// first: only a node that has lost its stream opens another.
func (d *Dispatcher) Session(ctx context.Context, node weft.ID, r wire.SessionRequest, send func(wire.Assignments) error) error {
	if r.Version != wire.ProtocolVersion {
		return fmt.Errorf("open session of node %s: it speaks protocol version %d, this manager %d: %w", node, r.Version, wire.ProtocolVersion, weft.ErrInvalid)
	}
	n, ok := d.cfg.Store.View().Node(node)
	switch {
	case !ok:
		return fmt.Errorf("open session: node %s %w in this cluster: it was removed; leave and join again", node, weft.ErrNotFound)
	case state.HasDeparted(&n):
		return fmt.Errorf("open session: node %s has left this cluster; leave there once more if that was cut off, and join again: %w", node, weft.ErrForbidden)
	}
	ready := weft.NodeReady
	d.cfg.Seen(node)
	d.untold(node)
	status := &state.NodeStatus{
		Node: node, State: &ready, Description: &r.Description,
		Session: &state.NodeSession{Addr: r.Addr, DataPath: r.DataPath, Port: r.Port},
	}
	if at := netip.AddrPortFrom(r.Addr, r.Port); n.Manager != nil && r.Addr.IsValid() && r.Port != 0 && n.Manager.Addr != at {
		moved := *n.Manager // the Raft group follows
		moved.Addr = at
		status.Manager = &moved
	}
	err := d.cfg.Propose(ctx, []state.Change{{NodeStatus: status}})
	if err != nil {
		return fmt.Errorf("open session of node %s: %w", node, err)
	}
	s := &session{node: node, wake: make(chan struct{}, 1), end: make(chan struct{}), progress: nothingSent()}
	if err := d.open(s); err != nil {
		return err
	}
	defer d.close(s)
	d.cfg.Log.Info("session opened", weft.KeyNode, node)
	err = d.serve(ctx, s, send)
	d.cfg.Log.Info("session closed", weft.KeyNode, node, weft.KeyErr, err)
	return err
}

func (d *Dispatcher) open(s *session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return fmt.Errorf("open session of node %s: leadership ended: %w", s.node, weft.ErrUnavailable)
	}
	for o := range d.sessions {
		if o.node == s.node {
			d.endLocked(o, fmt.Errorf("session of node %s: a newer one has opened: %w", s.node, weft.ErrUnavailable))
		}
	}
	d.sessions[s] = struct{}{}
	return nil
}

func (d *Dispatcher) close(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.sessions, s)
}

// serve sends the full set and then increments. It is the only sender of its
// stream, so Seq needs no lock.
func (d *Dispatcher) serve(ctx context.Context, s *session, send func(wire.Assignments) error) error {
	sent, at := d.current(s.node, Set{})
	full := sent.Full()
	full.Seq, full.Index, full.Confirm = 1, at.index, at.rests
	d.advance(s, progress{sent: at.index, upTo: at.index, networks: sent.Networks})
	if err := send(full); err != nil {
		return fmt.Errorf("send assignments to node %s: %w", s.node, err)
	}
	seq := full.Seq
	gap := time.NewTimer(d.cfg.MinGap)
	defer gap.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.end:
			return s.reason
		case <-s.wake:
		}
		if _, ok := d.cfg.Store.View().Node(s.node); !ok {
			return fmt.Errorf("session of node %s: node was removed: %w", s.node, weft.ErrNotFound)
		}
		next, at := d.current(s.node, sent)
		a := Diff(sent, next)
		if Empty(a) {
			d.upToDate(s, at)
			continue
		}
		seq++
		a.Seq, a.Index, a.Confirm = seq, at.index, at.rests
		d.advance(s, progress{sent: at.index, upTo: at.index, networks: next.Networks})
		if err := send(a); err != nil {
			return fmt.Errorf("send assignments to node %s: %w", s.node, err)
		}
		sent = next
		gap.Reset(d.cfg.MinGap)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.end:
			return s.reason
		case <-gap.C:
		}
	}
}

// current computes the newest set of a node from its last one, with the shared part
// from the cache when it is of the same index.
func (d *Dispatcher) current(node weft.ID, last Set) (Set, *shared) {
	v := d.cfg.Store.View()
	sh := d.newest()
	if sh == nil || sh.index != v.Index() {
		sh = share(v, sh)
		d.mu.Lock()
		if d.cache == nil || d.cache.index < sh.index {
			d.cache = sh
		}
		d.mu.Unlock()
	}
	return compute(v, sh, node, last), sh
}

// Report implements wire.Dispatcher. It returns when the states are committed;
// what the store already has is not proposed again.
func (d *Dispatcher) Report(ctx context.Context, node weft.ID, r wire.Report) error {
	d.cfg.Seen(node)
	v := d.cfg.Store.View()
	n, ok := v.Node(node)
	if !ok {
		return fmt.Errorf("take report: node %s %w in this cluster", node, weft.ErrNotFound)
	}
	d.carriedOut(node, r.Applied, r.Behind)
	if r.Gossip != nil {
		d.tookUp(node, *r.Gossip)
	}
	var changes []state.Change
	var errs []error
	for i := range r.Tasks {
		k := &r.Tasks[i]
		t, ok := v.Task(k.Task)
		if !ok {
			continue // its record went meanwhile; the agent will be told
		}
		if t.Node != node {
			errs = append(errs, fmt.Errorf("take report of node %s: task %s is not assigned to it: %w", node, k.Task, weft.ErrForbidden))
			continue
		}
		k.Status.At = k.Status.At.UTC().Round(0)
		if k.Status.State <= weft.TaskAssigned || t.Status == k.Status {
			continue
		}
		changes = append(changes, state.Change{TaskStatus: &state.TaskStatus{Task: k.Task, Node: node, Status: k.Status}})
	}
	// What a node that has left still reports, while it ends its tasks, is no
	// sign of coming back.
	if n.Status.State == weft.NodeDown && !state.HasDeparted(&n) {
		// It was silent for too long and is heard again on its old stream.
		ready := weft.NodeReady
		changes = append(changes, state.Change{NodeStatus: &state.NodeStatus{Node: node, State: &ready}})
	}
	about := n.Description
	if r.Prefixes != nil {
		about.UsedPrefixes = r.Prefixes
	}
	if r.Addrs != nil {
		about.Addrs = r.Addrs
	}
	if r.InputRules != nil {
		about.InputRules = r.InputRules
	}
	was := n.Description
	if !slices.Equal(was.UsedPrefixes, about.UsedPrefixes) || !slices.Equal(was.Addrs, about.Addrs) || !slices.Equal(was.InputRules, about.InputRules) {
		changes = append(changes, state.Change{NodeStatus: &state.NodeStatus{Node: node, Description: &about}})
	}
	if r.Listeners != nil && !slices.Equal(n.Status.Listeners, r.Listeners) {
		changes = append(changes, state.Change{NodeStatus: &state.NodeStatus{Node: node, Listeners: &r.Listeners}})
	}
	if r.Keys != nil && !slices.Equal(n.Status.Keys, r.Keys) {
		changes = append(changes, state.Change{NodeStatus: &state.NodeStatus{Node: node, Keys: &r.Keys}})
	}
	if len(changes) > 0 {
		if err := d.cfg.Propose(ctx, changes); err != nil {
			errs = append(errs, fmt.Errorf("store report of node %s: %w", node, err))
		}
	}
	return errors.Join(errs...)
}
