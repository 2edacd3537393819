package main

import (
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// twoRounds is a series with one case, whose ratios are 2 and 4, a metric that
// is not divided, and one that only the case yields.
func twoRounds() series {
	return series{
		Bench:    "b",
		Metrics:  []metric{{"time", "s", true}, {"failed", "requests", false}},
		Baseline: "raw",
		Cases:    []string{"weft"},
		Rounds: []round{
			{Baseline: sample{"time": 1}, Again: sample{"time": 1.5}, Cases: []sample{{"time": 2, "failed": 0}}},
			{Baseline: sample{"time": 2}, Again: sample{"time": 2}, Cases: []sample{{"time": 8, "failed": 3}}},
		},
	}
}

func TestRows(t *testing.T) {
	got, err := twoRounds().rows()
	if err != nil {
		t.Fatal(err)
	}
	want := []Row{
		{"b", "raw", "time", "", 1.5, 1, 2, 2, "s"},
		{"b", "weft", "time", "", 5, 2, 8, 2, "s"},
		{"b", "weft", "failed", "", 1.5, 0, 3, 2, "requests"},
		{"b", "raw", "time", "raw", 1.25, 1, 1.5, 2, "ratio"},
		{"b", "weft", "time", "raw", 3, 2, 4, 2, "ratio"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("rows\n%+v, want\n%+v", got, want)
	}
}

func TestRowsRefuse(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		spoil      func(*series)
	}{
		{"baseline 0", "the baseline is 0 in round 2", func(s *series) { s.Rounds[1].Baseline["time"] = 0 }},
		{"baseline too small", "too small", func(s *series) { s.Rounds[1].Baseline["time"] = math.SmallestNonzeroFloat64 }},
		{"not a number", `round 1, case "weft": metric "time" is NaN`, func(s *series) { s.Rounds[0].Cases[0]["time"] = math.NaN() }},
		{"infinite", "is +Inf", func(s *series) { s.Rounds[0].Baseline["time"] = math.Inf(1) }},
		{"negative", "is -1", func(s *series) { s.Rounds[0].Cases[0]["failed"] = -1 }},
		{"not declared", `metric "x" is not declared`, func(s *series) { s.Rounds[0].Cases[0]["x"], s.Rounds[1].Cases[0]["x"] = 1, 1 }},
		{"hole", `round 2, case "weft"`, func(s *series) { delete(s.Rounds[1].Cases[0], "failed") }},
		{"hole in the noise", `case "raw" again`, func(s *series) { s.Rounds[1].Again = sample{} }},
		{"case missing", "round 2 has 0 cases", func(s *series) { s.Rounds[1].Cases = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := twoRounds()
			tc.spoil(&s)
			if _, err := s.rows(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// slowMedian is the definition: as many values are not above it as are not
// below it; between two middle values, their mean.
func slowMedian(values []float64) float64 {
	var middle []float64
	for _, v := range values {
		below, above := 0, 0
		for _, w := range values {
			if w < v {
				below++
			}
			if w > v {
				above++
			}
		}
		if 2*below <= len(values) && 2*above <= len(values) {
			middle = append(middle, v)
		}
	}
	return slices.Min(middle)/2 + slices.Max(middle)/2
}

func TestSpreadProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.Float64Range(0, math.MaxFloat64), 1, 12).Draw(t, "values")
		before := slices.Clone(values)
		median, low, high := spread(values)
		if !slices.Equal(values, before) {
			t.Fatal("spread changed its input")
		}
		if want := slowMedian(values); median != want {
			t.Fatalf("median %v, want %v", median, want)
		}
		if low != slices.Min(values) || high != slices.Max(values) {
			t.Fatalf("extremes %v and %v of %v", low, high, values)
		}
	})
}

// TestRatioProperty: a case that takes k times its baseline has the ratio k
// however much the machine's speed varies between rounds. That is why rounds
// are divided first and summarised then.
func TestRatioProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := rapid.Float64Range(0.01, 100).Draw(t, "k")
		s := series{Bench: "b", Metrics: []metric{{"time", "s", true}}, Baseline: "raw", Cases: []string{"weft"}}
		for _, speed := range rapid.SliceOfN(rapid.Float64Range(0.001, 1000), 1, 9).Draw(t, "speeds") {
			s.Rounds = append(s.Rounds, round{Baseline: sample{"time": speed}, Again: sample{"time": speed}, Cases: []sample{{"time": k * speed}}})
		}
		rows, err := s.rows()
		if err != nil {
			t.Fatal(err)
		}
		if len(rows) != 4 {
			t.Fatalf("%d rows, want 2 raw ones, noise and ratio", len(rows))
		}
		for i, want := range []float64{1, k} {
			r := rows[2+i]
			for _, got := range []float64{r.Min, r.Median, r.Max} {
				if math.Abs(got-want) > 1e-5*want {
					t.Fatalf("row %+v, want %v everywhere", r, want)
				}
			}
		}
	})
}

func TestJudge(t *testing.T) {
	rows, err := twoRounds().rows()
	if err != nil {
		t.Fatal(err)
	}
	got, err := judge(rows, []limit{{"weft", "time", 5, false}, {"weft", "time", 5, true}, {"weft", "failed", 0, true}})
	if err != nil {
		t.Fatal(err)
	}
	want := []Verdict{{"weft", "time", 5, "median", 5, "s", true}, {"weft", "time", 5, "max", 8, "s", false}, {"weft", "failed", 0, "max", 3, "requests", false}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("verdicts %+v, want %+v", got, want)
	}
	// The ratio row of a metric is not its raw row.
	if _, err := judge(rows[3:], []limit{{"weft", "time", 5, false}}); err == nil {
		t.Error("a limit without its row was accepted")
	}
}
