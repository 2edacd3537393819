package wire

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Peers calls Agent on other nodes; only managers may.
type Peers struct{ conns *conns }

// NewPeers dials nothing.
func NewPeers(creds *ca.Credentials) *Peers { return &Peers{conns: newConns(creds)} }

// Run closes all connections when ctx ends; calls after that fail.
func (p *Peers) Run(ctx context.Context) error { return p.conns.run(ctx) }

// Agent is the agent of one node, whose cluster port is addr. The server's
// certificate must be node's.
func (p *Peers) Agent(node weft.ID, addr netip.AddrPort) Agent {
	return &peerAgent{conns: p.conns, target: target{addr: addr, peer: ca.Peer{Node: node}}}
}

type peerAgent struct {
	conns  *conns
	target target
}

// Logs implements Agent. Nothing is repeated: a node that cannot be reached is
// weft.ErrUnavailable.
func (p *peerAgent) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cc, err := p.conns.get(p.target)
	if err != nil {
		return err
	}
	a := &attempt{}
	err = follow(context.WithValue(ctx, attemptKey{}, a), cc, a, agent+"Logs", logsRequest{task, o}, f)
	if err == nil {
		return nil
	}
	if own, ok := err.(*callerError); ok {
		return own.err
	}
	v, err := judge(ctx, a, err)
	if v == unknown || v == untouched {
		cc.ResetConnectBackoff() // the next call shall see the node as it is then
		err = fmt.Errorf("read logs of task %s on node %s (%s): %w", task, p.target.peer.Node, p.target.addr, err)
	}
	return err
}
