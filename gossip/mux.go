package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// mux is a Transport for memberlist on top of another one, which it shares with
// the endpoint table: packets and streams that begin with frameMagic are
// frames and go to frames, the guest's packets go to it, all others to
// memberlist.
//
// On a stream every frame has frameMagic (again) and its length in 4 bytes, big
// endian, before it; the sender closes after the last.
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
}

// inFrame is a received frame; from is empty on streams, whose source port
// means nothing.
type inFrame struct {
	from string
	b    []byte
}

var _ Transport = (*mux)(nil)

// newMux starts two goroutines, which Shutdown waits for. ctx is the life of
// the node; its end does not stop the mux, as leaving needs it.
func newMux(ctx context.Context, inner Transport, guest Guest) *mux {
	x := &mux{
		Transport: inner,
		guest:     guest,
		packets:   make(chan *memberlist.Packet),
		streams:   make(chan net.Conn),
		frames:    make(chan inFrame, 1024),
		slots:     make(chan struct{}, maxStreams),
		done:      make(chan struct{}),
	}
	x.ctx, x.closing = context.WithCancel(context.WithoutCancel(ctx))
	x.wg.Go(x.splitPackets)
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
	})
	return x.err
}

func (x *mux) splitPackets() {
	for {
		select {
		case p := <-x.Transport.PacketCh():
			if len(p.Buf) > 0 && x.guest.Receive != nil && p.Buf[0] == x.guest.Magic {
				x.receiveGuest(p)
				continue
			}
			if len(p.Buf) > 0 && p.Buf[0] == frameMagic {
				select {
				case x.frames <- inFrame{p.From.String(), p.Buf}:
				default:
					x.dropped.Add(1)
				}
				continue
			}
			select {
			case x.packets <- p:
			case <-x.ctx.Done():
			}
		case <-x.done:
			return
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
					defer func() { <-x.slots }()
					x.classify(conn)
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

// classify reads the first byte of a stream and hands it over, or reads its
// frames.
func (x *mux) classify(conn net.Conn) {
	unhook := context.AfterFunc(x.ctx, func() { conn.Close() })
	defer unhook()
	var first [1]byte
	conn.SetReadDeadline(time.Now().Add(streamTimeout))
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		conn.Close()
		return
	}
	if first[0] != frameMagic {
		conn.SetReadDeadline(time.Time{})
		select {
		case x.streams <- &begunConn{Conn: conn, first: first[:]}:
		case <-x.ctx.Done():
			conn.Close()
		}
		return
	}
	defer conn.Close()
	for first[0] == frameMagic {
		b, err := readStreamFrame(conn)
		if err != nil {
			return
		}
		select {
		case x.frames <- inFrame{"", b}:
		case <-x.ctx.Done():
			return
		}
		conn.SetReadDeadline(time.Now().Add(streamTimeout))
		if _, err := io.ReadFull(conn, first[:]); err != nil {
			return
		}
	}
}

// readStreamFrame reads length and frame. Memory grows with what was really
// sent, as the length is not authenticated.
func readStreamFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxStreamFrame {
		return nil, fmt.Errorf("frame of %d bytes, limit %d", n, maxStreamFrame)
	}
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return nil, err
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

// maxQueued frames wait for a stream to one member; more push out the oldest,
// which a digest makes good.
const maxQueued = 8

// streamer sends frames by stream: one at a time to a member, in order.
type streamer struct {
	transport Transport
	slots     chan struct{}
	wg        sync.WaitGroup
	failed    atomic.Uint64

	// mu guards queues. A goroutine serves each address in it.
	mu     sync.Mutex
	queues map[string][][]byte
}

func newStreamer(t Transport) *streamer {
	return &streamer{transport: t, slots: make(chan struct{}, maxStreams), queues: map[string][][]byte{}}
}

// send queues frame and returns at once. Not to be called after wait.
func (s *streamer) send(to memberlist.Address, frame []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q, running := s.queues[to.Addr]
	if len(q) >= maxQueued {
		q = q[1:]
		s.failed.Add(1)
	}
	s.queues[to.Addr] = append(q, frame)
	if !running {
		s.wg.Go(func() { s.serve(to) })
	}
}

// wait returns when all that was queued was sent or has failed.
func (s *streamer) wait() { s.wg.Wait() }

func (s *streamer) serve(to memberlist.Address) {
	for {
		s.mu.Lock()
		q := s.queues[to.Addr]
		if len(q) == 0 {
			delete(s.queues, to.Addr)
			s.mu.Unlock()
			return
		}
		s.queues[to.Addr] = nil
		s.mu.Unlock()
		s.slots <- struct{}{}
		if err := s.deliver(to, q); err != nil {
			s.failed.Add(uint64(len(q)))
		}
		<-s.slots
	}
}

func (s *streamer) deliver(to memberlist.Address, frames [][]byte) (err error) {
	conn, err := s.transport.DialAddressTimeout(to, streamTimeout)
	if err != nil {
		return fmt.Errorf("dial %s: %w", to.Addr, err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	for _, f := range frames {
		head := binary.BigEndian.AppendUint32([]byte{frameMagic}, uint32(len(f)))
		conn.SetWriteDeadline(time.Now().Add(streamTimeout))
		if _, err := conn.Write(append(head, f...)); err != nil {
			return fmt.Errorf("write to %s: %w", to.Addr, err)
		}
	}
	return nil
}
