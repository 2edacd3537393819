package wire

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// proxy forwards TCP until it is cut.
type proxy struct {
	addr netip.AddrPort
	ln   net.Listener

	// mu guards: conns, dead.
	mu    sync.Mutex
	conns []net.Conn
	dead  bool
}

func newProxy(t *testing.T, to netip.AddrPort) *proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{ln: ln, addr: ln.Addr().(*net.TCPAddr).AddrPort()}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to.String())
			if err != nil {
				a.Close()
				continue
			}
			if !p.keep(a, b) {
				continue
			}
			wg.Go(func() { io.Copy(a, b); a.Close() })
			wg.Go(func() { io.Copy(b, a); b.Close() })
		}
	})
	t.Cleanup(func() { p.cut(); wg.Wait() })
	return p
}

func (p *proxy) keep(c ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		for _, c := range c {
			c.Close()
		}
		return false
	}
	p.conns = append(p.conns, c...)
	return true
}

// cut closes everything, as a host that loses power does to its peers in the
// end.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true
	p.ln.Close()
	for _, c := range p.conns {
		c.Close()
	}
}
