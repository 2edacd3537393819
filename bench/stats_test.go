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
	got, err := judge(rows, []limit{{Case: "weft", Metric: "time", Most: 5}, {Case: "weft", Metric: "time", Most: 5, EveryRound: true}, {Case: "weft", Metric: "failed", EveryRound: true},
		{Case: "weft", Metric: "time", Over: "raw", Least: 3}, {Case: "weft", Metric: "time", Over: "raw", Least: 3, EveryRound: true}})
	if err != nil {
		t.Fatal(err)
	}
	want := []Verdict{
		{Case: "weft", Metric: "time", Limit: 5, Of: "median", Value: 5, Unit: "s", Held: true},
		{Case: "weft", Metric: "time", Limit: 5, Of: "max", Value: 8, Unit: "s"},
		{Case: "weft", Metric: "failed", Limit: 0, Of: "max", Value: 3, Unit: "requests"},
		{Case: "weft", Metric: "time", Baseline: "raw", Limit: 3, Least: true, Of: "median", Value: 3, Unit: "ratio", Held: true},
		{Case: "weft", Metric: "time", Baseline: "raw", Limit: 3, Least: true, Of: "min", Value: 2, Unit: "ratio"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("verdicts %+v, want %+v", got, want)
	}
	// The ratio row of a metric is not its raw row.
	if _, err := judge(rows[3:], []limit{{Case: "weft", Metric: "time", Most: 5}}); err == nil {
		t.Error("a limit without its row was accepted")
	}
}

// TestPairs: a case is divided by another one of the same round, too, as far as
// both were measured.
func TestPairs(t *testing.T) {
	s := twoCases()
	rows, err := s.rows()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := rows[len(rows)-1], (Row{"b", "slow", "time", "weft", 1.5, 1, 2, 2, "ratio"}); got != want {
		t.Errorf("last row %+v, want %+v", got, want)
	}
	s.Pairs = []pair{{"slow", "gone"}, {"gone", "weft"}}
	without, err := s.rows()
	if err != nil || len(without) != len(rows)-1 {
		t.Errorf("pairs that were not chosen: %d rows and %v, want %d", len(without), err, len(rows)-1)
	}
	s.Pairs, s.Rounds[1].Cases[0]["time"] = []pair{{"slow", "weft"}}, 0
	if _, err := s.rows(); err == nil {
		t.Error("a division by 0 passed")
	}
}

// twoCases is twoRounds with a case that takes one and two times what weft does.
func twoCases() series {
	s := twoRounds()
	s.Cases, s.Pairs = append(s.Cases, "slow"), []pair{{"slow", "weft"}}
	s.Rounds[0].Cases = append(s.Rounds[0].Cases, sample{"time": 2})
	s.Rounds[1].Cases = append(s.Rounds[1].Cases, sample{"time": 16})
	return s
}

// withOwn is twoCases with a case over slow, which takes three times as long.
func withOwn() series {
	s := twoCases()
	s.Cases, s.Pairs, s.Own = append(s.Cases, "other"), nil, map[string]string{"other": "slow"}
	s.Rounds[0].Cases, s.Rounds[0].Agains = append(s.Rounds[0].Cases, sample{"time": 6}), []sample{{"time": 1}}
	s.Rounds[1].Cases, s.Rounds[1].Agains = append(s.Rounds[1].Cases, sample{"time": 48}), []sample{{"time": 16}}
	return s
}

// TestOwnBaseline: a case that has a baseline of its own is divided by that and by no
// other, and that baseline has a noise of its own.
func TestOwnBaseline(t *testing.T) {
	got, err := withOwn().rows()
	if err != nil {
		t.Fatal(err)
	}
	want := []Row{
		{"b", "raw", "time", "raw", 1.25, 1, 1.5, 2, "ratio"},
		{"b", "weft", "time", "raw", 3, 2, 4, 2, "ratio"},
		{"b", "slow", "time", "raw", 5, 2, 8, 2, "ratio"},
		{"b", "slow", "time", "slow", 0.75, 0.5, 1, 2, "ratio"},
		{"b", "other", "time", "slow", 3, 3, 3, 2, "ratio"},
	}
	if got = slices.DeleteFunc(got, func(r Row) bool { return r.Baseline == "" }); !reflect.DeepEqual(got, want) {
		t.Errorf("ratios\n%+v, want\n%+v", got, want)
	}
	for _, tc := range []struct {
		name, want string
		spoil      func(*series)
	}{
		{"not measured again", "round 2 has 0 baselines again", func(s *series) { s.Rounds[1].Agains = nil }},
		{"hole in its noise", `case "slow" again`, func(s *series) { s.Rounds[0].Agains[0] = sample{} }},
		{"no case", `"gone" is a baseline`, func(s *series) { s.Own["other"] = "gone" }},
		{"has one itself", `"slow" is a baseline`, func(s *series) { s.Own["slow"] = "weft"; s.Own["other"] = "slow" }},
		{"0", `metric "time" of case "slow"`, func(s *series) { s.Rounds[0].Cases[1]["time"] = 0 }},
	} {
		s := withOwn()
		tc.spoil(&s)
		if _, err := s.rows(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", tc.name, err, tc.want)
		}
	}
}

func TestLimitsOn(t *testing.T) {
	all := []limit{{Case: "a", Metric: "m"}, {Case: "a", Metric: "m", Over: "raw"}, {Case: "a", Metric: "m", Over: "b"}, {Case: "b", Metric: "m"}, {Case: "a", Metric: "n"}}
	if got := limitsOn(all, "raw", []string{"a"}, []string{"m"}); !reflect.DeepEqual(got, all[:2]) {
		t.Errorf("of one case and metric: %+v", got)
	}
	if got := limitsOn(all, "raw", []string{"a", "b"}, []string{"m", "n"}); !reflect.DeepEqual(got, all) {
		t.Errorf("of all: %+v", got)
	}
}

func TestRegressions(t *testing.T) {
	rows := func(noise, ratio, raw float64) []Row {
		return []Row{
			{Case: "weft", Metric: "RR", Median: raw, Unit: "1/s"},
			{Case: "raw", Metric: "RR", Baseline: "raw", Median: noise, Unit: unitRatio},
			{Case: "weft", Metric: "RR", Baseline: "raw", Median: ratio, Unit: unitRatio},
		}
	}
	for _, tc := range []struct {
		name string
		now  []Row
		want string
	}{
		{"the same", rows(1, 0.8, 100), ""},
		{"better", rows(1, 0.9, 100), ""},
		{"slower machine, more noise", rows(0.5, 0.8, 10), ""},
		{"inside", rows(1, 0.777, 100), ""},
		{"worse", rows(1, 0.775, 100), "RR of weft is 0.775 of raw, it was 0.8"},
	} {
		got, err := regressions(rows(1, 0.8, 100), tc.now, 0.03)
		if err != nil || (len(got) > 0) != (tc.want != "") || tc.want != "" && !strings.Contains(got[0], tc.want) {
			t.Errorf("%s: %q, %v, want %q", tc.name, got, err, tc.want)
		}
	}
	if _, err := regressions(rows(1, 0.8, 100), rows(1, 0.8, 100)[:2], 0.03); err == nil {
		t.Error("a check of nothing passed")
	}
}
