package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestCommandLine(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		want string // on standard error; of "list" on standard output
	}{
		{"list", 0, "labup  "},
		{"", 2, "no benchmark named"},
		{"labdown", 2, `no benchmark "labdown"`},
		{"labup -rounds 0", 2, "-rounds 0: want 1 to 100"},
		{"labup -rounds 101", 2, "-rounds 101"},
		{"labup -rounds x", 2, "invalid value"},
		{"labup -fast", 2, "not defined: -fast"},
		{"labup twice", 2, `unexpected argument "twice"`},
		{"labup -case weft", 2, "not defined: -case"},
		{"instructions -case ebpf,ebpf", 2, "each once"},
		{"instructions -case macvlan", 2, "want some of routed,"},
		{"instructions -metric bulk,x", 2, "want some of RR,CRR,UDP,bulk"},
		{"instructions -tolerance 1", 2, "-tolerance 1: want a share"},
		{"labup -h", 0, "-svg file"},
		{"labup -weft /nonexistent/weft", 1, ""},
	} {
		t.Run(tc.args, func(t *testing.T) {
			var out, errs bytes.Buffer
			if code := run(t.Context(), strings.Fields(tc.args), &out, &errs); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if all := out.String() + errs.String(); !strings.Contains(all, tc.want) {
				t.Errorf("no %q in\n%s", tc.want, all)
			}
		})
	}
}

// TestListIsWhole: names are words, unlike, and explained on one line.
func TestListIsWhole(t *testing.T) {
	seen := map[string]bool{"list": true}
	for _, b := range benchmarks() {
		if seen[b.Name] || strings.ContainsAny(b.Name, " -") || (b.Prepare == nil) == (b.Away == nil) {
			t.Errorf("benchmark %q: name taken, odd, or nothing to prepare", b.Name)
		}
		if seen[b.Name] = true; b.About == "" || strings.Contains(b.About, "\n") {
			t.Errorf("benchmark %q: about %q", b.Name, b.About)
		}
	}
}

func TestParseRollup(t *testing.T) {
	const whole = "00400000-7ffd ---p 00000000 00:00 0    [rollup]\nRss:  900 kB\nPss:   700 kB\nPss_Dirty: 1 kB\nShared_Clean: 5 kB\nPrivate_Clean:  10 kB\nPrivate_Dirty:  20 kB\nPrivate_Hugetlb:  0 kB\n"
	got, err := parseRollup([]byte(whole))
	if want := (memory{private: 30 * 1024, proportional: 700 * 1024}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", strings.ReplaceAll(whole, "Private_Dirty", "X"), strings.ReplaceAll(whole, "700 kB", "x kB")} {
		if got, err := parseRollup([]byte(bad)); err == nil {
			t.Errorf("%q gave %+v", bad, got)
		}
	}
	// The real thing: this process has some memory of its own.
	m, err := readMemory(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if m.private < 1e5 || m.proportional < m.private {
		t.Errorf("own memory %+v", m)
	}
}

func TestParseStat(t *testing.T) {
	for _, tc := range []struct {
		in          string
		pid, parent int
		ok          bool
	}{
		{"7 (sh) S 3 7 7 0", 7, 3, true},
		{"7 (a ) R 9 (b) S 3 7", 7, 3, true},
		{"7 (sh) S", 0, 0, false},
		{"x (sh) S 3", 0, 0, false},
		{"7 (sh) S y", 0, 0, false},
		{"", 0, 0, false},
	} {
		pid, parent, err := parseStat(tc.in)
		if (err == nil) != tc.ok || tc.ok && (pid != tc.pid || parent != tc.parent) {
			t.Errorf("%q: %d, %d, %v", tc.in, pid, parent, err)
		}
	}
}

func TestDescendants(t *testing.T) {
	c := exec.CommandContext(t.Context(), "cat")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	got, err := descendants(os.Getpid())
	in.Close()
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if err != nil || got[0] != os.Getpid() || !slices.Contains(got, c.Process.Pid) {
		t.Errorf("descendants %v, %v: want %d and its child %d", got, err, os.Getpid(), c.Process.Pid)
	}
}

func TestIsSupervisor(t *testing.T) {
	const dir = "/run/weft/lab/bench/h1"
	for cmdline, want := range map[string]bool{
		"/x/weft-containerd\x00--config\x00" + dir + "/containerd/config.toml\x00":  true,
		"/x/weft-containerd\x00--config\x00" + dir + "0/containerd/config.toml\x00": false,
		"/x/weft\x00daemon\x00--exec-root\x00" + dir + "\x00":                       false,
		"/x/containerd-shim\x00-address\x00" + dir + "/containerd.sock\x00":         false,
		"": false,
	} {
		if got := isSupervisor(cmdline, dir); got != want {
			t.Errorf("%q: %v", cmdline, got)
		}
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, tc := range []struct {
		in   []time.Duration
		p    int
		want time.Duration
	}{
		{nil, 50, 0}, {hundred[:1], 1, 1}, {hundred[:1], 99, 1}, {hundred, 50, 50}, {hundred, 99, 99}, {hundred, 100, 100}, {hundred[:3], 50, 2},
	} {
		if got := percentile(tc.in, tc.p); got != tc.want {
			t.Errorf("%d %% of %d values: %v, want %v", tc.p, len(tc.in), got, tc.want)
		}
	}
}

// TestFlow: every request is sent, in turn to the targets, and what fails is
// told apart.
func TestFlow(t *testing.T) {
	var asked atomic.Int32
	good := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Write([]byte(`{"host":"c1"}`))
	}))
	defer good.Close()
	odd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("hello")) }))
	defer odd.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	mute := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer mute.Close()

	// Far above what a busy machine takes for an answer: those that come count.
	c := &http.Client{Timeout: 2 * time.Second}
	targets := []string{good.Listener.Addr().String(), odd.Listener.Addr().String(), closed.Addr().String(), mute.Listener.Addr().String()}
	got, err := flow(t.Context(), c, targets, 20, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if got.Sent != 20 || got.Failed != 15 || got.Refused != 5 || got.TimedOut != 5 || len(got.Latencies) != 5 || asked.Load() != 5 {
		t.Errorf("outcome %+v, %d answered", got, asked.Load())
	}
	if got.Other == nil || !strings.Contains(got.Other.Error(), "hello") {
		t.Errorf("the odd answer is told as %v", got.Other)
	}
	if got.LastFail < c.Timeout {
		t.Errorf("the last failure ended after %v", got.LastFail)
	}
}

func TestFlowEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := flow(ctx, http.DefaultClient, []string{"127.0.0.1:1"}, 1000, time.Hour); err != context.Canceled {
		t.Errorf("error %v", err)
	}
}

func TestArrivals(t *testing.T) {
	a := arrivals{
		byTarget: map[string]time.Duration{"h1": 2 * time.Second, "h2": time.Second, "h3": 3 * time.Second},
		byTask:   map[string]time.Duration{"a": time.Second, "b": 4 * time.Second},
	}
	if got, want := a.sample(), (sample{someHost: 1, everyHost: 3, everyTask: 4}); !reflect.DeepEqual(got, want) {
		t.Errorf("sample %v, want %v", got, want)
	}
}

func TestOneEach(t *testing.T) {
	if err := oneEach(map[string]string{"a": "h2", "b": "h1", "c": "h3"}); err != nil {
		t.Error(err)
	}
	for _, bad := range []map[string]string{nil, {"a": "h1", "b": "h2"}, {"a": "h1", "b": "h2", "c": "h2"}} {
		if oneEach(bad) == nil {
			t.Errorf("%v passed", bad)
		}
	}
}

func TestParseSpell(t *testing.T) {
	if got, err := parseSpell(" 2000 65000000 1000"); err != nil || got != (spell{2000, 65 * time.Millisecond, time.Microsecond}) {
		t.Errorf("got %+v, %v", got, err)
	}
	// Two processors may idle for longer than the run took.
	if got, err := parseSpell(" 1 5 9"); err != nil || got.Idle != 9 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{"", "1 2", "0 5 0", "1 0 0", "1 5 -1", "x 5 0"} {
		if got, err := parseSpell(bad); err == nil {
			t.Errorf("%q gave %+v", bad, got)
		}
	}
}

func TestParseIdle(t *testing.T) {
	const list = "Timer List Version: v0.10\n  .idle_calls     : 1046\n  .idle_sleeptime : 1500 nsecs\n  .iowait_sleeptime: 7 nsecs\ncpu: 1\n  .idle_sleeptime : 500 nsecs\n"
	if got, ok := parseIdle(list); !ok || got != 2*time.Microsecond {
		t.Errorf("got %v, %v", got, ok)
	}
	for _, bad := range []string{"", "  .idle_sleeptime : x nsecs\n", "idle_sleeptime 5\n"} {
		if got, ok := parseIdle(bad); ok {
			t.Errorf("%q gave %v", bad, got)
		}
	}
}
