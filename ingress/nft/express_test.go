package nft

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// drawBackends are some of ten, of which some drain.
func drawBackends(r *rapid.T) (out []ingress.Backend) {
	for n := range byte(10) {
		if rapid.IntRange(0, 2).Draw(r, "backend") == 0 {
			out = append(out, testBackend(n+1, rapid.IntRange(0, 3).Draw(r, "draining") == 0))
		}
	}
	return out
}

// drawServices changes some of the services, and now and then all of them.
func drawServices(r *rapid.T, was []ingress.Service) []ingress.Service {
	out := slices.Clone(was)
	for range rapid.IntRange(0, 4).Draw(r, "changes") {
		n := rapid.ByteRange(1, 12).Draw(r, "service")
		vip := netip.AddrFrom4([4]byte{10, 0, 16, n})
		if rapid.Bool().Draw(r, "of IPv6") {
			vip = netip.AddrFrom16([16]byte{0: 0xfd, 15: n})
		}
		s := ingress.Service{ID: "s", VIP: vip, Backends: drawBackends(r)}
		i := slices.IndexFunc(out, func(o ingress.Service) bool { return o.VIP == vip })
		switch {
		case i < 0 || rapid.IntRange(0, 9).Draw(r, "twice") == 0:
			out = slices.Insert(out, rapid.IntRange(0, len(out)).Draw(r, "place"), s)
		case rapid.Bool().Draw(r, "gone"):
			out = slices.Delete(out, i, i+1)
		default:
			out[i] = s
		}
	}
	return out
}

// drawPorts does the same with published ports.
func drawPorts(r *rapid.T, was []ingress.Published) []ingress.Published {
	out := slices.Clone(was)
	for range rapid.IntRange(0, 4).Draw(r, "changes") {
		p := ingress.Published{
			Service: "s", Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP}).Draw(r, "protocol"),
			Port: 30000 + 4*rapid.Uint16Range(0, 8).Draw(r, "port"), Target: 30000 + 4*rapid.Uint16Range(0, 1).Draw(r, "target"),
			Count: rapid.SampledFrom([]uint16{0, 1, 4, 6}).Draw(r, "count"), HideClient: rapid.Bool().Draw(r, "hide"), Backends: drawBackends(r),
		}
		if rapid.Bool().Draw(r, "bound") {
			p.IPs = drawSome(r, hostAddrs, "address")
		}
		if rapid.Bool().Draw(r, "limited") {
			p.Allow = []netip.Prefix{netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("2001:db8::/32")}[rapid.IntRange(0, 2).Draw(r, "clients"):]
		}
		i := slices.IndexFunc(out, func(o ingress.Published) bool { return placeOf(&o) == placeOf(&p) })
		switch {
		case i < 0 || rapid.IntRange(0, 9).Draw(r, "twice") == 0:
			out = slices.Insert(out, rapid.IntRange(0, len(out)).Draw(r, "place"), p)
		case rapid.Bool().Draw(r, "gone"):
			out = slices.Delete(out, i, i+1)
		default:
			out[i] = p
		}
	}
	return out
}

// kernelSets plays the kernel's part: it takes a transaction or fails it whole.
func kernelSets(r *rapid.T, have ruleset, changes []setDelta) map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, s := range have.sets {
		out[s.name] = maps.Clone(s.elements)
	}
	for _, c := range changes {
		in := out[c.set.name]
		for _, e := range c.del {
			k, _ := keyOf(e.Key, e.IntervalEnd)
			if _, ok := in[k]; !ok {
				r.Fatalf("set %s: %q is not there", c.set.name, k)
			}
			delete(in, k)
		}
		for _, e := range c.add {
			k, v := keyOf(e.Key, e.IntervalEnd)
			if _, ok := in[k]; ok {
				r.Fatalf("set %s: %q is there", c.set.name, k)
			}
			if !e.IntervalEnd {
				v = string(e.Val)
			}
			in[k] = v
		}
	}
	return out
}

func keyOf(key []byte, isEnd bool) (k, v string) {
	if isEnd {
		return string(key) + endMark, intervalEnd
	}
	return string(key), ""
}

// checkEdit compares what an edit makes of left with its slow twin, the ruleset made
// anew, and reports whether the edit could be made.
func checkEdit(r *rapid.T, left, want, was, is ruleset) bool {
	changes, ok := left.edit(was, is)
	if !ok {
		return false
	}
	have := kernelSets(r, left, changes)
	left.become(was, is)
	for _, s := range want.sets {
		if s.dynamic {
			continue
		}
		if !maps.Equal(have[s.name], s.elements) {
			r.Fatalf("the kernel's set %s is %q, want %q", s.name, have[s.name], s.elements)
		}
		if !maps.Equal(left.elementsOf(s), s.elements) {
			r.Fatalf("what is left of %s is %q, want %q", s.name, left.elementsOf(s), s.elements)
		}
	}
	return true
}

// TestEditOfServices: a change of some services leads where making all of them anew
// does, also to the flows that may stay.
func TestEditOfServices(t *testing.T) {
	made := 0
	rapid.Check(t, func(r *rapid.T) {
		n := ingress.Network{IPv6: rapid.Bool().Draw(r, "IPv6")}
		for range rapid.IntRange(2, 6).Draw(r, "passes") {
			was := n
			n.Services = drawServices(r, was.Services)
			edits, ok := ingress.Changes(was.Services, n.Services, expressMost)
			if !ok {
				continue
			}
			old, now := sides(edits)
			left, want := servicesPart(was.Services, n.IPv6), servicesPart(n.Services, n.IPv6)
			if !checkEdit(r, left, want, servicesPart(old, n.IPv6), servicesPart(now, n.IPv6)) {
				if !left.twice && !want.twice {
					r.Fatalf("no edit leads from %v to %v", was.Services, n.Services)
				}
				continue
			}
			gone := goneBackends(old, n.Services)
			had, has := backendsOf(was.Services), backendsOf(n.Services)
			for mac := range had {
				if gone[mac] == has[mac] {
					r.Fatalf("backend %x: gone %v, and there %v", mac, gone[mac], has[mac])
				}
			}
			made++
		}
	})
	if made == 0 {
		t.Error("no edit was made: the test shows nothing")
	}
}

func backendsOf(services []ingress.Service) map[string]bool {
	out := map[string]bool{}
	for _, s := range services {
		for _, b := range s.Backends {
			out[string(b.MAC)] = true
		}
	}
	return out
}

// TestEditOfPorts is the same for published ports.
func TestEditOfPorts(t *testing.T) {
	made := 0
	rapid.Check(t, func(r *rapid.T) {
		f := rapid.SampledFrom([]*family{&ipv4, &ipv6}).Draw(r, "family")
		var table ingress.Table
		for range rapid.IntRange(2, 6).Draw(r, "passes") {
			was := table
			table.Published = drawPorts(r, was.Published)
			left, want := f.publishedPart(was.Published), f.publishedPart(table.Published)
			old, now, ok := changedPorts(was.Published, table.Published, expressMost)
			if !ok {
				if unique(was.Published) {
					r.Fatalf("no changes are told from %v to %v", was.Published, table.Published)
				}
				continue
			}
			if checkEdit(r, left, want, f.publishedPart(old), f.publishedPart(now)) {
				made++
			} else if !left.twice && !want.twice {
				r.Fatalf("no edit leads from %v to %v", was.Published, table.Published)
			}
		}
	})
	if made == 0 {
		t.Error("no edit was made: the test shows nothing")
	}
}

func unique(ports []ingress.Published) bool {
	seen := map[portPlace]bool{}
	for i := range ports {
		seen[placeOf(&ports[i])] = true
	}
	return len(seen) == len(ports)
}

// TestChangedPorts: the ports that are not said to have changed are the same.
func TestChangedPorts(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		was := drawPorts(r, nil)
		is := drawPorts(r, was)
		old, now, ok := changedPorts(was, is, 2)
		same := func(a, b []ingress.Published) (rest []ingress.Published) {
			for _, p := range a {
				if !slices.ContainsFunc(b, func(o ingress.Published) bool { return reflect.DeepEqual(p, o) }) {
					rest = append(rest, p)
				}
			}
			return rest
		}
		gone, come := same(was, is), same(is, was)
		if !ok {
			if unique(was) && unique(is) && len(gone) <= 2 && len(come) <= 2 {
				r.Fatalf("%v to %v is too much", was, is)
			}
			return
		}
		for _, p := range append(gone, come...) {
			if !slices.ContainsFunc(append(slices.Clone(old), now...), func(o ingress.Published) bool { return reflect.DeepEqual(p, o) }) {
				r.Fatalf("%v has changed, from %v to %v", p, was, is)
			}
		}
	})
}

// TestTrackableAbout: of the flows that were right, what is told from the ports that
// have changed is what all of them tell.
func TestTrackableAbout(t *testing.T) {
	local := map[netip.Addr]bool{hostAddrs[0]: true, hostAddrs[1]: true}
	misled := 0
	rapid.Check(t, func(r *rapid.T) {
		was, is := drawTrackable(r), drawTrackable(r)
		old, now, ok := changedPorts(was.Published, is.Published, expressMost)
		if !ok {
			r.Fatal("ports stand twice")
		}
		whole, about := trackableOf(is), trackableAbout(is, append(old, now...))
		for _, f := range newFlows(was) {
			if whole.misled(f, local) {
				misled++
			}
			if got, want := about.misled(f, local), whole.misled(f, local); got != want {
				r.Fatalf("flow %v is misled: %v, want %v; from %+v to %+v", f, got, want, was.Published, is.Published)
			}
		}
	})
	if misled == 0 {
		t.Error("no flow was misled: the test shows nothing")
	}
}

// TestGenerations: what is known of a table ends with the first change by others.
func TestGenerations(t *testing.T) {
	const table = 2
	rapid.Check(t, func(r *rapid.T) {
		gen := rapid.SampledFrom([]uint32{1, 7, 1<<32 - 3}).Draw(r, "generation")
		p := &place{}
		foreign := func() bool {
			if rapid.IntRange(0, 3).Draw(r, "foreign") > 0 {
				return false
			}
			gen = after(gen, 1)
			return true
		}
		right := false
		for range rapid.IntRange(1, 10).Draw(r, "passes") {
			if foreign() {
				right = false
			}
			before := gen
			if p.holds(table, before) && !right {
				r.Fatal("it is known, and others have changed it")
			}
			made := rapid.Uint32Range(0, 3).Draw(r, "transactions")
			gen = after(gen, made)
			right = !foreign()
			p.hold(table, time.Now(), before, gen, made)
			if p.holds(table, gen) != right {
				r.Fatalf("known: %v, want %v", p.holds(table, gen), right)
			}
		}
	})
}
