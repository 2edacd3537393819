package gossip

import (
	"bytes"
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// receive takes a message of from; stream says that it came by one, and so will
// the answer.
func (c *core) receive(now time.Time, from weft.ID, m message, stream bool) {
	if from == c.self {
		return // an echo, or another node with our name: serf reports that
	}
	switch m := m.(type) {
	case *update:
		c.receiveUpdate(now, from, m)
	case *have:
		c.receiveHave(now, from, m, stream)
	case *want:
		c.receiveWant(now, from, m, stream)
	case cold:
		if m.tables != c.common(from) {
			c.send(&have{nets: c.sums(from)}, false, from)
		}
	case done:
		if r := c.repairs[from]; r != nil {
			c.vain.ended(now, r.isOfUse, len(c.live))
		}
		delete(c.repairs, from)
	}
	c.advance(now)
}

// receiveUpdate passes a part on, and uses the state when all parts are there.
func (c *core) receiveUpdate(now time.Time, from weft.ID, m *update) {
	if m.owner == c.self {
		c.outdo(now, m.stamp)
		return
	}
	n := c.nets[m.network]
	if n == nil {
		return // we have left it, or the sender is wrong
	}
	known := c.stampOf(m.network, m.owner)
	if known.newer(m.stamp) {
		c.counts.stale++
		if from == m.owner { // it does not know of its former life
			c.send(&want{[]netStamps{{network: m.network, items: []ownerStamp{{m.owner, known}}}}}, false, from)
		}
		return
	}
	f := c.flights.of(now, m)
	if f == nil {
		c.counts.refused++
		return
	}
	if m.tree < noTree && f.passOn(m) {
		c.send(m, false, children(c.members(m.network), m.owner, c.self, m.tree)...)
	}
	if known == m.stamp {
		c.counts.stale++
		if m.tree == noTree && f.asked && (f.came || f.again) {
			// What was asked for came by itself, or was asked for twice and came twice:
			// packets are later than thought.
			f.asked = false
			c.gap = min(2*c.gap, maxGap)
		}
		return
	}
	b := c.flights.collect(f, m)
	if b == nil {
		return
	}
	whole := *m
	whole.part, whole.parts, whole.body = 0, 1, b
	c.isOfUse(from)
	lacked := c.missing[key{m.network, m.owner}]
	if c.use(now, from, n, &whole) {
		f.came = m.tree < noTree
		if lacked != nil {
			f.asked, f.again = f.asked || lacked.tries > 0, lacked.tries > 1
		}
		if f.asked && !f.came {
			c.gap = max(c.gap*7/8, minGap)
			c.wanting.got++
		}
		c.useWaiting(now, n, m.owner)
	}
}

// use takes a complete new state and reports whether it was stored.
func (c *core) use(now time.Time, from weft.ID, n *network, m *update) bool {
	b, err := openBody(m.body)
	if err != nil || (b.kind == bodyAttached) != (m.network == "") {
		c.counts.malformed++
		return false
	}
	p, k := c.peers[m.owner], key{m.network, m.owner}
	switch {
	case b.kind == bodyAttached:
		if p == nil {
			p = &peer{id: m.owner, since: now}
		}
		return c.useAttachment(now, n, p, m.stamp, b)
	case p == nil:
		c.counts.refused++
		return false
	case p.check == nil: // its certificate is on the way
		c.waiting.hold(now, k, m)
		c.miss(now, key{"", m.owner}, stamp{}, from, c.gap)
		return false
	case c.leftBefore(p, m.network, m.stamp):
		c.counts.stale++
		return false
	}
	old := n.tables.get(m.owner)
	if b.kind == bodyDelta && (old == nil || old.stamp != b.base) {
		c.wait(now, k, m, b.base)
		return false
	}
	t, content, ok := c.unpack(n, old, b)
	if !ok {
		c.counts.malformed++
		return false
	}
	if !p.check(digestOf(m.owner, m.network, m.stamp, content), b.proof) {
		// A renewed certificate may be on the way, or it is a forgery.
		c.counts.refused++
		c.miss(now, k, stamp{}, m.owner, c.gap)
		return false
	}
	t.owner, t.stamp = p, m.stamp
	copy(t.proof[:], b.proof)
	c.put(now, n, p, t)
	return true
}

// unpack returns the entries of a new state as they are kept, and as they are on the
// wire.
func (c *core) unpack(n *network, old *table, b body) (t *table, content []byte, ok bool) {
	content = b.content
	if b.kind == bodyDelta {
		d := &decoder{b: b.content}
		entries := n.entriesOf(old)
		for d.err == nil && len(d.b) > 0 {
			entries = d.step(n.id).apply(entries)
		}
		if d.end() != nil {
			return nil, nil, false
		}
		content = appendEntries(nil, entries)
	}
	d := &decoder{b: content}
	kept, count := c.keep.keep(d, n.id, n.names)
	return &table{kept: kept, count: int32(count)}, content, d.end() == nil
}

// leftBefore reports whether an owner's table is older than the owner's word
// that it is not attached to the network.
func (c *core) leftBefore(p *peer, network weft.ID, s stamp) bool {
	return !p.att.has(network) && c.stampOf("", p.id).newer(s)
}

func (c *core) useAttachment(now time.Time, n *network, p *peer, s stamp, b body) bool {
	att, err := openAttachment(slices.Clone(b.content))
	if err != nil {
		c.counts.malformed++
		return false
	}
	check := p.check
	if check == nil || !bytes.Equal(att.cert, p.att.cert) {
		if check, err = c.prove.Trust(p.id, att.cert); err != nil {
			c.counts.refused++
			return false
		}
	}
	if !check(digestOf(p.id, "", s, b.content), b.proof) {
		c.counts.refused++
		return false
	}
	t := &table{owner: p, stamp: s}
	copy(t.proof[:], b.proof)
	for i, id := range att.nets {
		if of := c.nets[id]; of != nil {
			att.nets[i] = of.id // kept once
		}
	}
	p.check, p.att = check, att
	c.peers[p.id] = p
	c.forgetMembers()
	c.put(now, n, p, t)
	for id, of := range c.nets {
		if old := of.tables.get(p.id); id != "" && old != nil && c.leftBefore(p, id, old.stamp) {
			c.remove(of, p)
		}
	}
	c.expect(now, p)
	for _, id := range slices.Sorted(maps.Keys(c.nets)) {
		c.useWaiting(now, c.nets[id], p.id)
	}
	return true
}

func (c *core) wait(now time.Time, k key, m *update, base stamp) {
	known := c.stampOf(k.network, k.owner)
	if known.newer(base) {
		c.counts.stale++ // and older than m: the owner will say how to get there
	} else {
		c.waiting.hold(now, k, m)
	}
	c.miss(now, k, m.stamp, k.owner, c.gap)
}

// useWaiting goes on with updates that waited for what was just stored.
func (c *core) useWaiting(now time.Time, n *network, owner weft.ID) {
	k := key{n.id, owner}
	for again := true; again; {
		again = false
		w, since := c.waiting.take(k)
		for i, m := range w {
			if !m.stamp.newer(c.stampOf(n.id, owner)) {
				continue
			}
			if c.use(now, owner, n, m) {
				for _, rest := range w[i+1:] {
					c.waiting.hold(since, k, rest)
				}
				again = true
				break
			}
		}
	}
}

// flights are updates under way: parts that have come, and what was passed on.
type flights struct {
	byKey map[flightKey]*flight
	bytes int // of parts kept
}

type flightKey struct {
	key
	stamp stamp
}

type flight struct {
	born  time.Time
	parts [][]byte
	got   int
	sent  [noTree]uint64 // by part: passed on in that tree
	came  bool           // by a tree, and was used
	asked bool           // for, as it seemed lost
	again bool           // more than once
}

// Bounds of what is kept of updates under way.
const (
	flightFor   = 2 * time.Second
	maxFlights  = 1 << 14
	flightBytes = 32 << 20
)

func newFlights() flights { return flights{byKey: map[flightKey]*flight{}} }

// of finds the flight of a part; nil if there are too many.
func (fs *flights) of(now time.Time, m *update) *flight {
	k := flightKey{key{m.network, m.owner}, m.stamp}
	f := fs.byKey[k]
	if f == nil {
		if len(fs.byKey) >= maxFlights {
			fs.sweep(now)
			if len(fs.byKey) >= maxFlights {
				return nil
			}
		}
		f = &flight{born: now}
		fs.byKey[k] = f
	}
	return f
}

// passOn reports, once for each part and tree, that it has to be passed on.
func (f *flight) passOn(m *update) bool {
	bit := uint64(1) << m.part
	if f.sent[m.tree]&bit != 0 {
		return false
	}
	f.sent[m.tree] |= bit
	return true
}

// collect adds a part and returns the body when it is complete, once.
func (fs *flights) collect(f *flight, m *update) []byte {
	if m.parts == 1 {
		return m.body
	}
	if uint64(len(f.parts)) != m.parts {
		fs.free(f) // another way of telling the same state
		if fs.bytes > flightBytes {
			return nil
		}
		f.parts = make([][]byte, m.parts)
	}
	if f.parts[m.part] != nil {
		return nil
	}
	f.parts[m.part] = m.body
	fs.bytes += len(m.body)
	if f.got++; f.got < len(f.parts) {
		return nil
	}
	b := bytes.Join(f.parts, nil)
	fs.free(f)
	return b
}

func (fs *flights) free(f *flight) {
	for _, b := range f.parts {
		fs.bytes -= len(b)
	}
	f.parts, f.got = nil, 0
}

// sweep forgets what began long ago.
func (fs *flights) sweep(now time.Time) {
	for k, f := range fs.byKey {
		if now.Sub(f.born) >= flightFor {
			fs.free(f)
			delete(fs.byKey, k)
		}
	}
}
