package dns

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// slowLeaves is the slow twin of what is forwarded of names that nobody has: it goes
// by labels. public are top domains that networks are called after.
func slowLeaves(name string, networks, search, host []string, public map[string]bool) bool {
	labels := func(s string) []string { return strings.Split(strings.ToLower(s), ".") }
	endsIn := func(long, short []string) bool {
		return len(long) >= len(short) && slices.Equal(long[len(long)-len(short):], short)
	}
	all := labels(name)
	if len(all) > 2 && all[0] == "_80" && all[1] == "_tcp" {
		all = all[2:]
	}
	if len(all) == 1 {
		return false
	}
	domains := append(mapped(search, labels), mapped(host, labels)...)
	for _, n := range mapped(networks, labels) {
		if len(all) <= len(n) || !endsIn(all, n) || public[n[len(n)-1]] {
			continue
		}
		if !slices.ContainsFunc(domains, func(d []string) bool { return endsIn(d, n) }) {
			return false
		}
	}
	return true
}

func mapped[T, U any](in []T, f func(T) U) (out []U) {
	for _, v := range in {
		out = append(out, f(v))
	}
	return out
}

// TestForwardedAgainstSlowTwin: which unknown names leave the node.
func TestForwardedAgainstSlowTwin(t *testing.T) {
	public := map[string]bool{"app": true, "ck": true, "dev": true}
	label := rapid.SampledFrom([]string{"a", "front", "Corp", "dev", "ck", "back", "x"})
	name := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(label, 1, 4).Draw(t, "labels"), ".")
	})
	network := rapid.SampledFrom([]string{"front", "Back", "corp", "dev", "ck", "app", "a.front", "x.dev"})
	went := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		networks := rapid.SliceOfNDistinct(network, 1, 3, rapid.ID).Draw(t, "networks")
		search, host := rapid.SliceOfN(name, 0, 2).Draw(t, "search"), rapid.SliceOfN(name, 0, 2).Draw(t, "host")
		q := name.Draw(t, "before") + rapid.SampledFrom(append([]string{"", "." + networks[0]}, mapped(append(search, search...), func(d string) string { return "." + networks[0] + "." + d })...)).Draw(t, "behind")
		if rapid.IntRange(0, 4).Draw(t, "srv") == 0 {
			q = "_80._tcp." + q
		}
		v, r := View{Search: search, HostSearch: host}, Records{Networks: map[weft.ID]Network{red: {Name: "x"}}}
		for i, n := range networks {
			id := weft.ID(fmt.Sprint("n", i))
			v.Networks = append(v.Networks, id)
			r.Networks[id] = Network{Name: n}
		}
		want := slowLeaves(q, networks, search, host, public)
		went[want]++
		if _, _, d := NewSnapshot(r).lookup(compile(&v), []byte(fold(q)), false); (d == verdictForward) != want {
			t.Fatalf("%s on %q, search %q, host %q: verdict %v, slow twin says forwarded=%v", q, networks, search, host, d, want)
		}
	})
	if went[true] < 10 || went[false] < 10 {
		t.Errorf("%d are forwarded, %d not: the comparison says little", went[true], went[false])
	}
}
