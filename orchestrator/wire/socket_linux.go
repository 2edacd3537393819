package wire

import (
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// resendWithin bounds the kernel's wait between two tries to send: it doubles with
// each, so that after a cut of three seconds the next word of a node might come
// three seconds late, when its manager has taken it for down. The kernel's least.
const resendWithin = time.Second

// tcpRTOMaxMS is TCP_RTO_MAX_MS (linux/tcp.h, Linux 6.15).
const tcpRTOMaxMS = 44

// dialer makes connections between nodes.
func dialer(timeout time.Duration) *net.Dialer {
	return &net.Dialer{Timeout: timeout, Control: resendSoon}
}

// resendSoon is a Control of sockets that send again within resendWithin, where the kernel
// can; accepted ones are as their listener.
func resendSoon(_, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMaxMS, int(resendWithin/time.Millisecond))
	})
	if errors.Is(err, unix.ENOPROTOOPT) {
		err = nil // an older kernel keeps its two minutes: a cut is felt for up to twice as long
	}
	return errors.Join(cerr, err)
}
