package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/wire"
)

func inBubble(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stopAll()
		f(t, r)
	})
}

func TestThreeManagersKeepAcknowledgedWrites(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		var acked []string
		write := func(name string) error {
			n, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: name})
			if err == nil {
				acked = append(acked, n.Spec.Name)
			}
			return err
		}
		for i := range 5 {
			r.must(write(fmt.Sprintf("before%d", i)))
		}
		old := r.leader()
		r.cut(old)
		cutAt := time.Now()
		r.eventually(5*time.Second, "a write after the loss of the leader", func() error {
			for _, m := range r.managers {
				if m == old {
					continue
				}
				if _, err := m.CreateNetwork(r.within(time.Second), weft.NetworkSpec{Name: "after"}); err == nil {
					acked = append(acked, "after")
					return nil
				}
			}
			return errors.New("nobody took it")
		})
		t.Logf("next commit %s after the cut", time.Since(cutAt))
		var nl *wire.NotLeader
		if _, err := old.Networks(r.ctx); !errors.As(err, &nl) || !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("the cut-off leader answers reads: %v", err)
		}
		r.heal(old)
		for i := range 3 {
			r.must(write(fmt.Sprintf("healed%d", i)))
		}
		// Lose the leader for good and ask the remaining two.
		r.stop(r.leader())
		nets, err := r.leader().Networks(r.ctx)
		r.must(err)
		have := map[string]bool{}
		for _, n := range nets {
			have[n.Spec.Name] = true
		}
		for _, n := range acked {
			if !have[n] {
				t.Errorf("acknowledged write %s is lost", n)
			}
		}
		r.eventually(5*time.Second, "followers reach the same state", func() error {
			want := snapshotBytes(t, r.leader().Store())
			for _, m := range r.managers {
				if m.cancel != nil && snapshotBytes(t, m.Store()) != want {
					return fmt.Errorf("member %s differs", m.addr)
				}
			}
			return nil
		})
	})
}

func TestFollowerNamesTheLeader(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		l := r.leader()
		for _, m := range r.managers {
			if m == l {
				continue
			}
			r.must(m.Await(r.within(time.Second)))
			var nl *wire.NotLeader
			if _, err := m.Services(r.ctx); !errors.As(err, &nl) || nl.Leader != l.addr {
				t.Errorf("follower answers %v, leader is %s", err, l.addr)
			}
		}
	})
}

func TestServiceLivesThroughCrashes(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		w := []*agent{r.worker(1), r.worker(2), r.worker(3)}
		defer func() {
			for _, a := range w {
				a.crash()
			}
		}()
		net, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "net"})
		r.must(err)
		spec := webSpec("web", 3)
		spec.Networks = []weft.NetworkTarget{{Network: "net"}}
		spec.Ports = []weft.PortSpec{{Target: 80}}
		spec.Restart.Delay = time.Second
		svc, err := r.leader().CreateService(r.ctx, spec)
		r.must(err)
		if svc.Ports[0].Published != weft.FirstPublishedPort || svc.Spec.Networks[0].Network != net.ID || len(svc.VIPs) != 2 {
			t.Fatalf("service is stored as %+v", svc)
		}
		tasks := r.waitRunning(svc.ID, 3)
		addrs := map[string]bool{svc.VIPs[1].Addr.String(): true}
		nodes := map[weft.ID]bool{}
		for _, k := range tasks {
			nodes[k.Node] = true
			if len(k.Attachments) != 2 || addrs[k.Attachments[1].Addr.String()] {
				t.Errorf("task %s has addresses %v", k.ID, k.Attachments)
			}
			addrs[k.Attachments[1].Addr.String()] = true
		}
		if len(nodes) != 3 {
			t.Errorf("3 tasks run on %d nodes", len(nodes))
		}

		// A task fails.
		var victim weft.Task
		for _, k := range tasks {
			if k.Node == w[0].id {
				victim = k
			}
		}
		w[0].fail(victim.ID)
		time.Sleep(2 * time.Second)
		for _, k := range r.waitRunning(svc.ID, 3) {
			if k.ID == victim.ID {
				t.Errorf("failed task %s still counts as running", k.ID)
			}
		}

		// A node dies, then the leader.
		w[0].crash()
		r.waitRunning(svc.ID, 3, w[1], w[2])
		r.stop(r.leader())
		time.Sleep(5 * time.Second)
		for _, k := range r.waitRunning(svc.ID, 3, w[1], w[2]) {
			if k.SpecVersion != 1 {
				t.Errorf("task %s has spec version %d", k.ID, k.SpecVersion)
			}
		}

		// The node comes back and gets nothing by force; drain moves tasks.
		w[0].start()
		n, err := r.leader().Nodes(r.ctx)
		r.must(err)
		for _, n := range n {
			if n.ID == w[1].id {
				n.Spec.Availability = weft.AvailabilityDrain
				r.must(r.leader().UpdateNode(r.ctx, n.ID, n.Meta.Index, n.Spec))
			}
		}
		r.waitRunning(svc.ID, 3, w[0], w[2])

		// Removal: the service at once, then the tasks, then the network.
		if err := r.leader().RemoveNetwork(r.ctx, net.ID); !errors.Is(err, weft.ErrConflict) || !strings.Contains(err.Error(), "web") {
			t.Errorf("removal of a network in use: %v", err)
		}
		r.must(r.leader().RemoveService(r.ctx, svc.ID))
		if _, err := r.leader().Service(r.ctx, "web"); !errors.Is(err, weft.ErrNotFound) || err.Error() != "service web not found" {
			t.Errorf("removed service: %v", err)
		}
		r.must(r.leader().RemoveNetwork(r.ctx, net.ID))
		r.eventually(20*time.Second, "task records go", func() error {
			l, err := r.leader().Tasks(r.ctx, weft.TaskFilter{})
			r.must(err)
			if len(l.Tasks) > 0 {
				return fmt.Errorf("%d are left, e.g. %+v", len(l.Tasks), l.Tasks[0])
			}
			return nil
		})
		r.checkAllocator()
	})
}

// All hosts lose their power at once. Managers elect as soon as they run, long
// before the slower hosts' agents do: nobody's silence may be held against it
// until they had the time to boot, or tasks would be moved away from hosts that
// are about to start them. This failed with the grace of any other election.
func TestPowerReturnsEverywhere(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		w := []*agent{r.worker(1), r.worker(2), r.worker(3)}
		svc, err := r.leader().CreateService(r.ctx, webSpec("web", 3))
		r.must(err)
		before := map[weft.ID]weft.ID{}
		for _, k := range r.waitRunning(svc.ID, 3, w...) {
			before[k.ID] = k.Node
		}
		for _, a := range w {
			a.crash()
		}
		r.stopAll()
		var majority time.Time
		for i, m := range r.managers {
			time.Sleep(3 * time.Second)
			r.start(m, nil)
			if i == 1 {
				majority = time.Now()
			}
		}
		// A second election at once, as on hosts that are short of time.
		r.cut(r.leader())
		time.Sleep(time.Second)
		for _, m := range r.managers {
			r.heal(m)
		}
		time.Sleep(20*time.Second - time.Since(majority))
		w[0].start()
		w[1].start()
		defer w[0].crash()
		defer w[1].crash()
		time.Sleep(5 * time.Second)
		for _, a := range w {
			if n := r.node(a.id); n.Status.State != weft.NodeReady {
				t.Errorf("%s is %s (%s) 25 s after the power is back", a.name, n.Status.State, n.Status.Message)
			}
		}
		for _, k := range r.running(svc.ID) {
			if before[k.ID] != k.Node {
				t.Errorf("task %s was moved to %s", k.ID, k.Node)
			}
		}
		// The third has gone for good.
		r.waitState(w[2].id, weft.NodeDown)
		if d := time.Since(majority); d < wakeGrace || d > wakeGrace+10*time.Second {
			t.Errorf("the host that does not come back is down %s after managers could elect, want %s", d, wakeGrace)
		}
		r.waitRunning(svc.ID, 3, w[0], w[1])
	})
}

func TestGlobalServiceWaitsForRestartDelay(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		w := []*agent{r.worker(1), r.worker(2)}
		defer func() {
			for _, a := range w {
				a.crash()
			}
		}()
		spec := webSpec("every", 0)
		spec.Mode = weft.ModeGlobal
		spec.Restart.Delay = 10 * time.Second
		svc, err := r.leader().CreateService(r.ctx, spec)
		r.must(err)
		tasks := r.waitRunning(svc.ID, 2, w...)
		if tasks[0].Node == tasks[1].Node || tasks[0].Slot != 0 {
			t.Fatalf("global tasks are %+v", tasks)
		}
		w = append(w, r.worker(3))
		r.waitRunning(svc.ID, 3, w...)
		for _, k := range tasks {
			if k.Node == w[0].id {
				w[0].fail(k.ID)
			}
		}
		time.Sleep(8 * time.Second)
		if n := len(r.running(svc.ID)); n != 2 {
			t.Errorf("%d tasks run before the restart delay is over", n)
		}
		r.waitRunning(svc.ID, 3, w...)
		r.checkAllocator()
	})
}

// A caller that gives up does not take its write back: what the write holds must
// not be given to another.
func TestAddressesOfAbandonedCallsAreKept(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(3)
		l := r.leader()
		r.cut(l)
		ctx, cancel := context.WithTimeout(r.ctx, 20*time.Millisecond)
		defer cancel()
		spec := webSpec("web", 0)
		spec.Ports = []weft.PortSpec{{Protocol: weft.TCP, Target: 80}}
		done := make(chan error, 1)
		go func() {
			_, err := l.CreateService(ctx, spec)
			done <- err
		}()
		time.Sleep(40 * time.Millisecond) // within the leader's lease
		r.heal(l)
		t.Log("the abandoned call says:", <-done)
		r.eventually(5*time.Second, "the service is stored", func() error {
			_, err := r.leader().Service(r.ctx, "web")
			return err
		})
		if r.leader() != l {
			t.Fatal("leadership has moved: this shows nothing")
		}
		r.checkAllocator()
	})
}

// checkAllocator compares the addresses that the leader holds, after all that
// happened in its term, with those that a new leader would find.
func (r *rig) checkAllocator() {
	r.t.Helper()
	r.eventually(5*time.Second, "allocator equals the state", func() error {
		t, err := r.leader().leading()
		if err != nil {
			return err
		}
		fresh := newAllocator(t.store.View())
		t.alloc.mu.Lock()
		defer t.alloc.mu.Unlock()
		// A port that a service publishes later is attached last and stored first.
		if have, want := byNetwork(t.alloc.held), byNetwork(fresh.held); !reflect.DeepEqual(have, want) {
			return fmt.Errorf("held %v, in the state %v", have, want)
		}
		for id, s := range fresh.spaces {
			if have, used := usage(t.alloc.spaces[id].addrs), usage(s.addrs); have != used {
				return fmt.Errorf("network %s: %d addresses in use, in the state %d", s.net.Spec.Name, have, used)
			}
		}
		return nil
	})
}

// byNetwork is what is held, in one order.
func byNetwork(held map[weft.ID][]weft.Attachment) map[weft.ID][]weft.Attachment {
	out := map[weft.ID][]weft.Attachment{}
	for id, at := range held {
		out[id] = slices.SortedFunc(slices.Values(at), func(a, b weft.Attachment) int { return cmp.Compare(a.Network, b.Network) })
	}
	return out
}

// usage is how many addresses of IPv4 and of IPv6 are taken.
func usage(f *families) (used [2]uint64) {
	for i, s := range []*ipam.Space{f.v4, f.v6} {
		if s != nil {
			used[i], _ = s.Usage()
		}
	}
	return used
}
