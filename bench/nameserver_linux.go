package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
)

// namesWord makes this program one of the servers of bench names: KIND follows.
const namesWord = "names-server"

// serveNames is that server. It tells its address on stdout and ends with stdin.
func serveNames(kind string, stdin io.Reader, stdout, stderr io.Writer) int {
	pc, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		switch name, number, _ := strings.Cut(kind, "-"); {
		case kind == serverEcho:
			done <- echo(pc)
		case kind == serverBurst:
			done <- echoBursts(pc)
		case name == serverWeft:
			done <- resolve(ctx, pc, number)
		default:
			done <- fmt.Errorf("no server is called %q", kind)
		}
	}()
	go func() {
		io.Copy(io.Discard, stdin)
		cancel()
		pc.Close()
	}()
	fmt.Fprintln(stdout, pc.LocalAddr())
	err = <-done
	if ctx.Err() == nil {
		fmt.Fprintln(stderr, err)
		cancel()
		return 1
	}
	return 0
}

// echo is the least that a server written with package net can do.
func echo(pc *net.UDPConn) error {
	buf := make([]byte, 2048)
	for {
		n, from, err := pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if _, err := pc.WriteToUDPAddrPort(buf[:n], from); err != nil {
			return err
		}
	}
}

// echoBursts is the same as the resolver reads and writes: 32 packets a call.
func echoBursts(pc *net.UDPConn) error {
	const burst = 32
	type message struct { // struct mmsghdr, recvmmsg(2)
		hdr unix.Msghdr
		len uint32
	}
	var bufs [burst][2048]byte
	var from [burst]unix.RawSockaddrInet4
	var vecs [burst]unix.Iovec
	var msgs [burst]message
	for i := range burst {
		vecs[i].Base = &bufs[i][0]
		msgs[i].hdr.Name, msgs[i].hdr.Iov = (*byte)(unsafe.Pointer(&from[i])), &vecs[i]
		msgs[i].hdr.SetIovlen(1)
	}
	raw, err := pc.SyscallConn()
	if err != nil {
		return err
	}
	var n uintptr
	var errno syscall.Errno
	read := func(fd uintptr) bool {
		n, _, errno = unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), burst, unix.MSG_DONTWAIT, 0, 0)
		return errno != unix.EAGAIN
	}
	write := func(fd uintptr) bool {
		for done := uintptr(0); done < n; {
			k, _, _ := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&msgs[done])), n-done, unix.MSG_DONTWAIT, 0, 0)
			done += max(min(k, n), 1)
		}
		return true
	}
	for {
		for i := range burst {
			vecs[i].SetLen(len(bufs[i]))
			msgs[i].hdr.Namelen = unix.SizeofSockaddrInet4
		}
		if err := raw.Read(read); err != nil {
			return err
		}
		if errno != 0 {
			return errno
		}
		for i := range n {
			vecs[i].SetLen(int(msgs[i].len))
		}
		if err := raw.Write(write); err != nil {
			return err
		}
	}
}

// resolve is weft's resolver with number names.
func resolve(ctx context.Context, pc *net.UDPConn, number string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	s, err := dns.New(dns.Config{Log: slog.New(slog.DiscardHandler), ResolvConf: "/dev/null"})
	if err != nil {
		return err
	}
	blue := dns.Network{Name: "blue"}
	for i := range n {
		blue.Services = append(blue.Services, dns.Service{Name: benchName(i), VIP: []netip.Addr{nameAddr(i)}})
	}
	s.Update(dns.Records{Networks: map[weft.ID]dns.Network{"blue": blue}})
	ln, err := net.Listen("tcp4", pc.LocalAddr().String())
	if err != nil {
		return err
	}
	return s.Serve(ctx, dns.View{Networks: []weft.ID{"blue"}}, pc, ln)
}
