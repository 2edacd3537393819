package ingresstest

import (
	"cmp"
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

// serving is what answers at one task.
type serving struct {
	r    *Rig
	task Task
	wg   sync.WaitGroup
	open []io.Closer
}

// accept answers the connections of a listener. then is what follows the client's end.
func (s *serving) accept(ln net.Listener, then func(net.Conn)) {
	s.open = append(s.open, ln)
	s.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				// The end of a connection that was moved away never comes.
				defer context.AfterFunc(s.r.T.Context(), func() { c.Close() })()
				defer c.Close()
				fmt.Fprintf(c, "%s %s\n", s.task.Task, c.RemoteAddr())
				io.Copy(c, c)
				then(c)
			})
		}
	})
}

func nothing(net.Conn) {}

func (s *serving) tcp(host string, port int, then func(net.Conn)) error {
	ln, err := net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err == nil {
		s.accept(ln, then)
	}
	return err
}

func (s *serving) udp(host string, port int) error {
	pc, err := shared.ListenPacket(s.r.T.Context(), "udp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return err
	}
	s.open = append(s.open, pc)
	s.wg.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			line := fmt.Sprintf("%s %s\n", s.task.Task, from)
			pc.WriteTo([]byte(line+strings.Repeat(".", max(0, n-len(line)))), from)
		}
	})
	return nil
}

// sctp is on all addresses and on the task's own, by the kernel's sockets where there are
// any.
func (s *serving) sctp() error {
	err := HasSCTP()
	var errs []error
	if errors.Is(err, weft.ErrUnsupported) {
		for _, family := range []string{"ip4", "ip6"} {
			pc, read, err := listenRaw(family)
			if errs = append(errs, err); err == nil {
				s.open = append(s.open, pc)
				s.wg.Go(func() { serveRaw(s.task, pc, read) })
			}
		}
		return errors.Join(errs...)
	}
	if err != nil {
		return err
	}
	for at, port := range map[netip.Addr]uint16{netip.IPv6Unspecified(): portTCP, s.task.Addr: portOwn, s.task.Addr6: portOwn} {
		ln, err := ListenSCTP(netip.AddrPortFrom(at, port))
		if errs = append(errs, err); err == nil {
			s.accept(ln, nothing)
		}
	}
	return errors.Join(errs...)
}

// Serve answers at a task until the test ends. late is the while of portLate.
func (r *Rig) Serve(task Task, late time.Duration, vips ...netip.Addr) {
	r.T.Helper()
	s := &serving{r: r, task: task}
	must(r.T, netns.Do(task.NetNS, func() error {
		errs := []error{s.tcp("", portTCP, nothing), s.udp("", portUDP), s.sctp(), s.tcp("", portLate, func(c net.Conn) {
			select {
			case <-time.After(late):
				fmt.Fprintln(c, "late")
			case <-r.T.Context().Done():
			}
		})}
		for _, a := range []netip.Addr{task.Addr, task.Addr6} {
			errs = append(errs, s.tcp(a.String(), portOwn, nothing), s.udp(a.String(), portOwn))
		}
		for _, a := range vips {
			errs = append(errs, s.udp(a.String(), portVIP), s.udp(a.String(), portErrors))
		}
		return errors.Join(errs...)
	}))
	r.T.Cleanup(func() {
		for _, c := range s.open {
			c.Close()
		}
		s.wg.Wait()
	})
}

// silence is how long nobody's answer is waited for.
const silence = 2 * time.Second

// Socket is a client's: connected, whose other end answers with its name.
type Socket struct {
	net.Conn
	isUDP bool
	// patience is how long an answer is waited for; 0 = silence.
	patience time.Duration
	Name     weft.ID
	Saw      netip.Addr // the client's address as the other end sees it
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
	err = r.greet(s, err)
	if err != nil && s.Conn != nil {
		s.Close()
	}
	return s, err
}

// greet asks who is at the other end of a socket that has been opened, or says in the
// suite's words why it has not.
func (r *Rig) greet(s *Socket, err error) error {
	if err == nil {
		r.open = append(r.open, s)
		s.Name, s.Saw, err = s.Ask(1)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

// OpenSCTP is Open for SCTP: by the kernel's sockets where there are any.
func (r *Rig) OpenSCTP(ns string, from uint16, to netip.AddrPort) (Flow, error) {
	if err := HasSCTP(); errors.Is(err, weft.ErrUnsupported) {
		f, err := r.openRaw(ns, from, to)
		if err != nil {
			return nil, err
		}
		return f, nil
	} else if err != nil {
		return nil, err
	}
	s := &Socket{patience: patienceSCTP}
	var local netip.AddrPort
	if from != 0 {
		local = netip.AddrPortFrom(netip.IPv6Unspecified(), from)
		if to.Addr().Is4() {
			local = netip.AddrPortFrom(netip.IPv4Unspecified(), from)
		}
	}
	err := netns.Do(ns, func() (err error) {
		s.Conn, err = DialSCTP(local, to)
		return err
	})
	if err := r.greet(s, err); err != nil {
		return nil, err
	}
	return s, nil
}

// Ask reads the line of the other end, which a datagram of size bytes has to ask for.
func (s *Socket) Ask(size int) (name weft.ID, seen netip.Addr, err error) {
	if err := s.SetDeadline(time.Now().Add(cmp.Or(s.patience, silence))); err != nil {
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
	s.SetDeadline(time.Now().Add(cmp.Or(s.patience, silence)))
	if _, err := s.Write([]byte("ping")); err != nil {
		return "", err
	}
	_, err := io.ReadFull(s, make([]byte, 4))
	return s.Name, err // a connection has one end for life
}
