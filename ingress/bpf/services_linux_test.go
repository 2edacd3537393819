package bpf

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestServices runs the suite of all engines for service addresses, on the eBPF
// overlay with real sandboxes.
func TestServices(t *testing.T) {
	netnstest.NeedRoot(t)
	t.Run("veth", func(t *testing.T) { testServices(t, "") })
	t.Run("sockets", func(t *testing.T) {
		cgroup := placeOf(t, "services")
		testServices(t, cgroup)
	})
}

func testServices(t *testing.T, cgroup string) {
	log, files := slog.New(slog.DiscardHandler), t.TempDir()
	mount := func(dir string, host int) string { return filepath.Join(dir, "bpf"+string(rune('0'+host))) }
	parts := ingresstest.Parts{
		Overlay: func(host int, node weft.ID, dir string) (vxlan.Kernel, error) {
			return overlay.New(overlay.Config{Node: node, Dir: mount(dir+".pins", host), NetNSDir: dir, Log: log})
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
	w := ingresstest.NewWire(t, parts, func(r *ingresstest.Rig) (ingress.Engine, error) {
		e, err := New(Config{Node: r.Nodes[0], Dir: mount(r.Dir+".pins", 0), Cgroup: cgroup})
		if err != nil {
			return nil, err
		}
		e.sockets.patience = 0 // it is not new for long, and TestReleaseWaits is about that
		// What direct return leaves to the backend's end is the other engine's.
		both := ingress.Split{Services: e, Published: nft.New(r.Dir)}
		t.Cleanup(func() { must(t, both.Close(context.Background())) })
		if err := both.Probe(t.Context()); errors.Is(err, weft.ErrUnsupported) {
			netnstest.Missing(t, "clsact", err)
		}
		return both, nil
	})
	for family, suite := range w.Suites() {
		t.Run(family, suite.Run)
	}
}
