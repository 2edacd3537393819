package api

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types"
)

// frameHeader is Docker's frame before each piece of a stream without a
// terminal: stream number, three zero bytes, length in big-endian order
// (Engine API, ContainerAttach, "Stream format").
const frameHeader = 8

// maxFrame bounds one frame; longer writes are cut into several.
const maxFrame = 32 << 10

// muxWriter writes frames of one stream. Several of them share an output, each
// frame in one Write under the lock they share.
type muxWriter struct {
	mu     *sync.Mutex // guards: writes to w
	w      io.Writer
	stream stdcopy.StdType
}

// Write frames p. It returns the number of bytes of p that went out.
func (m *muxWriter) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	written := 0
	for len(p) > 0 {
		n := min(len(p), maxFrame)
		frame := make([]byte, frameHeader, frameHeader+n)
		frame[0] = byte(m.stream)
		binary.BigEndian.PutUint32(frame[4:], uint32(n))
		if _, err := m.w.Write(append(frame, p[:n]...)); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// lockedWriter writes unframed pieces (a terminal) one at a time.
type lockedWriter struct {
	mu *sync.Mutex // guards: writes to w
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// outputs makes the writers for stdout and stderr on one connection.
func outputs(w io.Writer, isTTY bool) (stdout, stderr io.Writer) {
	mu := &sync.Mutex{}
	if isTTY {
		l := &lockedWriter{mu: mu, w: w}
		return l, l
	}
	return &muxWriter{mu, w, stdcopy.Stdout}, &muxWriter{mu, w, stdcopy.Stderr}
}

// streamType is the content type of such a stream: before 1.42 clients knew
// only the one name, framed or not.
func streamType(isTTY bool, v apiVersion) string {
	if !isTTY && v >= 42 {
		return types.MediaTypeMultiplexedStream
	}
	return types.MediaTypeRawStream
}

// flushWriter sends every write to the client at once.
type flushWriter struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

// startStream sends the headers now: a client that follows waits for them
// before the first line exists.
func startStream(w http.ResponseWriter, contentType string) (*flushWriter, error) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(http.StatusOK)
	f := &flushWriter{w: w, rc: http.NewResponseController(w)}
	if err := f.rc.Flush(); err != nil {
		return nil, fmt.Errorf("flush headers: %w", err)
	}
	return f, nil
}

func (f *flushWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		return n, err
	}
	return n, f.rc.Flush()
}

// hijacked is a connection taken from net/http: raw bytes both ways.
type hijacked struct {
	conn net.Conn
	in   *bufio.Reader
}

// hijack takes over the connection and writes the header of the answer: 101
// UPGRADED for clients that asked for it, else 200 without a length.
func hijack(c *call, contentType string) (*hijacked, error) {
	if sw, ok := c.w.(*statusWriter); ok {
		sw.status = http.StatusSwitchingProtocols
	}
	conn, rw, err := http.NewResponseController(c.w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over connection: %w", err)
	}
	head := "HTTP/1.1 200 OK\r\nContent-Type: " + contentType + "\r\n\r\n"
	if strings.EqualFold(c.Header.Get("Upgrade"), "tcp") {
		head = "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + contentType +
			"\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nApi-Version: " + maxVersion.String() + "\r\n\r\n"
	}
	if _, err := io.WriteString(conn, head); err != nil {
		_ = conn.Close() // the client has gone
		return nil, fmt.Errorf("answer upgrade: %w", err)
	}
	return &hijacked{conn: conn, in: rw.Reader}, nil
}
