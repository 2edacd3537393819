package agent

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
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
	// planeMinGap bounds the rate of looks: the first change is looked at at
	// once, what changes within it together. Larger saves work in a storm, smaller is sooner.
	planeMinGap = 5 * time.Millisecond
	// planeRest is what a pass waits of which only others' or own tasks' states are news,
	// for which the kernel has the ways: what gets names by them has its turn first. Larger
	// than what gossip takes to be everywhere, smaller than what a person sees.
	planeRest = 15 * time.Millisecond
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
	host     host
	names    names
	gossip   gossip.Table
	underlay underlay
	log      *slog.Logger

	wake chan struct{} // capacity 1; sent to by whoever changes the fields below; never closed

	// applied wakes whoever reports how far the plane is; it must not block.
	applied func()

	// mu guards: model, services, local, past, gen, last, withdrawn.
	mu    sync.Mutex
	model *model
	// services are those of model, in the order of ids; never written once set.
	services []netstate.Service
	local    map[weft.ID]netstate.LocalTask
	past     past
	gen      uint64 // counts changes of the fields above
	last     lastPass
	// withdrawn: nothing is published any more.
	withdrawn bool

	hands hands
}

// host is what this node's own host says.
type host struct {
	gateways sandbox.Maker
	addrs    func() ([]weft.HostAddr, error) // see Config
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
	// draining are tasks of others that their owners said are about to stop,
	// whatever the table still says, and when that was said.
	draining map[owned]time.Time
	// arrived are tasks of others that can serve, likewise.
	arrived map[owned]time.Time
}

// lastPass is how far the last pass got, and who waits for one that gets further.
type lastPass struct {
	gen     uint64
	failed  failure
	done    carriedOut // by the leader's count
	waiters []planeWaiter
}

type planeWaiter struct {
	gen  uint64
	vnis []uint32
	done chan error // capacity 1; written once by run
}

func newPlane(cfg Config, table gossip.Table) *plane {
	return &plane{
		self: netstate.Node{ID: cfg.Node, VTEP: cfg.VTEP}, netNSDir: cfg.NetNSDir,
		host: host{cfg.Sandbox, cfg.HostAddrs}, names: names{server: cfg.Names}, gossip: table, underlay: underlay{Underlay: cfg.Underlay}, log: cfg.Log,
		wake: make(chan struct{}, 1), model: newModel(), local: map[weft.ID]netstate.LocalTask{},
		hands: hands{steps: make(chan step)},
		past:  past{gone: map[weft.ID]weft.Network{}, ended: map[weft.ID]bool{}, draining: map[owned]time.Time{}, arrived: map[owned]time.Time{}}, applied: func() {},
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
		p.model, p.services = m, m.listServices(p.services)
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
func (p *plane) setReady(task weft.ID) uint64 {
	return p.change(func() {
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

func (p *plane) generation() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gen
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
	p.last.waiters = append(p.last.waiters, w)
	p.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run looks and applies until ctx ends. What is told to others and to resolvers
// does not wait for the kernel: looks go on while a pass is under way, and the next
// pass takes the newest. A failing pass is logged and repeated; it never ends the
// loop, for the other objects of the plane must go on being repaired.
func (p *plane) run(ctx context.Context) error {
	p.awaitOthers(ctx)
	var wg sync.WaitGroup // of the pass
	defer wg.Wait()
	r := runner{due: time.NewTimer(planeMaxGap), rest: time.NewTimer(0)}
	defer r.due.Stop()
	defer r.rest.Stop()
	begin := func() {
		l, said := p.hands.look, p.hands.facts
		r.isBusy, r.owes, r.isResting = true, false, false
		r.isPressed, r.index = false, l.goal.index
		wg.Go(func() { p.pass(ctx, l, said) })
	}
	look := func() { r.later, r.last, r.owes = p.see(), time.Now(), true }
	look()
	begin()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
			r.soon()
		case <-r.later.table:
			r.soon()
		case <-r.later.paths:
			r.isPressed = true
			r.soon()
		case <-r.later.proven:
			r.isPressed = true
			r.soon()
		case <-r.due.C:
			r.isPressed, r.isDue = r.isPressed || !r.isDue, false
			look()
		case <-r.rest.C:
			if r.isResting && r.owes && !r.isBusy {
				begin()
			}
		case s := <-p.hands.steps:
			if s.isLast && p.learn(s.facts) {
				look()
			}
			p.hands.holds = s.holds
			p.name(s.named)
			if s.isLast {
				p.settle(s.goal, s.err)
				r.over(p.tell(s.err, r.told))
			}
		}
		if !r.owes || r.isBusy {
			continue
		}
		if r.isPressed || r.told != "" || p.hands.look.goal.index != r.index || len(p.hands.missing(p.hands.look.out.Overlay)) > 0 {
			begin()
		} else if !r.isResting {
			r.isResting = true
			r.rest.Reset(planeRest)
		}
	}
}

// runner is what run remembers.
type runner struct {
	later news      // of the last look
	last  time.Time // when that was
	// isDue: a look is due soon, by the timer due, which else says when the kernel
	// is looked at again although nothing has changed.
	isDue bool
	due   *time.Timer
	// isBusy: a pass is under way. owes: a look has been made after its own.
	isBusy, owes bool
	// isResting: the pass that is owed begins by the timer rest, or with a look
	// that the kernel lacks something of. isPressed: it must not wait. index is the
	// leader's state that the last pass began with.
	isResting, isPressed bool
	rest                 *time.Timer
	index                uint64
	told                 string // error of the last pass, which was logged
}

// soon has a look made of what has changed.
func (r *runner) soon() {
	r.later, r.isDue = news{}, true // it will be looked at
	r.due.Reset(max(0, planeMinGap-time.Since(r.last)))
}

// over is the end of a pass, which failed if there is something to tell.
func (r *runner) over(told string) {
	r.isBusy, r.told = false, told
	switch {
	case r.isDue:
	case told != "":
		r.due.Reset(planeRetryGap)
	default:
		r.due.Reset(planeMaxGap)
	}
}

// tell logs how a pass went, unless that is no news, and returns what to remember.
func (p *plane) tell(err error, last string) string {
	switch {
	case err == nil && last != "":
		p.log.Info("data plane is applied again")
	case err != nil && err.Error() != last: // not four times a second the same
		p.log.Error("apply data plane", weft.KeyErr, err)
	}
	if err == nil {
		return ""
	}
	return err.Error()
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
	out := p.hands.deriver.Derive(in)
	p.names.update(out.Names)
	p.publish(out.Publish, in.Networks)
}

// names are what the resolvers answer.
type names struct {
	server *dns.Server
	given  atomic.Pointer[dns.Records] // written by prime, then by run
}

func (n *names) update(r dns.Records) {
	n.given.Store(&r)
	n.server.Update(r)
}

// last is what was given last.
func (n *names) last() dns.Records {
	if r := n.given.Load(); r != nil {
		return *r
	}
	return dns.Records{}
}

// news are channels that are closed when gossip, or the underlay, has something
// that a look did not see; nil = never.
type news struct{ table, paths, proven <-chan struct{} }

// look is what this node wants of its data plane at a moment, made of what the
// leader, gossip and the host have said by then.
type look struct {
	in   netstate.Input
	out  netstate.Output
	goal goal
}

// see looks anew, and has others and resolvers know what they may. What this node
// tells others does not depend on its kernel: a task that drains is said to drain,
// whatever fails.
func (p *plane) see() news {
	var later news
	var endpoints []weft.OwnedEndpoint
	var l look
	// Before the table: who has seen an endpoint in it and then made a change
	// knows that the pass of that change has the endpoint.
	gen := p.generation()
	endpoints, later.table = p.gossip.Snapshot()
	l.in, l.goal = p.wanted(endpoints)
	l.goal.gen = gen
	l.in.Paths, later.paths = p.underlay.MTUs()
	if p.underlay.natives != nil {
		l.in.Proven, later.proven = p.underlay.natives.Proven()
	}
	p.hands.facts.put(&l.in)
	l.out = p.hands.deriver.Derive(l.in)
	p.hands.look = l
	p.publish(l.out.Publish, l.in.Networks)
	p.name(vxlan.State{})
	p.underlay.Watch(vteps(l.out.Overlay))
	if p.underlay.natives != nil {
		p.underlay.natives.Watch(l.out.Native)
	}
	return later
}

// name gives the resolvers what is held of the newest look, or is of also: the state
// of a pass that is over, which is named whatever of it has failed. What has gone,
// and what drains, is not named any more in any case.
func (p *plane) name(also vxlan.State) {
	want := p.hands.look.out.Names
	if missing := p.hands.missing(p.hands.look.out.Overlay); len(missing) > 0 {
		var held dns.Held // nil: in doubt
		switch {
		case also.Networks != nil:
			still := netstate.Missing(also, p.hands.look.out.Overlay)
			held = func(network weft.ID, a netip.Addr) bool { return !missing[network][a] || !still[network][a] }
		case len(p.hands.holds) > 0:
			held = func(network weft.ID, a netip.Addr) bool { return !missing[network][a] }
		}
		want = dns.Still(p.names.last(), want, held)
	}
	p.names.update(want)
}

// vteps are the nodes that share a network with this one, in order.
func vteps(s vxlan.State) []netip.Addr {
	var out []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, n := range s.Networks {
		for i := range n.Peers {
			if v := n.Peers[i].VTEP; !seen[v] {
				seen[v], out = true, append(out, v)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// publish tells others what runs here, and on which networks this node needs to
// hear of theirs.
func (p *plane) publish(endpoints []weft.Endpoint, networks []weft.Network) {
	p.mu.Lock()
	defer p.mu.Unlock() // held, so that nothing is published after a withdrawal
	if p.withdrawn {
		endpoints, networks = nil, nil
	}
	ids := make([]weft.ID, len(networks))
	for i, n := range networks {
		ids[i] = n.ID
	}
	p.gossip.Attach(ids)
	p.gossip.Publish(endpoints)
}

// wanted is the part of the input that does not come from this host's kernel.
func (p *plane) wanted(endpoints []weft.OwnedEndpoint) (netstate.Input, goal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	in := p.model.netstate(p.self.ID, p.self.VTEP)
	in.NetNSDir, in.Endpoints = p.netNSDir, p.heeded(time.Now(), p.living(endpoints))
	to := goal{index: p.model.Index, confirm: p.model.confirm, vnis: map[uint32]weft.ID{}}
	for _, n := range in.Networks {
		to.vnis[n.VNI] = n.ID
	}
	for _, n := range p.goneLocked() {
		in.Networks = append(in.Networks, n)
		to.vnis[n.VNI], to.gone = n.ID, append(to.gone, n.ID)
	}
	in.Services, in.Local = p.services, make([]netstate.LocalTask, 0, len(p.local))
	for _, id := range slices.Sorted(maps.Keys(p.local)) {
		if !p.past.ended[id] {
			in.Local = append(in.Local, p.local[id])
		}
	}
	return in, to
}

// settle tells those who wait how the pass went that included their change.
func (p *plane) settle(to goal, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last.gen, p.last.failed = to.gen, sortFailure(err)
	if before := p.last.done; p.last.done.advance(to, p.last.failed) && !p.last.done.equal(before) && to.confirm {
		p.applied()
	}
	rest := p.last.waiters[:0]
	for _, w := range p.last.waiters {
		if w.gen > to.gen {
			rest = append(rest, w)
			continue
		}
		w.done <- p.last.failed.of(w.vnis)
	}
	p.last.waiters = rest
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
