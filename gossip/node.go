package gossip

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"

	"github.com/weftnet/weft"
)

// Gossip is a node's part in membership and endpoint table. It implements
// Runner.
type Gossip struct {
	cfg   Config
	keys  *keys
	kick  chan struct{} // room for one: the core has something to send
	stats counters
	// leaves: the end of Run is told to the others.
	leaves atomic.Bool

	// mu guards core, mux, members, endpoints and nodes.
	mu        sync.Mutex
	mux       *mux // nil before Run
	core      *core
	members   []Member // never written once set
	endpoints *view
	nodes     *view
}

var _ Runner = (*Gossip)(nil)

type counters struct {
	sent, received, foreign, unknown, unauthentic, replayed, oversized, malformed, streamed, joins, doubts, silences atomic.Uint64
}

// Stats are counts since New.
type Stats struct {
	FramesSent     uint64 // datagrams and streamed frames
	FramesStreamed uint64 // of these, too big for a datagram
	FramesReceived uint64 // authentic ones
	Foreign        uint64 // dropped: too short, no frame, unknown version
	Unknown        uint64 // dropped: of a node that is no member here, perhaps not yet
	Unauthentic    uint64 // dropped: another key, changed, or another sender's
	Replayed       uint64 // dropped: came before
	Oversized      uint64 // dropped: longer than any datagram or stream frame
	Malformed      uint64 // dropped: authentic, but not to be understood
	Crowded        uint64 // dropped: frames and streams without room for them, and answers that could not be sent
	Refused        uint64 // updates that their owner has not signed, or too many at once
	Stale          uint64 // updates that were not newer than the known: most came down the other tree
	Wants          uint64 // tables asked for, as they had not come
	Repairs        uint64 // comparisons of whole networks
	Sessions       uint64 // TLS sessions dialled
	SessionsFailed uint64 // messages that no session could take
	SessionsBad    uint64 // sessions refused: no certificate of this cluster, or too many
	Joins          uint64 // attempts to join, by seeds, knocks and digests
	Doubts         uint64 // members not heard of for half a second beyond what answers take
	Silences       uint64 // members taken out of sight as they did not answer
}

// New checks cfg and returns a Gossip that knows itself only. It does no I/O
// and starts nothing.
func New(cfg Config) (*Gossip, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Seeds == nil {
		cfg.Seeds = func() []netip.AddrPort { return nil }
	}
	if cfg.Epoch == 0 {
		cfg.Epoch = uint64(time.Now().UnixMilli())
	}
	epoch := makeEpoch(cfg.Epoch, rand.Uint64())
	r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	g := &Gossip{cfg: cfg, kick: make(chan struct{}, 1), core: newCore(cfg.Node, epoch, proven{cfg.Identity, cfg.Log}, r)}
	var err error
	if g.keys, err = newKeys(cfg.Keys); err != nil {
		return nil, fmt.Errorf("gossip of node %s: %w", cfg.Node, err)
	}
	g.members = []Member{{ID: cfg.Node, Addr: cfg.Advertise.Addr(), VTEP: cfg.VTEP}}
	g.nodes, g.endpoints = &view{changed: make(chan struct{})}, &view{changed: make(chan struct{})}
	return g, nil
}

// Stats returns the present counts; they are not read in one instant.
func (g *Gossip) Stats() Stats {
	c := &g.stats
	g.mu.Lock()
	n, x := g.core.counts, g.mux
	g.mu.Unlock()
	st := Stats{
		FramesSent: c.sent.Load(), FramesStreamed: c.streamed.Load(), FramesReceived: c.received.Load(),
		Foreign: c.foreign.Load(), Unknown: c.unknown.Load(), Unauthentic: c.unauthentic.Load(), Replayed: c.replayed.Load(), Oversized: c.oversized.Load(),
		Malformed: c.malformed.Load() + n.malformed, Refused: n.refused, Stale: n.stale, Wants: n.wants, Repairs: n.repairs,
		Joins: c.joins.Load(), Doubts: c.doubts.Load(), Silences: c.silences.Load(),
	}
	if x != nil {
		st.Foreign += x.foreign.Load()
		st.Crowded = x.dropped.Load()
		st.Sessions, st.SessionsFailed, st.SessionsBad = x.sessions.dialled.Load(), x.sessions.failed.Load(), x.sessions.refused.Load()
	}
	return st
}

// Publish implements Table.
func (g *Gossip) Publish(endpoints []weft.Endpoint) {
	unfit := g.withCore(func(c *core) []weft.Endpoint { return c.write(time.Now(), endpoints) })
	for _, e := range unfit {
		g.cfg.Log.Error("endpoint is not told to others: its network must be an id, its address one of IPv4 or IPv6, its second address of IPv6",
			weft.KeyTask, e.Task, weft.KeyNetwork, e.Network, "addr", e.Addr, "addr6", e.Addr6)
	}
	g.wake()
}

// Attach implements Table.
func (g *Gossip) Attach(networks []weft.ID) {
	g.withCore(func(c *core) []weft.Endpoint {
		c.attach(time.Now(), networks)
		return nil
	})
	g.wake()
}

func (g *Gossip) wake() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// Snapshot implements Table.
func (g *Gossip) Snapshot() ([]weft.OwnedEndpoint, <-chan struct{}) {
	g.mu.Lock()
	v := g.endpoints
	g.mu.Unlock()
	return v.list(), v.changed
}

// Leave implements Runner.
func (g *Gossip) Leave() { g.leaves.Store(true) }

// Members implements Table.
func (g *Gossip) Members() ([]Member, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.members, g.nodes.changed
}

// refreshLocked makes a new view if what is in sight has changed.
func (g *Gossip) refreshLocked() {
	if !g.core.changed {
		return
	}
	g.core.changed = false
	old := g.endpoints
	g.endpoints = old.next(g.core.sight(g.members), g.core.names())
	close(old.changed)
}

// setMembers takes the live members, self included, in order.
func (g *Gossip) setMembers(now time.Time, members []Member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.Equal(members, g.members) {
		return
	}
	onlyDoubts := slices.EqualFunc(members, g.members, sameMember)
	g.members = members
	old := g.nodes
	g.nodes = &view{changed: make(chan struct{})}
	close(old.changed)
	if onlyDoubts {
		return
	}
	g.core.changed = true // a VTEP may have changed
	ids := make([]weft.ID, len(members))
	for i, m := range members {
		ids[i] = m.ID
	}
	g.core.setLive(now, ids)
	g.refreshLocked()
}

// sameMember leaves out whether it is doubted: its endpoints are in sight all the same.
func sameMember(a, b Member) bool {
	a.Doubted = b.Doubted
	return a == b
}

// withCore runs fn on the core and makes a new view if that changed something.
func (g *Gossip) withCore(fn func(*core) []weft.Endpoint) []weft.Endpoint {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := fn(g.core)
	g.refreshLocked()
	return out
}

// Run implements Runner.
func (g *Gossip) Run(ctx context.Context) error {
	inner := g.cfg.Transport
	if inner == nil {
		var err error
		if inner, err = g.listen(); err != nil {
			return err
		}
	}
	x := newMux(ctx, inner, g.cfg)
	g.mu.Lock()
	g.mux = x
	g.mu.Unlock()
	ring := g.keys.now()
	seal, err := newSealer(ring.Sends.Key, g.cfg.Node)
	if err != nil {
		return errors.Join(err, x.Shutdown())
	}
	events := make(chan serf.Event, 64)
	s, err := serf.Create(g.serfConfig(x, events))
	if err != nil {
		return errors.Join(fmt.Errorf("start membership of node %s: %w", g.cfg.Node, err), x.Shutdown())
	}
	l := &loop{
		g: g, serf: s, mux: x, ring: ring, failed: failures{}, seal: seal, open: newOpener(secrets(ring)...),
		members: make(chan struct{}, 1),
		watch:   newWatch(g.cfg.Node, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))),
		addrs:   map[weft.ID]memberlist.Address{}, seeds: seeding{wait: seedMin},
	}
	// serf holds a lock while it writes an event, and the loop asks serf
	// for members: so nobody but this goroutine may read events.
	l.wg.Go(func() { l.drain(events) })
	err = l.run(ctx)
	if g.leaves.Load() {
		if err := s.Leave(); err != nil {
			g.cfg.Log.Warn("cannot leave the members cleanly", weft.KeyErr, err)
		}
	}
	err = errors.Join(err, s.Shutdown())
	l.wg.Wait()
	g.setMembers(time.Now(), []Member{l.self()})
	return err
}

// listen opens the sockets. It fills in the advertised port if the listener
// chose it.
func (g *Gossip) listen() (Transport, error) {
	cfg, tries := g.cfg, 1
	if cfg.Bind.Port() == 0 {
		tries = 10 // the port free on TCP may be taken on UDP
	}
	var err error
	for range tries {
		var s *sockets
		if s, err = openSockets(cfg.Bind, cfg.Log); err == nil {
			if cfg.Advertise.Port() == 0 {
				g.cfg.Advertise = netip.AddrPortFrom(cfg.Advertise.Addr(), s.port())
			}
			return s, nil
		}
	}
	return nil, fmt.Errorf("listen for gossip on %v (is another node running here?): %w", cfg.Bind, err)
}

// Tags of a member.
const (
	tagVersion = "weft" // of this package's frames
	tagVTEP    = "vtep"
	tagNumbers = "numbers" // questions may have some
)

func (g *Gossip) serfConfig(t Transport, events chan<- serf.Event) *serf.Config {
	cfg := g.cfg
	c := serf.DefaultConfig()
	c.NodeName = string(cfg.Node)
	c.Tags = map[string]string{tagVersion: fmt.Sprint(frameVersion), tagVTEP: cfg.VTEP.String(), tagNumbers: "1"}
	c.EventCh = events
	c.Logger, c.LogOutput = serfLogger(cfg.Log), nil
	c.BroadcastTimeout, c.LeavePropagateDelay = leaveTimeout, leaveSpread
	c.TombstoneTimeout = forgetAfter
	c.DisableCoordinates = true
	// serf's resolution of a name conflict shuts one side down silently.
	c.EnableNameConflictResolution = false

	m := memberlist.DefaultLANConfig()
	m.Transport = t
	m.AdvertiseAddr, m.AdvertisePort = cfg.Advertise.Addr().String(), int(cfg.Advertise.Port())
	m.Keyring = g.keys.library
	m.Logger, m.LogOutput = c.Logger, nil
	m.ProbeInterval, m.ProbeTimeout = probeInterval, probeTimeout
	m.SuspicionMult, m.SuspicionMaxTimeoutMult = suspicionMult, maxSuspicion
	m.AwarenessMaxMultiplier = awareness
	m.GossipInterval, m.GossipNodes = gossipInterval, gossipNodes
	m.PushPullInterval = pushPull
	m.TCPTimeout = streamTimeout
	m.UDPBufferSize = datagramBytes
	m.EnableCompression = false // of packets of some dozen bytes, at a cost above that of their encryption
	// A node that comes back with another address is let in once it is dead.
	m.DeadNodeReclaimTime = time.Second
	c.MemberlistConfig = m
	return c
}
