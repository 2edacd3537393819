package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
)

const (
	// catchUpEntries is how far behind a new manager may be when it gets its
	// vote: it fetches so many within one heartbeat.
	catchUpEntries = 64
	// groupPoll is how often a catching-up manager is looked at, groupIdle
	// how often the group is compared when nothing is known to differ.
	groupPoll = 100 * time.Millisecond
	groupIdle = 10 * time.Second
	// groupTimeout bounds one change of the group.
	groupTimeout = 10 * time.Second
)

// runGroup keeps the Raft group equal to the managers of the state: a new one
// joins without a vote, gets it when it has caught up (so that a joiner that
// never comes up costs no majority), and leaves when its node is removed.
func (t *term) runGroup(ctx context.Context) error {
	sub := t.store.Subscribe()
	defer sub.Close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sub.C():
			if c := sub.Take(); !c.All && len(c.Nodes) == 0 {
				continue
			}
		case <-timer.C:
		}
		wait := groupIdle
		busy, err := t.fixGroup()
		if err != nil && ctx.Err() == nil {
			t.log.Warn("raft group differs from the managers, tries again", weft.KeyErr, err)
		}
		if busy || err != nil {
			wait = groupPoll
		}
		timer.Stop()
		timer.Reset(wait)
	}
}

// fixGroup makes at most one change, because each is a commit of its own that
// may end this term. It reports whether there is more to do.
func (t *term) fixGroup() (busy bool, err error) {
	f := t.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return false, fmt.Errorf("read raft group: %w", err)
	}
	have := map[raft.ServerID]raft.Server{}
	for _, s := range f.Configuration().Servers {
		have[s.ID] = s
	}
	want := map[raft.ServerID]raft.ServerAddress{}
	for _, n := range t.store.View().Nodes() {
		if n.Spec.Role == weft.RoleManager && n.Manager != nil {
			want[raft.ServerID(n.ID)] = raft.ServerAddress(n.Manager.Addr.String())
		}
	}
	for _, s := range f.Configuration().Servers {
		if _, ok := want[s.ID]; !ok {
			t.log.Info("manager leaves the raft group", weft.KeyNode, s.ID)
			return true, wrapGroup("remove manager", s.ID, t.raft.RemoveServer(s.ID, f.Index(), groupTimeout))
		}
	}
	var failed []error // what one manager cannot have yet, as another has it, must not keep that one from moving
	for _, id := range sortedServers(want) {
		s, ok := have[id]
		switch {
		case !ok:
			t.log.Info("manager joins the raft group without a vote", weft.KeyNode, id)
			return true, wrapGroup("add manager", id, t.raft.AddNonvoter(id, want[id], f.Index(), groupTimeout))
		case s.Address != want[id] && s.Suffrage == raft.Voter:
			if err := wrapGroup("move manager", id, t.raft.AddVoter(id, want[id], f.Index(), groupTimeout)); err != nil {
				failed = append(failed, err)
				continue
			}
			t.log.Info("manager has another address in the raft group", weft.KeyNode, id)
			return true, errors.Join(failed...)
		case s.Suffrage == raft.Voter:
			continue
		case t.m.peers.progress(id).last+catchUpEntries >= t.raft.LastIndex() && t.m.peers.progress(id).last > 0:
			t.log.Info("manager has caught up and gets its vote", weft.KeyNode, id)
			return true, wrapGroup("give vote to manager", id, t.raft.AddVoter(id, want[id], f.Index(), groupTimeout))
		default:
			busy = true
		}
	}
	return busy, errors.Join(failed...)
}

func wrapGroup(what string, id raft.ServerID, f raft.IndexFuture) error {
	if err := f.Error(); err != nil {
		return fmt.Errorf("%s %s: %w", what, id, err)
	}
	return nil
}

func sortedServers(m map[raft.ServerID]raft.ServerAddress) []raft.ServerID {
	return slices.Sorted(maps.Keys(m))
}

// voters counts the members with a vote.
func (t *term) voters() (int, error) {
	f := t.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return 0, fmt.Errorf("read raft group: %w", err)
	}
	n := 0
	for _, s := range f.Configuration().Servers {
		if s.Suffrage == raft.Voter {
			n++
		}
	}
	return n, nil
}

// leaveGroup waits until a manager whose part has been dropped is out of the
// group; runGroup takes it out.
func (t *term) leaveGroup(ctx context.Context, id weft.ID) error {
	tick := time.NewTicker(groupPoll / 10)
	defer tick.Stop()
	for {
		f := t.raft.GetConfiguration()
		if err := f.Error(); err != nil {
			return fmt.Errorf("read raft group: %w", err)
		}
		if !slices.ContainsFunc(f.Configuration().Servers, func(s raft.Server) bool { return s.ID == raft.ServerID(id) }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until manager %s is out of the raft group: %w", id, ctx.Err())
		case <-tick.C:
		}
	}
}
