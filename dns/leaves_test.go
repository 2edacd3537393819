package dns

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// realDomains are the top domains that names in this file are called after.
var realDomains = []string{"app", "ck", "dev"}

func labelsOf(s string) []string { return strings.Split(strings.ToLower(s), ".") }

func endsIn(long, short []string) bool {
	return len(long) >= len(short) && slices.Equal(long[len(long)-len(short):], short)
}

// slowKnown reports whether v has the name, in full or with a network behind.
func slowKnown(r Records, v View, name string) bool {
	for _, id := range v.Networks {
		n := r.Networks[id]
		for _, q := range []string{name, strings.TrimSuffix(name, "."+strings.ToLower(n.Name))} {
			if _, exists := slow(n, q, false); exists || slices.Contains(v.Self.Names, q) || v.Service != "" && q == fmt.Sprint(v.Self.Slot, ".", v.Service) {
				return true
			}
		}
	}
	return false
}

// slowMade reports whether the name is one that the cluster makes of services, hosts and
// slots, on any network; with a network behind if v has what it stands for.
func slowMade(r Records, v View, name string) bool {
	made := map[string]bool{}
	for id, n := range r.Networks {
		names := []string{}
		for _, s := range n.Services {
			names = append(names, "tasks."+s.Name)
			for _, t := range s.Tasks {
				if t.Slot != 0 {
					names = append(names, fmt.Sprint(t.Slot, ".", s.Name))
				} else if t.Host != "" {
					names = append(names, t.Host+"."+s.Name)
				}
				names = append(names, t.Names[0])
			}
		}
		if v.Service != "" && slices.Contains(v.Networks, id) {
			names = append(names, v.Self.Names[0], fmt.Sprint(v.Self.Slot, ".", v.Service))
		}
		for _, q := range names {
			made[strings.ToLower(q)] = true
			if slices.Contains(v.Networks, id) {
				made[strings.ToLower(q+"."+n.Name)] = true
			}
		}
	}
	return made[strings.ToLower(name)]
}

// slowLeaves is the slow twin of what is forwarded: it goes by labels.
func slowLeaves(r Records, v View, name string) bool {
	name = strings.ToLower(name)
	all, plain := labelsOf(name), labelsOf(name)
	isSRV := len(all) > 2 && all[0] == "_80" && all[1] == "_tcp"
	if isSRV {
		plain = all[2:]
	}
	whole := strings.Join(plain, ".")
	domains := append(mapped(v.Search, labelsOf), mapped(v.HostSearch, labelsOf)...)
	isReal := func(end []string) bool {
		return slices.ContainsFunc(domains, func(d []string) bool { return endsIn(d, end) })
	}
	if len(plain) == 1 || slowKnown(r, v, name) || slowMade(r, v, whole) {
		return false
	}
	services, aliases := map[string]bool{v.Service: v.Service != ""}, map[string]bool{}
	for _, id := range v.Networks {
		for _, s := range r.Networks[id].Services {
			services[strings.ToLower(s.Name)] = true
			for _, a := range s.Aliases {
				aliases[strings.ToLower(a)] = true
			}
		}
		n := labelsOf(r.Networks[id].Name)
		if len(all) > len(n) && endsIn(all, n) && !slices.Contains(realDomains, n[len(n)-1]) && !isReal(n) {
			return false
		}
	}
	isOffered := func(name string) bool { // SRV
		for _, id := range v.Networks {
			for _, s := range r.Networks[id].Services {
				for _, a := range append([]string{s.Name}, s.Aliases...) {
					if a = strings.ToLower(a); name == a || name == a+"."+strings.ToLower(r.Networks[id].Name) {
						return true
					}
				}
			}
		}
		return false
	}
	if isSRV && isOffered(whole) {
		return false
	}
	for _, d := range v.Search {
		host, ok := strings.CutSuffix(whole, "."+strings.ToLower(d))
		if ok && (!isSRV && slowKnown(r, v, host) || isSRV && isOffered(host) || slowMade(r, v, host)) {
			return false
		}
	}
	isPlace := func(labels []string) bool {
		n, err := strconv.Atoi(labels[0])
		return len(labels) == 2 && (labels[0] == "tasks" || err == nil && n > 0) && services[labels[1]]
	}
	if last := plain[len(plain)-1]; isPlace(plain) || (services[last] || aliases[last]) && !slices.Contains(realDomains, last) && !isReal([]string{last}) {
		return false
	}
	for _, id := range v.Networks {
		if n := labelsOf(r.Networks[id].Name); endsIn(plain, n) && len(plain) == len(n)+2 && slowHas(r.Networks[id], v, plain[1]) && isPlace(plain[:2]) {
			return false
		}
	}
	return true
}

// slowHas reports whether a network has the service, or it is v's own.
func slowHas(n Network, v View, name string) bool {
	return v.Service == name || slices.ContainsFunc(n.Services, func(s Service) bool { return strings.EqualFold(s.Name, name) })
}

func mapped[T, U any](in []T, f func(T) U) (out []U) {
	for _, v := range in {
		out = append(out, f(v))
	}
	return out
}

// TestForwardedAgainstSlowTwin: which names leave the node.
func TestForwardedAgainstSlowTwin(t *testing.T) {
	label := rapid.SampledFrom([]string{"a", "front", "Corp", "dev", "ck", "back", "x", "db", "App", "tasks", "1", "3", "h1"})
	name := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(label, 1, 4).Draw(t, "labels"), ".")
	})
	network := rapid.SampledFrom([]string{"front", "Back", "corp", "dev", "ck", "app", "a.front", "x.dev"})
	called := rapid.SampledFrom([]string{"db", "App", "x", "corp", "back"})
	service := rapid.Custom(func(t *rapid.T) Service {
		s := Service{Name: called.Draw(t, "service"), Aliases: rapid.SliceOfN(called, 0, 1).Draw(t, "aliases"), VIP: addrs("10.0.0.1")}
		for range rapid.IntRange(0, 2).Draw(t, "tasks") {
			s.Tasks = append(s.Tasks, Task{
				Slot: uint64(rapid.IntRange(0, 1).Draw(t, "slot")), Host: rapid.SampledFrom([]string{"", "h1", "H2.a"}).Draw(t, "host"),
				Names: []string{s.Name + ".1.a"}, Ready: rapid.Bool().Draw(t, "ready"), Addrs: addrs("10.0.0.2"),
			})
		}
		return s
	})
	went := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		networks := rapid.SliceOfNDistinct(network, 1, 3, rapid.ID).Draw(t, "networks")
		v := View{Search: rapid.SliceOfN(name, 0, 2).Draw(t, "search"), HostSearch: rapid.SliceOfN(name, 0, 2).Draw(t, "host")}
		if rapid.Bool().Draw(t, "own") {
			v.Service, v.Self = "db", Task{Slot: 2, Names: []string{"db.2.a"}, Addrs: addrs("10.0.0.3")}
		}
		r := Records{Networks: map[weft.ID]Network{red: {Name: "x", Services: rapid.SliceOfN(service, 0, 1).Draw(t, "elsewhere")}}}
		for i, n := range networks {
			id := weft.ID(fmt.Sprint("n", i))
			v.Networks = append(v.Networks, id)
			r.Networks[id] = Network{Name: n, Services: rapid.SliceOfN(service, 0, 2).Draw(t, "services")}
		}
		ends := []string{"", "", "." + networks[0]}
		for _, d := range v.Search {
			ends = append(ends, "."+d, "."+networks[0]+"."+d)
		}
		for _, id := range v.Networks {
			for _, s := range r.Networks[id].Services {
				ends = append(ends, "."+s.Name, "."+s.Name+"."+r.Networks[id].Name)
			}
		}
		q := name.Draw(t, "before") + rapid.SampledFrom(ends).Draw(t, "behind")
		if rapid.IntRange(0, 4).Draw(t, "srv") == 0 {
			q = "_80._tcp." + q
		}
		want := slowLeaves(r, v, q)
		went[want]++
		m := new(miekg.Msg).SetQuestion(q+".", miekg.TypeA)
		snap := NewSnapshot(r)
		if _, got := respond(snap, compile(&v), m, 0); got != want {
			t.Fatalf("%s of %+v by %+v: forwarded=%v, slow twin says %v", q, r, v, got, want)
		}
		packet, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if want && quick(snap, compile(&v), packet, 0) != nil {
			t.Fatalf("%s of %+v by %+v is answered by the quick way", q, r, v)
		}
	})
	if went[true] < 10 || went[false] < 10 {
		t.Errorf("%d are forwarded, %d not: the comparison says little", went[true], went[false])
	}
}
