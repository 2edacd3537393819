package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// batchMost bounds the messages of one system call, so that the answers to all of
// them fit into the socket: it holds 212,992 bytes (net.core.rmem_default), and one
// answer takes up less than 1 KiB, that for a link some more.
const batchMost = 64

// answerMost is the longest answer that is taken, in bytes. That for a link without
// its statistics has about 1,300.
const answerMost = 16 << 10

// extSkipStats is RTEXT_FILTER_SKIP_STATS (linux/rtnetlink.h).
const extSkipStats = 1 << 3

// socket is an rtnetlink socket for messages that this package makes itself.
type socket struct {
	raw map[int]*nl.SocketHandle
}

// openSocket opens one in the calling thread's namespace.
func openSocket() (socket, error) {
	s, err := nl.GetNetlinkSocketAt(-1, -1, unix.NETLINK_ROUTE) // -1, -1: stay here
	if err != nil {
		return socket{}, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	limit := unix.NsecToTimeval(AnswerLimit.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&limit), s.SetReceiveTimeout(&limit)); err != nil {
		s.Close()
		return socket{}, fmt.Errorf("bound the wait of rtnetlink sockets: %w", err)
	}
	return socket{raw: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

func (s socket) shut() { s.raw[unix.NETLINK_ROUTE].Close() }

func (s socket) request(proto, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(proto, flags)
	req.Sockets = s.raw
	return req
}

// answer is what the kernel said to one message: data, or why not.
type answer struct {
	data []byte
	err  error
}

// ask sends many messages in as few system calls as possible and returns their
// answers in order. Each must have exactly one: an acknowledgement that was asked
// for, or one object. The kernel carries out all of them, also past one that fails.
func (s socket) ask(reqs []*nl.NetlinkRequest) ([]answer, error) {
	answers := make([]answer, 0, len(reqs))
	for len(reqs) > 0 {
		some := reqs[:min(len(reqs), batchMost)]
		reqs = reqs[len(some):]
		got, err := s.askSome(some)
		if err != nil {
			return nil, err
		}
		answers = append(answers, got...)
	}
	return answers, nil
}

func (s socket) askSome(reqs []*nl.NetlinkRequest) ([]answer, error) {
	h := s.raw[unix.NETLINK_ROUTE]
	first := h.Seq + 1
	var out []byte
	for _, r := range reqs {
		h.Seq++
		r.Seq = h.Seq
		out = append(out, r.Serialize()...)
	}
	// The kernel carries out what it is sent before the call returns.
	if err := unix.Sendto(h.Socket.GetFd(), out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send %d rtnetlink messages: %w", len(reqs), err)
	}
	answers, done := make([]answer, len(reqs)), make([]bool, len(reqs))
	buf := make([]byte, answerMost)
	for left := len(reqs); left > 0; {
		n, err := receive(h.Socket.GetFd(), buf)
		if err != nil {
			return nil, fmt.Errorf("receive rtnetlink answers: %w", err)
		}
		for b := buf[:n]; len(b) > 0; {
			m, rest, err := cutMessage(b)
			if err != nil {
				return nil, err
			}
			b = rest
			i := m.seq - first
			if i >= uint32(len(reqs)) || done[i] {
				continue // of an exchange that was given up
			}
			done[i], answers[i] = true, m.answer()
			left--
		}
	}
	return answers, nil
}

// receive waits for one datagram of the kernel.
func receive(fd int, buf []byte) (int, error) {
	for {
		n, from, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(AnswerLimit.Milliseconds()))
			if err != nil && !errors.Is(err, unix.EINTR) {
				return 0, err
			}
			if ready == 0 && err == nil {
				return 0, fmt.Errorf("no answer within %s: %w", AnswerLimit, unix.ETIMEDOUT)
			}
			continue
		case err != nil:
			return 0, err
		case n > len(buf):
			return 0, fmt.Errorf("an answer of %d bytes: %w", n, unix.EMSGSIZE)
		}
		if a, ok := from.(*unix.SockaddrNetlink); ok && a.Pid == nl.PidKernel {
			return n, nil
		}
	}
}

// message is a part of a datagram.
type message struct {
	typ  uint16
	seq  uint32
	data []byte
}

// cutMessage takes the first message off a datagram (struct nlmsghdr,
// linux/netlink.h).
func cutMessage(b []byte) (m message, rest []byte, err error) {
	if len(b) < unix.SizeofNlMsghdr {
		return m, nil, fmt.Errorf("an rtnetlink message of %d bytes: %w", len(b), unix.EBADMSG)
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < unix.SizeofNlMsghdr || size > len(b) {
		return m, nil, fmt.Errorf("an rtnetlink message that says it has %d of %d bytes: %w", size, len(b), unix.EBADMSG)
	}
	m = message{typ: binary.NativeEndian.Uint16(b[4:]), seq: binary.NativeEndian.Uint32(b[8:]), data: b[unix.SizeofNlMsghdr:size]}
	return m, b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):], nil
}

func (m message) answer() answer {
	if m.typ != unix.NLMSG_ERROR {
		return answer{data: append([]byte(nil), m.data...)}
	}
	if len(m.data) < 4 {
		return answer{err: unix.EBADMSG}
	}
	if errno := int32(binary.NativeEndian.Uint32(m.data)); errno != 0 {
		return answer{err: unix.Errno(-errno)}
	}
	return answer{}
}

// write is one entry that is set or removed.
type write struct {
	netlink.Neigh
	isRemoval bool
}

// write makes all of them, also past one that fails, and returns the first error.
// A removal of what is gone is none.
func (s socket) write(all []write) error {
	reqs := make([]*nl.NetlinkRequest, len(all))
	for i, w := range all {
		reqs[i] = s.request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK)
		if w.isRemoval {
			reqs[i] = s.request(unix.RTM_DELNEIGH, unix.NLM_F_ACK)
		}
		reqs[i].AddData(&netlink.Ndmsg{Family: uint8(w.Family), Index: uint32(w.LinkIndex), State: uint16(w.State), Flags: uint8(w.Flags)})
		if w.IP != nil {
			reqs[i].AddData(nl.NewRtAttr(netlink.NDA_DST, w.IP))
		}
		if w.HardwareAddr != nil {
			reqs[i].AddData(nl.NewRtAttr(netlink.NDA_LLADDR, w.HardwareAddr))
		}
	}
	answers, err := s.ask(reqs)
	if err != nil {
		return err
	}
	for i, a := range answers {
		if a.err != nil && !(all[i].isRemoval && gone(a.err)) {
			return a.err
		}
	}
	return nil
}

// askEntry asks for one forwarding entry: that of the bridge of a port (NTF_MASTER)
// or of the device itself (NTF_SELF).
func (s socket) askEntry(port int, flag uint8, mac net.HardwareAddr) *nl.NetlinkRequest {
	req := s.request(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(port), Flags: flag})
	req.AddData(nl.NewRtAttr(netlink.NDA_LLADDR, mac))
	return req
}

// askNeigh asks for one neighbour of a link.
func (s socket) askNeigh(link int, ip net.IP) *nl.NetlinkRequest {
	req := s.request(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: uint8(familyOf(ip)), Index: uint32(link)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, ip))
	return req
}

func familyOf(ip net.IP) int {
	if len(ip) == net.IPv4len {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// neigh is the entry of an answer; nil = there is none.
func (a answer) neigh() (*netlink.Neigh, error) {
	if errors.Is(a.err, unix.ENOENT) {
		return nil, nil
	}
	if a.err != nil {
		return nil, a.err
	}
	if len(a.data) < unix.SizeofNdMsg {
		return nil, unix.EBADMSG
	}
	return netlink.NeighDeserialize(a.data)
}

// askLink asks for a link by its name, without its statistics, which cost most.
func (s socket) askLink(name string) *nl.NetlinkRequest {
	req := s.request(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(extSkipStats)))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	return req
}

// shortLink is what matters of a link here.
type shortLink struct {
	index, master int
	isUp          bool
}

func (a answer) link() (shortLink, error) {
	if a.err != nil {
		return shortLink{}, a.err
	}
	if len(a.data) < unix.SizeofIfInfomsg {
		return shortLink{}, unix.EBADMSG
	}
	info := nl.DeserializeIfInfomsg(a.data)
	l := shortLink{index: int(info.Index), isUp: info.Flags&unix.IFF_UP != 0}
	attrs, err := nl.ParseRouteAttr(a.data[unix.SizeofIfInfomsg:])
	if err != nil {
		return shortLink{}, err
	}
	for _, at := range attrs {
		if at.Attr.Type == unix.IFLA_MASTER && len(at.Value) >= 4 {
			l.master = int(binary.NativeEndian.Uint32(at.Value))
		}
	}
	return l, nil
}
