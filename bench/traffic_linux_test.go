package main

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestMain lets the test binary be the traffic generator, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == trafficWord {
		os.Exit(traffic(os.Args[2:], os.Stdin, os.Stdout))
	}
	os.Exit(m.Run())
}

// TestTraffic sends every pattern over every path that needs no more than
// namespaces, as the benchmarks do, and takes everything down again.
func TestTraffic(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	var log bytes.Buffer
	names := []string{pathRouted, pathHand, pathBridge}
	g, err := newGround(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), names)
	if err != nil {
		t.Fatal(err)
	}
	g.core = 0
	few := map[pattern]int{rr: 50, crr: 20, udp: 3*window - 1, bulk: 1000}
	want := map[pattern]int{rr: 50, crr: 20, udp: 3 * window, bulk: 1000}
	once := func(ctx context.Context, w *way, p pattern) (float64, error) {
		s, err := w.client.run(p, few[p], nil)
		if err == nil && s.Ops != want[p] {
			t.Errorf("%s over %s: %d operations, want %d", p, w.name, s.Ops, want[p])
		}
		if v, err := onCore(0, few)(ctx, w, p); err != nil || v <= 0 {
			t.Errorf("%s over %s: %v operations per CPU-second, %v", p, w.name, v, err)
		}
		return 1 / s.Elapsed.Seconds(), err
	}
	p, err := trafficPlan(t.Context(), g, g.openers(names), trafficChoices(nil).Metrics, once)
	if err != nil {
		t.Fatal(err)
	}
	var progress bytes.Buffer
	s, err := p.measure(t.Context(), "test", 1, &progress)
	if err != nil {
		t.Errorf("%v\n%s%s", err, &progress, &log)
	}
	if rows, err := s.rows(); err != nil || len(rows) != 4*(1+3)+4*(1+3) {
		t.Errorf("%d rows, %v", len(rows), err)
	}
	out := sample{}
	if err := g.program(t.Context(), pathBridge, out); err != nil || out[programMany] <= 0 || out[programOne] <= 0 {
		t.Errorf("program: %v, %v", out, err)
	}
	dir := g.dir
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is left behind: %v", dir, err)
	}
}

// TestStationTellsItsError: what a generator cannot do comes back as an error.
func TestStationTellsItsError(t *testing.T) {
	for _, tc := range []struct{ args, in, want string }{
		{"serve", "", "usage"},
		{"serve ::1", "", "want IPv4"},
		{"listen 127.0.0.1", "", "want serve, stay or ask"},
		{"ask 127.0.0.1", "RR", "count"},
		{"ask 127.0.0.1", "RR 0", "count"},
		{"ask 127.0.0.1", "XX 5", `no pattern "XX"`},
	} {
		var out bytes.Buffer
		if code := traffic(strings.Fields(tc.args), strings.NewReader(tc.in+"\n"), &out); code != 1 || !strings.Contains(out.String(), tc.want) {
			t.Errorf("%s: code %d, %q, want %q", tc.args, code, &out, tc.want)
		}
	}
}

// TestOthers: endpoints of a crowd are unlike, in the network, and at the other host.
func TestOthers(t *testing.T) {
	addrs, macs := map[netip.Addr]bool{}, map[string]bool{}
	for _, p := range others(crowd, 0) {
		if !crowdNet.Contains(p.Addr) || p.VTEP != vtep(1) {
			t.Fatalf("peer %+v", p)
		}
		addrs[p.Addr], macs[p.MAC.String()] = true, true
	}
	if len(addrs) != crowd || len(macs) != crowd {
		t.Errorf("%d addresses and %d hardware addresses", len(addrs), len(macs))
	}
}

func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for x, start := 0, time.Now(); time.Since(start) < 20*time.Millisecond; x++ {
	}
	if after, err := cpuTime(os.Getpid()); err != nil || after <= before {
		t.Errorf("CPU time %v, then %v, %v", before, after, err)
	}
	if _, err := cpuTime(1 << 30); err == nil {
		t.Error("the CPU time of no process was told")
	}
	if pid, err := softirqThread(0); err != nil || pid < 2 {
		t.Errorf("softirq thread %d, %v", pid, err)
	}
}
