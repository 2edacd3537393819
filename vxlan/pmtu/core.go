package pmtu

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Our own choices.
const (
	// period is the pause between two checks of a path: what has become
	// narrower without a word is noticed within it. periodPerPeer stretches
	// it, so that a node sends four checks a second at most, and answers as many.
	period        = 5 * time.Second
	periodPerPeer = 250 * time.Millisecond
	// patience is how long an answer is waited for.
	patience = 3 * time.Second
	// hints is how often a peer is told to search again: with the first
	// probes of a search that began here because a link changed.
	hints = 3
)

// core holds all paths. It is pure: what it needs of the world is passed in. The
// caller serializes.
type core struct {
	draw    func() uint64 // an id nobody can guess
	paths   map[netip.Addr]*peer
	waiting map[uint64]waiting
}

type peer struct {
	path
	hints int
	told  int // the MTU that was last reported; 0 = none
}

type waiting struct {
	peer   netip.Addr
	size   int
	search uint64
	sent   time.Time
}

// packet is one to send; probes are padded to size.
type packet struct {
	to netip.Addr
	frame
}

// change is news of a path.
type change struct {
	peer     netip.Addr
	mtu, cap int
	proven   bool
}

func newCore(draw func() uint64) *core {
	return &core{draw: draw, paths: map[netip.Addr]*peer{}, waiting: map[uint64]waiting{}}
}

// watch replaces the set of peers. A new one is searched at once.
func (c *core) watch(now time.Time, peers []netip.Addr) {
	want := make(map[netip.Addr]bool, len(peers))
	for _, a := range peers {
		a = a.Unmap()
		want[a] = true
		if c.paths[a] == nil {
			c.paths[a] = &peer{path: *newPath(a.Is4(), now)}
		}
	}
	maps.DeleteFunc(c.paths, func(a netip.Addr, _ *peer) bool { return !want[a] })
}

// limit takes what the own link and route allow towards a peer, in bytes. A
// change of what was known before is told to the peer: its way here may have
// changed with it.
func (c *core) limit(now time.Time, to netip.Addr, bytes int) {
	p := c.paths[to]
	if p == nil || bytes <= 0 {
		return
	}
	isFirst := p.cap == 0
	if p.setCap(now, bytes) && !isFirst {
		p.hints = hints
	}
}

// ask has the way to a peer searched again, because the peer says so.
func (c *core) ask(now time.Time, from netip.Addr) {
	if p := c.paths[from]; p != nil {
		p.ask(now)
	}
}

// answered takes the answer to a probe. Where it came from says nothing: a host
// with several addresses answers from any. Its id does.
func (c *core) answered(now time.Time, f frame) {
	w, ok := c.waiting[f.id]
	if !ok || w.size != f.size {
		return
	}
	delete(c.waiting, f.id)
	if p := c.paths[w.peer]; p != nil && p.search == w.search {
		p.answered(now, w.size, now.Sub(w.sent))
	}
}

// pause is the time between two checks of a path.
func (c *core) pause() time.Duration { return max(period, time.Duration(len(c.paths))*periodPerPeer) }

// step returns what is to be sent now, in the order of peers.
func (c *core) step(now time.Time) []packet {
	maps.DeleteFunc(c.waiting, func(_ uint64, w waiting) bool { return now.Sub(w.sent) > patience })
	pause := c.pause()
	var out []packet
	for _, a := range slices.SortedFunc(maps.Keys(c.paths), netip.Addr.Compare) {
		p := c.paths[a]
		sizes := p.step(now, pause)
		if len(sizes) > 0 && p.hints > 0 {
			p.hints--
			out = append(out, packet{a, frame{kind: kindAgain, id: c.draw()}})
		}
		for _, size := range sizes {
			id := c.draw()
			c.waiting[id] = waiting{peer: a, size: size, search: p.search, sent: now}
			out = append(out, packet{a, frame{kind: kindProbe, size: size, id: id}})
		}
	}
	return out
}

// refused takes the word of the own kernel that a probe is too large: it is as
// good as lost, and no answer is worth waiting for.
func (c *core) refused(id uint64) { delete(c.waiting, id) }

// news are the paths whose MTU is not what was last reported.
func (c *core) news() []change {
	var out []change
	for _, a := range slices.SortedFunc(maps.Keys(c.paths), netip.Addr.Compare) {
		p := c.paths[a]
		if p.cap == 0 || p.told == p.mtu() {
			continue
		}
		p.told = p.mtu()
		out = append(out, change{peer: a, mtu: p.told, cap: p.cap, proven: p.proven > 0})
	}
	return out
}

// mtus are those of all peers of whose path something is known.
func (c *core) mtus() map[netip.Addr]int {
	out := make(map[netip.Addr]int, len(c.paths))
	for a, p := range c.paths {
		if p.cap > 0 {
			out[a] = p.mtu()
		}
	}
	return out
}

// next is when step has something to do again; zero without peers.
func (c *core) next() time.Time {
	var at time.Time
	for _, p := range c.paths {
		if at.IsZero() || p.due.Before(at) {
			at = p.due
		}
	}
	return at
}
