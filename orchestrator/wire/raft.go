package wire

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Raft carries Raft over the cluster port: connections by ALPN weft-raft, both
// ends managers of this cluster. With a Dial that takes raft.ServerAddress it
// is a raft.StreamLayer. Pass it to ServerConfig too.
type Raft struct {
	*queue
	creds *ca.Credentials
}

// NewRaft makes the carrier. advertise is this manager's cluster port as other
// managers dial it; Addr answers it.
func NewRaft(creds *ca.Credentials, advertise netip.AddrPort) *Raft {
	return &Raft{queue: newQueue(net.TCPAddrFromAddrPort(advertise)), creds: creds}
}

// Dial connects to another manager within timeout. The server is proven to be
// a manager of this cluster; a refusal by it shows at the first read.
func (r *Raft) Dial(addr string, timeout time.Duration) (net.Conn, error) {
	c, err := tls.DialWithDialer(dialer(timeout), "tcp", addr, r.creds.ClientConfig(ca.ProtoRaft, ca.Peer{Manager: true}))
	if err != nil {
		return nil, fmt.Errorf("dial raft of manager %s: %w: %w", addr, err, weft.ErrUnavailable)
	}
	return c, nil
}
