package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/iotest"
	"time"
)

// FuzzStreamMessage: of any stream come the messages that are in it, whole, however it is
// cut, and no more memory is taken than bytes came.
func FuzzStreamMessage(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02ab\x00\x00\x00\x00\x00\x00\x00\x01c"))
	f.Add([]byte{0, 0, 0, 5, 'h', 'e', 'l'})
	f.Add([]byte{0, 0, 0})
	f.Add(binary.BigEndian.AppendUint32(nil, maxStreamFrame+1))
	f.Add(append(binary.BigEndian.AppendUint32(nil, maxStreamFrame), 1, 2, 3))
	f.Fuzz(func(t *testing.T, in []byte) {
		whole, cut := bytes.NewReader(in), iotest.OneByteReader(bytes.NewReader(in))
		for rest := in; ; {
			got, err := readStreamMessage(whole)
			again, errAgain := readStreamMessage(cut)
			if (err == nil) != (errAgain == nil) || !bytes.Equal(got, again) {
				t.Fatalf("%x, %v, byte by byte %x, %v", got, err, again, errAgain)
			}
			n := uint64(0)
			if len(rest) >= 4 {
				n = uint64(binary.BigEndian.Uint32(rest))
			}
			if isWhole := len(rest) >= 4 && n <= maxStreamFrame && n <= uint64(len(rest)-4); isWhole != (err == nil) {
				t.Fatalf("%x: %v", rest, err)
			}
			if err != nil {
				if isEnd := errors.Is(err, io.EOF); isEnd != (len(rest) == 0) { // hear takes it for a good end
					t.Fatalf("%x: %v", rest, err)
				}
				return
			}
			if !bytes.Equal(got, rest[4:4+n]) {
				t.Fatalf("%x of %x", got, rest)
			}
			rest = rest[4+n:]
		}
	})
}

// spoken is a stream on which somebody has said all, and waits for an end.
type spoken struct {
	net.Conn
	*bytes.Reader
	closed bool
}

func (c *spoken) Read(b []byte) (int, error)       { return c.Reader.Read(b) }
func (c *spoken) Write(b []byte) (int, error)      { return len(b), nil }
func (c *spoken) Close() error                     { c.closed = true; return nil }
func (c *spoken) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *spoken) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *spoken) SetDeadline(time.Time) error      { return nil }
func (c *spoken) SetReadDeadline(time.Time) error  { return nil }
func (c *spoken) SetWriteDeadline(time.Time) error { return nil }

// FuzzClassify: memberlist has each stream that may be its own from the first byte on, and
// all others are closed; no bytes of anybody make a session.
func FuzzClassify(f *testing.F) {
	for _, first := range []byte{0, 1, 13, memberlistHasLabel, handshakeByte, frameMagic, frameMagic + 1} {
		f.Add([]byte{first, 3, 1, 0, 5, 'h', 'e', 'l', 'l', 'o'})
	}
	f.Add([]byte{})
	f.Add([]byte{handshakeByte, 3, 1, 0, 4, 1, 0, 0, 0})
	id := newAuthority(f).of(nodeID(1))
	f.Fuzz(func(t *testing.T, in []byte) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		frames := make(chan inFrame, 1)
		x := &mux{ctx: ctx, streams: make(chan net.Conn, 1)}
		x.sessions = newSessions(ctx, nil, id, frames, slog.New(slog.DiscardHandler))
		c, released := &spoken{Reader: bytes.NewReader(in)}, false
		x.classify(c, func() { released = true })
		x.sessions.wait()
		foreign, refused := x.foreign.Load(), x.sessions.refused.Load()
		select {
		case conn := <-x.streams:
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, in) || c.closed {
				t.Fatalf("memberlist has %x of %x, closed: %v, %v", got, in, c.closed, err)
			}
			if in[0] == handshakeByte || in[0] == frameMagic || foreign+refused > 0 {
				t.Fatalf("%x is memberlist's", in)
			}
		default:
			if len(in) > 0 && in[0] != handshakeByte && in[0] != frameMagic || !c.closed {
				t.Fatalf("%x is nobody's, closed: %v", in, c.closed)
			}
			if isTLS := len(in) > 0 && in[0] == handshakeByte; (refused == 1) != isTLS || released != isTLS || (foreign == 1) != (len(in) > 0 && !isTLS) {
				t.Fatalf("%x: %d sessions refused, %d foreign, released: %v", in, refused, foreign, released)
			}
		}
		if len(frames) > 0 || x.sessions.accepted.Load() != 0 || len(x.sessions.open) > 0 {
			t.Fatalf("%x made a session", in)
		}
	})
}

// TestStreamEndsHalfWay: a stream that ends within a message is no good end.
func TestStreamEndsHalfWay(t *testing.T) {
	for _, in := range [][]byte{{0}, {0, 0, 0, 1}, {0, 0, 0, 2, 'a'}} {
		if _, err := readStreamMessage(bytes.NewReader(in)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%x: %v", in, err)
		}
	}
}
