package gossip

import (
	"bytes"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// drawRegular are entries as a cluster has them: of services with slots, and
// addresses that follow the slots but for a few.
func drawRegular(t *rapid.T, network weft.ID) (out []weft.Endpoint) {
	for s := range rapid.IntRange(0, 5).Draw(t, "services") {
		addr := rapid.Uint32().Draw(t, "address")
		for range rapid.IntRange(0, 4).Draw(t, "tasks") {
			slot := rapid.Uint64Range(0, 1000).Draw(t, "slot")
			addr += uint32(rapid.IntRange(-2, 2).Draw(t, "step"))
			out = append(out, weft.Endpoint{
				Network: network, Task: packed(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "task")).id(), Service: netID(s), Slot: slot,
				State: weft.EndpointReady, Addr: fromUint32(addr + uint32(slot)),
			})
		}
	}
	slices.SortFunc(out, compareEntries)
	return slices.Compact(out)
}

// TestKept: what is kept of several tables with one dictionary is what came, for
// readers and on the wire, also by a copy of the dictionary that it has outgrown.
func TestKept(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names, k := newDictionary(), new(keeper)
		type told struct {
			wire    []byte
			entries []weft.Endpoint
			kept    kept
			then    services
		}
		var all []told
		for range rapid.IntRange(1, 4).Draw(t, "tables") {
			draw := drawRegular
			if rapid.Bool().Draw(t, "odd") {
				draw = drawEntries
			}
			entries := draw(t, netID(0))
			wire := appendEntries(nil, entries)
			d := &decoder{b: wire}
			got, n := k.keep(d, netID(0), names)
			if d.end() != nil || n != len(entries) {
				t.Fatalf("%d of %d entries are kept: %v", n, len(entries), d.err)
			}
			all = append(all, told{wire, entries, got, names.frozen()})
		}
		for _, a := range all {
			for _, n := range []services{a.then, names.services} {
				if got := a.kept.entries(netID(0), len(a.entries), n); !slices.Equal(got, a.entries) {
					t.Fatalf("%v became %v", a.entries, got)
				}
				if got := a.kept.appendWire(nil, n); !bytes.Equal(got, a.wire) {
					t.Fatalf("%x became %x", a.wire, got)
				}
			}
		}
	})
}

// TestKeptRefusesSecondForms: of each set there is one form.
func TestKeptRefusesSecondForms(t *testing.T) {
	task := func(n byte) weft.ID { return packed{15: n}.id() }
	e := func(service, n byte) weft.Endpoint {
		return weft.Endpoint{Network: netID(0), Service: netID(int(service)), Task: task(n), State: weft.EndpointReady, Addr: fromUint32(uint32(n))}
	}
	general := appendGeneral([]byte{1}, []weft.Endpoint{e(1, 1)})
	for name, wire := range map[string][]byte{
		"services not in order": appendEntries(nil, []weft.Endpoint{e(2, 1), e(1, 2)}),
		"tasks not in order":    appendEntries(nil, []weft.Endpoint{e(1, 2), e(1, 1)}),
		"an entry twice":        appendEntries(nil, []weft.Endpoint{e(1, 1), e(1, 1)}),
		"plain as general":      append(append(appendID([]byte{1}, netID(1)), 1<<groupShift|groupGeneral), general[1:]...),
		"a general head with a state": func() []byte {
			b := appendEntries(nil, []weft.Endpoint{{Network: netID(0), Service: netID(1), Task: "text", Addr: netip.MustParseAddr("fd00::1")}})
			b[1+1+len(netID(1))] |= 1
			return b
		}(),
		"a state that is none": func() []byte {
			b := appendEntries(nil, []weft.Endpoint{e(1, 1)})
			b[1+1+len(netID(1))] |= 3
			return b
		}(),
	} {
		d := &decoder{b: wire}
		if got, n := new(keeper).keep(d, netID(0), newDictionary()); d.err == nil || n != 0 || got.size() != 0 {
			t.Errorf("%s: %d entries are taken, %v", name, n, d.err)
		}
	}
}

// TestBits: numbers come back in any code, in as many bits as its comment says, and
// the best code is that of the fewest.
func TestBits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		numbers := rapid.SliceOf(rapid.Custom(func(t *rapid.T) uint64 {
			return rapid.Uint64().Draw(t, "n") >> rapid.IntRange(0, 63).Draw(t, "shift")
		})).Draw(t, "numbers")
		var lengths [65]int
		for _, v := range numbers {
			lengths[bits.Len64(v)]++
		}
		size := func(k uint) int {
			w := &bitWriter{}
			w.reset()
			for _, v := range numbers {
				w.number(v, k)
			}
			return int(w.at)
		}
		best := bestCode(&lengths)
		for k := range uint(64) {
			if size(k) < size(best) {
				t.Fatalf("%v: %d bits in code %d, %d in %d", numbers, size(best), best, size(k), k)
			}
			w, want := &bitWriter{}, 0
			w.reset()
			for i, v := range numbers {
				w.number(v, k)
				want += 1 + int(k) + max(0, 2*(bits.Len64(v)-int(k))-1)
				w.head(uint64(i % 8))
				if want++; i%8 > 0 {
					want += 3
				}
			}
			if got := int(w.at); got != want {
				t.Fatalf("%v take %d bits in code %d, want %d", numbers, got, k, want)
			}
			r := &bitReader{b: append(w.end(), make([]byte, 8)...)}
			for i, v := range numbers {
				if got := r.number(k); got != v {
					t.Fatalf("%d became %d in code %d", v, got, k)
				}
				if got := r.head(); got != uint64(i%8) {
					t.Fatalf("head %d became %d", i%8, got)
				}
			}
		}
	})
}

// TestDictionary: against a map.
func TestDictionary(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, twin := newDictionary(), map[weft.ID]int{}
		for i, draw := range rapid.SliceOf(rapid.IntRange(0, 50)).Draw(t, "ids") {
			id := netID(draw) // of text
			if draw%2 == 0 {
				id = packed{15: byte(draw)}.id() // also the one of zero
			}
			want, ok := twin[id]
			if !ok {
				want = len(twin)
				twin[id] = want
			}
			before := n.frozen()
			got := n.number((&decoder{b: appendID(nil, id)}).serviceID(), uint32(i))
			if out := n.appendID(nil, got); !bytes.Equal(out, appendID(nil, id)) {
				t.Fatalf("%s is %x on the wire", id, out)
			}
			if got != want || n.ids[got] != id || !ok && n.bases[got] != uint32(i) {
				t.Fatalf("%s is number %d, want %d", id, got, want)
			}
			if len(before.ids) > got && before.ids[got] != id {
				t.Fatalf("a copy changed")
			}
		}
	})
}

// TestInPieces: both pieces are what was given, and the allocator gives little more.
func TestInPieces(t *testing.T) {
	for n := range 70_000 {
		if n > 5000 && n%37 != 0 {
			continue
		}
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i * 7)
		}
		k := inPieces(b)
		if k.first+k.rest != string(b) {
			t.Fatalf("%d bytes have changed", n)
		}
		room := 0
		for _, p := range []string{k.first, k.rest} {
			if p != "" {
				room += cap(slices.Grow([]byte(nil), len(p)))
			}
		}
		if waste := room - n; waste > max(spareBytes, n/24) {
			t.Errorf("%d bytes take %d (in %d and %d)", n, room, len(k.first), len(k.rest))
		}
	}
}

// TestKeptIsSmall: what an entry takes that has nothing surprising but its task's
// name: of a service with one task on each owner, in any order of the slots.
func TestKeptIsSmall(t *testing.T) {
	entries := scattered(1000)
	names, k := newDictionary(), new(keeper)
	for round := range 2 {
		d := &decoder{b: appendEntries(nil, entries)}
		kept, _ := k.keep(d, netID(0), names)
		per := float64(kept.size()) / float64(len(entries))
		t.Logf("table %d: %.2f B for each entry, %.1f on the wire", round, per, float64(len(appendEntries(nil, entries)))/float64(len(entries)))
		if per >= 18 {
			t.Error("want less than 18 B")
		}
	}
}

// TestTables: against a map.
func TestTables(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ts, twin := newTables(), map[weft.ID]*table{}
		for range rapid.IntRange(0, 100).Draw(t, "steps") {
			id := nodeID(rapid.IntRange(0, 20).Draw(t, "owner"))
			if rapid.Bool().Draw(t, "remove") {
				ts.remove(id)
				delete(twin, id)
			} else {
				twin[id] = &table{owner: &peer{id: id}}
				ts.set(twin[id])
			}
			for n := range 21 {
				if id := nodeID(n); ts.get(id) != twin[id] {
					t.Fatalf("another table of %s", id)
				}
			}
			if got := maps.Collect(ts.all()); !maps.Equal(got, twin) || ts.len() != len(twin) || !slices.Equal(ts.owners(), slices.Sorted(maps.Keys(twin))) {
				t.Fatalf("%d tables, want %d", ts.len(), len(twin))
			}
		}
	})
}
