package state

import (
	"sync"

	"github.com/weftnet/weft"
)

// Changed says what may differ since it was last taken. It holds ids, not
// objects: a reader looks the objects up in a Snapshot. Sets only grow until
// they are taken, so their size is bounded by the number of objects.
type Changed struct {
	// All is set after a restore and on a new subscription: look at everything.
	All      bool
	Cluster  bool
	Services map[weft.ID]struct{}
	Networks map[weft.ID]struct{}
	// Nodes are those of which more than the listeners changed.
	Nodes map[weft.ID]struct{}
	Tasks map[weft.ID]struct{}
	// TaskNodes are the nodes that changed tasks are or were assigned to.
	TaskNodes map[weft.ID]struct{}
	// Resting are the networks of which an address, or whose numbers, began
	// or ended to rest.
	Resting map[weft.ID]struct{}
}

func newChanged() Changed {
	return Changed{
		Services: map[weft.ID]struct{}{}, Networks: map[weft.ID]struct{}{}, Nodes: map[weft.ID]struct{}{},
		Tasks: map[weft.ID]struct{}{}, TaskNodes: map[weft.ID]struct{}{}, Resting: map[weft.ID]struct{}{},
	}
}

// Empty reports whether nothing changed.
func (c *Changed) Empty() bool {
	return !c.All && !c.Cluster && len(c.Services)+len(c.Networks)+len(c.Nodes)+len(c.Tasks)+len(c.TaskNodes)+len(c.Resting) == 0
}

func (c *Changed) merge(o *Changed) {
	c.All = c.All || o.All
	c.Cluster = c.Cluster || o.Cluster
	for _, p := range []struct{ to, from map[weft.ID]struct{} }{
		{c.Services, o.Services}, {c.Networks, o.Networks}, {c.Nodes, o.Nodes}, {c.Tasks, o.Tasks}, {c.TaskNodes, o.TaskNodes}, {c.Resting, o.Resting},
	} {
		for id := range p.from {
			p.to[id] = struct{}{}
		}
	}
}

// Subscription collects changes for one reader, which must Close it.
type Subscription struct {
	store *Store
	// c holds at most one token: "Take has something". It is never closed.
	c chan struct{}

	// mu guards: pending.
	mu      sync.Mutex
	pending Changed
}

// C has a token when Take has something to say.
func (s *Subscription) C() <-chan struct{} { return s.c }

// Take returns what changed since the last Take, and starts anew. Objects must
// be looked up in a Snapshot taken after it.
func (s *Subscription) Take() Changed {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.pending
	s.pending = newChanged()
	return c
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	delete(s.store.subs, s)
}

func (s *Subscription) add(c *Changed) {
	s.mu.Lock()
	s.pending.merge(c)
	s.mu.Unlock()
	select {
	case s.c <- struct{}{}:
	default: // a token is there already
	}
}
