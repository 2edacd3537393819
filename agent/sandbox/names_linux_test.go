package sandbox

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/vxlan/netns"
)

// TestSearchDomainsStay: what resolv.conf was made with is told by Make and List, and
// stays as long as the namespace, whatever is asked for later.
func TestSearchDomainsStay(t *testing.T) {
	m, ctx := maker(t), t.Context()
	s := spec()
	want := func(when string, domains ...string) {
		t.Helper()
		sb, err := m.Make(ctx, s)
		must(t, err)
		list, err := m.List(ctx)
		must(t, err)
		for _, got := range append(list, sb) {
			if !got.IsSearchKnown || !slices.Equal(got.Search, domains) {
				t.Errorf("%s: domains %q, known %v, want %q", when, got.Search, got.IsSearchKnown, domains)
			}
		}
		if text, err := os.ReadFile(sb.ResolvConfPath); err != nil || !strings.Contains(string(text), "\nsearch "+strings.Join(domains, " ")+"\n") {
			t.Errorf("%s: resolv.conf is %q, %v, want %q in it", when, text, err, domains)
		}
	}
	want("at first", "example.com")
	s.Search = []string{"other.example", "lan"}
	want("the host has others", "example.com")
	must(t, os.WriteFile(m.describe(s.Task).ResolvConfPath, []byte("search of.the.container\n"), 0o644))
	want("the container wrote it", "example.com")

	// The folder outlives a power cut, the namespace and its container do not.
	must(t, netns.Remove(m.describe(s.Task).NetNS))
	want("after a power cut", "other.example", "lan")

	for name, b := range map[string]string{"damaged": `{"Version":1,"Sea`, "of another version": `{"Version":2,"Search":["x"]}`, "missing": ""} {
		path := m.namesRecord(s.Task)
		if must(t, os.Remove(path)); b != "" {
			must(t, os.WriteFile(path, []byte(b), 0o644))
		}
		list, err := m.List(ctx)
		must(t, err)
		if len(list) != 1 || list[0].IsSearchKnown || list[0].Search != nil {
			t.Errorf("a record that is %s says %+v", name, list)
		}
		s.Search = []string{"after." + strings.ReplaceAll(name, " ", "-")}
		want(name, s.Search...)
	}
}
