package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestServices runs the suite of all engines for service addresses, on the bridge
// overlay with real sandboxes.
func TestServices(t *testing.T) {
	if err := ingresstest.HasSCTP(); err != nil && netnstest.Required("sctp") {
		t.Fatal(err) // else the suite speaks it by hand
	}
	var path string
	w := ingresstest.NewWire(t, rigParts(t), func(r *ingresstest.Rig) (ingress.Engine, error) {
		path = r.Network(0).NetNS
		e := New(r.Dir)
		t.Cleanup(func() { must(t, e.Close(context.Background())) })
		return e, e.Probe(t.Context())
	})
	w.Remembers = func(from, to netip.AddrPort) (time.Duration, error) { return remembers(path, from, to) }
	for family, suite := range w.Suites() {
		t.Run(family, suite.Run)
	}
}

// rigParts are a node's own: the bridge engine and its sandboxes.
func rigParts(t *testing.T) ingresstest.Parts {
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

// remembers reads how long the flow has left in the maps of flows.
func remembers(path string, from, to netip.AddrPort) (left time.Duration, err error) {
	f := &ipv4
	if to.Addr().Is6() {
		f = &ipv6
	}
	var ports []byte // two bytes each, and as many of nothing
	for _, p := range []uint16{from.Port(), to.Port()} {
		ports = append(binary.BigEndian.AppendUint16(ports, p), 0, 0)
	}
	err = withConn(path, func(conn *nftables.Conn) error {
		for _, name := range []string{f.flows(), f.ending()} {
			flows, err := conn.GetSetByName(&nftables.Table{Name: weft.TableName, Family: nftables.TableFamilyBridge}, name)
			if err != nil {
				return err
			}
			all, err := conn.GetSetElements(flows)
			if err != nil {
				return err
			}
			for _, e := range all {
				if bytes.Contains(e.Key, ports) {
					left = max(left, e.Expires)
				}
			}
		}
		return nil
	})
	return left, err
}
