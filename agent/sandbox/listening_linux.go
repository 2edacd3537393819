package sandbox

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Sizes and places in what the kernel takes and gives (linux/inet_diag.h): struct
// inet_diag_req_v2 and struct inet_diag_msg, whose struct inet_diag_sockid begins with
// both ports and both addresses.
const (
	diagRequest = 56
	diagStates  = 4 // offset in the request

	diagAnswer = 72
	diagPort   = 4 // of ours, in network order
	diagAddr   = 8
	diagInode  = 68

	diagListen = 1 << 10 // TCP_LISTEN (net/tcp_states.h)
)

// diagSockets asks for TCP sockets in one state.
type diagSockets struct {
	family uint8
	states uint32
}

// Len implements nl.NetlinkRequestData.
func (diagSockets) Len() int { return diagRequest }

// Serialize implements nl.NetlinkRequestData.
func (d diagSockets) Serialize() []byte {
	b := make([]byte, diagRequest)
	b[0], b[1] = d.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[diagStates:], d.states)
	return b
}

// Listener is a listening socket.
type Listener struct {
	Addr  netip.AddrPort
	Inode uint64 // that /proc/PID/fd names
}

// Listening asks the kernel for the listening TCP sockets of the calling thread's network
// namespace, of AF_INET or AF_INET6. It goes through these alone, while /proc/net/tcp goes
// through the connections of all namespaces to print them: on a busy host, megabytes. A
// kernel without inet_diag has an error.
func Listening(family uint8) ([]Listener, error) {
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(diagSockets{family: family, states: diagListen})
	messages, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return nil, fmt.Errorf("list listening sockets: %w", err)
	}
	var out []Listener
	for _, m := range messages {
		s, err := parseDiag(m)
		if err != nil {
			return nil, err
		}
		if s.Addr.Port() != 0 {
			out = append(out, s)
		}
	}
	return out, nil
}

// parseDiag reads one struct inet_diag_msg.
func parseDiag(m []byte) (s Listener, err error) {
	if len(m) < diagAnswer {
		return s, fmt.Errorf("the kernel tells of a socket in %d bytes, want %d", len(m), diagAnswer)
	}
	var size int
	switch m[0] {
	case unix.AF_INET:
		size = 4
	case unix.AF_INET6:
		size = 16
	default:
		return s, fmt.Errorf("the kernel tells of a socket of family %d", m[0])
	}
	a, _ := netip.AddrFromSlice(m[diagAddr : diagAddr+size]) // of one of the two lengths
	at := netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(m[diagPort:]))
	return Listener{at, uint64(binary.NativeEndian.Uint32(m[diagInode:]))}, nil
}
