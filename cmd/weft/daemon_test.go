package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
)

func TestSecondDaemonIsRefused(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockDataRoot(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockDataRoot(t.Context(), dir)
	if err == nil || !strings.Contains(err.Error(), "another weft daemon") || !strings.Contains(err.Error(), dir) {
		t.Fatalf("second lock: %v, want an error that names the data root", err)
	}
	unlock()
	unlock, err = lockDataRoot(t.Context(), dir)
	if err != nil {
		t.Fatalf("after the first daemon ended: %v", err)
	}
	unlock()
}

func TestLocalIDStays(t *testing.T) {
	dir := t.TempDir()
	first, err := localID(dir)
	if err != nil || !first.Valid() {
		t.Fatalf("first id %q, %v", first, err)
	}
	if again, err := localID(dir); err != nil || again != first {
		t.Errorf("second id %q, %v, want %q", again, err, first)
	}
	if err := os.WriteFile(filepath.Join(dir, "local-id"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err := localID(dir); err == nil {
		t.Errorf("a damaged file gave %q: containers made under the old id would be lost", id)
	}
}

func TestMemberStateRoundTrip(t *testing.T) {
	dir := t.TempDir()
	if s, err := loadMember(dir); s != nil || err != nil {
		t.Fatalf("empty folder: %v, %v", s, err)
	}
	want := memberState{
		Version: memberVersion, Node: weft.NewID(), Role: weft.RoleManager,
		Listen: netip.MustParseAddrPort("0.0.0.0:2377"), Advertise: netip.MustParseAddrPort("10.99.0.1:2377"),
		DataPath: netip.MustParseAddr("10.99.0.1"), Managers: []netip.AddrPort{netip.MustParseAddrPort("10.99.0.1:2377")},
		Cluster: wire.ClusterView{ID: weft.NewID(), DataPathPort: 4789, GossipKey: make([]byte, 32)},
	}
	if err := want.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := loadMember(dir)
	if err != nil || got.Node != want.Node || got.Advertise != want.Advertise || !sameManagers(got.Managers, want.Managers) {
		t.Fatalf("read back %+v, %v", got, err)
	}
	if fi, err := os.Stat(memberPath(dir)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: the gossip key is in this file", fi.Mode(), err)
	}
	want.Version = 99
	if err := want.save(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := loadMember(dir); err == nil || !strings.Contains(err.Error(), "version 99") {
		t.Errorf("a file of another version: %v", err)
	}
	if err := forgetMember(dir); err != nil {
		t.Fatal(err)
	}
	if s, err := loadMember(dir); s != nil || err != nil {
		t.Errorf("after forgetting: %v, %v", s, err)
	}
}

// TestKeysAreRemembered: the next start begins with the newest keys of gossip, also
// where nothing else has changed. A file of before has a ring of one.
func TestKeysAreRemembered(t *testing.T) {
	dir := t.TempDir()
	managers := []netip.AddrPort{netip.MustParseAddrPort("10.99.0.1:2377")}
	first := memberState{Version: memberVersion, Node: weft.NewID(), Managers: managers,
		Cluster: wire.ClusterView{ID: weft.NewID(), DataPathPort: 4789, GossipKey: make([]byte, 32)}}
	if err := first.save(dir); err != nil {
		t.Fatal(err)
	}
	old, err := loadMember(dir)
	if r := old.Cluster.GossipRing(); err != nil || r.Validate() != nil || len(r.Keys()) != 1 || r.Sends.Epoch != 0 {
		t.Fatalf("a file of before has the ring %v, %v", r, err)
	}
	m := &member{cfg: daemonConfig{DataRoot: dir}, state: *old, stage: stage{learned: make(chan struct{})}, log: slog.New(slog.DiscardHandler)}
	next := old.Cluster
	next.GossipReads = []weft.GossipKey{{Epoch: 1, Key: bytes.Repeat([]byte{1}, weft.GossipKeyBytes)}}
	m.learn(managers, next)
	got, err := loadMember(dir)
	if err != nil || !got.Cluster.GossipRing().Equal(next.GossipRing()) {
		t.Errorf("read back %v, %v", got.Cluster.GossipRing(), err)
	}
}

// A member whose daemon has just started is not a stranger to its cluster.
func TestMemberBeforeItRuns(t *testing.T) {
	cfg := daemonConfig{DataRoot: t.TempDir()}
	ms := &membership{cfg: cfg, engines: newEngines(cfg, weft.NewID(), nil)}
	if info := ms.Local(); info.State != weft.LocalInactive {
		t.Errorf("without membership: %+v", info)
	}
	if _, err := ms.member(); err == nil || err.Error() != weft.NotInCluster {
		t.Errorf("without membership: %v", err)
	}
	s := memberState{Version: memberVersion, Node: weft.NewID(), Role: weft.RoleManager, Advertise: netip.MustParseAddrPort("10.99.0.1:2377")}
	if err := s.save(ms.cfg.DataRoot); err != nil {
		t.Fatal(err)
	}
	if info := ms.Local(); info.State != weft.LocalPending || info.Node != s.Node || !info.Manager {
		t.Errorf("with membership on disk: %+v", info)
	}
	if _, err := ms.member(); !errors.Is(err, weft.ErrUnavailable) || err.Error() == weft.NotInCluster {
		t.Errorf("with membership on disk: %v", err)
	}
}

func TestTakenPortsAreNamed(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ms := &membership{}
	taken := netip.MustParseAddrPort(ln.Addr().String())
	err = ms.checkPorts(memberState{Listen: taken})
	if err == nil || !strings.Contains(err.Error(), taken.String()) || !strings.Contains(err.Error(), "cluster port") {
		t.Errorf("taken cluster port: %v", err)
	}
	foreign := netip.MustParseAddrPort("192.0.2.77:2377") // TEST-NET-1, RFC 5737: not ours
	if err := ms.checkPorts(memberState{Listen: foreign}); err == nil || !strings.Contains(err.Error(), "--listen-addr") {
		t.Errorf("an address this host does not have: %v", err)
	}
}

func TestAddressesOfANode(t *testing.T) {
	ap := func(text string) netip.AddrPort {
		if text == "" {
			return netip.AddrPort{}
		}
		return netip.MustParseAddrPort(text)
	}
	for _, c := range []struct {
		name, listen, told, want string
	}{
		{"all by default", "", "", "0.0.0.0:2377"},
		{"another port", "0.0.0.0:4377", "", "0.0.0.0:4377"},
		{"one address", "10.99.0.1:4377", "", "10.99.0.1:4377"},
		{"told", "0.0.0.0:4377", "10.99.0.1:4377", "10.99.0.1:4377"},
		{"told without a port", "0.0.0.0:4377", "10.99.0.1:0", "10.99.0.1:4377"},
		{"a forwarded port", "10.99.0.1:4377", "192.0.2.1:5377", "192.0.2.1:5377"},
		{"IPv6", "[::]:4377", "", "[::]:4377"},
	} {
		listen := listenAddr(ap(c.listen))
		got := joinAddr(ap(c.told), listen)
		if got != ap(c.want) {
			t.Errorf("%s: a joining node advertises %s, want %s", c.name, got, c.want)
		}
		if got.Addr().IsUnspecified() {
			continue // what the host has is asked by the test of the lab
		}
		if init, err := advertiseAddr(ap(c.told), listen); err != nil || init != got {
			t.Errorf("%s: a new cluster advertises %s, %v, want %s", c.name, init, err, got)
		}
	}
	if a := explicitDataPath(netip.Addr{}, ap("0.0.0.0:4377")); a.IsValid() {
		t.Errorf("the VTEP that the manager chooses is checked as %s", a)
	}
	if a := explicitDataPath(netip.Addr{}, ap("10.99.0.1:4377")); a.String() != "10.99.0.1" {
		t.Errorf("the VTEP of an advertised address is %s", a)
	}
}

// The command that admits a host names a manager that answers: this one.
func TestManagerAddr(t *testing.T) {
	others := []swarm.Peer{{NodeID: "a", Addr: "10.99.0.1:2377"}, {NodeID: "b", Addr: "10.99.0.2:5377"}}
	for node, want := range map[string]string{"a": "10.99.0.1:2377", "b": "10.99.0.2:5377", "": "10.99.0.1:2377", "worker": "10.99.0.1:2377"} {
		if got, err := managerAddr(swarm.Info{NodeID: node, RemoteManagers: others}); err != nil || got != want {
			t.Errorf("on node %q: %s, %v, want %s", node, got, err, want)
		}
	}
	if got, err := managerAddr(swarm.Info{NodeAddr: "10.99.0.1"}); err == nil {
		t.Errorf("without a known manager: %s", got)
	}
}

// agentCalled answers Logs.
type agentCalled struct{ asked chan weft.ID }

func (a agentCalled) Logs(_ context.Context, task weft.ID, _ weft.LogOptions, _ func(weft.LogRecord) error) error {
	a.asked <- task
	return nil
}

func (a agentCalled) Arrive(context.Context, weft.ID, weft.ID, []weft.ID) error {
	return weft.ErrUnsupported
}

func (a agentCalled) Drain(context.Context, weft.ID, weft.ID) error { return weft.ErrUnsupported }

// TestAgentOfIsDialledAtItsPort: the leader reads logs of a worker whose cluster
// port is not the usual one.
func TestAgentOfIsDialledAtItsPort(t *testing.T) {
	cluster := weft.Cluster{ID: weft.NewID()}
	root, err := ca.NewRoot(string(cluster.ID), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cluster.CACert, cluster.CAKey = root.Cert, root.Key
	creds := func(node weft.ID, role weft.Role) *ca.Credentials {
		key, csr, err := ca.NewCSR()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := authority{}.Sign(cluster, csr, node, role)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ca.NewCredentials(ca.Bundle{Cert: cert, Key: key, CA: root.Cert}, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	worker, called := weft.NewID(), agentCalled{make(chan weft.ID, 1)}
	server, err := wire.NewServer(wire.ServerConfig{Credentials: creds(worker, weft.RoleWorker), Agent: called, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := wire.Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	g, ctx := errgroup.WithContext(ctx)
	m := &member{peers: wire.NewPeers(creds(weft.NewID(), weft.RoleManager))}
	g.Go(func() error { return server.Run(ctx, ln) })
	g.Go(func() error { return m.peers.Run(ctx) })

	at := ln.Addr().(*net.TCPAddr).AddrPort()
	a, err := m.agentOf(ctx, weft.Node{ID: worker, Status: weft.NodeStatus{Addr: at.Addr(), ClusterPort: at.Port()}})
	if err != nil {
		t.Fatal(err)
	}
	task := weft.NewID()
	if err := a.Logs(ctx, task, weft.LogOptions{}, nil); err != nil {
		t.Errorf("logs of a node at %s: %v", at, err)
	} else if got := <-called.asked; got != task {
		t.Errorf("the node was asked for task %s", got)
	}
	if _, err := m.agentOf(ctx, weft.Node{Description: weft.NodeDescription{Hostname: "h9"}}); !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "h9") {
		t.Errorf("a node without an address: %v", err)
	}
	stop()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// A port that is forwarded to this node says nothing of the one that it holds.
func TestListenersHaveTheForwardedPort(t *testing.T) {
	for _, c := range []struct {
		advertise string
		want      bool
	}{{"192.0.2.1:5377", true}, {"192.0.2.1:4377", false}} {
		m := &member{state: memberState{Listen: netip.MustParseAddrPort("0.0.0.0:4377"), Advertise: netip.MustParseAddrPort(c.advertise)}}
		list, err := m.listeners()
		if got := slices.Contains(list, weft.Listener{Protocol: weft.TCP, Port: 4377}); err != nil || got != c.want {
			t.Errorf("listening on 4377, advertising %s: reported %v, %v", c.advertise, got, err)
		}
	}
}

func TestParseMount(t *testing.T) {
	m, err := parseMount("type=bind,source=/etc,target=/conf,readonly")
	if err != nil || m.Source != "/etc" || m.Target != "/conf" || !m.ReadOnly {
		t.Errorf("bind mount = %+v, %v", m, err)
	}
	for _, bad := range []string{"type=bind,source=/etc", "type=npipe,target=/x", "target=/x,colour=red", "type=tmpfs,target=/x,tmpfs-size=lots"} {
		if m, err := parseMount(bad); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%q = %+v, %v, want an error that names it", bad, m, err)
		}
	}
}

func TestExecRootIsForOneDaemon(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockExecRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := lockExecRoot(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second daemon got the exec root: %v", err)
		again()
	}
	unlock()
	if unlock, err = lockExecRoot(dir); err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	unlock()
}

// TestListenAPIReplacesOnlyItsOwn: a killed daemon's socket is replaced, a file
// and a socket in use are kept.
func TestListenAPIReplacesOnlyItsOwn(t *testing.T) {
	listen := func(path string) (net.Listener, error) {
		return listenAPI(daemonConfig{Socket: path, Group: "no-such-group"})
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ln, err := listen(file); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("a file in the way: %v, %v, want ErrConflict", ln, err)
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}

	path := filepath.Join(dir, "weft.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // as after kill -9
	dead.Close()
	ln, err := listen(path)
	if err != nil {
		t.Fatalf("a dead socket in the way: %v", err)
	}
	defer ln.Close()
	if second, err := listen(path); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("a socket in use: %v, %v, want ErrConflict", second, err)
	}
}
