package schedule

import (
	"cmp"
	"slices"
	"sort"

	"github.com/weftnet/weft"
)

// candidate is a node that may take at least one task of the group at hand.
type candidate struct {
	at    int // leaf
	count int // tasks of the service there
	tasks int // tasks of all services there
	room  int // tasks that it can take
	give  int // tasks that it gets
}

// spread places the group's due tasks by water filling: find the level up to
// which every node can be filled, fill, and share out what is left one by one.
// The result is what placing the tasks singly would give, at the price of one
// sort instead of one search per task.
func (s *scheduler) spread(g *Group, constraints weft.Constraints) {
	due := 0
	for i := range g.Tasks {
		if s.due(&g.Tasks[i]) {
			due++
		}
	}
	if due == 0 {
		return
	}
	no := s.candidates(g, constraints)
	s.fill(due)
	s.emit(g, s.refused(g, no))
}

// candidates collects the nodes that can take a task, ordered by tasks of the
// service, then tasks at all, then id, and counts the others by reason.
func (s *scheduler) candidates(g *Group, constraints weft.Constraints) refusals {
	var no refusals
	s.cands = s.cands[:0]
	added := s.added[g.Service]
	for i := range s.leaves {
		l := &s.leaves[i]
		if !s.fits(l, g, constraints, &no) {
			continue
		}
		c := candidate{at: i, count: l.byService[g.Service], tasks: l.tasks, room: l.room(g.Spec.Reservations)}
		if len(s.ports) > 0 {
			c.room = min(c.room, 1)
		}
		if added != nil {
			c.count += added[i]
		}
		s.cands = append(s.cands, c)
	}
	slices.SortFunc(s.cands, func(a, b candidate) int {
		if a.count != b.count {
			return a.count - b.count
		}
		if a.tasks != b.tasks {
			return a.tasks - b.tasks
		}
		return a.at - b.at
	})
	return no
}

// fill decides how many of n tasks each candidate gets.
func (s *scheduler) fill(n int) {
	if len(s.cands) == 0 {
		return
	}
	// The highest level that n tasks can fill completely. Full nodes may
	// leave all of them to the fullest, which bounds the search.
	low, high := s.cands[0].count, s.cands[len(s.cands)-1].count+n
	level := low + sort.Search(high-low, func(d int) bool { return s.volume(low+d+1, n) > n })
	left := n
	for i := range s.cands {
		c := &s.cands[i]
		c.give = min(c.room, max(0, level-c.count))
		left -= c.give
	}
	if left == 0 {
		return
	}
	// The next level is begun: its tasks go to the least loaded nodes that
	// stand at this level.
	top := make([]*candidate, 0, len(s.cands))
	for i := range s.cands {
		if c := &s.cands[i]; c.count+c.give == level && c.room > c.give {
			top = append(top, c)
		}
	}
	slices.SortFunc(top, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(a.tasks+a.give, b.tasks+b.give), cmp.Compare(a.at, b.at))
	})
	for _, c := range top[:min(left, len(top))] {
		c.give++
	}
}

// volume is how many tasks fill every candidate up to level, or more than n.
func (s *scheduler) volume(level, n int) int {
	v := 0
	for i := range s.cands {
		c := &s.cands[i]
		if c.count >= level { // sorted: so are all that follow
			break
		}
		if v += min(c.room, level-c.count); v > n {
			break
		}
	}
	return v
}

// refused adds the candidates that this group fills up: they are the reason
// why tasks are left over.
func (s *scheduler) refused(g *Group, no refusals) string {
	for i := range s.cands {
		c := &s.cands[i]
		switch {
		case c.give < c.room:
		case len(s.ports) > 0:
			no.inUse(&s.leaves[c.at], &s.ports[0], "a task of the service itself")
		default:
			no.resources++
		}
		s.place(g, c.at, c.give)
	}
	return no.String()
}

// emit hands the shares out level by level, so that neighbouring tasks land on
// different nodes; tasks without a share stay pending for the reason.
func (s *scheduler) emit(g *Group, reason string) {
	next := 0
	decide := func(node weft.ID, why string) bool {
		for ; next < len(g.Tasks); next++ {
			if t := &g.Tasks[next]; s.due(t) {
				s.out = append(s.out, Decision{Task: t.ID, Node: node, Reason: why})
				next++
				return true
			}
		}
		return false
	}
	active, joined := s.cands[:0:0], 0
	for level := 0; joined < len(s.cands) || len(active) > 0; level++ {
		if len(active) == 0 {
			level = s.cands[joined].count
		}
		for joined < len(s.cands) && s.cands[joined].count <= level {
			if s.cands[joined].give > 0 {
				active = append(active, s.cands[joined])
			}
			joined++
		}
		kept := active[:0]
		for _, c := range active {
			decide(s.leaves[c.at].node.ID, "")
			if c.give--; c.give > 0 {
				kept = append(kept, c)
			}
		}
		active = kept
	}
	for decide("", reason) {
	}
}
