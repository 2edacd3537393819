package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Config is what a Manager stands on.
type Config struct {
	// Dir holds the Raft log and snapshots, in Dir/raft. One process at a
	// time may use it.
	Dir string
	// Node is this node's id, and its id in the Raft group.
	Node weft.ID
	// Addr is the advertised cluster port, and its address in the Raft
	// group.
	Addr netip.AddrPort
	// Stream carries Raft between managers: package wire's listener for
	// ALPN "weft-raft". Not used when Transport is set.
	Stream raft.StreamLayer
	// Bootstrap makes this node the first manager of a new cluster. nil =
	// the node has state on disk, or was admitted to a cluster, whose leader
	// will contact it. With state on disk it is used only if that state
	// stops before the cluster object: an init that was cut off.
	Bootstrap *Bootstrap
	// CA checks tokens and signs certificates.
	CA CA
	// Logs reaches the agent of a node.
	Logs func(ctx context.Context, node weft.Node) (wire.Agent, error)
	Log  *slog.Logger
	// Heard says whether gossip hears a node now. One that it hears may send no report
	// for twice as long before it is taken for down: its way has been cut and is whole
	// again, and TCP takes a second or two to find that out. It may be called from any
	// goroutine and must not block. nil = it hears nobody.
	Heard func(weft.ID) bool
	// Timing of Raft; zero fields = DefaultTiming.
	Timing Timing

	// Transport and Stores replace network and disk, for tests of clusters
	// in memory. nil = Stream and Dir.
	Transport raft.Transport
	Stores    *Stores
}

// Bootstrap is the content of a new cluster, made by the one who initialises
// it: secrets and keys are drawn outside of the replicated state.
type Bootstrap struct {
	// Cluster without Meta.
	Cluster weft.Cluster
	// Node is this node with its description and addresses; its role,
	// manager status and ingress address are filled in.
	Node weft.Node
}

// CA is what admission needs of the certificate authority, whose certificate,
// key and tokens are in the cluster object. Implementations are stateless and
// safe for concurrent use.
type CA interface {
	// VerifyToken says which role the token admits to; weft.ErrForbidden
	// otherwise.
	VerifyToken(c weft.Cluster, token string) (weft.Role, error)
	// Sign answers the PEM chain for a PEM request; weft.ErrInvalid when
	// the request is broken.
	Sign(c weft.Cluster, csr []byte, node weft.ID, role weft.Role) ([]byte, error)
	// NewToken draws a token with the digest of c's certificate.
	NewToken(c weft.Cluster) (string, error)
}

// Stores are where Raft keeps its log, its vote and its snapshots.
type Stores struct {
	Log       raft.LogStore
	Stable    raft.StableStore
	Snapshots raft.SnapshotStore
	// Failed is closed when Log takes no more writes, and Err says why: then the
	// manager ends. Nil: that is never told.
	Failed <-chan struct{}
	Err    func() error
}

// Timing bounds how fast a lost leader is noticed. Shorter elects sooner and,
// on a machine whose disk or scheduler stalls for as long, for nothing.
type Timing struct {
	// Heartbeat without which a follower stands for election. Default
	// 500 ms, at least 50 ms: an fsync was seen to take 18 ms at p99. Where
	// managers are far from each other it is longer (patience).
	Heartbeat time.Duration
	// Lease after which a leader that hears no majority steps down. Default
	// Heartbeat, never more than it.
	Lease time.Duration
	// Reconcile is the shortest time between two passes of the leader's
	// loop. Default 2 ms.
	Reconcile time.Duration
}

// DefaultTiming is for a LAN and ordinary disks: the next commit after the loss
// of a leader comes in about 1 s.
func DefaultTiming() Timing {
	return Timing{Heartbeat: 500 * time.Millisecond, Lease: 500 * time.Millisecond, Reconcile: 2 * time.Millisecond}
}

func (c *Config) setDefaults() {
	d := DefaultTiming()
	if c.Timing.Heartbeat == 0 {
		c.Timing.Heartbeat = d.Heartbeat
	}
	if c.Timing.Lease == 0 {
		c.Timing.Lease = c.Timing.Heartbeat
	}
	if c.Timing.Reconcile == 0 {
		c.Timing.Reconcile = d.Reconcile
	}
}

// Validate reports what is missing or out of bounds.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	need(c.Dir != "" || c.Stores != nil, "Dir is empty")
	need(c.Node.Valid(), fmt.Sprintf("Node %q is not an id", c.Node))
	need(c.Addr.IsValid() && c.Addr.Port() != 0 && !c.Addr.Addr().IsUnspecified(), fmt.Sprintf("Addr %s cannot be dialled", c.Addr))
	need(c.Stream != nil || c.Transport != nil, "Stream is nil")
	need(c.CA != nil, "CA is nil")
	need(c.Logs != nil, "Logs is nil")
	need(c.Log != nil, "Log is nil")
	need(c.Timing.Heartbeat >= 50*time.Millisecond, fmt.Sprintf("Timing.Heartbeat %s is below 50ms", c.Timing.Heartbeat))
	need(c.Timing.Lease > 0 && c.Timing.Lease <= c.Timing.Heartbeat, fmt.Sprintf("Timing.Lease %s is not within (0, Heartbeat]", c.Timing.Lease))
	need(c.Timing.Reconcile > 0, "Timing.Reconcile is negative")
	if b := c.Bootstrap; b != nil {
		need(b.Cluster.ID.Valid(), fmt.Sprintf("Bootstrap.Cluster.ID %q is not an id", b.Cluster.ID))
		need(b.Node.ID == c.Node, fmt.Sprintf("Bootstrap.Node.ID %q is not this node's", b.Node.ID))
		need(len(b.Cluster.AddrPools) > 0 && b.Cluster.MaskLength > 0, "Bootstrap.Cluster has no address pools or no mask length")
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("configuration of the manager: %w: %w", weft.ErrInvalid, err)
	}
	return nil
}
