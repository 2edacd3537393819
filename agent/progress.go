package agent

import (
	"slices"

	"github.com/weftnet/weft"
)

// goal is what one pass of the data plane is about.
type goal struct {
	gen     uint64 // newest change that is in it
	index   uint64 // of the leader's state
	confirm bool   // the leader waits for word
	// vnis are the networks of the pass; gone the removed ones among them, on
	// which local tasks are still.
	vnis map[uint32]weft.ID
	gone []weft.ID
}

// carriedOut is how far the data plane is, in the leader's terms.
type carriedOut struct {
	index  uint64
	behind []weft.ID // networks for which that is not so, sorted
}

func (c carriedOut) equal(o carriedOut) bool {
	return c.index == o.index && slices.Equal(c.behind, o.behind)
}

// advance takes in how a pass went. A failure that names no network, or one that
// the pass was not about (it is being taken away), leaves everything in doubt:
// nothing more is carried out than before. It reports whether that is otherwise.
func (c *carriedOut) advance(to goal, f failure) bool {
	if f.rest != nil {
		return false
	}
	behind := slices.Clone(to.gone)
	for vni := range f.networks {
		id, ok := to.vnis[vni]
		if !ok {
			return false
		}
		behind = append(behind, id)
	}
	slices.Sort(behind)
	c.index, c.behind = to.index, slices.Compact(behind)
	return true
}

// carried is how far the data plane is by now.
func (p *plane) carried() carriedOut {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.done
}

// living leaves out the endpoints of tasks that have ended by the leader's word:
// gossip may not have heard yet, and their addresses may have new holders. What
// neither the leader nor the table mentions any more is forgotten. p.mu is held.
func (p *plane) living(endpoints []weft.OwnedEndpoint) []weft.OwnedEndpoint {
	if len(p.past.ended) == 0 {
		return endpoints
	}
	out := make([]weft.OwnedEndpoint, 0, len(endpoints))
	listed := map[weft.ID]bool{}
	for _, e := range endpoints {
		if p.past.ended[e.Task] {
			listed[e.Task] = true
			continue
		}
		out = append(out, e)
	}
	for id := range p.past.ended {
		if !listed[id] && !p.model.Ended[id] && !hasKey(p.local, id) {
			delete(p.past.ended, id)
		}
	}
	return out
}
