package agent

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/wire"
)

func (l *fakeLeader) heard() carriedOut {
	l.mu.Lock()
	defer l.mu.Unlock()
	return carriedOut{l.last.Applied, l.last.Behind}
}

func (r *rig) wantCarried(when string, index uint64, behind ...weft.ID) {
	r.t.Helper()
	if got := r.leader.heard(); !got.equal(carriedOut{index, behind}) {
		r.t.Errorf("%s: reported to be at %d, behind with %v, want %d, %v", when, got.index, got.behind, index, behind)
	}
}

// TestConfirmsWhatIsCarriedOut: the leader hears at once, when it waits for it,
// how far the data plane is, and never more than that.
func TestConfirmsWhatIsCarriedOut(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		kill := r.start()
		s := <-r.leader.sessions
		first := full(one, testTask(2, back))
		first.Index = 10
		s.send <- first
		settle(2 * time.Second)
		r.wantCarried("with the heartbeat", 10)

		const soon = 3 * planeMinGap
		s.send <- wire.Assignments{Seq: 2, Index: 20, Confirm: true, Ended: []weft.ID{testID("x")}}
		settle(soon)
		r.wantCarried("at once", 20)

		r.kernel.setFail(4098, errors.New("file exists"))
		s.send <- wire.Assignments{Seq: 3, Index: 30, Confirm: true}
		settle(soon)
		r.wantCarried("one network is broken", 30, back.ID)
		r.kernel.setFail(4098, nil)
		settle(planeRetryGap + soon)
		r.wantCarried("it is not any more", 30)

		r.kernel.setFail(0, errors.New("netlink is gone"))
		s.send <- wire.Assignments{Seq: 4, Index: 40, Confirm: true}
		settle(2 * time.Second)
		r.wantCarried("all are broken", 30)
		r.kernel.setFail(0, nil)
		settle(planeRetryGap + soon)
		r.wantCarried("none is", 40)

		// A removed network is there for as long as a task is on it.
		r.rt.Fail("Stop", weft.ErrUnavailable)
		s.send <- wire.Assignments{Seq: 5, Index: 50, Confirm: true, Tasks: []weft.Task{desired(one, weft.TaskRemove)}, GoneNetworks: []weft.ID{front.ID}}
		settle(time.Second)
		r.wantCarried("a task is on a removed network", 50, front.ID)
		r.rt.Fail("Stop", nil)
		settle(20 * time.Second)
		r.wantCarried("the task is gone", 50)

		// A daemon that has done nothing yet says nothing, though it remembers.
		kill()
		r.kernel.setFail(0, errors.New("netlink is gone"))
		r.start()
		<-r.leader.sessions
		settle(2 * time.Second)
		r.wantCarried("after a restart", 0)
		r.kernel.setFail(0, nil)
		settle(2 * time.Second)
		r.wantCarried("after its first pass", 50)
	})
}

// TestEndedTasksDoNotCount: what gossip, or this node's own sandboxes, still say
// of a task is not programmed once the leader has given its addresses up.
func TestEndedTasksDoNotCount(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		old := weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady}
		heir := old
		heir.Task, heir.Service = testID("t7"), testID("s7") // the lower id: not preferred to the old one
		b := gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}
		tasks := func() string {
			r.kernel.mu.Lock()
			defer r.kernel.mu.Unlock()
			var out []string
			for _, n := range r.kernel.state.Networks {
				for _, p := range n.Peers {
					for _, e := range []weft.Endpoint{old, heir} {
						if reflect.DeepEqual(p.MAC, weft.EndpointMAC(e.Task, e.Addr)) {
							out = append(out, string(e.Task[:2]))
						}
					}
				}
				for _, p := range n.Ports {
					out = append(out, string(p.Task[:2]))
				}
			}
			slices.Sort(out)
			return strings.Join(out, " ")
		}
		one, two := testTask(1, front), testTask(2, front)
		_, s := r.running(one, two)
		r.table.set(b, old)
		settle(time.Second)
		if got := tasks(); got != "t1 t2 t9" {
			t.Fatalf("programmed: %s", got)
		}
		s.send <- wire.Assignments{Seq: 2, Index: 20, Confirm: true, Ended: []weft.ID{old.Task, two.ID}}
		settle(time.Second)
		if got := tasks(); got != "t1" {
			t.Errorf("after the end of t2 and t9: %s", got)
		}
		for _, e := range r.table.ownEndpoints() {
			if e.Task == two.ID {
				t.Error("a task that has lost its address is told to others")
			}
		}
		// The leader gives the address to another and need not mention the old
		// task any more; gossip lags.
		s.send <- wire.Assignments{Seq: 3, Index: 30, GoneEnded: []weft.ID{old.Task, two.ID}}
		r.table.set(b, old, heir)
		settle(time.Second)
		if got := tasks(); got != "t1 t7" {
			t.Errorf("after the address was given to t7: %s", got)
		}
		r.table.set(b, heir)
		settle(time.Second)
		if got := tasks(); got != "t1 t7" {
			t.Errorf("after gossip has heard: %s", got)
		}
		s.send <- wire.Assignments{Seq: 4, Index: 40, Tasks: []weft.Task{desired(two, weft.TaskRemove)}}
		settle(2 * time.Second)
		s.send <- wire.Assignments{Seq: 5, Index: 50, GoneTasks: []weft.ID{two.ID}}
		settle(2 * time.Second)
		r.agent.plane.mu.Lock()
		defer r.agent.plane.mu.Unlock()
		if n := len(r.agent.plane.past.ended); n != 0 {
			t.Errorf("%d ended tasks are remembered though nobody speaks of them", n)
		}
	})
}

// TestHandedOverAddressIsNobodysFirst: a node that learns in one pass that an
// address has another holder drops the former from every table before any has
// the next; also a daemon whose predecessor knew the former.
func TestHandedOverAddressIsNobodysFirst(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		old := weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady}
		heir, third := old, old
		heir.Task, third.Task = testID("t8"), testID("t7")
		b := gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}
		one := testTask(1, front)
		kill, _ := r.running(one)
		r.table.set(b, old)
		settle(time.Second)
		r.journal.clear()
		r.table.set(b, heir)
		settle(time.Second)
		const nobody, after = "overlay port:t1", "overlay peer:10.0.16.9 port:t1"
		r.journal.inOrder(t, "balancer take:t1", nobody, after, "balancer take:t1 take:t8")
		kill()
		r.journal.clear()
		r.table.set(b, third)
		r.start()
		(<-r.leader.sessions).send <- full(one)
		settle(2 * time.Second)
		r.journal.inOrder(t, nobody, "balancer take:t1", after, "balancer take:t1 take:t7") // nothing was there to keep
		if log := r.journal.String(); strings.Contains(log, "take:t8") {
			t.Errorf("balanced to a task that is gone:\n%s", log)
		}
	})
}

func TestPrefixesAreReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := []netip.Prefix{netip.MustParsePrefix("192.168.7.0/24")}
		var fail error
		r.prefixes = func() ([]netip.Prefix, error) { r.mu.Lock(); defer r.mu.Unlock(); return p, fail }
		var got [][]netip.Prefix
		r.leader.onReport(func(_ context.Context, w wire.Report) error {
			if w.Prefixes != nil {
				got = append(got, w.Prefixes)
			}
			return nil
		})
		r.running(testTask(1, front))
		settle(10 * time.Second)
		r.mu.Lock()
		p = nil // all links are gone: that is news, too
		r.mu.Unlock()
		settle(10 * time.Second)
		r.mu.Lock()
		fail = errors.New("netlink is gone")
		r.mu.Unlock()
		settle(10 * time.Second)
		if len(got) != 2 || !slices.Equal(got[0], []netip.Prefix{netip.MustParsePrefix("192.168.7.0/24")}) || len(got[1]) != 0 {
			t.Errorf("reported %v", got)
		}
	})
}
