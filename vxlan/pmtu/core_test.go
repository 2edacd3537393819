package pmtu

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

var (
	peerA = netip.MustParseAddr("10.99.0.2")
	peerB = netip.MustParseAddr("fd99::3")
)

func testCore() *core {
	id := uint64(0)
	return newCore(func() uint64 { id++; return id })
}

// TestCoreMatchesAnswers: only the answer to what was sent, and to the search that
// is under way, is believed.
func TestCoreMatchesAnswers(t *testing.T) {
	now := time.Unix(1000, 0)
	probe := func(c *core) frame {
		out := c.step(now)
		if len(out) != 1 || out[0].to != peerA || out[0].kind != kindProbe || out[0].size != 9000 {
			t.Fatalf("sent %v, want one probe of 9000 bytes", out)
		}
		return out[0].frame
	}
	for name, spoil := range map[string]func(c *core, f *frame){
		"right":         func(*core, *frame) {},
		"another id":    func(_ *core, f *frame) { f.id++ },
		"another size":  func(_ *core, f *frame) { f.size-- },
		"a past search": func(c *core, _ *frame) { c.limit(now, peerA, 8000); c.step(now) },
		"after patience": func(c *core, _ *frame) {
			c.paths[peerA].due = now.Add(time.Hour)
			c.step(now.Add(patience + 1))
		},
		"refused by the kernel": func(c *core, f *frame) { c.refused(f.id) },
	} {
		c := testCore()
		c.watch(now, []netip.Addr{peerA, peerB})
		c.limit(now, peerA, 9000)
		f := probe(c)
		spoil(c, &f)
		c.answered(now, f)
		want := assumed
		if name == "right" {
			want = 9000
		}
		if got := c.mtus()[peerA]; got != want {
			t.Errorf("%s: MTU %d, want %d", name, got, want)
		}
	}
}

// TestCoreTellsPeers: when our own link changes the peer is told to look, too,
// and what is told of a path is told once.
func TestCoreTellsPeers(t *testing.T) {
	now := time.Unix(1000, 0)
	c := testCore()
	c.watch(now, []netip.Addr{peerA})
	if len(c.step(now)) != 0 || len(c.mtus()) != 0 {
		t.Fatal("something is known of a path whose route was not read")
	}
	c.limit(now, peerA, 1500)
	if n := c.news(); len(n) != 1 || n[0] != (change{peer: peerA, mtu: 1500, cap: 1500}) || len(c.news()) != 0 {
		t.Errorf("news = %v", n)
	}
	if out := c.step(now); len(out) != 1 {
		t.Fatalf("sent %v at first, want one probe", out)
	}
	c.limit(now, peerA, 1280)
	told := 0
	for range 20 {
		for _, k := range c.step(c.next()) {
			if k.kind == kindAgain {
				told++
			}
		}
	}
	if told != hints {
		t.Errorf("the peer was told %d times, want %d", told, hints)
	}
	if n := c.news(); len(n) != 1 || n[0].mtu != 1280 {
		t.Errorf("news = %v, want 1280", n)
	}
	c.watch(now, nil)
	if len(c.mtus()) != 0 || !c.next().IsZero() {
		t.Error("a peer that is not watched is not forgotten")
	}
}

// ringOf is a ring of keys, the first of which sends.
func ringOf(keys ...string) weft.GossipRing {
	var all []weft.GossipKey
	for i, k := range keys {
		all = append(all, weft.GossipKey{Epoch: uint64(i), Key: []byte(k)})
	}
	return weft.GossipRing{Sends: all[0], Reads: all[1:]}
}

// TestFrameIsStable: the format of version 1 does not change.
func TestFrameIsStable(t *testing.T) {
	s, err := newSigner(ringOf("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	const golden = "f801010005dc00000102030405060708"
	f := frame{kind: kindProbe, size: 1500, id: 0x0102030405060708}
	b := s.marshal(f, 40)
	if len(b) != 40 || hex.EncodeToString(b[:signedBytes]) != golden {
		t.Errorf("frame is %x, want %s and the MAC, 40 bytes", b, golden)
	}
	const mac = "e4ae3bc8c48f19c175f2ac7aa7bec349"
	if got := hex.EncodeToString(b[signedBytes:headerBytes]); got != mac {
		t.Errorf("MAC is %s, want %s", got, mac)
	}
	if got, ok := s.parse(b); !ok || got != f {
		t.Errorf("parse: %v %v, want %v", got, ok, f)
	}
	if got := s.marshal(frame{kind: kindAnswer}, 0); len(got) != headerBytes {
		t.Errorf("an answer has %d bytes, want %d", len(got), headerBytes)
	}
}

// TestFrameOfEachKey: while keys change, probes of nodes that send by either are
// answered, each by the key that its receiver sends by.
func TestFrameOfEachKey(t *testing.T) {
	f := frame{kind: kindProbe, size: 1500, id: 7}
	for _, c := range []struct {
		from, to weft.GossipRing
		want     bool
	}{
		{ringOf("a"), ringOf("a", "b"), true}, {ringOf("a", "b"), ringOf("b", "a"), true}, {ringOf("b", "a"), ringOf("a", "b"), true},
		{ringOf("b"), ringOf("b", "a"), true}, {ringOf("a"), ringOf("b"), false}, {ringOf("b", "a"), ringOf("a"), false},
	} {
		from, err := newSigner(c.from)
		if err != nil {
			t.Fatal(err)
		}
		to, err := newSigner(c.to)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := to.parse(from.marshal(f, 40)); ok != c.want || ok && got != f {
			t.Errorf("made by %s, read by %s: %v", c.from.Sends.Key, c.to.Sends.Key, ok)
		}
	}
}

// TestFrameIsAuthentic: no change of a header passes, nor another key; padding is
// free.
func TestFrameIsAuthentic(t *testing.T) {
	s, err := newSigner(ringOf("key"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := newSigner(ringOf("kez"))
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		f := frame{kind(rapid.IntRange(1, 3).Draw(t, "kind")), rapid.IntRange(0, 65535).Draw(t, "size"), rapid.Uint64().Draw(t, "id")}
		b := s.marshal(f, rapid.IntRange(0, 100).Draw(t, "length"))
		if got, ok := s.parse(b); !ok || got != f {
			t.Fatalf("parse: %v %v, want %v", got, ok, f)
		}
		if _, ok := other.parse(b); ok {
			t.Fatal("another key is accepted")
		}
		if _, ok := s.parse(b[:rapid.IntRange(0, headerBytes-1).Draw(t, "cut")]); ok {
			t.Fatal("half a header is accepted")
		}
		c := bytes.Clone(b)
		c[rapid.IntRange(0, headerBytes-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		if _, ok := s.parse(c); ok {
			t.Fatalf("%x is accepted for %x", c, b)
		}
	})
}

// FuzzReceive: bytes from anybody say nothing; what a member signs of any is read as it
// stands there, and answered if it is a probe that came whole.
func FuzzReceive(f *testing.F) {
	s, err := newSigner(ringOf("key", "old"))
	if err != nil {
		f.Fatal(err)
	}
	for k := range kindAgain + 2 {
		f.Add(s.marshal(frame{k, 1500, 7}, 1500-headers(peerA)), true)
		f.Add(s.marshal(frame{k, 1500, 7}, 0), false)
	}
	f.Add([]byte{Magic, version, byte(kindProbe)}, true)
	f.Add(append([]byte{Magic, version, byte(kindAnswer), 0, 0, 0, 0, 1}, make([]byte, headerBytes)...), true)
	f.Fuzz(func(t *testing.T, b []byte, sign bool) {
		_, was := s.parse(b)
		if sign && len(b) >= headerBytes {
			b = bytes.Clone(b)
			copy(b[signedBytes:], mac(s.keys[1], b[:signedBytes]))
		}
		got, ok := s.parse(b)
		if was && !ok {
			t.Fatalf("%x is no frame when it is signed by another key of the ring", b)
		}
		c := testCore()
		c.watch(time.Unix(1000, 0), []netip.Addr{peerA, peerB})
		c.step(time.Unix(1000, 0))
		p := &Prober{core: c, wake: make(chan struct{}, 1)}
		p.sign.Store(&s)
		answer := p.Receive(netip.AddrPortFrom(peerA, 7946), b)
		if !ok {
			if answer != nil || len(p.wake) > 0 {
				t.Fatalf("%x is no frame, and is answered", b)
			}
			return
		}
		again := s.marshal(got, len(b))
		if !bytes.Equal(again[:signedBytes], b[:signedBytes]) {
			t.Fatalf("%x became %x", b, again)
		}
		isWhole := got.kind == kindProbe && len(b)+headers(peerA) == got.size
		if (answer != nil) != isWhole || len(p.wake) > 0 != (got.kind == kindAgain) {
			t.Fatalf("%+v of %d bytes is answered by %x, wakes: %v", got, len(b), answer, len(p.wake) > 0)
		}
		if answer != nil {
			if a, ok := s.parse(answer); !ok || a != (frame{kindAnswer, got.size, got.id}) || len(answer) > len(b) {
				t.Fatalf("%+v is answered by %d bytes: %+v", got, len(answer), a)
			}
		}
		c.answered(time.Unix(1001, 0), got)
		c.step(time.Unix(1001, 0))
	})
}
