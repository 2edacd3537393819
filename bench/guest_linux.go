package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"
)

// guestWord makes this program the one that measures inside the guest.
const guestWord = "guest"

// guestCounts are the operations of one run on the instruction clock: enough that
// a timer's tick does not show, few enough for a guest that is slow to watch.
var guestCounts = map[pattern]int{rr: 2000, crr: 400, udp: 128 * window, bulk: 128 << 10}

// mostIdle is the share of a run in which the guest's processor may idle: what
// is idle passes in real time, which says nothing. It is taken off, and bounded.
const mostIdle = 0.02

// guest measures all paths in this machine's namespaces and prints the series as
// one line of the console's results. Progress goes to standard error.
func guest(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := func() error {
		f := flag.NewFlagSet(guestWord, flag.ContinueOnError)
		f.SetOutput(stderr)
		rounds := f.Int("rounds", 1, "`number` of rounds")
		cases := f.String("cases", strings.Join(casePaths, ","), "the paths")
		metrics := f.String("metrics", "", "the patterns")
		if err := f.Parse(args); err != nil {
			return err
		}
		if err := idleIsCounted(ctx); err != nil {
			return err
		}
		log := slog.New(slog.NewTextHandler(stderr, nil))
		g, err := newGround(ctx, log, split(*cases))
		if err != nil {
			return err
		}
		p, err := trafficPlan(ctx, g, split(*cases), split(*metrics), onClock)
		if err != nil {
			return errors.Join(err, g.close())
		}
		s, err := p.measure(ctx, guestWord, *rounds, stderr)
		if err = errors.Join(err, p.Close(ctx)); err != nil {
			return err
		}
		b, err := json.Marshal(s)
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "WEFT-RESULT series %s\n", b)
		return nil
	}()
	if err != nil {
		fmt.Fprintf(stdout, "WEFT-RESULT failed %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		return 1
	}
	return 0
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

// idleIsCounted checks the way idle time is found: a rest must show. While the
// system still starts something else may fill one, so there are several.
func idleIsCounted(ctx context.Context) error {
	const rest = 50 * time.Millisecond
	for range 20 {
		before := idleTime()
		if err := pause(ctx, rest); err != nil {
			return err
		}
		if idleTime()-before > rest/2 {
			return nil
		}
	}
	return fmt.Errorf("20 rests of %v do not show as idle time in /proc/timer_list", rest)
}

// meter makes one run of a pattern and gives operations per second.
type meter func(w *way, p pattern) (float64, error)

// trafficPlan opens every path of g and measures the patterns on each.
func trafficPlan(ctx context.Context, g *ground, cases, metrics []string, meter meter) (plan, error) {
	p := plan{Restless: true}
	var ways []*way
	p.Close = func(context.Context) error {
		var errs []error
		for _, w := range ways {
			errs = append(errs, w.close())
		}
		return errors.Join(append(errs, g.close())...)
	}
	var wanted []pattern
	for _, m := range patterns {
		if len(metrics) == 0 || contains(metrics, string(m)) {
			wanted = append(wanted, m)
			p.Metrics = append(p.Metrics, metric{string(m), unitOf(m), true})
		}
	}
	for i, name := range append([]string{pathRaw}, cases...) {
		w, err := g.paths[name].open(ctx)
		if err != nil {
			for _, w := range ways {
				err = errors.Join(err, w.close())
			}
			return plan{}, err
		}
		ways = append(ways, w)
		v := variant{name, func(context.Context) (sample, error) {
			out := sample{}
			for _, m := range wanted {
				var err error
				if out[string(m)], err = meter(w, m); err != nil {
					return nil, fmt.Errorf("%s: %w", m, err)
				}
			}
			return out, nil
		}}
		if i == 0 {
			p.Baseline = v
		} else {
			p.Cases = append(p.Cases, v)
		}
	}
	return p, nil
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}

func unitOf(p pattern) string {
	if p == bulk {
		return "KiB/s"
	}
	return "1/s"
}

// onClock measures by the instruction clock: busy time is instructions.
func onClock(w *way, p pattern) (float64, error) {
	s, err := w.client.run(p, guestCounts[p], nil)
	if err != nil {
		return 0, err
	}
	if share := s.Idle.Seconds() / s.Elapsed.Seconds(); share > mostIdle {
		return 0, fmt.Errorf("the processor idled for %.1f %% of the run: it measures waiting", 100*share)
	}
	return float64(s.Ops) / (s.Elapsed - s.Idle).Seconds(), nil
}
