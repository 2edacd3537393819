package ipvs

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// parts are a node's own: the bridge engine and its sandboxes.
func parts(t testing.TB) ingresstest.Parts {
	log, files := slog.New(slog.DiscardHandler), t.TempDir()
	return ingresstest.Parts{
		Overlay: func(_ int, node weft.ID, dir string) (vxlan.Kernel, error) {
			return linux.New(linux.Config{Node: node, NetNSDir: dir, Log: log})
		},
		Sandbox: func(ctx context.Context, dir string, task weft.ID, vips []netip.Addr) (string, error) {
			m, err := sandbox.New(sandbox.Config{Node: "tasks", NetNSDir: dir, FilesDir: files, Log: log})
			if err != nil {
				return "", err
			}
			s, err := m.Make(ctx, sandbox.Spec{Task: task, Hostname: "h", VIPs: vips})
			return s.NetNS, err
		},
	}
}

// TestServices runs the suite of all engines.
func TestServices(t *testing.T) {
	need(t)
	if err := ingresstest.HasSCTP(); err != nil && netnstest.Required("sctp") {
		t.Fatal(err) // else the suite speaks it by hand
	}
	var repaired []weft.Repair
	var path string
	w := ingresstest.NewWire(t, parts(t), func(r *ingresstest.Rig) (ingress.Engine, error) {
		path = r.Network(0).NetNS
		e, err := New(Config{Node: r.Nodes[0], NetNSDir: r.Dir, Repaired: func(r weft.Repair) { repaired = append(repaired, r) }})
		if err != nil {
			return nil, err
		}
		// What direct return leaves to the backend's end is the other engine's.
		both := ingress.Split{Services: e, Published: nft.New(r.Dir)}
		t.Cleanup(func() { must(t, both.Close(context.Background())) })
		return both, both.Probe(t.Context())
	})
	w.Remembers = func(from, _ netip.AddrPort) (time.Duration, error) { return remembers(path, from) }
	for family, suite := range w.Suites() {
		t.Run(family, suite.Run)
	}
	if len(repaired) > 0 {
		t.Errorf("repaired %v", repaired)
	}
}

// TestSpeakers: each task speaks of its own addresses.
func TestSpeakers(t *testing.T) {
	need(t)
	ingresstest.Speakers(t, parts(t), func(r *ingresstest.Rig) (ingress.Engine, error) {
		e, err := New(Config{Node: r.Nodes[0], NetNSDir: r.Dir})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { must(t, e.Close(context.Background())) })
		return e, e.Probe(t.Context())
	})
}

// remembers reads the kernel's list of flows: protocol, client, its port, service,
// port, backend, port, state, seconds.
func remembers(path string, from netip.AddrPort) (left time.Duration, err error) {
	err = netns.Do(path, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/ip_vs_conn")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 9 || f[0] != "TCP" || f[2] != fmt.Sprintf("%04X", from.Port()) {
				continue
			}
			seconds, err := strconv.Atoi(f[8])
			left = max(left, time.Duration(seconds)*time.Second)
			return err
		}
		return fmt.Errorf("no flow of port %d among\n%s", from.Port(), b)
	})
	return left, err
}
