package sandbox

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// all classes, and few names and values, so that everything meets.
func randomObject(r *rand.Rand) Object {
	return Object{Class(r.IntN(len(classNames))), fmt.Sprintf("o%d", r.IntN(3))}
}

func randomState(r *rand.Rand) State {
	s := State{}
	for range r.IntN(12) {
		s[randomObject(r)] = fmt.Sprint("v", r.IntN(2))
	}
	return s
}

// slowDiff is Diff by asking of every object there could be.
func slowDiff(have, want, left State, all bool) []string {
	var out []string
	for c := range Class(len(classNames)) {
		for _, away := range []bool{false, true} {
			for _, name := range []string{"o0", "o1", "o2"} {
				o := Object{c, name}
				h, inHave := have[o]
				w, inWant := want[o]
				_, inLeft := left[o]
				switch {
				case !away && inWant && (!inHave || h != w):
					out = append(out, Op{Object: o, Value: w}.String())
				case away && inHave && !inWant && (all || inLeft || c == Rule || c == Leg):
					out = append(out, Op{Object: o, Away: true}.String())
				}
			}
		}
	}
	return out
}

func TestDiffIsWhatTheSlowTwinSays(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		have, want, left, all := randomState(r), randomState(r), randomState(r), r.IntN(2) == 0
		ops := Diff(have, want, left, all)
		var got []string
		now := maps.Clone(have)
		for _, op := range ops {
			got = append(got, op.String())
			carry(now, op)
		}
		if want := slowDiff(have, want, left, all); !slices.Equal(got, want) {
			t.Fatalf("seed %d: got %q, want %q", seed, got, want)
		}
		if more := Diff(now, want, left, all); len(more) > 0 {
			t.Fatalf("seed %d: %v is left to do", seed, more)
		}
		for o, v := range now {
			if w, ok := want[o]; ok && w != v || !ok && all {
				t.Fatalf("seed %d: %v is %q, want %q", seed, o, v, w)
			}
		}
	}
}

func carry(s State, op Op) {
	if op.Away {
		delete(s, op.Object)
	} else {
		s[op.Object] = op.Value
	}
}

// history is the slow twin of memory: it knows of every object who touched it last.
type history struct {
	ours    State           // what we wrote last, if that succeeded
	touched map[Object]bool // by others since
	tried   map[Object]bool // our last change of it failed
}

// repairs are the operations that undo what others have done; objects of which one
// goes with another are left out of this test.
func (h history) repairs(have State, ops []Op) []string {
	var out []string
	for _, op := range ops {
		ours, wrote := h.ours[op.Object]
		now, there := have[op.Object]
		switch {
		case h.tried[op.Object], !h.touched[op.Object], op.Away && wrote, !op.Away && !wrote, wrote && there && now == ours:
		case op.Away:
			out = append(out, op.Class.String()+" stray "+op.Name)
		case !there:
			out = append(out, op.Class.String()+" missing "+op.Name)
		default:
			out = append(out, op.Class.String()+" wrong "+op.Name)
		}
	}
	return out
}

// TestRepairsAreWhatTheSlowTwinSays: whatever we wish, others do and fails, what
// others did is counted once, when it is put right, and nothing else is.
func TestRepairsAreWhatTheSlowTwinSays(t *testing.T) {
	single := []Class{HostSetting, Setting, Loopback, LocalRule, Rule, Bridge} // none goes with another
	total := 0
	for seed := range uint64(800) {
		r := rand.New(rand.NewPCG(seed, 2))
		object := func() Object {
			return Object{single[r.IntN(len(single))], fmt.Sprintf("o%d", r.IntN(3))}
		}
		world, want := State{}, State{}
		m := memory{left: State{}}
		h := history{ours: State{}, touched: map[Object]bool{}, tried: map[Object]bool{}}
		for step := range 30 {
			for range r.IntN(3) { // a wish
				if o := object(); r.IntN(2) == 0 {
					want[o] = fmt.Sprint("v", r.IntN(3))
				} else {
					delete(want, o)
				}
			}
			for range r.IntN(3) { // a damage
				o := object()
				h.touched[o] = true
				if r.IntN(2) == 0 {
					world[o] = fmt.Sprint("v", r.IntN(3))
				} else {
					delete(world, o)
				}
			}
			ops := Diff(world, want, m.left, false)
			found := m.findings(world, ops, 0)
			var got []string
			for i, op := range ops {
				if found[i] != nil {
					got = append(got, found[i].Kind+" "+op.Name)
				}
			}
			expected := h.repairs(world, ops)
			if !slices.Equal(got, expected) {
				t.Fatalf("seed %d step %d: got %q, want %q", seed, step, got, expected)
			}
			failed := map[Object]bool{}
			isRepair := map[Object]bool{}
			for i, op := range ops {
				isRepair[op.Object] = found[i] != nil
				if r.IntN(6) == 0 {
					failed[op.Object] = true
					continue
				}
				carry(world, op)
			}
			m = m.after(want, ops, found, failed, 0)
			ours := maps.Clone(want)
			h.tried = map[Object]bool{}
			for _, op := range ops {
				if !failed[op.Object] {
					delete(h.touched, op.Object)
					continue
				}
				h.tried[op.Object] = !isRepair[op.Object]
				delete(ours, op.Object)
				if was, wrote := h.ours[op.Object]; wrote {
					ours[op.Object] = was // a repair is owed
				}
			}
			for o := range h.touched {
				if !failed[o] && world[o] == ours[o] {
					delete(h.touched, o)
				}
			}
			h.ours = ours
			total += len(expected)
		}
	}
	if total < 1000 {
		t.Errorf("only %d repairs were looked at", total)
	}
}

// What the kernel takes along with something greater is on that one's account.
func TestOneDamageCountsOnce(t *testing.T) {
	s := Spec{VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd77::5")}}
	leg, gw := netip.MustParsePrefix("172.31.240.2/20"), netip.MustParseAddr("172.31.240.1")
	want := s.wanted("0 9", leg, gw)
	for name, c := range map[string]struct {
		break_ func(State)
		bridge int
		want   string
	}{
		"nothing":          {func(State) {}, 7, ""},
		"lo down":          {func(h State) { h[Object{Loopback, "lo"}] = "it was down"; delete(h, Object{Address, "fd77::5/128"}) }, 7, "loopback wrong"},
		"one address":      {func(h State) { delete(h, Object{Address, "fd77::5/128"}) }, 7, "service address missing"},
		"leg gone":         {func(h State) { lose(h, Leg, LegAddress, Route) }, 7, "gateway leg missing"},
		"leg's address":    {func(h State) { lose(h, LegAddress, Route) }, 7, "gateway leg address missing"},
		"inner end down":   {func(h State) { lose(h, Route); h[Object{Leg, LegName}] = faultInner }, 7, "gateway leg wrong"},
		"route":            {func(h State) { lose(h, Route) }, 7, "gateway route missing"},
		"another bridge":   {func(h State) { h[Object{Leg, LegName}] = "it was not on the bridge" }, 8, ""},
		"and no route":     {func(h State) { h[Object{Leg, LegName}] = "it was not on the bridge"; lose(h, Route) }, 8, "gateway route missing"},
		"and no leg there": {func(h State) { lose(h, Leg, LegAddress, Route) }, 8, "gateway leg missing"},
		"two things":       {func(h State) { lose(h, Route, LocalRule) }, 7, "task local rule missing task local rule missing gateway route missing"},
	} {
		have := maps.Clone(want)
		c.break_(have)
		m := memory{left: want, bridge: 7}
		var got []string
		for _, f := range m.findings(have, Diff(have, want, want, false), c.bridge) {
			if f != nil {
				got = append(got, f.Kind)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		for _, f := range (memory{}).findings(have, Diff(have, want, nil, false), c.bridge) {
			if f != nil {
				t.Errorf("%s: %v counted, and nothing is known of what was left", name, f)
			}
		}
	}
}

func lose(s State, classes ...Class) {
	maps.DeleteFunc(s, func(o Object, _ string) bool { return slices.Contains(classes, o.Class) })
}

func TestGatewayKeepsItsAddress(t *testing.T) {
	p := netip.MustParsePrefix
	left := wantedHost(p("172.31.240.1/20"))
	for name, c := range map[string]struct {
		left       State
		legs, have []netip.Prefix
		want       string
	}{
		"left":            {left, []netip.Prefix{p("172.16.0.2/20")}, []netip.Prefix{p("10.0.0.1/8")}, "172.31.240.1/20"},
		"by its legs":     {nil, []netip.Prefix{p("172.16.0.2/20"), p("172.31.240.2/20"), p("172.31.240.3/20")}, []netip.Prefix{p("10.0.0.1/8")}, "172.31.240.1/20"},
		"what is there":   {nil, nil, []netip.Prefix{p("172.18.0.1/20")}, "172.18.0.1/20"},
		"a new one":       {nil, nil, nil, "invalid Prefix"},
		"legs, a draw":    {nil, []netip.Prefix{p("172.31.240.2/20"), p("172.16.0.2/20")}, nil, "172.16.0.1/20"},
		"nothing in left": {State{}, nil, nil, "invalid Prefix"},
	} {
		if got := gatewayOf(c.left, c.legs, c.have).String(); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestRecordGolden: what version 1 wrote is read for ever; of another kernel,
// namespace or version it says nothing.
func TestRecordGolden(t *testing.T) {
	s := Spec{VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.5")}}
	want := memory{left: s.wanted("0 9", netip.MustParsePrefix("172.31.240.2/20"), netip.MustParseAddr("172.31.240.1")), bridge: 7,
		unsure: map[Object]bool{{Rule, "10.0.0.6/32"}: true}}
	golden := filepath.Join("testdata", "left.v1.json")
	about := record{Boot: "boot-1", Node: "node-1", NetNS: 4026}
	r := readRecord(golden)
	if got := r.memory(about); !got.equal(want) {
		t.Errorf("read %+v, want %+v", got, want)
	}
	written := filepath.Join(t.TempDir(), "left.json")
	if err := want.record(about).write(written); err != nil {
		t.Fatal(err)
	}
	a, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(written)
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(a)) != string(b) {
		t.Errorf("written: %s", b)
	}
	for name, m := range map[string]memory{
		"another boot":      r.memory(record{Boot: "boot-2", Node: "node-1", NetNS: 4026}),
		"another node":      r.memory(record{Boot: "boot-1", Node: "node-2", NetNS: 4026}),
		"another namespace": r.memory(record{Boot: "boot-1", Node: "node-1", NetNS: 4027}),
		"another version":   record{Version: 2, Boot: "boot-1", Node: "node-1", NetNS: 4026}.memory(about),
		"boot not told":     record{Version: 1, Node: "node-1"}.memory(record{Node: "node-1"}),
		"none":              readRecord(filepath.Join(t.TempDir(), "none")).memory(about),
	} {
		if m.left != nil {
			t.Errorf("%s: something is known", name)
		}
	}
	if err := os.WriteFile(written, b[:len(b)/2], 0o644); err != nil {
		t.Fatal(err)
	}
	if m := readRecord(written).memory(about); m.left != nil {
		t.Errorf("a damaged record says %+v", m)
	}
	r.Objects = append(r.Objects, recordObject{"class of a later version", "x", "y"})
	if got := r.memory(about); !got.equal(want) {
		t.Errorf("with a class of a later version: %+v", got)
	}
}

func TestEveryClassHasAName(t *testing.T) {
	if n := int(cmp.Compare(len(classNames), int(Route)+1)); n != 0 {
		t.Errorf("%d names for %d classes", len(classNames), Route+1)
	}
	if seen := slices.Compact(slices.Sorted(slices.Values(classNames[:]))); len(seen) != len(classNames) {
		t.Errorf("two classes share a name: %q", classNames)
	}
}
