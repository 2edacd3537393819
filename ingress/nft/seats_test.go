package nft

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// slowSeat is the twin of seat: it asks for each seat, again and again, who may
// take it first.
func slowSeat(keys []string) seating {
	size := seatCount(len(keys))
	left := map[int]bool{}
	s := seating{}
	for i := range size {
		left[i] = true
		s.own, s.heir = append(s.own, -1), append(s.heir, -1)
	}
	order := slices.Clone(keys)
	slices.SortFunc(order, func(a, b string) int {
		x, y := newGuest(0, a).hash, newGuest(0, b).hash
		if x < y || x == y && a < b {
			return -1
		}
		return 1
	})
	for _, of := range [][]int{s.own, s.heir} {
		for _, k := range order {
			g := newGuest(slices.Index(keys, k), k)
			for range size {
				if at := g.next(size); left[at] {
					of[at] = g.key
					delete(left, at)
					break
				}
			}
		}
	}
	return s
}

func TestSeatsAreAsTheSlowOnes(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		keys := rapid.SliceOfNDistinct(rapid.StringN(1, 25, -1), 1, 70, rapid.ID).Draw(r, "keys")
		got, want := seat(keys), slowSeat(keys)
		if !slices.Equal(got.own, want.own) || !slices.Equal(got.heir, want.heir) {
			r.Fatalf("%v, want %v", got, want)
		}
		for i := range got.own {
			if (got.own[i] < 0) == (got.heir[i] < 0) {
				r.Fatalf("seat %d is taken by %d and left to %d", i, got.own[i], got.heir[i])
			}
		}
		shuffled := rapid.Permutation(keys).Draw(r, "another order")
		again := seat(shuffled)
		for i := range got.own {
			if name(keys, got.own[i]) != name(shuffled, again.own[i]) || name(keys, got.heir[i]) != name(shuffled, again.heir[i]) {
				r.Fatalf("seat %d depends on the order", i)
			}
		}
	})
}

func name(keys []string, i int) string {
	if i < 0 {
		return ""
	}
	return keys[i]
}

func taskKeys(n int) []string {
	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("task%021d", i)
	}
	return keys
}

// shares is the part of all flows that each key gets.
func (s seating) shares(n int) []float64 {
	size, empty := float64(len(s.own)), 0
	for _, k := range s.own {
		if k < 0 {
			empty++
		}
	}
	left, out := 1.0, make([]float64, n)
	for range seatTries {
		for _, k := range s.own {
			if k >= 0 {
				out[k] += left / size
			}
		}
		left *= float64(empty) / size
	}
	for _, k := range s.heir {
		if k >= 0 {
			out[k] += left / float64(empty)
		}
	}
	return out
}

// TestSeatShares: every backend gets its share, within one in eight.
func TestSeatShares(t *testing.T) {
	for n := 1; n <= 300; n++ {
		sum := 0.0
		for k, share := range seat(taskKeys(n)).shares(n) {
			if sum += share; share*float64(n) < 0.875 || share*float64(n) > 1.125 {
				t.Errorf("%d backends: number %d gets %.3f of its share", n, k, share*float64(n))
			}
		}
		if sum < 0.999 || sum > 1.001 {
			t.Errorf("%d backends: the shares are %.3f in all", n, sum)
		}
	}
}

// TestSeatsAreFew: what a service takes in the kernel is less than two elements for
// each of its backends, and more backends than seats do no harm.
func TestSeatsAreFew(t *testing.T) {
	for n, want := range map[int]int{1: 1, 2: 2, 3: 4, 10: 16, 64: 64, 65: 128, 2048: 2048, 40000: mostSeats} {
		s := seat(taskKeys(n))
		if len(s.own) != want || slices.Contains(s.own, -1) != (n&(n-1) != 0 && n < mostSeats) {
			t.Errorf("%d backends: %d seats, of which %v are empty", n, len(s.own), slices.Contains(s.own, -1))
		}
	}
	if s := seat(nil); len(s.own) != 0 {
		t.Errorf("seats of nobody: %v", s)
	}
}

// TestSeatsAreStable: when a backend goes its own flows move and few others; when the
// seats double some find their backend again.
func TestSeatsAreStable(t *testing.T) {
	const flows = 20000
	for _, n := range []int{3, 8, 9, 10, 20, 33, 100} {
		keys := taskKeys(n)
		before, after := seat(keys), seat(keys[:n-1])
		moved, others := 0, 0
		for i := range uint64(flows) {
			was := before.of(i)
			if was == n-1 {
				continue
			}
			if others++; was != after.of(i) {
				moved++
			}
		}
		limit := 0.34
		if len(before.own) != len(after.own) {
			limit = 0.75
		}
		t.Logf("%d backends: removing one moved %.0f %% of the others' flows", n, 100*float64(moved)/float64(others))
		if float64(moved) > limit*float64(others) {
			t.Errorf("%d backends: removing one moved %d of %d flows of others, want at most %.0f %%", n, moved, others, limit*100)
		}
	}
}

// of is the backend of a flow.
func (s seating) of(flow uint64) int {
	at := 0
	for try := range seatTries {
		at = int(newGuest(0, fmt.Sprint(flow, "try", try)).hash >> 32 * uint64(len(s.own)) >> 32)
		if s.own[at] >= 0 {
			return s.own[at]
		}
	}
	return s.heir[at]
}
