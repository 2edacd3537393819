package dispatch

import (
	"maps"
	"math"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// progress is how far a session has told its node.
type progress struct {
	// sent is the index of the newest assignments under way or sent.
	sent uint64
	// upTo is the newest index at which there was nothing to add to them.
	upTo uint64
	// networks of the set that was sent last.
	networks map[weft.ID]weft.Network
}

// nothingSent cannot be carried out.
func nothingSent() progress { return progress{sent: math.MaxUint64} }

// concerns reports whether addresses of a network that the node has begin to
// rest, or one of the networks went.
func (p *progress) concerns(c *state.Changed) bool {
	for id := range p.networks {
		_, rests := c.Resting[id]
		_, changed := c.Networks[id]
		if rests || changed {
			return true
		}
	}
	return false
}

// reported is what a node last said that it has carried out.
type reported struct {
	applied uint64
	behind  []weft.ID
}

// Progress is what one node has carried out of what it was told.
type Progress struct {
	index    uint64
	current  bool // all that was sent is carried out
	networks map[weft.ID]weft.Network
	behind   []weft.ID
}

// Has reports whether the node's data plane holds nothing of a network that is
// older than the state at an index. A node that is told nothing of the network,
// and has carried that out, holds nothing of it at all.
func (p Progress) Has(network weft.ID, index uint64) bool {
	if slices.Contains(p.behind, network) {
		return false
	}
	_, on := p.networks[network]
	return p.index >= index || p.current && !on
}

// Progress is the progress of every node that has a session. A node without one
// may hold anything.
func (d *Dispatcher) Progress() map[weft.ID]Progress {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make(map[weft.ID]Progress, len(d.sessions))
	for s := range d.sessions {
		r := d.reported[s.node]
		p := Progress{index: r.applied, networks: s.progress.networks, behind: r.behind}
		if r.applied >= s.progress.sent {
			p.index, p.current = max(r.applied, s.progress.upTo), true
		}
		out[s.node] = p
	}
	return out
}

// advance notes, before they are sent, that newer assignments are under way.
func (d *Dispatcher) advance(s *session, p progress) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.progress = p
}

// upToDate notes that there is nothing to add at a newer state.
func (d *Dispatcher) upToDate(s *session, at *shared) {
	d.mu.Lock()
	s.progress.upTo = max(s.progress.upTo, at.index)
	d.mu.Unlock()
	if at.rests {
		d.cfg.Confirmed()
	}
}

// carriedOut takes in a report.
func (d *Dispatcher) carriedOut(node weft.ID, applied uint64, behind []weft.ID) {
	d.mu.Lock()
	old := d.reported[node]
	changed := old.applied != applied || !slices.Equal(old.behind, behind)
	d.reported[node] = reported{applied, behind}
	d.mu.Unlock()
	if changed {
		d.cfg.Confirmed()
	}
}

// tookUp notes what keys of gossip a node has.
func (d *Dispatcher) tookUp(node weft.ID, e weft.GossipEpochs) {
	d.mu.Lock()
	old, ok := d.gossip[node]
	d.gossip[node] = e
	d.mu.Unlock()
	if !ok || old != e {
		d.cfg.Confirmed()
	}
}

// untold forgets what keys a node had: it tells anew in the session that it opens,
// and may be of another version now.
func (d *Dispatcher) untold(node weft.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.gossip, node)
}

// Gossip are the keys of gossip that nodes have told in their sessions of this
// term. A node that is missing may have any, or be of a version that cannot change
// them.
func (d *Dispatcher) Gossip() map[weft.ID]weft.GossipEpochs {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.gossip)
}
