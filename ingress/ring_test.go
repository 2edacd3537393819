package ingress

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestRingShares(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		n := rapid.IntRange(1, 200).Draw(r, "backends")
		keys := rapid.SliceOfNDistinct(rapid.StringN(1, 25, -1), n, n, rapid.ID).Draw(r, "keys")
		size := RingSize(n)
		ring := Ring(keys, size)
		count := make([]int, n)
		for _, i := range ring {
			if i < 0 {
				r.Fatalf("a slot is empty")
			}
			count[i]++
		}
		if lo, hi := slices.Min(count), slices.Max(count); hi-lo > 1 {
			r.Fatalf("shares of %d backends range from %d to %d of %d slots", n, lo, hi, size)
		}
	})
}

// TestRingIsStable: removing one backend moves its own slots and few others.
func TestRingIsStable(t *testing.T) {
	for _, n := range []int{2, 3, 8, 20, 100} {
		keys := make([]string, n)
		for i := range keys {
			keys[i] = fmt.Sprintf("task%025d", i)
		}
		size := RingSize(n)
		before, after := Ring(keys, size), Ring(keys[:n-1], size)
		moved := 0
		for s := range before {
			if before[s] != n-1 && before[s] != after[s] {
				moved++
			}
		}
		// Plain modulo hashing would move nearly all; Maglev's paper reports a few
		// percent at 100 slots per backend, small rings move more.
		if limit := size / 3; moved > limit {
			t.Errorf("%d backends: removing one moved %d of %d slots of others, want at most %d", n, moved, size, limit)
		}
	}
}

func TestRingOfNothing(t *testing.T) {
	if r := Ring(nil, 64); r != nil {
		t.Errorf("ring of no backends = %v", r)
	}
}
