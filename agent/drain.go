package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Our own choices.
const (
	// drainBound is the longest time that a task waits for the word of all
	// other nodes, when it leaves and when it arrives: one that does not answer
	// may be about to fail by gossip.
	drainBound = 2 * time.Second
	// drainAgain is the pause before a node that did not answer is asked again.
	drainAgain = 100 * time.Millisecond
	// drainLook is the pause between two looks at a task's connections.
	drainLook = 200 * time.Millisecond
	// drainHeed is how long word of a task is kept when gossip has never heard
	// of the task: for an entry that is late.
	drainHeed = time.Minute
	// arriveHeed is how long word of a task that can serve goes before a table
	// that says otherwise: gossip brings the same within a second, and a task
	// whose daemon was restarted meanwhile may really be starting again.
	arriveHeed = 10 * time.Second
)

// countConns counts the TCP connections of a namespace to somewhere else.
type countConns func(nsPath string) (int, error)

// owned is a task with the node that said something of it.
type owned struct{ owner, task weft.ID }

// drain blocks, after this node has taken a task out of its tables, until the
// task may be signalled: every node that could lead a new request to it has
// confirmed that it does not (or drainBound is over), and it has finished what
// it has begun (or its drain time since began is over). The error is that of ctx.
func (a *Agent) drain(ctx context.Context, t weft.Task, began time.Time) error {
	a.confirm(ctx, t, drains())
	if !sleep(ctx, drainSpread) {
		return ctx.Err()
	}
	return a.awaitIdle(ctx, t, began)
}

// arrive blocks until a task that can serve is led to: by this node, and by every
// node that could lead a request to it (or drainBound is over). So whoever stops
// another task because this one runs leaves nobody without. The error is that of ctx.
func (a *Agent) arrive(ctx context.Context, t weft.Task) error {
	own, cancel := context.WithTimeout(ctx, drainBound)
	defer cancel()
	a.cfg.Log.Debug("task can serve", weft.KeyTask, t.ID) // `bench ready` counts from here
	if err := a.plane.wait(own, a.plane.setReady(t.ID), a.model.Load().vnis(t)); err != nil && ctx.Err() == nil {
		a.cfg.Log.Warn("let a task be found", weft.KeyTask, t.ID, weft.KeyErr, err)
	}
	a.confirm(own, t, arrives())
	return ctx.Err()
}

// word is what the other nodes are told of a task.
type word struct {
	tell func(ctx context.Context, to wire.Agent, owner weft.ID, t weft.Task) error
	// confirmed and passed are the kinds of what is counted, logged is what is
	// said of a node that is passed over.
	confirmed, passed, logged string
}

// drains: the task is about to stop.
func drains() word {
	return word{
		tell: func(ctx context.Context, to wire.Agent, owner weft.ID, t weft.Task) error {
			return to.Drain(ctx, owner, t.ID)
		},
		confirmed: drainConfirmed, passed: drainPassed,
		logged: "a node has not confirmed that a task drains, going on without it",
	}
}

// arrives: the task can serve.
func arrives() word {
	return word{
		tell: func(ctx context.Context, to wire.Agent, owner weft.ID, t weft.Task) error {
			var networks []weft.ID
			for _, at := range t.Attachments {
				networks = append(networks, at.Network)
			}
			return to.Arrive(ctx, owner, t.ID, networks)
		},
		confirmed: arriveConfirmed, passed: arrivePassed,
		logged: "a node has not confirmed that it leads to a new task, going on without it",
	}
}

// answer is the last word of one node.
type answer struct {
	node weft.ID
	err  error // nil = confirmed
}

// confirm tells the other nodes and waits for their word. Who fails or leaves
// meanwhile is not waited for; who comes is told, too.
func (a *Agent) confirm(ctx context.Context, t weft.Task, w word) {
	if a.cfg.Neighbour == nil {
		return
	}
	inner, cancel := context.WithTimeout(ctx, drainBound)
	defer cancel()
	answers := make(chan answer) // never closed; the senders are waited for
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // before the wait
	said := map[weft.ID]error{}
	for {
		open, news, more := a.unconfirmed(t, said)
		if len(open) == 0 {
			if ctx.Err() == nil {
				a.cfg.Drains.confirmed(t, w, len(said))
			}
			return
		}
		for _, id := range open {
			if _, asked := said[id]; !asked {
				said[id] = errNoAnswer
				wg.Go(func() { a.ask(inner, id, t, w, answers) })
			}
		}
		select {
		case r := <-answers:
			said[r.node] = r.err
			if errors.Is(r.err, weft.ErrUnsupported) { // of an older version: it will not say more
				a.cfg.Drains.passed(t, w, r.node, r.err)
			}
		case <-news:
		case <-more:
		case <-inner.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return // the daemon ends, and the next one asks again; or the task is to stop
			}
			for _, id := range open {
				a.cfg.Drains.passed(t, w, id, said[id])
			}
			return
		}
	}
}

var errNoAnswer = fmt.Errorf("%w: it did not answer within %s", weft.ErrUnavailable, drainBound)

// unconfirmed are the nodes whose word is still wanted. The channels tell of
// news about who that is.
func (a *Agent) unconfirmed(t weft.Task, said map[weft.ID]error) (open []weft.ID, news, more <-chan struct{}) {
	endpoints, news := a.linger.Snapshot()
	members, more := a.linger.Members()
	for _, id := range concerned(a.model.Load(), a.cfg.Node, t, members, endpoints) {
		if err, asked := said[id]; !asked || err != nil && !errors.Is(err, weft.ErrUnsupported) {
			open = append(open, id)
		}
	}
	return open, news, more
}

// concerned are the nodes that may lead somebody to a task of self: alive by
// gossip, and with a task on one of its networks. On the ingress network that is
// every node. Who is no node of the cluster any more is not asked.
func concerned(m *model, self weft.ID, t weft.Task, members []gossip.Member, endpoints []weft.OwnedEndpoint) []weft.ID {
	on := map[weft.ID]bool{}
	everyone := false
	for _, at := range t.Attachments {
		on[at.Network] = true
		everyone = everyone || m.Networks[at.Network].Spec.Ingress
	}
	attached := map[weft.ID]bool{}
	for _, e := range endpoints {
		attached[e.Owner] = attached[e.Owner] || on[e.Network]
	}
	var out []weft.ID
	for _, mb := range members {
		if mb.ID != self && hasKey(m.Nodes, mb.ID) && (everyone || attached[mb.ID]) {
			out = append(out, mb.ID)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// ask tells one node until it confirms, will not, or ctx ends, and gives its last
// word.
func (a *Agent) ask(ctx context.Context, node weft.ID, t weft.Task, w word, answers chan<- answer) {
	for {
		n := a.model.Load().Nodes[node]
		err := w.tell(ctx, a.cfg.Neighbour(node, n.ClusterAddr()), a.cfg.Node, t)
		if ctx.Err() != nil {
			return
		}
		select {
		case answers <- answer{node, err}:
		case <-ctx.Done():
			return
		}
		if err == nil || errors.Is(err, weft.ErrUnsupported) || !sleep(ctx, drainAgain) {
			return
		}
	}
}

// awaitIdle lets a task that leaves finish what it has begun, for the drain time
// of its service since began. A service that is removed has none.
func (a *Agent) awaitIdle(ctx context.Context, t weft.Task, began time.Time) error {
	for {
		left := a.model.Load().drainTime(t) - time.Since(began)
		netNS := a.plane.netNSOf(t.ID)
		if left <= 0 || netNS == "" {
			return nil
		}
		n, err := a.busy(netNS)
		if err != nil {
			// Who cannot be counted is given all of the time.
			a.cfg.Log.Debug("count connections of a draining task", weft.KeyTask, t.ID, weft.KeyErr, err)
		}
		if err == nil && n == 0 {
			return nil
		}
		if !sleep(ctx, min(left, drainLook)) {
			return ctx.Err()
		}
	}
}

// drainTime is that of the service as it is now. The leader says nothing of a
// service without networks: the task's own version counts, and its removal looks
// like scaling down, which then has no drain time either.
func (m *model) drainTime(t weft.Task) time.Duration {
	if v, ok := m.Services[t.Service]; ok || len(t.Attachments) > 0 {
		return v.Drain
	}
	if m.Tasks[t.ID].Desired >= weft.TaskRemove {
		return 0
	}
	spec := m.Specs[specKey{t.Service, t.SpecVersion}].Spec
	return spec.DrainTime()
}

// Drain is wire.Agent's: it returns when this node's data plane leads nobody to
// a task of owner any more. What owner says of tasks of others does not count.
func (a *Agent) Drain(ctx context.Context, owner, task weft.ID) error {
	gen := a.plane.heed(owned{owner, task}, time.Now())
	if err := a.plane.wait(ctx, gen, a.plane.vnisOf(owned{owner, task})); err != nil {
		return fmt.Errorf("%w: drain of task %s is not carried out: %w", weft.ErrUnavailable, task, err)
	}
	return nil
}

// Arrive is wire.Agent's: it returns when this node's data plane leads to a task of
// owner, on those of networks that this node has. The word itself makes ready what
// the table has as starting; an endpoint that the table does not have is waited for.
func (a *Agent) Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error {
	o := owned{owner, task}
	for {
		// Looked at first: a pass that has the change looks later.
		missing, news := a.plane.missing(o, networks)
		gen := a.plane.welcome(o, time.Now())
		if !missing {
			if err := a.plane.wait(ctx, gen, a.plane.vnisOf(o)); err != nil {
				return fmt.Errorf("%w: arrival of task %s is not carried out: %w", weft.ErrUnavailable, task, err)
			}
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("%w: the endpoints of task %s are not known here yet", weft.ErrUnavailable, task)
		}
	}
}

// missing reports whether the table lacks an endpoint of a task on one of networks
// that this node has; the channel tells of the next change.
func (p *plane) missing(o owned, networks []weft.ID) (bool, <-chan struct{}) {
	endpoints, news := p.gossip.Snapshot()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range networks {
		if hasKey(p.model.Networks, n) && !slices.ContainsFunc(endpoints, func(e weft.OwnedEndpoint) bool {
			return e.Owner == o.owner && e.Task == o.task && e.Network == n
		}) {
			return true, news
		}
	}
	return false, news
}

// heed takes word that a task of another node drains.
func (p *plane) heed(o owned, now time.Time) uint64 {
	return p.change(func() { p.past.draining[o] = now })
}

// welcome takes word that a task of another node can serve.
func (p *plane) welcome(o owned, now time.Time) uint64 {
	return p.change(func() { p.past.arrived[o] = now })
}

// heeded are endpoints with what owners said of tasks that arrive and that drain. It
// forgets what the table has not heard of for drainHeed, and an arrival once the
// table has more to say than "starting". p.mu is held.
func (p *plane) heeded(now time.Time, endpoints []weft.OwnedEndpoint) []weft.OwnedEndpoint {
	if len(p.past.draining)+len(p.past.arrived) == 0 {
		return endpoints
	}
	listed, starting := map[owned]bool{}, map[owned]bool{}
	out := slices.Clone(endpoints)
	for i, e := range out {
		o := owned{e.Owner, e.Task}
		switch {
		case hasKey(p.past.draining, o):
			out[i].State = weft.EndpointDraining
		case hasKey(p.past.arrived, o) && e.State == weft.EndpointStarting:
			out[i].State = weft.EndpointReady
			starting[o] = true
		}
		listed[o] = true
	}
	for o, said := range p.past.draining {
		if !listed[o] && now.Sub(said) > drainHeed {
			delete(p.past.draining, o)
		}
	}
	for o, said := range p.past.arrived {
		if !starting[o] && (listed[o] || now.Sub(said) > drainHeed) || now.Sub(said) > arriveHeed {
			delete(p.past.arrived, o)
		}
	}
	return out
}

// vnisOf are the networks of another node's task, as kernel objects and their
// errors name them.
func (p *plane) vnisOf(o owned) []uint32 {
	endpoints, _ := p.gossip.Snapshot()
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []uint32
	for _, e := range endpoints {
		if n, known := p.model.Networks[e.Network]; known && e.Owner == o.owner && e.Task == o.task {
			out = append(out, n.VNI)
		}
	}
	return out
}

// netNSOf is the namespace of a local task; "" when it is not attached.
func (p *plane) netNSOf(task weft.ID) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.local[task].NetNS
}

// Kinds of what Drains counts.
const (
	drainConfirmed  = "confirmed"         // a task that leaves, which all nodes concerned had confirmed
	drainPassed     = "passed"            // a node that was passed over
	arriveConfirmed = "arrival confirmed" // the same of a task that arrives
	arrivePassed    = "arrival passed"
)

// Drains counts how this node's tasks came into the balancers of others and were
// taken out of them, and logs each node that was passed over. It lives as long as the daemon. Safe
// for concurrent use.
type Drains struct {
	log *slog.Logger
	tally
}

// NewDrains starts counting.
func NewDrains(log *slog.Logger) *Drains { return &Drains{log, newTally()} }

// Drains returns the counts by kind, and since when they are counted.
func (d *Drains) Drains() (since time.Time, counts []weft.RepairCount) { return d.read() }

func (d *Drains) confirmed(t weft.Task, w word, nodes int) {
	d.add(weft.Repair{Kind: w.confirmed, Object: fmt.Sprintf("task %s", t.ID), Reason: fmt.Sprintf("by %d other nodes", nodes)})
}

func (d *Drains) passed(t weft.Task, w word, node weft.ID, err error) {
	d.log.Warn(w.logged, weft.KeyTask, t.ID, weft.KeyNode, node, weft.KeyErr, err)
	d.add(weft.Repair{Kind: w.passed, Object: fmt.Sprintf("task %s, node %s", t.ID, node), Reason: weft.Text(err)})
}
