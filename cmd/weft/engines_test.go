package main

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/weftnet/weft/vxlan"
)

// costly is an engine whose probe is noted, and fails.
type costly struct {
	name   string
	probed *[]string
}

func (c costly) Name() string { return c.name }

func (c costly) Probe(context.Context) error {
	*c.probed = append(*c.probed, c.name)
	return errors.New("lacks something")
}

// TestForcedEnginesAreProbedAlone: programs that the flags exclude are not loaded, and
// the engines are named all the same.
func TestForcedEnginesAreProbedAlone(t *testing.T) {
	for _, c := range []struct {
		forced vxlan.Pair
		want   []string
	}{
		{vxlan.Pair{}, []string{"ebpf", "ipvs", "nft"}},
		{vxlan.Pair{Overlay: "bridge"}, []string{"ipvs", "nft"}},
		{vxlan.Pair{Service: "nft"}, []string{"nft"}},
	} {
		var probed []string
		all := []costly{{"ebpf", &probed}, {"ipvs", &probed}, {"nft", &probed}}
		got := judge(t.Context(), all, c.forced.MayService, func(costly) string { return "a note" })
		if !slices.Equal(probed, c.want) {
			t.Errorf("%+v: probed are %v, want %v", c.forced, probed, c.want)
		}
		for i, k := range got {
			asked := slices.Contains(c.want, k.Name)
			if k.Name != all[i].name || (k.Err != nil) != asked || (k.Note != "") != asked {
				t.Errorf("%+v: %+v", c.forced, k)
			}
		}
		if len(got) != len(all) {
			t.Errorf("%+v: %d candidates of %d engines", c.forced, len(got), len(all))
		}
	}
}
