package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Manager is one member of the Raft group. It implements wire.Control,
// wire.Dispatcher and wire.Membership: while it leads by acting, otherwise by
// answering wire.NotLeader. All methods are safe for concurrent use; before Run
// has opened the log they answer wire.NotLeader too.
type Manager struct {
	cfg   Config
	store *state.Store
	fsm   *fsm

	// mu guards: raft, peers, term, again, woke, changed.
	mu    sync.Mutex
	raft  *raft.Raft // nil before Run
	peers *watched
	term  *term // nil while not leading, or not ready to
	// again says that Run found a log of an earlier run; woke is when it first
	// knew a leader after that, itself or another.
	again bool
	woke  time.Time
	// changed is closed and replaced when term or raft changes.
	changed chan struct{}
}

var (
	_ wire.Control    = (*Manager)(nil)
	_ wire.Dispatcher = (*Manager)(nil)
	_ wire.Membership = (*Manager)(nil)
)

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Manager, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := state.New()
	return &Manager{cfg: cfg, store: s, fsm: newFSM(s), changed: make(chan struct{})}, nil
}

// Run opens the log, takes part in the Raft group and leads when elected, until
// ctx ends (nil) or the log cannot be used any more (the reason).
func (m *Manager) Run(ctx context.Context) (err error) {
	stores, closer, err := m.openStores(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	tr, closeTransport := m.openTransport(ctx)
	defer func() { err = errors.Join(err, closeTransport()) }()

	rc := m.raftConfig(ctx)
	again, err := raft.HasExistingState(stores.Log, stores.Stable, stores.Snapshots)
	if err != nil {
		return fmt.Errorf("look for state of raft: %w", err)
	}
	if !again {
		if err := m.bootstrapRaft(rc, stores, tr); err != nil {
			return err
		}
	}
	r, err := raft.NewRaft(rc, m.fsm, stores.Log, stores.Stable, stores.Snapshots, tr)
	if err != nil {
		return fmt.Errorf("start raft: %w", err)
	}
	defer func() {
		if serr := r.Shutdown().Error(); serr != nil {
			err = errors.Join(err, fmt.Errorf("stop raft: %w", serr))
		}
	}()
	m.set(func() { m.raft, m.peers, m.again = r, tr, again })
	defer m.set(func() { m.raft = nil })

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case err := <-m.fsm.fatal:
			return err
		case <-stores.Failed:
			return stores.Err() // whoever runs the manager opens the log again
		}
	})
	g.Go(func() error { return m.followDistance(ctx, r, tr) })
	g.Go(func() error {
		if m.Await(ctx) == nil {
			m.wokeBy(time.Now())
		}
		return nil
	})
	g.Go(func() error {
		m.followLeadership(ctx, r)
		return nil
	})
	return g.Wait()
}

func (m *Manager) raftConfig(ctx context.Context) *raft.Config {
	c := raft.DefaultConfig() // pre-vote is on by default
	c.LocalID = raft.ServerID(m.cfg.Node)
	c.HeartbeatTimeout = m.cfg.Timing.Heartbeat
	c.ElectionTimeout = m.cfg.Timing.Heartbeat
	c.LeaderLeaseTimeout = m.cfg.Timing.Lease
	c.Logger = newRaftLogger(ctx, m.cfg.Log, "raft")
	// A member that was removed stays up and answers "no leader" until the
	// daemon stops it.
	c.ShutdownOnRemove = false
	c.NoLegacyTelemetry = true
	return c
}

func (m *Manager) openTransport(ctx context.Context) (*watched, func() error) {
	if t, ok := m.cfg.Transport.(transport); ok {
		return watch(t), func() error { return nil } // its maker closes it
	}
	t := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:  m.cfg.Stream,
		MaxPool: 3,
		Timeout: 10 * time.Second,
		Logger:  newRaftLogger(ctx, m.cfg.Log, "raft-net"),
	})
	return watch(t), t.Close
}

// bootstrapRaft writes the first configuration of a new group, if this manager
// begins one.
func (m *Manager) bootstrapRaft(rc *raft.Config, s *Stores, tr raft.Transport) error {
	if m.cfg.Bootstrap == nil {
		return nil
	}
	err := raft.BootstrapCluster(rc, s.Log, s.Stable, s.Snapshots, tr, raft.Configuration{Servers: []raft.Server{{
		ID: rc.LocalID, Address: raft.ServerAddress(m.cfg.Addr.String()),
	}}})
	if err != nil {
		return fmt.Errorf("write first configuration of raft: %w", err)
	}
	return nil
}

// followLeadership runs a term whenever Raft says that this member leads. Raft
// may report two wins in a row (the loss between them was not read in time):
// each begins a new term.
func (m *Manager) followLeadership(ctx context.Context, r *raft.Raft) {
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return
		case leads := <-r.LeaderCh():
			stop()
			stop = func() {}
			if !leads {
				m.cfg.Log.Info("leadership lost", weft.KeyNode, m.cfg.Node)
				continue
			}
			m.cfg.Log.Info("leadership won", weft.KeyNode, m.cfg.Node)
			termCtx, cancel := context.WithCancel(ctx)
			done := make(chan struct{}) // closed when the term's work has ended
			go func() {
				defer close(done)
				m.leadUntil(termCtx, r)
			}()
			stop = func() {
				cancel()
				<-done
			}
		}
	}
}

// leadUntil does the leader's work until ctx ends, again after a failure.
func (m *Manager) leadUntil(ctx context.Context, r *raft.Raft) {
	for ctx.Err() == nil {
		err := m.runTerm(ctx, r)
		if ctx.Err() != nil || err == nil {
			return
		}
		if r.State() == raft.Leader {
			m.cfg.Log.Error("leader's work failed, begins anew", weft.KeyNode, m.cfg.Node, weft.KeyErr, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// set changes guarded fields and wakes those who wait for a change.
func (m *Manager) set(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
	close(m.changed)
	m.changed = make(chan struct{})
}

// leading returns the term, or wire.NotLeader with the leader if it is known
// and another.
func (m *Manager) leading() (*term, error) {
	m.mu.Lock()
	t, r := m.term, m.raft
	m.mu.Unlock()
	if t != nil {
		return t, nil
	}
	return nil, m.notLeader(r)
}

func (m *Manager) notLeader(r *raft.Raft) *wire.NotLeader {
	if r == nil {
		return &wire.NotLeader{}
	}
	addr, id := r.LeaderWithID()
	if id == raft.ServerID(m.cfg.Node) {
		return &wire.NotLeader{} // elected, and still catching up
	}
	ap, err := netip.ParseAddrPort(string(addr))
	if err != nil {
		return &wire.NotLeader{} // "" while nobody leads
	}
	return &wire.NotLeader{Leader: ap}
}

// Await blocks until this manager leads and answers calls, or knows who does.
func (m *Manager) Await(ctx context.Context) error {
	// Raft announces other leaders to observers only, which need a channel
	// and a filter; a start is rare enough to look ten times a second.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		m.mu.Lock()
		t, r, changed := m.term, m.raft, m.changed
		m.mu.Unlock()
		if t != nil || m.notLeader(r).Leader.IsValid() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a leader: %w: %w", weft.ErrUnavailable, ctx.Err())
		case <-changed:
		case <-tick.C:
		}
	}
}

// wokeBy notes that a leader is known now, and returns when one first was; zero
// for a manager that was not started again.
func (m *Manager) wokeBy(now time.Time) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.again && m.woke.IsZero() {
		m.woke = now
	}
	return m.woke
}

// votePoll is how often AwaitVote looks: Raft tells of its own changes of
// configuration to nobody.
const votePoll = 20 * time.Millisecond

// AwaitVote blocks until this manager's own copy of the group's configuration
// gives it a vote. Until then the loss of another manager can cost the group
// its majority.
func (m *Manager) AwaitVote(ctx context.Context) error {
	tick := time.NewTicker(votePoll)
	defer tick.Stop()
	for {
		m.mu.Lock()
		r := m.raft
		m.mu.Unlock()
		if r != nil {
			if f := r.GetConfiguration(); f.Error() == nil {
				for _, s := range f.Configuration().Servers {
					if s.ID == raft.ServerID(m.cfg.Node) && s.Suffrage == raft.Voter {
						return nil
					}
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for this manager's vote: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// Store is this member's copy of the state. A follower's may be behind; it is
// for status displays and tests, decisions go through Control.
func (m *Manager) Store() *state.Store { return m.store }
