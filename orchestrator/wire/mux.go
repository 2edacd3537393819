package wire

import (
	"container/list"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Stats counts connections to the cluster port by what became of them.
type Stats struct {
	Calls   uint64 // handed to gRPC
	Raft    uint64 // handed to Raft
	Joins   uint64 // answered on weft-join, by yes or no
	Refused uint64 // no TLS, no known protocol, no or a wrong certificate, nothing served there
	Evicted uint64 // made room for newer ones while they had proven nothing
	Pending int    // in handshake now
}

// mux knows the connections that have proven nothing yet.
//
// An attacker can open sockets faster than they time out. Refusing new ones
// when the bound is reached would lock members out; instead the oldest goes: a
// member's handshake takes milliseconds, an idle socket waits for ever.
type mux struct {
	max int

	calls, raft, joins, refused, evicted atomic.Uint64

	// mu guards: pending.
	mu      sync.Mutex
	pending list.List // of net.Conn, oldest first
}

func newMux(max int) *mux { return &mux{max: max} }

func (m *mux) stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Stats{m.calls.Load(), m.raft.Load(), m.joins.Load(), m.refused.Load(), m.evicted.Load(), m.pending.Len()}
}

// begin counts c as pending until the returned function is called; that
// reports whether c was not evicted meanwhile.
func (m *mux) begin(c net.Conn) (end func() bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending.Len() >= m.max {
		oldest := m.pending.Remove(m.pending.Front()).(net.Conn)
		oldest.Close()
		m.evicted.Add(1)
	}
	e := m.pending.PushBack(c)
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		for x := m.pending.Front(); x != nil; x = x.Next() {
			if x == e {
				m.pending.Remove(e)
				return true
			}
		}
		return false
	}
}

// accept hands connections on until ctx ends or ln fails. It returns when
// every connection it began was handed on or closed.
func (s *Server) accept(ctx context.Context, ln net.Listener, calls *queue) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for wait := time.Duration(0); ; {
		c, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept on cluster port %s: %w", ln.Addr(), err)
		case err != nil:
			// Out of descriptors, or the client was gone: both pass.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			s.cfg.Log.Warn("accept on the cluster port failed", weft.KeyErr, err)
			if !pause(ctx, wait) {
				return nil
			}
			continue
		}
		wait = 0
		end := s.mux.begin(c)
		wg.Go(func() {
			if err := s.serveConn(ctx, c, end, calls); err != nil {
				c.Close()
				s.mux.refused.Add(1)
				s.cfg.Log.LogAttrs(ctx, slog.LevelDebug, "connection to the cluster port refused",
					slog.String(weft.KeyPeer, c.RemoteAddr().String()), slog.Any(weft.KeyErr, err))
			}
		})
	}
}

var errEvicted = errors.New("made room for newer connections")

// serveConn shakes hands and hands c to what was asked for. An error means
// that c was refused and is to be closed.
func (s *Server) serveConn(ctx context.Context, c net.Conn, end func() bool, calls *queue) error {
	hctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	tc := tls.Server(c, s.tls)
	if err := tc.HandshakeContext(hctx); err != nil {
		end()
		return err
	}
	switch p := tc.ConnectionState().NegotiatedProtocol; p {
	case ca.ProtoGRPC:
		if !end() {
			return errEvicted
		}
		s.mux.calls.Add(1)
		return calls.put(hctx, tc)
	case ca.ProtoRaft:
		if !end() {
			return errEvicted
		}
		if s.cfg.Raft == nil {
			return fmt.Errorf("raft is not served here: %w", weft.ErrUnavailable)
		}
		s.mux.raft.Add(1)
		return s.cfg.Raft.queue.put(hctx, tc)
	case ca.ProtoJoin:
		return s.serveJoin(ctx, tc, end)
	default:
		end()
		return fmt.Errorf("protocol %q is not served here: %w", p, weft.ErrForbidden)
	}
}

// queue is a net.Listener whose connections are put by others.
type queue struct {
	addr  net.Addr
	conns chan net.Conn // never closed
	once  sync.Once
	done  chan struct{} // closed by Close
}

func newQueue(addr net.Addr) *queue {
	return &queue{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (q *queue) put(ctx context.Context, c net.Conn) error {
	select {
	case q.conns <- c:
		return nil
	case <-q.done:
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("hand connection on: nobody accepts it: %w", ctx.Err())
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return q.addr }

// authInfo is what gRPC calls know of their peer.
type authInfo struct {
	credentials.CommonAuthInfo
	id       ca.Identity
	notAfter time.Time
}

func (authInfo) AuthType() string { return "weft" }

func infoOf(cert *x509.Certificate) (authInfo, error) {
	id, err := ca.IdentityOf(cert)
	if err != nil {
		return authInfo{}, err
	}
	return authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, id, cert.NotAfter}, nil
}

// handshaken are the server's gRPC credentials: the mux has verified the
// connection already.
type handshaken struct{}

func (handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tc, ok := c.(*tls.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection from %s did not pass the mux: %w", c.RemoteAddr(), weft.ErrForbidden)
	}
	st := tc.ConnectionState()
	if !st.HandshakeComplete || len(st.PeerCertificates) == 0 {
		return nil, nil, fmt.Errorf("connection from %s has no certificate: %w", c.RemoteAddr(), weft.ErrForbidden)
	}
	info, err := infoOf(st.PeerCertificates[0])
	return tc, info, err
}

func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials only serve")
}

func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (h handshaken) Clone() credentials.TransportCredentials { return h }
func (handshaken) OverrideServerName(string) error           { return nil }

// pause waits for d or ctx; it reports whether ctx still lives.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
