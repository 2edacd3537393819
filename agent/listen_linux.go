package agent

import (
	"context"
	"errors"
	"net"

	"github.com/weftnet/weft/vxlan/netns"
)

// resolverAddr is where every task finds its resolver, as in Docker.
const resolverAddr = "127.0.0.11:53"

// dialIn opens a socket to a nameserver inside a namespace, as listenIn does. The
// address is no name, so nothing is looked up. A thread is in the namespace until
// there is a connection, or ctx ends.
func dialIn(ctx context.Context, nsPath, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := netns.Do(nsPath, func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// listenIn opens both sockets inside a namespace; they stay there when the
// thread comes back.
func listenIn(ctx context.Context, nsPath string) (net.PacketConn, net.Listener, error) {
	var pc net.PacketConn
	var ln net.Listener
	err := netns.Do(nsPath, func() error {
		var lc net.ListenConfig
		var err error
		if pc, err = lc.ListenPacket(ctx, "udp4", resolverAddr); err != nil {
			return err
		}
		ln, err = lc.Listen(ctx, "tcp4", resolverAddr)
		return err
	})
	if err == nil {
		return pc, ln, nil
	}
	if pc != nil {
		err = errors.Join(err, pc.Close())
	}
	return nil, nil, err
}
