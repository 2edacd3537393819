package main

import (
	"context"
	"slices"
	"testing"

	"github.com/weftnet/weft/ingress"
)

// keeper is an engine whose kernel keeps 1,000 bytes for itself, 300 for a service and 50
// for each of its backends, and that knows the last table.
type keeper struct {
	table   ingress.Table
	applied [][2]int // services and backends of each Apply
}

func (k *keeper) Name() string                                       { return "keeper" }
func (k *keeper) Probe(context.Context) error                        { return nil }
func (k *keeper) Stats(context.Context) (s ingress.Stats, err error) { return s, nil }
func (k *keeper) Close(context.Context) error                        { return nil }

func (k *keeper) Apply(_ context.Context, t ingress.Table) error {
	n := [2]int{len(t.Networks[0].Services)}
	for _, s := range t.Networks[0].Services {
		n[1] += len(s.Backends)
	}
	k.applied = append(k.applied, n)
	k.table = t
	return nil
}

func (k *keeper) memory(context.Context) (int64, error) {
	if len(k.applied) == 0 {
		return 77 << 20, nil
	}
	n := k.applied[len(k.applied)-1]
	return 78<<20 + int64(300*n[0]+50*n[1]), nil
}

// TestFilling: what is told of an engine is what it keeps, and one service at a time changes.
func TestFilling(t *testing.T) {
	const count = 40
	for _, backends := range []int{1, backendsEach} {
		k := &keeper{}
		out := sample{}
		f := filling{k, ingress.Table{Networks: make([]ingress.Network, 1)}, count, backends, k.memory}
		held, err := f.measure(t.Context(), out)
		if want := int64(count * (300 + 50*backends)); err != nil || held != want {
			t.Errorf("%d backends: %d bytes, %v, want %d", backends, held, err, want)
		}
		for _, name := range []string{fillMany, fillOne, fillEmpty, fillModel} {
			if _, ok := out[name]; !ok {
				t.Errorf("nothing said of %s", name)
			}
		}
		if out[fillEmpty] != 1 {
			t.Errorf("%v MiB without services, want 1", out[fillEmpty])
		}
		want := [][2]int{{}}
		for range 1 + changesEach {
			want = append(want, [2]int{count, count * backends})
		}
		if !slices.Equal(k.applied, want) {
			t.Errorf("applied %v, want %v", k.applied, want)
		}
	}
}

// TestFillingsAreMeasured: each engine that is filled is a case, and no limit is left out.
func TestFillingsAreMeasured(t *testing.T) {
	c := servicesBench().Choices
	for _, name := range fillingCases {
		if !slices.Contains(c.Usual, name) {
			t.Errorf("%s is no usual case", name)
		}
	}
	if got := limitsOn(fillingLimits, pathRaw, c.Usual, c.usualMetrics()); len(got) != len(fillingLimits) {
		t.Errorf("limits %v of %v", got, fillingLimits)
	}
}
