package sandbox

import (
	"strings"
	"testing"
)

// TestResolverOptions: what a person says about dots is what the file has, and is said
// once; who says nothing has names asked as they are first.
func TestResolverOptions(t *testing.T) {
	for _, c := range []struct {
		given, want string
	}{
		{"", "ndots:0"},
		{"rotate", "rotate ndots:0"},
		{"ndots:1", "ndots:1"},
		{"ndots:5 timeout:1", "ndots:5 timeout:1"},
		{"timeout:1 ndots:15 rotate", "timeout:1 ndots:15 rotate"},
		{"ndots:0", "ndots:0"},
	} {
		want := "nameserver " + Resolver + "\nsearch lan\noptions " + c.want + "\n"
		if got := resolvConf(Spec{Search: []string{"lan"}, Options: strings.Fields(c.given)}); got != want {
			t.Errorf("options %q give %q, want %q", c.given, got, want)
		}
	}
}
