package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

const (
	// groupCommands and groupDelay bound one log entry: batching was
	// measured to be worth six to ten times the throughput. The delay is
	// waited only while an earlier entry is still under way, so that a
	// lone write waits for nothing.
	groupCommands = 256
	groupDelay    = time.Millisecond
	// entriesUnderWay bounds how many entries are proposed and not yet
	// committed; beyond it proposers wait.
	entriesUnderWay = 16
	// enqueueTimeout bounds the wait for Raft to take an entry.
	enqueueTimeout = 5 * time.Second
)

// proposal is commands of one caller; each has a result of its own.
type proposal struct {
	cmds []state.Command
	// done has room for the one answer; it is never closed.
	done chan []error
}

// proposer groups the commands of many callers into log entries. It belongs to
// one term.
type proposer struct {
	raft *raft.Raft
	in   chan proposal // never closed
	term context.Context
}

// entry is a proposed log entry with those who wait for it.
type entry struct {
	future raft.ApplyFuture
	who    []proposal
}

func newProposer(term context.Context, r *raft.Raft) *proposer {
	return &proposer{raft: r, in: make(chan proposal), term: term}
}

// one commits changes as one command.
func (p *proposer) one(ctx context.Context, changes []state.Change) error {
	return p.each(ctx, [][]state.Change{changes})[0]
}

// each commits every element as a command of its own, in order, and returns an
// error for each. An error that wraps weft.ErrUnavailable leaves open whether
// the command will be applied.
//
// The end of ctx counts only until the commands are on their way. From then on
// they cannot be taken back, and a caller that went before the outcome is known
// would free addresses which the state is about to hold. Raft answers soon: a
// leader without a majority steps down when its lease is over.
func (p *proposer) each(ctx context.Context, changes [][]state.Change) []error {
	if len(changes) == 0 {
		return nil
	}
	now := time.Now().UTC().Round(0)
	pr := proposal{done: make(chan []error, 1)}
	for _, c := range changes {
		pr.cmds = append(pr.cmds, state.Command{At: now, Changes: c})
	}
	select {
	case p.in <- pr:
	case <-ctx.Done():
		return repeat(ctx.Err(), len(changes))
	case <-p.term.Done():
		return repeat(&wire.NotLeader{}, len(changes))
	}
	return <-pr.done
}

func repeat(err error, n int) []error {
	errs := make([]error, n)
	for i := range errs {
		errs[i] = err
	}
	return errs
}

// run groups and proposes until the term ends. Every accepted proposal gets an
// answer before it returns.
func (p *proposer) run(ctx context.Context) error {
	entries := make(chan entry, entriesUnderWay) // closed by gather
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(entries)
		p.gather(ctx, entries)
		return nil
	})
	g.Go(func() error {
		for e := range entries { // futures are answered in order
			e.settle()
		}
		return nil
	})
	return g.Wait()
}

func (p *proposer) gather(ctx context.Context, entries chan<- entry) {
	timer := time.NewTimer(groupDelay)
	defer timer.Stop()
	for {
		var first proposal
		select {
		case <-ctx.Done():
			return
		case first = <-p.in:
		}
		who := []proposal{first}
		n := len(first.cmds)
		if len(entries) > 0 {
			timer.Reset(groupDelay)
		} else {
			timer.Reset(0)
		}
	group:
		for n < groupCommands {
			select {
			case pr := <-p.in:
				who = append(who, pr)
				n += len(pr.cmds)
				continue
			default:
			}
			select {
			case pr := <-p.in:
				who = append(who, pr)
				n += len(pr.cmds)
			case <-timer.C:
				break group
			case <-ctx.Done():
				break group
			}
		}
		entries <- p.propose(who)
	}
}

func (p *proposer) propose(who []proposal) entry {
	var cmds []state.Command
	for _, pr := range who {
		cmds = append(cmds, pr.cmds...)
	}
	data, err := state.EncodeEntry(cmds)
	if err != nil {
		return entry{future: failed{err}, who: who}
	}
	return entry{future: p.raft.Apply(data, enqueueTimeout), who: who}
}

func (e entry) settle() {
	err := e.future.Error()
	var results []error
	if err == nil {
		switch r := e.future.Response().(type) {
		case []error:
			results = r
		case error:
			err = r
		}
	}
	err = raftError(err)
	for _, pr := range e.who {
		if err != nil {
			pr.done <- repeat(err, len(pr.cmds))
			continue
		}
		pr.done <- results[:len(pr.cmds)]
		results = results[len(pr.cmds):]
	}
}

// raftError puts Raft's errors into our words.
func raftError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return &wire.NotLeader{} // certainly not written
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return fmt.Errorf("leadership was lost while the write was under way; it may or may not have been done, look before repeating it: %w", weft.ErrUnavailable)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("the log did not take the write within %s: %w", enqueueTimeout, weft.ErrUnavailable)
	case errors.Is(err, raft.ErrRaftShutdown):
		return fmt.Errorf("this manager is stopping: %w", weft.ErrUnavailable)
	}
	return err
}

// failed is a future that has failed already.
type failed struct{ err error }

func (f failed) Error() error  { return f.err }
func (f failed) Response() any { return nil }
func (f failed) Index() uint64 { return 0 }
