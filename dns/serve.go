package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// Serve answers one task's questions on pc (UDP) and ln (TCP), opened by the
// caller inside the task's network namespace, until ctx ends; then it returns
// nil. It owns both from the call on and has closed them when it returns, as it
// has ended every goroutine it started. An error means that a socket failed; the
// caller opens new ones and calls again.
//
// At rest it costs two goroutines (the caller's included) and their sockets.
func (s *Server) Serve(ctx context.Context, v View, pc net.PacketConn, ln net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	t := &session{s: s, view: compile(&v), slots: make(chan struct{}, maxTaskForwards), conns: make(chan struct{}, maxTCPConns)}
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
	view  *view
	wg    sync.WaitGroup
	slots chan struct{} // forwards under way
	conns chan struct{} // TCP connections
	turn  atomic.Uint64 // rotates answers of several addresses
	noted quiet         // that the task is over a limit
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
	snap := t.s.snap.Load()
	resp, external = respond(snap, t.view, req, t.turn.Add(1))
	if external && t.s.past.has(t.view, string(withoutSRV([]byte(fold(req.Question[0].Name)))), snap.domains(t.view), time.Now()) {
		resp, external = reply(req), false
		resp.Authoritative, resp.Rcode = true, miekg.RcodeNameError
	}
	if !external {
		t.s.stats.local.Add(1)
	}
	return req, resp, external, true
}

// busy is the answer to an external question over the task's limit.
func (t *session) busy(req *miekg.Msg) *miekg.Msg {
	t.refuse("external questions under way", maxTaskForwards)
	resp := reply(req)
	resp.Rcode = miekg.RcodeServerFailure
	return resp
}

// serveUDP reads until the socket is closed. Cluster names are answered in the
// loop, external ones in a goroutine each.
func (t *session) serveUDP(ctx context.Context, pc net.PacketConn) error {
	var err error
	if u, ok := pc.(*net.UDPConn); ok {
		err = t.serveBursts(ctx, u)
	} else {
		err = t.servePackets(ctx, pc)
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("read dns questions on %v: %w", pc.LocalAddr(), err)
}

// serveBursts answers what arrives together with two calls of the kernel. All of it
// happens in one Read, that of the first to the last burst: a third call, which would
// say that there is nothing more, is left out where a burst was not full. What comes
// after it wakes the Read, also if it has not begun to wait.
func (t *session) serveBursts(ctx context.Context, pc *net.UDPConn) error {
	raw, err := pc.SyscallConn()
	if err != nil {
		return err
	}
	var sc scope
	var errno syscall.Errno
	serve := func(fd uintptr) (failed bool) {
		b := t.s.bursts.Get().(*burst)
		defer t.s.bursts.Put(b)
		for n := burstSize; n == burstSize; {
			if n, errno = b.recv(fd); errno != 0 {
				return errno != syscall.EAGAIN
			}
			t.answerBurst(ctx, pc, b, n, &sc)
			b.send(fd)
		}
		return false // until there is something to read
	}
	if err := raw.Read(serve); err != nil {
		return err
	}
	return errno
}

// answerBurst answers the first n packets of b.
func (t *session) answerBurst(ctx context.Context, pc *net.UDPConn, b *burst, n int, sc *scope) {
	sc.look(t.s.snap.Load(), t.view)
	for i := range n {
		q := &b.questions[i]
		q.isPlain = q.read(b.packet(i), sc.snap.seed)
	}
	sc.touch(b.questions[:n])
	turn, quick := t.turn.Load(), uint64(0)
	for i := range n {
		packet := b.packet(i)
		if q := &b.questions[i]; q.isPlain {
			if size, ok := q.answer(sc, packet, b.in[i][:], turn+quick+1); ok {
				quick++
				b.reply(i, b.in[i][:size])
				continue
			}
		}
		from := b.sender(i)
		// A failed write is the asker's loss, as a lost packet is: it asks again.
		if out := t.answerPacket(ctx, packet, b.out[i][:], func(late []byte) { pc.WriteToUDPAddrPort(late, from) }); out != nil {
			b.reply(i, out)
		}
	}
	t.turn.Add(quick)
	t.s.stats.queries.Add(quick)
	t.s.stats.local.Add(quick)
}

// servePackets is serveBursts for what is no socket of the kernel's.
func (t *session) servePackets(ctx context.Context, pc net.PacketConn) error {
	in, buf := make([]byte, maxUDPQuery), make([]byte, ednsSize)
	for {
		n, from, err := pc.ReadFrom(in)
		if err != nil {
			return err
		}
		if out := t.answerPacket(ctx, in[:n], buf, func(late []byte) { pc.WriteTo(late, from) }); out != nil {
			pc.WriteTo(out, from)
		}
	}
}

// answerPacket returns the answer to any packet, in buf if it fits. If it must
// be got from outside it is given to late by a goroutine; then, and if there is
// none, nil is returned.
func (t *session) answerPacket(ctx context.Context, packet, buf []byte, late func([]byte)) []byte {
	req, resp, external, ok := t.answer(packet)
	if !ok {
		return nil
	}
	if external {
		select {
		case t.slots <- struct{}{}:
			t.wg.Go(func() {
				defer func() { <-t.slots }()
				resp := t.s.fwd.forward(ctx, t.view.servers, req)
				if out := t.pack(req, resp, udpLimit(req), nil); out != nil {
					late(out)
				}
			})
			return nil
		default:
			resp = t.busy(req)
		}
	}
	return t.pack(req, resp, udpLimit(req), buf)
}

// pack cuts resp to limit and encodes it, in buf if it fits.
func (t *session) pack(req, resp *miekg.Msg, limit int, buf []byte) []byte {
	resp.Truncate(limit)
	resp.Compress = true // Truncate leaves it out where there is room
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

// serveTCP accepts connections. When it cannot for a while, for lack of descriptors or
// of memory, those wait in the kernel; UDP goes on.
func (t *session) serveTCP(ctx context.Context, ln net.Listener) error {
	var noted quiet
	for {
		conn, err := ln.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case isBroken(err):
			return fmt.Errorf("accept dns connection on %v: %w", ln.Addr(), err)
		default:
			if noted.due(time.Now()) {
				t.s.cfg.Log.Warn("cannot accept a task's connection to its resolver", "container", t.container(), weft.KeyErr, err)
			}
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case t.conns <- struct{}{}:
			t.wg.Go(func() {
				defer func() { <-t.conns }()
				t.serveConn(ctx, conn)
			})
		default:
			t.refuse("TCP connections", maxTCPConns)
			conn.Close()
		}
	}
}

// isBroken reports whether an error of accept(2) is the listener's own: no later call
// will do better.
func isBroken(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EBADF) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSOCK)
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
		if err == errLongFrame {
			t.s.stats.malformed.Add(1)
		}
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
		select {
		case t.slots <- struct{}{}:
		default:
			<-slots
			send(req, t.busy(req))
			continue
		}
		wg.Go(func() {
			defer func() { <-t.slots; <-slots }()
			send(req, t.s.fwd.forward(ctx, t.view.servers, req))
		})
	}
}

var errLongFrame = errors.New("a question of that length is none")

// readFrame reads a message with its length before it (RFC 1035 section
// 4.2.2).
func readFrame(r io.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint16(head[:])
	if n > maxTCPQuery {
		return nil, errLongFrame
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}
