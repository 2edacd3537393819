package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestSlotsProperty: every round runs everything once; over twice as many
// rounds as there are runs in one, everything stands at every place twice, and runs
// as often right after a neighbour as right before it.
func TestSlotsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cases := rapid.IntRange(0, 6).Draw(t, "cases")
		first := 2 * rapid.IntRange(0, 50).Draw(t, "first pair of rounds")
		n := cases + 2
		at := make([][]int, n)      // place: the slots seen there
		follows := map[[2]int]int{} // pair of neighbours: how often in this order
		for r := first; r < first+2*n; r++ {
			order := slots(n, r)
			for place, slot := range order {
				at[place] = append(at[place], slot)
				if place > 0 {
					follows[[2]int{order[place-1], slot}]++
				}
			}
			slices.Sort(order)
			for i, slot := range order {
				if i != slot {
					t.Fatalf("round %d runs %v", r, order)
				}
			}
		}
		for place, seen := range at {
			slices.Sort(seen)
			for i, slot := range seen {
				if slot != i/2 {
					t.Fatalf("place %d saw %v", place, seen)
				}
			}
		}
		for pair, times := range follows {
			if back := follows[[2]int{pair[1], pair[0]}]; back != times {
				t.Fatalf("%v ran in this order %d times, in the other %d times", pair, times, back)
			}
		}
	})
}

// script is a plan whose cases note that they ran and yield rising values.
func script(ran *[]string, cases ...string) plan {
	count := 0.0
	note := func(name string) variant {
		return variant{name, func(context.Context) (sample, error) {
			*ran = append(*ran, name)
			count++
			return sample{"time": count}, nil
		}}
	}
	p := plan{Metrics: []metric{{"time", "s", true}}, Baseline: note("raw")}
	for _, c := range cases {
		p.Cases = append(p.Cases, note(c))
	}
	return p
}

func TestMeasure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran []string
		var progress bytes.Buffer
		t0 := time.Now()
		s, err := script(&ran, "a", "b").measure(t.Context(), "x", 3, &progress)
		if err != nil {
			t.Fatal(err)
		}
		if want := "raw a b raw raw b a raw a b raw raw"; strings.Join(ran, " ") != want {
			t.Errorf("ran %v, want %s", ran, want)
		}
		// The second round runs raw again (5), b (6), a (7), raw (8), the
		// third a (9), b (10), raw again (11), raw (12).
		for i, want := range [][4]float64{{8, 5, 7, 6}, {12, 11, 9, 10}} {
			r := s.Rounds[i+1]
			if got := [4]float64{r.Baseline["time"], r.Again["time"], r.Cases[0]["time"], r.Cases[1]["time"]}; got != want {
				t.Errorf("round %d: %v, want %v", i+2, got, want)
			}
		}
		if got := time.Since(t0); got != 12*settle {
			t.Errorf("rested for %v, want %v", got, 12*settle)
		}
		if got := progress.String(); strings.Count(got, "\n") != 12 || !strings.Contains(got, "round 3 of 3: a ... time 9 s\n") {
			t.Errorf("progress\n%s", got)
		}
	})
}

// TestMeasureOwnBaseline: a baseline of some cases is run twice, too.
func TestMeasureOwnBaseline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran []string
		p := script(&ran, "a", "b", "c")
		p.Own = map[string]string{"b": "a", "c": "a"}
		s, err := p.measure(t.Context(), "x", 2, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if want := "raw a b c raw a a raw c b a raw"; strings.Join(ran, " ") != want {
			t.Errorf("ran %v, want %s", ran, want)
		}
		for i, want := range [][2]float64{{2, 6}, {11, 7}} {
			r := s.Rounds[i]
			if got := [2]float64{r.Cases[0]["time"], r.Agains[0]["time"]}; got != want {
				t.Errorf("round %d: a and again %v, want %v", i+1, got, want)
			}
		}
		if rows, err := s.rows(); err != nil || len(rows) != 4+2+3 {
			t.Errorf("%d rows, %v, want 4 raw ones, noise and a over raw, noise, b and c over a", len(rows), err)
		}
	})
}

func TestMeasureStopsAtFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran []string
		p := script(&ran, "a", "b")
		broken := errors.New("no such host")
		p.Cases[0].Run = func(context.Context) (sample, error) { return nil, broken }
		_, err := p.measure(t.Context(), "x", 3, io.Discard)
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), `round 1 of 3, case "a"`) {
			t.Errorf("error %v", err)
		}
		if len(ran) != 1 {
			t.Errorf("ran %v after the failure", ran)
		}
	})
}

func TestMeasureIsBounded(t *testing.T) {
	hang := func(ctx context.Context) (sample, error) { <-ctx.Done(); return nil, ctx.Err() }
	for _, tc := range []struct {
		name     string
		patience time.Duration // of the plan
		after    time.Duration // of the caller's patience; 0 = none
		want     error
		took     time.Duration
	}{
		{"case hangs", 0, 0, context.DeadlineExceeded, settle + caseTimeout},
		{"case hangs in a plan with patience", time.Hour, 0, context.DeadlineExceeded, settle + time.Hour},
		{"interrupted", 0, settle + time.Second, context.Canceled, settle + time.Second},
		{"interrupted at rest", 0, settle / 2, context.Canceled, settle / 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tc.after > 0 {
					defer time.AfterFunc(tc.after, cancel).Stop()
				}
				t0 := time.Now()
				_, err := plan{Baseline: variant{"raw", hang}, Patience: tc.patience}.measure(ctx, "x", 2, io.Discard)
				if !errors.Is(err, tc.want) {
					t.Errorf("error %v, want %v", err, tc.want)
				}
				if got := time.Since(t0); got != tc.took {
					t.Errorf("took %v, want %v", got, tc.took)
				}
			})
		})
	}
}

func TestCloseBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // as after Ctrl-C
		if err := closeBounded(ctx, func(ctx context.Context) error { return ctx.Err() }); err != nil {
			t.Errorf("cleaning up after an interrupt: %v", err)
		}
		err := closeBounded(ctx, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a hanging clean-up ended with %v", err)
		}
	})
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1: "1", 0.046337: "0.04634", 35.8412: "35.84", 12345.6: "12350", 1e-7: "0.0000001", 2.5e9: "2500000000"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
}
