package wire

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Everything here listens on ephemeral ports of 127.0.0.1.

// testCluster is a root and what it signs.
type testCluster struct {
	t    testing.TB
	id   weft.ID
	root ca.Root
	now  func() time.Time
}

func newTestCluster(t testing.TB) *testCluster {
	t.Helper()
	root, err := ca.NewRoot("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &testCluster{t: t, id: weft.NewID(), root: root, now: time.Now}
}

func (c *testCluster) creds(role weft.Role) *ca.Credentials {
	c.t.Helper()
	return c.credsAt(role, time.Now())
}

// credsAt are credentials signed at a given time.
func (c *testCluster) credsAt(role weft.Role, signed time.Time) *ca.Credentials {
	c.t.Helper()
	key, csr, err := ca.NewCSR()
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := ca.Sign(c.root, csr, ca.Identity{Node: weft.NewID(), Role: role, Cluster: c.id}, signed)
	if err != nil {
		c.t.Fatal(err)
	}
	creds, err := ca.NewCredentials(ca.Bundle{Cert: cert, Key: key, CA: c.root.Cert}, c.now)
	if err != nil {
		c.t.Fatal(err)
	}
	return creds
}

// running is a server that runs.
type running struct {
	*Server
	addr netip.AddrPort
	stop func() // blocks until Run has returned
}

// serve runs a server until the test ends. Unset fields of cfg are filled in.
func (c *testCluster) serve(cfg ServerConfig) *running {
	c.t.Helper()
	if cfg.Credentials == nil {
		cfg.Credentials = c.creds(weft.RoleManager)
	}
	cfg.Log, cfg.Now = slog.New(slog.DiscardHandler), c.now
	s, err := NewServer(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	ln, err := Listen(context.Background(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("Run: %v", err)
		}
	})
	c.t.Cleanup(stop)
	return &running{Server: s, addr: ln.Addr().(*net.TCPAddr).AddrPort(), stop: stop}
}

// client is a client of the given managers, closed with the test.
func (c *testCluster) client(creds *ca.Credentials, managers ...netip.AddrPort) *Client {
	c.t.Helper()
	cl, err := NewClient(ClientConfig{
		Credentials: creds,
		Managers:    func() []netip.AddrPort { return managers },
		Log:         slog.New(slog.DiscardHandler),
		FindLeader:  1500 * time.Millisecond,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.runUntilEnd(cl.Run)
	return cl
}

func (c *testCluster) runUntilEnd(run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("Run: %v", err)
		}
	})
}

// deadAddr is a port of this host on which nobody listens.
func deadAddr(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// soon is a context for one test step.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}
