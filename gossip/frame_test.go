package gossip

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

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

func goldenMessages() []goldenMessage {
	v6 := endpoint(4)
	v6.Addr, v6.Service = netip.MustParseAddr("fd00:1::4"), ""
	return []goldenMessage{
		{"table", &table{stamp{epoch: 300 << lifeBits, counter: 2}, []weft.Endpoint{endpoint(1), endpoint(2), v6}}},
		{"empty table", &table{stamp{1, 1}, []weft.Endpoint{}}},
		{"have", have{stamp{7, 8}}},
		{"want", want{stamp{0, 0}}},
		{"digest", digest{stamp{7, 8}, 0x0102030405060708, 0x1112131415161718}},
		{"vector", &vector{true, []vectorItem{{nodeID(1), stamp{7, 8}}, {nodeID(2), stamp{9, 10}}}}},
		{"knock", knock{}},
		{"knocked", knocked{}},
	}
}

// dualMessages came to version 1 when endpoints got a second address.
func dualMessages() []goldenMessage {
	dual := endpoint(5)
	dual.Addr6 = netip.MustParseAddr("fd00:1::5")
	return []goldenMessage{{"table of two families", &table{stamp{7, 8}, []weft.Endpoint{endpoint(1), dual}}}}
}

func TestGoldenFrames(t *testing.T) {
	testGolden(t, "testdata/frames-v1.txt", goldenMessages())
	testGolden(t, "testdata/frames-v1-dual.txt", dualMessages())
}

func testGolden(t *testing.T, file string, messages []goldenMessage) {
	var b strings.Builder
	salt := []byte("salt-of-16-bytes")
	s, err := newSaltedSealer(testKey(), salt, nodeID(1))
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
		t.Errorf("version 1 of the format has changed; make it version 2. Got:\n%s", b.String())
	}
	// Frames of the file are read, whatever we write today.
	o, i := newOpener(testKey()), 0
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
	frame := s.seal(&table{stamp{1, 1}, []weft.Endpoint{endpoint(1)}})
	change := func(fn func(b []byte)) []byte {
		b := bytes.Clone(frame)
		fn(b)
		return b
	}
	nonsense, err := newSealer(testKey(), nodeID(1))
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name  string
		frame []byte
		key   []byte
		want  error
	}{
		{"whole", frame, testKey(), nil},
		{"repeated", frame, testKey(), nil}, // harmless: its stamp is known
		{"empty", nil, testKey(), errShort},
		{"header only", frame[:frameOverhead], testKey(), errShort},
		{"cut off", frame[:len(frame)-1], testKey(), errUnauthentic},
		{"one byte more", append(bytes.Clone(frame), 0), testKey(), errUnauthentic},
		{"other magic", change(func(b []byte) { b[0] = 0 }), testKey(), errForeign},
		{"other version", change(func(b []byte) { b[1] = 2 }), testKey(), errForeign},
		{"sender is no id", change(func(b []byte) { b[2] = 'A' }), testKey(), errForeign},
		{"another sender", change(func(b []byte) { copy(b[2:], nodeID(2)) }), testKey(), errUnauthentic},
		{"another salt", change(func(b []byte) { b[2+senderBytes]++ }), testKey(), errUnauthentic},
		{"another counter", change(func(b []byte) { b[headerBytes-1]++ }), testKey(), errUnauthentic},
		{"changed text", change(func(b []byte) { b[headerBytes]++ }), testKey(), errUnauthentic},
		{"another key", frame, make([]byte, KeyBytes), errUnauthentic},
	}
	o := newOpener(testKey())
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o.key = c.key
			if !bytes.Equal(c.key, testKey()) {
				o = newOpener(c.key)
			}
			if _, _, err := o.open(c.frame); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	// Authentic nonsense is told apart.
	bad := append(bytes.Clone(nonsense.header[:]), nonsense.aead.Seal(nil, nonceOf(nonsense.header[:]), []byte{99}, nonsense.header[:])...)
	if _, _, err := newOpener(testKey()).open(bad); err == nil || errors.Is(err, errUnauthentic) || errors.Is(err, errForeign) {
		t.Errorf("unknown kind: %v", err)
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

func drawMessage(t *rapid.T) message {
	st := stamp{rapid.Uint64().Draw(t, "epoch"), rapid.Uint64().Draw(t, "counter")}
	id := rapid.Custom(func(t *rapid.T) weft.ID { return weft.ID(rapid.StringN(0, 12, maxIDBytes).Draw(t, "id")) })
	switch rapid.IntRange(0, 2).Draw(t, "kind") {
	case 0:
		m := &table{stamp: st, entries: []weft.Endpoint{}}
		for range rapid.IntRange(0, 5).Draw(t, "entries") {
			e := weft.Endpoint{Network: id.Draw(t, "network"), Task: id.Draw(t, "task"), Service: id.Draw(t, "service"), Slot: rapid.Uint64().Draw(t, "slot"), State: weft.EndpointState(rapid.IntRange(0, 2).Draw(t, "state"))}
			e.Addr = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "v4")))
			if rapid.Bool().Draw(t, "is6") {
				e.Addr = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "v6"))).Unmap()
			}
			if e.Addr.Is4() && rapid.Bool().Draw(t, "dual") {
				e.Addr6 = netip.AddrFrom16([16]byte(append([]byte{0xfd}, rapid.SliceOfN(rapid.Byte(), 15, 15).Draw(t, "second")...)))
			}
			m.entries = append(m.entries, e)
		}
		return m
	case 1:
		m := &vector{reply: rapid.Bool().Draw(t, "reply"), items: []vectorItem{}}
		for range rapid.IntRange(0, 5).Draw(t, "items") {
			m.items = append(m.items, vectorItem{id.Draw(t, "owner"), st})
		}
		return m
	}
	return digest{st, rapid.Uint64().Draw(t, "tables"), rapid.Uint64().Draw(t, "live")}
}

func TestMessageRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMessage(t)
		b := encode(nil, m)
		back, err := decode(b)
		if err != nil || !reflect.DeepEqual(m, back) {
			t.Fatalf("%+v became %+v, %v", m, back, err)
		}
		if _, err := decode(b[:rapid.IntRange(0, len(b)-1).Draw(t, "cut")]); err == nil {
			t.Fatal("a cut-off message is read")
		}
	})
}

// FuzzDecode: what a sender with the key may send can neither crash a node nor
// take memory out of proportion, and what is read is read the same again.
func FuzzDecode(f *testing.F) {
	for _, g := range append(goldenMessages(), dualMessages()...) {
		f.Add(encode(nil, g.m))
	}
	f.Add([]byte{kindTable, 1, 1, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		again, err := decode(encode(nil, m))
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v became %+v, %v", m, again, err)
		}
		c := newCore(nodeID(1), 1)
		c.receive(testEpoch, nodeID(2), m)
	})
}

// FuzzOpen: bytes from anybody.
func FuzzOpen(f *testing.F) {
	s, err := newSaltedSealer(testKey(), make([]byte, saltBytes), nodeID(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.seal(knock{}))
	f.Add([]byte{frameMagic, frameVersion})
	o := newOpener(testKey())
	f.Fuzz(func(_ *testing.T, b []byte) { o.open(b) })
}

func BenchmarkOpenTable(b *testing.B) {
	s, err := newSealer(testKey(), nodeID(1))
	if err != nil {
		b.Fatal(err)
	}
	frame, o := s.seal(&table{stamp{1, 1}, endpoints(20)}), newOpener(testKey())
	b.ReportAllocs()
	b.SetBytes(int64(len(frame)))
	for b.Loop() {
		if _, _, err := o.open(frame); err != nil {
			b.Fatal(err)
		}
	}
}
