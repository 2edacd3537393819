package dns

import (
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// burstSize is how many questions are read, and answered, by one call of the
// kernel. More gain little: at 32 the call is a small part of a question's cost.
const burstSize = 32

// burst is room for questions that arrive together and for their answers. It is
// borrowed from Server.bursts while there is something to read, so that a task
// at rest has none.
type burst struct {
	// in has the questions, and quick answers in place of them: what is in the
	// caches is written to. The thorough ones go to out.
	in   [burstSize][ednsSize]byte
	out  [burstSize][ednsSize]byte
	from [burstSize]unix.RawSockaddrInet6 // the larger of both families

	questions     [burstSize]plainQuery
	inVec, outVec [burstSize]unix.Iovec
	inMsg, outMsg [burstSize]mmsghdr
	used          int // of inMsg: recv has written to them
	replies       int // filled in outMsg
}

// mmsghdr is struct mmsghdr (recvmmsg(2)).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

func newBurst() *burst {
	b := new(burst)
	for i := range burstSize {
		b.inVec[i].Base = &b.in[i][0]
		b.inVec[i].SetLen(maxUDPQuery)
		b.inMsg[i].hdr.Name = (*byte)(unsafe.Pointer(&b.from[i]))
		b.inMsg[i].hdr.Namelen = uint32(unsafe.Sizeof(b.from[i]))
		b.inMsg[i].hdr.Iov = &b.inVec[i]
		b.inMsg[i].hdr.SetIovlen(1)
		b.outMsg[i].hdr.Iov = &b.outVec[i]
		b.outMsg[i].hdr.SetIovlen(1)
	}
	return b
}

// recv reads what is there, at most burstSize packets, and does not wait.
func (b *burst) recv(fd uintptr) (int, syscall.Errno) {
	for i := range b.used {
		b.inMsg[i].hdr.Namelen = uint32(unsafe.Sizeof(b.from[i]))
	}
	b.used, b.replies = 0, 0
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.inMsg[0])), burstSize, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.used = int(n)
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// packet is what was read as the i-th; nil if there was more of it than room.
func (b *burst) packet(i int) []byte {
	if m := &b.inMsg[i]; m.hdr.Flags&unix.MSG_TRUNC == 0 {
		return b.in[i][:m.len]
	}
	return nil
}

// reply adds an answer to whoever sent the i-th. It is written by send; until
// then out must stay as it is.
func (b *burst) reply(i int, out []byte) {
	k := b.replies
	b.replies++
	b.outVec[k].Base = unsafe.SliceData(out)
	b.outVec[k].SetLen(len(out))
	b.outMsg[k].hdr.Name, b.outMsg[k].hdr.Namelen = b.inMsg[i].hdr.Name, b.inMsg[i].hdr.Namelen
}

// send writes the answers. One that cannot be written is the asker's loss, as a
// lost packet is: it asks again.
func (b *burst) send(fd uintptr) {
	for done := 0; done < b.replies; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&b.outMsg[done])), uintptr(b.replies-done), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			done += int(n)
		case unix.EINTR:
		default:
			done++
		}
	}
}

// sender is who sent the i-th packet.
func (b *burst) sender(i int) netip.AddrPort {
	a := &b.from[i]
	port := func(p *uint16) uint16 { x := (*[2]byte)(unsafe.Pointer(p)); return uint16(x[0])<<8 | uint16(x[1]) }
	if a.Family == unix.AF_INET {
		a4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(a))
		return netip.AddrPortFrom(netip.AddrFrom4(a4.Addr), port(&a4.Port))
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), port(&a.Port))
}
