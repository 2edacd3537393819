package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

func TestPortTaken(t *testing.T) {
	ln, err := Listen(context.Background(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	addr := ln.Addr().(*net.TCPAddr).AddrPort()
	_, err = Listen(context.Background(), addr)
	if !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), addr.String()) || !strings.Contains(err.Error(), "--listen-addr") {
		t.Errorf("error %v", err)
	}
	if _, err = Listen(context.Background(), netip.MustParseAddrPort("198.51.100.9:0")); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("address of another host: %v", err)
	}
}

// refusedAtOnce waits until the server has closed c.
func refusedAtOnce(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(8 * time.Second)) // less than HandshakeTimeout
	if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("the server keeps the connection: %v", err)
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func TestRefusals(t *testing.T) {
	c := newTestCluster(t)
	foreign := newTestCluster(t)
	srv := c.serve(ServerConfig{Control: &recorder{}}) // neither Raft nor join
	expired := c.credsAt(weft.RoleManager, time.Now().Add(-ca.Lifetime-time.Hour))
	raw := func(send string) func() (net.Conn, error) {
		return func() (net.Conn, error) {
			conn, err := net.Dial("tcp", srv.addr.String())
			if err == nil {
				_, err = io.WriteString(conn, send)
			}
			return conn, err
		}
	}
	dialTLS := func(cfg *tls.Config) func() (net.Conn, error) {
		cfg.InsecureSkipVerify, cfg.VerifyConnection = true, nil
		return func() (net.Conn, error) { return tls.Dial("tcp", srv.addr.String(), cfg) }
	}
	cases := map[string]func() (net.Conn, error){
		"plain HTTP":      raw("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"garbage":         raw(strings.Repeat("\x00\xff weft ", 1000)),
		"HTTP/2 in clear": raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
		"no certificate":  dialTLS(&tls.Config{NextProtos: []string{"h2"}}),
		"no ALPN":         dialTLS(&tls.Config{}),
		"other cluster":   dialTLS(foreign.creds(weft.RoleManager).ClientConfig(ca.ProtoGRPC, ca.Peer{})),
		"expired":         dialTLS(expired.ClientConfig(ca.ProtoGRPC, ca.Peer{})),
		"worker on raft":  dialTLS(c.creds(weft.RoleWorker).ClientConfig(ca.ProtoRaft, ca.Peer{})),
		"raft not served": dialTLS(c.creds(weft.RoleManager).ClientConfig(ca.ProtoRaft, ca.Peer{})),
		"join not served": dialTLS(&tls.Config{NextProtos: []string{ca.ProtoJoin}}),
	}
	for name, dial := range cases {
		conn, err := dial()
		if err != nil {
			continue // refused within the handshake
		}
		t.Run(name, func(t *testing.T) { refusedAtOnce(t, conn) })
	}
	// All are counted, and a member is served.
	if err := c.client(c.creds(weft.RoleWorker), srv.addr).RemoveService(soon(t), "x"); err != nil {
		t.Fatal(err)
	}
	if st := waitStats(srv, func(s Stats) bool { return s.Refused == uint64(len(cases)) && s.Pending == 0 }); st.Refused != uint64(len(cases)) || st.Calls != 1 || st.Pending != 0 {
		t.Errorf("stats %+v after %d refusals and one call", st, len(cases))
	}
}

// waitStats polls until ok or 8 s have passed.
func waitStats(s *running, ok func(Stats) bool) Stats {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(8 * time.Second)
	for {
		select {
		case <-tick.C:
			if st := s.Stats(); ok(st) {
				return st
			}
		case <-end:
			return s.Stats()
		}
	}
}

// TestIdleFlood: sockets that say nothing, far more than the bound, neither
// pile up nor keep a member out.
func TestIdleFlood(t *testing.T) {
	const bound, flood = 16, 400
	c := newTestCluster(t)
	srv := c.serve(ServerConfig{Control: &recorder{}, MaxHandshakes: bound})
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range flood {
		conn, err := net.Dial("tcp", srv.addr.String())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		if p := srv.Stats().Pending; p > bound {
			t.Fatalf("%d connections are pending, the bound is %d", p, bound)
		}
	}
	if err := c.client(c.creds(weft.RoleWorker), srv.addr).RemoveService(soon(t), "x"); err != nil {
		t.Fatalf("a member during the flood: %v", err)
	}
	st := waitStats(srv, func(s Stats) bool { return s.Evicted >= flood-bound && s.Refused >= flood-bound })
	if st.Evicted < flood-bound || st.Refused < flood-bound {
		t.Errorf("stats %+v", st)
	}
}

// TestSilentClientTimesOut without any pressure of others.
func TestSilentClientTimesOut(t *testing.T) {
	c := newTestCluster(t)
	srv := c.serve(ServerConfig{Join: func(context.Context, AdmitRequest, netip.Addr) (AdmitResponse, error) {
		panic("nobody asked")
	}, HandshakeTimeout: 100 * time.Millisecond})
	conn, err := net.Dial("tcp", srv.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	refusedAtOnce(t, conn)
	// The same after a handshake, when a joiner sends no request.
	tc, err := tls.Dial("tcp", srv.addr.String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ca.ProtoJoin}})
	if err != nil {
		t.Fatal(err)
	}
	refusedAtOnce(t, tc)
}

func TestRaft(t *testing.T) {
	c := newTestCluster(t)
	a, b := c.creds(weft.RoleManager), c.creds(weft.RoleManager)
	adv := netip.MustParseAddrPort("10.99.0.1:2377")
	ra := NewRaft(a, adv)
	srv := c.serve(ServerConfig{Credentials: a, Raft: ra})
	if ra.Addr().String() != adv.String() {
		t.Errorf("address %s", ra.Addr())
	}
	rb := NewRaft(b, adv)
	out, err := rb.Dial(srv.addr.String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := ra.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var wg sync.WaitGroup
	wg.Go(func() { io.WriteString(out, "append entries") })
	buf := make([]byte, 14)
	if _, err := io.ReadFull(in, buf); err != nil || string(buf) != "append entries" {
		t.Errorf("read %q, %v", buf, err)
	}
	wg.Wait()
	if _, err := rb.Dial(deadAddr(t).String(), time.Second); !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("dial nobody: %v", err)
	}
	worker := c.serve(ServerConfig{Credentials: c.creds(weft.RoleWorker)})
	if _, err := rb.Dial(worker.addr.String(), time.Second); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("dial a worker: %v", err)
	}
	ra.Close()
	if _, err := ra.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
}

// TestAccess: every method, by role.
func TestAccess(t *testing.T) {
	managersOnly := map[string]bool{membership + "Admit": true, agent + "Logs": true}
	n := 0
	for _, d := range []*grpc.ServiceDesc{controlDesc(), dispatcherDesc(), membershipDesc(), agentDesc()} {
		var names []string
		for _, m := range d.Methods {
			names = append(names, m.MethodName)
		}
		for _, s := range d.Streams {
			names = append(names, s.StreamName)
		}
		for _, name := range names {
			n++
			method := "/" + d.ServiceName + "/" + name
			if err := mayCall(method, ca.Identity{Role: weft.RoleManager}); err != nil {
				t.Errorf("manager: %v", err)
			}
			if err := mayCall(method, ca.Identity{Role: weft.RoleWorker}); (err != nil) != managersOnly[method] || (err != nil && !errors.Is(err, weft.ErrForbidden)) {
				t.Errorf("worker calls %s: %v", method, err)
			}
		}
	}
	if n != 24 {
		t.Errorf("%d methods", n)
	}
	for _, m := range []string{"", "/", "x", "//", "/weft.Other/Services", "weft.Agent/Logs"} {
		if err := mayCall(m, ca.Identity{Role: weft.RoleManager}); !errors.Is(err, weft.ErrForbidden) {
			t.Errorf("%q: %v", m, err)
		}
	}
}

// TestNodeThatDoesNotKnowTheCall is told from one that cannot be reached.
func TestNodeThatDoesNotKnowTheCall(t *testing.T) {
	c := newTestCluster(t)
	srv := c.serve(ServerConfig{Membership: &recorder{}})
	creds := c.creds(weft.RoleWorker)
	p := NewPeers(creds)
	c.runUntilEnd(p.Run)
	err := p.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Arrive(soon(t), creds.Identity().Node, "t", nil)
	if !errors.Is(err, weft.ErrUnsupported) || errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("arrive: %v", err)
	}
}

// TestWorkerRefused where only managers may, over the wire.
func TestWorkerRefused(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{}
	srv := c.serve(ServerConfig{Agent: rec, Membership: rec})
	creds := c.creds(weft.RoleWorker)
	p := NewPeers(creds)
	c.runUntilEnd(p.Run)
	err := p.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Logs(soon(t), "t", weft.LogOptions{}, nil)
	if !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("logs: %v", err)
	}
	if err := p.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Drain(soon(t), weft.NewID(), "t"); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("drain of another node's task: %v", err)
	}
	if err := p.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Arrive(soon(t), weft.NewID(), "t", nil); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("arrival of another node's task: %v", err)
	}
	cl := c.client(creds, srv.addr)
	if _, err := cl.Admit(soon(t), AdmitRequest{}, netip.Addr{}); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("admit: %v", err)
	}
	if err := cl.Report(soon(t), weft.NewID(), Report{}); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("report for another node: %v", err)
	}
	if n := len(rec.seen()); n != 0 {
		t.Errorf("%d calls got through", n)
	}
}

// TestPeersProveTheirNode: the address of a node answers with another's
// certificate.
func TestPeersProveTheirNode(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{}
	srv := c.serve(ServerConfig{Agent: rec})
	p := NewPeers(c.creds(weft.RoleManager))
	c.runUntilEnd(p.Run)
	other := weft.NewID()
	err := p.Agent(other, srv.addr).Logs(soon(t), "t", weft.LogOptions{}, nil)
	if !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), string(other)) {
		t.Errorf("error %v", err)
	}
	if len(rec.seen()) != 0 {
		t.Error("the wrong node was asked")
	}
}

// TestCheckAndExpiry: a removed node's calls are refused although its
// certificate is good, and a certificate that expires while its connection
// stands is refused too.
func TestCheckAndExpiry(t *testing.T) {
	c := newTestCluster(t)
	var mu sync.Mutex
	now, gone := time.Now(), weft.ID("")
	srv := c
	srv.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	s := srv.serve(ServerConfig{Control: &recorder{}, Check: func(_ context.Context, id ca.Identity) error {
		mu.Lock()
		defer mu.Unlock()
		if id.Node == gone {
			return weft.ErrForbidden
		}
		return nil
	}})
	creds := c.creds(weft.RoleWorker)
	cl := c.client(creds, s.addr)
	if err := cl.RemoveService(soon(t), "x"); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	gone = creds.Identity().Node
	mu.Unlock()
	if err := cl.RemoveService(soon(t), "x"); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("a removed node: %v", err)
	}
	mu.Lock()
	gone, now = "", now.Add(ca.Lifetime+time.Hour)
	mu.Unlock()
	if err := cl.RemoveService(soon(t), "x"); !errors.Is(err, weft.ErrForbidden) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired node on a standing connection: %v", err)
	}
}
