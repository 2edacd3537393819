package orchestrator

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/dispatch"
	"github.com/weftnet/weft/orchestrator/state"
)

const (
	// restBound is how long a freed address, subnet or VNI rests at most: a
	// node that has not dropped it by then keeps nobody waiting. Nodes forget
	// peers that they have lost within the same time.
	restBound = 60 * time.Second
	// releaseGap is the shortest time between two looks at what rests: what is
	// confirmed within it becomes one command. A redeployment of 10,000 tasks
	// then adds at most 20 entries a second to the log.
	releaseGap = 50 * time.Millisecond
)

// rests decides when freed addresses have rested. It belongs to the goroutine
// of the leader's loop.
//
// Time is counted from when this term has seen the address freed: the clocks of
// two leaders need not agree, and a rest that is too long does no harm.
type rests struct {
	seen   map[restKey]time.Time
	looked time.Time
}

// restKey is what was freed by one entry on one network. Index 0 stands for the
// numbers of a removed network.
type restKey struct {
	network weft.ID
	index   uint64
}

// plan returns what has rested by now: of which every live node that has the
// network has confirmed that it is dropped, or for which the bound is over. It
// also returns when to look again if nothing is confirmed before.
func (r *rests) plan(v *state.Snapshot, progress map[weft.ID]dispatch.Progress, now time.Time) (state.Release, time.Time) {
	l := lookout{nodes: v.Nodes(), progress: progress, now: now, seen: map[restKey]time.Time{}, known: r.seen, dropped: map[restKey]bool{}}
	var out state.Release
	for _, a := range v.AllResting() {
		if !l.rested(a) {
			continue
		}
		last := len(out.Addrs) - 1
		if last < 0 || out.Addrs[last].Network != a.Network {
			out.Addrs = append(out.Addrs, state.Rested{Network: a.Network, Index: v.Index()})
			last++
		}
		out.Addrs[last].Addrs = append(out.Addrs[last].Addrs, a.Addr)
	}
	for _, n := range v.RestingNetworks() {
		if l.over(restKey{n.ID, 0}, restBound) || l.confirmed(n.ID, n.Index, true) {
			out.Networks = append(out.Networks, n.ID)
		}
	}
	r.seen = l.seen
	return out, l.again
}

// lookout is one look at what rests.
type lookout struct {
	nodes       []weft.Node
	progress    map[weft.ID]dispatch.Progress
	now         time.Time
	known, seen map[restKey]time.Time
	dropped     map[restKey]bool // what confirmed has answered
	again       time.Time
}

// rested reports whether an address may be given out: not before the names that
// led to it have expired, wherever they are remembered.
func (l *lookout) rested(a state.RestingAddr) bool {
	k, names := restKey{a.Network, a.Index}, weft.ServiceNameTTL
	if a.Task {
		names = weft.TaskNameTTL
	}
	if l.over(k, restBound) {
		return true
	}
	dropped, asked := l.dropped[k]
	if !asked {
		dropped = l.confirmed(a.Network, a.Index, false)
		l.dropped[k] = dropped
	}
	return dropped && l.over(k, names)
}

// over reports whether what k stands for has rested for d.
func (l *lookout) over(k restKey, d time.Duration) bool {
	since, ok := l.known[k]
	if !ok {
		since = l.now
	}
	l.seen[k] = since
	end := since.Add(d)
	if !end.After(l.now) {
		return true
	}
	l.again = earlier(l.again, end)
	return false
}

// confirmed reports whether all live nodes have dropped what a network had at an
// index. A node that is down confirms nothing: an address does not wait for it,
// because its stale entries lead nowhere (weft.EndpointMAC), but the numbers of
// a network do, because there are plenty.
func (l *lookout) confirmed(network weft.ID, index uint64, whole bool) bool {
	for i := range l.nodes {
		n := &l.nodes[i]
		if n.Status.State != weft.NodeReady {
			if whole && n.Status.State == weft.NodeDown && n.Status.Message != state.Departed {
				return false
			}
			continue
		}
		if p, ok := l.progress[n.ID]; !ok || !p.Has(network, index) {
			return false
		}
	}
	return true
}

// releaseRested proposes what has rested, and returns when to look again.
func (t *term) releaseRested(ctx context.Context, v *state.Snapshot, r *rests, now time.Time) (time.Time, error) {
	if next := r.looked.Add(releaseGap); now.Before(next) {
		return next, nil
	}
	r.looked = now
	release, again := r.plan(v, t.dispatch.Progress(), now)
	if len(release.Addrs)+len(release.Networks) == 0 {
		return again, nil
	}
	if err := t.prop.one(ctx, []state.Change{{Release: &release}}); err != nil {
		return earlier(again, now.Add(retryGap)), fmt.Errorf("release addresses that have rested: %w", err)
	}
	return again, nil
}

// occupancy of a subnet: how many addresses there are to have, how many are held and
// how many rest.
type occupancy struct {
	subnet              netip.Prefix
	size, held, resting int
}

// usage is that of the subnet with the fewest addresses left: who takes an
// address takes one of each family.
func (s *space) usage() occupancy {
	var out occupancy
	for _, sub := range s.net.Spec.Subnets {
		addrs := s.addrs.of(sub.Prefix.Addr())
		if addrs == nil {
			continue
		}
		used, size := addrs.Usage()
		u := occupancy{subnet: sub.Prefix, size: int(size), held: int(used)}
		for a := range s.resting {
			if sub.Prefix.Contains(a) {
				u.resting++
				u.held--
			}
		}
		if !out.subnet.IsValid() || u.free() < out.free() {
			out = u
		}
	}
	return out
}

func (u occupancy) free() int { return u.size - u.held - u.resting }

// fullError says that a network has no address to give. Its text is the same
// for as long as that is so: it becomes the status of the tasks that wait. What
// a caller should know besides is added by explainFull.
type fullError struct {
	net   weft.Network
	usage occupancy
}

func (e *fullError) Error() string {
	if e.usage.resting > 0 {
		return fmt.Sprintf("network %s: subnet %s has no free address now; freed ones rest until every node has dropped them, at most %s: %v",
			e.net.Spec.Name, e.usage.subnet, restBound, weft.ErrUnavailable)
	}
	return fmt.Sprintf("network %s: subnet %s is full: all %d addresses are in use; scale down, or use a network with a larger subnet: %v",
		e.net.Spec.Name, e.usage.subnet, e.usage.size, weft.ErrUnavailable)
}

func (e *fullError) Unwrap() error { return weft.ErrUnavailable }

// holdersListed bounds how many holders an error names.
const holdersListed = 5

// holders says who has the addresses of a network, most first.
func (a *allocator) holders(v *state.Snapshot, network weft.ID) string {
	count := map[string]int{}
	a.mu.Lock()
	for owner, list := range a.held {
		for _, h := range list {
			if h.Network == network {
				count[ownerName(v, owner)]++
			}
		}
	}
	a.mu.Unlock()
	names := slices.SortedFunc(maps.Keys(count), func(x, y string) int {
		return cmp.Or(cmp.Compare(count[y], count[x]), cmp.Compare(x, y))
	})
	if len(names) == 0 {
		return "none"
	}
	out := ""
	for i, n := range names {
		if i == holdersListed {
			return out + fmt.Sprintf(" and %d more", len(names)-i)
		}
		if i > 0 {
			out += ", "
		}
		out += fmt.Sprintf("%s %d", n, count[n])
	}
	return out
}

func ownerName(v *state.Snapshot, owner weft.ID) string {
	service := owner
	if t, ok := v.Task(owner); ok {
		service = t.Service
	}
	if s, ok := v.Service(service); ok {
		return "service " + s.Spec.Name
	}
	if _, ok := v.Node(owner); ok {
		return "nodes"
	}
	return "tasks of removed services"
}

// explainFull is the error of a network that cannot give what is asked, for the
// caller who asked: used, free and holders.
func (t *term) explainFull(v *state.Snapshot, n weft.Network, asked string) error {
	u := t.alloc.usage(n)
	rest := ""
	if u.resting > 0 {
		rest = fmt.Sprintf(" (these come back when every node has dropped them, within %s)", restBound)
	}
	return fmt.Errorf("network %s: subnet %s has no room for %s: of %d addresses %d are in use, %d rest%s, %d are free; holders: %s; scale down, or use a network with a larger subnet: %w",
		n.Spec.Name, u.subnet, asked, u.size, u.held, u.resting, rest, u.free(), t.alloc.holders(v, n.ID), weft.ErrUnavailable)
}
