package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Our own choices.
const (
	// defaultRounds is the least number from which a median says something.
	defaultRounds = 5
	// maxRounds bounds a run.
	maxRounds = 100
	// caseTimeout bounds one run of one case, where the plan has no Patience.
	caseTimeout = 2 * time.Minute
	// settle is the rest before each case: the kernel removes namespaces and
	// cgroups of the case before after their last user has gone, and a case
	// must not pay for its forerunner.
	settle = time.Second
	// defaultTolerance is above what rounds of the instruction clock differ by,
	// and below what a change for the worse costs that is worth a look.
	defaultTolerance = 0.03
	// closeTimeout bounds the cleaning up, also after Ctrl-C.
	closeTimeout = 2 * time.Minute
)

// benchmark is one entry of `bench list`.
type benchmark struct {
	Name  string
	About string // one sentence: what is measured against what
	// Prepare makes what the cases need. On error it has cleaned up.
	Prepare func(context.Context, *rig) (plan, error)
	// Away, in place of Prepare, measures in a guest.
	Away func(context.Context, options) (away, error)
	// Choices, where a part can be measured: cases and metrics.
	Choices choices
	// Linked: what is measured is linked into this program, not bin/weft.
	Linked bool
}

// away is what a benchmark in a guest brings back.
type away struct {
	Series series
	Limits []limit
	Guest  string // the guest in words
}

// choices are what -case and -metric may name. Usual are the cases without -case,
// UsualMetrics the metrics without -metric (empty = all).
type choices struct{ Cases, Usual, Metrics, UsualMetrics []string }

func (c choices) usualMetrics() []string {
	if len(c.UsualMetrics) > 0 {
		return c.UsualMetrics
	}
	return c.Metrics
}

// variant is one case, or the baseline. Run does everything once and yields
// one value per metric; what it needs before and after is not in the values.
type variant struct {
	Name string
	Run  func(context.Context) (sample, error)
}

// plan is what a benchmark wants to have run.
type plan struct {
	Metrics  []metric
	Baseline variant
	Cases    []variant
	// Own baselines of cases, by name: that case is run a second time, too.
	Own    map[string]string
	Pairs  []pair
	Limits []limit
	// Restless: the cases leave nothing behind, so none waits for the one before.
	Restless bool
	// Patience bounds one run of one case; 0 = caseTimeout.
	Patience time.Duration
	// Close removes what Prepare and the cases made; nil when there is
	// nothing. It is called once, whatever happened.
	Close func(context.Context) error
}

// slots is the order of the n runs of one round, as indexes: 0 is the baseline,
// then come the cases, then the baselines again. Every other round runs
// backwards, and every two rounds start one place later: what a case leaves
// behind on the machine then falls on its neighbours on both sides alike, and
// no case is always the first.
func slots(n, round int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = (i + round/2) % n
	}
	if round%2 == 1 {
		slices.Reverse(out)
	}
	return out
}

// measure runs all rounds, one case at a time, and tells progress.
func (p plan) measure(ctx context.Context, bench string, rounds int, progress io.Writer) (series, error) {
	s := series{Bench: bench, Metrics: p.Metrics, Baseline: p.Baseline.Name, Own: p.Own, Pairs: p.Pairs}
	for _, c := range p.Cases {
		s.Cases = append(s.Cases, c.Name)
	}
	own, again := bases(s.Cases, s.Own), len(p.Cases)+1
	for n := range rounds {
		r := round{Cases: make([]sample, len(p.Cases)), Agains: make([]sample, len(own))}
		for _, slot := range slots(again+1+len(own), n) {
			v, into := p.Baseline, &r.Baseline
			switch {
			case slot > again:
				i := slot - again - 1
				v, into = p.Cases[slices.Index(s.Cases, own[i])], &r.Agains[i]
			case slot == again:
				into = &r.Again
			case slot > 0:
				v, into = p.Cases[slot-1], &r.Cases[slot-1]
			}
			fmt.Fprintf(progress, "round %d of %d: %s ... ", n+1, rounds, v.Name)
			got, err := p.run(ctx, v)
			if err != nil {
				fmt.Fprintln(progress, "failed")
				return series{}, fmt.Errorf("round %d of %d, case %q: %w", n+1, rounds, v.Name, err)
			}
			fmt.Fprintln(progress, p.describe(got))
			*into = got
		}
		s.Rounds = append(s.Rounds, r)
	}
	return s, nil
}

// run rests, and runs the case in bounded time.
func (p plan) run(ctx context.Context, v variant) (sample, error) {
	if !p.Restless {
		if err := pause(ctx, settle); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(p.Patience, caseTimeout))
	defer cancel()
	return v.Run(ctx)
}

// pause waits for d, or for the end of ctx, whose cause it returns.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// describe is a sample on one line, in the order of the metrics.
func (p plan) describe(got sample) string {
	var out []string
	for _, m := range p.Metrics {
		if v, ok := got[m.Name]; ok {
			out = append(out, fmt.Sprintf("%s %s %s", m.Name, number(v), m.Unit))
		}
	}
	return strings.Join(out, ", ")
}

// number is a value as people read it: four digits, never an exponent.
func number(v float64) string {
	short, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	if err != nil {
		short = v
	}
	return strconv.FormatFloat(short, 'f', -1, 64)
}
