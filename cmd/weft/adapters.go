package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
)

// raftStream gives Raft its connections from the cluster port.
type raftStream struct{ *wire.Raft }

// Dial implements raft.StreamLayer.
func (s raftStream) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return s.Raft.Dial(string(addr), timeout)
}

// authority signs with the root that the cluster object holds.
type authority struct{}

// VerifyToken implements orchestrator.CA.
func (authority) VerifyToken(c weft.Cluster, token string) (weft.Role, error) {
	switch {
	case ca.Match(token, c.Tokens.Worker):
		return weft.RoleWorker, nil
	case ca.Match(token, c.Tokens.Manager):
		return weft.RoleManager, nil
	}
	return 0, fmt.Errorf("%w: the join token admits nobody: it was rotated or belongs to another cluster; ask a manager for 'weft swarm join-token worker'", weft.ErrForbidden)
}

// Sign implements orchestrator.CA.
func (authority) Sign(c weft.Cluster, csr []byte, node weft.ID, role weft.Role) ([]byte, error) {
	id := ca.Identity{Node: node, Role: role, Cluster: c.ID}
	return ca.Sign(ca.Root{Cert: c.CACert, Key: c.CAKey}, csr, id, time.Now())
}

// NewToken implements orchestrator.CA.
func (authority) NewToken(c weft.Cluster) (string, error) {
	t, err := ca.NewToken(c.CACert)
	if err != nil {
		return "", err
	}
	return t.String(), nil
}

// agentLogs is the agent as other nodes call it.
type agentLogs struct{ a *agent.Agent }

// Drain implements wire.Agent.
func (l agentLogs) Drain(ctx context.Context, owner, task weft.ID) error {
	return l.a.Drain(ctx, owner, task)
}

// Arrive implements wire.Agent.
func (l agentLogs) Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error {
	return l.a.Arrive(ctx, owner, task, networks)
}

// Logs implements wire.Agent.
func (l agentLogs) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return l.a.ContainerLogs(ctx, task, o, f)
}
