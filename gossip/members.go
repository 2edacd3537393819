package gossip

import (
	"bytes"
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// stampOf is the stamp of the known state of a table.
func (c *core) stampOf(network, owner weft.ID) stamp {
	if n := c.nets[network]; n != nil {
		if t := n.tables.get(owner); t != nil {
			return t.stamp
		}
	}
	return stamp{}
}

// members are those that a network's tables go to, in order.
func (c *core) members(id weft.ID) []weft.ID {
	if id == "" {
		return c.live
	}
	n := c.nets[id]
	if n == nil {
		return nil
	}
	if n.members == nil {
		for _, m := range c.live {
			if m == c.self || c.peers[m].att.has(id) {
				n.members = append(n.members, m)
			}
		}
	}
	return n.members
}

func (c *core) others(id weft.ID) []weft.ID {
	return slices.DeleteFunc(slices.Clone(c.members(id)), func(m weft.ID) bool { return m == c.self })
}

func (c *core) forgetMembers() {
	for _, n := range c.nets {
		n.members = nil
	}
}

func (c *core) peer(now time.Time, id weft.ID) *peer {
	p := c.peers[id]
	if p == nil {
		p = &peer{id: id, since: now}
		c.peers[id] = p
	}
	return p
}

// setLive takes the members alive now, self or not.
func (c *core) setLive(now time.Time, ids []weft.ID) {
	live := slices.Clone(ids)
	if !slices.Contains(live, c.self) {
		live = append(live, c.self)
	}
	slices.Sort(live)
	live = slices.Compact(live)
	var came []weft.ID
	for _, id := range live {
		if p := c.peer(now, id); !p.live {
			c.turn(now, p, true)
			came = append(came, id)
		}
	}
	for _, id := range c.live {
		if _, stays := slices.BinarySearch(live, id); !stays {
			c.turn(now, c.peers[id], false)
			delete(c.repairs, id)
		}
	}
	c.live = live
	c.forgetMembers()
	c.greet(now, came)
	c.advance(now)
}

// turn brings an owner in or out of sight.
func (c *core) turn(now time.Time, p *peer, live bool) {
	p.live, p.since, c.changed = live, now, true
	for _, n := range c.nets {
		if t := n.tables.get(p.id); t != nil {
			n.hash ^= hashStamp(p.id, t.stamp)
			n.note()
		}
	}
}

// greet tells new members what this node has, and sees to it that they tell.
func (c *core) greet(now time.Time, ids []weft.ID) {
	slices.Sort(ids)
	if c.stampOf("", c.self) != (stamp{}) {
		c.sendTable(key{"", c.self}, stamp{}, false, ids...)
		var nets []netStamps
		for _, id := range c.peers[c.self].att.nets {
			if s := c.stampOf(id, c.self); s != (stamp{}) {
				nets = append(nets, netStamps{network: id, items: []ownerStamp{{c.self, s}}})
			}
		}
		for part := range slices.Chunk(nets, hotItems/2) {
			c.send(&have{nets: part}, false, ids...)
		}
	}
	for _, id := range ids {
		c.expect(now, c.peers[id])
	}
}

// expect notes what an owner must have and we lack.
func (c *core) expect(now time.Time, p *peer) {
	if p.id == c.self || !p.live {
		return
	}
	if c.stampOf("", p.id) == (stamp{}) {
		c.miss(now, key{"", p.id}, stamp{}, p.id, graceFor)
	}
	for _, id := range p.att.nets {
		if n := c.nets[id]; n != nil && n.tables.get(p.id) == nil {
			c.miss(now, key{id, p.id}, stamp{}, p.id, graceFor)
		}
	}
}

// lifeBits are the lower bits of an epoch, drawn at random at each start: two
// lives of an owner with the same clock or boot count do not make equal stamps
// of different tables.
const lifeBits = 16

func makeEpoch(clock, life uint64) uint64 { return clock<<lifeBits | life&(1<<lifeBits-1) }

// outdo makes own stamps newer than s, a stamp of ours that others hold from an
// earlier life, with a clock that has gone back since. Before the first write
// only the epoch is raised: nothing is claimed yet.
func (c *core) outdo(now time.Time, s stamp) {
	if !s.newer(c.last) {
		return
	}
	c.last = stamp{epoch: makeEpoch(s.epoch>>lifeBits+1, c.last.epoch)}
	if c.own.said {
		c.flushes.next = now // the epoch of what is told differs: all is made anew
	}
}

// tick is called about once a second: a digest to one random live member.
func (c *core) tick(now time.Time) {
	for id, p := range c.peers {
		if !p.live && now.Sub(p.since) >= forgetAfter {
			for _, n := range c.nets {
				n.tables.remove(id)
			}
			delete(c.peers, id)
		}
		if p.live && !p.shown {
			c.show(now, p)
		}
		c.expect(now, p)
	}
	c.flights.sweep(now)
	c.waiting.sweep(now)
	c.tidyNames()
	if c.own.said && !bytes.Equal(c.prove.Certificate(), c.peers[c.self].att.cert) {
		c.flushSoon(now) // it was renewed
	}
	for _, id := range slices.Sorted(maps.Keys(c.nets)) { // others do not compare what they do not know us to have
		if others := c.others(id); !c.own.said && id != "" && len(others) > 0 {
			c.suspect(now, id, others[c.rand.IntN(len(others))], 0, now)
		}
	}
	if others := c.others(""); len(others) > 0 {
		id := others[c.rand.IntN(len(others))]
		c.send(c.digest(id), false, id)
	}
	c.advance(now)
}

// spareNames are let be in each network.
const spareNames = 128

// tidyNames drops services that no table names any more.
func (c *core) tidyNames() {
	for _, n := range c.nets {
		used := 0
		for _, t := range n.tables.all() {
			used += int(t.count)
		}
		if len(n.names.ids) < 2*used+spareNames {
			continue
		}
		names := newDictionary()
		for _, owner := range n.tables.owners() {
			t := *n.tables.get(owner)
			t.kept, _ = c.keep.keep(&decoder{b: t.kept.appendWire(nil, n.names.services)}, n.id, names)
			n.tables.set(&t)
		}
		n.names = names
		c.changed = true
	}
}
