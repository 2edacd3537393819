package gossip

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// flagUpdate writes a golden file that does not exist yet; one that does is of
// a released version and never changes.
var flagUpdate = flag.Bool("update", false, "write missing golden files")

type goldenMessage struct {
	name string
	m    message
}

// goldenBodies are one of each kind, by what they are in.
func goldenBodies() []goldenMessage {
	v6, dual := endpoint(4), endpoint(5)
	v6.Addr, v6.Service = netip.MustParseAddr("fd00:1::4"), ""
	dual.Addr6 = netip.MustParseAddr("fd00:1::5")
	plain := []weft.Endpoint{endpoint(0), endpoint(15)}
	mixed := []weft.Endpoint{v6, endpoint(0), dual}
	slices.SortFunc(mixed, compareEntries)
	proof := []byte(strings.Repeat("p", proofBytes))
	wrap := func(network weft.ID, b body) *update {
		return &update{0, network, nodeID(1), stamp{300 << lifeBits, 2}, 0, 1, b.encode()}
	}
	return []goldenMessage{
		{"whole", wrap(netID(0), body{proof, bodyWhole, stamp{}, appendEntries(nil, plain)})},
		{"whole of two families", wrap(netID(0), body{proof, bodyWhole, stamp{}, appendEntries(nil, mixed)})},
		{"empty", wrap(netID(0), body{proof, bodyWhole, stamp{}, appendEntries(nil, nil)})},
		{"delta", wrap(netID(0), body{proof, bodyDelta, stamp{300 << lifeBits, 1}, step{[]weft.ID{endpoint(6).Task}, plain}.append(nil)})},
		{"attachment", wrap("", body{proof, bodyAttached, stamp{}, attachment{[]weft.ID{netID(0), "184we53pbjbz0yji4fobowqhl"}, []byte("certificate")}.encode()})},
	}
}

func goldenMessages() []goldenMessage {
	stamps := []netStamps{{"", 7, []ownerStamp{{nodeID(1), stamp{7, 8}}}}, {netID(1), 0, []ownerStamp{}}}
	return append(goldenBodies(), []goldenMessage{
		{"part", &update{1, netID(0), nodeID(1), stamp{7, 8}, 1, 3, []byte("part of a body")}},
		{"have", &have{false, stamps}},
		{"full have", &have{true, stamps}},
		{"want", &want{stamps}},
		{"cold", cold{0x0102030405060708, 0x11121314}},
		{"done", done{}},
		{"knock", knock{}},
		{"knocked", knocked{}},
	}...)
}

func TestGoldenFrames(t *testing.T) { testGolden(t, "testdata/frames-v2.txt", goldenMessages()) }

// TestGoldenWatch: kinds that version 2 got later; older builds count them as malformed.
func TestGoldenWatch(t *testing.T) {
	testGolden(t, "testdata/frames-v2-watch.txt", []goldenMessage{{"doubt", doubt{nodeID(2), 400 * time.Millisecond}}, {"vouch", vouch{nodeID(2)}},
		{"knock with number", knock{7}}, {"knocked with number", knocked{0x1234}}})
}

// TestVersionOneIsRefused: builds of before the first release spoke version 1;
// what is in their golden files is dropped, and counts as foreign.
func TestVersionOneIsRefused(t *testing.T) {
	for _, file := range []string{"testdata/frames-v1.txt", "testdata/frames-v1-dual.txt"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		o, frames := knowing(t, testKey(), nodeID(1)), 0
		for line := range strings.Lines(string(b)) {
			text, ok := strings.CutPrefix(strings.TrimSpace(line), "frame ")
			if !ok {
				continue
			}
			frames++
			frame, err := hex.DecodeString(text)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := o.open(frame); !errors.Is(err, errForeign) {
				t.Errorf("%s: %v", file, err)
			}
		}
		if frames == 0 {
			t.Errorf("%s has no frames", file)
		}
	}
}

// knowing is an opener that reads frames of these members.
func knowing(t testing.TB, key []byte, ids ...weft.ID) *opener {
	o := newOpener(key)
	if err := o.know(ids); err != nil {
		t.Fatal(err)
	}
	return o
}

func testGolden(t *testing.T, file string, messages []goldenMessage) {
	var b strings.Builder
	s, err := newLivedSealer(testKey(), [lifeBytes]byte([]byte("a life")), nodeID(1))
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range messages {
		fmt.Fprintf(&b, "%s\n plain %x\n frame %x\n", g.name, encode(nil, g.m), s.seal(g.m))
	}
	want, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) && *flagUpdate {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("version 2 of the format has changed; make it version 3. Got:\n%s", b.String())
	}
	// Frames of the file are read, whatever we write today.
	o, i := knowing(t, testKey(), nodeID(1)), 0
	for line := range strings.Lines(string(want)) {
		text, ok := strings.CutPrefix(strings.TrimSpace(line), "frame ")
		if !ok {
			continue
		}
		frame, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		from, m, err := o.open(frame)
		if g := messages[i]; err != nil || from != nodeID(1) || !reflect.DeepEqual(m, g.m) {
			t.Errorf("%s of the golden file: %s, %+v, %v", g.name, from, m, err)
		}
		i++
	}
}

func TestOpenRefuses(t *testing.T) {
	s, err := newSealer(testKey(), nodeID(1))
	if err != nil {
		t.Fatal(err)
	}
	frame := s.seal(&have{})
	change := func(fn func(b []byte)) []byte {
		b := bytes.Clone(frame)
		fn(b)
		return b
	}
	other := hashSender(nodeID(2))
	cases := []struct {
		name  string
		frame []byte
		key   []byte
		want  error
	}{
		{"whole", frame, testKey(), nil},
		{"empty", nil, testKey(), errShort},
		{"header only", frame[:frameOverhead], testKey(), errShort},
		{"cut off", frame[:len(frame)-1], testKey(), errUnauthentic},
		{"one byte more", append(bytes.Clone(frame), 0), testKey(), errUnauthentic},
		{"other magic", change(func(b []byte) { b[0] = 0 }), testKey(), errForeign},
		{"other version", change(func(b []byte) { b[1] = 3 }), testKey(), errForeign},
		{"sender is no member", change(func(b []byte) { b[2]++ }), testKey(), errUnknown},
		{"another sender", change(func(b []byte) { copy(b[2:], other[:]) }), testKey(), errUnauthentic},
		{"another life", change(func(b []byte) { b[2+senderBytes]++ }), testKey(), errUnauthentic},
		{"another number", change(func(b []byte) { b[headerBytes-1]++ }), testKey(), errUnauthentic},
		{"changed text", change(func(b []byte) { b[headerBytes]++ }), testKey(), errUnauthentic},
		{"another key", frame, make([]byte, weft.GossipKeyBytes), errUnauthentic},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, _, err := knowing(t, c.key, nodeID(1), nodeID(2)).open(c.frame); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	// Authentic nonsense is told apart.
	if _, _, err := knowing(t, testKey(), nodeID(1)).open(s.sealBytes([]byte{99})); err == nil || errors.Is(err, errUnauthentic) || errors.Is(err, errForeign) {
		t.Errorf("unknown kind: %v", err)
	}
}

// TestReplaysAreRefused: against a twin that remembers everything, no frame is
// taken twice, and none that is less than a window late is lost.
func TestReplaysAreRefused(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		o := knowing(t, testKey(), nodeID(1))
		var frames [][]byte
		for range 3 { // lives
			s, err := newSealer(testKey(), nodeID(1))
			if err != nil {
				rt.Fatal(err)
			}
			s.number = rapid.Uint64Range(0, 1<<20).Draw(rt, "number")
			for range 5 {
				frames = append(frames, s.seal(knock{}))
				s.number += rapid.Uint64Range(0, 200).Draw(rt, "gap")
			}
		}
		seen := map[int]bool{}
		for _, i := range rapid.SliceOfN(rapid.IntRange(0, len(frames)-1), 1, 40).Draw(rt, "order") {
			_, _, err := o.open(frames[i])
			if seen[i] != errors.Is(err, errReplayed) || !seen[i] && err != nil {
				rt.Fatalf("frame %d, seen before: %v; %v", i, seen[i], err)
			}
			seen[i] = true
		}
	})
	var w window
	if !w.first(5000) || w.first(5000-windowBits) || !w.first(5001-windowBits) {
		t.Error("a frame that is too old to know is taken, or one that is not is refused")
	}
}

func TestNoncesDiffer(t *testing.T) {
	seen := map[string]bool{}
	for range 3 { // lives
		s, err := newSealer(testKey(), nodeID(1))
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			h := string(s.seal(knock{})[:headerBytes])
			if seen[h] {
				t.Fatal("a key is used twice with one nonce")
			}
			seen[h] = true
		}
	}
}

func drawID(t *rapid.T) weft.ID {
	if rapid.Bool().Draw(t, "real") {
		return packed(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id")).id()
	}
	return weft.ID(rapid.StringN(0, 12, maxIDBytes).Draw(t, "text"))
}

func drawEntries(t *rapid.T, network weft.ID) (out []weft.Endpoint) {
	for range rapid.IntRange(0, 8).Draw(t, "entries") {
		e := weft.Endpoint{Network: network, Task: drawID(t), Slot: rapid.Uint64().Draw(t, "slot"), State: weft.EndpointState(rapid.IntRange(0, 2).Draw(t, "state"))}
		e.Service = netID(rapid.IntRange(0, 3).Draw(t, "service"))
		e.Addr = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "v4")))
		if rapid.IntRange(0, 4).Draw(t, "is6") == 0 {
			e.Addr = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "v6"))).Unmap()
		}
		if e.Addr.Is4() && rapid.IntRange(0, 4).Draw(t, "dual") == 0 {
			e.Addr6 = netip.AddrFrom16([16]byte(append([]byte{0xfd}, rapid.SliceOfN(rapid.Byte(), 15, 15).Draw(t, "second")...)))
		}
		out = append(out, e)
	}
	slices.SortFunc(out, compareEntries)
	return slices.Compact(out)
}

func drawMessage(t *rapid.T) message {
	st := stamp{rapid.Uint64().Draw(t, "epoch"), rapid.Uint64().Draw(t, "counter")}
	nets := func() []netStamps {
		out := []netStamps{}
		for range rapid.IntRange(0, 3).Draw(t, "nets") {
			n := netStamps{drawID(t), rapid.Uint64().Draw(t, "hash"), []ownerStamp{}}
			for range rapid.IntRange(0, 3).Draw(t, "items") {
				n.items = append(n.items, ownerStamp{drawID(t), st})
			}
			out = append(out, n)
		}
		return out
	}
	switch rapid.IntRange(0, 3).Draw(t, "kind") {
	case 0:
		parts := rapid.Uint64Range(1, maxParts).Draw(t, "parts")
		return &update{uint8(rapid.IntRange(0, noTree).Draw(t, "tree")), drawID(t), drawID(t), st, rapid.Uint64Range(0, parts-1).Draw(t, "part"), parts,
			rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "body")}
	case 1:
		return &have{rapid.Bool().Draw(t, "full"), nets()}
	case 2:
		return &want{nets()}
	}
	return cold{rapid.Uint64().Draw(t, "tables"), rapid.Uint32().Draw(t, "live")}
}

// TestPackIDs: identifiers come back, and their order is that of numbers.
func TestPackIDs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := packed(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "a")), packed(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "b"))
		if back, ok := pack(a.id()); !ok || back != a || !a.id().Valid() {
			t.Fatalf("%x became %s, %x", a, a.id(), back)
		}
		if bytes.Compare(a[:], b[:]) != strings.Compare(string(a.id()), string(b.id())) {
			t.Fatalf("%s and %s are in another order than %x and %x", a.id(), b.id(), a, b)
		}
	})
	if id := weft.NewID(); func() weft.ID { p, _ := pack(id); return p.id() }() != id {
		t.Errorf("%s is lost", id)
	}
	for _, id := range []weft.ID{"", "a", nodeID(1) + "0", "f5lxx1zz5pnorynqglhzmsp34", "zzzzzzzzzzzzzzzzzzzzzzzzz", "0000000000000000000000-00"} {
		if _, ok := pack(id); ok {
			t.Errorf("%q is packed", id)
		}
	}
}

// TestPackEntries: entries come back from the wire.
func TestPackEntries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries := drawEntries(t, netID(0))
		d := &decoder{b: appendEntries(nil, entries)}
		if got := d.entries(netID(0)); d.end() != nil || !slices.Equal(got, entries) {
			t.Fatalf("%v became %v, %v", entries, got, d.err)
		}
	})
}

// TestSteps: the step between two sets leads from one to the other.
func TestSteps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		from, to := drawEntries(t, netID(0)), drawEntries(t, netID(0))
		for _, e := range from {
			if rapid.Bool().Draw(t, "stays") {
				to = append(to, e)
			}
		}
		slices.SortFunc(to, compareEntries)
		to = slices.Compact(to)
		d := &decoder{b: difference(from, to).append(nil)}
		if got := d.step(netID(0)).apply(from); d.end() != nil || !slices.Equal(got, to) {
			t.Fatalf("from %v to %v: %v, %v", from, to, got, d.err)
		}
	})
}

// TestTrees: each tree reaches every member from every root, once, in as many
// hops as its fan-out allows, and inner nodes of one are leaves of the other.
func TestTrees(t *testing.T) {
	for _, n := range []int{1, 2, 3, 9, 10, 50, 200} {
		var members []weft.ID
		for i := range n {
			members = append(members, nodeID(i))
		}
		for _, root := range []int{0, n / 2, n - 1} {
			var inner [noTree]map[weft.ID]bool
			for tree := range uint8(noTree) {
				inner[tree] = map[weft.ID]bool{}
				hops := map[weft.ID]int{nodeID(root): 0}
				for queue := []weft.ID{nodeID(root)}; len(queue) > 0; queue = queue[1:] {
					for _, child := range children(members, nodeID(root), queue[0], tree) {
						if _, twice := hops[child]; twice {
							t.Fatalf("%d members, root %d, tree %d: %s is reached twice", n, root, tree, child)
						}
						hops[child] = hops[queue[0]] + 1
						queue = append(queue, child)
						inner[tree][queue[0]] = queue[0] != nodeID(root)
					}
				}
				if len(hops) != n {
					t.Errorf("%d members, root %d, tree %d: %d are reached", n, root, tree, len(hops))
				}
				for id, h := range hops {
					if h > 3 {
						t.Errorf("%d members: %s is %d hops away", n, id, h)
					}
				}
			}
			for id, is := range inner[0] {
				if is && inner[1][id] {
					t.Errorf("%d members, root %d: %s passes on in both trees", n, root, id)
				}
			}
		}
		for round := range 2 {
			for _, m := range members {
				if got := tellers(members, m, round); n > 1 && (len(got) == 0 || slices.Contains(got, m)) || n > 2 && len(got) != 2 {
					t.Errorf("%d members: %s tells %v in round %d", n, m, got, round)
				}
			}
		}
	}
}

func TestMessageRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMessage(t)
		b := encode(nil, m)
		back, err := decode(b)
		if err != nil || !reflect.DeepEqual(m, back) {
			t.Fatalf("%+v became %+v, %v", m, back, err)
		}
		if _, is := m.(*update); is { // ends where the frame ends
			return
		}
		if _, err := decode(b[:rapid.IntRange(0, len(b)-1).Draw(t, "cut")]); err == nil {
			t.Fatal("a cut-off message is read")
		}
	})
}

// FuzzDecode: what a sender with the key may send can neither crash a node nor
// take memory out of proportion, and what is read is read the same again.
func FuzzDecode(f *testing.F) {
	for _, g := range goldenMessages() {
		f.Add(encode(nil, g.m))
	}
	f.Add([]byte{kindHave, 0, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		if again := encode(nil, m); !bytes.Equal(b, again) {
			t.Fatalf("%x became %x", b, again)
		}
		for _, stream := range []bool{false, true} {
			c := newCore(nodeID(3), 1, unproven{}, rand.New(rand.NewPCG(1, 1)))
			c.attach(testEpoch, []weft.ID{netID(0)})
			c.setLive(testEpoch, []weft.ID{nodeID(1), nodeID(2)})
			c.receive(testEpoch, nodeID(2), m, stream)
			c.advance(testEpoch.Add(time.Second))
		}
	})
}

// FuzzBody: the content of updates.
func FuzzBody(f *testing.F) {
	for _, g := range goldenBodies() {
		f.Add(g.m.(*update).body)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := openBody(b); err != nil {
			return
		}
		for _, network := range []weft.ID{"", netID(0)} {
			c := newCore(nodeID(3), 1, unproven{}, rand.New(rand.NewPCG(1, 1)))
			c.attach(testEpoch, []weft.ID{netID(0)})
			c.setLive(testEpoch, []weft.ID{nodeID(1)})
			seed := func(network weft.ID, s stamp, b body) {
				c.receive(testEpoch, nodeID(1), &update{noTree, network, nodeID(1), s, 0, 1, b.encode()}, true)
			}
			seed("", stamp{1, 1}, body{nil, bodyAttached, stamp{}, attachment{nets: []weft.ID{netID(0)}}.encode()})
			seed(netID(0), stamp{300 << lifeBits, 1}, body{nil, bodyWhole, stamp{}, appendEntries(nil, []weft.Endpoint{endpoint(0)})})
			c.receive(testEpoch, nodeID(1), &update{0, network, nodeID(1), stamp{300 << lifeBits, 2}, 0, 1, b}, false)
			// What was taken is passed on in a form that all take.
			for k := range c.nets {
				if tb := c.nets[k].tables.get(nodeID(1)); tb != nil && k != "" {
					d := &decoder{b: tb.kept.appendWire(nil, c.nets[k].names.services)}
					if _, n := new(keeper).keep(d, k, newDictionary()); d.end() != nil || n != int(tb.count) {
						t.Fatalf("%d, %d entries: %v", n, tb.count, d.err)
					}
				}
			}
		}
	})
}

// FuzzOpen: bytes from anybody, and what a member seals of any: of the first nothing is
// read, of the second what the decoder makes of it, once.
func FuzzOpen(f *testing.F) {
	s, err := newLivedSealer(testKey(), [lifeBytes]byte{}, nodeID(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.seal(knock{}))
	f.Add([]byte{frameMagic, frameVersion})
	for _, g := range goldenMessages() {
		f.Add(encode(nil, g.m))
	}
	o := knowing(f, testKey(), nodeID(1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, m, err := o.open(b); err == nil && m != (knock{}) { // the seed's
			t.Fatalf("%x is read as %+v", b, m)
		}
		frame := s.sealBytes(b)
		from, got, err := o.open(frame)
		want, wantErr := decode(b)
		switch {
		case len(b) == 0:
			if !errors.Is(err, errShort) {
				t.Fatalf("nothing, sealed: %v", err)
			}
			return
		case wantErr != nil:
			if err == nil || errors.Is(err, errUnauthentic) || errors.Is(err, errReplayed) {
				t.Fatalf("%x, sealed: %+v, %v, want %v", b, got, err, wantErr)
			}
		case err != nil || from != nodeID(1) || !reflect.DeepEqual(got, want):
			t.Fatalf("%x, sealed: %+v of %s, %v, want %+v", b, got, from, err, want)
		}
		if _, _, err := o.open(frame); !errors.Is(err, errReplayed) {
			t.Fatalf("%x comes twice: %v", b, err)
		}
	})
}

func BenchmarkOpenTable(b *testing.B) {
	s, err := newSealer(testKey(), nodeID(1))
	if err != nil {
		b.Fatal(err)
	}
	content := appendEntries(nil, manyEntries(0)[:20])
	frame := s.seal(&update{0, netID(0), nodeID(1), stamp{1, 1}, 0, 1, body{nil, bodyWhole, stamp{}, content}.encode()})
	o := knowing(b, testKey(), nodeID(1))
	b.ReportAllocs()
	b.SetBytes(int64(len(frame)))
	for b.Loop() {
		o.senders[hashSender(nodeID(1))][0].lives = nil
		if _, _, err := o.open(frame); err != nil {
			b.Fatal(err)
		}
	}
}
