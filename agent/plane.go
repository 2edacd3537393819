package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// Our own choices for the runner that applies the data plane.
const (
	// planeMinGap bounds the rate of passes: what changes within it is
	// applied together. Larger saves work in a storm, smaller is sooner.
	planeMinGap = 5 * time.Millisecond
	// planeMaxGap is how long the kernel goes unread when nothing changes:
	// whatever somebody else broke is repaired within it.
	planeMaxGap = 5 * time.Second
	// planeNews bounds the wait of a restarted daemon for word of the other
	// nodes, and planeTables is for their tables, which follow at once. In
	// the meantime the kernel goes on with what the last run left in it.
	planeNews   = 500 * time.Millisecond
	planeTables = 30 * time.Millisecond
	// planeRetryGap follows a failed pass.
	planeRetryGap = 250 * time.Millisecond
	// planeSlow is how long a pass may take before it is said to hang: far
	// above what a thousand endpoints take on a busy machine.
	planeSlow = 10 * time.Second
)

// plane holds what this node wants of its data plane and makes the kernel
// equal to it. All methods may be called from any goroutine; run is called once.
type plane struct {
	self     netstate.Node // id and VTEP; the rest is the leader's to say
	netNSDir string
	overlay  vxlan.Kernel // this, balancer and underlay.natives are set by Agent.Run before run
	balancer ingress.Engine
	gateways sandbox.Maker
	names    names
	gossip   gossip.Table
	underlay underlay
	log      *slog.Logger

	wake chan struct{} // capacity 1; sent to by whoever changes the fields below; never closed

	// applied wakes whoever reports how far the plane is; it must not block.
	applied func()

	// mu guards: model, local, past, gen, last, waiters, withdrawn.
	mu      sync.Mutex
	model   *model
	local   map[weft.ID]netstate.LocalTask
	past    past
	gen     uint64 // counts changes of the fields above
	last    lastPass
	waiters []planeWaiter
	// withdrawn: nothing is published any more.
	withdrawn bool

	have vxlan.State // owned by run: what the last pass left in the kernel
}

// underlay is the network between the nodes.
type underlay struct {
	Underlay
	natives Natives // nil = all is encapsulated
}

// past is what is still there of what the leader has taken away.
type past struct {
	// gone are networks that the leader has removed and a local task is on.
	gone map[weft.ID]weft.Network
	// ended are tasks that have lost their addresses, whatever the table or
	// this node's own sandboxes still say of them.
	ended map[weft.ID]bool
}

// lastPass is how far the last pass got.
type lastPass struct {
	gen    uint64
	failed failure
	done   carriedOut // by the leader's count
}

type planeWaiter struct {
	gen  uint64
	vnis []uint32
	done chan error // capacity 1; written once by run
}

func newPlane(cfg Config, table gossip.Table) *plane {
	return &plane{
		self: netstate.Node{ID: cfg.Node, VTEP: cfg.VTEP}, netNSDir: cfg.NetNSDir,
		gateways: cfg.Sandbox, names: names{server: cfg.Names}, gossip: table, underlay: underlay{Underlay: cfg.Underlay}, log: cfg.Log,
		wake: make(chan struct{}, 1), model: newModel(), local: map[weft.ID]netstate.LocalTask{},
		past: past{gone: map[weft.ID]weft.Network{}, ended: map[weft.ID]bool{}}, applied: func() {},
	}
}

// setModel takes what the leader says. A network may be removed while tasks of
// a service that went before it still end: it stays until the last local one of
// them is detached, for they have flows open.
func (p *plane) setModel(m *model) {
	p.change(func() {
		for _, t := range p.local {
			for _, at := range t.Task.Attachments {
				if n, ok := p.model.Networks[at.Network]; ok {
					p.past.gone[n.ID] = n
				}
			}
		}
		maps.DeleteFunc(p.past.gone, func(id weft.ID, _ weft.Network) bool { return hasKey(m.Networks, id) })
		maps.Copy(p.past.ended, m.Ended)
		p.model = m
	})
}

// goneLocked are the removed networks that a local task is on; others are
// forgotten.
func (p *plane) goneLocked() []weft.Network {
	maps.DeleteFunc(p.past.gone, func(id weft.ID, _ weft.Network) bool {
		for _, t := range p.local {
			if slices.ContainsFunc(t.Task.Attachments, func(at weft.Attachment) bool { return at.Network == id }) {
				return false
			}
		}
		return true
	})
	return slices.Collect(maps.Values(p.past.gone))
}

func hasKey[K comparable, V any](m map[K]V, k K) bool {
	_, ok := m[k]
	return ok
}

// attach adds or replaces a local task.
func (p *plane) attach(t netstate.LocalTask) uint64 {
	return p.change(func() { p.local[t.Task.ID] = t })
}

// setReady lets a task that has started be found. One that is draining stays so.
func (p *plane) setReady(task weft.ID) {
	p.change(func() {
		if t, ok := p.local[task]; ok && t.State == weft.EndpointStarting {
			t.State = weft.EndpointReady
			p.local[task] = t
		}
	})
}

// drain takes a task out of names and balancers; its open flows go on. It says
// false when the task is not attached: then there is nothing to wait for.
func (p *plane) drain(task weft.ID) (gen uint64, attached bool) {
	gen = p.change(func() {
		var t netstate.LocalTask
		if t, attached = p.local[task]; attached {
			t.State = weft.EndpointDraining
			p.local[task] = t
		}
	})
	return gen, attached
}

// detach removes a local task; false as with drain.
func (p *plane) detach(task weft.ID) (gen uint64, attached bool) {
	p.mu.Lock()
	_, attached = p.local[task]
	p.mu.Unlock()
	if !attached {
		return 0, false
	}
	return p.change(func() { delete(p.local, task) }), true
}

// withdraw takes all of this node's endpoints out of the table for good and
// returns when a pass has done so.
func (p *plane) withdraw(ctx context.Context) error {
	return p.wait(ctx, p.change(func() { p.withdrawn = true }), nil)
}

func (p *plane) change(f func()) uint64 {
	p.mu.Lock()
	f()
	p.gen++
	gen := p.gen
	p.mu.Unlock()
	p.kick()
	return gen
}

func (p *plane) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// wait blocks until a pass that included change gen is over and returns what
// went wrong in it for a task on these networks: what another network lacks is
// no reason to hold this one up.
func (p *plane) wait(ctx context.Context, gen uint64, vnis []uint32) error {
	p.mu.Lock()
	if p.last.gen >= gen {
		defer p.mu.Unlock()
		return p.last.failed.of(vnis)
	}
	w := planeWaiter{gen: gen, vnis: vnis, done: make(chan error, 1)}
	p.waiters = append(p.waiters, w)
	p.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run applies until ctx ends. A failing pass is logged and repeated; it never
// ends the loop, for the other objects of the plane must go on being repaired.
func (p *plane) run(ctx context.Context) error {
	p.awaitOthers(ctx)
	var last string // error that was logged
	for {
		slow := time.AfterFunc(planeSlow, func() {
			p.log.Error("the data plane is being applied for long: the kernel does not answer; tasks wait for it", "after", planeSlow)
		})
		news, err := p.pass(ctx)
		slow.Stop()
		if ctx.Err() != nil {
			return nil
		}
		next := planeMaxGap
		switch {
		case err != nil:
			if err.Error() != last { // not four times a second the same
				p.log.Error("apply data plane", weft.KeyErr, err)
				last = err.Error()
			}
			next = planeRetryGap
		case last != "":
			p.log.Info("data plane is applied again")
			last = ""
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-news.table:
		case <-news.paths:
		case <-news.proven:
		case <-timer.C:
		}
		timer.Stop()
		if !sleep(ctx, planeMinGap) {
			return nil
		}
	}
}

// awaitOthers holds back the first pass of a daemon that has adopted tasks until
// gossip knows all other nodes: what is remembered of them may be older than
// what the kernel holds, and a pass would cut the way to the newer ones.
func (p *plane) awaitOthers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, planeNews)
	defer cancel()
	for {
		members, changed := p.gossip.Members()
		if !p.missesOthers(members) {
			return
		}
		select {
		case <-changed:
			sleep(ctx, planeTables)
		case <-ctx.Done():
			return
		}
	}
}

// missesOthers reports whether a node of the model is not alive by gossip, and
// that matters: there are tasks to keep connected.
func (p *plane) missesOthers(members []gossip.Member) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.local) == 0 {
		return false
	}
	alive := map[weft.ID]bool{p.self.ID: true}
	for _, m := range members {
		alive[m.ID] = true
	}
	for id := range p.model.Nodes {
		if !alive[id] {
			return true
		}
	}
	return false
}

// prime gives the resolvers their names, and the others what runs here, before
// the first pass: neither depends on the kernel.
func (p *plane) prime() {
	endpoints, _ := p.gossip.Snapshot()
	in, _ := p.wanted(endpoints)
	out := netstate.Derive(in)
	p.names.update(out.Names)
	p.publish(out.Publish)
}

// names are what the resolvers answer.
type names struct {
	server *dns.Server
	given  dns.Records // owned by prime, then by run
}

func (n *names) update(r dns.Records) {
	n.given = r
	n.server.Update(dns.NewSnapshot(r))
}

// news are channels that are closed when gossip, or the underlay, has something
// that a pass did not see; nil = never.
type news struct{ table, paths, proven <-chan struct{} }

// pass derives and applies once. What this node tells others does not depend on
// its kernel: a task that drains is said to drain, whatever fails.
func (p *plane) pass(ctx context.Context) (news, error) {
	var later news
	var endpoints []weft.OwnedEndpoint
	endpoints, later.table = p.gossip.Snapshot()
	in, goal := p.wanted(endpoints)
	in.Paths, later.paths = p.underlay.MTUs()
	if p.underlay.natives != nil {
		in.Proven, later.proven = p.underlay.natives.Proven()
	}
	err := p.readHost(ctx, &in)
	out := netstate.Derive(in)
	p.publish(out.Publish)
	p.underlay.Watch(vteps(out.Overlay))
	if p.underlay.natives != nil {
		p.underlay.natives.Watch(out.Native)
	}
	if err == nil {
		if mid, ok := netstate.Between(p.holds(ctx), out.Overlay, in); ok {
			err = p.apply(ctx, netstate.Derive(mid))
		}
		err = errors.Join(err, p.apply(ctx, out))
	}
	p.settle(goal, err)
	return later, err
}

// vteps are the nodes that share a network with this one, in order.
func vteps(s vxlan.State) []netip.Addr {
	var out []netip.Addr
	for _, n := range s.Networks {
		for _, p := range n.Peers {
			out = append(out, p.VTEP)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// holds is what the last pass left in the kernel, in the first pass of a daemon
// what the last daemon did. If that cannot be read, the pass itself says so.
func (p *plane) holds(ctx context.Context) vxlan.State {
	if p.have.Networks != nil {
		return p.have
	}
	have, err := p.overlay.Read(ctx)
	if err != nil {
		return vxlan.State{}
	}
	return have
}

func (p *plane) publish(endpoints []weft.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock() // held, so that nothing is published after a withdrawal
	if p.withdrawn {
		endpoints = nil
	}
	p.gossip.Publish(endpoints)
}

// wanted is the part of the input that does not come from this host's kernel.
func (p *plane) wanted(endpoints []weft.OwnedEndpoint) (netstate.Input, goal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	in := p.model.netstate(p.self.ID, p.self.VTEP)
	in.NetNSDir, in.Endpoints = p.netNSDir, p.living(endpoints)
	to := goal{gen: p.gen, index: p.model.Index, confirm: p.model.confirm, vnis: map[uint32]weft.ID{}}
	for _, n := range in.Networks {
		to.vnis[n.VNI] = n.ID
	}
	for _, n := range p.goneLocked() {
		in.Networks = append(in.Networks, n)
		to.vnis[n.VNI], to.gone = n.ID, append(to.gone, n.ID)
	}
	for id, t := range p.local {
		if !p.past.ended[id] {
			in.Local = append(in.Local, t)
		}
	}
	return in, to
}

// readHost adds what the host itself says.
func (p *plane) readHost(ctx context.Context, in *netstate.Input) error {
	var err error
	in.NoIPv6 = !hasIPv6()
	if in.MTU, err = p.underlay.MTU(); err != nil {
		return fmt.Errorf("read underlay mtu: %w", err)
	}
	if p.underlay.natives != nil {
		// Whether it pays is no condition of anything: who does not tell is left alone.
		if in.CutsTunnels, err = p.underlay.natives.CutsTunnels(); err != nil {
			in.CutsTunnels = true
		}
	}
	bridge, subnet, err := p.gateways.Gateway(ctx)
	if err != nil {
		return fmt.Errorf("make gateway bridge: %w", err)
	}
	in.Gateway = ingress.Gateway{Bridge: bridge, Subnet: subnet}
	return nil
}

// apply goes from what is there to what is wanted in three steps, so that no
// name and no balancer ever points to what the overlay cannot reach: first the
// overlay holds both, then balancers and names turn, then the old goes. Names of
// what drains or has ended go before all that: the kernel may take long.
func (p *plane) apply(ctx context.Context, out netstate.Output) error {
	if !reflect.DeepEqual(p.names.given, out.Names) {
		p.names.update(dns.Still(p.names.given, out.Names))
	}
	both := netstate.Union(p.have, out.Overlay)
	err := p.overlay.Apply(ctx, both)
	err = errors.Join(err, p.balancer.Apply(ctx, out.Ingress))
	p.names.update(out.Names)
	if !reflect.DeepEqual(both, out.Overlay) {
		err = errors.Join(err, p.overlay.Apply(ctx, out.Overlay))
	}
	p.have = out.Overlay
	return err
}

// settle tells those who wait how the pass went that included their change.
func (p *plane) settle(to goal, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last.gen, p.last.failed = to.gen, sortFailure(err)
	if before := p.last.done; p.last.done.advance(to, p.last.failed) && !p.last.done.equal(before) && to.confirm {
		p.applied()
	}
	rest := p.waiters[:0]
	for _, w := range p.waiters {
		if w.gen > to.gen {
			rest = append(rest, w)
			continue
		}
		w.done <- p.last.failed.of(w.vnis)
	}
	p.waiters = rest
}

// netstate is the model as the derivation takes it.
func (m *model) netstate(self weft.ID, vtep netip.Addr) netstate.Input {
	in := netstate.Input{DataPathPort: m.Cluster.DataPathPort, KeyEpoch: m.Cluster.KeyEpoch, Self: netstate.Node{ID: self, VTEP: vtep}}
	for _, n := range m.Networks {
		in.Networks = append(in.Networks, n)
	}
	for _, s := range m.Services {
		in.Services = append(in.Services, netstate.Service{
			ID: s.ID, Name: s.Name, Mode: s.EndpointMode, VIPs: s.VIPs, Ports: s.Ports, Networks: s.Networks,
		})
	}
	for _, n := range m.Nodes {
		node := netstate.Node{ID: n.ID, Hostname: n.Hostname, VTEP: n.DataPath, IngressAddr: n.IngressAddr, IngressAddr6: n.IngressAddr6, Keys: n.Keys}
		if n.ID == self {
			node.VTEP = vtep
			in.Self = node
		}
		in.Nodes = append(in.Nodes, node)
	}
	return in
}

// sleep waits for d or the end of ctx and reports whether ctx goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
