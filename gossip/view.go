package gossip

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/weftnet/weft"
)

// view is what readers of one kind see. The list is made by its first reader.
type view struct {
	changed chan struct{} // closed by the successor, under Gossip.mu
	parts   []part
	names   frozen

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
	table   *table
}

// next is the view after v.
func (v *view) next(parts []part, names []weft.ID) *view {
	n := &view{changed: make(chan struct{}), parts: parts, names: frozen(names), before: v}
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
	had := map[part][]weft.OwnedEndpoint{}
	if v.before != nil {
		from := v.before.list()
		for _, p := range v.before.parts {
			had[p], from = from[:p.table.count], from[p.table.count:]
		}
	}
	size := 0
	for _, p := range v.parts {
		size += int(p.table.count)
	}
	v.flat = make([]weft.OwnedEndpoint, 0, size)
	for _, p := range v.parts {
		if same, ok := had[p]; ok {
			v.flat = append(v.flat, same...)
			continue
		}
		d := &decoder{b: []byte(p.table.blob)}
		for _, e := range d.entries(p.network, v.names) {
			v.flat = append(v.flat, weft.OwnedEndpoint{Endpoint: e, Owner: p.owner.ID, VTEP: p.owner.VTEP})
		}
	}
	v.before, v.done = nil, true
	return v.flat
}

// frozen is a dictionary that others go on writing.
type frozen []weft.ID

func (frozen) appendName([]byte, weft.ID) []byte { panic("a frozen dictionary is read only") }

func (f frozen) readName(d *decoder) weft.ID {
	i := d.uvarint()
	if i >= uint64(len(f)) {
		d.fail(fmt.Errorf("service %d of %d", i, len(f)))
		return ""
	}
	return f[i]
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
				if o := c.own.nets[id]; o.view.count > 0 {
					out = append(out, part{m, id, o.view})
				}
			}
			continue
		}
		for _, id := range ids {
			if t := c.nets[id].tables[m.ID]; id != "" && t != nil && t.count > 0 {
				out = append(out, part{m, id, t})
			}
		}
	}
	return out
}
