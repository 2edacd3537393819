package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestBoardIsOne: the peer's module has a copy of board.go, as nothing of weft is in
// it; the same lines are obeyed in the same way.
func TestBoardIsOne(t *testing.T) {
	mine, err := os.ReadFile("board.go")
	if err != nil {
		t.Fatal(err)
	}
	peers, err := os.ReadFile("peers/networkdb/board.go")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mine, peers) {
		t.Error("board.go and peers/networkdb/board.go differ: copy the one to the other")
	}
}

// instant is a fleet whose nodes see everything at once.
type instant struct {
	b *board
	n int
}

func (f *instant) start(n int, b *board) error {
	f.b, f.n = b, n
	for i := range n {
		if err := f.put(i, []int{i}, nil); err != nil {
			return err
		}
	}
	return nil
}

func (f *instant) put(node int, keys, old []int) error {
	for i := range f.n {
		if i != node {
			f.b.saw(i, keys...)
			f.b.saw(i, keys...) // again: it does not count
		}
	}
	return nil
}

func TestBoard(t *testing.T) {
	var out bytes.Buffer
	f := &syncFleet{instant: &instant{}}
	const orders = "start 3\nput 1 50\nswap 0 131072 131071\nburst 4\nburst 9\n"
	if err := serveFleet(strings.NewReader(orders), &out, f); err != nil {
		t.Fatal(err)
	}
	var words []string
	for line := range strings.Lines(out.String()) {
		fields := strings.Fields(line)
		words = append(words, strings.Join(fields[:len(fields)-1], " "))
	}
	if want := []string{"ready", "put 50", "seen 50", "seen 50", "burst", "burst"}; !slices.Equal(words, want) {
		t.Errorf("said %q, want %q", words, want)
	}
	for _, bad := range []string{"", "start", "start x", "start -1", "put 1", "swap 1 2", "burst", "jump 1"} {
		if err := serveFleet(strings.NewReader(bad+"\n"), io.Discard, f); err == nil {
			t.Errorf("order %q was obeyed", bad)
		}
	}
}

// syncFleet takes puts one at a time: a burst comes from several goroutines.
type syncFleet struct {
	*instant
	turn chan struct{}
}

func (f *syncFleet) put(node int, keys, old []int) error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	return f.instant.put(node, keys, old)
}

func (f *syncFleet) start(n int, b *board) error {
	f.turn = make(chan struct{}, 1)
	return f.instant.start(n, b)
}

// TestNote: a change has taken until the last of the other nodes saw it.
func TestNote(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(2, 9).Draw(t, "nodes")
		f := &fleetRun{nodes: n, began: map[int]time.Duration{}, left: map[int]int{7: n - 1}, took: map[int]time.Duration{}}
		at := rapid.SliceOfN(rapid.IntRange(100, 1000), n-1, n-1).Draw(t, "seen at")
		slices.Sort(at)
		lines := []string{"put 7 100"}
		for _, ns := range at {
			lines = append(lines, "seen 7 "+number(float64(ns)), "seen 8 5")
		}
		for i, line := range lines {
			if _, done := f.took[7]; done && i < len(lines)-1 {
				t.Fatalf("done before %q", line)
			}
			if err := f.note(line); err != nil {
				t.Fatal(err)
			}
		}
		if want := time.Duration(at[len(at)-1] - 100); f.took[7] != want || len(f.left) != 0 {
			t.Fatalf("took %v, want %v; left %v", f.took[7], want, f.left)
		}
	})
	for _, bad := range []string{"", "seen", "seen 1", "seen a 2", "panic: x"} {
		if err := new(fleetRun).note(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestLoopbackBytes(t *testing.T) {
	const dev = "Inter-|   Receive\n face |bytes packets\n    lo: 1234 5 0 0\n  eth0: 9 1\n"
	if got, err := loopbackBytes(dev); err != nil || got != 1234 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "eth0: 5", "lo:", "lo: x"} {
		if got, err := loopbackBytes(bad); err == nil {
			t.Errorf("%q gave %d", bad, got)
		}
	}
}

// TestFleetRunEnds: nodes that end early are an error, not a wait.
func TestFleetRunEnds(t *testing.T) {
	f := &fleetRun{nodes: 2, next: 2, lines: make(chan string), stdin: nopCloser{io.Discard}, cmd: &exec.Cmd{}, began: map[int]time.Duration{}, left: map[int]int{}, took: map[int]time.Duration{}}
	close(f.lines)
	if _, err := f.ask(t.Context(), time.Hour, "ready", "start %d", 2); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.lines = make(chan string)
	if _, err := f.changes(ctx, 1, 0); err != context.Canceled {
		t.Errorf("error %v", err)
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// TestGossipBenchNames: every name can be chosen, and every limit is measured.
func TestGossipBenchNames(t *testing.T) {
	for _, b := range []benchmark{gossipBench(), gossipNodesBench()} {
		for i, name := range b.Choices.Metrics {
			if strings.Contains(name, ",") {
				t.Errorf("metric %q cannot be named after -metric", name)
			}
			if slices.Contains(b.Choices.Metrics[:i], name) {
				t.Errorf("metric %q is there twice", name)
			}
		}
		for _, name := range b.Choices.UsualMetrics {
			if !slices.Contains(b.Choices.Metrics, name) {
				t.Errorf("usual metric %q is none", name)
			}
		}
	}
	b := gossipBench()
	for _, l := range gossipLimits() {
		if !slices.Contains(b.Choices.UsualMetrics, l.Metric) || !slices.Contains(b.Choices.Cases, l.Case) {
			t.Errorf("limit on %q of %q is never measured", l.Metric, l.Case)
		}
	}
}
