package gossip

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// nodeID is the id of the n-th node of a test. Networks and services have ids
// that no NewID makes, so that both forms travel.
func nodeID(n int) weft.ID { return weft.ID(fmt.Sprintf("0node%020d", n)) }

func netID(n int) weft.ID { return weft.ID(fmt.Sprintf("net%022d", n)) }

func endpoint(n int) weft.Endpoint {
	return weft.Endpoint{
		Network: netID(n % 3), Task: weft.ID(fmt.Sprintf("0task%020d", n)),
		Service: weft.ID(fmt.Sprintf("svc%022d", n%5)), Slot: uint64(n % 7), State: weft.EndpointState(n % 3),
		Addr: netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}),
	}
}

func number(id weft.ID) (n int) {
	fmt.Sscanf(string(id), "0node%d", &n)
	return n
}

// sworn is a prover whose proofs cost nothing: a certificate is the owner's name
// and a serial, and a proof says both.
type sworn struct {
	id     weft.ID
	serial *byte
}

func (s sworn) Certificate() []byte { return append([]byte(s.id), *s.serial) }

func (s sworn) Sign(d [32]byte) []byte { return swear(s.Certificate(), d) }

func swear(cert []byte, d [32]byte) []byte {
	p := make([]byte, proofBytes)
	copy(p, d[:])
	copy(p[32:], cert)
	return p
}

func (sworn) Trust(owner weft.ID, cert []byte) (Checker, error) {
	if len(cert) != len(owner)+1 || string(cert[:len(owner)]) != string(owner) {
		return nil, errForeign
	}
	return func(d [32]byte, proof []byte) bool { return string(proof) == string(swear(cert, d)) }, nil
}

// world drives cores over a network that loses, repeats and reorders, and keeps
// beside them the slow twin: what each owner last published, in plain maps.
type world struct {
	t        fataler
	now      time.Time
	seed     uint64
	nodes    map[int]*core // running
	serials  map[int]*byte
	clock    map[int]uint64 // that the last life's epoch came from
	lives    uint64
	sees     map[int]map[int]bool      // who thinks whom alive
	attached map[int][]weft.ID         // asked for in this life
	truth    map[int][]weft.Endpoint   // published in this life; nil: nothing yet
	ever     map[int][][]weft.Endpoint // all that an owner ever published
	wire     []letter
}

type fataler interface{ Fatalf(string, ...any) }

type letter struct {
	from, to int
	b        []byte // encoded, so that nothing is shared
	stream   bool
}

const worldSize = 4

var testEpoch = time.Unix(1e9, 0)

func newWorld(t fataler, seed uint64) *world {
	return &world{
		t: t, now: testEpoch, seed: seed, nodes: map[int]*core{}, serials: map[int]*byte{}, clock: map[int]uint64{},
		sees: map[int]map[int]bool{}, attached: map[int][]weft.ID{}, truth: map[int][]weft.Endpoint{}, ever: map[int][][]weft.Endpoint{},
	}
}

func (w *world) collect(n int) {
	for _, e := range w.nodes[n].take() {
		for _, id := range e.to {
			w.wire = append(w.wire, letter{n, number(id), encode(nil, e.m), e.stream})
		}
	}
}

func (w *world) start(n int, clock uint64) {
	w.lives++
	if w.serials[n] == nil {
		w.serials[n] = new(byte)
	}
	w.nodes[n] = newCore(nodeID(n), makeEpoch(clock, w.lives), sworn{nodeID(n), w.serials[n]}, rand.New(rand.NewPCG(w.seed, w.lives)))
	w.clock[n], w.sees[n] = clock, map[int]bool{}
	delete(w.truth, n)
	delete(w.attached, n)
	for m := range worldSize {
		w.setLive(m, n, true)
		w.setLive(n, m, w.nodes[m] != nil)
	}
}

func (w *world) setLive(n, m int, live bool) {
	c := w.nodes[n]
	if c == nil || n == m {
		return
	}
	w.sees[n][m] = live
	ids := []weft.ID{nodeID(n)}
	for o, ok := range w.sees[n] {
		if ok {
			ids = append(ids, nodeID(o))
		}
	}
	c.setLive(w.now, ids)
	w.collect(n)
}

func (w *world) publish(n int, entries []weft.Endpoint) {
	if unfit := w.nodes[n].write(w.now, entries); len(unfit) > 0 {
		w.t.Fatalf("unfit: %v", unfit)
	}
	if entries == nil {
		entries = []weft.Endpoint{}
	}
	w.truth[n] = entries
	w.ever[n] = append(w.ever[n], entries)
}

func (w *world) attach(n int, nets []weft.ID) {
	w.nodes[n].attach(w.now, nets)
	w.attached[n] = nets
}

func (w *world) deliver(i int, keep bool) {
	l := w.wire[i]
	if !keep {
		w.wire = slices.Delete(w.wire, i, i+1)
	}
	c := w.nodes[l.to]
	if c == nil {
		return
	}
	m, err := decode(slices.Clone(l.b))
	if err != nil {
		w.t.Fatalf("decode own message: %v", err)
	}
	before := w.stamps(c)
	c.receive(w.now, nodeID(l.from), m, l.stream)
	w.collect(l.to)
	for k, s := range w.stamps(c) {
		if before[k].newer(s) {
			w.t.Fatalf("node %d went back from %v to %v of %v", l.to, before[k], s, k)
		}
	}
	if c.counts.malformed > 0 {
		w.t.Fatalf("node %d takes a message for malformed", l.to)
	}
}

func (w *world) stamps(c *core) map[key]stamp {
	out := map[key]stamp{}
	for id, n := range c.nets {
		for owner, t := range n.tables.all() {
			out[key{id, owner}] = t.stamp
		}
	}
	return out
}

// pass lets time go by, timers fire, and everything arrive.
func (w *world) pass(d time.Duration) {
	end := w.now.Add(d)
	for steps := 0; ; steps++ {
		if steps > 20000 {
			w.t.Fatalf("the network never falls silent: %d letters", len(w.wire))
		}
		if len(w.wire) > 0 {
			w.deliver(0, false)
			continue
		}
		next := end
		for n := range worldSize {
			if c := w.nodes[n]; c != nil {
				if at := c.deadline(); !at.IsZero() && at.Before(next) {
					next = at
				}
			}
		}
		if next.After(w.now) {
			w.now = next
		}
		if w.now.Equal(end) {
			return
		}
		for n := range worldSize {
			if c := w.nodes[n]; c != nil {
				c.advance(w.now)
				w.collect(n)
			}
		}
	}
}

// settle heals everything and runs rounds of ticks with full delivery.
func (w *world) settle() {
	for n := range worldSize {
		for m := range worldSize {
			w.setLive(n, m, w.nodes[m] != nil)
		}
	}
	for range 15 {
		w.pass(time.Second)
		for n := range worldSize {
			if c := w.nodes[n]; c != nil {
				c.tick(w.now)
				w.collect(n)
			}
		}
	}
	w.pass(5 * time.Second)
}

// on are the networks a node takes part in by the twin.
func (w *world) on(n int) map[weft.ID]bool {
	out := map[weft.ID]bool{}
	for _, id := range w.attached[n] {
		out[id] = true
	}
	for _, e := range w.truth[n] {
		out[e.Network] = true
	}
	return out
}

func only(entries []weft.Endpoint, on map[weft.ID]bool) []weft.Endpoint {
	return slices.DeleteFunc(slices.Clone(entries), func(e weft.Endpoint) bool { return !on[e.Network] })
}

// seen is what readers at a node see of an owner.
func seen(c *core, owner weft.ID) (out []weft.Endpoint) {
	for _, p := range c.sight([]Member{{ID: owner}}) {
		var names services
		if n := c.nets[p.network]; n != nil {
			names = n.names.frozen()
		}
		out = append(out, p.entries(names)...)
	}
	return out
}

// check compares every node's view with the slow twin.
func (w *world) check() {
	for n, c := range w.nodes {
		on := w.on(n)
		for id := range c.nets {
			if id != "" && !on[id] {
				w.t.Fatalf("node %d carries network %s, which it is not attached to", n, id)
			}
		}
		for m := range worldSize {
			if w.nodes[m] == nil {
				continue
			}
			got := seen(c, nodeID(m))
			want, published := w.truth[m]
			if !published { // then others may still show the former life
				if m != n && got != nil && !slices.ContainsFunc(w.ever[m], func(e []weft.Endpoint) bool { return subset(got, e) }) {
					w.t.Fatalf("node %d shows %v of %d, which it never published", n, got, m)
				}
				continue
			}
			if want = only(want, on); !sameSet(got, want) {
				w.t.Fatalf("node %d shows %v of node %d, the truth is %v (own last %v)", n, got, m, want, w.nodes[m].last)
			}
		}
		for id, net := range c.nets {
			var sum uint64
			for owner, t := range net.tables.all() {
				if c.peers[owner].live {
					sum ^= hashStamp(owner, t.stamp)
				}
			}
			if sum != net.hash {
				w.t.Fatalf("node %d: hash of %q is %x, recounted %x", n, id, net.hash, sum)
			}
		}
	}
}

func subset(a, b []weft.Endpoint) bool {
	return !slices.ContainsFunc(a, func(e weft.Endpoint) bool { return !slices.Contains(b, e) })
}

func sameSet(a, b []weft.Endpoint) bool {
	sorted := func(s []weft.Endpoint) []weft.Endpoint {
		s = slices.Clone(s)
		slices.SortFunc(s, func(a, b weft.Endpoint) int {
			if a.Network != b.Network {
				return int(a.Network[24]) - int(b.Network[24])
			}
			return compareEntries(a, b)
		})
		return slices.Compact(s)
	}
	return slices.Equal(sorted(a), sorted(b))
}

// manyEntries is a table of two datagrams, so that parts, steps and logs occur.
func manyEntries(salt int) (out []weft.Endpoint) {
	for i := range 60 {
		e := endpoint(3 * i) // all on one network
		if i == 7 {
			e.Slot = uint64(salt)
		}
		out = append(out, e)
	}
	return out
}

func TestCoreConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, rapid.Uint64().Draw(t, "seed"))
		for n := range worldSize {
			w.start(n, 100)
		}
		node := rapid.IntRange(0, worldSize-1)
		t.Repeat(map[string]func(*rapid.T){
			"publish": func(t *rapid.T) {
				if n := node.Draw(t, "node"); w.nodes[n] != nil {
					var e []weft.Endpoint
					if rapid.IntRange(0, 3).Draw(t, "many") == 0 {
						e = manyEntries(rapid.IntRange(0, 3).Draw(t, "salt"))
					}
					for _, i := range rapid.SliceOfN(rapid.IntRange(0, 5), 0, 3).Draw(t, "entries") {
						e = append(e, endpoint(i))
					}
					w.publish(n, e)
				}
			},
			"attach": func(t *rapid.T) {
				if n := node.Draw(t, "node"); w.nodes[n] != nil {
					var nets []weft.ID
					for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, 2), 0, 3, rapid.ID[int]).Draw(t, "networks") {
						nets = append(nets, netID(i))
					}
					w.attach(n, nets)
				}
			},
			"renew": func(t *rapid.T) { *w.serials[node.Draw(t, "node")]++ },
			"wait": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(0, 60).Draw(t, "ms")) * time.Millisecond)
				for n := range worldSize {
					if c := w.nodes[n]; c != nil {
						c.advance(w.now)
						w.collect(n)
					}
				}
			},
			"deliver": func(t *rapid.T) {
				for range rapid.IntRange(1, 10).Draw(t, "letters") {
					if len(w.wire) > 0 { // any letter: reorder; kept: repeat
						w.deliver(rapid.IntRange(0, len(w.wire)-1).Draw(t, "letter"), rapid.IntRange(0, 4).Draw(t, "repeat") == 0)
					}
				}
			},
			"lose": func(t *rapid.T) {
				if len(w.wire) > 0 {
					i := rapid.IntRange(0, len(w.wire)-1).Draw(t, "letter")
					w.wire = slices.Delete(w.wire, i, i+1)
				}
			},
			"crash": func(t *rapid.T) { delete(w.nodes, node.Draw(t, "node")) },
			"restart": func(t *rapid.T) {
				n := node.Draw(t, "node")
				w.start(n, uint64(int64(w.clock[n])+rapid.Int64Range(-2, 3).Draw(t, "clock"))) // it may go back
			},
			"judge": func(t *rapid.T) {
				w.setLive(node.Draw(t, "node"), node.Draw(t, "other"), rapid.Bool().Draw(t, "alive"))
			},
			"tick": func(t *rapid.T) {
				n := node.Draw(t, "node")
				w.now = w.now.Add(time.Duration(rapid.IntRange(0, 700).Draw(t, "seconds")) * time.Second)
				if c := w.nodes[n]; c != nil {
					c.tick(w.now)
					w.collect(n)
				}
			},
		})
		w.settle()
		w.check()
	})
}

// A node whose clock went back, or stood still, overcomes its former life.
func TestCoreFormerLife(t *testing.T) {
	for name, clock := range map[string]uint64{"clock went back": 50, "clock stood still": 100, "clock went on": 101} {
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				w := newWorld(t, 1)
				w.lives = rapid.Uint64Range(0, 5).Draw(t, "lives") // the random part of the epoch
				w.start(1, 100)
				w.start(2, 100)
				w.publish(2, nil)
				for i := range 3 {
					w.publish(1, []weft.Endpoint{endpoint(3 * i)})
					w.attach(2, []weft.ID{netID(0)})
					w.pass(100 * time.Millisecond)
				}
				w.lives = rapid.Uint64Range(0, 5).Draw(t, "more lives")
				w.start(1, clock)
				w.pass(time.Second)
				if got := seen(w.nodes[2], nodeID(1)); len(got) != 1 || got[0] != endpoint(6) {
					t.Fatalf("a restart that has not published is seen: %v", got)
				}
				w.publish(1, []weft.Endpoint{endpoint(9)})
				w.settle()
				if got := seen(w.nodes[2], nodeID(1)); len(got) != 1 || got[0] != endpoint(9) {
					t.Fatalf("the other shows %v", got)
				}
			})
		})
	}
}

func TestCoreSendsOnlyChanges(t *testing.T) {
	w := newWorld(t, 1)
	w.start(1, 1)
	w.start(2, 1)
	w.attach(2, []weft.ID{netID(0), netID(1), netID(2)})
	w.publish(2, nil)
	w.publish(1, []weft.Endpoint{endpoint(2), endpoint(1)})
	w.pass(time.Second)
	before := w.nodes[1].last
	w.publish(1, []weft.Endpoint{endpoint(1), endpoint(2), endpoint(1)})
	w.pass(time.Second)
	if w.nodes[1].last != before {
		t.Fatal("an unchanged set is told again")
	}
	w.publish(1, []weft.Endpoint{endpoint(1), endpoint(2), endpoint(4)})
	w.publish(1, []weft.Endpoint{endpoint(1), endpoint(2), endpoint(7)})
	w.pass(coalesceFor)
	w.nodes[1].advance(w.now)
	if got := w.nodes[1].last.counter - before.counter; got != 1 {
		t.Fatalf("two writes at once to one network make %d states", got)
	}
}

// A large table that changes a little is told by what has changed, also to one
// that has missed a few changes.
func TestCoreDeltas(t *testing.T) {
	w := newWorld(t, 1)
	w.start(1, 1)
	w.start(2, 1)
	w.publish(2, nil)
	w.attach(2, []weft.ID{netID(0)})
	var all []weft.Endpoint
	for i := range 2000 {
		e := endpoint(3 * i)
		e.Addr = netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)})
		all = append(all, e)
	}
	w.publish(1, all)
	w.pass(time.Second)
	if got := seen(w.nodes[2], nodeID(1)); !sameSet(got, all) {
		t.Fatalf("%d of %d entries", len(got), len(all))
	}
	sent := 0
	for i := range 10 {
		all = slices.Delete(slices.Clone(all), 100*i, 100*i+1)
		w.publish(1, all)
		w.now = w.now.Add(coalesceFor)
		w.nodes[1].advance(w.now)
		w.collect(1)
		lost := w.wire
		if i%3 != 0 {
			w.wire = nil // all is lost
		}
		for _, l := range lost {
			if m, _ := decode(l.b); l.from == 1 {
				if u, ok := m.(*update); ok {
					sent += len(u.body)
				}
			}
		}
		if i%3 == 0 {
			w.pass(500 * time.Millisecond)
		}
	}
	w.pass(2 * time.Second)
	if got := seen(w.nodes[2], nodeID(1)); !sameSet(got, all) {
		t.Fatalf("%d of %d entries after changes", len(got), len(all))
	}
	if sent > 5000 {
		t.Fatalf("10 changes of one entry in 2,000 were sent as %d bytes", sent)
	}
	if r := w.nodes[2].counts.repairs; r > 2 {
		t.Fatalf("%d repairs for what the owner can tell", r)
	}
}

// What only others say of an owner is believed by its proof alone.
func TestCoreRefusesForgeries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, 1)
		for n := range 3 {
			w.start(n, 1)
			w.publish(n, []weft.Endpoint{endpoint(3 * n)})
		}
		w.pass(time.Second)
		forge := func(owner int, m update, b body) {
			m.owner, m.tree, m.parts, m.body = nodeID(owner), uint8(rapid.IntRange(0, 2).Draw(t, "tree")), 1, b.encode()
			w.wire = append(w.wire, letter{2, 0, encode(nil, &m), rapid.Bool().Draw(t, "stream")})
		}
		high := stamp{1 << 60, 1}
		content := appendEntries(nil, []weft.Endpoint{endpoint(9)})
		// Node 2 says what node 1 has, with its own word, with an old word of
		// node 1, and with none; and that node 1 left.
		forge(1, update{network: netID(0), stamp: high}, body{swear(sworn{nodeID(2), new(byte)}.Certificate(), digestOf(nodeID(1), netID(0), high, content)), bodyWhole, stamp{}, content})
		old := w.nodes[1].nets[netID(0)].tables.get(nodeID(1))
		forge(1, update{network: netID(0), stamp: high}, body{old.proof[:], bodyWhole, stamp{}, content})
		forge(1, update{network: netID(0), stamp: high}, body{nil, bodyWhole, stamp{}, content})
		left := attachment{cert: sworn{nodeID(2), new(byte)}.Certificate()}.encode()
		forge(1, update{network: "", stamp: high}, body{swear(sworn{nodeID(2), new(byte)}.Certificate(), digestOf(nodeID(1), "", high, left)), bodyAttached, stamp{}, left})
		// And it invents an owner.
		ghost := attachment{nets: []weft.ID{netID(0)}, cert: sworn{nodeID(2), new(byte)}.Certificate()}.encode()
		forge(3, update{network: "", stamp: high}, body{nil, bodyAttached, stamp{}, ghost})
		w.pass(5 * time.Second)
		if got := seen(w.nodes[0], nodeID(1)); len(got) != 1 || got[0] != endpoint(3) {
			t.Fatalf("a forgery is believed: %v", got)
		}
		if c := w.nodes[0]; c.counts.refused < 5 || c.peers[nodeID(3)] != nil {
			t.Fatalf("%d of 5 forgeries refused, peers %v", c.counts.refused, slices.Collect(maps.Keys(c.peers)))
		}
	})
}

// An owner whose tables come one by one is shown when all are there.
func TestCoreShowsOwnersWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, 1)
		w.start(1, 1)
		w.publish(1, []weft.Endpoint{endpoint(0), endpoint(1), endpoint(2)})
		w.pass(time.Second)
		w.start(2, 1)
		w.attach(2, []weft.ID{netID(0), netID(1)})
		w.publish(2, nil)
		for steps := 0; steps < 1000; steps++ {
			if got := seen(w.nodes[2], nodeID(1)); len(got) == 1 {
				t.Fatalf("half of what node 1 has is shown: %v", got)
			} else if len(got) == 2 {
				return
			}
			if len(w.wire) > 0 {
				w.deliver(rapid.IntRange(0, len(w.wire)-1).Draw(t, "letter"), false)
				continue
			}
			w.now = w.now.Add(time.Millisecond)
			for n, c := range w.nodes {
				c.advance(w.now)
				w.collect(n)
			}
		}
		t.Fatal("it is never shown")
	})
}
