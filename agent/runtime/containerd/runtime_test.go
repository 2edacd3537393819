package containerd_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
)

func busyboxHarness(h *host) runtimetest.Harness {
	return runtimetest.Harness{
		New:      func(*testing.T) runtimetest.Target { return h.Driver },
		Image:    "busybox",
		Sleep:    []string{"sh", "-c", `trap 'exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done`},
		Stubborn: []string{"sh", "-c", `trap '' TERM; echo ready; while :; do sleep 1000; done`},
		Exit:     func(code int) []string { return []string{"sh", "-c", fmt.Sprintf("exit %d", code)} },
		Print:    []string{"sh", "-c", "echo out1; echo err1 >&2; echo out2"},
		Missing:  []string{"/no/such/program"},
		Echo:     []string{"sh", "-c", "cat; exit 5"},
	}
}

func TestConformance(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	runtimetest.Run(t, busyboxHarness(h))
}

func TestConformanceGrouped(t *testing.T) {
	h := newHost(t, func(c *containerd.Config) { c.Grouped, c.NoSync = true, true })
	h.loadBusybox(t)
	runtimetest.Run(t, busyboxHarness(h))
}

// A shared shim ends with its last container; the next one may meet it dying.
func TestSuccessorMeetsDyingShim(t *testing.T) {
	h := newHost(t, func(c *containerd.Config) { c.Grouped, c.NoSync = true, true })
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	last, _ := h.start(ctx, t, "sh", "-c", sleeper)
	for i := range 12 {
		next := weft.NewID()
		if err := h.Create(ctx, runtime.Spec{Task: next, Image: "busybox", Args: []string{"sh", "-c", sleeper}}); err != nil {
			t.Fatal(err)
		}
		if err := h.Signal(ctx, last, "SIGKILL"); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Wait(ctx, last); err != nil {
			t.Fatal(err)
		}
		removed := make(chan error, 1)
		go func() { removed <- h.Remove(ctx, last) }()
		timer := time.NewTimer(time.Duration(i) * 10 * time.Millisecond) // another moment each round
		<-timer.C
		_, err := h.Start(ctx, next)
		if rerr := <-removed; err != nil || rerr != nil {
			t.Fatalf("round %d: start %v, remove of the one before %v", i, err, rerr)
		}
		last = next
	}
}
