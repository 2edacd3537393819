package sandbox

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
)

// States of TCP that hold something for the peer: linux/tcp_states.h. Whoever is
// only waiting for the peer's last word (FIN_WAIT2, TIME_WAIT) has no more to say.
const (
	tcpEstablished = 1
	tcpSynRecv     = 3
	tcpFinWait1    = 4
	tcpCloseWait   = 8
	tcpLastAck     = 9
	tcpClosing     = 11
	tcpNewSynRecv  = 12
)

// conn is one TCP socket.
type conn struct {
	state         uint8
	local, remote netip.AddrPort
}

// Connections counts the TCP connections inside a namespace with somebody
// outside of it who may still want something. It does not wait for anything.
func Connections(nsPath string) (int, error) {
	var all []conn
	err := netns.Do(nsPath, func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list, err := complete(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
			if err != nil {
				return fmt.Errorf("list tcp sockets of %s: %w", nsPath, err)
			}
			for _, s := range list {
				local, _ := netip.AddrFromSlice(s.ID.Source)
				remote, _ := netip.AddrFromSlice(s.ID.Destination)
				all = append(all, conn{
					s.State, netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort), netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort),
				})
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return outside(all), nil
}

// outside counts the connections with somebody elsewhere. One whose other end is
// in the list, too, is between two sockets of the namespace.
func outside(all []conn) int {
	type ends struct{ local, remote netip.AddrPort }
	have := map[ends]bool{}
	for _, c := range all {
		have[ends{c.local, c.remote}] = true
	}
	n := 0
	for _, c := range all {
		switch c.state {
		case tcpEstablished, tcpSynRecv, tcpFinWait1, tcpCloseWait, tcpLastAck, tcpClosing, tcpNewSynRecv:
			if !c.local.Addr().IsLoopback() && !c.remote.Addr().IsLoopback() && !have[ends{c.remote, c.local}] {
				n++
			}
		}
	}
	return n
}
