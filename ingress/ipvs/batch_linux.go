package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Our own choices. A message to the kernel holds many changes: one call for each
// would cost five times as much. Its errors must fit the socket's buffer.
const (
	batchBytes  = 32 << 10
	answerBytes = 64 << 10
	errorBytes  = 4 << 20 // of the socket's buffer, if every change fails
	// answerLimit bounds the wait for the kernel's answer.
	answerLimit = 30 * time.Second
)

// batcher sends changes to one namespace. It is made and closed on a thread inside;
// its sockets stay there.
type batcher struct {
	routes, services int // sockets; -1 until used
	family           uint16
	devices          devices
}

func newBatcher(family uint16, d devices) *batcher {
	return &batcher{routes: -1, services: -1, family: family, devices: d}
}

func (b *batcher) close() {
	for _, fd := range []int{b.routes, b.services} {
		if fd >= 0 {
			unix.Close(fd) // nothing is buffered in it
		}
	}
}

func dial(protocol int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, fmt.Errorf("open netlink socket: %w", err)
	}
	limit := unix.NsecToTimeval(answerLimit.Nanoseconds())
	err = errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, errorBytes),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1))
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("prepare netlink socket: %w", err)
	}
	return fd, nil
}

// socket is the one that takes an op.
func (b *batcher) socket(o op) (*int, int) {
	if o.local.IsValid() || o.near.IsValid() || o.neigh.IsValid() {
		return &b.routes, unix.NETLINK_ROUTE
	}
	return &b.services, unix.NETLINK_GENERIC
}

// run makes the changes in their order. It goes on past one that fails and returns
// all errors joined.
func (b *batcher) run(ops []op) error {
	var errs []error
	for len(ops) > 0 {
		fd, protocol := b.socket(ops[0])
		if *fd < 0 {
			var err error
			if *fd, err = dial(protocol); err != nil {
				return errors.Join(append(errs, err)...)
			}
		}
		e := encoder{family: b.family, devices: b.devices}
		n := 0
		for n < len(ops) && len(e.buf) < batchBytes {
			if next, _ := b.socket(ops[n]); next != fd {
				break
			}
			e.encode(ops[n])
			n++
		}
		e.ask()
		failed, err := exchange(*fd, e)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		for i, o := range ops[:n] {
			if err := failed[uint32(i+1)]; err != 0 && !o.harmless(err) {
				errs = append(errs, fmt.Errorf("%s: %w", o, err))
			}
		}
		ops = ops[n:]
	}
	return errors.Join(errs...)
}

// harmless: what was to be removed is gone, what was to be added is there.
func (o op) harmless(err unix.Errno) bool {
	switch o.verb {
	case remove:
		return err == unix.ENOENT || err == unix.ESRCH
	case add:
		return err == unix.EEXIST && !o.dest.addr.IsValid()
	}
	return false
}

// exchange sends all messages of e and returns the errors by sequence number.
func exchange(fd int, e encoder) (map[uint32]unix.Errno, error) {
	if err := unix.Sendto(fd, e.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send %d changes: %w", e.count, err)
	}
	failed := map[uint32]unix.Errno{}
	buf := make([]byte, answerBytes)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("wait for the answer to %d changes: %w", e.count, err)
		}
		for b := buf[:n]; len(b) >= headerLen; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < headerLen || size > len(b) {
				return nil, fmt.Errorf("answer of %d bytes in %d: %w", size, len(b), unix.EBADMSG)
			}
			kind, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			if kind == unix.NLMSG_ERROR && size >= headerLen+4 {
				if code := int32(binary.NativeEndian.Uint32(b[headerLen:])); code != 0 {
					failed[seq] = unix.Errno(-code)
				}
				if seq == e.count {
					return failed, nil
				}
			}
			b = b[min(len(b), (size+3)&^3):]
		}
	}
}

// String names the change for errors.
func (o op) String() string {
	v := [...]string{"add", "change", "remove"}[o.verb]
	switch {
	case o.local.IsValid():
		return fmt.Sprintf("%s route of service address %s", v, o.local)
	case o.near.IsValid():
		return fmt.Sprintf("%s route to task %s", v, o.near)
	case o.neigh.IsValid():
		return fmt.Sprintf("%s neighbour %s", v, o.neigh)
	case o.dest.addr.IsValid():
		return fmt.Sprintf("%s backend %s (weight %d) of %s", v, o.dest.addr, o.dest.weight, o.key)
	}
	return fmt.Sprintf("%s %s", v, o.key)
}
