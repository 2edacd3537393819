package orchestrator

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// Our own choices.
const (
	// gossipKeyLife is how long members send by one key. What one that leaked
	// opens ends with it: frames of a later key cannot be read by it.
	gossipKeyLife = 12 * time.Hour
	// gossipSettle is how long a key is still read by after the last node has
	// said that it sends by the next: longer than any frame or exchange of
	// members is under way.
	gossipSettle = 10 * time.Second
)

// gossipStep is the next state of the keys of gossip, as far as it is due:
//
//	one key ──── gossipKeyLife ────▶ the next is read by, too
//	   ▲                                      │ all read by it
//	   │  all have sent by it                 ▼
//	   └──── for gossipSettle ──── it is sent by, the last is read by, too
//
// So whatever a node sends, all others can read. All is every node that is not
// down: one that is away gets the ring with its next session, and nobody waits for
// it.
type gossipStep struct {
	nodes []weft.Node
	// told is what nodes have said in this term. One that says nothing may be of
	// a version that cannot change keys, and holds everything up.
	told map[weft.ID]weft.GossipEpochs
	// settled is when all were first seen to send by the newest key; zero if they
	// do not.
	settled time.Time
	now     time.Time
	draw    func() []byte // a new key
}

// next changes c if a step is due. Where none is, again is when to look again,
// zero for after the next report.
func (s gossipStep) next(c *weft.Cluster) (changed bool, again time.Time) {
	switch ring := c.GossipRing(); {
	case len(ring.Reads) == 0:
		began := c.GossipEpochAt
		if began.IsZero() {
			began = c.Meta.CreatedAt
		}
		if due := began.Add(gossipKeyLife); s.now.Before(due) {
			return false, due
		}
		return s.begin(c) == nil, time.Time{}
	case ring.Epochs().Reads > ring.Sends.Epoch:
		if s.behind(func(e weft.GossipEpochs) bool { return e.Reads >= ring.Epochs().Reads }) != nil {
			return false, time.Time{}
		}
		newest := slices.IndexFunc(ring.Reads, func(k weft.GossipKey) bool { return k.Epoch == ring.Epochs().Reads })
		c.GossipEpoch, c.GossipKey = ring.Reads[newest].Epoch, ring.Reads[newest].Key
		c.GossipReads = []weft.GossipKey{ring.Sends}
	default:
		if s.settled.IsZero() {
			return false, time.Time{}
		}
		if due := s.settled.Add(gossipSettle); s.now.Before(due) {
			return false, due
		}
		c.GossipReads = nil
	}
	c.GossipEpochAt = s.now.UTC().Round(0)
	return true, time.Time{}
}

// begin adds a new key to a ring of one. It fails while a node does not tell what
// keys it has.
func (s gossipStep) begin(c *weft.Cluster) error {
	if n := s.behind(func(weft.GossipEpochs) bool { return true }); n != nil {
		return fmt.Errorf("node %s has not told which keys of gossip it has, or is of a version that cannot change them: %w", nodeName(*n), weft.ErrConflict)
	}
	c.GossipReads = []weft.GossipKey{{Epoch: c.GossipEpoch + 1, Key: s.draw()}}
	c.GossipEpochAt = s.now.UTC().Round(0)
	return nil
}

// behind is the first node that is not down and has not told what has wants.
func (s gossipStep) behind(has func(weft.GossipEpochs) bool) *weft.Node {
	for i, n := range s.nodes {
		e, ok := s.told[n.ID]
		if n.Status.State != weft.NodeDown && (!ok || !has(e)) {
			return &s.nodes[i]
		}
	}
	return nil
}

func drawGossipKey() []byte {
	b := make([]byte, weft.GossipKeyBytes)
	rand.Read(b) // never fails (crypto/rand)
	return b
}

// gossipStep is the step of a moment, but for settled.
func (t *term) gossipStep(v *state.Snapshot, now time.Time) gossipStep {
	return gossipStep{nodes: v.Nodes(), told: t.dispatch.Gossip(), now: now, draw: drawGossipKey}
}

// rotateGossip takes the step that is due, if any, and returns when to look again.
func (t *term) rotateGossip(ctx context.Context, v *state.Snapshot, now time.Time) (time.Time, error) {
	c, ok := v.Cluster()
	if !ok {
		return time.Time{}, nil
	}
	s := t.gossipStep(v, now)
	switch newest := c.GossipRing().Epochs().Reads; {
	case s.behind(func(e weft.GossipEpochs) bool { return e.Sends >= newest }) != nil:
		t.gossipSettled = time.Time{}
	case t.gossipSettled.IsZero():
		t.gossipSettled = now
	}
	s.settled = t.gossipSettled
	changed, again := s.next(&c)
	if !changed {
		return again, nil
	}
	if err := t.prop.one(ctx, []state.Change{{Cluster: &c}}); err != nil {
		return time.Time{}, fmt.Errorf("rotate the keys of gossip: %w", err)
	}
	e := c.GossipRing().Epochs()
	t.log.Info("keys of gossip are changed", "reads", e.Reads, "sends", e.Sends, "keys", len(c.GossipRing().Keys()))
	return time.Time{}, nil
}
