package gossip

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/weftnet/weft"
)

// view is what readers of one kind see. The list is made by its first reader.
type view struct {
	changed chan struct{}        // closed by the successor, under Gossip.mu
	parts   []part               // by owner and network
	names   map[weft.ID]services // by network, as they were

	// mu guards: before, flat, done.
	mu     sync.Mutex
	before *view // the last one that was read: what is the same is taken from it
	flat   []weft.OwnedEndpoint
	done   bool
}

// part is one table in a view.
type part struct {
	owner   Member
	network weft.ID
	table   *table   // nil: the entries are this node's own
	own     *ownView // nil: they are another's
}

func (p part) count() int {
	if p.own != nil {
		return len(p.own.entries)
	}
	return int(p.table.count)
}

// less is the order of a view's parts.
func (p part) less(q part) bool {
	return cmp.Or(cmp.Compare(p.owner.ID, q.owner.ID), cmp.Compare(p.network, q.network)) < 0
}

// entries are those of a part; names are its network's services.
func (p part) entries(names services) []weft.Endpoint {
	if p.own != nil {
		return p.own.entries
	}
	return p.table.kept.entries(p.network, p.count(), names)
}

// next is the view after v.
func (v *view) next(parts []part, names map[weft.ID]services) *view {
	n := &view{changed: make(chan struct{}), parts: parts, names: names, before: v}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.done {
		n.before = v.before
	}
	return n
}

// list returns the endpoints; it must not be written.
func (v *view) list() []weft.OwnedEndpoint {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.done {
		return v.flat
	}
	var had []part // what of them is not passed yet, and their entries
	var from []weft.OwnedEndpoint
	if v.before != nil {
		had, from = v.before.parts, v.before.list()
	}
	size := 0
	for _, p := range v.parts {
		size += p.count()
	}
	v.flat = make([]weft.OwnedEndpoint, 0, size)
	for _, p := range v.parts {
		for len(had) > 0 && had[0].less(p) {
			had, from = had[1:], from[had[0].count():]
		}
		if len(had) > 0 && had[0] == p {
			v.flat = append(v.flat, from[:p.count()]...)
			continue
		}
		for _, e := range p.entries(v.names[p.network]) {
			v.flat = append(v.flat, weft.OwnedEndpoint{Endpoint: e, Owner: p.owner.ID, VTEP: p.owner.VTEP})
		}
	}
	v.before, v.names, v.done = nil, nil, true
	return v.flat
}

// names are the services of all networks, as they are now.
func (c *core) names() map[weft.ID]services {
	out := make(map[weft.ID]services, len(c.nets))
	for id, n := range c.nets {
		out[id] = n.names.frozen()
	}
	return out
}

// sight are the tables that readers see, by owner and network.
func (c *core) sight(members []Member) []part {
	ids := slices.Sorted(maps.Keys(c.nets))
	var out []part
	for _, m := range members {
		m.Doubted = false
		if p := c.peers[m.ID]; p == nil || !p.live || !p.shown {
			continue
		}
		if m.ID == c.self { // also what is not flushed yet
			for _, id := range slices.Sorted(maps.Keys(c.own.nets)) {
				if o := c.own.nets[id]; len(o.entries) > 0 {
					out = append(out, part{owner: m, network: id, own: o.view})
				}
			}
			continue
		}
		for _, id := range ids {
			if t := c.nets[id].tables.get(m.ID); id != "" && t != nil && t.count > 0 {
				out = append(out, part{owner: m, network: id, table: t})
			}
		}
	}
	return out
}
