package gossip

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// Transport carries packets and streams between nodes; it is memberlist's.
type Transport = memberlist.NodeAwareTransport

// Failure detection. A member is probed each probeInterval in turn; one that
// answers neither directly within probeTimeout nor through others is suspect,
// and dead when it has not contradicted for
//
//	suspicionMult x max(1, log10(members)) x probeInterval
//
// once a second member suspects it too, and maxSuspicion times that until then.
// Among few a dead node is thus failed 4 s after the first suspicion. It is out of sight before
// (watch.go), without membership being told: a verdict of membership is spread, and has to
// be refuted. So membership has time: where a way and back takes longer than
// probeTimeout, or a node waits for the processor as long, everybody is suspect again and again, and only
// has to say so. memberlist stretches the timeouts of a node that finds itself slow, up
// to awareness times.
const (
	probeInterval = time.Second
	probeTimeout  = 500 * time.Millisecond
	suspicionMult = 4
	maxSuspicion  = 3
	awareness     = 8

	// gossipInterval and gossipNodes spread news of members: 100 ms and 2
	// reach 200 members in about half a second.
	gossipInterval = 100 * time.Millisecond
	gossipNodes    = 2
	// pushPull is the period of memberlist's full exchange with one member.
	pushPull = 15 * time.Second

	// leaveTimeout bounds each half of telling the others that we go, and
	// leaveSpread lets the word get round while we still answer.
	leaveTimeout = time.Second
	leaveSpread  = 200 * time.Millisecond
)

// The endpoint table.
const (
	// datagramBytes is the biggest frame sent as a datagram: with IPv6 and
	// UDP headers it fits the smallest MTU of IPv6, so it is never cut up.
	// What is bigger goes by stream.
	datagramBytes = 1232
	// tickInterval paces digests, knocks and the search for seeds.
	tickInterval = time.Second
	// streamTimeout bounds dialling, a handshake and each write of a stream.
	streamTimeout = 2 * time.Second
	// maxStreamFrame bounds a message of a session: maxEntries entries of 45
	// bytes are below it.
	maxStreamFrame = 8 << 20
	// maxStreams bounds inbound streams of which it is not yet known what
	// they are.
	maxStreams = 32
)

// Seeds are tried again after seedMin, doubling up to seedAlone while there is
// no other member, up to seedMax otherwise (two halves that never met).
const (
	seedMin   = 250 * time.Millisecond
	seedAlone = 2 * time.Second
	seedMax   = 30 * time.Second
)

// newcomerFor is how long a node that was alone takes every difference in who is alive
// for its own lack. Members of old do not: a single newcomer, whose news takes half a
// second to get round, would set half of them to full exchanges.
const newcomerFor = 10 * time.Second

// Config of a Gossip.
type Config struct {
	// Node is this node's id, its name among the members.
	Node weft.ID
	// Bind is where UDP and TCP listen. Port 0 takes a free one.
	Bind netip.AddrPort
	// Advertise is where others reach this node; its port 0 means the
	// port listened on.
	Advertise netip.AddrPort
	// VTEP is the node's tunnel address, told to all members.
	VTEP netip.Addr
	// Seeds returns gossip addresses of other nodes, tried until they are
	// members. It is called once a second from Run and must not block.
	Seeds func() []netip.AddrPort
	// Keys are the cluster's. They protect membership and table alike. SetKeys
	// changes them.
	Keys weft.GossipRing
	// Epoch should be greater in every life of the node than in the one
	// before, and below 1<<48. 0 takes the clock (milliseconds since 1970).
	// One that did not grow is found out when a member shows a newer stamp
	// from the former life, and raised; it only costs a round trip.
	Epoch uint64
	// Identity proves what this node says of itself, and who others are.
	Identity Identity
	Log      *slog.Logger
	// Guest shares the UDP port; the zero value is none.
	Guest Guest
	// Transport replaces the sockets; Run shuts it down. nil means sockets
	// at Bind.
	Transport Transport
}

// Guest is somebody else who receives datagrams on the UDP port.
type Guest struct {
	// Magic is the first byte of its datagrams: none that gossip uses.
	Magic byte
	// Receive takes one and returns what to send back, nil for nothing. It
	// must not block, and keeps none of b.
	Receive func(from netip.AddrPort, b []byte) (answer []byte)
}

// firstGuest is the least Magic of a guest: below are memberlist's message types
// and a TLS handshake (see frameMagic).
const firstGuest byte = 0x20

// Validate reports the first field that is wrong, wrapping weft.ErrInvalid.
func (c Config) Validate() error {
	switch {
	case !c.Node.Valid():
		return fmt.Errorf("gossip config: node id %q is not a node id: %w", c.Node, weft.ErrInvalid)
	case c.Keys.Validate() != nil:
		return fmt.Errorf("gossip config: %w", c.Keys.Validate())
	case !c.Bind.IsValid() && c.Transport == nil:
		return fmt.Errorf("gossip config: no address to listen on: %w", weft.ErrInvalid)
	case !c.Advertise.Addr().IsValid() || c.Advertise.Addr().IsUnspecified():
		return fmt.Errorf("gossip config: advertise address %v is none that others can reach: %w", c.Advertise, weft.ErrInvalid)
	case !c.VTEP.IsValid() || c.VTEP.IsUnspecified():
		return fmt.Errorf("gossip config: VTEP address %v is none that others can reach: %w", c.VTEP, weft.ErrInvalid)
	case c.Epoch >= 1<<(64-lifeBits):
		return fmt.Errorf("gossip config: epoch %d is not below 1<<48: %w", c.Epoch, weft.ErrInvalid)
	case c.Guest.Receive != nil && (c.Guest.Magic < firstGuest || c.Guest.Magic == frameMagic || c.Guest.Magic == memberlistHasLabel):
		return fmt.Errorf("gossip config: guest's first byte %#x is one of gossip's: %w", c.Guest.Magic, weft.ErrInvalid)
	case c.Identity == nil:
		return fmt.Errorf("gossip config: Identity is nil: %w", weft.ErrInvalid)
	case c.Log == nil:
		return fmt.Errorf("gossip config: Log is nil: %w", weft.ErrInvalid)
	}
	return nil
}
