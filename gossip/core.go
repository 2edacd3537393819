package gossip

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// core is the protocol of the endpoint table as a state machine without I/O,
// goroutine or clock; randomness comes from a given source. Events go in by its
// methods, messages come out by take, and deadline says when advance has
// something to do.
//
// There is one table for each network and owner, and only its owner makes new
// states of it. The table of network "" tells what the owner is attached to; it
// goes to all members, the others to those attached to their network. A state's
// way:
//
//	write ── ≤ 1 ms ──► down two trees (tree.go), in parts of a datagram each
//	a node that missed it hears of it after 40 and 120 ms from two others (hot
//	   digest), and wants it: from them, from the owner, at last by a repair
//	a repair compares all stamps of networks that differ, with one member, by
//	   stream, and brings both up to date; at most two at once (repair.go)
//	once a second all is compared with a random member by a hash (cold digest)
//
// An owner that is not alive is out of sight at once, with all its tables; they
// are kept for forgetAfter. A core is not safe for concurrent use.
type core struct {
	self  weft.ID
	rand  *rand.Rand
	prove Prover
	keep  keeper
	last  stamp // given to an own table
	own   own
	peers map[weft.ID]*peer // self, too
	live  []weft.ID         // of peers, sorted, self included
	nets  map[weft.ID]*network

	flights  flights
	missing  map[key]*miss
	waiting  waiting // deltas whose base has not come, and what has no certificate yet
	suspects map[weft.ID]*suspect
	repairs  map[weft.ID]*repair
	pacing

	flushes pace
	wantAt  time.Time // not after the first of missing is due; zero: none is
	out     []envelope
	// changed is set when what is in sight changed; the user clears it.
	changed bool
	counts  coreCounts
}

// pacing is how what is lost is asked for: the more slowly, the less comes of it.
type pacing struct {
	gap     time.Duration // how late a packet may be before it counts as lost
	wanting wanting
	asked   weft.ID // the owner that was asked last; "" = none was
	vain    vain
}

// pace is when the next flush is due (zero: none is) and when the last one was.
type pace struct{ next, last time.Time }

// own is what this node tells of itself.
type own struct {
	// said: something was published in this life. Before that nothing is
	// claimed, and others keep what they know of the former life.
	said   bool
	attach []weft.ID // asked for, besides the networks of entries
	nets   map[weft.ID]*ownNet
}

// ownNet are the own entries on one network.
type ownNet struct {
	entries []weft.Endpoint // in order
	dirty   bool
	view    *ownView     // entries as readers see them
	steps   []loggedStep // that led to the present table, oldest first
}

// ownView are entries of this node, told or not yet. It never changes.
type ownView struct{ entries []weft.Endpoint }

// loggedStep is a step as it is sent, so that who knows an older state can be
// told the difference.
type loggedStep struct {
	base, to stamp
	b        []byte
}

// key names a table.
type key struct{ network, owner weft.ID }

// peer is an owner.
type peer struct {
	id   weft.ID
	live bool
	// shown: all its tables have come once, and what is known of it is shown.
	// A daemon that restarts must not see others' tables one by one.
	shown bool
	since time.Time // it is alive or not
	att   attachment
	check Checker // of its proofs; nil: no certificate is known
}

// table is a state of one owner's entries on a network. It never changes.
type table struct {
	owner *peer
	stamp stamp
	proof [proofBytes]byte
	count int32
	kept  kept // of network "": nothing, its owner's peer has the attachment
}

// network is one whose tables this node carries.
type network struct {
	id      weft.ID
	tables  tables
	names   *dictionary // of services, for what is kept
	hash    uint64      // over the stamps of live owners
	past    [16]uint64  // former hashes: who still has one is behind
	pasts   int
	members []weft.ID // live and attached, sorted; nil: to be found again
	hot     [2]round  // hot digests to come
}

// round is a hot digest that is due.
type round struct {
	at    time.Time // zero: none
	items []ownerStamp
}

// envelope is a message and its receivers.
type envelope struct {
	to     []weft.ID
	m      message
	stream bool // not as a datagram
}

// coreCounts are counted since the start.
type coreCounts struct{ stale, malformed, refused, wants, repairs uint64 }

// Times of the table, our own choices.
const (
	// coalesceFor is how long writes are gathered after one that was told at once.
	coalesceFor = time.Millisecond
	// hotAfter a change two members are told of it, and two others hotAgain
	// later.
	hotAfter = 40 * time.Millisecond
	hotAgain = 80 * time.Millisecond
	// hotItems bounds what a hot digest tells one by one: it is to fit a
	// datagram. The hash is over all.
	hotItems = 40
	// graceFor is how long a difference is let be: news may be on the way.
	graceFor = 50 * time.Millisecond
	// minGap and maxGap bound the time after which a packet counts as lost. It
	// is doubled when what was asked for came by itself, as on a busy machine.
	minGap = 25 * time.Millisecond
	maxGap = 400 * time.Millisecond
	// showAfter an owner is shown that owes us a table.
	showAfter = 2 * time.Second
	// forgetAfter is how long the tables of an owner that is not alive are
	// kept, out of sight, so that a false alarm or a healed partition costs no
	// transfer.
	forgetAfter = 10 * time.Minute
)

func newCore(self weft.ID, epoch uint64, p Prover, r *rand.Rand) *core {
	c := &core{
		self: self, rand: r, prove: p, last: stamp{epoch: epoch},
		own: own{nets: map[weft.ID]*ownNet{}}, peers: map[weft.ID]*peer{}, nets: map[weft.ID]*network{},
		flights: newFlights(), missing: map[key]*miss{}, waiting: newWaiting(),
		suspects: map[weft.ID]*suspect{}, repairs: map[weft.ID]*repair{}, pacing: pacing{gap: minGap, wanting: wanting{size: wantingBegin}},
	}
	c.peers[self] = &peer{id: self, live: true, shown: true}
	c.live = []weft.ID{self}
	c.nets[""] = newNetwork("")
	return c
}

func newNetwork(id weft.ID) *network {
	return &network{id: id, tables: newTables(), names: newDictionary()}
}

// take returns the messages to send and forgets them.
func (c *core) take() []envelope {
	out := c.out
	c.out = nil
	return out
}

func (c *core) send(m message, stream bool, ids ...weft.ID) {
	if len(ids) > 0 {
		c.out = append(c.out, envelope{slices.Clone(ids), m, stream})
	}
}

// write replaces the own entries. Those that no message can carry are left out
// and returned.
func (c *core) write(now time.Time, entries []weft.Endpoint) (unfit []weft.Endpoint) {
	next := map[weft.ID][]weft.Endpoint{}
	for _, e := range entries {
		if !fits(&e) {
			unfit = append(unfit, e)
			continue
		}
		next[e.Network] = append(next[e.Network], e)
	}
	news := !c.own.said
	c.own.said = true
	for id := range c.own.nets {
		if _, ok := next[id]; !ok {
			next[id] = nil
		}
	}
	for id, entries := range next {
		slices.SortFunc(entries, compareEntries)
		entries = slices.Compact(entries)
		o := c.own.nets[id]
		if o == nil {
			o = newOwnNet()
			c.own.nets[id] = o
		}
		if !slices.Equal(entries, o.entries) {
			o.entries, o.dirty, news = entries, true, true
			o.view = &ownView{entries}
		}
	}
	if news {
		c.changed = true
		c.flushSoon(now)
	}
	return unfit
}

func newOwnNet() *ownNet { return &ownNet{view: &ownView{}} }

// attach says which networks this node takes part in besides those that it has
// entries on.
func (c *core) attach(now time.Time, networks []weft.ID) {
	networks = slices.DeleteFunc(slices.Clone(networks), func(id weft.ID) bool { return id == "" || len(id) > maxIDBytes })
	slices.Sort(networks)
	networks = slices.Compact(networks)
	if slices.Equal(networks, c.own.attach) {
		return
	}
	c.own.attach = networks
	c.carryAll(now)
	c.flushSoon(now)
}

// flushSoon has the first write after a rest told at once: what follows closely is
// gathered.
func (c *core) flushSoon(now time.Time) {
	if c.flushes.next.IsZero() {
		c.flushes.next = later(now, c.flushes.last.Add(coalesceFor))
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// attached are the networks this node takes part in, in order.
func (c *core) attached() []weft.ID {
	ids := slices.Clone(c.own.attach)
	for id, o := range c.own.nets {
		if len(o.entries) > 0 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// carryAll takes up and drops networks so that they are those attached to.
func (c *core) carryAll(now time.Time) []weft.ID {
	ids := c.attached()
	for id := range c.nets {
		if _, ok := slices.BinarySearch(ids, id); !ok && id != "" {
			c.drop(id)
		}
	}
	for _, id := range ids {
		if c.nets[id] == nil {
			c.nets[id] = newNetwork(id)
			// One member brings the tables of all.
			if others := c.others(id); len(others) > 0 {
				c.suspect(now, id, others[c.rand.IntN(len(others))], 0, now)
			}
		}
	}
	return ids
}

func (c *core) drop(id weft.ID) {
	delete(c.nets, id)
	delete(c.suspects, id)
	if o := c.own.nets[id]; o != nil && len(o.entries) == 0 {
		delete(c.own.nets, id)
	}
	maps.DeleteFunc(c.missing, func(k key, _ *miss) bool { return k.network == id })
	c.waiting.drop(id)
	c.changed = true
}

// flush makes and pushes new states of own tables.
func (c *core) flush(now time.Time) {
	c.flushes = pace{last: now}
	ids := c.carryAll(now)
	if !c.own.said {
		return
	}
	me := c.peers[c.self]
	cert := c.prove.Certificate()
	first := c.nets[""].tables.get(c.self) == nil
	turned := first || !bytes.Equal(cert, me.att.cert) || me.epochOf(c) != c.last.epoch
	if turned || !slices.Equal(ids, me.att.nets) {
		att := attachment{nets: ids, cert: cert}
		content := att.encode()
		t, o := c.make("", content)
		me.att = att
		c.forgetMembers()
		c.put(now, c.nets[""], me, t)
		o.kind = bodyAttached
		c.push(now, "", t.stamp, o.encode())
	}
	for _, id := range ids {
		o := c.own.nets[id]
		if o == nil {
			o = newOwnNet()
			c.own.nets[id] = o
		}
		if turned {
			o.steps = nil
		}
		if n := c.nets[id]; o.dirty || turned || n.tables.get(c.self) == nil {
			o.dirty = false
			c.flushNet(now, n, o)
		}
	}
}

// epochOf is that of the own attachment.
func (p *peer) epochOf(c *core) uint64 { return c.stampOf("", p.id).epoch }

func (c *core) flushNet(now time.Time, n *network, o *ownNet) {
	old := n.tables.get(c.self)
	t, b := c.make(n.id, appendEntries(nil, o.entries))
	var count int
	t.kept, count = c.keep.keep(&decoder{b: b.content}, n.id, n.names)
	t.count = int32(count)
	b.kind = bodyWhole
	if s, ok := c.logStep(n, o, old, t, len(b.content)); ok {
		b = s.body(b.proof)
	} else if old == nil || old.stamp.epoch != t.stamp.epoch {
		o.steps = nil
	}
	c.put(now, n, c.peers[c.self], t)
	c.push(now, n.id, t.stamp, b.encode())
}

// make begins a new state with content on the wire.
func (c *core) make(network weft.ID, content []byte) (*table, body) {
	c.last.counter++
	t := &table{owner: c.peers[c.self], stamp: c.last}
	proof := c.prove.Sign(digestOf(c.self, network, t.stamp, content))
	copy(t.proof[:], proof)
	return t, body{proof: proof, content: content}
}

// A log of steps is kept for tables that do not fit a datagram, as long as it
// is smaller than the table.
const (
	logFrom  = 1000 // bytes of entries on the wire
	logSteps = 64
)

// logStep adds the step from old to t to the log and reports whether it should
// be sent in place of the whole, whose entries take size bytes on the wire.
func (c *core) logStep(n *network, o *ownNet, old, t *table, size int) (loggedStep, bool) {
	if old == nil || old.stamp.epoch != t.stamp.epoch || size < logFrom {
		o.steps = nil
		return loggedStep{}, false
	}
	s := loggedStep{base: old.stamp, to: t.stamp, b: difference(n.entriesOf(old), o.entries).append(nil)}
	if len(s.b) > size/2 {
		o.steps = nil
		return s, false
	}
	o.steps = append(o.steps, s)
	logged := 0
	for i := len(o.steps) - 1; i >= 0; i-- {
		if logged += len(o.steps[i].b); logged > size/2 || len(o.steps)-i > logSteps {
			o.steps = slices.Clone(o.steps[i+1:])
			break
		}
	}
	return s, true
}

func (s loggedStep) body(proof []byte) body {
	return body{proof: proof, kind: bodyDelta, base: s.base, content: s.b}
}

// entriesOf unpacks a table.
func (n *network) entriesOf(t *table) []weft.Endpoint {
	return t.kept.entries(n.id, int(t.count), n.names.services)
}

// put stores a state that is newer than the known one and tells of it later.
func (c *core) put(now time.Time, n *network, p *peer, t *table) {
	if p.live {
		if old := n.tables.get(p.id); old != nil {
			n.hash ^= hashStamp(p.id, old.stamp)
		}
		n.hash ^= hashStamp(p.id, t.stamp)
		n.note()
		n.news(now, ownerStamp{p.id, t.stamp})
		c.changed = true
	}
	n.tables.set(t)
	if m := c.missing[key{n.id, p.id}]; m != nil && !m.stamp.newer(t.stamp) {
		delete(c.missing, key{n.id, p.id})
	}
	c.show(now, p)
}

// show brings an owner to sight when all of its tables have come.
func (c *core) show(now time.Time, p *peer) {
	if p.shown || c.stampOf("", p.id) == (stamp{}) {
		return
	}
	for _, id := range p.att.nets {
		if n := c.nets[id]; n != nil && n.tables.get(p.id) == nil && now.Sub(p.since) < showAfter {
			return
		}
	}
	p.shown = true
	c.changed = c.changed || p.live
}

// remove takes one owner's table out of a network.
func (c *core) remove(n *network, p *peer) {
	if t := n.tables.get(p.id); t != nil {
		if p.live {
			n.hash ^= hashStamp(p.id, t.stamp)
			n.note()
			c.changed = true
		}
		n.tables.remove(p.id)
	}
}

// note remembers the present hash.
func (n *network) note() {
	n.past[n.pasts%len(n.past)] = n.hash
	n.pasts++
}

// sum is the present hash; 0 would mean "none" in messages.
func (n *network) sum() uint64 { return max(n.hash, 1) }

func (n *network) had(sum uint64) bool {
	return sum == n.sum() || slices.Contains(n.past[:min(n.pasts, len(n.past))], sum)
}

func (n *network) news(now time.Time, s ownerStamp) {
	r := &n.hot[0]
	if r.at.IsZero() {
		r.at = now.Add(hotAfter)
	}
	r.items = addItems(r.items, s)
}

// addItems keeps the last word of each owner, and the newest hotItems.
func addItems(to []ownerStamp, items ...ownerStamp) []ownerStamp {
	for _, s := range items {
		to = slices.DeleteFunc(to, func(o ownerStamp) bool { return o.owner == s.owner })
		if len(to) >= hotItems {
			to = to[1:]
		}
		to = append(to, s)
	}
	return to
}
