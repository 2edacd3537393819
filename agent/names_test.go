package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	miekg "github.com/miekg/dns"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/vxlan"
)

// taskOfB is a task of node b: n is its slot and the end of its address.
func taskOfB(n int, s weft.EndpointState) weft.Endpoint {
	return weft.Endpoint{
		Network: front.ID, Task: testID(fmt.Sprintf("u%d", n)), Service: svc, Slot: uint64(n),
		Addr: netip.AddrFrom4([4]byte{10, 0, 16, byte(n)}), State: s,
	}
}

// named are the tasks of the service by slot, and whether they are ready.
func (r *rig) named() map[uint64]bool {
	out := map[uint64]bool{}
	for _, s := range r.agent.plane.names.last().Networks[front.ID].Services {
		for _, k := range s.Tasks {
			out[k.Slot] = k.Ready
		}
	}
	return out
}

// wantNamed checks that those of the slots alone are answered as ready, and those of
// starting by their own names only.
func (r *rig) wantNamed(when string, ready, starting []uint64) {
	r.t.Helper()
	want := map[uint64]bool{}
	for _, n := range ready {
		want[n] = true
	}
	for _, n := range starting {
		want[n] = false
	}
	if got := r.named(); fmt.Sprint(got) != fmt.Sprint(want) {
		r.t.Errorf("%s: named (and ready) are %v, want %v", when, got, want)
	}
}

// TestNamesWaitForTheirOwnWay: a task is named as soon as the overlay holds the way
// to it, whatever else the kernel is busy with, and not before.
func TestNamesWaitForTheirOwnWay(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		starting, ready := weft.EndpointStarting, weft.EndpointReady
		r.table.set(memberOfB, taskOfB(2, starting))
		r.running(testTask(1, front))
		r.wantNamed("at first", []uint64{1}, []uint64{2})

		hang := make(chan struct{})
		r.kernel.setHang(hang)
		r.table.set(memberOfB, taskOfB(2, starting), taskOfB(3, starting))
		settle(time.Second)
		r.wantNamed("a new one", []uint64{1}, []uint64{2})
		r.table.set(memberOfB, taskOfB(2, ready), taskOfB(3, ready))
		settle(planeMinGap)
		r.wantNamed("both get ready", []uint64{1, 2}, nil)
		published := r.table.published
		r.agent.plane.drain(testID("t1"))
		settle(planeMinGap)
		r.wantNamed("one drains", []uint64{2}, []uint64{1})
		if r.table.published == published {
			t.Error("others do not hear of it while the kernel is busy")
		}
		r.kernel.setHang(nil)
		close(hang)
		settle(planeMinGap)
		r.wantNamed("the kernel has turned", []uint64{2, 3}, []uint64{1})

		// What the kernel has is in doubt: what is new is named when the pass is over.
		r.kernel.setFail(0, errors.New("busy"))
		r.table.set(memberOfB, taskOfB(2, ready), taskOfB(3, ready), taskOfB(4, starting))
		settle(planeMinGap)
		r.wantNamed("after a failure", []uint64{2, 3}, []uint64{1, 4})
		hang = make(chan struct{})
		r.kernel.setHang(hang)
		r.table.set(memberOfB, taskOfB(2, ready), taskOfB(3, ready), taskOfB(4, ready))
		settle(time.Second)
		r.wantNamed("in doubt", []uint64{2, 3}, []uint64{1, 4})
		r.kernel.setFail(0, nil)
		r.kernel.setHang(nil)
		close(hang)
		settle(planeRetryGap + planeMinGap)
		r.wantNamed("at last", []uint64{2, 3, 4}, []uint64{1})
	})
}

// TestNewsIsTakenAtOnce: after a rest a change is looked at without a pause, and what
// follows closely with the least one.
func TestNewsIsTakenAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.table.set(memberOfB, taskOfB(2, weft.EndpointStarting))
		r.running(testTask(1, front))
		settle(time.Second + planeMinGap/2)
		r.table.set(memberOfB, taskOfB(2, weft.EndpointReady))
		synctest.Wait()
		r.wantNamed("no time has passed", []uint64{1, 2}, nil)
		r.table.set(memberOfB, taskOfB(2, weft.EndpointDraining))
		settle(planeMinGap - time.Microsecond)
		r.wantNamed("too soon", []uint64{1, 2}, nil)
		settle(time.Microsecond)
		r.wantNamed("after the least pause", []uint64{1}, []uint64{2})
	})
}

// slowKernel takes its time; what it holds meanwhile is what it had and what it is
// to have have in common.
type slowKernel struct {
	rand *rand.Rand
	fail func() bool

	mu    sync.Mutex // guards: all below
	holds []vxlan.State
}

func (k *slowKernel) Read(context.Context) (vxlan.State, error) { return vxlan.State{}, nil }

func (k *slowKernel) Apply(_ context.Context, want vxlan.State) error {
	k.mu.Lock()
	last := k.holds[len(k.holds)-1]
	k.holds = []vxlan.State{last, want}
	k.mu.Unlock()
	time.Sleep(time.Duration(k.rand.IntN(40)) * time.Millisecond)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.holds = k.holds[1:]
	if k.fail() {
		return errors.New("not all of it, perhaps")
	}
	return nil
}

// leads reports whether the kernel leads to an address by this hardware address, also
// in the midst of a change.
func (k *slowKernel) leads(a netip.Addr, task weft.ID) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !slices.ContainsFunc(k.holds, func(s vxlan.State) bool {
		return !slices.ContainsFunc(s.Networks[front.VNI].Peers, func(p vxlan.Peer) bool {
			return p.Addr == a && p.MAC.String() == weft.EndpointMAC(task, a).String()
		})
	})
}

// TestNoNameWithoutAWay: whatever comes in whatever order while the kernel takes its
// time, no task of another node is named that the overlay does not lead to; and in
// the end all are.
func TestNoNameWithoutAWay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			draw := rand.New(rand.NewPCG(seed, 1))
			k := &slowKernel{rand: rand.New(rand.NewPCG(seed, 2)), fail: func() bool { return false }, holds: []vxlan.State{{}}}
			r.overlay = k
			r.table.set(memberOfB)
			r.running(testTask(1, front))
			has := map[int]weft.Endpoint{}
			for i := range 60 {
				// A place has an address; who takes it next is another task.
				n := 2 + draw.IntN(5)
				e := taskOfB(n, weft.EndpointState(draw.IntN(3)))
				if e.Task = testID(fmt.Sprintf("u%dx%d", n, draw.IntN(2))); draw.IntN(4) == 0 {
					delete(has, n)
				} else {
					has[n] = e
				}
				var all []weft.Endpoint
				for _, e := range has {
					all = append(all, e)
				}
				r.table.set(memberOfB, all...)
				settle(time.Duration(draw.IntN(20)) * time.Millisecond)
				r.wantWays(k, i)
			}
			settle(planeMaxGap)
			want := 1
			for _, e := range has {
				want++
				if ready, ok := r.named()[e.Slot]; !ok || ready != (e.State == weft.EndpointReady) {
					t.Errorf("at last %d is named: %v, ready: %v", e.Slot, ok, ready)
				}
			}
			if got := len(r.named()); got != want {
				t.Errorf("%d tasks are named, want %d", got, want)
			}
		})
	})
}

func (r *rig) wantWays(k *slowKernel, step int) {
	r.t.Helper()
	synctest.Wait() // for what happens at this moment
	for _, s := range r.agent.plane.names.last().Networks[front.ID].Services {
		for _, task := range s.Tasks {
			for _, e := range r.table.others[nodeB] {
				if e.Slot == task.Slot && task.Names[1] == weft.ContainerID(e.Task)[:12] && !k.leads(e.Addr, e.Task) {
					r.t.Fatalf("step %d: %s is named, and nothing leads there", step, task.Names[0])
				}
			}
		}
	}
}

// TestNearNameserverIsAskedInside: a nameserver of a service's own on a network of the
// task is asked from inside the task's namespace, one elsewhere is not.
func TestNearNameserverIsAskedInside(t *testing.T) {
	for _, c := range []struct{ server, want string }{
		{"10.0.16.53", "[/ns/" + string(testID("t1")) + " udp 10.0.16.53:53]"},
		{"192.0.2.53", "[]"},
	} {
		t.Run(c.server, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				q := new(miekg.Msg)
				q.SetQuestion("example.com.", miekg.TypeA)
				var err error
				if r.sockets.query, err = q.Pack(); err != nil {
					t.Fatal(err)
				}
				r.sockets.answers = make(chan []byte, 1)
				var mu sync.Mutex
				var asked []string
				r.inside = func(_ context.Context, nsPath, network, address string) (net.Conn, error) {
					mu.Lock()
					defer mu.Unlock()
					asked = append(asked, nsPath+" "+network+" "+address)
					return nil, errors.New("nobody is there")
				}
				r.hostDial = func(context.Context, string, string) (net.Conn, error) {
					return nil, errors.New("nobody is there, either")
				}
				r.start()
				s := <-r.leader.sessions
				a := full(testTask(1, front))
				a.Specs[0].Spec.Container.DNS.Nameservers = []netip.Addr{netip.MustParseAddr(c.server)}
				s.send <- a
				answer := new(miekg.Msg)
				if err := answer.Unpack(<-r.sockets.answers); err != nil || answer.Rcode != miekg.RcodeServerFailure {
					t.Errorf("answer %v, %v", answer, err)
				}
				mu.Lock()
				defer mu.Unlock()
				if fmt.Sprint(asked) != c.want {
					t.Errorf("asked inside: %v, want %s", asked, c.want)
				}
			})
		})
	}
}

// TestNamesGoBeforeThePass: that a task can serve is named and told at once, and taken
// to the kernel, which has its way, only after others have had their turn. A new way is
// made at once.
func TestNamesGoBeforeThePass(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.start()
		s := <-r.leader.sessions
		s.send <- full()
		settle(2*planeMaxGap + planeMaxGap/2)
		passes := r.kernel.count()
		task := testTask(1, front)
		r.agent.plane.attach(netstate.LocalTask{Task: task, NetNS: "/ns/x", State: weft.EndpointStarting})
		settle(planeMinGap)
		if r.kernel.count() == passes {
			t.Fatal("a new way is not made at once")
		}
		settle(2 * planeRest) // what the pass has learnt is looked at, too
		passes = r.kernel.count()
		r.agent.plane.setReady(task.ID)
		settle(planeRest - time.Millisecond)
		if got := r.kernel.count(); got != passes {
			t.Errorf("the kernel was written %d times before others had their turn", got-passes)
		}
		settle(2 * time.Millisecond)
		if r.kernel.count() == passes {
			t.Error("no pass followed")
		}
	})
}
