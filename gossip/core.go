package gossip

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// forgetAfter is how long the table of an owner that is not alive is kept, out
// of sight, so that a false alarm or a healed partition costs no transfer.
const forgetAfter = 10 * time.Minute

// core is the protocol of the endpoint table as a state machine without I/O,
// goroutine, clock or randomness: events go in, messages come out.
//
// Of every owner there is at most one table, the newest seen, and only the
// owner sends it. What an event may change:
//
//	write (self)        counter+1, table to all live members
//	member joins        its table comes to sight; own table and a want to it
//	member fails        its table goes out of sight at once; kept forgetAfter
//	table from X        replaces X's if its stamp is newer
//	older table from X  want to X, so that it learns what is known of it
//	have, digest of X   want to X if its stamp is newer, or older
//	digest differs      vector to the sender; both sides want what they lack,
//	                    each from its owner
//	own stamp exceeded  (our clock went back) epoch above it, table to all
//
// A core is not safe for concurrent use.
type core struct {
	self  weft.ID
	own   table
	dirty bool // own changed and was not sent yet
	peers map[weft.ID]*peer
	live  []weft.ID // of peers, sorted; without self
	// changed is set when what is in sight changed; the user clears it.
	changed bool
	stale   uint64 // tables that were not newer
}

// peer is another owner.
type peer struct {
	live   bool
	hidden time.Time // since when it is not alive
	table  *table    // nil: none seen
}

func (p *peer) stamp() stamp {
	if p == nil || p.table == nil {
		return stamp{}
	}
	return p.table.stamp
}

// envelope is a message and its receivers.
type envelope struct {
	to []weft.ID
	m  message
}

func newCore(self weft.ID, epoch uint64) *core {
	return &core{self: self, own: table{stamp: stamp{epoch: epoch}}, peers: map[weft.ID]*peer{}}
}

// compareEndpoints is the order of entries in a table.
func compareEndpoints(a, b weft.Endpoint) int {
	return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Task, b.Task), a.Addr.Compare(b.Addr),
		cmp.Compare(a.Service, b.Service), cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.State, b.State))
}

// write replaces the own entries; flush sends them. Several writes between two
// flushes are sent as one.
func (c *core) write(entries []weft.Endpoint) {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, compareEndpoints)
	entries = slices.Compact(entries)
	if c.own.stamp.counter > 0 && slices.Equal(entries, c.own.entries) {
		return
	}
	c.own.entries = entries
	c.bump()
}

func (c *core) bump() {
	c.own.stamp.counter++
	c.dirty, c.changed = true, true
}

// flush returns what is to be sent because of writes.
func (c *core) flush() []envelope {
	if !c.dirty {
		return nil
	}
	c.dirty = false
	return to(c.ownTable(), c.live...)
}

func (c *core) ownTable() *table { t := c.own; return &t }

func to(m message, ids ...weft.ID) []envelope {
	if len(ids) == 0 {
		return nil
	}
	return []envelope{{to: slices.Clone(ids), m: m}}
}

func (c *core) peer(now time.Time, id weft.ID) *peer {
	p := c.peers[id]
	if p == nil {
		p = &peer{hidden: now}
		c.peers[id] = p
	}
	return p
}

// setLive takes the members alive now, self or not.
func (c *core) setLive(now time.Time, ids []weft.ID) []envelope {
	alive := map[weft.ID]bool{}
	var out []envelope
	for _, id := range ids {
		if id == c.self || alive[id] {
			continue
		}
		alive[id] = true
		if p := c.peer(now, id); !p.live {
			p.live, c.changed = true, true
			out = append(out, to(want{p.stamp()}, id)...)
			if c.own.stamp.counter > 0 {
				out = append(out, to(c.ownTable(), id)...)
			}
		}
	}
	c.live = c.live[:0]
	for id, p := range c.peers {
		if p.live && !alive[id] {
			p.live, p.hidden, c.changed = false, now, true
		}
		if p.live {
			c.live = append(c.live, id)
		}
	}
	slices.Sort(c.live)
	return out
}

// receive takes a message of from.
func (c *core) receive(now time.Time, from weft.ID, m message) []envelope {
	if from == c.self {
		return nil // an echo, or another node with our name: serf reports that
	}
	switch m := m.(type) {
	case *table:
		p := c.peer(now, from)
		if !m.stamp.newer(p.stamp()) {
			c.stale++
			return c.hear(from, m.stamp)
		}
		p.table = m
		c.changed = c.changed || p.live
	case have:
		return c.hear(from, m.stamp)
	case want:
		c.outdo(m.stamp)
		if c.own.stamp.counter > 0 && c.own.stamp != m.stamp {
			return to(c.ownTable(), from)
		}
	case digest:
		out := c.hear(from, m.stamp)
		if m.tables != c.hashTables(from) {
			out = append(out, to(c.vector(from, true), from)...)
		}
		return out
	case *vector:
		return c.compare(from, m)
	}
	return nil
}

// hear takes the stamp that an owner says its table has. It asks for a table
// we have not seen; and an owner that is behind what we know of it learns by
// the stamp in the want that it must outdo a former life.
func (c *core) hear(owner weft.ID, s stamp) []envelope {
	known := c.peers[owner].stamp()
	if (s.counter > 0 && s.newer(known)) || known.newer(s) {
		return to(want{known}, owner)
	}
	return nil
}

// wantIfNewer takes a stamp that another node knows of owner, and asks owner
// for its table if that is news. Only live owners are asked: others cannot
// answer, and nobody looks at their tables.
func (c *core) wantIfNewer(owner weft.ID, s stamp) []envelope {
	if p := c.peers[owner]; p != nil && p.live && s.newer(p.stamp()) {
		return to(want{p.stamp()}, owner)
	}
	return nil
}

// lifeBits are the lower bits of an epoch, drawn at random at each start: two
// lives of an owner with the same clock or boot count do not make equal stamps
// of different tables.
const lifeBits = 16

func makeEpoch(clock, life uint64) uint64 { return clock<<lifeBits | life&(1<<lifeBits-1) }

// outdo makes the own stamp newer than s, a stamp of ours that others hold from
// an earlier life, with a clock that has gone back since. Before the first
// write only the epoch is raised: nothing is claimed yet.
func (c *core) outdo(s stamp) {
	if s.epoch < c.own.stamp.epoch || !s.newer(c.own.stamp) {
		return
	}
	c.own.stamp.epoch = makeEpoch(s.epoch>>lifeBits+1, c.own.stamp.epoch)
	if c.own.stamp.counter > 0 {
		c.bump()
	}
}

func (c *core) vector(receiver weft.ID, reply bool) *vector {
	v := &vector{reply: reply}
	if c.own.stamp.counter > 0 {
		v.items = append(v.items, vectorItem{c.self, c.own.stamp})
	}
	for id, p := range c.peers {
		if (p.live || id == receiver) && p.table != nil {
			v.items = append(v.items, vectorItem{id, p.stamp()})
		}
	}
	slices.SortFunc(v.items, func(a, b vectorItem) int { return cmp.Compare(a.owner, b.owner) })
	return v
}

// compare wants what the sender of v has newer, gives it the own table if that
// is newer, and answers with an own vector if it lacks something else.
func (c *core) compare(from weft.ID, v *vector) []envelope {
	var out []envelope
	theirs := make(map[weft.ID]stamp, len(v.items))
	for _, it := range v.items {
		theirs[it.owner] = it.stamp
		if it.owner == c.self {
			c.outdo(it.stamp)
		} else {
			out = append(out, c.wantIfNewer(it.owner, it.stamp)...)
		}
	}
	if c.own.stamp.counter > 0 && c.own.stamp.newer(theirs[c.self]) {
		out = append(out, to(c.ownTable(), from)...)
	}
	if !v.reply {
		return out
	}
	for _, id := range c.live {
		if c.peers[id].stamp().newer(theirs[id]) {
			return append(out, to(c.vector(from, false), from)...)
		}
	}
	return out
}

// announce tells all live members the own stamp: the cheap second chance for
// members that missed the table itself.
func (c *core) announce() []envelope {
	if c.own.stamp.counter == 0 {
		return nil
	}
	return to(have{c.own.stamp}, c.live...)
}

// tick is called about once a second: a digest to one random live member.
func (c *core) tick(now time.Time, r *rand.Rand) []envelope {
	for id, p := range c.peers {
		if !p.live && now.Sub(p.hidden) >= forgetAfter {
			delete(c.peers, id)
		}
	}
	if len(c.live) == 0 {
		return nil
	}
	id := c.live[r.IntN(len(c.live))]
	return to(digest{stamp: c.own.stamp, tables: c.hashTables(id), live: c.hashLive()}, id)
}

// hashTables is a hash over the stamps of all owners in sight, the same on two
// nodes that know the same. with is the node to compare with: it counts itself,
// so it counts here even while it is not thought alive.
func (c *core) hashTables(with weft.ID) uint64 {
	var sum uint64
	if c.own.stamp.counter > 0 {
		sum ^= hashStamp(c.self, c.own.stamp)
	}
	for id, p := range c.peers {
		if (p.live || id == with) && p.table != nil {
			sum ^= hashStamp(id, p.stamp())
		}
	}
	return sum
}

// hashLive is a hash over the live members, self included.
func (c *core) hashLive() uint64 {
	sum := hashStamp(c.self, stamp{})
	for _, id := range c.live {
		sum ^= hashStamp(id, stamp{})
	}
	return sum
}

func hashStamp(id weft.ID, s stamp) uint64 {
	h := fnv.New64a()
	h.Write([]byte(id))
	var b [17]byte // the zero after the id ends it
	binary.BigEndian.PutUint64(b[1:], s.epoch)
	binary.BigEndian.PutUint64(b[9:], s.counter)
	h.Write(b[:])
	x := h.Sum64() // FNV's upper bits are weak; finish as splitmix64 does
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
