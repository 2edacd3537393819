package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Our own choices.
const (
	// reportGap collects the states that follow one another closely.
	reportGap = 5 * time.Millisecond
	// reportEvery is the heartbeat: the leader takes a node for down after
	// several of them are missing.
	reportEvery = time.Second
	// listenersEvery bounds the age of the reported host sockets.
	listenersEvery = 3 * time.Second
)

// outbox holds task states that the session has not yet reported. Only the
// newest state of a task counts. What a failed report held is not put back: the
// next session begins with the state of every task. Safe for concurrent use.
type outbox struct {
	wake chan struct{} // capacity 1; never closed

	// mu guards: pending.
	mu      sync.Mutex
	pending map[weft.ID]weft.TaskStatus
}

func newOutbox() *outbox {
	return &outbox{wake: make(chan struct{}, 1), pending: map[weft.ID]weft.TaskStatus{}}
}

func (o *outbox) put(task weft.ID, s weft.TaskStatus) {
	o.mu.Lock()
	o.pending[task] = s
	o.mu.Unlock()
	o.kick()
}

// kick has a report sent soon, also when no task has news.
func (o *outbox) kick() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// take empties the box.
func (o *outbox) take() []wire.TaskReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]wire.TaskReport, 0, len(o.pending))
	for id, s := range o.pending {
		out = append(out, wire.TaskReport{Task: id, Status: s})
	}
	clear(o.pending)
	return out
}

// runReports sends states as they come and a heartbeat when none do. It lives
// as long as one session: a failed report ends the session.
func (a *Agent) runReports(ctx context.Context) error {
	beat := time.NewTicker(reportEvery)
	defer beat.Stop()
	var told []weft.Listener // nil: nothing in this session yet
	var used []netip.Prefix
	var addrs []weft.HostAddr
	var rules []weft.InputRule
	bound := boundPorts{log: a.cfg.Log}
	var looked time.Time
	var keys []weft.NodeKey // told in this session
	var gossip *weft.GossipEpochs
	for {
		var r wire.Report
		if now := time.Now(); now.Sub(looked) >= listenersEvery {
			looked = now
			l := a.listeners()
			if l != nil && (told == nil || !slices.Equal(l, told)) {
				r.Listeners = l
			}
			p, at, input := a.inUse()
			if l != nil && at != nil {
				bound.look(a.model.Load(), l, at)
			}
			if p != nil && (used == nil || !slices.Equal(p, used)) {
				r.Prefixes = p
			}
			if at != nil && (addrs == nil || !slices.Equal(at, addrs)) {
				r.Addrs = at
			}
			if input != nil && (rules == nil || !slices.Equal(input, rules)) {
				r.InputRules = input
			}
		}
		newKeys := a.keys()
		if slices.Equal(newKeys, keys) {
			newKeys = nil
		}
		if r.Gossip = a.gossipKeys(); r.Gossip != nil && gossip != nil && *r.Gossip == *gossip {
			r.Gossip = nil
		}
		done := a.plane.carried()
		r.Tasks, r.Keys, r.Applied, r.Behind = a.outbox.take(), newKeys, done.index, done.behind
		if err := a.cfg.Leader.Report(ctx, a.cfg.Node, r); err != nil {
			return fmt.Errorf("report to the leader: %w", err)
		}
		if r.Listeners != nil {
			told = r.Listeners
		}
		if r.Prefixes != nil {
			used = r.Prefixes
		}
		if r.Addrs != nil {
			addrs = r.Addrs
		}
		if r.InputRules != nil {
			rules = r.InputRules
		}
		if newKeys != nil {
			keys = newKeys
		}
		if r.Gossip != nil {
			gossip = r.Gossip
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-beat.C:
		case <-a.outbox.wake:
			if !sleep(ctx, reportGap) {
				return ctx.Err()
			}
		}
	}
}

// inUse are the ranges in use on the host, its addresses and the rules of its firewall
// that name ports; nil when they cannot be read now.
func (a *Agent) inUse() ([]netip.Prefix, []weft.HostAddr, []weft.InputRule) {
	d, err := a.cfg.Describe()
	if err != nil {
		a.cfg.Log.Warn("read the ranges that the host uses", weft.KeyErr, err)
		return nil, nil, nil
	}
	return append([]netip.Prefix{}, d.UsedPrefixes...), append([]weft.HostAddr{}, d.Addrs...), d.InputRules
}

// listeners are the host's sockets without those of the overlay. nil = they cannot be read now.
func (a *Agent) listeners() []weft.Listener {
	list, err := a.cfg.Listeners()
	if err != nil {
		a.cfg.Log.Warn("read host listeners", weft.KeyErr, err)
		return nil
	}
	own := []weft.Listener{{Protocol: weft.UDP, Port: a.model.Load().Cluster.DataPathPort}}
	for _, k := range a.keys() {
		own = append(own, weft.Listener{Protocol: weft.UDP, Port: k.Port})
	}
	out := make([]weft.Listener, 0, len(list))
	for _, l := range list {
		if !slices.Contains(own, weft.Listener{Protocol: l.Protocol, Port: l.Port}) {
			out = append(out, l)
		}
	}
	return out
}

// keys are this node's public keys for encrypted networks; nil before the leader
// has said which epoch it is, on a node that cannot encrypt, and when they cannot
// be made now.
func (a *Agent) keys() []weft.NodeKey {
	m := a.model.Load()
	if a.cfg.Keys == nil || m.Cluster.ID == "" {
		return nil
	}
	keys, err := a.cfg.Keys(m.Cluster.KeyEpoch)
	if err != nil {
		a.cfg.Log.Error("make keys for encrypted networks", weft.KeyErr, err)
		return nil
	}
	return keys
}

// gossipKeys takes up the keys of gossip that the leader has sent and says which
// they are; nil before it has sent any, and when they cannot be taken up now.
func (a *Agent) gossipKeys() *weft.GossipEpochs {
	if a.cfg.GossipKeys == nil || !a.heard.Load() {
		return nil
	}
	c := a.model.Load().Cluster
	ring := c.GossipRing()
	if err := a.cfg.GossipKeys(ring); err != nil {
		a.cfg.Log.Error("take up the keys of gossip", weft.KeyErr, err)
		return nil
	}
	e := ring.Epochs()
	return &e
}
