package gossip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// nodeID is the id of the n-th node of a test.
func nodeID(n int) weft.ID { return weft.ID(fmt.Sprintf("node%021d", n)) }

func endpoint(n int) weft.Endpoint {
	return weft.Endpoint{
		Network: weft.ID(fmt.Sprintf("net%022d", n%3)), Task: weft.ID(fmt.Sprintf("task%021d", n)),
		Service: weft.ID(fmt.Sprintf("svc%022d", n%5)), Slot: uint64(n % 7), State: weft.EndpointState(n % 3),
		Addr: netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}),
	}
}

// world drives cores over a network that loses, repeats and reorders, and keeps
// beside them the slow twin: what each owner last published, in plain maps.
type world struct {
	t     *rapid.T
	now   time.Time
	rand  *rand.Rand
	nodes map[int]*core  // running
	clock map[int]uint64 // that the last life's epoch came from
	lives uint64
	sees  map[int]map[int]bool      // who thinks whom alive
	truth map[int][]weft.Endpoint   // published in this life; nil: nothing yet
	ever  map[int][][]weft.Endpoint // all that an owner ever published
	wire  []letter
}

type letter struct {
	from, to int
	b        []byte // encoded, so that nothing is shared
}

const worldSize = 4

var testEpoch = time.Unix(1e9, 0)

func number(id weft.ID) (n int) {
	fmt.Sscanf(string(id), "node%d", &n)
	return n
}

func (w *world) post(from int, out []envelope) {
	for _, e := range out {
		for _, id := range e.to {
			w.wire = append(w.wire, letter{from, number(id), encode(nil, e.m)})
		}
	}
}

func (w *world) start(n int, clock uint64) {
	w.lives++
	w.nodes[n] = newCore(nodeID(n), makeEpoch(clock, w.lives))
	w.clock[n], w.sees[n] = clock, map[int]bool{}
	delete(w.truth, n)
	for m := range w.nodes {
		w.setLive(m, n, true)
		w.setLive(n, m, true)
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
	w.post(n, c.setLive(w.now, ids))
}

func (w *world) publish(n int, entries []weft.Endpoint) {
	c := w.nodes[n]
	c.write(entries)
	if entries == nil {
		entries = []weft.Endpoint{}
	}
	w.truth[n] = entries
	w.ever[n] = append(w.ever[n], entries)
	w.post(n, c.flush())
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
	m, err := decode(l.b)
	if err != nil {
		w.t.Fatalf("decode own message: %v", err)
	}
	before := w.stamps(c)
	w.post(l.to, c.receive(w.now, nodeID(l.from), m))
	w.post(l.to, c.flush())
	for id, s := range w.stamps(c) {
		if before[id].newer(s) {
			w.t.Fatalf("node %d went back from %v to %v of %s", l.to, before[id], s, id)
		}
	}
}

func (w *world) stamps(c *core) map[weft.ID]stamp {
	out := map[weft.ID]stamp{}
	for id, p := range c.peers {
		out[id] = p.stamp()
	}
	return out
}

// settle heals everything and runs rounds of ticks with full delivery.
func (w *world) settle() {
	for n := range w.nodes {
		for m := range worldSize {
			w.setLive(n, m, w.nodes[m] != nil)
		}
	}
	for range 60 {
		w.now = w.now.Add(time.Second)
		for n := range worldSize {
			if c := w.nodes[n]; c != nil {
				w.post(n, c.tick(w.now, w.rand))
			}
		}
		for steps := 0; len(w.wire) > 0; steps++ {
			if steps > 20000 {
				w.t.Fatalf("the network never falls silent: %d letters", len(w.wire))
			}
			w.deliver(0, false)
		}
	}
}

// check compares every node's view with the slow twin.
func (w *world) check() {
	for n, c := range w.nodes {
		for m := range worldSize {
			if m == n || w.nodes[m] == nil {
				continue
			}
			p := c.peers[nodeID(m)]
			var got []weft.Endpoint
			if p != nil && p.table != nil {
				got = p.table.entries
			}
			want, published := w.truth[m]
			if !published { // then others may still show the former life
				if got != nil && !slices.ContainsFunc(w.ever[m], func(e []weft.Endpoint) bool { return sameSet(e, got) }) {
					w.t.Fatalf("node %d shows %v of %d, which it never published", n, got, m)
				}
				continue
			}
			if !sameSet(got, want) {
				w.t.Fatalf("node %d shows %v of node %d, the truth is %v (stamps %v, own %v)",
					n, got, m, want, p.stamp(), w.nodes[m].own.stamp)
			}
		}
	}
}

func sameSet(a, b []weft.Endpoint) bool {
	sorted := func(s []weft.Endpoint) []weft.Endpoint {
		s = slices.Clone(s)
		slices.SortFunc(s, compareEndpoints)
		return slices.Compact(s)
	}
	return slices.Equal(sorted(a), sorted(b))
}

func TestCoreConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{
			t: t, now: time.Unix(1e9, 0), rand: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1)),
			nodes: map[int]*core{}, clock: map[int]uint64{}, sees: map[int]map[int]bool{},
			truth: map[int][]weft.Endpoint{}, ever: map[int][][]weft.Endpoint{},
		}
		for n := range worldSize {
			w.start(n, 100)
		}
		node := rapid.IntRange(0, worldSize-1)
		t.Repeat(map[string]func(*rapid.T){
			"publish": func(t *rapid.T) {
				if n := node.Draw(t, "node"); w.nodes[n] != nil {
					var e []weft.Endpoint
					for _, i := range rapid.SliceOfN(rapid.IntRange(0, 5), 0, 3).Draw(t, "entries") {
						e = append(e, endpoint(i))
					}
					w.publish(n, e)
				}
			},
			"deliver": func(t *rapid.T) {
				if len(w.wire) > 0 { // any letter: reorder; kept: repeat
					w.deliver(rapid.IntRange(0, len(w.wire)-1).Draw(t, "letter"), rapid.Bool().Draw(t, "repeat"))
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
					w.post(n, c.tick(w.now, w.rand))
					w.post(n, c.announce())
				}
			},
		})
		w.settle()
		w.check()
	})
}

func TestCoreTable(t *testing.T) {
	now := time.Unix(1e9, 0)
	a, b := nodeID(1), nodeID(2)
	c := newCore(a, 7)
	c.setLive(now, []weft.ID{a, b})
	full := &table{stamp{3, 1}, []weft.Endpoint{endpoint(1)}}
	c.receive(now, b, full)

	if out := c.receive(now, b, &table{stamp{3, 1}, nil}); out != nil || c.stale != 1 || c.peers[b].table != full {
		t.Error("a table of the same stamp replaces the first")
	}
	c.changed = false
	c.setLive(now, []weft.ID{a})
	if !c.changed || c.peers[b].live {
		t.Error("a dead owner's entries stay in sight")
	}
	c.setLive(now, []weft.ID{b, a, b})
	if !c.peers[b].live || c.peers[b].table != full {
		t.Error("a false alarm costs the table")
	}
	c.receive(now, b, &table{stamp{4, 1}, nil})
	if len(c.peers[b].table.entries) != 0 {
		t.Error("a new life does not replace the old one's entries")
	}
	c.setLive(now, nil)
	c.tick(now.Add(forgetAfter), rand.New(rand.NewPCG(1, 1)))
	if len(c.peers) != 0 {
		t.Error("a dead owner is never forgotten")
	}
	c.receive(now, a, &table{stamp{99, 9}, []weft.Endpoint{endpoint(3)}})
	if len(c.own.entries) != 0 {
		t.Error("someone else wrote the own table")
	}
}

// A node whose clock went back, or stood still, overcomes its former life.
func TestCoreFormerLife(t *testing.T) {
	a, b := nodeID(1), nodeID(2)
	for name, clock := range map[string]uint64{"clock went back": 50, "clock stood still": 100, "clock went on": 101} {
		for life := range uint64(2) { // the random part above and below the former
			t.Run(fmt.Sprintf("%s, life %d", name, life*2), func(t *testing.T) {
				w := &world{nodes: map[int]*core{2: newCore(b, makeEpoch(100, 1))}, now: testEpoch}
				other := w.nodes[2]
				other.setLive(w.now, []weft.ID{a})
				for i := range uint64(3) {
					other.receive(w.now, a, &table{stamp{makeEpoch(100, 1), i + 1}, []weft.Endpoint{endpoint(int(i))}})
				}
				w.nodes[1] = newCore(a, makeEpoch(clock, life*2))
				w.sees = map[int]map[int]bool{1: {}, 2: {}}
				w.truth, w.ever = map[int][]weft.Endpoint{}, map[int][][]weft.Endpoint{}
				w.setLive(1, 2, true)
				w.publish(1, []weft.Endpoint{endpoint(9)})
				w.post(2, other.tick(w.now, rand.New(rand.NewPCG(1, 1))))
				for len(w.wire) > 0 {
					w.deliver(0, false)
				}
				if got := other.peers[a].table.entries; len(got) != 1 || got[0] != endpoint(9) {
					t.Errorf("the other shows %v at %v; own stamp %v", got, other.peers[a].stamp(), w.nodes[1].own.stamp)
				}
			})
		}
	}
}

// What a node learns of a third one it asks that one for.
func TestCoreVector(t *testing.T) {
	a, b, x := nodeID(1), nodeID(2), nodeID(3)
	c := newCore(a, 1)
	c.setLive(testEpoch, []weft.ID{b, x})
	c.write([]weft.Endpoint{endpoint(1)})
	c.flush()
	c.receive(testEpoch, x, &table{stamp{5, 5}, nil})
	show := func(m message) (s string) {
		for _, e := range c.receive(testEpoch, b, m) {
			s += fmt.Sprintf("%T to %d;", e.m, number(e.to[0]))
		}
		return s
	}
	cases := []struct {
		name string
		m    message
		want string
	}{
		{"all equal", &vector{true, []vectorItem{{a, c.own.stamp}, {x, stamp{5, 5}}}}, ""},
		{"third is newer there", &vector{true, []vectorItem{{a, c.own.stamp}, {x, stamp{5, 6}}}}, "gossip.want to 3;"},
		{"third is older there", &vector{true, []vectorItem{{a, c.own.stamp}, {x, stamp{5, 4}}}}, "*gossip.vector to 2;"},
		{"and no answer is asked for", &vector{false, []vectorItem{{a, c.own.stamp}, {x, stamp{5, 4}}}}, ""},
		{"own is older there", &vector{true, []vectorItem{{x, stamp{5, 5}}}}, "*gossip.table to 2;"},
		{"a stranger", &vector{true, []vectorItem{{a, c.own.stamp}, {x, stamp{5, 5}}, {nodeID(7), stamp{1, 1}}}}, ""},
		{"have is newer", have{stamp{1, 1}}, "gossip.want to 2;"},
		{"have is nothing", have{}, ""},
		{"equal digest", digest{stamp{}, c.hashTables(b), 0}, ""},
		{"other digest", digest{stamp{}, 1, 0}, "*gossip.vector to 2;"},
		{"want what is there", want{c.own.stamp}, ""},
		{"want anything", want{}, "*gossip.table to 2;"},
	}
	for _, k := range cases {
		t.Run(k.name, func(t *testing.T) {
			if got := show(k.m); got != k.want {
				t.Errorf("%q, want %q", got, k.want)
			}
		})
	}
}

func TestCoreSendsOnlyChanges(t *testing.T) {
	c := newCore(nodeID(1), 1)
	c.setLive(time.Unix(1e9, 0), []weft.ID{nodeID(2)})
	c.write([]weft.Endpoint{endpoint(2), endpoint(1)})
	c.write([]weft.Endpoint{endpoint(1), endpoint(2)})
	if out := c.flush(); len(out) != 1 || c.own.stamp.counter != 1 {
		t.Errorf("two equal writes make %d messages and version %d, want one of each", len(out), c.own.stamp.counter)
	}
	c.write([]weft.Endpoint{endpoint(1), endpoint(2), endpoint(1)})
	if out := c.flush(); out != nil {
		t.Errorf("an unchanged set is sent again: %v", out)
	}
}
