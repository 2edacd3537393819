// Package gossip tells every node which nodes are alive and which endpoints
// they run.
//
// It owns membership (serf) and the endpoint table: of each network and owner an
// epoch, a version and entries, written by the owner only. It does not own desired
// state (orchestrator) and decides nothing from what it carries. A Gossip is
// run by the agent; its methods may be called from any goroutine.
package gossip

import (
	"context"
	"net/netip"

	"github.com/weftnet/weft"
)

// Table is the endpoint table as its users see it. The slices it returns are
// shared and must not be written.
type Table interface {
	// Publish replaces this node's whole set of endpoints; a set equal to
	// the last is not sent. Does not block on the network. Until the first
	// Publish of a new life, others keep what this node last published.
	Publish(endpoints []weft.Endpoint)
	// Attach says which networks this node takes part in, besides those that
	// it publishes endpoints of. Of other networks it learns nothing. Does
	// not block on the network.
	Attach(networks []weft.ID)
	// Snapshot returns all endpoints of live owners on the networks this node
	// takes part in, its own included, ordered by owner and network, and a
	// channel that is closed at the next change.
	Snapshot() (endpoints []weft.OwnedEndpoint, changed <-chan struct{})
	// Members returns the live members, this node included, ordered by id,
	// and a channel closed at the next change.
	Members() (members []Member, changed <-chan struct{})
}

// Member is a live node.
type Member struct {
	ID   weft.ID
	Addr netip.Addr // of its gossip port
	VTEP netip.Addr
	// Doubted: it has been silent for so long that it is about to be given up.
	// Whoever has another way to ask should ask now.
	Doubted bool
}

// Runner is the life of a Table.
type Runner interface {
	Table
	// Run joins the seeds, serves until ctx ends and returns nil. It goes
	// without a word: to the others it is as if the process had died, for a
	// daemon that stops leaves running containers behind. An error says why
	// it could not start or go on. It is called once.
	Run(ctx context.Context) error
	// Leave makes the end of Run a departure: the others are told, and see
	// neither this node nor its endpoints any more. It returns at once and
	// cannot be taken back.
	Leave()
}
