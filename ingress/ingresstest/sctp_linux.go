package ingresstest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// patienceSCTP is how long an answer to SCTP is waited for. What is lost is sent again
// after three seconds, and after six more (RFC 9260 section 16, RTO.Initial), so that a
// shorter wait takes one packet that a busy machine has dropped for nobody.
const patienceSCTP = 12 * time.Second

// HasSCTP says whether this kernel has sockets of SCTP. An error that wraps
// weft.ErrUnsupported says that it has none.
func HasSCTP() error {
	fd, err := socketSCTP(unix.AF_INET)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("this kernel has no sockets of SCTP (module sctp): %w", weft.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// socketSCTP is one of the style that is used as TCP's (RFC 6458 section 4).
func socketSCTP(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	return fd, nil
}

// ListenSCTP listens in the calling thread's namespace: at one address, at all of
// IPv4 (0.0.0.0), or at all of both families (::).
func ListenSCTP(at netip.AddrPort) (net.Listener, error) {
	family, addr := sockaddr(at)
	fd, err := socketSCTP(family)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close() // the listener has its own
	err = errors.Join(os.NewSyscallError("bind", unix.Bind(fd, addr)), os.NewSyscallError("listen", unix.Listen(fd, 128)))
	if err != nil {
		return nil, err
	}
	return net.FileListener(f)
}

// DialSCTP opens an association from the calling thread's namespace. from may be
// invalid, or without a port. It blocks for patienceSCTP at most.
func DialSCTP(from, to netip.AddrPort) (net.Conn, error) {
	family, addr := sockaddr(to)
	fd, err := socketSCTP(family)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close() // the connection has its own
	limit := unix.NsecToTimeval(patienceSCTP.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit)
	if from.IsValid() {
		_, own := sockaddr(from)
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), os.NewSyscallError("bind", unix.Bind(fd, own)))
	}
	if err != nil {
		return nil, err
	}
	err = connectSCTP(fd, addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %s by sctp: %w", to, err)
	}
	return net.FileConn(f)
}

// connectSCTP waits on after a signal, which the runtime sends at any time: the association
// is being made nevertheless, and another connect says how far it is.
func connectSCTP(fd int, addr unix.Sockaddr) error {
	err := unix.Connect(fd, addr)
	for end := time.Now().Add(patienceSCTP); errors.Is(err, unix.EINTR) || errors.Is(err, unix.EALREADY); {
		left := time.Until(end)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if err = unix.Connect(fd, addr); errors.Is(err, unix.EISCONN) {
			return nil
		}
	}
	return err
}

func sockaddr(a netip.AddrPort) (family int, addr unix.Sockaddr) {
	if a.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
