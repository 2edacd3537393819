package gossip

import (
	"context"
	crand "crypto/rand"
	"encoding/binary"
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
	kick  chan struct{} // room for one: the core has something to send
	stats counters
	// leaves: the end of Run is told to the others.
	leaves atomic.Bool

	// mu guards core, members, endpoints and nodes.
	mu        sync.Mutex
	core      *core
	members   []Member // never written once set
	endpoints *view
	nodes     *view
}

// view is what readers of one kind see. The list is made by its first reader.
type view struct {
	changed chan struct{} // closed by the successor, under Gossip.mu
	once    sync.Once
	parts   []part
	flat    []weft.OwnedEndpoint
}

// part is one owner's share of a view.
type part struct {
	owner   Member
	entries []weft.Endpoint
}

var _ Runner = (*Gossip)(nil)

type counters struct {
	sent, received, foreign, unauthentic, malformed, streamed, joins atomic.Uint64
}

// Stats are counts since New.
type Stats struct {
	FramesSent     uint64 // datagrams and streamed frames
	FramesStreamed uint64 // of these, too big for a datagram
	FramesReceived uint64 // authentic ones
	Foreign        uint64 // dropped: too short, no frame, unknown version
	Unauthentic    uint64 // dropped: another key, changed, or another sender's
	Malformed      uint64 // dropped: authentic, but not to be understood
	Stale          uint64 // tables that were not newer than the known
	Joins          uint64 // attempts to join, by seeds, knocks and digests
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
	g := &Gossip{cfg: cfg, kick: make(chan struct{}, 1), core: newCore(cfg.Node, epoch)}
	g.members = []Member{{ID: cfg.Node, Addr: cfg.Advertise.Addr(), VTEP: cfg.VTEP}}
	g.nodes, g.endpoints = &view{changed: make(chan struct{})}, &view{changed: make(chan struct{})}
	return g, nil
}

// Stats returns the present counts; they are not read in one instant.
func (g *Gossip) Stats() Stats {
	c := &g.stats
	g.mu.Lock()
	stale := g.core.stale
	g.mu.Unlock()
	return Stats{
		FramesSent: c.sent.Load(), FramesStreamed: c.streamed.Load(), FramesReceived: c.received.Load(),
		Foreign: c.foreign.Load(), Unauthentic: c.unauthentic.Load(), Malformed: c.malformed.Load(),
		Stale: stale, Joins: c.joins.Load(),
	}
}

// Publish implements Table.
func (g *Gossip) Publish(endpoints []weft.Endpoint) {
	g.mu.Lock()
	g.core.write(endpoints)
	g.refreshLocked()
	g.mu.Unlock()
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
	v.once.Do(func() {
		for _, p := range v.parts {
			for _, e := range p.entries {
				v.flat = append(v.flat, weft.OwnedEndpoint{Endpoint: e, Owner: p.owner.ID, VTEP: p.owner.VTEP})
			}
		}
	})
	return v.flat, v.changed
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
	next := &view{changed: make(chan struct{})}
	for _, m := range g.members {
		var entries []weft.Endpoint
		if m.ID == g.cfg.Node {
			entries = g.core.own.entries
		} else if p := g.core.peers[m.ID]; p != nil && p.live && p.table != nil {
			entries = p.table.entries
		}
		if len(entries) > 0 {
			next.parts = append(next.parts, part{m, entries})
		}
	}
	old := g.endpoints
	g.endpoints = next
	close(old.changed)
}

// setMembers takes the live members, self included, in order.
func (g *Gossip) setMembers(now time.Time, members []Member) []envelope {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !slices.Equal(members, g.members) {
		g.members = members
		g.core.changed = true // a VTEP may have changed
		old := g.nodes
		g.nodes = &view{changed: make(chan struct{})}
		close(old.changed)
	}
	ids := make([]weft.ID, len(members))
	for i, m := range members {
		ids[i] = m.ID
	}
	out := g.core.setLive(now, ids)
	g.refreshLocked()
	return out
}

// withCore runs fn on the core and makes a new view if that changed something.
func (g *Gossip) withCore(fn func(*core) []envelope) []envelope {
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
	x := newMux(ctx, inner, g.cfg.Guest)
	seal, err := newSealer(g.cfg.Key, g.cfg.Node)
	if err != nil {
		return errors.Join(err, x.Shutdown())
	}
	events := make(chan serf.Event, 64)
	s, err := serf.Create(serfConfig(g.cfg, x, events))
	if err != nil {
		return errors.Join(fmt.Errorf("start membership of node %s: %w", g.cfg.Node, err), x.Shutdown())
	}
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], uint64(time.Now().UnixNano()))
	if _, err := crand.Read(seed[:]); err != nil {
		return errors.Join(fmt.Errorf("draw random seed: %w", err), s.Shutdown())
	}
	l := &loop{
		g: g, serf: s, mux: x, seal: seal, open: newOpener(g.cfg.Key), out: newStreamer(x),
		rand: rand.New(rand.NewChaCha8(seed)), members: make(chan struct{}, 1),
		addrs: map[weft.ID]memberlist.Address{}, seedWait: seedMin,
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
	l.out.wait()
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
		var t *memberlist.NetTransport
		t, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{cfg.Bind.Addr().String()},
			BindPort:  int(cfg.Bind.Port()),
			Logger:    serfLogger(cfg.Log),
		})
		if err == nil {
			if cfg.Advertise.Port() == 0 {
				g.cfg.Advertise = netip.AddrPortFrom(cfg.Advertise.Addr(), uint16(t.GetAutoBindPort()))
			}
			return t, nil
		}
	}
	return nil, fmt.Errorf("listen for gossip on %v (is another node running here?): %w", cfg.Bind, err)
}

// Tags of a member.
const (
	tagVersion = "weft" // of this package's frames
	tagVTEP    = "vtep"
)

func serfConfig(cfg Config, t Transport, events chan<- serf.Event) *serf.Config {
	c := serf.DefaultConfig()
	c.NodeName = string(cfg.Node)
	c.Tags = map[string]string{tagVersion: fmt.Sprint(frameVersion), tagVTEP: cfg.VTEP.String()}
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
	m.SecretKey = cfg.Key
	m.Logger, m.LogOutput = c.Logger, nil
	m.ProbeInterval, m.ProbeTimeout = probeInterval, probeTimeout
	m.SuspicionMult, m.SuspicionMaxTimeoutMult = suspicionMult, maxSuspicion
	m.AwarenessMaxMultiplier = awareness
	m.GossipInterval, m.GossipNodes = gossipInterval, gossipNodes
	m.PushPullInterval = pushPull
	m.TCPTimeout = streamTimeout
	m.UDPBufferSize = datagramBytes
	// A node that comes back with another address is let in once it is dead.
	m.DeadNodeReclaimTime = time.Second
	c.MemberlistConfig = m
	return c
}
