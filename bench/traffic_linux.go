package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The traffic generator: a server that answers all patterns, and a client that
// is told one run after the other on its standard input. Both are this program
// again (bench traffic ...), so that they can live in a namespace or a container,
// and speak to the kernel by bare system calls: neither the runtime's poller nor
// its scheduler is part of what is measured.
const trafficWord = "traffic"

// Ports of the server, in a namespace of its own, and sizes of the patterns.
const (
	answerPort = 7100 // TCP: 48 bytes for each byte
	drainPort  = 7101 // TCP: reads to the end, then answers one byte
	windowPort = 7102 // UDP: one datagram back for each window

	questionBytes, answerBytes = 1, 48
	datagramBytes              = 18
	window                     = 32
	writeBytes                 = 1 << 17
	// bulkUnit is what bulk counts as one operation.
	bulkUnit = 1 << 10
)

// pattern is a kind of traffic.
type pattern string

const (
	rr   pattern = "RR"   // a byte there and 48 back on one TCP connection
	crr  pattern = "CRR"  // the same on a new connection each time, ended by a reset
	udp  pattern = "UDP"  // datagrams of 18 bytes, a window of 32 at a time
	bulk pattern = "bulk" // one TCP stream, in KiB
)

var patterns = []pattern{rr, crr, udp, bulk}

// spell is what one run of a pattern took on the client's clock.
type spell struct {
	Ops           int
	Elapsed, Idle time.Duration // Idle: sum of all processors' time with nothing to do
}

// traffic runs one end, "serve ADDR", "stay ADDR" (the same, until it is killed) or
// "ask ADDR [OWN ADDR]", and returns the exit code.
func traffic(args []string, in io.Reader, out io.Writer) int {
	err := func() error {
		if len(args) < 2 || len(args) > 3 {
			return errors.New("usage: traffic serve|stay ADDR | traffic ask ADDR [OWN ADDR]")
		}
		var addrs []netip.Addr
		for _, a := range args[1:] {
			addr, err := netip.ParseAddr(a)
			if err != nil || !addr.Is4() {
				return fmt.Errorf("address %q: want IPv4", a)
			}
			addrs = append(addrs, addr)
		}
		// Threads that block in bare system calls keep their place in the
		// scheduler, and no collection could stop them.
		runtime.GOMAXPROCS(8)
		debug.SetGCPercent(-1)
		switch args[0] {
		case "serve":
			return serveTraffic(addrs[0], in, out)
		case "stay":
			never, _ := io.Pipe()
			return serveTraffic(addrs[0], never, out)
		case "ask":
			t := target{to: addrs[0]}
			if len(addrs) == 2 {
				t.from = addrs[1]
			}
			return askTraffic(t, in, out)
		}
		return fmt.Errorf("no end %q: want serve, stay or ask", args[0])
	}()
	if err != nil {
		fmt.Fprintln(out, "error:", err)
		return 1
	}
	return 0
}

// serveTraffic says "ready" and serves until its standard input ends.
func serveTraffic(addr netip.Addr, in io.Reader, out io.Writer) error {
	for _, s := range []struct {
		kind, port int
		serve      func(fd int)
	}{{unix.SOCK_STREAM, answerPort, answerTCP}, {unix.SOCK_STREAM, drainPort, drain}, {unix.SOCK_DGRAM, windowPort, acknowledge}} {
		fd, err := unix.Socket(unix.AF_INET, s.kind|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.Bind(fd, &unix.SockaddrInet4{Port: s.port, Addr: addr.As4()}))
		}
		if err == nil && s.kind == unix.SOCK_STREAM {
			err = unix.Listen(fd, 128)
		}
		if err != nil {
			return fmt.Errorf("listen at %s port %d: %w", addr, s.port, err)
		}
		// It ends with the process, as it blocks in the kernel.
		go func() {
			runtime.LockOSThread()
			if err := batch(); err != nil {
				fmt.Fprintln(out, "error:", err)
				return
			}
			s.serve(fd)
		}()
	}
	fmt.Fprintln(out, "ready")
	_, err := io.Copy(io.Discard, in)
	return err
}

// batch keeps the calling thread from taking the processor from the other end in
// the middle of its work: who runs next is then decided by who waits, not by the
// scheduler's mood (sched(7), SCHED_BATCH).
func batch() error {
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return fmt.Errorf("read the scheduling policy: %w", err)
	}
	attr.Policy = unix.SCHED_BATCH // at the same nice value: a lower one may be refused
	if err := unix.SchedSetAttr(0, attr, 0); err != nil {
		return fmt.Errorf("set the scheduling policy: %w", err)
	}
	return nil
}

// read, write and accept are the bare system calls, repeated when a signal ends them.
func read(fd int, b []byte) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func write(fd int, b []byte) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func accept(fd int) int {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if e == 0 {
			setInt(int(n), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			return int(n)
		}
	}
}

func setInt(fd, level, name, value int) unix.Errno {
	v := int32(value)
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), 4, 0)
	return e
}

func closeFD(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func answerTCP(l int) {
	var b [answerBytes]byte
	for {
		fd := accept(l)
		for {
			if n, e := read(fd, b[:questionBytes]); e != 0 || n != questionBytes {
				break
			}
			if _, e := write(fd, b[:]); e != 0 {
				break
			}
		}
		closeFD(fd)
	}
}

func drain(l int) {
	b := make([]byte, 2*writeBytes)
	for {
		fd := accept(l)
		for {
			if n, e := read(fd, b); e != 0 || n == 0 {
				break
			}
		}
		write(fd, b[:1]) // the client sees the end if it cannot be told
		closeFD(fd)
	}
}

// acknowledge sends a datagram back for each window of them. The last byte of a
// datagram counts down to 0: a window that lost one cannot be taken for whole.
func acknowledge(fd int) {
	var b [64]byte
	var from unix.RawSockaddrInet4
	for {
		size := uint32(unix.SizeofSockaddrInet4)
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0,
			uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
		if e == 0 && n == datagramBytes && b[datagramBytes-1] == 0 {
			unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), 1, 0, uintptr(unsafe.Pointer(&from)), uintptr(size))
		}
	}
}

// askTraffic reads lines "PATTERN COUNT", warms up, says "warm", waits for a
// line, and says "done" with what the run took.
func askTraffic(t target, in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	if err := batch(); err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	for lines := bufio.NewScanner(in); lines.Scan(); {
		name, number, _ := strings.Cut(lines.Text(), " ")
		count, err := strconv.Atoi(number)
		if err != nil || count < 1 {
			return fmt.Errorf("count %q: want a positive number", number)
		}
		ask, ok := askers[pattern(name)]
		if !ok {
			return fmt.Errorf("no pattern %q", name)
		}
		err = ask(t, func(run func() error, ops int) error {
			fmt.Fprintln(out, "warm")
			if !lines.Scan() {
				return io.ErrUnexpectedEOF
			}
			idle := idleTime()
			start := time.Now()
			if err := run(); err != nil {
				return err
			}
			s := spell{Ops: ops, Elapsed: time.Since(start), Idle: idleTime() - idle}
			fmt.Fprintln(out, "done", s.Ops, s.Elapsed.Nanoseconds(), s.Idle.Nanoseconds())
			return nil
		}, count)
		if err != nil {
			return fmt.Errorf("%s to %s: %w", name, t.to, err)
		}
	}
	return nil
}

// timed runs the measured part, which is so many operations.
type timed func(run func() error, ops int) error

var askers = map[pattern]func(target, timed, int) error{rr: askRR, crr: askCRR, udp: askUDP, bulk: askBulk}

// warmUp is the operations before a run: neighbours, routes and congestion
// windows are then as in a long one.
const warmUp = 64

// target is the server's address and, where the kernel would choose another one,
// the client's own.
type target struct{ to, from netip.Addr }

func sockaddr(a netip.Addr, port int) unix.RawSockaddrInet4 {
	return unix.RawSockaddrInet4{Family: unix.AF_INET, Port: uint16(port>>8 | port<<8&0xff00), Addr: a.As4()}
}

// dial connects a socket.
func (t target) dial(kind, port int) (int, error) {
	fd, _, e := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, uintptr(kind|unix.SOCK_CLOEXEC), 0)
	if e != 0 {
		return 0, e
	}
	if kind == unix.SOCK_STREAM {
		setInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if t.from.IsValid() {
		own := sockaddr(t.from, 0)
		if _, _, e = unix.RawSyscall(unix.SYS_BIND, fd, uintptr(unsafe.Pointer(&own)), unix.SizeofSockaddrInet4); e != 0 {
			closeFD(int(fd))
			return 0, fmt.Errorf("bind to %s: %w", t.from, e)
		}
	}
	to := sockaddr(t.to, port)
	if _, _, e = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&to)), unix.SizeofSockaddrInet4); e != 0 {
		closeFD(int(fd))
		return 0, fmt.Errorf("connect to port %d: %w", port, e)
	}
	return int(fd), nil
}

// patience makes reads of fd fail after a while. Only sockets that live long
// have it: it is one more system call.
func patience(fd int) error {
	tv := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

func exchange(fd int, b *[answerBytes]byte) error {
	if _, e := write(fd, b[:questionBytes]); e != 0 {
		return fmt.Errorf("send: %w", e)
	}
	if n, e := read(fd, b[:]); e != 0 || n != answerBytes {
		return fmt.Errorf("answer: %d bytes, errno %d", n, e)
	}
	return nil
}

func askRR(t target, timed timed, count int) error {
	fd, err := t.dial(unix.SOCK_STREAM, answerPort)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	var b [answerBytes]byte
	run := func(n int) error {
		for range n {
			if err := exchange(fd, &b); err != nil {
				return err
			}
		}
		return nil
	}
	if err := errors.Join(patience(fd), run(warmUp)); err != nil {
		return err
	}
	return timed(func() error { return run(count) }, count)
}

func askCRR(t target, timed timed, count int) error {
	var b [answerBytes]byte
	reset := unix.Linger{Onoff: 1}
	run := func(n int) error {
		for range n {
			fd, err := t.dial(unix.SOCK_STREAM, answerPort)
			if err != nil {
				return err
			}
			err = exchange(fd, &b)
			unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&reset)), unsafe.Sizeof(reset), 0)
			closeFD(fd)
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := run(warmUp); err != nil {
		return err
	}
	return timed(func() error { return run(count) }, count)
}

func askUDP(t target, timed timed, count int) error {
	fd, err := t.dial(unix.SOCK_DGRAM, windowPort)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	var b [64]byte
	run := func(windows int) error {
		for range windows {
			for i := window - 1; i >= 0; i-- {
				b[datagramBytes-1] = byte(i)
				if _, e := write(fd, b[:datagramBytes]); e != 0 {
					return fmt.Errorf("send: %w", e)
				}
			}
			if n, e := read(fd, b[:]); e != 0 || n != 1 {
				return fmt.Errorf("a datagram was lost: %d bytes back, errno %d", n, e)
			}
		}
		return nil
	}
	windows := (count + window - 1) / window
	if err := errors.Join(patience(fd), run(4)); err != nil {
		return err
	}
	return timed(func() error { return run(windows) }, windows*window)
}

// askBulk counts in KiB. Up to 8 MiB are sent before the clock starts: the
// kernel has found its buffer sizes by then.
func askBulk(t target, timed timed, count int) error {
	fd, err := t.dial(unix.SOCK_STREAM, drainPort)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	b := make([]byte, writeBytes)
	run := func(units int) error {
		for left := units * bulkUnit; left > 0; {
			n, e := write(fd, b[:min(left, len(b))])
			if e != 0 {
				return fmt.Errorf("send: %w", e)
			}
			left -= n
		}
		return nil
	}
	if err := errors.Join(patience(fd), run(min(8<<10, count/2))); err != nil {
		return err
	}
	return timed(func() error {
		if err := errors.Join(run(count), unix.Shutdown(fd, unix.SHUT_WR)); err != nil {
			return err
		}
		if n, e := read(fd, b[:1]); e != 0 || n != 1 {
			return fmt.Errorf("the end is not confirmed: %d bytes, errno %d", n, e)
		}
		return nil
	}, count)
}

// idleTime is how long the processors have had nothing to do, to the nanosecond
// (/proc/timer_list; /proc/stat counts in ticks of 10 ms). 0 where it may not be
// read.
func idleTime() time.Duration {
	b, err := os.ReadFile("/proc/timer_list")
	if err != nil {
		return 0
	}
	d, _ := parseIdle(string(b))
	return d
}

// parseIdle sums the lines ".idle_sleeptime : 123 nsecs", one for each processor.
func parseIdle(s string) (time.Duration, bool) {
	var sum time.Duration
	found := false
	for line := range strings.Lines(s) {
		name, value, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) != ".idle_sleeptime" {
			continue
		}
		ns, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " nsecs"), 10, 64)
		if err != nil {
			return 0, false
		}
		sum, found = sum+time.Duration(ns), true
	}
	return sum, found
}
