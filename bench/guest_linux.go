package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// guestWord makes this program the one that measures inside the guest.
const guestWord = "guest"

// guestCounts are the operations of one spell on the instruction clock: enough that
// a timer's tick does not show, few enough for a guest that is slow to watch.
var guestCounts = map[pattern]int{rr: 1000, crr: 200, udp: 48 * window, bulk: 48 << 10}

// guestSpells are in one run, whose value is their median: a spell into which
// something else of the guest falls is then outvoted.
const guestSpells = 3

// mostIdle is the share of a run in which the guest's processor may idle: what
// is idle passes in real time, which says nothing. It is taken off, and bounded.
const mostIdle = 0.02

// guestWork is what a guest measures: paths, if it is nothing else.
type guestWork struct {
	cases, metrics            []string
	isDocker, isCrypt, isName bool
}

// guest measures in this machine's namespaces and prints the series as one line of
// the console's results. Progress goes to standard error.
func guest(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := func() error {
		var w guestWork
		f := flag.NewFlagSet(guestWord, flag.ContinueOnError)
		f.SetOutput(stderr)
		rounds := f.Int("rounds", 1, "`number` of rounds")
		cases := f.String("cases", strings.Join(casePaths, ","), "the paths")
		metrics := f.String("metrics", "", "the patterns")
		f.BoolVar(&w.isDocker, "docker", false, "two nodes of Docker Engine are the baseline")
		f.BoolVar(&w.isCrypt, "wireguard", false, "the paths are those of WireGuard")
		f.BoolVar(&w.isName, "names", false, "cases and metrics are those of names")
		if err := f.Parse(args); err != nil {
			return err
		}
		w.cases, w.metrics = split(*cases), split(*metrics)
		p, err := w.plan(ctx, stderr)
		if err != nil {
			return err
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

// plan makes what is measured. On error it has cleaned up.
func (w guestWork) plan(ctx context.Context, stderr io.Writer) (plan, error) {
	if w.isName {
		return prepareNames(ctx, newRig(options{cases: w.cases, metrics: w.metrics, stderr: stderr}))
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	// Docker's own paths are made with its nodes.
	paths, counts := slices.DeleteFunc(slices.Clone(w.cases), func(n string) bool { return slices.Contains(dockersOwn, n) }), guestCounts
	if w.isCrypt {
		paths, counts = nil, cryptCounts
	}
	g, err := newGround(ctx, log, paths)
	if err != nil {
		return plan{}, err
	}
	list := g.openers(paths)
	switch {
	case w.isDocker:
		var own []opener
		own, err = g.docker(ctx, w.cases)
		list = append(own, list...)
	case w.isCrypt:
		list, err = g.wireguard(ctx, w.cases)
	}
	var p plan
	if err == nil {
		p, err = trafficPlan(ctx, g, list, w.metrics, onClock(counts))
	}
	if err != nil {
		return plan{}, errors.Join(err, g.close())
	}
	return p, nil
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

// calm is a rest in which the processor must have idled almost all the time.
const calm = 20 * time.Millisecond

// awaitCalm waits until nothing else runs: the kernel takes apart in the background
// what a case before has removed, and would do so on the clock.
func awaitCalm(ctx context.Context) error {
	for range 500 {
		before, start := idleTime(), time.Now()
		if err := pause(ctx, calm); err != nil {
			return err
		}
		if took := time.Since(start); idleTime()-before > took*9/10 {
			return nil
		}
	}
	return fmt.Errorf("no rest of %v was quiet, or /proc/timer_list does not show idle time", calm)
}

// opsOf is the operations of one spell of a path: of bulk between network cards there
// are fewer, as each takes eight times as many instructions.
func opsOf(counts map[pattern]int, path string, p pattern) int {
	if p == bulk && onNICs(path) {
		return counts[p] / 4
	}
	return counts[p]
}

// onClock measures by the instruction clock: busy time is instructions.
func onClock(counts map[pattern]int) meter {
	return func(ctx context.Context, w *way, p pattern) (float64, error) {
		var values []float64
		for range guestSpells {
			if err := awaitCalm(ctx); err != nil {
				return 0, err
			}
			s, err := w.client.run(p, opsOf(counts, w.name, p), nil)
			if err != nil {
				return 0, err
			}
			if share := s.Idle.Seconds() / s.Elapsed.Seconds(); share > mostIdle {
				return 0, fmt.Errorf("the processor idled for %.1f %% of the run: it measures waiting", 100*share)
			}
			values = append(values, float64(s.Ops)/(s.Elapsed-s.Idle).Seconds())
		}
		median, _, _ := spread(values)
		return median, nil
	}
}
