package dns

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// Address plan: network "blue" 10.1.0.0/20 and fd00:1::/64, "red" 10.2.0.0/20.
const (
	blue weft.ID = "blue0000000000000000000000"
	red  weft.ID = "red00000000000000000000000"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func testRecords() Records {
	return Records{Networks: map[weft.ID]Network{
		blue: {
			Name:    "blue",
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/20"), netip.MustParsePrefix("fd00:1::/64")},
			Services: []Service{
				{Name: "Web", Aliases: []string{"www", "shared"}, VIP: addrs("10.1.0.2", "fd00:1::2"), Tasks: []Task{
					{Slot: 1, Names: []string{"web.1.aaa", "c0ffee"}, Addrs: addrs("10.1.0.11", "fd00:1::11"), Ready: true},
					{Slot: 2, Names: []string{"web.2.bbb", "badcafe"}, Addrs: addrs("10.1.0.12"), Ready: false},
					{Slot: 3, Names: []string{"web.3.ccc"}, Addrs: addrs("10.1.0.13"), Ready: true},
				}},
				{Name: "rr", Aliases: []string{"shared"}, Tasks: []Task{
					{Slot: 1, Names: []string{"rr.1.ddd", "same"}, Addrs: addrs("10.1.0.21"), Ready: true},
					{Slot: 2, Names: []string{"rr.2.eee", "same"}, Addrs: addrs("10.1.0.22"), Ready: true},
				}},
				{Name: "down", VIP: addrs("10.1.0.3"), Tasks: []Task{{Slot: 1, Names: []string{"down.1.fff"}, Addrs: addrs("10.1.0.31")}}},
				{Name: "shadow", Aliases: []string{"rr"}, VIP: addrs("10.1.0.4")},
			},
		},
		red: {
			Name:     "red",
			Subnets:  []netip.Prefix{netip.MustParsePrefix("10.2.0.0/20")},
			Services: []Service{{Name: "secret", VIP: addrs("10.2.0.2"), Tasks: []Task{{Slot: 1, Names: []string{"secret.1.ggg"}, Addrs: addrs("10.2.0.11"), Ready: true}}}, {Name: "web", VIP: addrs("10.2.0.9")}},
		},
	}}
}

func TestRespond(t *testing.T) {
	snap := NewSnapshot(testRecords())
	self := Task{Names: []string{"me.1.zzz", "me"}, Addrs: addrs("10.1.0.99")}
	onBlue := View{Networks: []weft.ID{blue}, Self: self}
	both := View{Networks: []weft.ID{red, blue}, Self: self}
	inside := View{Networks: []weft.ID{blue}, Self: self, Internal: true}
	cases := []struct {
		name  string
		view  View
		q     string
		qtype uint16
		want  string
	}{
		{"service", onBlue, "web.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"case does not matter", onBlue, "wEB.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"service on IPv6", onBlue, "web.", miekg.TypeAAAA, "NOERROR fd00:1::2"},
		{"any", onBlue, "web.", miekg.TypeANY, "NOERROR 10.1.0.2 fd00:1::2"},
		{"with its network", onBlue, "web.blue.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"first network of the task wins", both, "web.", miekg.TypeA, "NOERROR 10.2.0.9"},
		{"second network helps out with a family", both, "web.", miekg.TypeAAAA, "NOERROR fd00:1::2"},
		{"the network can be chosen", both, "web.blue.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"alias", onBlue, "www.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"shared alias", onBlue, "shared.", miekg.TypeA, "NOERROR 10.1.0.2 10.1.0.21 10.1.0.22"},
		{"a service wins over an alias", onBlue, "rr.", miekg.TypeA, "NOERROR 10.1.0.21 10.1.0.22"},
		{"tasks, ready ones only", onBlue, "tasks.web.", miekg.TypeA, "NOERROR 10.1.0.11 10.1.0.13"},
		{"slot", onBlue, "1.web.", miekg.TypeA, "NOERROR 10.1.0.11"},
		{"slot of a task that is not ready", onBlue, "2.web.", miekg.TypeA, "NOERROR"},
		{"container name, ready or not", onBlue, "web.2.bbb.", miekg.TypeA, "NOERROR 10.1.0.12"},
		{"short id", onBlue, "c0ffee.", miekg.TypeA, "NOERROR 10.1.0.11"},
		{"hostname of two", onBlue, "same.", miekg.TypeA, "NOERROR 10.1.0.21 10.1.0.22"},
		{"service without ready tasks keeps its VIP", onBlue, "down.", miekg.TypeA, "NOERROR 10.1.0.3"},
		{"and has no tasks", onBlue, "tasks.down.", miekg.TypeA, "NOERROR"},
		{"AAAA of an IPv4 service", onBlue, "down.", miekg.TypeAAAA, "NOERROR"},
		{"self before any record", onBlue, "me.", miekg.TypeA, "NOERROR 10.1.0.99"},
		{"SRV is not there", onBlue, "web.", miekg.TypeSRV, "NOERROR"},
		{"localhost", onBlue, "localhost.", miekg.TypeAAAA, "NOERROR ::1"},

		{"unknown single label stays here", onBlue, "nonsense.", miekg.TypeA, "NXDOMAIN"},
		{"the root", onBlue, ".", miekg.TypeNS, "NXDOMAIN"},
		{"service of another network", onBlue, "secret.", miekg.TypeA, "NXDOMAIN"},
		{"tasks of another network", onBlue, "tasks.secret.", miekg.TypeA, "NXDOMAIN"},
		{"slot of another network", onBlue, "1.secret.", miekg.TypeA, "NXDOMAIN"},
		{"container of another network", onBlue, "secret.1.ggg.", miekg.TypeA, "NXDOMAIN"},
		{"external", onBlue, "example.com.", miekg.TypeA, "forward"},
		{"external type", onBlue, "example.com.", miekg.TypeMX, "forward"},
		{"external from inside", inside, "example.com.", miekg.TypeA, "NXDOMAIN"},

		{"PTR of a VIP", onBlue, "2.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR Web.blue."},
		{"PTR of a task", onBlue, "11.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR web.1.aaa.blue."},
		{"PTR of self", onBlue, "99.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR me.1.zzz."},
		{"PTR on IPv6", onBlue, "1.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.D.F.ip6.arpa.", miekg.TypePTR, "NOERROR web.1.aaa.blue."},
		{"PTR of a free overlay address", onBlue, "1.9.1.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of another overlay", onBlue, "11.0.2.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of an external address", onBlue, "1.100.51.198.in-addr.arpa.", miekg.TypePTR, "forward"},
		{"PTR from inside", inside, "1.100.51.198.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of half an address", onBlue, "100.51.198.in-addr.arpa.", miekg.TypePTR, "forward"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			req := new(miekg.Msg)
			req.SetQuestion(c.q, c.qtype)
			resp, forward := respond(snap, &c.view, req, 0)
			if got := show(resp, forward); got != c.want {
				t.Errorf("%s %s = %q, want %q", c.q, miekg.TypeToString[c.qtype], got, c.want)
			}
		})
	}
}

// show writes an answer as one line: its code, then the data in order.
func show(m *miekg.Msg, forward bool) string {
	if forward {
		return "forward"
	}
	var data []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *miekg.A:
			data = append(data, rr.A.String())
		case *miekg.AAAA:
			data = append(data, rr.AAAA.String())
		case *miekg.PTR:
			data = append(data, rr.Ptr)
		default:
			data = append(data, rr.String())
		}
	}
	return strings.TrimSpace(miekg.RcodeToString[m.Rcode] + " " + strings.Join(data, " "))
}

func TestPTRTargetsResolve(t *testing.T) {
	snap := NewSnapshot(testRecords())
	view := &View{Networks: []weft.ID{blue, red}}
	for id, z := range snap.networks {
		for addr, target := range z.byAddr {
			got, _, d := snap.lookup(view, fold(target), addr.Is6())
			if d != verdictFound || !slices.Contains(got, addr) {
				t.Errorf("network %s: %v points to %s, which has %v", id, addr, target, got)
			}
		}
	}
}

func TestRotation(t *testing.T) {
	snap := NewSnapshot(testRecords())
	req := new(miekg.Msg)
	req.SetQuestion("tasks.web.", miekg.TypeA)
	first := map[string]int{}
	for turn := range uint64(10) {
		resp, _ := respond(snap, &View{Networks: []weft.ID{blue}}, req, turn)
		first[resp.Answer[0].(*miekg.A).A.String()]++
		if ttl := resp.Answer[0].Header().Ttl; ttl == 0 || ttl > 5 {
			t.Fatalf("TTL %d, want 1 to 5", ttl)
		}
	}
	if first["10.1.0.11"] != 5 || first["10.1.0.13"] != 5 {
		t.Errorf("first addresses %v, want both five times", first)
	}
}

func TestRefusals(t *testing.T) {
	snap := NewSnapshot(testRecords())
	ask := func(change func(*miekg.Msg)) *miekg.Msg {
		req := new(miekg.Msg)
		req.SetQuestion("web.", miekg.TypeA)
		change(req)
		resp, forward := respond(snap, &View{Networks: []weft.ID{blue}}, req, 0)
		if forward {
			t.Fatal("forwarded")
		}
		return resp
	}
	cases := []struct {
		name   string
		change func(*miekg.Msg)
		want   int
	}{
		{"opcode", func(m *miekg.Msg) { m.Opcode = miekg.OpcodeUpdate }, miekg.RcodeNotImplemented},
		{"two questions", func(m *miekg.Msg) { m.Question = append(m.Question, m.Question[0]) }, miekg.RcodeFormatError},
		{"class", func(m *miekg.Msg) { m.Question[0].Qclass = miekg.ClassCHAOS }, miekg.RcodeRefused},
		{"transfer", func(m *miekg.Msg) { m.Question[0].Qtype = miekg.TypeAXFR }, miekg.RcodeRefused},
		{"EDNS version", func(m *miekg.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }, miekg.RcodeBadVers},
		{"EDNS", func(m *miekg.Msg) { m.SetEdns0(1232, true) }, miekg.RcodeSuccess},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			resp := ask(c.change)
			if resp.Rcode != c.want {
				t.Errorf("code %s, want %s", miekg.RcodeToString[resp.Rcode], miekg.RcodeToString[c.want])
			}
			if _, err := resp.Pack(); err != nil {
				t.Errorf("pack: %v", err)
			}
		})
	}
	if resp := ask(func(m *miekg.Msg) { m.SetEdns0(1232, true) }); resp.IsEdns0() == nil || !resp.IsEdns0().Do() {
		t.Error("EDNS of the question is not mirrored")
	}
	if resp := ask(func(*miekg.Msg) {}); resp.IsEdns0() != nil {
		t.Error("EDNS in the answer to a question without")
	}
}

// slow is lookup without tables: it reads the documentation of Records
// literally, for visible names of one network.
func slow(n Network, name string, want6 bool) (out []netip.Addr, exists bool) {
	add := func(as []netip.Addr) {
		exists = true
		for _, a := range as {
			if a.Unmap().Is6() == want6 && !slices.Contains(out, a.Unmap()) {
				out = append(out, a.Unmap())
			}
		}
	}
	same := func(a string) bool { return strings.EqualFold(a, name) }
	meaning := func(s Service) (as []netip.Addr) {
		if as = s.VIP; len(as) == 0 {
			for _, t := range s.Tasks {
				as = append(as, readyAddrs(t)...)
			}
		}
		return as
	}
	for _, s := range n.Services {
		if same(s.Name) {
			add(meaning(s))
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		if slices.ContainsFunc(s.Aliases, same) {
			add(meaning(s))
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		for _, t := range s.Tasks {
			if t.Slot != 0 && same(strconv.FormatUint(t.Slot, 10)+"."+s.Name) {
				add(readyAddrs(t))
			}
			if same("tasks." + s.Name) {
				add(readyAddrs(t))
			}
		}
		if same("tasks." + s.Name) {
			exists = true
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		for _, t := range s.Tasks {
			if slices.ContainsFunc(t.Names, same) {
				add(t.Addrs)
			}
		}
	}
	return out, exists
}

func TestLookupAgainstSlowTwin(t *testing.T) {
	word := rapid.SampledFrom([]string{"a", "B", "c", "tasks.a", "1.a", "a.1.x", "2.B", "tasks.c", "h"})
	address := rapid.Custom(func(t *rapid.T) netip.Addr {
		n := rapid.ByteRange(1, 20).Draw(t, "host")
		if rapid.Bool().Draw(t, "is6") {
			return netip.MustParseAddr(fmt.Sprintf("fd00::%x", n))
		}
		return netip.AddrFrom4([4]byte{10, 0, 0, n})
	})
	task := rapid.Custom(func(t *rapid.T) Task {
		return Task{
			Slot:  rapid.Uint64Range(0, 3).Draw(t, "slot"),
			Names: rapid.SliceOfN(word, 0, 3).Draw(t, "names"),
			Addrs: rapid.SliceOfN(address, 0, 2).Draw(t, "addrs"),
			Ready: rapid.Bool().Draw(t, "ready"),
		}
	})
	service := rapid.Custom(func(t *rapid.T) Service {
		return Service{
			Name:    rapid.SampledFrom([]string{"a", "B", "c"}).Draw(t, "name"),
			Aliases: rapid.SliceOfN(word, 0, 2).Draw(t, "aliases"),
			VIP:     rapid.SliceOfN(address, 0, 2).Draw(t, "vip"),
			Tasks:   rapid.SliceOfN(task, 0, 4).Draw(t, "tasks"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		n := Network{Services: rapid.SliceOfN(service, 0, 4).Draw(t, "services")}
		snap := NewSnapshot(Records{Networks: map[weft.ID]Network{blue: n}})
		name, want6 := word.Draw(t, "question"), rapid.Bool().Draw(t, "want6")
		want, exists := slow(n, name, want6)
		got, _, d := snap.lookup(&View{Networks: []weft.ID{blue}}, fold(name), want6)
		if (d == verdictFound) != exists {
			t.Fatalf("%q: verdict %v, slow twin says exists=%v", name, d, exists)
		}
		slices.SortFunc(got, netip.Addr.Compare)
		slices.SortFunc(want, netip.Addr.Compare)
		if !slices.Equal(got, want) {
			t.Fatalf("%q: %v, slow twin says %v", name, got, want)
		}
	})
}

// FuzzRespond feeds the whole packet path with bytes from the network.
func FuzzRespond(f *testing.F) {
	for _, name := range []string{"web.", "tasks.web.", "example.com.", "2.0.1.10.in-addr.arpa."} {
		for _, qtype := range []uint16{miekg.TypeA, miekg.TypePTR, miekg.TypeANY} {
			m := new(miekg.Msg)
			m.SetQuestion(name, qtype)
			m.SetEdns0(1232, true)
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
			f.Add(b[:len(b)-3])
		}
	}
	snap := NewSnapshot(testRecords())
	s := &session{s: &Server{}}
	f.Fuzz(func(t *testing.T, b []byte) {
		req, ok := parse(b)
		if !ok {
			return
		}
		resp, forward := respond(snap, &View{Networks: []weft.ID{blue}}, req, 3)
		if forward {
			questionOf(req)
			resp = adapt(req, reply(req), 0)
		}
		out := s.pack(req, resp, udpLimit(req), make([]byte, maxUDPAnswer))
		if len(out) == 0 || len(out) > udpLimit(req) {
			t.Fatalf("answer of %d bytes, limit %d", len(out), udpLimit(req))
		}
		var back miekg.Msg
		if err := back.Unpack(out); err != nil || back.Id != req.Id || !back.Response {
			t.Fatalf("answer cannot be read: %v", err)
		}
	})
}

func BenchmarkAnswerService(b *testing.B) {
	snap := NewSnapshot(testRecords())
	m := new(miekg.Msg)
	m.SetQuestion("web.", miekg.TypeA)
	packet, _ := m.Pack()
	view := &View{Networks: []weft.ID{blue}}
	s := &session{s: &Server{}}
	out := make([]byte, maxUDPAnswer)
	b.ReportAllocs()
	for i := range b.N {
		req, _ := parse(packet)
		resp, _ := respond(snap, view, req, uint64(i))
		s.pack(req, resp, udpLimit(req), out)
	}
}

// TestStill: what may be answered while the way to new tasks is being made.
func TestStill(t *testing.T) {
	addr := netip.MustParseAddr
	task := func(name, a string, ready bool) Task {
		return Task{Names: []string{name}, Addrs: []netip.Addr{addr(a)}, Ready: ready}
	}
	net := func(services ...Service) Records {
		return Records{Networks: map[weft.ID]Network{"n": {Name: "front", Services: services}}}
	}
	before := net(
		Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", true), task("ends", "10.0.0.3", true), task("starts", "10.0.0.4", false)}},
		Service{Name: "old", VIP: []netip.Addr{addr("10.0.0.8")}})
	now := net(
		Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", false), task("starts", "10.0.0.4", true), task("new", "10.0.0.5", true), task("reused", "10.0.0.3", true)}},
		Service{Name: "new", VIP: []netip.Addr{addr("10.0.0.7")}})
	now.Networks["other"] = Network{Name: "other"}
	want := net(Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", false), task("starts", "10.0.0.4", false)}})
	if got := Still(before, now); !reflect.DeepEqual(got, want) {
		t.Errorf("still there is\n%+v, want\n%+v", got, want)
	}
	if got := Still(now, now); !reflect.DeepEqual(got, now) {
		t.Errorf("of the same is left\n%+v, want\n%+v", got, now)
	}
}
