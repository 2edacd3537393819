package wire

import (
	"context"
	"fmt"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Peers calls Agent on other nodes.
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

// Drain implements Agent; owner must be this node. Nothing is repeated.
func (p *peerAgent) Drain(ctx context.Context, owner, task weft.ID) error {
	return p.tell(ctx, owner, "Drain", &idRequest{task}, fmt.Sprintf("task %s drains", task))
}

// Arrive implements Agent; owner must be this node. Nothing is repeated.
func (p *peerAgent) Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error {
	return p.tell(ctx, owner, "Arrive", &arriveRequest{task, networks}, fmt.Sprintf("task %s can serve", task))
}

// tell says something of a task of owner, which must be this node.
func (p *peerAgent) tell(ctx context.Context, owner weft.ID, method string, request any, what string) error {
	cc, err := p.conns.get(p.target)
	if err != nil {
		return err
	}
	if self := p.conns.creds.Identity().Node; owner != self {
		return fmt.Errorf("tell node %s that %s: only its own node %s may, this is %s: %w", p.target.peer.Node, what, owner, self, weft.ErrForbidden)
	}
	a := &attempt{}
	err = cc.Invoke(context.WithValue(ctx, attemptKey{}, a), agent+method, request, &empty{}, grpc.Trailer(&a.trailer))
	if status.Code(err) == codes.Unimplemented && fromTrailer(a.trailer) == nil {
		return fmt.Errorf("tell node %s that %s: its version of weft does not know that: %w", p.target.peer.Node, what, weft.ErrUnsupported)
	}
	if err == nil {
		return nil
	}
	return p.failed(ctx, cc, a, err, fmt.Sprintf("tell node %s (%s) that %s", p.target.peer.Node, p.target.addr, what))
}

// failed is the error of a call, with what was tried.
func (p *peerAgent) failed(ctx context.Context, cc *grpc.ClientConn, a *attempt, err error, what string) error {
	v, err := judge(ctx, a, err)
	if v == unknown || v == untouched {
		cc.ResetConnectBackoff() // the next call shall see the node as it is then
		err = fmt.Errorf("%s: %w", what, err)
	}
	return err
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
	return p.failed(ctx, cc, a, err, fmt.Sprintf("read logs of task %s on node %s (%s)", task, p.target.peer.Node, p.target.addr))
}
