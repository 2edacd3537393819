package reconcile

import (
	"cmp"
	"slices"

	"github.com/weftnet/weft"
)

// scaleReplicated brings the number of slots to Replicas.
func (p *plan) scaleReplicated() {
	var have []*slot
	for _, s := range p.slots {
		if len(s.tasks) > 0 {
			have = append(have, s)
		}
	}
	want := p.spec.Replicas
	if n := uint64(len(have)); n > want {
		p.scaleDown(have, n-want)
	} else {
		missing := want - n
		for number := uint64(1); missing > 0; number++ {
			if k := (key{slot: number}); p.slots[k] == nil {
				p.slot(k)
				missing--
			}
		}
	}
	for k, s := range p.slots {
		if s.removing && len(s.tasks) == 0 {
			delete(p.slots, k) // the number is free once the task has ended
		}
	}
}

// scaleDown removes n slots: those without a running task, then one by one
// from the node with most tasks of the service; among equals the highest
// number goes.
func (p *plan) scaleDown(have []*slot, n uint64) {
	slices.SortFunc(have, func(a, b *slot) int { return cmp.Compare(a.key.slot, b.key.slot) })
	// A slot's rank is how many running ones of its node stand before it.
	// Taking the highest ranks first levels the nodes.
	type ranked struct {
		*slot
		running bool
		rank    int
	}
	onNode := make(map[weft.ID]int)
	list := make([]ranked, 0, len(have))
	for _, s := range have {
		r := ranked{slot: s}
		for _, t := range s.tasks {
			if live(t) && t.Status.State == weft.TaskRunning && !p.lost(t) {
				r.running, r.rank = true, onNode[t.Node]
				onNode[t.Node]++
				break
			}
		}
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b ranked) int {
		if a.running != b.running {
			if b.running {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.rank, a.rank), cmp.Compare(b.key.slot, a.key.slot))
	})
	for _, r := range list[:n] {
		for _, t := range r.tasks {
			p.remove(t)
		}
		delete(p.slots, r.key)
	}
}

// scaleGlobal makes a place on every node that may have a new task, and closes
// the places on all others. What runs on a paused or silent node is left
// alone; settle stops what must go.
func (p *plan) scaleGlobal() {
	constraints, err := weft.ParseConstraints(p.spec.Constraints)
	p.constraints = constraints
	for id, n := range p.nodes {
		if err == nil && n.Status.State == weft.NodeReady && n.Spec.Availability == weft.AvailabilityActive && constraints.Match(n) {
			p.slot(key{node: id})
		}
	}
	for k, s := range p.slots {
		n := p.nodes[k.node]
		if n == nil {
			for _, t := range s.tasks {
				p.remove(t)
			}
			delete(p.slots, k)
			continue
		}
		s.unwanted = err != nil || n.Status.State != weft.NodeReady ||
			n.Spec.Availability != weft.AvailabilityActive || !constraints.Match(n)
	}
}

// misplaced reports whether a live task must leave its node.
func (p *plan) misplaced(t *weft.Task) bool {
	if p.drained(t) {
		return true
	}
	if p.spec.Mode == weft.ModeGlobal {
		// A silent node's task is nobody else's business: when the node
		// comes back it may still run.
		n := p.nodes[t.Node]
		return n == nil || !p.constraints.Match(n)
	}
	return p.lost(t)
}

// settle finds the live task of a place and stops what should not run there.
func (p *plan) settle(s *slot) {
	var current, old []*weft.Task
	for _, t := range slices.Clone(s.tasks) {
		switch {
		case !live(t):
		case p.misplaced(t):
			p.stop(s, t)
		case p.isOutdated(t.SpecVersion):
			old = append(old, t)
		default:
			current = append(current, t)
		}
	}
	s.current = p.keepBest(s, current)
	if s.current != nil && (!p.policy.StartFirst || s.current.Status.State == weft.TaskRunning) {
		for _, t := range old {
			p.stop(s, t)
		}
		old = nil
	}
	s.old = p.keepBest(s, old)
	if s.live() != nil {
		return
	}
	s.stopping = s.removing
	for _, t := range s.tasks {
		if !p.over(t) && !p.lost(t) && !p.drained(t) {
			s.stopping = true
		}
	}
}

// keepBest keeps the task that is furthest, the older of two equals, and stops
// the others.
func (p *plan) keepBest(s *slot, tasks []*weft.Task) *weft.Task {
	if len(tasks) == 0 {
		return nil
	}
	best := tasks[0] // newest first
	for _, t := range tasks[1:] {
		if t.Status.State >= best.Status.State {
			best = t
		}
	}
	for _, t := range tasks {
		if t != best {
			p.stop(s, t)
		}
	}
	return best
}
