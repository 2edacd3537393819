package main

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/native"
	"github.com/weftnet/weft/vxlan/pmtu"
)

// underlay is the network between the nodes as this one sees it. It implements
// agent.Underlay.
type underlay struct {
	*pmtu.Prober
	vtep netip.Addr
	// natives gets the prober of ways without encapsulation once the engines are
	// made, nil where they always encapsulate. Capacity 1; sent to once, by
	// member.makeEngines; never closed.
	natives chan *natives
	log     *slog.Logger
	changed chan struct{} // capacity 1: a link or route of this host; sent to by run, never closed
}

// newUnderlay composes; nothing runs yet. Probes share gossip's port, which
// nodes must let through anyway. Gossip receives them where it listens on the
// tunnel address; elsewhere the prober does.
func newUnderlay(s memberState, log *slog.Logger) (*underlay, error) {
	u := &underlay{vtep: s.DataPath, log: log, changed: make(chan struct{}, 1), natives: make(chan *natives, 1)}
	var err error
	u.Prober, err = pmtu.New(pmtu.Config{
		VTEP: s.DataPath, Port: weft.GossipPort, Keys: s.Cluster.GossipRing(), Changed: u.changed, Log: log,
		Listen: !s.Listen.Addr().IsUnspecified() && s.Listen.Addr().Unmap() != s.DataPath.Unmap(),
		Proven: func(peer netip.Addr, bytes int) error { return linux.PathProven(s.DataPath, peer, bytes) },
		Limit:  func(peer netip.Addr) (int, error) { return linux.PathLimit(s.DataPath, peer) },
	})
	if err != nil {
		return nil, err
	}
	return u, nil
}

// newNatives composes the prober of an overlay engine that can do without
// encapsulation; nil for any other.
func newNatives(vtep netip.Addr, overlay vxlan.Engine, log *slog.Logger) (*natives, error) {
	e, ok := overlay.(*bpf.Engine)
	if !ok {
		return nil, nil
	}
	p, err := native.New(native.Config{Open: func() (native.Link, error) { return e.OpenSegment() }, Log: log})
	if err != nil {
		return nil, err
	}
	return &natives{p, vtep}, nil
}

// natives proves to which nodes packets may go without encapsulation. It
// implements agent.Natives.
type natives struct {
	*native.Prober
	vtep netip.Addr
}

// CutsTunnels implements agent.Natives.
func (n *natives) CutsTunnels() (bool, error) { return linux.CutsTunnels(n.vtep) }

// guest is the prober at gossip's port.
func (u *underlay) guest() gossip.Guest {
	return gossip.Guest{Magic: pmtu.Magic, Receive: u.Receive}
}

// MTU implements agent.Underlay.
func (u *underlay) MTU() (int, error) { return linux.UnderlayMTU(u.vtep) }

// run probes until ctx ends and returns nil. A host whose tunnel address is not
// there yet, as at boot, or comes back, is no reason to end a node.
func (u *underlay) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return u.keep(ctx, func(ctx context.Context) error { return linux.WatchUnderlay(ctx, u.changed) })
	})
	g.Go(func() error { return u.keep(ctx, u.Run) })
	g.Go(func() error {
		select {
		case n := <-u.natives:
			if n != nil {
				return u.keep(ctx, n.Run)
			}
		case <-ctx.Done():
		}
		return nil
	})
	return g.Wait()
}

// underlayRetry is the pause before what has failed is begun anew.
const underlayRetry = time.Second

// keep runs f until ctx ends, again after a failure. The same failure is logged
// once.
func (u *underlay) keep(ctx context.Context, f func(context.Context) error) error {
	last := ""
	for {
		err := f(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && err.Error() != last {
			last = err.Error()
			u.log.Warn("paths to other nodes are not watched", weft.KeyErr, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(underlayRetry):
		}
	}
}
