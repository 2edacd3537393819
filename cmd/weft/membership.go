package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/orchestrator/wire"
)

// membership is this node's way in and out of a cluster. It owns the one member
// that runs, if any, and implements api.Swarm (init.go, join.go).
//
//	inactive ── Init, Join ──────────► active ── Leave ──► inactive
//	start with membership on disk ──►     │
//	                            ▲─ retry ─┘ a part failed
//
// run is called once; all other methods from any goroutine.
type membership struct {
	cfg     daemonConfig
	engines *engines
	driver  *containerd.Driver
	log     *slog.Logger
	// repairs of all members that this daemon runs.
	repairs *agent.Repairs
	drains  *agent.Drains

	// change is held by Init, Join and Leave: one at a time.
	change sync.Mutex
	// starts hands a member to run. Never closed.
	starts chan *member

	// mu guards: current, stop, failure.
	mu      sync.Mutex
	current *member
	stop    context.CancelFunc // ends current
	// failure is why this node cannot take part in the cluster that it is a member
	// of. It stays while another try runs, until that has its engines.
	failure error

	moves moves // of the member to be resumed; run's alone

	resumed chan struct{} // closed by run when it has made first
	first   *member       // nil when there was none to resume, or it could not be made
}

func newMembership(cfg daemonConfig, e *engines, d *containerd.Driver, log *slog.Logger) (*membership, error) {
	return &membership{cfg: cfg, engines: e, driver: d, log: log, repairs: agent.NewRepairs(log), drains: agent.NewDrains(log), starts: make(chan *member), resumed: make(chan struct{})}, nil
}

// memberRetry is the pause before a member that failed is tried again.
const memberRetry = time.Second

// run resumes the membership found on disk and runs members as they come. A
// member that fails does not end the daemon: its containers are still there,
// and the API says what is wrong.
func (ms *membership) run(ctx context.Context) error {
	next := ms.resume(ctx)
	ms.first = next
	close(ms.resumed)
	for {
		if next == nil {
			timer := time.NewTimer(memberRetry)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case next = <-ms.starts:
				timer.Stop()
			case <-timer.C:
				if ms.failed() != nil {
					next = ms.resume(ctx)
				}
				continue
			}
		}
		ms.serve(ctx, next)
		if ctx.Err() != nil {
			return nil
		}
		next = nil
	}
}

// awaitNames blocks until the names of the containers that run already are
// answered again, or nobody is there to answer them.
func (ms *membership) awaitNames(ctx context.Context) {
	select {
	case <-ms.resumed:
	case <-ctx.Done():
		return
	}
	if ms.first == nil {
		return
	}
	select {
	case <-ms.first.stage.named:
	case <-ms.first.stage.ended:
	case <-ctx.Done():
	}
}

// resume makes the member that the disk describes; nil when there is none, or
// when it cannot be made now.
func (ms *membership) resume(ctx context.Context) *member {
	state, err := loadMember(ms.cfg.DataRoot)
	var m *member
	if err == nil && state != nil {
		if *state, err = ms.catchUp(*state); err == nil {
			m, err = ms.newMember(ctx, *state, nil)
		}
	}
	if err != nil || state == nil {
		ms.fail(ctx, "resume cluster membership", err)
		return nil
	}
	return m
}

// fail notes why this node cannot take part; nil that it can, or need not. It
// logs what is new.
func (ms *membership) fail(ctx context.Context, what string, err error) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if err != nil && ctx.Err() == nil && (ms.failure == nil || ms.failure.Error() != err.Error()) {
		ms.log.Error(what, weft.KeyErr, err)
	}
	ms.failure = err
}

// serve runs one member to its end.
func (ms *membership) serve(ctx context.Context, m *member) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ms.mu.Lock()
	ms.current, ms.stop = m, stop
	ms.mu.Unlock()

	err := m.run(ctx)
	var moved *movedError
	if errors.As(err, &moved) {
		ms.moves = moved.found // it has been waited for
	}
	if ctx.Err() != nil {
		err = nil
	}
	ms.fail(ctx, "cluster membership failed", err)
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.current = nil
	close(m.stage.ended)
}

// able is called by a member that has its engines.
func (ms *membership) able() {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.failure = nil
}

func (ms *membership) failed() error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.failure
}

// member returns the running member, or ErrUnavailable with Docker's sentence.
func (ms *membership) member() (*member, error) {
	ms.mu.Lock()
	m, failure := ms.current, ms.failure
	ms.mu.Unlock()
	switch {
	case failure != nil:
		return nil, cannotTakePart(failure)
	case m != nil:
		return m, nil
	case ms.onDisk() != nil:
		return nil, fmt.Errorf("%w: this node is taking up its place in the cluster; try again", weft.ErrUnavailable)
	}
	return nil, &notMember{}
}

// onDisk is the membership that the disk describes, for the moments in which no
// member runs: the daemon has just started, or the node is joining or leaving.
// nil = none. What is wrong with the file is run's to say.
func (ms *membership) onDisk() *memberState {
	s, err := loadMember(ms.cfg.DataRoot)
	if err != nil {
		return nil
	}
	return s
}

// notMember is the answer of a node outside any cluster; its text is exactly
// the sentence that Docker's clients know.
type notMember struct{}

func (*notMember) Error() string { return weft.NotInCluster }
func (*notMember) Unwrap() error { return weft.ErrUnavailable }

// start hands m to run and waits until it is taken.
func (ms *membership) start(ctx context.Context, m *member) error {
	select {
	case ms.starts <- m:
		return nil
	case <-ctx.Done():
		return errors.Join(ctx.Err(), m.ln.Close())
	}
}

// end stops the running member and waits until all of it has ended.
func (ms *membership) end(ctx context.Context) error {
	ms.mu.Lock()
	stop, m := ms.stop, ms.current
	ms.mu.Unlock()
	if m == nil {
		return nil
	}
	stop()
	select {
	case <-m.stage.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end cluster membership: %w", ctx.Err())
	}
}

// control is the way to the leader.
func (ms *membership) control() (wire.Control, error) {
	m, err := ms.member()
	if err != nil {
		return nil, err
	}
	if err := m.creds.Expired(); err != nil {
		return nil, cannotTakePart(err) // sooner and clearer than what its connections meet
	}
	return m.client, nil
}

func cannotTakePart(why error) error {
	return fmt.Errorf("%w: this node is a member of a cluster but cannot take part: %w", weft.ErrUnavailable, why)
}
