package gossip

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// miss is a table, or a newer state of one, that must exist.
type miss struct {
	stamp  stamp   // at least; zero: any
	teller weft.ID // who knows of it
	due    time.Time
	tries  int
}

// suspect is a network in which another member has something else.
type suspect struct {
	peer weft.ID
	sum  uint64 // its hash; 0: a repair is wanted in any case
	due  time.Time
}

// repair compares networks with one member.
type repair struct {
	end     time.Time
	nets    []weft.ID
	isOfUse bool // one of the two lacked something
}

// vain paces repairs by how many have found nothing in a row, or have not been answered.
// Two that think different members alive have different hashes all the time.
type vain struct {
	count int
	until time.Time
}

// vainPause follows the first repair in vain and is doubled by each; vainShare of each
// member bounds it.
const (
	vainPause = 250 * time.Millisecond
	vainShare = 20 * time.Millisecond
)

// ended takes the end of a repair among so many members.
func (v *vain) ended(now time.Time, isOfUse bool, members int) {
	if isOfUse {
		*v = vain{}
		return
	}
	v.until = now.Add(min(vainPause<<v.count, vainShare*time.Duration(members)))
	v.count = min(v.count+1, 10)
}

const (
	// maxRepairs are under way at once.
	maxRepairs = 2
	repairFor  = 2 * time.Second
	// wantTries are made before a repair, wantAgain apart or more.
	wantTries = 3
	wantAgain = 30 * time.Millisecond
	// maxDirect parts of a table are sent as datagrams to one who wants it;
	// what is larger goes by stream.
	maxDirect = 16
)

// miss notes that a table is wanted after delay, unless it comes by itself.
func (c *core) miss(now time.Time, k key, s stamp, teller weft.ID, delay time.Duration) {
	m := c.missing[k]
	if m == nil {
		m = &miss{due: now.Add(delay)}
		c.missing[k] = m
	}
	if due := now.Add(delay); due.Before(m.due) && m.tries == 0 {
		m.due = due
	}
	if !m.stamp.newer(s) {
		m.stamp, m.teller = s, teller
	}
	if c.wantAt.IsZero() || m.due.Before(c.wantAt) {
		c.wantAt = m.due
	}
}

func (c *core) suspect(now time.Time, network, with weft.ID, sum uint64, due time.Time) {
	if s := c.suspects[network]; s != nil {
		if sum == 0 {
			s.sum = 0
		}
		return
	}
	c.suspects[network] = &suspect{peer: with, sum: sum, due: due}
}

// deadline is when advance has something to do; zero: not by itself.
func (c *core) deadline() time.Time {
	next := sooner(c.flushes.next, c.wantAt)
	for _, n := range c.nets {
		next = sooner(next, sooner(n.hot[0].at, n.hot[1].at))
	}
	for _, s := range c.suspects {
		next = sooner(next, s.due)
	}
	for _, r := range c.repairs {
		next = sooner(next, r.end)
	}
	return next
}

// sooner is the sooner of two times; zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// advance does what is due.
func (c *core) advance(now time.Time) {
	if !c.flushes.next.IsZero() && !now.Before(c.flushes.next) {
		c.flush(now)
	}
	for _, id := range slices.Sorted(maps.Keys(c.nets)) {
		c.hotDigest(now, c.nets[id])
	}
	c.wantMissing(now)
	for _, id := range slices.Sorted(maps.Keys(c.repairs)) {
		if r := c.repairs[id]; !now.Before(r.end) {
			delete(c.repairs, id)
			c.vain.ended(now, false, len(c.live))
			for _, n := range r.nets { // with another, if there is one
				if others := c.others(n); len(others) > 0 && c.nets[n] != nil {
					c.suspect(now, n, others[c.rand.IntN(len(others))], 0, later(now.Add(c.gap), c.vain.until))
				}
			}
		}
	}
	c.startRepairs(now)
}

// hotDigest sends the rounds of a network that are due.
func (c *core) hotDigest(now time.Time, n *network) {
	for i := range n.hot {
		r := &n.hot[i]
		if r.at.IsZero() || now.Before(r.at) {
			continue
		}
		c.send(&have{nets: []netStamps{{n.id, n.sum(), r.items}}}, false, tellers(c.members(n.id), c.self, i)...)
		if i == 0 {
			again := &n.hot[1]
			again.items = addItems(again.items, r.items...)
			if again.at.IsZero() {
				again.at = now.Add(hotAgain)
			}
		}
		*r = round{}
	}
}

// wanting bounds the tables that are asked for and have not come. Where all have little
// processor, what is asked for again before its answer has been read makes the answers
// later still. It grows by each that comes, and is halved when less comes than is late.
type wanting struct {
	size int
	got  int // since it was last looked at
}

// Bounds of its size; many nodes begin at once with what is between.
const (
	wantingMin   = 8
	wantingBegin = 64
	wantingMax   = 512
)

// late takes the number of tables that have not come in time, and reports whether that
// looks like more than losses.
func (w *wanting) late(n int) (isMuch bool) {
	isMuch = n >= wantingMin && w.got == 0
	if n > w.got {
		w.size = max(w.size/2, wantingMin)
	} else {
		w.size = min(w.size+w.got, wantingMax)
	}
	w.got = 0
	return isMuch
}

// missed are the keys of what is missing, in the order in which their turn comes: first the
// owners after the one that was asked last, or after this node. Else all would ask the same
// one at a time, and owners that do not answer would be asked before all others again and
// again.
func (c *core) missed() []key {
	from := cmp.Or(c.asked, c.self)
	place := func(k key) int {
		if k.owner <= from {
			return 1
		}
		return 0
	}
	return slices.SortedFunc(maps.Keys(c.missing), func(a, b key) int {
		return cmp.Or(place(a)-place(b), cmp.Compare(a.owner, b.owner), cmp.Compare(a.network, b.network))
	})
}

// wantMissing asks for what has not come: who told of it, then the owner, and at
// last by a repair.
func (c *core) wantMissing(now time.Time) {
	if c.wantAt.IsZero() || now.Before(c.wantAt) {
		return
	}
	c.wantAt = time.Time{}
	asks := map[weft.ID]map[weft.ID][]ownerStamp{}
	late, open := 0, 0
	for _, m := range c.missing {
		if m.tries > 0 {
			open++
			if !now.Before(m.due) {
				late++
			}
		}
	}
	if c.wanting.late(late) {
		c.gap = min(2*c.gap, maxGap)
	}
	for _, k := range c.missed() {
		m, p := c.missing[k], c.peers[k.owner]
		if p == nil {
			delete(c.missing, k)
			continue
		}
		if now.Before(m.due) {
			c.wantAt = sooner(c.wantAt, m.due)
			continue
		}
		if m.tries == 0 {
			if open >= c.wanting.size {
				m.due = now.Add(max(wantAgain, c.gap))
				c.wantAt = sooner(c.wantAt, m.due)
				continue
			}
			open++
			c.asked = k.owner
		}
		ask := m.teller
		if m.tries > 0 && p.live {
			ask = k.owner
		}
		if m.tries++; m.tries > wantTries {
			delete(c.missing, k)
			if q := c.peers[m.teller]; q != nil && q.live {
				c.suspect(now, k.network, m.teller, 0, later(now, c.vain.until))
			}
			continue
		}
		m.due = now.Add(max(wantAgain, c.gap))
		c.wantAt = sooner(c.wantAt, m.due)
		if f := c.flights.byKey[flightKey{k, m.stamp}]; f != nil {
			f.asked = true
		}
		if asks[ask] == nil {
			asks[ask] = map[weft.ID][]ownerStamp{}
		}
		asks[ask][k.network] = append(asks[ask][k.network], ownerStamp{k.owner, c.stampOf(k.network, k.owner)})
		c.counts.wants++
	}
	for _, id := range slices.Sorted(maps.Keys(asks)) {
		c.sendWants(id, asks[id], false)
	}
}

func (c *core) sendWants(id weft.ID, asks map[weft.ID][]ownerStamp, stream bool) {
	for _, network := range slices.Sorted(maps.Keys(asks)) {
		items := asks[network]
		slices.SortFunc(items, func(a, b ownerStamp) int { return cmp.Compare(a.owner, b.owner) })
		for part := range slices.Chunk(items, hotItems) {
			c.send(&want{[]netStamps{{network: network, items: part}}}, stream, id)
		}
	}
}

// startRepairs begins those that are due, as many as may be under way.
func (c *core) startRepairs(now time.Time) {
	for _, id := range slices.Sorted(maps.Keys(c.suspects)) {
		s := c.suspects[id]
		if s == nil || now.Before(s.due) {
			continue
		}
		n, p := c.nets[id], c.peers[s.peer]
		if n == nil || p == nil || !p.live || s.sum != 0 && n.had(s.sum) {
			delete(c.suspects, id)
			continue
		}
		if len(c.repairs) >= maxRepairs || c.repairs[s.peer] != nil {
			s.due = now.Add(c.gap)
			continue
		}
		if s.sum != 0 && now.Before(c.vain.until) {
			s.due = c.vain.until
			continue
		}
		r := &repair{end: now.Add(repairFor)}
		m := &have{full: true}
		for _, other := range slices.Sorted(maps.Keys(c.suspects)) {
			if o := c.suspects[other]; o.peer == s.peer && !now.Before(o.due) && c.nets[other] != nil {
				r.nets = append(r.nets, other)
				m.nets = append(m.nets, c.all(other))
				delete(c.suspects, other)
			}
		}
		c.repairs[s.peer] = r
		c.counts.repairs++
		c.send(m, true, s.peer)
	}
}

// isOfUse notes that a repair with a member has found something, if there is one.
func (c *core) isOfUse(with weft.ID) {
	if r := c.repairs[with]; r != nil {
		r.isOfUse = true
	}
}

// all are the stamps of all tables of a network.
func (c *core) all(id weft.ID) netStamps {
	n := c.nets[id]
	out := netStamps{network: id, hash: n.sum()}
	for owner, t := range n.tables.all() {
		out.items = append(out.items, ownerStamp{owner, t.stamp})
	}
	slices.SortFunc(out.items, func(a, b ownerStamp) int { return cmp.Compare(a.owner, b.owner) })
	return out
}

// receiveHave compares what another knows.
func (c *core) receiveHave(now time.Time, from weft.ID, m *have, stream bool) {
	for _, ns := range m.nets {
		n := c.nets[ns.network]
		for _, it := range ns.items {
			if it.owner == c.self {
				c.outdo(now, it.stamp)
			} else if n != nil && !m.full && c.isNews(ns.network, from, it) {
				c.miss(now, key{ns.network, it.owner}, it.stamp, from, c.gap-minGap)
			}
		}
		switch {
		case n == nil:
		case m.full:
			c.answer(now, from, n, ns, stream)
		case ns.hash != 0 && !n.had(ns.hash):
			c.suspect(now, ns.network, from, ns.hash, now.Add(max(graceFor, c.gap)))
		}
	}
	if m.full {
		c.send(done{}, stream, from)
	}
}

// isNews reports whether a stamp is of a table that we want: newer, and of an
// owner that is in sight, or speaks.
func (c *core) isNews(network, from weft.ID, it ownerStamp) bool {
	p := c.peers[it.owner]
	return (it.owner == from || p != nil && p.live) && it.stamp.newer(c.stampOf(network, it.owner))
}

// answer sends what the sender of a full have lacks and wants what we lack.
func (c *core) answer(now time.Time, from weft.ID, n *network, ns netStamps, stream bool) {
	theirs := make(map[weft.ID]stamp, len(ns.items))
	wants := map[weft.ID][]ownerStamp{}
	for _, it := range ns.items {
		theirs[it.owner] = it.stamp
		if it.owner != c.self && c.isNews(n.id, from, it) {
			wants[n.id] = append(wants[n.id], ownerStamp{it.owner, c.stampOf(n.id, it.owner)})
			// Should the stream break: nothing else would bring it soon.
			c.miss(now, key{n.id, it.owner}, it.stamp, from, repairFor)
		}
	}
	for _, owner := range n.tables.owners() {
		s := n.tables.get(owner).stamp
		switch {
		case owner == from && s.newer(theirs[owner]):
			wants[n.id] = append(wants[n.id], ownerStamp{owner, s}) // it must outdo its former life
		case owner != from && c.peers[owner].live && s.newer(theirs[owner]):
			c.sendTable(key{n.id, owner}, theirs[owner], stream, from)
		}
	}
	c.sendWants(from, wants, stream)
}

func (c *core) receiveWant(now time.Time, from weft.ID, m *want, stream bool) {
	c.isOfUse(from)
	for _, ns := range m.nets {
		for _, it := range ns.items {
			if it.owner == c.self {
				c.outdo(now, it.stamp)
			}
			if c.stampOf(ns.network, it.owner).newer(it.stamp) {
				c.sendTable(key{ns.network, it.owner}, it.stamp, stream, from)
			}
		}
	}
}

// sendTable sends a table to members that know it at known. The owner sends only
// what has changed if it can.
func (c *core) sendTable(k key, known stamp, stream bool, ids ...weft.ID) {
	n := c.nets[k.network]
	t := n.tables.get(k.owner)
	if t == nil {
		return
	}
	b := body{kind: bodyAttached}
	if k.network == "" {
		b.content = c.peers[k.owner].att.encode()
	} else {
		if o := c.own.nets[k.network]; k.owner == c.self && o != nil {
			b.kind, b.base, b.content = o.since(known)
		}
		if b.content == nil {
			b.kind, b.content = bodyWhole, t.kept.appendWire(nil, n.names.services)
		}
	}
	if t.proof != ([proofBytes]byte{}) {
		b.proof = t.proof[:]
	}
	m := &update{tree: noTree, network: k.network, owner: k.owner, stamp: t.stamp}
	parts := split(m, b.encode(), stream)
	stream = stream || len(parts) > maxDirect
	if stream {
		parts = split(m, b.encode(), true)
	}
	for _, p := range parts {
		c.send(p, stream, ids...)
	}
}

// since joins the steps that lead on from base.
func (o *ownNet) since(base stamp) (kind byte, from stamp, content []byte) {
	for i, s := range o.steps {
		if s.base == base {
			for _, s := range o.steps[i:] {
				content = append(content, s.b...)
			}
			return bodyDelta, base, content
		}
	}
	return bodyWhole, stamp{}, nil
}

// push sends a new own state down the trees. One of too many parts is only told
// of: members want it by stream.
func (c *core) push(now time.Time, network weft.ID, s stamp, b []byte) {
	others := c.others(network)
	if len(others) == 0 {
		return
	}
	parts := split(&update{network: network, owner: c.self, stamp: s}, b, false)
	if len(parts) > maxParts {
		c.send(&have{nets: []netStamps{{network: network, items: []ownerStamp{{c.self, s}}}}}, false, others...)
		return
	}
	for tree := range uint8(noTree) {
		to := children(c.members(network), c.self, c.self, tree)
		for _, p := range parts {
			p := *p
			p.tree = tree
			c.send(&p, false, to...)
		}
	}
}

// split cuts a body into parts that fit a datagram each, or makes one part.
func split(head *update, b []byte, whole bool) []*update {
	room := datagramBytes - frameOverhead - len(encode(nil, head)) - 4 // for greater numbers
	if whole {
		room = len(b)
	}
	var out []*update
	for part := range slices.Chunk(b, room) {
		m := *head
		m.part, m.body = uint64(len(out)), part
		out = append(out, &m)
	}
	for _, m := range out {
		m.parts = uint64(len(out))
	}
	return out
}

// digest is what another is to compare with.
func (c *core) digest(with weft.ID) cold { return cold{c.common(with), uint32(c.hashLive())} }

// common is a hash over what this node and another share. It is the same on
// both if they know the same.
func (c *core) common(with weft.ID) uint64 {
	var sum uint64
	for _, ns := range c.sums(with) {
		sum ^= mix(ns.hash ^ hashStamp(ns.network, stamp{}))
	}
	return sum
}

// sums are the hashes of the networks shared with another. The other counts
// itself alive, so it is here, too.
func (c *core) sums(with weft.ID) []netStamps {
	p := c.peers[with]
	var out []netStamps
	for id, n := range c.nets {
		if id != "" && (!c.own.said || p == nil || !p.att.has(id)) {
			continue
		}
		sum := n.hash
		if p != nil && !p.live {
			if t := n.tables.get(with); t != nil {
				sum ^= hashStamp(with, t.stamp)
			}
		}
		out = append(out, netStamps{network: id, hash: max(sum, 1)})
	}
	slices.SortFunc(out, func(a, b netStamps) int { return cmp.Compare(a.network, b.network) })
	return out
}

// hashLive is a hash over the live members, self included.
func (c *core) hashLive() uint64 {
	var sum uint64
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
	return mix(h.Sum64())
}

// mix makes all bits of the result depend on all of x, as splitmix64 does:
// FNV's upper bits are weak.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
