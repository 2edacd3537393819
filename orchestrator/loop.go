package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// retryGap is the pause after a pass of which something was refused: the state
// had moved on under it, so the next one sees more.
const retryGap = 50 * time.Millisecond

// runLoop turns changes and time into passes, at most one per Timing.Reconcile.
func (t *term) runLoop(ctx context.Context) error {
	sub := t.store.Subscribe()
	defer sub.Close()
	k, r := newTracker(), &rests{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sub.C():
		case <-t.confirmed:
		case <-timer.C:
		}
		next, err := t.round(ctx, sub, k, r)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, weft.ErrUnavailable) {
				return err // the term is over, or its log is stuck
			}
			t.log.Warn("leader's pass was refused in part, looks again", weft.KeyErr, err)
			next = earlier(next, time.Now().Add(retryGap))
		}
		// Changes that the pass itself made have left a token in sub.
		gap := time.NewTimer(t.m.cfg.Timing.Reconcile)
		select {
		case <-ctx.Done():
			gap.Stop()
			return nil
		case <-gap.C:
		}
		timer.Stop()
		if !next.IsZero() {
			timer.Reset(time.Until(next))
		}
	}
}

// lookAgain wakes the loop: nodes may have dropped what rests, or told of other
// keys of gossip.
func (t *term) lookAgain() {
	select {
	case t.confirmed <- struct{}{}:
	default: // a token is there already
	}
}

// round is one pass over everything that changed or is due. It returns when to
// look again without a change.
func (t *term) round(ctx context.Context, sub *state.Subscription, k *tracker, r *rests) (time.Time, error) {
	c := sub.Take()
	v := t.store.View()
	now := time.Now()
	k.update(&c, v, func(task weft.ID) { t.alloc.release(v, task) })
	for id := range c.Services {
		// The addresses of one that stays are settled by the call that edits it.
		if _, ok := v.Service(id); !ok {
			t.alloc.release(v, id)
		}
	}
	for id := range c.Nodes {
		if _, ok := v.Node(id); !ok {
			t.alloc.release(v, id)
		}
	}
	if c.All || len(c.Networks) > 0 {
		t.alloc.follow(v)
	}
	if t.alloc.rest(v, c.Resting) {
		k.place = true // a task may have waited for an address
	}
	again, err := t.checkNodes(ctx, v, now)
	if err != nil {
		return again, err
	}
	look, err := t.releaseRested(ctx, v, r, now)
	if err != nil {
		return earlier(again, look), err
	}
	rotate, err := t.rotateKeys(ctx, v, now)
	if err != nil {
		return earlier(again, look), err
	}
	again = earlier(again, earlier(look, rotate))
	if rotate, err = t.rotateGossip(ctx, v, now); err != nil {
		return again, err
	}
	again = earlier(again, rotate)
	p := &pass{term: t, view: v, k: k, now: now, changes: map[weft.ID][]state.Change{}, full: map[weft.ID]error{}}
	k.due(now)
	err = p.run(ctx)
	if err == nil {
		err = p.commit(ctx)
	}
	if p.settled != nil {
		p.settled()
	}
	return earlier(again, k.due(now)), err
}

// checkNodes marks silent nodes down. The change comes back through the feed
// and makes the pass that replaces their tasks.
func (t *term) checkNodes(ctx context.Context, v *state.Snapshot, now time.Time) (time.Time, error) {
	c, ok := v.Cluster()
	if !ok {
		return time.Time{}, fmt.Errorf("cluster object %w", weft.ErrNotFound)
	}
	down, again := t.live.silent(v.Nodes(), c.Spec.NodeDownAfter, now)
	if !again.IsZero() {
		again = earlier(again, now.Add(c.Spec.NodeDownAfter/looksPerLimit))
	}
	if len(down) == 0 {
		return again, nil
	}
	changes := make([]state.Change, len(down))
	isDown := weft.NodeDown
	for i, id := range down {
		why := "heartbeat failure"
		if n, ok := v.Node(id); ok && n.Status.State == weft.NodeUnknown {
			why = "never connected"
		}
		t.log.Warn("node is silent and taken for down", weft.KeyNode, id, "reason", why)
		changes[i] = state.Change{NodeStatus: &state.NodeStatus{Node: id, State: &isDown, Message: why}}
	}
	if err := t.prop.one(ctx, changes); err != nil {
		return again, fmt.Errorf("mark %d silent nodes down: %w", len(down), err)
	}
	return again, nil
}
