package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api"
	"github.com/weftnet/weft/api/apitest"
)

// TestMain lets the scripts run this binary as weft.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"weft": main})
}

// serverKey finds the cluster of a script.
type serverKey struct{}

// scriptCluster is the in-memory cluster that one script talks to.
type scriptCluster struct {
	*apitest.Cluster
	leaderless atomic.Bool
}

// TestScript runs the archives in testdata/script: weft's command line against
// the API over an in-memory cluster of one node, h1. DOCKER_HOST points there.
// Beside testscript's own words the scripts have:
//
//	exits CODE weft …   runs, wants the exit code, and that a failure is one
//	                    sentence on stderr, said once
//	leaderless on|off   the cluster loses and regains its leader
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               serveScript,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      scriptExits,
			"leaderless": scriptLeaderless,
		},
	})
}

func serveScript(env *testscript.Env) error {
	c := &scriptCluster{Cluster: apitest.New()}
	c.Fail = func(string) error {
		if c.leaderless.Load() {
			return fmt.Errorf("%w: %s", weft.ErrUnavailable, weft.NoLeader)
		}
		return nil
	}
	c.Natives = []weft.Way{
		{VNI: weft.FirstVNI, VTEP: netip.MustParseAddr("10.99.0.2"), Native: true, Since: time.Now().Add(-3 * time.Minute)},
		{VNI: weft.FirstVNI + 1, VTEP: netip.MustParseAddr("10.99.0.3"), Since: time.Now().Add(-time.Hour), Reason: "probes do not come back"},
	}
	c.Counts = []weft.RepairCount{
		{Kind: "device wrong", Count: 1, Last: time.Now().Add(-time.Hour), Object: "wx4097", Reason: "wx4097 was down"},
		{Kind: "fdb missing", Count: 20, Last: time.Now().Add(-3 * time.Minute), Object: "fdb 02:9c:0a:00:10:05 of network 4097", Reason: "it was gone"},
	}
	cfg := c.Config()
	cfg.Log = slog.New(slog.DiscardHandler)
	s, err := api.New(cfg)
	if err != nil {
		return err
	}
	// Not in the script's own folder: the name of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "weft-script")
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1) // the one result of Serve
	go func() { done <- s.Serve(ctx, l) }()
	env.Defer(func() {
		stop()
		if err := errors.Join(<-done, os.RemoveAll(dir)); err != nil {
			env.T().Log("end of the API server:", err)
		}
	})
	env.Setenv("DOCKER_HOST", "unix://"+socket)
	env.Values[serverKey{}] = c
	return nil
}

func scriptLeaderless(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 || (args[0] != "on" && args[0] != "off") {
		ts.Fatalf("usage: leaderless on|off")
	}
	ts.Value(serverKey{}).(*scriptCluster).leaderless.Store(args[0] == "on")
}

func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	code := 0
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
	if code == 1 {
		ts.Check(oneSentence(ts.ReadFile("stderr")))
	}
}

// oneSentence checks what a failed command said.
func oneSentence(stderr string) error {
	lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	for i, l := range lines {
		switch {
		case !strings.HasPrefix(l, "weft: ") || len(l) < len("weft: x y"):
			return fmt.Errorf("%q is no sentence of weft's", l)
		case slices.Contains(lines[:i], l):
			return fmt.Errorf("%q is said twice", l)
		case strings.Contains(l, "goroutine ") || strings.Contains(l, "panic"):
			return fmt.Errorf("%q is a crash", l)
		}
	}
	return nil
}
