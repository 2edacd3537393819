// Package schedule chooses nodes for pending tasks.
//
// It is pure: a snapshot and the time go in, decisions come out. It owns
// eligibility, constraints, capacity and spreading; it does not create tasks
// (reconcile) and stores nothing. The leader's loop runs it and proposes what
// it decides. Safe for concurrent use: nothing given to it is written.
package schedule

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft"
)

// Input is a snapshot.
type Input struct {
	Now    time.Time
	Nodes  []NodeInfo
	Groups []Group
}

// NodeInfo is a node and what it carries already: tasks assigned to it that
// have not ended.
type NodeInfo struct {
	Node      weft.Node
	Tasks     int             // of all services
	ByService map[weft.ID]int // of each
	Reserved  weft.Resources  // sum of the reservations of those tasks
	// Ports in mode host that tasks of the node have until they have ended.
	// What its host has for itself is in Node.
	Ports []weft.HeldPort
}

// Group is pending tasks that share one spec version.
type Group struct {
	Spec    *weft.ServiceSpec
	Service weft.ID
	Tasks   []weft.Task // of a global service with Node set: only checked
	// Networks of the service: a node that uses part of one's range for
	// something else cannot run its tasks.
	Networks []weft.Network
}

// Decision places a task, or says why it stays pending.
type Decision struct {
	Task   weft.ID
	Node   weft.ID // "" = stays pending
	Reason string  // why, for the task's status; "" when placed
}

// Schedule decides about every task whose NotBefore has come; tasks held back
// longer get no decision. Groups are served in their order, tasks in theirs.
//
// Each task goes to the node with the fewest tasks of its service, among those
// to the one with the fewest tasks at all, among those to the lowest id: equal
// input, equal decisions. Only nodes that are ready and active, satisfy the
// constraints and have the reserved CPU and memory and the ports in mode host left
// are considered; decisions of earlier groups count. Ports in mode host that are to
// be chosen are the caller's to choose.
func Schedule(in Input) []Decision {
	s := newScheduler(in)
	for i := range in.Groups {
		s.group(&in.Groups[i])
	}
	return s.out
}

// leaf is the working state of one node. Leaves are sorted by node id, so an
// index orders as the id does.
type leaf struct {
	node      *weft.Node
	byService map[weft.ID]int
	usable    bool
	tasks     int
	free      weft.Resources
	held      []weft.HeldPort // of the input, not written
	taken     []weft.HeldPort // by decisions
}

type scheduler struct {
	now    time.Time
	leaves []leaf
	index  map[weft.ID]int // node id to leaf; built when a global service needs it
	// added counts, per service with more than one group, what earlier
	// groups put on each leaf.
	added map[weft.ID][]int
	cands []candidate
	ports []weft.PortSpec // in mode host, of the group at hand
	out   []Decision
}

func newScheduler(in Input) *scheduler {
	s := &scheduler{now: in.Now, leaves: make([]leaf, 0, len(in.Nodes)), added: make(map[weft.ID][]int)}
	for i := range in.Nodes {
		n := &in.Nodes[i]
		d := &n.Node.Description
		s.leaves = append(s.leaves, leaf{
			node:      &n.Node,
			byService: n.ByService,
			usable:    n.Node.Spec.Availability == weft.AvailabilityActive && n.Node.Status.State == weft.NodeReady,
			tasks:     n.Tasks,
			held:      n.Ports,
			free: weft.Resources{
				NanoCPUs:    d.NanoCPUs - n.Reserved.NanoCPUs,
				MemoryBytes: d.MemoryBytes - n.Reserved.MemoryBytes,
			},
		})
	}
	slices.SortFunc(s.leaves, func(a, b leaf) int { return strings.Compare(string(a.node.ID), string(b.node.ID)) })
	total, groups := 0, make(map[weft.ID]int)
	for i := range in.Groups {
		total += len(in.Groups[i].Tasks)
		groups[in.Groups[i].Service]++
	}
	for id, n := range groups {
		if n > 1 {
			s.added[id] = make([]int, len(s.leaves))
		}
	}
	s.out = make([]Decision, 0, total)
	return s
}

func (s *scheduler) group(g *Group) {
	constraints, err := weft.ParseConstraints(g.Spec.Constraints)
	s.ports = fixedPorts(g.Spec)
	if err != nil { // validation lets none through; an old log might
		for i := range g.Tasks {
			if s.due(&g.Tasks[i]) {
				s.out = append(s.out, Decision{Task: g.Tasks[i].ID, Reason: err.Error()})
			}
		}
		return
	}
	if g.Spec.Mode == weft.ModeGlobal {
		s.check(g, constraints)
		return
	}
	s.spread(g, constraints)
}

func (s *scheduler) due(t *weft.Task) bool { return !t.NotBefore.After(s.now) }

// check confirms the nodes that global tasks came with.
func (s *scheduler) check(g *Group, constraints weft.Constraints) {
	if s.index == nil {
		s.index = make(map[weft.ID]int, len(s.leaves))
		for i := range s.leaves {
			s.index[s.leaves[i].node.ID] = i
		}
	}
	for i := range g.Tasks {
		t := &g.Tasks[i]
		if !s.due(t) {
			continue
		}
		var no refusals
		at, ok := s.index[t.Node]
		switch {
		case !ok:
			no.unavailable = 1
		case !s.fits(&s.leaves[at], g, constraints, &no):
		default:
			s.place(g, at, 1)
			s.out = append(s.out, Decision{Task: t.ID, Node: t.Node})
			continue
		}
		s.out = append(s.out, Decision{Task: t.ID, Reason: no.String()})
	}
}

// place books n tasks of the group on a leaf.
func (s *scheduler) place(g *Group, at, n int) {
	l := &s.leaves[at]
	l.tasks += n
	l.free.NanoCPUs -= int64(n) * g.Spec.Reservations.NanoCPUs
	l.free.MemoryBytes -= int64(n) * g.Spec.Reservations.MemoryBytes
	if added := s.added[g.Service]; added != nil {
		added[at] += n
	}
	if n > 0 {
		s.takePorts(l, g)
	}
}

// fits says whether one task may go on the leaf now, and counts why not.
func (s *scheduler) fits(l *leaf, g *Group, constraints weft.Constraints, no *refusals) bool {
	switch {
	case !l.usable:
		no.unavailable++
	case !constraints.Match(l.node):
		no.constraints++
	case l.room(g.Spec.Reservations) == 0:
		no.resources++
	case l.conflicts(g.Networks, no):
	case !s.portsFree(l, no):
	default:
		return true
	}
	return false
}

// conflicts reports whether the host uses part of a network's range, and notes it.
func (l *leaf) conflicts(networks []weft.Network, no *refusals) bool {
	for i := range networks {
		n := &networks[i]
		if used, ok := l.node.Conflict(n); ok {
			no.conflicts++
			if no.conflict == "" {
				no.conflict = fmt.Sprintf("network %s (%s) overlaps %s in use on node %s", n.Spec.Name, n.Spec.Subnets[0].Prefix, used, l.name())
			}
			return true
		}
	}
	return false
}

// unlimited is room for more tasks than there can be.
const unlimited = int(^uint(0) >> 2)

// room is how many tasks with reservation r the leaf can take.
func (l *leaf) room(r weft.Resources) int {
	n := unlimited
	if r.NanoCPUs > 0 {
		n = min(n, int(max(l.free.NanoCPUs, 0)/r.NanoCPUs))
	}
	if r.MemoryBytes > 0 {
		n = min(n, int(max(l.free.MemoryBytes, 0)/r.MemoryBytes))
	}
	return n
}

// refusals counts nodes by the first reason that rules them out.
type refusals struct {
	unavailable, constraints, resources, conflicts, ports int

	conflict string // the first of them
	port     string // likewise, of ports
}

// String is Docker's sentence: the commonest reason first.
func (r refusals) String() string {
	type reason struct {
		n    int
		text string
	}
	nodes := func(n int) string {
		if n == 1 {
			return "1 node"
		}
		return fmt.Sprintf("%d nodes", n)
	}
	list := []reason{
		{r.constraints, "scheduling constraints not satisfied on " + nodes(r.constraints)},
		{r.resources, "insufficient resources on " + nodes(r.resources)},
		{r.conflicts, likewise(r.conflict, r.conflicts)},
		{r.ports, likewise(r.port, r.ports)},
		{r.unavailable, nodes(r.unavailable) + " not available for new tasks"},
	}
	slices.SortStableFunc(list, func(a, b reason) int { return b.n - a.n })
	var parts []string
	for _, e := range list {
		if e.n > 0 {
			parts = append(parts, e.text)
		}
	}
	if len(parts) == 0 {
		return "no suitable node"
	}
	return "no suitable node (" + strings.Join(parts, "; ") + ")"
}

// likewise is the first of n reasons of one kind.
func likewise(first string, n int) string {
	if n > 1 {
		return fmt.Sprintf("%s, and likewise on %d more", first, n-1)
	}
	return first
}
