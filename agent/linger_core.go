package agent

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// lingerCore decides whose endpoints are kept, without I/O, goroutine or clock.
// An owner's way:
//
//	         in the table ◄──────────────┐ its entries are the table's; while gossip
//	  ┌───────────┤                      │ doubts that it lives, its host is asked
//	  │ not alive │ alive, no entries    │ back in the table
//	  ▼           ▼                      │
//	asked     forgotten (it runs nothing)│  (forgotten at once if it is silent by then)
//	  ├── host answers: kept, asked again after lingerAgain
//	  └── silence, or lingerBound is over: forgotten
//
// An owner that the last run of the daemon knew begins as "asked"; alive
// without entries it is kept for lingerSettle.
type lingerCore struct {
	self   weft.ID
	owners map[weft.ID]*lingerOwner
}

type lingerOwner struct {
	addr    netip.Addr
	entries []weft.OwnedEndpoint // of the table; never written once set
	// gone is since when the owner is not alive; zero while it is.
	gone time.Time
	// isDoubted: it is in the table, and gossip may give it up soon. isSilent:
	// its host did not answer then.
	isDoubted, isSilent bool
	// ask is when its host is asked next; meaningless while asking.
	ask    time.Time
	asking bool
	// turn counts returns, so that an answer to an old question is known.
	turn uint64
	// restored: known from the last run, not yet seen in the table.
	restored bool
	// settling is since when a restored owner is alive without entries.
	settling time.Time
}

// lingerQuestion asks whether a host is there.
type lingerQuestion struct {
	id   weft.ID
	addr netip.Addr
	turn uint64
}

type lingerAnswer struct {
	lingerQuestion
	host hostState
}

func newLingerCore(self weft.ID) *lingerCore {
	return &lingerCore{self: self, owners: map[weft.ID]*lingerOwner{}}
}

// restore takes what the last run knew. Entries that make no sense are left out.
func (c *lingerCore) restore(now time.Time, owners []storedOwner) {
	for _, o := range owners {
		if o.Node == c.self || o.validate() != nil {
			continue
		}
		c.owners[o.Node] = &lingerOwner{addr: o.Addr, entries: o.Endpoints, gone: now, ask: now, restored: true}
	}
}

// see takes the table and the live members, read at one moment, and forgets who
// was kept for long enough; it returns the owners that have gone since the last
// time, those included whose host was silent already.
func (c *lingerCore) see(now time.Time, endpoints []weft.OwnedEndpoint, members []gossip.Member) []weft.ID {
	present := map[weft.ID]bool{}
	alive := map[weft.ID]gossip.Member{}
	lives := map[netip.Addr]bool{}
	for _, m := range members {
		alive[m.ID] = m
		lives[m.Addr] = true
	}
	for rest := endpoints; len(rest) > 0; {
		id := rest[0].Owner
		n := slices.IndexFunc(rest, func(e weft.OwnedEndpoint) bool { return e.Owner != id })
		if n < 0 {
			n = len(rest)
		}
		if id != c.self {
			present[id] = true
			c.present(now, id, alive[id], rest[:n])
		}
		rest = rest[n:]
	}
	var gone []weft.ID
	for id, o := range c.owners {
		if present[id] {
			continue
		}
		_, live := alive[id]
		end := o.end()
		// Another member at its address: the host has left and come again
		// as a new node, without its former containers.
		if !end.IsZero() && !end.After(now) || !live && lives[o.addr] {
			delete(c.owners, id)
			continue
		}
		if !live && o.gone.IsZero() && o.isSilent {
			delete(c.owners, id) // it was asked while gossip doubted
			gone = append(gone, id)
			continue
		}
		if live {
			c.silent(now, id, o)
			continue
		}
		o.settling = time.Time{}
		if o.gone.IsZero() {
			o.gone = now
			if !o.isDoubted { // else it has been asked, or is being asked
				o.ask = now
			}
			o.isDoubted = false
			gone = append(gone, id)
		}
	}
	slices.Sort(gone)
	return gone
}

// present: the owner is in the table with entries.
func (c *lingerCore) present(now time.Time, id weft.ID, m gossip.Member, entries []weft.OwnedEndpoint) {
	o := c.owners[id]
	if o == nil {
		o = &lingerOwner{}
		c.owners[id] = o
	}
	if !o.gone.IsZero() || o.isDoubted && !m.Doubted {
		o.gone, o.asking, o.isDoubted, o.isSilent = time.Time{}, false, false, false
		o.turn++
	}
	if m.Doubted && !o.isDoubted {
		o.isDoubted, o.ask = true, now
	}
	o.entries, o.restored, o.settling = entries, false, time.Time{}
	switch {
	case m.Addr.IsValid():
		o.addr = m.Addr
	case !o.addr.IsValid():
		o.addr = entries[0].VTEP
	}
}

// silent: the owner is alive and has no entries.
func (c *lingerCore) silent(now time.Time, id weft.ID, o *lingerOwner) {
	if !o.restored {
		delete(c.owners, id)
		return
	}
	if o.settling.IsZero() {
		o.settling, o.gone, o.asking = now, time.Time{}, false
		o.turn++
	}
}

// due returns the questions of now; each is answered by answer.
func (c *lingerCore) due(now time.Time) []lingerQuestion {
	var out []lingerQuestion
	for id, o := range c.owners {
		if o.isAsked() && !o.asking && !o.ask.After(now) {
			o.asking = true
			out = append(out, lingerQuestion{id, o.addr, o.turn})
		}
	}
	slices.SortFunc(out, func(a, b lingerQuestion) int { return cmp.Compare(a.id, b.id) })
	return out
}

// isAsked: its host is asked from time to time.
func (o *lingerOwner) isAsked() bool { return !o.gone.IsZero() || o.isDoubted }

// end is when the owner is forgotten if nothing happens; zero = never.
func (o *lingerOwner) end() time.Time {
	switch {
	case !o.gone.IsZero():
		return o.gone.Add(lingerBound)
	case !o.settling.IsZero():
		return o.settling.Add(lingerSettle)
	}
	return time.Time{}
}

// answer takes the answer to a question.
func (c *lingerCore) answer(now time.Time, a lingerAnswer) {
	o := c.owners[a.id]
	if o == nil || o.turn != a.turn || !o.asking {
		return
	}
	o.asking = false
	switch {
	case a.host == hostUnsure:
		o.ask = now
	case a.host == hostThere:
		o.isSilent, o.ask = false, now.Add(lingerAgain)
	case o.gone.IsZero(): // gossip may hear of it yet
		o.isSilent, o.ask = true, now.Add(lingerRetry)
	default:
		delete(c.owners, a.id)
	}
}

// next is when see or due has something to do; zero = not by itself.
func (c *lingerCore) next() time.Time {
	var next time.Time
	sooner := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, o := range c.owners {
		sooner(o.end())
		if o.isAsked() && !o.asking {
			sooner(o.ask)
		}
	}
	return next
}

// merged is the table with the kept endpoints, ordered by owner.
func (c *lingerCore) merged(endpoints []weft.OwnedEndpoint) []weft.OwnedEndpoint {
	kept := 0
	out := endpoints
	for _, o := range c.owners {
		if o.kept() {
			if kept == 0 {
				out = slices.Clone(endpoints)
			}
			kept++
			out = append(out, o.entries...)
		}
	}
	if kept > 0 {
		slices.SortStableFunc(out, func(a, b weft.OwnedEndpoint) int { return cmp.Compare(a.Owner, b.Owner) })
	}
	return out
}

// kept: the entries are not the table's.
func (o *lingerOwner) kept() bool { return !o.gone.IsZero() || !o.settling.IsZero() }

// stored is what the next run is to know.
func (c *lingerCore) stored() []storedOwner {
	out := make([]storedOwner, 0, len(c.owners))
	for id, o := range c.owners {
		out = append(out, storedOwner{Node: id, Addr: o.addr, Endpoints: o.entries})
	}
	slices.SortFunc(out, func(a, b storedOwner) int { return cmp.Compare(a.Node, b.Node) })
	return out
}
