package dns

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// quick answers a packet as the loop does; nil = it is left to respond.
func quick(snap *Snapshot, v *view, packet []byte, turn uint64) []byte {
	var q plainQuery
	var sc scope
	sc.look(snap, v)
	out := make([]byte, ednsSize)
	if !q.read(packet, snap.seed) {
		return nil
	}
	n, ok := q.answer(&sc, packet, out, turn)
	if !ok {
		return nil
	}
	return out[:n]
}

// thorough answers a packet with messages; nil = nothing, or not from here.
func thorough(snap *Snapshot, v *view, packet []byte, turn uint64) (req *miekg.Msg, out []byte) {
	req, ok := parse(packet)
	if !ok {
		return nil, nil
	}
	resp, forward := respond(snap, v, req, turn)
	if forward {
		return req, nil
	}
	return req, (&session{s: &Server{}}).pack(req, resp, udpLimit(req), nil)
}

// testView has everything that changes answers.
func testView() *view {
	return compile(&View{
		Networks: []weft.ID{red, blue, front}, Service: "down", Search: []string{"Example.org", "lan"},
		Self: Task{Slot: 7, Names: []string{"down.7.zzz", "me"}, Addrs: addrs("10.1.0.99", "fd00:1::99")},
	})
}

// FuzzQuick: whatever arrives, the quick answer is the thorough one to the byte.
func FuzzQuick(f *testing.F) {
	for _, name := range []string{"web.", "WEB.Blue.", "tasks.web.example.org.", "nope.", "example.com.", "me.", "7.down.", "4.web.", "4.web.blue.", "a.1.DOWN.", "www.down.org.", "_80._tcp.web.", "_80._tcp.1.web.", "2.0.1.10.in-addr.arpa.", ".", `a\.b.`, strings.Repeat("a.", 126), strings.Repeat(strings.Repeat("b", 63)+".", 3)} {
		for _, qtype := range []uint16{miekg.TypeA, miekg.TypeAAAA, miekg.TypeSRV} {
			m := new(miekg.Msg)
			m.SetQuestion(name, qtype)
			for range 2 {
				b, err := m.Pack()
				if err != nil {
					f.Fatal(err)
				}
				f.Add(b, uint64(1))
				f.Add(append(b, 0, 1), uint64(2))
				m.SetEdns0(700, true)
			}
		}
	}
	snap, v := NewSnapshot(testRecords()), testView()
	f.Fuzz(func(t *testing.T, packet []byte, turn uint64) {
		got := quick(snap, v, packet, turn)
		if got == nil {
			return
		}
		if _, want := thorough(snap, v, packet, turn); !bytes.Equal(got, want) {
			t.Fatalf("%x is answered\n%x by the quick way,\n%x by the thorough one", packet, got, want)
		}
	})
}

// TestQuickIsThorough: the same for questions that mean something, and none that
// could be answered quickly is left.
func TestQuickIsThorough(t *testing.T) {
	snap, v := NewSnapshot(testRecords()), testView()
	words := []string{"web", "shared", "rr", "down", "tasks.web", "tasks.down", "2.rr", "7.down", "me", "c0ffee", "nope", "localhost", "x.localhost", "secret", "tasks.secret", "typo.front", "4.web", "h9.agents", "a.1.down", "tasks.www", "typo.secret", "_80._tcp.web", "example.com"}
	took := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom(words).Draw(t, "name") + rapid.SampledFrom([]string{"", "", ".blue", ".red", ".example.org", ".blue.lan"}).Draw(t, "behind")
		upper := rapid.Uint64().Draw(t, "upper")
		spelt := strings.Map(func(r rune) rune {
			upper = upper>>1 | upper<<63
			if upper&1 == 1 {
				return []rune(strings.ToUpper(string(r)))[0]
			}
			return r
		}, name)
		m := new(miekg.Msg)
		m.SetQuestion(spelt+".", rapid.SampledFrom([]uint16{miekg.TypeA, miekg.TypeAAAA}).Draw(t, "type"))
		m.RecursionDesired, m.CheckingDisabled = rapid.Bool().Draw(t, "rd"), rapid.Bool().Draw(t, "cd")
		m.AuthenticatedData, m.Zero = rapid.Bool().Draw(t, "ad"), rapid.Bool().Draw(t, "z")
		if rapid.Bool().Draw(t, "edns") {
			m.SetEdns0(rapid.Uint16().Draw(t, "size"), rapid.Bool().Draw(t, "do"))
		}
		packet, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		turn := rapid.Uint64().Draw(t, "turn")
		got := quick(snap, v, packet, turn)
		_, want := thorough(snap, v, packet, turn)
		took[got != nil]++
		if strings.HasPrefix(name, "_") { // SRV names are left
			want = nil
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%s is answered\n%x by the quick way,\n%x by the thorough one", spelt, got, want)
		}
	})
	if took[true] < 20 || took[false] < 5 {
		t.Errorf("%d quick, %d not: the comparison says little", took[true], took[false])
	}
}

// TestQuickLeavesLongAnswers: what is cut off, or longer than a burst has room
// for, is respond's.
func TestQuickLeavesLongAnswers(t *testing.T) {
	var n Network
	for size := 1; size <= 120; size++ {
		svc := Service{Name: fmt.Sprintf("s%d", size)}
		for i := range size {
			svc.VIP = append(svc.VIP, netip.AddrFrom4([4]byte{10, 1, byte(size), byte(i)}))
		}
		n.Services = append(n.Services, svc)
	}
	snap, v := NewSnapshot(Records{Networks: map[weft.ID]Network{blue: n}}), compile(&View{Networks: []weft.ID{blue}})
	left := 0
	for size := 1; size <= 120; size++ {
		for _, limit := range []uint16{0, 512, 768, 1232, 4096} {
			m := new(miekg.Msg)
			m.SetQuestion(fmt.Sprintf("s%d.", size), miekg.TypeA)
			if limit > 0 {
				m.SetEdns0(limit, false)
			}
			packet, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			got := quick(snap, v, packet, 0)
			_, want := thorough(snap, v, packet, 0)
			cut := want[2]&2 != 0
			if got == nil {
				left++
			}
			if got == nil && !cut && len(want) <= ednsSize || got != nil && !bytes.Equal(got, want) {
				t.Errorf("%d addresses, limit %d: %d bytes by the quick way, %d by the thorough one, cut off %v", size, limit, len(got), len(want), cut)
			}
		}
	}
	if left == 0 {
		t.Error("no answer is too long")
	}
}

func TestQuickAllocatesNothing(t *testing.T) {
	snap, v := NewSnapshot(testRecords()), testView()
	for _, name := range []string{"WEB.", "tasks.web.blue.", "nope.", "down.example.org.", "7.down.", "localhost.", "typo.front.", "4.web.", "4.web.blue.", "h9.example.agents."} {
		m := new(miekg.Msg)
		m.SetQuestion(name, miekg.TypeA)
		m.SetEdns0(1232, false)
		packet, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		out, turn := make([]byte, ednsSize), uint64(0)
		var q plainQuery
		var sc scope
		sc.look(snap, v)
		if n := testing.AllocsPerRun(100, func() {
			turn++
			if !q.read(packet, snap.seed) {
				t.Fatal("not read")
			}
			if _, ok := q.answer(&sc, packet, out, turn); !ok {
				t.Fatal("not answered")
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkQuick(b *testing.B) {
	snap, v := NewSnapshot(testRecords()), compile(&View{Networks: []weft.ID{blue}})
	m := new(miekg.Msg)
	m.SetQuestion("web.", miekg.TypeA)
	packet, _ := m.Pack()
	out := make([]byte, ednsSize)
	var q plainQuery
	var sc scope
	sc.look(snap, v)
	b.ReportAllocs()
	for i := range b.N {
		if !q.read(packet, snap.seed) {
			b.Fatal("not read")
		}
		if _, ok := q.answer(&sc, packet, out, uint64(i)); !ok {
			b.Fatal("not answered")
		}
	}
}

// TestTableIsTheMap: the table says of every name what the map says, and nothing of
// others.
func TestTableIsTheMap(t *testing.T) {
	label := rapid.StringMatching(`[a-c]{0,3}`)
	rapid.Check(t, func(t *rapid.T) {
		names := map[string]*rrset{}
		for name, n := range rapid.MapOfN(label, rapid.IntRange(0, maxInTable+2), 0, 30).Draw(t, "names") {
			set := &rrset{ttl: uint32(n)}
			for i := range n {
				set.add(netip.AddrFrom4([4]byte{10, 0, byte(len(name)), byte(i)}))
			}
			if n%3 == 1 {
				set.add(netip.MustParseAddr(fmt.Sprintf("fd00::%d", n)))
			}
			names[name] = set
		}
		seed := maphash.MakeSeed()
		table := newTable(seed, names)
		for _, name := range append(rapid.SliceOf(label).Draw(t, "asked"), slices.Collect(maps.Keys(names))...) {
			for _, want6 := range []bool{false, true} {
				var want []byte
				set := names[name]
				count := 0
				if set != nil {
					count = len(set.family(want6))
					for _, a := range set.family(want6) {
						want = append(want, a.AsSlice()...)
					}
				}
				if count > maxInTable {
					count, want = manyInTable, nil
				}
				e := table.get(maphash.String(seed, name), []byte(name))
				if (e != "") != (set != nil) {
					t.Fatalf("%q: in the table %v, in the map %v", name, e != "", set != nil)
				}
				if e == "" {
					continue
				}
				got, n, others := e.family(want6)
				if got != string(want) || n != count || (others > 0) != (len(set.family(!want6)) > 0) || count > 0 && e.ttl() != set.ttl {
					t.Fatalf("%q: %d of %d and %d with TTL %d, the map says %v", name, len(got), n, others, e.ttl(), set)
				}
			}
		}
	})
}

// TestTableThatIsFull: what finds no room in a table is answered by the maps.
func TestTableThatIsFull(t *testing.T) {
	var n Network
	v := compile(&View{Networks: []weft.ID{blue}})
	s := Service{Name: "big"}
	for i := range 2 * maxTable / 64 { // names of 60 bytes and more
		s.Tasks = append(s.Tasks, Task{Names: []string{fmt.Sprintf("%060d", i)}, Addrs: addrs("10.0.0.1")})
	}
	n.Services = []Service{s} // one: all names are in one shard
	snap := NewSnapshot(Records{Networks: map[weft.ID]Network{blue: n}})
	if shards := snap.networks[blue].shards; len(shards) != 1 || !shards[0].table.isPart || len(shards[0].table.mem) > 2*maxTable {
		t.Fatalf("%d shards, of which the first has %d bytes, and is a part: %v", len(shards), len(shards[0].table.mem), shards[0].table.isPart)
	}
	for i := 0; i < len(s.Tasks); i += 997 {
		m := new(miekg.Msg)
		m.SetQuestion(s.Tasks[i].Names[0]+".", miekg.TypeA)
		packet, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		got := quick(snap, v, packet, 0)
		if _, want := thorough(snap, v, packet, 0); !bytes.Equal(got, want) || len(got) != len(packet)+16 {
			t.Fatalf("%s is answered %x, want %x", s.Tasks[i].Names[0], got, want)
		}
	}
}

// TestFolded: the constant is lower case of what a plain name may have.
func TestFolded(t *testing.T) {
	for c := range 256 {
		var want byte
		switch {
		case 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_':
			want = byte(c)
		case 'A' <= c && c <= 'Z':
			want = byte(c) + 'a' - 'A'
		}
		if len(folded) != 256 || folded[c] != want {
			t.Errorf("%q of %d is %q, want %q", rune(c), len(folded), folded[c], want)
		}
	}
}

// BenchmarkSnapshot is the price of all of 100,000 names.
func BenchmarkSnapshot(b *testing.B) {
	r := manyRecords(100_000)
	b.ReportAllocs()
	for b.Loop() {
		NewSnapshot(r)
	}
}

// BenchmarkChange is the price of a change of one service with 100,000 names. The
// others share what they say with the last Records, as those of the agent do, or not.
func BenchmarkChange(b *testing.B) {
	for _, shared := range []bool{true, false} {
		b.Run(fmt.Sprint("shared ", shared), func(b *testing.B) {
			s, err := New(Config{Log: slog.New(slog.DiscardHandler), ResolvConf: "/dev/null"})
			if err != nil {
				b.Fatal(err)
			}
			turns := []Records{manyRecords(100_000), manyRecords(100_000)}
			if shared {
				n := turns[0].Networks[blue]
				n.Services = slices.Clone(n.Services)
				turns[1].Networks[blue] = n
			}
			changed := &turns[1].Networks[blue].Services[5000]
			changed.Tasks = slices.Clone(changed.Tasks)
			changed.Tasks[1].Ready = false
			s.Update(turns[0])
			b.ReportAllocs()
			for i := 1; b.Loop(); i++ {
				s.Update(turns[i%2])
			}
		})
	}
}

// BenchmarkQuickMany asks for 100,000 names in turn.
func BenchmarkQuickMany(b *testing.B) {
	snap, v := NewSnapshot(manyRecords(100_000)), compile(&View{Networks: []weft.ID{blue}})
	var packets [][]byte
	for i := range 100_000 / 9 {
		m := new(miekg.Msg)
		m.SetQuestion(fmt.Sprintf("tasks.svc%d.", i*7919%(100_000/9)), miekg.TypeA)
		packet, _ := m.Pack()
		packets = append(packets, packet)
	}
	out := make([]byte, ednsSize)
	var q plainQuery
	var sc scope
	sc.look(snap, v)
	for i := 0; b.Loop(); i++ {
		p := packets[i%len(packets)]
		if !q.read(p, snap.seed) {
			b.Fatal("not read")
		}
		if _, ok := q.answer(&sc, p, out, uint64(i)); !ok {
			b.Fatal("not answered")
		}
	}
}

// manyRecords has at least n names: services of three tasks, nine names each.
func manyRecords(n int) Records {
	net := Network{Name: "blue"}
	for i := 0; i*9 < n; i++ {
		s := Service{Name: fmt.Sprintf("svc%d", i), VIP: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}}
		for k := range 3 {
			s.Tasks = append(s.Tasks, Task{Slot: uint64(k + 1), Names: []string{fmt.Sprintf("svc%d.%d.x", i, k+1), fmt.Sprintf("%012d", 3*i+k)}, Ready: true,
				Addrs: []netip.Addr{netip.AddrFrom4([4]byte{11, byte(k<<6 | i>>16), byte(i >> 8), byte(i)})}})
		}
		net.Services = append(net.Services, s)
	}
	return Records{Networks: map[weft.ID]Network{blue: net}}
}
