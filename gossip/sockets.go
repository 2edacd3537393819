package gossip

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// sockets is a Transport of one UDP and one TCP port. memberlist has one, too, which
// takes 64 KiB of fresh memory for each packet and hands it on by a goroutine more: the
// most of what a daemon at rest has to do is to take packets.
type sockets struct {
	udp     *net.UDPConn
	tcp     *net.TCPListener
	log     *slog.Logger
	streams chan net.Conn
	wg      sync.WaitGroup
	closing chan struct{} // closed by Shutdown
	once    sync.Once
	err     error // of the shutdown
}

// direct is a Transport that gives packets to a function rather than to PacketCh.
type direct interface {
	// receive starts reading and is called once, before Shutdown. take is called by one
	// goroutine; Buf is its own.
	receive(take func(*memberlist.Packet))
}

const (
	// receiveBuffer is asked of the kernel for UDP: what comes while the daemon waits for
	// a processor. It grants less without the privilege.
	receiveBuffer = 2 << 20
	// acceptPause follows an accept that failed, for lack of descriptors.
	acceptPause = 50 * time.Millisecond
)

var (
	_ Transport = (*sockets)(nil)
	_ direct    = (*sockets)(nil)
)

// openSockets listens on both ports; port 0 is one that is free on TCP.
func openSockets(bind netip.AddrPort, log *slog.Logger) (*sockets, error) {
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(bind))
	if err != nil {
		return nil, err
	}
	bind = netip.AddrPortFrom(bind.Addr(), tcp.Addr().(*net.TCPAddr).AddrPort().Port())
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(bind))
	if err != nil {
		return nil, errors.Join(err, tcp.Close())
	}
	if err := udp.SetReadBuffer(receiveBuffer); err != nil {
		return nil, errors.Join(fmt.Errorf("set the receive buffer: %w", err), tcp.Close(), udp.Close())
	}
	s := &sockets{udp: udp, tcp: tcp, log: log, streams: make(chan net.Conn), closing: make(chan struct{})}
	s.wg.Go(s.accept)
	return s, nil
}

func (s *sockets) port() uint16 { return s.tcp.Addr().(*net.TCPAddr).AddrPort().Port() }

func (s *sockets) receive(take func(*memberlist.Packet)) {
	s.wg.Go(func() {
		// Longer datagrams than frames are read whole, too, so that they are dropped for
		// what they are.
		buf := make([]byte, 1<<16)
		for {
			n, from, err := s.udp.ReadFromUDPAddrPort(buf)
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil: // of one packet
				s.log.Debug("cannot read a packet", weft.KeyErr, err)
			case n > 0:
				from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
				take(&memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: net.UDPAddrFromAddrPort(from), Timestamp: time.Now()})
			}
		}
	})
}

func (s *sockets) accept() {
	for {
		conn, err := s.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Warn("cannot accept a stream of another node", weft.KeyErr, err)
			select {
			case <-time.After(acceptPause):
			case <-s.closing:
			}
			continue
		}
		select {
		case s.streams <- conn:
		case <-s.closing:
			conn.Close()
		}
	}
}

// FinalAdvertiseAddr implements Transport: the address is always given.
func (s *sockets) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	a, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, 0, fmt.Errorf("advertised address %q: %w", ip, err)
	}
	return a.Unmap().AsSlice(), port, nil
}

// WriteTo implements Transport.
func (s *sockets) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	_, err = s.udp.WriteToUDPAddrPort(b, netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
	return time.Now(), err
}

// WriteToAddress implements Transport.
func (s *sockets) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return s.WriteTo(b, a.Addr)
}

// DialTimeout implements Transport.
func (s *sockets) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", addr, timeout)
}

// DialAddressTimeout implements Transport.
func (s *sockets) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return s.DialTimeout(a.Addr, timeout)
}

// PacketCh implements Transport: nothing comes by it.
func (s *sockets) PacketCh() <-chan *memberlist.Packet { return nil }

// StreamCh implements Transport.
func (s *sockets) StreamCh() <-chan net.Conn { return s.streams }

// Shutdown implements Transport. It returns once nothing is received any more, which
// take has to let happen.
func (s *sockets) Shutdown() error {
	s.once.Do(func() {
		close(s.closing)
		s.err = errors.Join(s.udp.Close(), s.tcp.Close())
	})
	s.wg.Wait()
	return s.err
}
