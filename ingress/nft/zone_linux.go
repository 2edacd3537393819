package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// addZoneRule appends a rule to a chain of the calling thread's namespace, in a
// transaction of its own. The expression that sets the zone of connection tracking
// gets the attribute by which the zone is that of the original direction alone ("ct
// original zone set"): the library writes it for addresses and ports only. Answers
// are looked up without a zone.
func addZoneRule(table *nftables.Table, chain string, exprs []expr.Any, words string) error {
	fam := byte(table.Family)
	var list []byte
	for i, e := range exprs {
		b, err := expr.Marshal(fam, e)
		if err != nil {
			return fmt.Errorf("encode expression %d: %w", i+1, err)
		}
		if ct, ok := e.(*expr.Ct); ok && ct.Key == expr.CtKeyZONE && ct.SourceRegister {
			data, err := expr.MarshalExprData(fam, e)
			if err != nil {
				return fmt.Errorf("encode expression %d: %w", i+1, err)
			}
			data = append(data, attribute(unix.NFTA_CT_DIRECTION, []byte{0})...) // IP_CT_DIR_ORIGINAL
			b = append(attribute(unix.NFTA_EXPR_NAME, []byte("ct\x00")), attribute(unix.NLA_F_NESTED|unix.NFTA_EXPR_DATA, data)...)
		}
		list = append(list, attribute(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, b)...)
	}
	body := attribute(unix.NFTA_RULE_TABLE, []byte(table.Name+"\x00"))
	body = append(body, attribute(unix.NFTA_RULE_CHAIN, []byte(chain+"\x00"))...)
	body = append(body, attribute(unix.NLA_F_NESTED|unix.NFTA_RULE_EXPRESSIONS, list)...)
	body = append(body, attribute(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, words))...)

	const rule = 2 // sequence numbers of the three messages
	batch := message(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, 1, unix.AF_UNSPEC, nil)
	batch = append(batch, message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE,
		unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_APPEND, rule, fam, body)...)
	batch = append(batch, message(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, 3, unix.AF_UNSPEC, nil)...)
	return transact(batch, rule)
}

// transact sends a batch and waits for the answer to the message seq in it.
func transact(batch []byte, seq uint32) error {
	return talk(batch, func(kind uint16, of uint32, _ []byte) bool { return kind == unix.NLMSG_ERROR && of == seq })
}

// dump asks for all objects of a kind that match body, and calls f with the
// attributes of each. It is unix.EINTR if a change has interrupted it.
func dump(kind uint16, fam byte, body []byte, f func(body []byte)) error {
	const seq = 1
	msg := message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq, fam, body)
	return talk(msg, func(kind uint16, _ uint32, b []byte) bool {
		if kind == unix.NLMSG_DONE {
			return true
		}
		if len(b) > 4 {
			f(b[4:]) // behind the header of nfnetlink
		}
		return false
	})
}

// openNetlink opens a socket in the calling thread's namespace. Its buffers are limits
// and not reserved; without privileges the kernel's own apply.
func openNetlink() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("open netlink: %w", err)
	}
	for _, o := range [][3]int{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, receiveBuffer}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[0], o[2]) == nil {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[1], o[2]); err != nil {
			return -1, errors.Join(fmt.Errorf("prepare netlink: %w", err), unix.Close(fd))
		}
	}
	limit := unix.NsecToTimeval(answerLimit.Nanoseconds())
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)); err != nil {
		return -1, errors.Join(fmt.Errorf("prepare netlink: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// talk sends to the kernel, on a socket of its own in the calling thread's
// namespace, and gives done what comes back until it is, or an error comes.
func talk(msg []byte, done func(kind uint16, seq uint32, body []byte) bool) (err error) {
	fd, err := openNetlink()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netlink: %w", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for the kernel's answer: %w", err)
		}
		for b := buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return errors.New("the kernel's answer cannot be read")
			}
			kind, flags, seq, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:size]
			if (kind == unix.NLMSG_ERROR || kind == unix.NLMSG_DONE) && len(body) >= 4 {
				if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
					return unix.Errno(-code)
				}
			}
			if flags&unix.NLM_F_DUMP_INTR != 0 {
				return unix.EINTR
			}
			if done(kind, seq, body) {
				return nil
			}
			b = b[min(len(b), align(size)):]
		}
	}
}

// message is one with the header of nfnetlink (linux/netfilter/nfnetlink.h).
func message(kind, flags uint16, seq uint32, fam byte, body []byte) []byte {
	resource := uint16(0)
	if kind == unix.NFNL_MSG_BATCH_BEGIN || kind == unix.NFNL_MSG_BATCH_END {
		resource = unix.NFNL_SUBSYS_NFTABLES
	}
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+4+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // to the kernel
	b = append(b, fam, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, resource)
	return append(b, body...) // attributes are padded
}

// attribute is one of netlink, padded.
func attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.NLA_HDRLEN+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), data...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func align(n int) int { return (n + 3) &^ 3 }
