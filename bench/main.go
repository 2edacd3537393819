// Command bench measures the whole system: a real daemon on each host of a
// lab, driven by the weft command as a person would drive it. It owns the
// benchmarks, the way they are repeated and compared, and the form of their
// results; the files in results are its output, never written by hand.
//
//	go run ./bench list
//	go run ./bench NAME [-rounds 5] [-json FILE] [-md FILE] [-svg FILE]
//
// A person runs it, as root, after `make build`. The exit code is 0 when
// everything was measured, also when a limit was missed, 1 when it could not
// be, and 2 for a wrong command line. Progress goes to standard error, the
// table to standard output. Ctrl-C ends it and removes its labs.
//
// The core (stats, measure, result, plot) is pure and is tested; the
// benchmarks themselves are tested by running them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/wg"
)

func main() {
	// encrypt's engines may be children of this program.
	if handled, code := wg.Main(os.Args); handled {
		os.Exit(code)
	}
	if len(os.Args) > 1 && os.Args[1] == trafficWord {
		os.Exit(traffic(os.Args[2:], os.Stdin, os.Stdout))
	}
	if len(os.Args) == 3 && os.Args[1] == namesWord {
		os.Exit(serveNames(os.Args[2], os.Stdin, os.Stdout, os.Stderr))
	}
	if len(os.Args) == 2 && os.Args[1] == gossipWord {
		os.Exit(serveGossip(os.Stdin, os.Stdout, os.Stderr))
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	// A second signal ends the program at once.
	release := context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	release()
	stop()
	os.Exit(code)
}

// benchmarks is the list, in the order of `bench list`.
func benchmarks() []benchmark {
	return []benchmark{labupBench(), createBench(), failoverBench(), sizeBench(), demoBench(), encryptBench(), dataplaneBench(), instructionsBench(), servicesBench(), dockerBench(), wireguardBench(), namesBench(), questionsBench(), gossipBench(), gossipNodesBench(), readyBench()}
}

// options of one run.
type options struct {
	bench          benchmark
	rounds         int
	weft           string
	json, md, svg  string
	cases, metrics []string // a part of the benchmark's choices
	check          string   // a result file to be checked against
	tolerance      float64
	stdout, stderr io.Writer
}

// errUsage is a wrong command line; its text was printed already.
var errUsage = errors.New("wrong command line")

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && args[0] == "list" {
		w := tabwriter.NewWriter(stdout, 0, 8, 2, ' ', 0)
		for _, b := range benchmarks() {
			fmt.Fprintf(w, "%s\t%s\n", b.Name, b.About)
		}
		w.Flush()
		return 0
	}
	if len(args) > 0 && args[0] == guestWord {
		return guest(ctx, args[1:], stdout, stderr)
	}
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	o.stdout, o.stderr = stdout, stderr
	if err := o.execute(ctx); err != nil {
		fmt.Fprintf(stderr, "bench %s: %v\n", o.bench.Name, err)
		return 1
	}
	return 0
}

// parse reads NAME and the flags after it, and says what is wrong with them.
func parse(args []string, stderr io.Writer) (options, error) {
	usage := func(format string, a ...any) (options, error) {
		fmt.Fprintf(stderr, "bench: "+format+"\nusage: bench list | bench NAME [-rounds N] [-weft FILE] [-json FILE] [-md FILE] [-svg FILE]\n", a...)
		return options{}, errUsage
	}
	if len(args) == 0 {
		return usage("no benchmark named; see 'bench list'")
	}
	list := benchmarks()
	i := slices.IndexFunc(list, func(b benchmark) bool { return b.Name == args[0] })
	if i < 0 {
		return usage("no benchmark %q; see 'bench list'", args[0])
	}
	o := options{bench: list[i]}
	f := flag.NewFlagSet("bench "+args[0], flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.rounds, "rounds", defaultRounds, fmt.Sprintf("`number` of rounds, 1 to %d; fewer than %d say little", maxRounds, defaultRounds))
	f.StringVar(&o.weft, "weft", "bin/weft", "the `file` that is measured")
	f.StringVar(&o.json, "json", "", "write the result to `file` as JSON")
	f.StringVar(&o.md, "md", "", "write the result to `file` as Markdown")
	f.StringVar(&o.svg, "svg", "", "write the result to `file` as a plot")
	var cases, metrics string
	if o.bench.Choices.Cases != nil {
		f.StringVar(&cases, "case", "", "measure only these cases: a `list` with commas of "+strings.Join(o.bench.Choices.Cases, ","))
		f.StringVar(&o.check, "check", "", "compare the ratios with those of the result `file`; a worse one is an error")
		f.Float64Var(&o.tolerance, "tolerance", defaultTolerance, "the `share` by which a ratio may be worse than in the file of -check")
		f.StringVar(&metrics, "metric", "", "measure only these metrics: a `list` with commas of "+strings.Join(o.bench.Choices.Metrics, ","))
	}
	if err := f.Parse(args[1:]); err != nil {
		return options{}, err // printed by the flag set
	}
	var err error
	if o.cases, err = choose("case", cases, o.bench.Choices.Cases, o.bench.Choices.Usual); err != nil {
		return usage("%v", err)
	}
	if o.metrics, err = choose("metric", metrics, o.bench.Choices.Metrics, o.bench.Choices.usualMetrics()); err != nil {
		return usage("%v", err)
	}
	switch {
	case f.NArg() > 0:
		return usage("unexpected argument %q", f.Arg(0))
	case o.rounds < 1 || o.rounds > maxRounds:
		return usage("-rounds %d: want 1 to %d", o.rounds, maxRounds)
	case o.tolerance < 0 || o.tolerance >= 1:
		return usage("-tolerance %v: want a share from 0 to under 1", o.tolerance)
	}
	abs, err := filepath.Abs(o.weft)
	if err != nil {
		return usage("-weft %s: %v", o.weft, err)
	}
	o.weft = abs
	return o, nil
}

// choose gives the part of all that a list with commas names; the usual for none.
func choose(flag, list string, all, usual []string) ([]string, error) {
	if list == "" {
		return usual, nil
	}
	var out []string
	for name := range strings.SplitSeq(list, ",") {
		if !slices.Contains(all, name) || slices.Contains(out, name) {
			return nil, fmt.Errorf("-%s %s: want some of %s, each once", flag, list, strings.Join(all, ","))
		}
		out = append(out, name)
	}
	return out, nil
}

// execute prepares, measures, cleans up and writes the result.
func (o options) execute(ctx context.Context) error {
	if os.Geteuid() != 0 && o.bench.Away == nil {
		return errors.New("a lab makes network namespaces: run it as root (sudo)")
	}
	binary := o.weft
	if o.bench.Linked {
		binary = ""
	}
	m, err := describeMachine(ctx, binary)
	if err != nil {
		return err
	}
	s, limits, err := o.measure(ctx, &m)
	if err != nil {
		return err
	}
	if m.LoadAfter, err = loadAverage(); err != nil {
		return err
	}
	r := Result{Version: resultVersion, Bench: o.bench.Name, About: o.bench.About, Seconds: significant(time.Since(m.Date).Round(time.Second).Seconds()), Machine: m}
	if r.Rows, err = s.rows(); err != nil {
		return err
	}
	if r.Limits, err = judge(r.Rows, limits); err != nil {
		return err
	}
	if err := o.write(r); err != nil {
		return err
	}
	return o.compare(r)
}

// compare fails when -check names a file and a ratio is worse than in it.
func (o options) compare(r Result) error {
	if o.check == "" {
		return nil
	}
	before, err := readResult(o.check)
	if err != nil {
		return err
	}
	worse, err := regressions(before.Rows, r.Rows, o.tolerance)
	if err != nil {
		return fmt.Errorf("check against %s: %w", o.check, err)
	}
	if len(worse) > 0 {
		return fmt.Errorf("worse than %s:\n%s", o.check, strings.Join(worse, "\n"))
	}
	fmt.Fprintf(o.stderr, "no ratio is worse than in %s by more than %s %%\n", o.check, number(100*o.tolerance))
	return nil
}

// measure runs the benchmark, here or away, and cleans up.
func (o options) measure(ctx context.Context, m *Machine) (series, []limit, error) {
	fmt.Fprintln(o.stderr, "preparing ...")
	if o.bench.Away != nil {
		a, err := o.bench.Away(ctx, o)
		m.Guest = a.Guest
		return a.Series, a.Limits, err
	}
	p, err := o.bench.Prepare(ctx, newRig(o))
	if err != nil {
		return series{}, nil, fmt.Errorf("prepare: %w", err)
	}
	s, err := p.measure(ctx, o.bench.Name, o.rounds, o.stderr)
	if p.Close != nil {
		fmt.Fprintln(o.stderr, "cleaning up ...")
		err = errors.Join(err, closeBounded(ctx, p.Close))
	}
	return s, p.Limits, err
}

// closeBounded cleans up even when ctx has ended, in bounded time.
func closeBounded(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if err := f(ctx); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// write puts the table on standard output and the files where they were asked
// for.
func (o options) write(r Result) error {
	if err := r.writeMarkdown(o.stdout); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	for _, f := range []struct {
		path  string
		write func(io.Writer) error
	}{{o.json, r.writeJSON}, {o.md, r.writeMarkdown}, {o.svg, r.writeSVG}} {
		if f.path == "" {
			continue
		}
		if err := writeFile(f.path, f.write); err != nil {
			return err
		}
	}
	return nil
}

// writeFile replaces path only once its new content is complete.
func writeFile(path string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	err = errors.Join(write(f), f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}
