package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestRestartFromDisk runs one manager on the real log, three times, with a
// snapshot between: nothing acknowledged is lost, and Bootstrap is not needed
// again. It is outside of a bubble because the log is files.
func TestRestartFromDisk(t *testing.T) {
	dir := t.TempDir()
	id, addr := weft.NewID(), managerAddr(1)
	boot := &Bootstrap{Cluster: testCluster(), Node: weft.Node{ID: id}}
	var want string
	for run := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		m, err := New(Config{Dir: dir, Node: id, Addr: addr, Stream: tcpStream{l}, Bootstrap: boot, CA: fakeCA{}, Log: testLog(),
			Logs:   func(context.Context, weft.Node) (wire.Agent, error) { return nil, weft.ErrUnavailable },
			Timing: Timing{Heartbeat: 100 * time.Millisecond}})
		if err != nil {
			t.Fatal(err)
		}
		runCtx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- m.Run(runCtx) }()
		if err := m.Await(ctx); err != nil {
			t.Fatal(err)
		}
		if got := snapshotBytes(t, m.Store()); run > 0 && got != want {
			t.Errorf("run %d begins with another state", run)
		}
		if _, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: fmt.Sprint("net", run)}); err != nil {
			t.Fatal(err)
		}
		nets, err := m.Networks(ctx)
		if err != nil || len(nets) != run+2 {
			t.Errorf("run %d has %d networks (%v)", run, len(nets), err)
		}
		if run == 1 {
			term, err := m.leading()
			if err != nil {
				t.Fatal(err)
			}
			if err := term.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
		want = snapshotBytes(t, m.Store())
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if _, err := m.Networks(ctx); err == nil {
			t.Error("a stopped manager answers")
		}
		cancel()
		boot = nil
	}
}

// TestLogOfEarlierBuild: it is refused, and nothing is begun beside it.
func TestLogOfEarlierBuild(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "raft", "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "raft", "log", "wal-meta.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m := &Manager{cfg: Config{Dir: dir, Log: testLog()}}
	_, _, err := m.openStores(t.Context())
	wantErr(t, "log of raft-wal", err, weft.ErrUnsupported, "earlier build", "weft node rm --force")
	if _, err := os.Stat(filepath.Join(dir, "raft", "entries")); !os.IsNotExist(err) {
		t.Errorf("a log was begun beside it: %v", err)
	}
}

// TestEndsWithItsLog: a manager whose log takes no more writes does not stay and
// refuse; it ends with the disk's own word.
func TestEndsWithItsLog(t *testing.T) {
	failed, why := make(chan struct{}), errors.New("input/output error")
	log := raft.NewInmemStore()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	id := weft.NewID()
	m, err := New(Config{Dir: t.TempDir(), Node: id, Addr: managerAddr(1), Stream: tcpStream{l}, CA: fakeCA{}, Log: testLog(),
		Bootstrap: &Bootstrap{Cluster: testCluster(), Node: weft.Node{ID: id}},
		Logs:      func(context.Context, weft.Node) (wire.Agent, error) { return nil, weft.ErrUnavailable },
		Stores:    &Stores{Log: log, Stable: log, Snapshots: raft.NewInmemSnapshotStore(), Failed: failed, Err: func() error { return why }},
		Timing:    Timing{Heartbeat: 100 * time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 60*time.Second)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	if err := m.Await(ctx); err != nil {
		t.Fatal(err)
	}
	close(failed)
	if err := <-done; !errors.Is(err, why) || ctx.Err() != nil {
		t.Errorf("the manager ended with %v (%v), want %v", err, ctx.Err(), why)
	}
}

// tcpStream is plain TCP where the daemon has its TLS port.
type tcpStream struct{ net.Listener }

func (tcpStream) Dial(a raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(a), timeout)
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	_, err := New(Config{Node: "x", Timing: Timing{Heartbeat: time.Millisecond, Lease: time.Second}})
	wantErr(t, "empty configuration", err, weft.ErrInvalid, "Dir is empty", `Node "x"`, "cannot be dialled", "Stream is nil", "CA is nil", "Log is nil", "below 50ms", "Timing.Lease")
	_, err = New(Config{Dir: "/nowhere", Node: weft.NewID(), Addr: netip.MustParseAddrPort("0.0.0.0:1"), Bootstrap: &Bootstrap{}})
	wantErr(t, "bootstrap", err, weft.ErrInvalid, "Bootstrap.Cluster.ID", "Bootstrap.Node.ID", "address pools")
}
