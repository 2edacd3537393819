package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft"
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

func TestParsePublish(t *testing.T) {
	for _, c := range []struct {
		in                string
		published, target uint32
		proto, err        string
	}{
		{"80", 0, 80, "tcp", ""},
		{"8080:80", 8080, 80, "tcp", ""},
		{"53:53/udp", 53, 53, "udp", ""},
		{"published=8080,target=80", 8080, 80, "tcp", ""},
		{"0", 0, 0, "", "1 to 65535"},
		{"8080:70000", 0, 0, "", "1 to 65535"},
		{"127.0.0.1:8080:80", 0, 0, "", "one address"},
		{"10000-20000:80", 0, 0, "", "ranges"},
		{"published=8080", 0, 0, "", "target is missing"},
		{"target=80,speed=9", 0, 0, "", `"speed"`},
	} {
		p, err := parsePublish(c.in)
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), c.in) {
				t.Errorf("%q: error %v, want one with %q", c.in, err, c.err)
			}
		case err != nil || p.PublishedPort != c.published || p.TargetPort != c.target || string(p.Protocol) != c.proto:
			t.Errorf("%q = %+v, %v", c.in, p, err)
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
