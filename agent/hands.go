package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// hands are the part of the plane that works on the kernel: one pass at a time, in
// a goroutine of its own, because the kernel may take long and names need not wait.
//
//	run:   look ── begin ──► see what comes, name what is held ──► settle
//	                │              ▲ step                ▲ last step
//	pass:           └── host ── overlay ── balancers ── overlay
//
// A step is sent before the kernel changes and after: run has taken it when the
// pass goes on, so that no name is given by what the kernel does not hold any more.
type hands struct {
	steps chan step // from the pass to run; never closed

	// Owned by run: what the kernel surely holds, each of them, between which
	// a pass is just turning it (none = nothing is sure); what the host has said.
	// look is the newest.
	holds []vxlan.State
	facts facts
	look  look
	// deriver made it; by prime first, before run.
	deriver netstate.Deriver

	// Owned by the pass: what the last one left in the kernel, and that it surely did;
	// the published ports that it has said not to be answered here.
	have       vxlan.State
	isSound    bool
	unanswered map[string]bool
}

// step is how far a pass is.
type step struct {
	holds []vxlan.State
	// named, of a pass whose balancers have turned, is named from now on.
	named vxlan.State

	// Of the last step: how the pass went.
	isLast bool
	goal   goal
	facts  *facts // nil = the host has not said
	err    error
}

// missing are the addresses of want that the kernel does not surely hold.
func (h *hands) missing(want vxlan.State) map[weft.ID]map[netip.Addr]bool {
	if len(h.holds) == 0 {
		return netstate.Missing(vxlan.State{}, want)
	}
	out := netstate.Missing(h.holds[0], want)
	for _, s := range h.holds[1:] {
		for id, m := range netstate.Missing(s, want) {
			if out[id] == nil {
				out[id] = m
				continue
			}
			for a := range m {
				out[id][a] = true
			}
		}
	}
	return out
}

// facts are what the host itself says.
type facts struct {
	noIPv6      bool
	mtu         int
	cutsTunnels bool
	addrs       []weft.HostAddr
	gateway     ingress.Gateway
}

func (f *facts) put(in *netstate.Input) {
	in.NoIPv6, in.MTU, in.CutsTunnels, in.HostAddrs, in.Gateway = f.noIPv6, f.mtu, f.cutsTunnels, f.addrs, f.gateway
}

func (f *facts) equal(o *facts) bool {
	return f.noIPv6 == o.noIPv6 && f.mtu == o.mtu && f.cutsTunnels == o.cutsTunnels && slices.Equal(f.addrs, o.addrs) &&
		f.gateway.Bridge == o.gateway.Bridge && f.gateway.Subnet == o.gateway.Subnet
}

// learn takes what the host has said and reports whether that is news.
func (p *plane) learn(f *facts) bool {
	if f == nil || f.equal(&p.hands.facts) {
		return false
	}
	p.hands.facts = *f
	return true
}

// readHost asks the host for what the input needs.
func (p *plane) readHost(ctx context.Context, in *netstate.Input) (f facts, err error) {
	f.noIPv6 = !hasIPv6()
	if f.mtu, err = p.underlay.MTU(); err != nil {
		return f, fmt.Errorf("read underlay mtu: %w", err)
	}
	if p.underlay.natives != nil {
		// Whether it pays is no condition of anything: who does not tell is left alone.
		if f.cutsTunnels, err = p.underlay.natives.CutsTunnels(); err != nil {
			f.cutsTunnels = true
		}
	}
	if in.IsBound() {
		if f.addrs, err = p.host.addrs(); err != nil {
			return f, fmt.Errorf("read addresses of the host: %w", err)
		}
	}
	if f.gateway.Bridge, f.gateway.Subnet, err = p.host.gateways.Gateway(ctx); err != nil {
		return f, fmt.Errorf("make gateway bridge: %w", err)
	}
	return f, nil
}

// pass makes the kernel equal to a look, which was made with what the host had said
// by then, and tells run of each step. It blocks as long as the kernel does.
func (p *plane) pass(ctx context.Context, l look, said facts) {
	slow := time.AfterFunc(planeSlow, func() {
		p.log.Error("the data plane is being applied for long: the kernel does not answer; tasks wait for it", "after", planeSlow)
	})
	defer slow.Stop()
	end := step{isLast: true, goal: l.goal, holds: p.hands.sure()}
	f, err := p.readHost(ctx, &l.in)
	if err == nil {
		end.facts = &f
		if !f.equal(&said) {
			f.put(&l.in)
			l.out = netstate.Derive(l.in)
		}
		if mid, ok := netstate.Between(p.held(ctx), l.out.Overlay, l.in); ok {
			_, err = p.apply(ctx, netstate.Derive(mid))
		}
		var failed error
		end.holds, failed = p.apply(ctx, l.out)
		end.named, err = l.out.Overlay, errors.Join(err, failed)
	}
	end.err = err
	p.report(ctx, end)
}

// report gives run a step, unless the agent ends.
func (p *plane) report(ctx context.Context, s step) {
	select {
	case p.hands.steps <- s:
	case <-ctx.Done():
	}
}

// held is what the last pass left in the kernel, in the first pass of a daemon
// what the last daemon did. If that cannot be read, the pass itself says so.
func (p *plane) held(ctx context.Context) vxlan.State {
	if p.hands.have.Networks != nil {
		return p.hands.have
	}
	have, err := p.overlay.Read(ctx)
	if err != nil {
		return vxlan.State{}
	}
	return have
}

// apply goes from what is there to what is wanted in three steps, so that no
// name and no balancer ever points to what the overlay cannot reach: first the
// overlay holds both, then balancers and names turn, then the old goes. A task is
// named when the overlay holds it, a service address when the balancer does, too.
// It returns what the kernel surely holds then.
func (p *plane) apply(ctx context.Context, out netstate.Output) ([]vxlan.State, error) {
	h := &p.hands
	both := netstate.Union(h.have, out.Overlay)
	p.report(ctx, step{holds: h.sure(both)})
	err := p.overlay.Apply(ctx, both)
	h.isSound = err == nil
	if h.isSound {
		p.report(ctx, step{holds: []vxlan.State{withVIPs(both, h.have)}})
	}
	h.have = both
	err = errors.Join(err, p.balancer.Apply(ctx, out.Ingress))
	p.sayUnanswered(ingress.UnansweredBy(p.balancer, out.Ingress))
	if netstate.Adds(both, out.Overlay) {
		p.report(ctx, step{holds: h.sure(out.Overlay), named: out.Overlay})
		failed := p.overlay.Apply(ctx, out.Overlay)
		h.isSound = h.isSound && failed == nil
		err = errors.Join(err, failed)
	}
	h.have = out.Overlay
	return h.sure(), err
}

// sure are the states of the kernel while it goes from what it has to others; none
// when what it has is in doubt.
func (h *hands) sure(others ...vxlan.State) []vxlan.State {
	if !h.isSound {
		return nil
	}
	return append([]vxlan.State{h.have}, others...)
}

// withVIPs is s with the service addresses of another state.
func withVIPs(s, of vxlan.State) vxlan.State {
	out := vxlan.State{Networks: make(map[uint32]vxlan.Network, len(s.Networks)), Encryption: s.Encryption}
	for vni, n := range s.Networks {
		n.VIPs = of.Networks[vni].VIPs
		out.Networks[vni] = n
	}
	return out
}
