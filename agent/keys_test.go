package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestKeysAreReported: each epoch's keys are told once in a session, and again
// in the next; what cannot be made is tried again.
func TestKeysAreReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var fail atomic.Bool
		r.keys = func(epoch uint64) ([]weft.NodeKey, error) {
			if fail.Load() {
				return nil, errors.New("disk is full")
			}
			return []weft.NodeKey{{Epoch: epoch, Port: 51820}}, nil
		}
		var told []string
		r.leader.onReport(func(_ context.Context, rep wire.Report) error {
			if rep.Keys != nil {
				told = append(told, fmt.Sprint(rep.Keys[0].Epoch))
			}
			return nil
		})
		kill, s := r.running()
		settle(10 * time.Second)
		epoch := func(seq, e uint64) {
			s.send <- wire.Assignments{Seq: seq, Cluster: &wire.ClusterView{ID: testID("c"), DataPathPort: 4789, KeyEpoch: e}}
			settle(5 * time.Second)
		}
		epoch(2, 7)
		fail.Store(true)
		epoch(3, 8)
		fail.Store(false)
		settle(5 * time.Second)
		kill()
		if want := []string{"0", "7", "8"}; !reflect.DeepEqual(told, want) {
			t.Errorf("told epochs %v, want %v", told, want)
		}
	})
}

// TestUnsupportedNetworkRejects: what this node cannot do at all ends the task,
// with the reason; what may come right does not.
func TestUnsupportedNetworkRejects(t *testing.T) {
	for _, c := range []struct {
		name     string
		sentinel error
		rejected bool
	}{{"unsupported", weft.ErrUnsupported, true}, {"unavailable", weft.ErrUnavailable, false}} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				r.kernel.setFail(front.VNI, fmt.Errorf("no WireGuard: %w", c.sentinel))
				task := testTask(1, front)
				kill := r.start()
				s := <-r.leader.sessions
				s.send <- full(task)
				settle(30 * time.Second)
				got := r.leader.status(task.ID)
				if (got.State == weft.TaskRejected) != c.rejected {
					t.Errorf("the task is %v (%s)", got.State, got.Err)
				}
				kill()
			})
		})
	}
}

// TestGossipKeysAreTakenUp: a ring is taken up before the leader is told so, at
// once and not with the next heartbeat; what cannot be taken up is not told and
// tried again; a ring of the last run is not told of.
func TestGossipKeysAreTakenUp(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var fail atomic.Bool
		var has atomic.Pointer[weft.GossipRing]
		r.gossipKeys = func(ring weft.GossipRing) error {
			if fail.Load() {
				return errors.New("no entropy")
			}
			has.Store(&ring)
			return nil
		}
		var told []string
		r.leader.onReport(func(_ context.Context, rep wire.Report) error {
			if rep.Gossip != nil {
				told = append(told, fmt.Sprintf("reads %d sends %d", rep.Gossip.Reads, rep.Gossip.Sends))
				if ring := has.Load(); ring == nil || ring.Epochs() != *rep.Gossip {
					t.Errorf("told of %+v with the ring %v", *rep.Gossip, ring)
				}
			}
			return nil
		})
		ring := func(seq, sends uint64, reads ...uint64) wire.Assignments {
			c := wire.ClusterView{ID: testID("c"), DataPathPort: 4789, GossipEpoch: sends, GossipKey: []byte{byte(sends)}}
			for _, e := range reads {
				c.GossipReads = append(c.GossipReads, weft.GossipKey{Epoch: e, Key: []byte{byte(e)}})
			}
			return wire.Assignments{Seq: seq, Cluster: &c}
		}
		kill, s := r.running()
		settle(5 * time.Second)
		s.send <- ring(2, 0, 1)
		settle(reportEvery / 10)
		if has.Load().Epochs().Reads != 1 {
			t.Errorf("after a tenth of a heartbeat: %v", has.Load())
		}
		settle(5 * time.Second)
		fail.Store(true)
		s.send <- ring(3, 1, 0)
		settle(5 * time.Second)
		if n := len(told); n != 2 {
			t.Errorf("what was not taken up was told: %q", told)
		}
		fail.Store(false)
		settle(5 * time.Second)
		kill()
		has.Store(nil)
		kill = r.start()
		s = <-r.leader.sessions
		settle(5 * time.Second) // nothing was sent yet
		if has.Load() != nil {
			t.Errorf("the ring of the last run was taken up: %v", has.Load())
		}
		first := full()
		first.Cluster = ring(1, 2).Cluster
		s.send <- first
		settle(5 * time.Second)
		kill()
		if want := []string{"reads 0 sends 0", "reads 1 sends 0", "reads 1 sends 1", "reads 2 sends 2"}; !reflect.DeepEqual(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	})
}
