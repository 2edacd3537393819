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
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// gaps are the cases of the suite that this engine fails, with the reason.
var gaps = map[string]string{
	"udp to a server on all addresses":   "direct return: such a server answers from the task's own address, of which its client knows nothing",
	"tcp to a server on its own address": "direct return: what comes in bears the service address, on which nobody listens",
	"udp to a server on its own address": "direct return: what comes in bears the service address, on which nobody listens",
}

// socketGaps are those where the sockets of tasks are balanced, too.
var socketGaps = map[string]string{
	"udp to a server on all addresses":   "a socket that is connected is balanced at the veth: " + gaps["udp to a server on all addresses"],
	"udp to a server on its own address": "a socket that is connected is balanced at the veth: " + gaps["udp to a server on its own address"],
}

// TestServices runs the suite of all engines for service addresses, on the eBPF
// overlay with real sandboxes.
func TestServices(t *testing.T) {
	netnstest.NeedRoot(t)
	t.Run("veth", func(t *testing.T) { testServices(t, "", gaps) })
	t.Run("sockets", func(t *testing.T) {
		cgroup := placeOf(t, "services")
		testServices(t, cgroup, socketGaps)
	})
}

func testServices(t *testing.T, cgroup string, gaps map[string]string) {
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
		t.Cleanup(func() { must(t, e.Close(context.Background())) })
		if err := e.Probe(t.Context()); errors.Is(err, weft.ErrUnsupported) {
			netnstest.Missing(t, "clsact", err)
		}
		return e, nil
	})
	for family, suite := range w.Suites(gaps) {
		t.Run(family, suite.Run)
	}
}
