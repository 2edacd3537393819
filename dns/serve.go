package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// Serve answers one task's questions on pc (UDP) and ln (TCP), opened by the
// caller inside the task's network namespace, until ctx ends; then it returns
// nil. It owns both from the call on and has closed them when it returns, as
// it has ended every goroutine it started. An error means that a socket
// failed; the caller opens new ones and calls again.
//
// At rest it costs two goroutines (the caller's included) and their sockets.
func (s *Server) Serve(ctx context.Context, view View, pc net.PacketConn, ln net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	t := &session{s: s, view: view, slots: make(chan struct{}, maxTaskForwards), conns: make(chan struct{}, maxTCPConns)}
	unhook := context.AfterFunc(ctx, func() {
		pc.Close()
		ln.Close()
	})
	defer unhook()
	t.wg.Go(func() { cancel(t.serveTCP(ctx, ln)) })
	err := t.serveUDP(ctx, pc)
	cancel(err)
	pc.Close()
	ln.Close()
	t.wg.Wait()
	if cause := context.Cause(ctx); cause != nil && cause != context.Canceled && cause != context.DeadlineExceeded {
		return cause
	}
	return nil
}

// session is the service of one task.
type session struct {
	s     *Server
	view  View
	wg    sync.WaitGroup
	slots chan struct{} // forwards under way
	conns chan struct{} // TCP connections
}

// answer handles one packet; ok is false if there is nothing to send. An
// external question has no answer yet: getting it blocks.
func (t *session) answer(packet []byte) (req, resp *miekg.Msg, external, ok bool) {
	req, ok = parse(packet)
	if !ok {
		t.s.stats.malformed.Add(1)
		return nil, nil, false, false
	}
	t.s.stats.queries.Add(1)
	resp, external = respond(t.s.snap.Load(), &t.view, req, t.s.turn.Add(1))
	if !external {
		t.s.stats.local.Add(1)
	}
	return req, resp, external, true
}

// busy is the answer to an external question over the task's limit.
func (t *session) busy(req *miekg.Msg) *miekg.Msg {
	t.s.stats.refused.Add(1)
	resp := reply(req)
	resp.Rcode = miekg.RcodeServerFailure
	return resp
}

// packets is the part of *net.UDPConn that spares an allocation per packet.
type packets interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error)
}

// serveUDP reads until the socket is closed. Cluster names are answered in the
// loop, external ones in a goroutine each.
func (t *session) serveUDP(ctx context.Context, pc net.PacketConn) error {
	fast, _ := pc.(packets)
	in, out := make([]byte, maxUDPQuery), make([]byte, ednsSize) // bigger answers get their own
	for {
		var n int
		var from netip.AddrPort
		var addr net.Addr
		var err error
		if fast != nil {
			n, from, err = fast.ReadFromUDPAddrPort(in)
		} else {
			n, addr, err = pc.ReadFrom(in)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("read dns question on %v: %w", pc.LocalAddr(), err)
		}
		// A failed write is the asker's loss, as a lost packet is: it asks again.
		send := func(req, resp *miekg.Msg, buf []byte) {
			b := t.pack(req, resp, udpLimit(req), buf)
			if b == nil {
				return
			}
			if fast != nil {
				fast.WriteToUDPAddrPort(b, from)
			} else {
				pc.WriteTo(b, addr)
			}
		}
		req, resp, external, ok := t.answer(in[:n])
		switch {
		case !ok:
		case !external:
			send(req, resp, out)
		default:
			select {
			case t.slots <- struct{}{}:
				t.wg.Go(func() {
					defer func() { <-t.slots }()
					resp := t.s.fwd.forward(ctx, req)
					send(req, resp, nil)
				})
			default:
				send(req, t.busy(req), out)
			}
		}
	}
}

// pack cuts resp to limit and encodes it, in buf if it fits.
func (t *session) pack(req, resp *miekg.Msg, limit int, buf []byte) []byte {
	resp.Truncate(limit)
	b, err := resp.PackBuffer(buf)
	if err == nil {
		return b
	}
	// An upstream's record that cannot be written again. The client must
	// hear something, else it waits.
	fail := reply(req)
	fail.Rcode = miekg.RcodeServerFailure
	b, err = fail.PackBuffer(buf)
	if err != nil {
		t.s.cfg.Log.Warn("cannot encode a dns answer", weft.KeyErr, err)
		return nil
	}
	return b
}

func (t *session) serveTCP(ctx context.Context, ln net.Listener) error {
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept dns connection on %v: %w", ln.Addr(), err)
		}
		select {
		case t.conns <- struct{}{}:
			t.wg.Go(func() {
				defer func() { <-t.conns }()
				t.serveConn(ctx, conn)
			})
		default:
			t.s.stats.refused.Add(1)
			conn.Close()
		}
	}
}

// serveConn serves pipelined questions on one connection; answers to external
// ones may overtake each other (RFC 7766 section 6.2.1.1).
func (t *session) serveConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	unhook := context.AfterFunc(ctx, func() { conn.Close() })
	defer unhook()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxPipelined)
	var mu sync.Mutex // guards: writes to conn, so that answers do not mix
	send := func(req, resp *miekg.Msg) {
		b := t.pack(req, resp, miekg.MaxMsgSize, nil)
		if b == nil {
			return
		}
		framed := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...)
		mu.Lock()
		defer mu.Unlock()
		conn.SetWriteDeadline(time.Now().Add(t.s.cfg.TCPIdle))
		if _, err := conn.Write(framed); err != nil {
			conn.Close() // the reader ends by it
		}
	}
	r := bufio.NewReaderSize(conn, 512)
	for {
		conn.SetReadDeadline(time.Now().Add(t.s.cfg.TCPIdle))
		packet, err := readFrame(r)
		if err != nil {
			return
		}
		req, resp, external, ok := t.answer(packet)
		if !ok {
			return // out of step or hostile: nothing that follows can be trusted
		}
		if !external {
			send(req, resp)
			continue
		}
		select {
		case slots <- struct{}{}: // a full pipeline stops reading
		case <-ctx.Done():
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			send(req, t.s.fwd.forward(ctx, req))
		})
	}
}

// readFrame reads a message with its length before it (RFC 1035 section
// 4.2.2).
func readFrame(r io.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(head[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}
