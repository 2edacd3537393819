package gossip

import (
	"hash/maphash"
	"iter"
	"slices"

	"github.com/weftnet/weft"
)

// tables are those of a network, by owner. A map would take four times the memory, which
// counts where many owners have few entries each. The zero one is not ready for use.
type tables struct {
	seed   maphash.Seed
	places []*table // by a hash of the owner, or at the next free place behind; a power of two
	count  int
}

func newTables() tables { return tables{seed: maphash.MakeSeed(), places: make([]*table, 4)} }

func (ts *tables) len() int { return ts.count }

// place is where an owner's table is, or would be.
func (ts *tables) place(owner weft.ID) int {
	at := ts.home(owner)
	for ts.places[at] != nil && ts.places[at].owner.id != owner {
		at = (at + 1) & (len(ts.places) - 1)
	}
	return at
}

func (ts *tables) home(owner weft.ID) int {
	return int(maphash.String(ts.seed, string(owner))) & (len(ts.places) - 1)
}

// get returns nil if there is none.
func (ts *tables) get(owner weft.ID) *table { return ts.places[ts.place(owner)] }

// set puts a table in place of its owner's former one.
func (ts *tables) set(t *table) {
	if 4*(ts.count+1) > 3*len(ts.places) {
		old := ts.places
		ts.places = make([]*table, 2*len(old))
		for _, t := range old {
			if t != nil {
				ts.places[ts.place(t.owner.id)] = t
			}
		}
	}
	at := ts.place(t.owner.id)
	if ts.places[at] == nil {
		ts.count++
	}
	ts.places[at] = t
}

func (ts *tables) remove(owner weft.ID) {
	at := ts.place(owner)
	if ts.places[at] == nil {
		return
	}
	ts.count--
	// What stands behind and would be looked for from here on moves up.
	mask := len(ts.places) - 1
	for next := (at + 1) & mask; ts.places[next] != nil; next = (next + 1) & mask {
		if home := ts.home(ts.places[next].owner.id); (next-home)&mask >= (next-at)&mask {
			ts.places[at], at = ts.places[next], next
		}
	}
	ts.places[at] = nil
}

// all are the tables in no order; they may be replaced meanwhile.
func (ts *tables) all() iter.Seq2[weft.ID, *table] {
	return func(yield func(weft.ID, *table) bool) {
		for _, t := range ts.places {
			if t != nil && !yield(t.owner.id, t) {
				return
			}
		}
	}
}

// owners are those that have one, in order.
func (ts *tables) owners() []weft.ID {
	out := make([]weft.ID, 0, ts.count)
	for owner := range ts.all() {
		out = append(out, owner)
	}
	slices.Sort(out)
	return out
}
