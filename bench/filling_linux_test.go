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

// TestFilling: what is told of an engine is what it keeps, each filling is from nothing,
// and one service at a time changes.
func TestFilling(t *testing.T) {
	const count = 40
	k := &keeper{}
	out := sample{}
	table := ingress.Table{Networks: make([]ingress.Network, 1)}
	if err := (filling{k, table, count, k.memory}).measure(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	for _, m := range fillingMetrics {
		if _, ok := out[m.Name]; !ok {
			t.Errorf("nothing said of %s", m.Name)
		}
	}
	if out[fillEmpty] != 1 || out[fillService] != 350 || out[fillBackend] != 50 {
		t.Errorf("%v MiB without services, %v B for one of one backend, %v for each more; want 1, 350, 50", out[fillEmpty], out[fillService], out[fillBackend])
	}
	full := [2]int{count, count * backendsEach}
	want := [][2]int{{}, {count, count}, {}, full}
	for range changesEach {
		want = append(want, full)
	}
	if len(k.applied) != len(want) {
		t.Fatalf("applied %v, want %v", k.applied, want)
	}
	for i := range want {
		if k.applied[i] != want[i] {
			t.Errorf("applied %v at %d, want %v", k.applied[i], i, want[i])
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
