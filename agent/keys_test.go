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
