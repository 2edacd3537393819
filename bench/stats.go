package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
)

// unitRatio is the unit of rows that were divided by the baseline.
const unitRatio = "ratio"

// Row is one line of a result. A row with an empty Baseline is in the unit of
// its metric; one with a Baseline is the case's value divided by the
// baseline's of the same round, and a row whose Case is its Baseline is the
// noise: the baseline measured a second time in each round, divided by the
// first.
type Row struct {
	Bench    string  `json:"bench"`
	Case     string  `json:"case"`
	Metric   string  `json:"metric"`
	Baseline string  `json:"baseline"`
	Median   float64 `json:"median"`
	Min      float64 `json:"min"`
	Max      float64 `json:"max"`
	Rounds   int     `json:"rounds"`
	Unit     string  `json:"unit"`
}

// Verdict compares one row with the limit that was set for it: its median, or
// its worst where the limit must hold in every round. A limit that is missed is
// a result, not a failure of the benchmark.
type Verdict struct {
	Case     string  `json:"case"`
	Metric   string  `json:"metric"`
	Baseline string  `json:"baseline,omitempty"` // of the row; a ratio is compared then
	Limit    float64 `json:"limit"`
	Least    bool    `json:"least,omitempty"` // at least Limit is wanted, not at most
	Of       string  `json:"of"`              // "median", "max" or "min"
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
	Held     bool    `json:"held"`
}

// metric is one thing that cases yield.
type metric struct {
	Name string
	Unit string
	// IsRatio: also divide by the baseline, which must then never yield 0.
	IsRatio bool
}

// limit is the largest value of a case's metric that is wanted, or the least, in
// the metric's unit or, with Over, of the ratio to that case: of the median, or of
// every round. The latter is for counts of what must not happen: a median of 0
// would hide two rounds of five with failures.
type limit struct {
	Case, Metric string
	Over         string // a baseline; "" is the raw row
	Most, Least  float64
	EveryRound   bool
}

// pair asks for the ratio of a case to another one, besides that to the baseline.
type pair struct{ Case, Over string }

// sample is what one run of a case yields: metric name to value.
type sample map[string]float64

// round holds the samples of one round. Again is the second run of the
// baseline, Agains those of the cases that are baselines, in the order of bases.
type round struct {
	Baseline sample
	Again    sample
	Cases    []sample
	Agains   []sample
}

// series is everything that was measured, with the names that rows carry.
type series struct {
	Bench    string
	Metrics  []metric
	Baseline string
	Cases    []string
	// Own baselines of cases: the name of another case, in place of Baseline.
	Own    map[string]string
	Pairs  []pair
	Rounds []round
}

// bases are the cases that are baselines of others, in the order of those.
func bases(cases []string, own map[string]string) []string {
	var out []string
	for _, c := range cases {
		if b, ok := own[c]; ok && !slices.Contains(out, b) {
			out = append(out, b)
		}
	}
	return out
}

// spread is the median of values with the extremes.
func spread(values []float64) (median, low, high float64) {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	if n == 0 {
		return 0, 0, 0
	}
	// Halved before they are added: the sum of two large values may overflow.
	return v[(n-1)/2]/2 + v[n/2]/2, v[0], v[n-1]
}

// significant rounds to six digits: more were never measured.
func significant(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 6, 64), 64)
	if err != nil {
		return v // NaN and infinities were refused before
	}
	return r
}

// rows summarises a series: the raw rows of the baseline and of every case, then
// for every metric that is divided the noise row and the ratios, then the pairs.
func (s series) rows() ([]Row, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	var out []Row
	for _, m := range s.Metrics {
		for i := -1; i < len(s.Cases); i++ {
			values, ok := s.values(i, m.Name)
			if ok {
				out = append(out, s.row(i, m, "", values))
			}
		}
	}
	for n, b := range append([]string{s.Baseline}, bases(s.Cases, s.Own)...) {
		for _, m := range s.Metrics {
			var err error
			if !m.IsRatio {
				continue
			}
			if out, err = s.against(out, m, n-1, slices.Index(s.Cases, b)); err != nil {
				return nil, err
			}
		}
	}
	for _, p := range s.Pairs {
		i, j := slices.Index(s.Cases, p.Case), slices.Index(s.Cases, p.Over)
		if i < 0 || j < 0 {
			continue // a case that was not chosen
		}
		for _, m := range s.Metrics {
			var err error
			if !m.IsRatio {
				continue
			}
			if out, err = s.ratio(out, m, i, j); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// against appends the noise of a baseline and the ratios of the cases whose
// baseline it is: case j, the n-th of bases, or with -1 the one of the series.
func (s series) against(rows []Row, m metric, n, j int) ([]Row, error) {
	base, ok := s.values(j, m.Name)
	if !ok {
		return rows, nil
	}
	again := make([]float64, len(s.Rounds))
	for i, r := range s.Rounds {
		smp := r.Again
		if n >= 0 {
			smp = r.Agains[n]
		}
		again[i] = smp[m.Name]
	}
	noise, err := divide(again, base)
	if err != nil {
		return nil, fmt.Errorf("divide metric %q of case %q: %w", m.Name, s.caseName(j), err)
	}
	rows = append(rows, s.row(j, m, s.caseName(j), noise))
	for i, c := range s.Cases {
		own, isOwn := s.Own[c]
		if isOwn != (n >= 0) || isOwn && own != s.Cases[j] {
			continue
		}
		if rows, err = s.ratio(rows, m, i, j); err != nil {
			return nil, err
		}
	}
	return rows, nil
}

// ratio appends the row of case i over case j, if both yield m.
func (s series) ratio(rows []Row, m metric, i, j int) ([]Row, error) {
	over, ok := s.values(j, m.Name)
	values, both := s.values(i, m.Name)
	if !ok || !both {
		return rows, nil
	}
	ratios, err := divide(values, over)
	if err != nil {
		return nil, fmt.Errorf("divide metric %q of case %q: %w", m.Name, s.caseName(i), err)
	}
	return append(rows, s.row(i, m, s.caseName(j), ratios)), nil
}

// row makes the row of case i; -1 is the baseline.
func (s series) row(i int, m metric, baseline string, values []float64) Row {
	r := Row{Bench: s.Bench, Case: s.caseName(i), Metric: m.Name, Baseline: baseline, Rounds: len(values), Unit: m.Unit}
	if baseline != "" {
		r.Unit = unitRatio
	}
	median, low, high := spread(values)
	r.Median, r.Min, r.Max = significant(median), significant(low), significant(high)
	return r
}

func (s series) caseName(i int) string {
	if i < 0 {
		return s.Baseline
	}
	return s.Cases[i]
}

// values of case i, one per round; false when the case does not yield m.
func (s series) values(i int, m string) ([]float64, bool) {
	var out []float64
	for _, r := range s.Rounds {
		smp := r.Baseline
		if i >= 0 {
			smp = r.Cases[i]
		}
		v, ok := smp[m]
		if !ok {
			return nil, false
		}
		out = append(out, v)
	}
	return out, len(out) > 0
}

// check refuses a series with holes: a case must yield the same metrics in
// every round, all of them declared, all of them finite and not negative.
func (s series) check() error {
	declared := map[string]bool{}
	for _, m := range s.Metrics {
		declared[m.Name] = true
	}
	own := bases(s.Cases, s.Own)
	for _, b := range own {
		if _, isOwn := s.Own[b]; isOwn || !slices.Contains(s.Cases, b) {
			return fmt.Errorf("%q is a baseline, and must be a case without another one", b)
		}
	}
	for n, r := range s.Rounds {
		if len(r.Cases) != len(s.Cases) {
			return fmt.Errorf("round %d has %d cases, %d expected", n+1, len(r.Cases), len(s.Cases))
		}
		if len(r.Agains) != len(own) {
			return fmt.Errorf("round %d has %d baselines again, %d expected", n+1, len(r.Agains), len(own))
		}
		first := s.Rounds[0]
		if err := checkSample(r.Again, first.Baseline, declared); err != nil {
			return fmt.Errorf("round %d, case %q again: %w", n+1, s.Baseline, err)
		}
		for i, b := range own {
			if err := checkSample(r.Agains[i], first.Cases[slices.Index(s.Cases, b)], declared); err != nil {
				return fmt.Errorf("round %d, case %q again: %w", n+1, b, err)
			}
		}
		for i := -1; i < len(s.Cases); i++ {
			got, want := r.Baseline, first.Baseline
			if i >= 0 {
				got, want = r.Cases[i], first.Cases[i]
			}
			if err := checkSample(got, want, declared); err != nil {
				return fmt.Errorf("round %d, case %q: %w", n+1, s.caseName(i), err)
			}
		}
	}
	return nil
}

// checkSample wants the metrics of like, which must be declared, and sane
// values.
func checkSample(got, like sample, declared map[string]bool) error {
	if !slices.Equal(sortedKeys(got), sortedKeys(like)) {
		return fmt.Errorf("metrics %q, in the first round %q", sortedKeys(got), sortedKeys(like))
	}
	for _, m := range sortedKeys(got) {
		switch v := got[m]; {
		case !declared[m]:
			return fmt.Errorf("metric %q is not declared", m)
		case math.IsNaN(v) || math.IsInf(v, 0) || v < 0:
			return fmt.Errorf("metric %q is %v: want a finite value of at least 0", m, v)
		}
	}
	return nil
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// divide gives a/b for every round.
func divide(a, b []float64) ([]float64, error) {
	out := make([]float64, len(a))
	for i := range a {
		if b[i] == 0 {
			return nil, fmt.Errorf("the baseline is 0 in round %d", i+1)
		}
		if out[i] = a[i] / b[i]; math.IsInf(out[i], 0) {
			return nil, fmt.Errorf("the baseline %v of round %d is too small to divide by", b[i], i+1)
		}
	}
	return out, nil
}

// judge compares rows with the limits. A limit on a row that is not there is an
// error: it would hold of nothing.
func judge(rows []Row, limits []limit) ([]Verdict, error) {
	var out []Verdict
	for _, l := range limits {
		i := slices.IndexFunc(rows, func(r Row) bool { return r.Baseline == l.Over && r.Case == l.Case && r.Metric == l.Metric })
		if i < 0 {
			return nil, fmt.Errorf("limit on metric %q of case %q: no such row", l.Metric, l.Case)
		}
		v := Verdict{Case: l.Case, Metric: l.Metric, Baseline: l.Over, Limit: l.Most, Of: "median", Value: rows[i].Median, Unit: rows[i].Unit}
		if l.Least > 0 {
			v.Limit, v.Least = l.Least, true
		}
		switch {
		case l.EveryRound && v.Least:
			v.Of, v.Value = "min", rows[i].Min
		case l.EveryRound:
			v.Of, v.Value = "max", rows[i].Max
		}
		v.Held = v.Value <= v.Limit
		if v.Least {
			v.Held = v.Value >= v.Limit
		}
		out = append(out, v)
	}
	return out, nil
}

// limitsOn are the limits whose rows a run of these cases and metrics has.
func limitsOn(limits []limit, baseline string, cases, metrics []string) []limit {
	return slices.DeleteFunc(slices.Clone(limits), func(l limit) bool {
		return !slices.Contains(cases, l.Case) || !slices.Contains(metrics, l.Metric) ||
			l.Over != "" && l.Over != baseline && !slices.Contains(cases, l.Over)
	})
}

// regressions are the ratios that are worse than before's by more than tolerance,
// a share of them, in words. Only rows of both count, but some must: without any
// the check would say nothing. Greater is
// better in all benchmarks that can be checked.
func regressions(before, now []Row, tolerance float64) ([]string, error) {
	var out []string
	compared := 0
	for _, b := range before {
		if b.Unit != unitRatio || b.Case == b.Baseline {
			continue
		}
		i := slices.IndexFunc(now, func(n Row) bool { return n.Case == b.Case && n.Metric == b.Metric && n.Baseline == b.Baseline })
		if i < 0 {
			continue
		}
		compared++
		if least := b.Median * (1 - tolerance); now[i].Median < least {
			out = append(out, fmt.Sprintf("%s of %s is %s of %s, it was %s: less than %s is a regression",
				b.Metric, b.Case, number(now[i].Median), b.Baseline, number(b.Median), number(least)))
		}
	}
	if compared == 0 {
		return nil, errors.New("no ratio of this run is in the file that it is checked against")
	}
	return out, nil
}
