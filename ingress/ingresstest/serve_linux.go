package ingresstest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// Serve answers at a task until the test ends. late is the while of portLate.
func (r *Rig) Serve(task Task, late time.Duration, vips ...netip.Addr) {
	r.T.Helper()
	var wg sync.WaitGroup
	var open []io.Closer
	tcp := func(host string, port int, then func(net.Conn)) error {
		ln, err := net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			return err
		}
		open = append(open, ln)
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					// The end of a connection that was moved away never comes.
					defer context.AfterFunc(r.T.Context(), func() { c.Close() })()
					defer c.Close()
					fmt.Fprintf(c, "%s %s\n", task.Task, c.RemoteAddr())
					io.Copy(c, c)
					then(c)
				})
			}
		})
		return nil
	}
	udp := func(host string, port int) error {
		pc, err := shared.ListenPacket(r.T.Context(), "udp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			return err
		}
		open = append(open, pc)
		wg.Go(func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				line := fmt.Sprintf("%s %s\n", task.Task, from)
				pc.WriteTo([]byte(line+strings.Repeat(".", max(0, n-len(line)))), from)
			}
		})
		return nil
	}
	nothing := func(net.Conn) {}
	must(r.T, netns.Do(task.NetNS, func() error {
		errs := []error{tcp("", portTCP, nothing), udp("", portUDP), tcp("", portLate, func(c net.Conn) {
			select {
			case <-time.After(late):
				fmt.Fprintln(c, "late")
			case <-r.T.Context().Done():
			}
		})}
		for _, a := range []netip.Addr{task.Addr, task.Addr6} {
			errs = append(errs, tcp(a.String(), portOwn, nothing), udp(a.String(), portOwn))
		}
		for _, a := range vips {
			errs = append(errs, udp(a.String(), portVIP), udp(a.String(), portErrors))
		}
		return errors.Join(errs...)
	}))
	r.T.Cleanup(func() {
		for _, c := range open {
			c.Close()
		}
		wg.Wait()
	})
}

// silence is how long nobody's answer is waited for.
const silence = 2 * time.Second

// Socket is a client's: connected, whose other end answers with its name.
type Socket struct {
	net.Conn
	isUDP bool
	Name  weft.ID
	Saw   netip.Addr // the client's address as the other end sees it
}

// Backend implements Flow.
func (s *Socket) Backend() weft.ID { return s.Name }

// Seen implements Flow.
func (s *Socket) Seen() netip.Addr { return s.Saw }

// CloseWrite ends the client's half of a connection.
func (s *Socket) CloseWrite() error { return s.Conn.(*net.TCPConn).CloseWrite() }

// Reset ends a connection by a reset, which leaves its port free.
func (s *Socket) Reset() error {
	return errors.Join(s.Conn.(*net.TCPConn).SetLinger(0), s.Close())
}

// Resent is how many segments of a connection were sent again. A request for a
// connection that was lost is one of them.
func (s *Socket) Resent() (n int, err error) {
	raw, err := s.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); failed == nil {
			n = int(info.Total_retrans)
		}
	})
	return n, errors.Join(err, failed)
}

// shared lets several sockets have one address: a listener, and one for one client.
var shared = net.ListenConfig{Control: share}

// Release closes what Open has opened.
func (r *Rig) Release() {
	for _, c := range r.open {
		c.Close()
	}
	r.open = nil
}

func share(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) }), err)
}

// bounced sends a datagram from a task's service address to a client whose socket
// is closed, and wants to hear of it.
func (r *Rig) bounced(task Task, vip netip.Addr, client netip.AddrPort) error {
	d := net.Dialer{LocalAddr: udpAddr(vip, portErrors), Control: share}
	return netns.Do(task.NetNS, func() error {
		c, err := d.DialContext(r.T.Context(), "udp", client.String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(silence))
		if _, err := c.Write([]byte("late")); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 16)); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%s sends to a closed socket of %s and hears %w", task.Task, client, err)
		}
		return nil
	})
}

func udpAddr(a netip.Addr, port int) *net.UDPAddr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(port)))
}

// Open opens a flow from a namespace. from 0 is any port of the client.
func (r *Rig) Open(ns string, p weft.Protocol, from uint16, to netip.AddrPort) (*Socket, error) {
	s := &Socket{isUDP: p == weft.UDP}
	d := net.Dialer{Timeout: silence}
	if from != 0 {
		d.Control = share // what used the port before may linger
	}
	if from != 0 && s.isUDP {
		d.LocalAddr = &net.UDPAddr{Port: int(from)}
	} else if from != 0 {
		d.LocalAddr = &net.TCPAddr{Port: int(from)}
	}
	err := netns.Do(ns, func() (err error) {
		s.Conn, err = d.DialContext(r.T.Context(), string(p), to.String())
		return err
	})
	if err == nil {
		r.open = append(r.open, s)
		s.Name, s.Saw, err = s.Ask(1)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if err != nil && s.Conn != nil {
		s.Close()
	}
	return s, err
}

// Ask reads the line of the other end, which a datagram of size bytes has to ask for.
func (s *Socket) Ask(size int) (name weft.ID, seen netip.Addr, err error) {
	if err := s.SetDeadline(time.Now().Add(silence)); err != nil {
		return "", seen, err
	}
	// One byte of a stream at a time: what follows the line is not ours to read.
	buf := make([]byte, 1)
	if s.isUDP {
		if _, err := s.Write(make([]byte, size)); err != nil {
			return "", seen, err
		}
		buf = make([]byte, 1<<16)
	}
	var line []byte
	for !strings.Contains(string(line), "\n") {
		n, err := s.Read(buf)
		if err != nil {
			return "", seen, err
		}
		line = append(line, buf[:n]...)
	}
	if s.isUDP && len(line) < size {
		return "", seen, fmt.Errorf("%d bytes were answered with %d", size, len(line))
	}
	first, _, _ := strings.Cut(string(line), "\n")
	word, addr, _ := strings.Cut(first, " ")
	from, err := netip.ParseAddrPort(addr)
	return weft.ID(word), from.Addr().Unmap(), err
}

// Again implements Flow: it sends more on the same flow and says who answered.
func (s *Socket) Again() (weft.ID, error) {
	if s.isUDP {
		name, _, err := s.Ask(1)
		return name, err
	}
	s.SetDeadline(time.Now().Add(silence))
	if _, err := s.Write([]byte("ping")); err != nil {
		return "", err
	}
	_, err := io.ReadFull(s, make([]byte, 4))
	return s.Name, err // a connection has one end for life
}
