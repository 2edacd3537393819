package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// mux is a Transport for memberlist on top of another one, which it shares with
// the endpoint table: packets that begin with frameMagic are frames and go to
// frames, the guest's packets go to it, streams that begin as TLS does are
// sessions, all others are memberlist's.
type mux struct {
	Transport // the inner one: all that sends is its own
	guest     Guest
	ctx       context.Context
	closing   context.CancelFunc
	packets   chan *memberlist.Packet
	streams   chan net.Conn
	frames    chan inFrame
	slots     chan struct{} // inbound streams not yet handed over
	done      chan struct{} // closed by shutdown, after the inner transport's end
	once      sync.Once
	err       error // of the shutdown
	wg        sync.WaitGroup
	dropped   atomic.Uint64 // frames and streams for lack of room
	foreign   atomic.Uint64 // streams that are none of ours
	sessions  *sessions
}

// inFrame is a received frame, or a message of a session, whose peer is known by
// its certificate and whose source port means nothing.
type inFrame struct {
	from string
	peer weft.ID // of a session
	b    []byte
}

// handshakeByte begins a TLS handshake (RFC 8446 section 5.1).
const handshakeByte = 0x16

var _ Transport = (*mux)(nil)

// newMux starts goroutines, which Shutdown waits for. ctx is the life of
// the node; its end does not stop the mux, as leaving needs it.
func newMux(ctx context.Context, inner Transport, cfg Config) *mux {
	x := &mux{
		Transport: inner,
		guest:     cfg.Guest,
		packets:   make(chan *memberlist.Packet),
		streams:   make(chan net.Conn),
		frames:    make(chan inFrame, 1024),
		slots:     make(chan struct{}, maxStreams),
		done:      make(chan struct{}),
	}
	x.ctx, x.closing = context.WithCancel(context.WithoutCancel(ctx))
	x.sessions = newSessions(x.ctx, inner, cfg.Identity, x.frames, cfg.Log)
	if d, ok := inner.(direct); ok {
		d.receive(x.split)
	} else {
		x.wg.Go(x.splitPackets)
	}
	x.wg.Go(x.splitStreams)
	return x
}

// PacketCh implements Transport.
func (x *mux) PacketCh() <-chan *memberlist.Packet { return x.packets }

// StreamCh implements Transport.
func (x *mux) StreamCh() <-chan net.Conn { return x.streams }

// Shutdown implements Transport. The inner transport may block on its channels
// until they are read, so the splitters end after it.
func (x *mux) Shutdown() error {
	x.once.Do(func() {
		x.closing()
		x.err = x.Transport.Shutdown()
		close(x.done)
		x.wg.Wait()
		x.sessions.wait()
	})
	return x.err
}

func (x *mux) splitPackets() {
	for {
		select {
		case p := <-x.Transport.PacketCh():
			x.split(p)
		case <-x.done:
			return
		}
	}
}

// split gives a packet to whom it is for. Only memberlist can let it wait.
func (x *mux) split(p *memberlist.Packet) {
	switch {
	case len(p.Buf) > 0 && x.guest.Receive != nil && p.Buf[0] == x.guest.Magic:
		x.receiveGuest(p)
	case len(p.Buf) > 0 && p.Buf[0] == frameMagic:
		select {
		case x.frames <- inFrame{from: p.From.String(), b: p.Buf}:
		default:
			x.dropped.Add(1)
		}
	default:
		select {
		case x.packets <- p:
		case <-x.ctx.Done():
		}
	}
}

// receiveGuest gives a datagram to whom it is for and sends the answer; one that
// is lost is the guest's to miss.
func (x *mux) receiveGuest(p *memberlist.Packet) {
	from, err := netip.ParseAddrPort(p.From.String())
	if err != nil {
		return
	}
	answer := x.guest.Receive(netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), p.Buf)
	if answer == nil {
		return
	}
	if _, err := x.Transport.WriteToAddress(answer, memberlist.Address{Addr: p.From.String()}); err != nil {
		x.dropped.Add(1)
	}
}

func (x *mux) splitStreams() {
	for {
		select {
		case conn := <-x.Transport.StreamCh():
			select {
			case x.slots <- struct{}{}:
				x.wg.Go(func() {
					release := sync.OnceFunc(func() { <-x.slots })
					defer release()
					x.classify(conn, release)
				})
			default:
				x.dropped.Add(1)
				conn.Close()
			}
		case <-x.done:
			return
		}
	}
}

// classify reads the first byte of a stream and hands it over, or serves it as a
// session; release is called when others may be classified in its place.
func (x *mux) classify(conn net.Conn, release func()) {
	unhook := context.AfterFunc(x.ctx, func() { conn.Close() })
	defer unhook()
	var first [1]byte
	conn.SetReadDeadline(time.Now().Add(streamTimeout))
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		conn.Close()
		return
	}
	conn.SetReadDeadline(time.Time{})
	begun := &begunConn{Conn: conn, first: first[:]}
	switch first[0] {
	case handshakeByte:
		x.sessions.accept(begun, release)
	case frameMagic: // a build that sent frames on streams
		x.foreign.Add(1)
		conn.Close()
	default:
		select {
		case x.streams <- begun:
		case <-x.ctx.Done():
			conn.Close()
		}
	}
}

// readStreamMessage reads length and message. Memory grows with what was really
// sent.
func readStreamMessage(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxStreamFrame {
		return nil, fmt.Errorf("message of %d bytes, limit %d", n, maxStreamFrame)
	}
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // there was a beginning: no good end
		}
		return nil, fmt.Errorf("read message of %d bytes: %w", n, err)
	}
	return b.Bytes(), nil
}

// begunConn is a connection of which the first byte was read already.
type begunConn struct {
	net.Conn
	first []byte
}

// Read implements net.Conn.
func (c *begunConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 && len(b) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}
