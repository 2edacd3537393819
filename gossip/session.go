package gossip

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// sessions carry messages by mutual TLS: one to each member that has something
// to be told, kept until nothing was said for sessionIdle. Each message has its
// length in 4 bytes, big endian, before it. When two members dial each other at
// once, each speaks on its own and hears on both.
type sessions struct {
	transport Transport
	id        Identity
	log       *slog.Logger
	frames    chan<- inFrame
	// ctx ends all of them.
	ctx context.Context
	wg  sync.WaitGroup

	dialled, failed, refused atomic.Uint64
	accepted                 atomic.Int64 // that are open

	// mu guards: open, and all sessions' queues.
	mu   sync.Mutex
	open map[weft.ID]*session // to speak on
}

// session is with one member.
type session struct {
	peer  weft.ID
	queue [][]byte
	bytes int
	wake  chan struct{} // has room for one
}

const (
	// sessionIdle is how long a session is kept that nobody uses.
	sessionIdle = time.Minute
	// maxAccepted sessions are open that others have dialled.
	maxAccepted = 1024
	// maxQueued bytes wait for a session; what is more is dropped, and a
	// digest makes it good.
	maxQueued = 16 << 20
)

func newSessions(ctx context.Context, t Transport, id Identity, frames chan<- inFrame, log *slog.Logger) *sessions {
	return &sessions{ctx: ctx, transport: t, id: id, frames: frames, log: log, open: map[weft.ID]*session{}}
}

// send queues a message and returns at once. Not to be called after wait.
func (ss *sessions) send(to memberlist.Address, peer weft.ID, m []byte) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	s := ss.open[peer]
	if s == nil {
		s = newSession(peer)
		ss.open[peer] = s
		ss.wg.Go(func() { ss.dial(s, to) })
	}
	if s.bytes+len(m) > maxQueued {
		ss.failed.Add(1)
		return
	}
	s.queue = append(s.queue, m)
	s.bytes += len(m)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func newSession(peer weft.ID) *session { return &session{peer: peer, wake: make(chan struct{}, 1)} }

// wait returns when all sessions have ended, after ctx.
func (ss *sessions) wait() { ss.wg.Wait() }

func (ss *sessions) dial(s *session, to memberlist.Address) {
	ss.dialled.Add(1)
	raw, err := ss.transport.DialAddressTimeout(to, streamTimeout)
	if err == nil {
		err = ss.serve(s, tls.Client(raw, ss.id.ClientTLS(s.peer)))
	}
	if err != nil && ss.ctx.Err() == nil {
		ss.log.Debug("session has ended", weft.KeyPeer, s.peer, weft.KeyErr, fmt.Errorf("session with %s: %w", to.Addr, err))
	}
	ss.forget(s)
}

// accept serves a stream that begins with a TLS handshake, until it ends;
// handshaken is called when it needs no patience any more.
func (ss *sessions) accept(raw net.Conn, handshaken func()) {
	defer raw.Close()
	if ss.accepted.Add(1) > maxAccepted {
		ss.accepted.Add(-1)
		ss.refused.Add(1)
		return
	}
	defer ss.accepted.Add(-1)
	conn := tls.Server(raw, ss.id.ServerTLS())
	peer, err := ss.greet(conn)
	handshaken()
	if err != nil {
		ss.refused.Add(1)
		ss.log.Debug("session is refused", "addr", raw.RemoteAddr(), weft.KeyErr, err)
		return
	}
	s := newSession(peer)
	ss.mu.Lock()
	if ss.open[peer] == nil {
		ss.open[peer] = s
	}
	ss.mu.Unlock()
	if err := ss.serve(s, conn); err != nil && ss.ctx.Err() == nil {
		ss.log.Debug("session has ended", weft.KeyPeer, peer, weft.KeyErr, err)
	}
	ss.forget(s)
}

// greet shakes hands and returns who the other is.
func (ss *sessions) greet(conn *tls.Conn) (weft.ID, error) {
	ctx, cancel := context.WithTimeout(ss.ctx, streamTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", fmt.Errorf("shake hands: %w", err)
	}
	id, _, err := ss.id.Trust(conn.ConnectionState().PeerCertificates[0].Raw)
	return id, err
}

func (ss *sessions) forget(s *session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.open[s.peer] == s {
		delete(ss.open, s.peer)
	}
	ss.failed.Add(uint64(len(s.queue)))
	s.queue = nil
}

// serve speaks and hears until the session ends.
func (ss *sessions) serve(s *session, conn *tls.Conn) error {
	unhook := context.AfterFunc(ss.ctx, func() { conn.NetConn().Close() })
	defer unhook()
	defer conn.Close()
	if _, err := ss.greet(conn); err != nil {
		return err
	}
	ended := make(chan error, 1)
	var hearing sync.WaitGroup
	defer hearing.Wait()
	defer conn.NetConn().Close() // before the wait
	hearing.Go(func() { ended <- ss.hear(s, conn) })
	idle := time.NewTimer(sessionIdle)
	defer idle.Stop()
	for {
		ss.mu.Lock()
		queue := s.queue
		s.queue, s.bytes = nil, 0
		ss.mu.Unlock()
		for _, m := range queue {
			conn.SetWriteDeadline(time.Now().Add(streamTimeout))
			if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(m))), m...)); err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		if len(queue) > 0 {
			continue
		}
		select {
		case <-s.wake:
			idle.Reset(sessionIdle)
		case err := <-ended:
			return err
		case <-idle.C:
			return nil
		case <-ss.ctx.Done():
			return nil
		}
	}
}

// hear reads messages until the session ends. Who dialled ends it when idle; who
// accepted waits a little longer.
func (ss *sessions) hear(s *session, conn *tls.Conn) error {
	for {
		conn.SetReadDeadline(time.Now().Add(2 * sessionIdle))
		m, err := readStreamMessage(conn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		select {
		case ss.frames <- inFrame{peer: s.peer, b: m}:
		case <-ss.ctx.Done():
			return nil
		}
	}
}
