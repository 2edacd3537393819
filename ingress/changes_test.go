package ingress

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

func changedBackend(n byte, isDraining bool) Backend {
	return Backend{Task: weft.ID([]byte{'t', n}), Addr: netip.AddrFrom4([4]byte{10, 0, 16, n}), MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}, Draining: isDraining}
}

func drawServices(r *rapid.T, name string) []Service {
	return rapid.SliceOfNDistinct(rapid.Custom(func(r *rapid.T) Service {
		s := Service{VIP: netip.AddrFrom4([4]byte{10, 0, 16, rapid.ByteRange(200, 207).Draw(r, "vip")})}
		for n := range rapid.ByteRange(0, 2).Draw(r, "backends") {
			s.Backends = append(s.Backends, changedBackend(n, rapid.Bool().Draw(r, "drains")))
		}
		return s
	}), 0, 8, func(s Service) netip.Addr { return s.VIP }).Draw(r, name)
}

// TestChanges: the edits make the one list of the other, and there is none that is
// not needed; more than the limit are refused.
func TestChanges(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		was, is := drawServices(r, "was"), drawServices(r, "is")
		if rapid.Bool().Draw(r, "related") {
			is = slices.Clone(was)
			for range rapid.IntRange(0, 2).Draw(r, "changes") {
				if len(is) > 0 {
					is[rapid.IntRange(0, len(is)-1).Draw(r, "which")].Backends = nil
					is = slices.Delete(is, 0, rapid.IntRange(0, 1).Draw(r, "less"))
				}
			}
		}
		print := func(b []Backend) string { return fmt.Sprint(b) }
		have, want := map[netip.Addr]string{}, map[netip.Addr]string{}
		for _, s := range was {
			have[s.VIP] = print(s.Backends)
		}
		differ := map[netip.Addr]bool{}
		for _, s := range is {
			want[s.VIP] = print(s.Backends)
			old, there := have[s.VIP]
			differ[s.VIP] = !there || old != want[s.VIP]
		}
		for a := range have {
			if _, there := want[a]; !there {
				differ[a] = true
			}
		}
		needed := 0
		for _, d := range differ {
			if d {
				needed++
			}
		}
		most := rapid.IntRange(0, 8).Draw(r, "most")
		edits, ok := Changes(was, is, most)
		if ok != (needed <= most) {
			r.Fatalf("%d changes of at most %d: %v", needed, most, ok)
		}
		if !ok {
			return
		}
		if len(edits) != needed {
			r.Fatalf("%d edits, %d are needed", len(edits), needed)
		}
		for _, e := range edits {
			if e.Was != nil && have[e.Was.VIP] != print(e.Was.Backends) {
				r.Fatalf("%s was %v", e.Was.VIP, e.Was.Backends)
			}
			if e.Is == nil {
				delete(have, e.Was.VIP)
			} else {
				have[e.Is.VIP] = print(e.Is.Backends)
			}
		}
		if fmt.Sprint(have) != fmt.Sprint(want) {
			r.Fatalf("made %v, want %v", have, want)
		}
	})
}

func TestChangesRefusesTwins(t *testing.T) {
	s := func(n, backends byte) Service {
		out := Service{VIP: netip.AddrFrom4([4]byte{10, 0, 16, n})}
		for i := range backends {
			out.Backends = append(out.Backends, changedBackend(i, false))
		}
		return out
	}
	for name, c := range map[string]struct{ was, is []Service }{
		"new":           {nil, []Service{s(200, 1), s(200, 2)}},
		"gone":          {[]Service{s(200, 1), s(200, 2)}, nil},
		"both changed":  {[]Service{s(200, 1), s(200, 2)}, []Service{s(200, 2), s(200, 1)}},
		"in the middle": {[]Service{s(201, 1), s(200, 1)}, []Service{s(200, 1), s(202, 1), s(202, 1), s(201, 1)}},
	} {
		if edits, ok := Changes(c.was, c.is, 8); ok {
			t.Errorf("%s: %v", name, edits)
		}
	}
	if Unique([]Service{s(200, 1), s(201, 1), s(200, 0)}) || !Unique([]Service{s(200, 1), s(201, 1)}) {
		t.Error("Unique does not tell twins")
	}
}

// BenchmarkChanges is of one service among 10,000 of ten backends: in the very lists
// of the last table, and in lists that were made anew.
func BenchmarkChanges(b *testing.B) {
	make10k := func() []Service {
		out := make([]Service, 10000)
		for i := range out {
			out[i].VIP = netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)})
			for n := range byte(10) {
				out[i].Backends = append(out[i].Backends, changedBackend(n, false))
			}
		}
		return out
	}
	was := make10k()
	for name, is := range map[string][]Service{"same": slices.Clone(was), "anew": make10k()} {
		is[5000].Backends = is[5000].Backends[:9]
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if edits, ok := Changes(was, is, 64); !ok || len(edits) != 1 {
					b.Fatal(edits, ok)
				}
			}
		})
	}
}
