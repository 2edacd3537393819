package orchestrator

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// keyModel is a cluster in which rings and reports arrive when they like.
type keyModel struct {
	t       *rapid.T
	now     time.Time
	cluster weft.Cluster
	settled time.Time
	told    map[weft.ID]weft.GossipEpochs
	nodes   []*keyNode
	frames  []keyFrame
	drawn   byte
}

type keyNode struct {
	id     weft.ID
	down   bool
	fresh  bool // it has heard from a manager since it was last down
	ring   weft.GossipRing
	behind []weft.GossipRing // sent to it, not arrived
}

// keyFrame is under way for gossipSettle/2 at most.
type keyFrame struct {
	to   *keyNode
	key  weft.GossipKey
	sent time.Time
}

func (m *keyModel) look() {
	var nodes []weft.Node
	newest, all := m.cluster.GossipRing().Epochs().Reads, true
	for _, n := range m.nodes {
		s := weft.NodeReady
		if n.down {
			s = weft.NodeDown
		} else if e, ok := m.told[n.id]; !ok || e.Sends < newest {
			all = false
		}
		nodes = append(nodes, weft.Node{ID: n.id, Status: weft.NodeStatus{State: s}})
	}
	if !all {
		m.settled = time.Time{}
	} else if m.settled.IsZero() {
		m.settled = m.now
	}
	s := gossipStep{nodes: nodes, told: m.told, settled: m.settled, now: m.now, draw: func() []byte {
		m.drawn++
		return []byte{m.drawn}
	}}
	if changed, _ := s.next(&m.cluster); changed {
		for _, n := range m.nodes {
			if !n.down {
				n.behind = append(n.behind, m.cluster.GossipRing())
			}
		}
	}
}

func (m *keyModel) deliver(f keyFrame) {
	if f.to.down || !f.to.fresh {
		return
	}
	if !slices.ContainsFunc(f.to.ring.Keys(), f.key.Equal) {
		m.t.Fatalf("node %s cannot read by %v what came by key %d; the cluster has %v", f.to.id, f.to.ring.Epochs(), f.key.Epoch, m.cluster.GossipRing().Epochs())
	}
}

// send has every node that is in touch say something to every other; it arrives
// at once or late.
func (m *keyModel) send(late bool) {
	for _, from := range m.nodes {
		for _, to := range m.nodes {
			if from == to || from.down || !from.fresh {
				continue
			}
			f := keyFrame{to, from.ring.Sends, m.now}
			if late {
				m.frames = append(m.frames, f)
			} else {
				m.deliver(f)
			}
		}
	}
}

func (m *keyModel) pass(d time.Duration) {
	m.now = m.now.Add(d)
	m.frames = slices.DeleteFunc(m.frames, func(f keyFrame) bool {
		if m.now.Sub(f.sent) < gossipSettle/2 {
			return false
		}
		if m.now.Sub(f.sent) < gossipSettle { // else it was lost
			m.deliver(f)
		}
		return true
	})
}

func (m *keyModel) step() {
	n := m.nodes[rapid.IntRange(0, len(m.nodes)-1).Draw(m.t, "node")]
	switch rapid.IntRange(0, 19).Draw(m.t, "what") {
	case 0, 1, 2, 3, 4:
		m.look()
	case 5, 6, 7, 8: // a ring arrives
		if !n.down && len(n.behind) > 0 {
			n.ring, n.behind, n.fresh = n.behind[0], n.behind[1:], true
		}
	case 9, 10, 11, 12, 13: // a report arrives
		if !n.down && n.fresh {
			m.told[n.id] = n.ring.Epochs()
		}
	case 14:
		n.down, n.fresh, n.behind = true, false, nil
	case 15, 16: // its session opens
		if n.down {
			n.down = false
			n.behind = []weft.GossipRing{m.cluster.GossipRing()}
			delete(m.told, n.id)
		}
	case 17: // another leader, who has heard nothing
		m.told, m.settled = map[weft.ID]weft.GossipEpochs{}, time.Time{}
	case 18, 19:
		m.pass(time.Duration(rapid.Int64Range(0, int64(gossipSettle)/2).Draw(m.t, "time")))
	}
	m.send(rapid.Bool().Draw(m.t, "late"))
}

// TestGossipKeysAreReadBeforeSent: whatever is late or lost, whoever is down and
// however often the leader changes, no node that is in touch gets what it cannot
// read; and when all are in touch, a change of keys ends.
func TestGossipKeysAreReadBeforeSent(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &keyModel{t: rt, now: time.Unix(1e9, 0), told: map[weft.ID]weft.GossipEpochs{}, cluster: weft.Cluster{GossipKey: []byte{0}}}
		for i := range 3 {
			m.nodes = append(m.nodes, &keyNode{id: weft.ID(fmt.Sprint(i)), ring: m.cluster.GossipRing(), fresh: true})
		}
		for range rapid.IntRange(1, 4).Draw(rt, "changes") {
			m.pass(gossipKeyLife)
			for range rapid.IntRange(0, 200).Draw(rt, "steps") {
				m.step()
			}
		}
		// From now on everything arrives.
		m.pass(gossipKeyLife)
		epoch := m.cluster.GossipRing().Epochs().Reads
		for range 8 {
			m.look()
			for _, n := range m.nodes {
				if n.down {
					n.down, n.behind = false, []weft.GossipRing{m.cluster.GossipRing()}
				}
				if l := len(n.behind); l > 0 {
					n.ring, n.behind = n.behind[l-1], nil
				}
				n.fresh = true
				m.told[n.id] = n.ring.Epochs()
			}
			m.send(false)
			m.pass(gossipSettle)
		}
		if ring := m.cluster.GossipRing(); len(ring.Reads) != 0 || ring.Sends.Epoch < epoch {
			rt.Fatalf("a change does not end: %v, %d further keys, was %d", ring.Epochs(), len(ring.Reads), epoch)
		}
		for _, n := range m.nodes {
			if !n.ring.Equal(m.cluster.GossipRing()) {
				rt.Fatalf("node %s has %v, the cluster %v", n.id, n.ring.Epochs(), m.cluster.GossipRing().Epochs())
			}
		}
	})
}

// epochs of the cluster and how many keys it has.
func (r *rig) gossip() (weft.GossipEpochs, int) {
	r.t.Helper()
	c, err := r.leader().Cluster(r.ctx)
	r.must(err)
	ring := c.GossipRing()
	return ring.Epochs(), len(ring.Keys())
}

func (r *rig) awaitGossip(d time.Duration, sends uint64, keys int) {
	r.t.Helper()
	r.eventually(d, fmt.Sprintf("%d keys, epoch %d sends", keys, sends), func() error {
		if e, n := r.gossip(); e.Sends != sends || n != keys {
			return fmt.Errorf("%+v, %d keys", e, n)
		}
		return nil
	})
}

func (a *agent) has() (weft.GossipEpochs, int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ring.Epochs(), len(a.ring.Keys())
}

// change sets what an agent makes of keys.
func (a *agent) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// TestGossipKeysChange: by age and when asked; every node has the new key alone in
// the end. A node of an older version holds it up, one that is away does not, and
// is brought up to date when it comes back. The key that a cluster was made with
// is epoch 0 of a ring of one.
func TestGossipKeysChange(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		nodes := []*agent{r.worker(1), r.worker(2), r.worker(3)}
		old := nodes[2]
		old.change(func() { old.keyless = true })
		if e, n := r.gossip(); e != (weft.GossipEpochs{}) || n != 1 {
			t.Errorf("a new cluster has %d keys, %+v", n, e)
		}
		time.Sleep(gossipKeyLife + time.Minute)
		if e, n := r.gossip(); e.Reads != 0 || n != 1 {
			t.Errorf("with a node that cannot change keys: %d keys, %+v", n, e)
		}
		rotate := func() error {
			c, err := r.leader().Cluster(r.ctx)
			r.must(err)
			return r.leader().UpdateCluster(r.ctx, c.Meta.Index, weft.ClusterUpdate{Spec: c.Spec, RotateKeys: true})
		}
		wantErr(t, "with a node that cannot change keys", rotate(), weft.ErrConflict, "w3", "cannot change")
		old.crash() // it is given a newer version
		r.awaitGossip(time.Minute, 1, 1)
		old.change(func() { old.keyless = false })
		old.start()
		r.eventually(5*time.Second, "the ring on the node that was away", func() error {
			if e, n := old.has(); e.Sends != 1 || n != 1 {
				return fmt.Errorf("%+v, %d keys", e, n)
			}
			return nil
		})
		time.Sleep(time.Second) // for its report
		began := time.Now()
		r.must(rotate())
		r.awaitGossip(2*time.Second, 2, 2)
		r.awaitGossip(time.Minute, 2, 1)
		if took := time.Since(began); took < gossipSettle {
			t.Errorf("the last key was dropped after %s", took)
		}
		time.Sleep(gossipKeyLife - 2*time.Minute)
		r.awaitGossip(time.Second, 2, 1)
		time.Sleep(3 * time.Minute)
		r.awaitGossip(time.Second, 3, 1)
		for _, a := range nodes {
			if e, n := a.has(); e.Sends != 3 || n != 1 {
				t.Errorf("%s has %d keys, %+v", a.name, n, e)
			}
		}
	})
}

// TestGossipKeysSurviveTheLeader: leaders die between the steps of a change, and
// the next one goes on where it was, when it has heard of every node itself.
func TestGossipKeysSurviveTheLeader(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		nodes := []*agent{r.worker(1), r.worker(2), r.worker(3)}
		time.Sleep(time.Minute) // managers without an agent are down
		slow := nodes[1]
		slow.change(func() { slow.stuck = true })
		c, err := r.leader().Cluster(r.ctx)
		r.must(err)
		r.must(r.leader().UpdateCluster(r.ctx, c.Meta.Index, weft.ClusterUpdate{Spec: c.Spec, RotateKeys: true}))
		time.Sleep(20 * time.Second)
		r.awaitGossip(time.Second, 0, 2) // one node does not read by the next
		first := r.leader()
		r.stop(first)
		time.Sleep(time.Minute)
		r.awaitGossip(time.Second, 0, 2)
		if e, n := nodes[0].has(); e.Reads != 1 || n != 2 {
			t.Errorf("w1 has %d keys, %+v", n, e)
		}
		slow.change(func() { slow.stuck, slow.ring = false, nodes[0].ring })
		r.awaitGossip(5*time.Second, 1, 2)
		r.start(first, nil)
		r.stop(r.leader()) // before the last key is dropped
		r.awaitGossip(time.Minute, 1, 1)
		for _, a := range nodes {
			r.eventually(5*time.Second, a.name, func() error {
				if e, n := a.has(); e.Sends != 1 || n != 1 {
					return fmt.Errorf("%d keys, %+v", n, e)
				}
				return nil
			})
		}
	})
}
