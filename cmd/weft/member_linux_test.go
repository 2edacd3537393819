package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestMemberRenewsItsCertificate starts a whole member, the only manager of its
// cluster, which was off until its certificate had expired. Nothing but the
// member's own run puts another in its place, and with it the node takes part.
func TestMemberRenewsItsCertificate(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cfg := daemonConfig{DataRoot: t.TempDir(), ExecRoot: "/run/weft", Hostname: "h1", ResolvConf: filepath.Join(t.TempDir(), "none")}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	driver, err := containerd.New(containerd.Config{Node: weft.NewID(), ExecRoot: cfg.ExecRoot, DataRoot: cfg.DataRoot, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ms, err := newMembership(cfg, newEngines(cfg, weft.NewID(), log), driver, log)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	state := memberState{Version: memberVersion, Node: weft.NewID(), Role: weft.RoleManager, Listen: addr, Advertise: addr, DataPath: addr.Addr(), Managers: []netip.AddrPort{addr}}
	boot, err := newCluster(weft.InitRequest{}, &state)
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-ca.Lifetime - time.Hour)
	key, csr, err := ca.NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(ca.Root{Cert: boot.Cluster.CACert, Key: boot.Cluster.CAKey}, csr, ca.Identity{Node: state.Node, Role: state.Role, Cluster: boot.Cluster.ID}, old)
	if err != nil {
		t.Fatal(err)
	}
	expired := ca.Bundle{Cert: cert, Key: key, CA: boot.Cluster.CACert}
	if err := errors.Join(ca.Save(pkiDir(cfg.DataRoot), expired), state.save(cfg.DataRoot)); err != nil {
		t.Fatal(err)
	}
	m, err := ms.newMember(ctx, state, &boot.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	ms.current = m
	if info := ms.Local(); info.State != weft.LocalError || !strings.Contains(info.Error, "expired on "+old.Add(ca.Lifetime).UTC().Format(time.DateOnly)) {
		t.Errorf("a node with an expired certificate is %s: %s", info.State, info.Error)
	}
	if _, err := ms.control(); !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("a call without a good certificate: %v", err)
	}

	running, stop := context.WithCancel(ctx)
	done := make(chan error, 1) // the one result of run
	go func() { done <- m.run(running) }()
	select {
	case <-m.stage.learned: // over a connection with the new certificate
	case err := <-done:
		t.Fatalf("the member ended: %v", err)
	case <-ctx.Done():
		t.Fatalf("the member does not take part: %v", m.creds.Expired())
	}
	if b, err := ca.Load(pkiDir(cfg.DataRoot)); err != nil || m.creds.Expired() != nil || reflect.DeepEqual(b, expired) {
		t.Errorf("after the renewal: %v, %v, changed on disk: %v", err, m.creds.Expired(), !reflect.DeepEqual(b, expired))
	}
	if info := ms.Local(); info.State != weft.LocalActive || info.Error != "" {
		t.Errorf("after the renewal the node is %s: %s", info.State, info.Error)
	}
	// The manager asks gossip, who is heard there.
	if heard := m.managerConfig(nil).Heard; heard == nil || !heard(state.Node) || heard(weft.NewID()) {
		t.Error("the manager is not given whom gossip hears")
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("end of the member: %v", err)
	}
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String()).Port()
}
