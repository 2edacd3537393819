package wire

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// manager is a Control that redirects, or answers when it leads.
type manager struct {
	*recorder
	redirect atomic.Pointer[NotLeader] // nil = leads
	asked    atomic.Int64
}

func (m *manager) Service(ctx context.Context, ref string) (weft.Service, error) {
	m.asked.Add(1)
	if r := m.redirect.Load(); r != nil {
		return weft.Service{}, r
	}
	return m.recorder.Service(ctx, ref)
}

func (m *manager) RemoveService(ctx context.Context, id weft.ID) error {
	m.asked.Add(1)
	if r := m.redirect.Load(); r != nil {
		return fmt.Errorf("remove service: %w", *r) // by value and wrapped; Service returns a pointer
	}
	return m.recorder.RemoveService(ctx, id)
}

// managers starts n of them that know of no leader.
func managers(c *testCluster, n int) (ms []*manager, srv []*running) {
	for range n {
		m := &manager{recorder: &recorder{}}
		m.redirect.Store(&NotLeader{})
		ms, srv = append(ms, m), append(srv, c.serve(ServerConfig{Control: m, Dispatcher: m}))
	}
	return ms, srv
}

func TestRedirectChain(t *testing.T) {
	c := newTestCluster(t)
	ms, srv := managers(c, 4)
	for i := range 3 {
		ms[i].redirect.Store(&NotLeader{Leader: srv[i+1].addr})
	}
	ms[3].redirect.Store(nil)
	cl := c.client(c.creds(weft.RoleWorker), srv[0].addr)
	for range 2 {
		if err := cl.RemoveService(soon(t), "x"); err != nil {
			t.Fatal(err)
		}
	}
	// The second call goes to the leader at once.
	for i, want := range []int64{1, 1, 1, 2} {
		if got := ms[i].asked.Load(); got != want {
			t.Errorf("manager %d was asked %d times, want %d", i, got, want)
		}
	}
}

func TestRedirectCircleEnds(t *testing.T) {
	c := newTestCluster(t)
	ms, srv := managers(c, 2)
	ms[0].redirect.Store(&NotLeader{Leader: srv[1].addr})
	ms[1].redirect.Store(&NotLeader{Leader: srv[0].addr})
	cl := c.client(c.creds(weft.RoleWorker), srv[0].addr, srv[1].addr)
	start := time.Now()
	err := cl.RemoveService(soon(t), "x")
	mustBeNoLeader(t, err)
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("gave up after %v", d)
	}
	if n := ms[0].asked.Load() + ms[1].asked.Load(); n > 15*8*2 {
		t.Errorf("%d questions: it ran in circles without pause", n)
	}
}

func mustBeNoLeader(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, weft.ErrUnavailable) || err.Error() != weft.NoLeader {
		t.Errorf("error is %q, want exactly the sentence of weft.NoLeader", err)
	}
}

func TestNoLeader(t *testing.T) {
	c := newTestCluster(t)
	_, srv := managers(c, 1)
	worker := c.serve(ServerConfig{Credentials: c.creds(weft.RoleWorker)}) // serves no Control, and proves no manager
	foreign := newTestCluster(t)
	_, fsrv := managers(foreign, 1)
	for name, addrs := range map[string][]netip.AddrPort{
		"nobody known":      nil,
		"nobody listens":    {deadAddr(t)},
		"all are followers": {srv[0].addr},
		"a worker":          {worker.addr},
		"another cluster":   {fsrv[0].addr},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cl := c.client(c.creds(weft.RoleWorker), addrs...)
			mustBeNoLeader(t, cl.RemoveService(soon(t), "x"))
			_, err := cl.OpenSession(soon(t), SessionRequest{Version: ProtocolVersion})
			if name != "all are followers" { // whose Session does not redirect here
				mustBeNoLeader(t, err)
			}
			ctx, cancel := context.WithCancel(soon(t))
			cancel()
			if err := cl.RemoveService(ctx, "x"); !errors.Is(err, context.Canceled) {
				t.Errorf("with an ended context: %v", err)
			}
		})
	}
}

func TestRidesOutAnElection(t *testing.T) {
	c := newTestCluster(t)
	ms, srv := managers(c, 3)
	cl := c.client(c.creds(weft.RoleWorker), deadAddr(t), srv[0].addr, srv[1].addr, srv[2].addr)
	elect := time.AfterFunc(400*time.Millisecond, func() { ms[2].redirect.Store(nil) })
	defer elect.Stop()
	if err := cl.RemoveService(soon(t), "x"); err != nil {
		t.Fatal(err)
	}
	if n := len(ms[2].seen()); n != 1 {
		t.Errorf("the change was carried out %d times", n)
	}
}

// TestRedirectToDeadLeader: followers name a leader that died until the next
// election; a follower then leads.
func TestRedirectToDeadLeader(t *testing.T) {
	c := newTestCluster(t)
	ms, srv := managers(c, 2)
	dead := deadAddr(t)
	for _, m := range ms {
		m.redirect.Store(&NotLeader{Leader: dead})
	}
	cl := c.client(c.creds(weft.RoleWorker), srv[0].addr, srv[1].addr)
	elect := time.AfterFunc(300*time.Millisecond, func() { ms[1].redirect.Store(nil) })
	defer elect.Stop()
	if err := cl.RemoveService(soon(t), "x"); err != nil {
		t.Fatal(err)
	}
}

// TestLeaderLostMidCall: a change is not repeated, a read is.
func TestLeaderLostMidCall(t *testing.T) {
	c := newTestCluster(t)
	for _, change := range []bool{true, false} {
		ms, srv := managers(c, 2)
		ms[0].redirect.Store(nil)
		ms[1].redirect.Store(nil)
		cut := newProxy(t, srv[0].addr)
		ms[0].onCall = func(ctx context.Context) { cut.cut(); <-ctx.Done() }
		cl := c.client(c.creds(weft.RoleWorker), cut.addr, srv[1].addr)
		var err error
		if change {
			err = cl.RemoveService(soon(t), "x")
		} else {
			_, err = cl.Service(soon(t), "x")
		}
		asked := ms[1].asked.Load()
		switch {
		case change && (asked != 0 || !errors.Is(err, weft.ErrUnavailable) || err.Error() == weft.NoLeader):
			t.Errorf("a change whose leader was lost: repeated %d times, error %v", asked, err)
		case !change && (asked != 1 || err != nil):
			t.Errorf("a read whose leader was lost: repeated %d times, error %v", asked, err)
		}
	}
}

// TestSessionEndsWithLeader, by its stop and by its fall.
func TestSessionEndsWithLeader(t *testing.T) {
	c := newTestCluster(t)
	for name, end := range map[string]func(*running, *proxy){
		"stop": func(r *running, _ *proxy) { r.stop() },
		"cut":  func(_ *running, p *proxy) { p.cut() },
	} {
		rec := &recorder{hold: true, sets: []Assignments{{Seq: 1, Full: true}}}
		srv := c.serve(ServerConfig{Dispatcher: rec})
		p := newProxy(t, srv.addr)
		cl := c.client(c.creds(weft.RoleWorker), p.addr)
		s, err := cl.OpenSession(soon(t), SessionRequest{Version: ProtocolVersion})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		end(srv, p)
		if _, err := s.Recv(); !errors.Is(err, weft.ErrUnavailable) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: session ended with %v", name, err)
		}
	}
}

func TestSessionRefusesOtherProtocol(t *testing.T) {
	c := newTestCluster(t)
	srv := c.serve(ServerConfig{Dispatcher: &recorder{}})
	cl := c.client(c.creds(weft.RoleWorker), srv.addr)
	if _, err := cl.OpenSession(soon(t), SessionRequest{Version: 99}); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("version 99: %v", err)
	}
}

func TestAfterRunCallsFail(t *testing.T) {
	c := newTestCluster(t)
	cl, err := NewClient(ClientConfig{Credentials: c.creds(weft.RoleWorker), Managers: func() []netip.AddrPort { return []netip.AddrPort{deadAddr(t)} }, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := cl.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := cl.RemoveService(soon(t), "x"); !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("after Run: %v", err)
	}
}
