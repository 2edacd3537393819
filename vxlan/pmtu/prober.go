package pmtu

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Our own choices.
const (
	// settle is how long changes of links are collected before the routes are
	// read again.
	settle = 50 * time.Millisecond
)

// Config of a Prober. All fields are required unless they say otherwise.
type Config struct {
	// VTEP is this node's tunnel address: probes leave from it, so that they
	// take the way of the overlay's packets.
	VTEP netip.Addr
	// Port is the UDP port on which peers answer at their tunnel addresses.
	Port uint16
	// Listen has the Prober open that port on VTEP itself. Without it,
	// whoever has the port gives Receive what begins with Magic.
	Listen bool
	// Keys are the cluster's secrets for traffic between members. SetKeys changes
	// them.
	Keys weft.GossipRing
	// Limit is the largest packet in bytes that this host's own link and
	// route take towards a peer.
	Limit func(peer netip.Addr) (int, error)
	// Proven is told that packets of bytes reach a peer, so that what the
	// kernel has learnt to the contrary can be forgotten. Called by Run.
	Proven func(peer netip.Addr, bytes int) error
	// Changed gets a value when links or routes have changed; nil = never.
	// It is read by Run.
	Changed <-chan struct{}
	Log     *slog.Logger
}

// Prober searches the paths to peers. Make it with New, run it with Run, once at a
// time;
// the other methods may be called from any goroutine, before Run, too.
type Prober struct {
	cfg  Config
	sign atomic.Pointer[signer]
	wake chan struct{} // capacity 1: the core was changed; never closed

	// mu guards: core, mtus, changed.
	mu      sync.Mutex
	core    *core
	mtus    map[netip.Addr]int // never written once set
	changed chan struct{}      // closed at the next change of mtus
}

// New checks the configuration; it does no I/O and starts nothing.
func New(cfg Config) (*Prober, error) {
	switch {
	case !cfg.VTEP.IsValid():
		return nil, fmt.Errorf("path probes: no tunnel address: %w", weft.ErrInvalid)
	case cfg.Port == 0:
		return nil, fmt.Errorf("path probes: no port: %w", weft.ErrInvalid)
	case cfg.Limit == nil || cfg.Proven == nil || cfg.Log == nil:
		return nil, fmt.Errorf("path probes: limit, proven and log are needed: %w", weft.ErrInvalid)
	}
	cfg.VTEP = cfg.VTEP.Unmap()
	p := &Prober{
		cfg: cfg, wake: make(chan struct{}, 1), core: newCore(drawID),
		mtus: map[netip.Addr]int{}, changed: make(chan struct{}),
	}
	return p, p.SetKeys(cfg.Keys)
}

// SetKeys changes the keys of probes. When it returns nil, what comes is taken if
// it is by one of these. An invalid ring is weft.ErrInvalid and changes nothing.
func (p *Prober) SetKeys(r weft.GossipRing) error {
	if err := r.Validate(); err != nil {
		return fmt.Errorf("path probes: %w", err)
	}
	sign, err := newSigner(r)
	if err != nil {
		return err
	}
	p.sign.Store(&sign)
	return nil
}

func drawID() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return binary.BigEndian.Uint64(b[:])
}

// Watch replaces the tunnel addresses of the peers that matter.
func (p *Prober) Watch(vteps []netip.Addr) {
	p.mu.Lock()
	p.core.watch(time.Now(), vteps)
	p.mu.Unlock()
	p.kick()
}

// MTUs are the largest packets in bytes that reach peers, by tunnel address; a
// peer that is missing was not looked at yet. The map is not to be written. The
// channel is closed at the next change.
func (p *Prober) MTUs() (map[netip.Addr]int, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mtus, p.changed
}

// Receive takes a datagram that came to the port and returns what to send back
// to from, nil for nothing. It does not block.
func (p *Prober) Receive(from netip.AddrPort, b []byte) []byte {
	f, ok := p.sign.Load().parse(b)
	if !ok {
		return nil
	}
	peer := from.Addr().Unmap()
	switch {
	case f.kind == kindProbe && len(b)+headers(peer) == f.size:
		return p.sign.Load().marshal(frame{kind: kindAnswer, size: f.size, id: f.id}, 0)
	case f.kind == kindAgain:
		p.mu.Lock()
		p.core.ask(time.Now(), peer)
		p.mu.Unlock()
		p.kick()
	}
	return nil
}

// headers of IP and UDP in bytes (RFC 791, RFC 8200, RFC 768).
func headers(a netip.Addr) int {
	if a.Is4() {
		return 20 + 8
	}
	return 40 + 8
}

func (p *Prober) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run searches until ctx ends and returns nil. An error says which socket could
// not be opened.
func (p *Prober) Run(ctx context.Context) error {
	conn, err := p.open(ctx, 0)
	if err != nil {
		return err
	}
	conns := []*net.UDPConn{conn}
	if p.cfg.Listen {
		at, err := p.open(ctx, p.cfg.Port)
		if err != nil {
			return errors.Join(err, conn.Close())
		}
		conns = append(conns, at)
	}
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() { p.read(c) })
	}
	p.loop(ctx, conn)
	for _, c := range conns {
		c.Close() // ends its reader
	}
	wg.Wait()
	return nil
}

// open binds a socket that never lets a packet be cut: neither here nor, by the
// bit that it sets, on the way. What the kernel believes of the path is ignored:
// it is what this is about (ip(7), IP_PMTUDISC_PROBE).
func (p *Prober) open(ctx context.Context, port uint16) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var optErr error
		err := raw.Control(func(fd uintptr) {
			if p.cfg.VTEP.Is4() {
				optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
				return
			}
			optErr = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1))
		})
		return errors.Join(err, optErr)
	}}
	pc, err := lc.ListenPacket(ctx, "udp", netip.AddrPortFrom(p.cfg.VTEP, port).String())
	if err != nil {
		return nil, fmt.Errorf("open socket for path probes: %w", err)
	}
	return pc.(*net.UDPConn), nil
}

// read takes what comes to a socket until it is closed.
func (p *Prober) read(c *net.UDPConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP message about a probe (ECONNREFUSED, EMSGSIZE)
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if f, ok := p.sign.Load().parse(buf[:n]); ok && f.kind == kindAnswer {
			p.mu.Lock()
			p.core.answered(time.Now(), f)
			p.mu.Unlock()
			p.kick()
			continue
		}
		if answer := p.Receive(from, buf[:n]); answer != nil {
			c.WriteToUDPAddrPort(answer, from) // one that is lost is asked for again
		}
	}
}

// loop reads routes and sends what is due.
func (p *Prober) loop(ctx context.Context, conn *net.UDPConn) {
	var read time.Time // when the routes were read
	known := map[netip.Addr]bool{}
	for {
		now := time.Now()
		isNew := p.hasNew(known)
		if isNew || now.Sub(read) >= p.reread() {
			p.readLimits(ctx, known)
			read = now
		}
		next := p.send(conn)
		p.publish()
		wait := min(next, time.Until(read.Add(p.reread())))
		timer := time.NewTimer(max(wait, time.Millisecond))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-p.wake:
		case <-timer.C:
		case <-p.cfg.Changed:
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
			read = time.Time{}
		}
		timer.Stop()
	}
}

// reread is the longest time that routes go unread, if nobody tells of a change: that of a
// check.
func (p *Prober) reread() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.core.pause()
}

// hasNew reports whether a peer is watched whose route was never read, and
// forgets those that are not watched any more.
func (p *Prober) hasNew(known map[netip.Addr]bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(known, func(a netip.Addr, _ bool) bool { return p.core.paths[a] == nil })
	return len(known) < len(p.core.paths)
}

// readLimits asks this host's own routes about every peer.
func (p *Prober) readLimits(ctx context.Context, known map[netip.Addr]bool) {
	p.mu.Lock()
	var peers []netip.Addr
	for a := range p.core.paths {
		peers = append(peers, a)
	}
	p.mu.Unlock()
	for _, a := range peers {
		if ctx.Err() != nil {
			return
		}
		limit, err := p.cfg.Limit(a)
		if err != nil && !known[a] {
			p.cfg.Log.Warn("path to peer has no route", weft.KeyPeer, a, weft.KeyErr, err)
		}
		known[a] = true
		p.mu.Lock()
		p.core.limit(time.Now(), a, limit)
		p.mu.Unlock()
	}
}

// send does what is due and returns how long there is nothing more to do.
func (p *Prober) send(conn *net.UDPConn) time.Duration {
	p.mu.Lock()
	now := time.Now()
	packets := p.core.step(now)
	next := p.core.next()
	p.mu.Unlock()
	for _, k := range packets {
		b := p.sign.Load().marshal(k.frame, k.size-headers(k.to))
		_, err := conn.WriteToUDPAddrPort(b, netip.AddrPortFrom(k.to, p.cfg.Port))
		if errors.Is(err, unix.EMSGSIZE) {
			p.mu.Lock()
			p.core.refused(k.id)
			p.mu.Unlock()
		}
		// Any other error is a packet that was lost: the search knows those.
	}
	if next.IsZero() {
		return period
	}
	return next.Sub(now)
}

// publish tells of what has changed: the kernel first, so that nobody sends by
// the new size what the kernel still refuses by the old one.
func (p *Prober) publish() {
	p.mu.Lock()
	news, mtus := p.core.news(), p.core.mtus()
	p.mu.Unlock()
	for _, c := range news {
		p.tell(c)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if maps.Equal(mtus, p.mtus) {
		return
	}
	p.mtus = mtus
	close(p.changed)
	p.changed = make(chan struct{})
}

// tell passes on what is known of one path now.
func (p *Prober) tell(c change) {
	switch {
	case !c.proven:
		p.cfg.Log.Debug("path mtu is assumed", weft.KeyPeer, c.peer, "mtu", c.mtu, "link", c.cap)
		return
	case c.mtu < c.cap:
		p.cfg.Log.Warn("path mtu is smaller than the link's", weft.KeyPeer, c.peer, "mtu", c.mtu, "link", c.cap)
	default:
		p.cfg.Log.Info("path mtu", weft.KeyPeer, c.peer, "mtu", c.mtu, "link", c.cap)
	}
	if err := p.cfg.Proven(c.peer, c.mtu); err != nil {
		p.cfg.Log.Warn("kernel keeps an old path mtu", weft.KeyPeer, c.peer, "mtu", c.mtu, weft.KeyErr, err)
	}
}
