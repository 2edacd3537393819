package gossip

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/weftnet/weft"
)

// Replica is one node's part in the endpoint table without I/O, goroutine and
// clock: what a Gossip runs on sockets in real time, for those who carry the
// messages and count the time themselves. Who is alive it is told. It is not
// safe for concurrent use.
type Replica struct{ core *core }

// Parcel is a message to other replicas.
type Parcel struct {
	To      []weft.ID
	Message []byte // to be given to Receive of each
	// Stream: it does not fit a datagram, or is part of what goes by a
	// session; then it must arrive.
	Stream bool
	// Wire is what it takes on the way without the headers of UDP, TCP and IP:
	// as a datagram with its frame, by stream with its length and TLS record.
	Wire int
}

// streamOverhead is the length of a message and the header and tag of a TLS
// record (RFC 8446 section 5.2, AES-GCM).
const streamOverhead = 4 + 22

// NewReplica returns one that knows itself only. epoch is as Config.Epoch, but
// not 0; life tells this start of the node from others with the same epoch.
func NewReplica(node weft.ID, epoch, life uint64, p Prover, r *rand.Rand) *Replica {
	return &Replica{newCore(node, makeEpoch(epoch, life), p, r)}
}

// SetLive takes the members that are alive now, this node or not.
func (r *Replica) SetLive(now time.Time, members []weft.ID) { r.core.setLive(now, members) }

// Attach is as Table.Attach.
func (r *Replica) Attach(now time.Time, networks []weft.ID) { r.core.attach(now, networks) }

// Publish is as Table.Publish. It returns what cannot be told to others.
func (r *Replica) Publish(now time.Time, endpoints []weft.Endpoint) (unfit []weft.Endpoint) {
	return r.core.write(now, endpoints)
}

// Tick is to be called about once a second.
func (r *Replica) Tick(now time.Time) { r.core.tick(now) }

// Deadline is when Advance has something to do; zero: not before another call.
func (r *Replica) Deadline() time.Time { return r.core.deadline() }

// Advance does what is due.
func (r *Replica) Advance(now time.Time) { r.core.advance(now) }

// Receive takes a message that another replica has sent and reports whether what
// readers see has changed.
func (r *Replica) Receive(now time.Time, from weft.ID, message []byte, stream bool) (changed bool, err error) {
	m, err := decode(message)
	if err != nil {
		return false, fmt.Errorf("read message of %s: %w", from, err)
	}
	r.core.changed = false
	r.core.receive(now, from, m, stream)
	return r.core.changed, nil
}

// Take returns the messages to send and forgets them. It is to be called after
// each of the calls above that take the time.
func (r *Replica) Take() []Parcel {
	var out []Parcel
	for _, e := range r.core.take() {
		p := Parcel{To: e.to, Message: encode(nil, e.m), Stream: e.stream}
		p.Wire = len(p.Message) + frameOverhead
		if p.Stream = p.Stream || p.Wire > datagramBytes; p.Stream {
			p.Wire = len(p.Message) + streamOverhead
		}
		out = append(out, p)
	}
	return out
}

// Owners is how many owners' tables of a network are known, whether they are
// alive or not; this node's own counts.
func (r *Replica) Owners(network weft.ID) int {
	if n := r.core.nets[network]; n != nil {
		return n.tables.len()
	}
	return 0
}

// Count is how many endpoints of an owner on a network are known; -1: its table is
// not.
func (r *Replica) Count(network, owner weft.ID) int {
	if n := r.core.nets[network]; n != nil {
		if t := n.tables.get(owner); t != nil {
			return int(t.count)
		}
	}
	return -1
}
