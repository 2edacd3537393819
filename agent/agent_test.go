package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/wire"
)

// running starts an agent with the tasks running and returns the open session.
func (r *rig) running(tasks ...weft.Task) (kill func(), s *fakeSession) {
	r.t.Helper()
	kill = r.start()
	s = <-r.leader.sessions
	s.send <- full(tasks...)
	settle(time.Second)
	for _, t := range tasks {
		r.wantState(t.ID, weft.TaskRunning)
	}
	return kill, s
}

func bubble(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		f(t, r)
		if r.agent == nil {
			t.Fatal("the test ran no agent")
		}
	})
}

func TestTaskComesToLife(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		r.running(one)
		states := r.leader.states(one.ID)
		if !slices.IsSorted(states) {
			t.Errorf("reported states %v go back", states)
		}
		// Its port stands before it starts; it is in no balancer before it runs.
		r.journal.inOrder(t, "publish starting:t1", "overlay port:t1", "start t1", "publish ready:t1", "balancer take:t1")
		if n := r.sockets.opened(); n != 1 {
			t.Errorf("%d resolvers are open, want 1", n)
		}
	})
}

// The leader must be able to dial the node: a session tells the whole address.
func TestSessionTellsItsClusterPort(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.running()
		r.leader.mu.Lock()
		defer r.leader.mu.Unlock()
		if h := r.leader.hello; h.Addr != vtepA || h.Port != portA || h.DataPath != vtepA || h.Version != wire.ProtocolVersion {
			t.Errorf("the session began with %+v", h)
		}
	})
}

func TestLearnedAndHeartbeat(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		_, s := r.running()
		r.leader.mu.Lock()
		before := r.leader.reports
		r.leader.mu.Unlock()
		settle(10 * time.Second)
		r.leader.mu.Lock()
		beats := r.leader.reports - before
		r.leader.mu.Unlock()
		if beats < 9 || beats > 12 {
			t.Errorf("%d signs of life in 10 s, want one each second", beats)
		}
		if s.ctx.Err() != nil {
			t.Error("the session ended by itself")
		}
	})
}

func TestIncrements(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, front)
		_, s := r.running(one)
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{two}}
		settle(time.Second)
		r.wantState(two.ID, weft.TaskRunning)
		r.wantState(one.ID, weft.TaskRunning)
		s.send <- wire.Assignments{Seq: 3, Tasks: []weft.Task{desired(one, weft.TaskRemove)}}
		settle(time.Second)
		r.wantState(one.ID, weft.TaskRemove)
		s.send <- wire.Assignments{Seq: 4, GoneNodes: []weft.ID{nodeB}} // the task is still listed
		settle(time.Second)
		if n := strings.Count(r.journal.String(), "remove t1"); n != 1 {
			t.Errorf("removed %d times", n)
		}
		s.send <- wire.Assignments{Seq: 5, GoneTasks: []weft.ID{one.ID}}
		settle(time.Second)
		r.wantState(two.ID, weft.TaskRunning)
		if s.ctx.Err() != nil {
			t.Error("the session ended")
		}
		if _, known := r.agent.tasks.last[one.ID]; known {
			t.Error("a task that is gone on both sides is remembered")
		}
	})
}

func TestGapOpensANewSession(t *testing.T) {
	for name, bad := range map[string]wire.Assignments{
		"lost increment": {Seq: 3, Tasks: []weft.Task{testTask(2, front)}},
		"repeated":       {Seq: 1, Tasks: []weft.Task{testTask(2, front)}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				_, s := r.running(testTask(1, front))
				s.send <- bad
				settle(2 * time.Second)
				if s.ctx.Err() == nil {
					t.Fatal("the session with the gap goes on")
				}
				s = <-r.leader.sessions
				s.send <- full(testTask(1, front), testTask(2, front))
				settle(time.Second)
				r.wantState(testTask(2, front).ID, weft.TaskRunning)
			})
		})
	}
	t.Run("a session that begins with an increment", func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			kill, _ := r.running(testTask(1, front))
			kill()
			r.start()
			s := <-r.leader.sessions
			s.send <- wire.Assignments{Seq: 2, GoneTasks: []weft.ID{testTask(1, front).ID}} // fits the number on disk
			settle(2 * time.Second)
			if s.ctx.Err() == nil {
				t.Error("an increment without a full set was taken")
			}
		})
	})
}

func TestDrainOrder(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, front)
		_, s := r.running(one, two)
		r.journal.clear()
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskRemove)}}
		settle(drainSpread - time.Millisecond)
		if got := r.journal.String(); !strings.Contains(got, "publish draining:t1") || strings.Contains(got, "stop t1") {
			t.Errorf("before the others can have seen it:\n%s", got)
		}
		settle(time.Second)
		r.journal.inOrder(t,
			"publish draining:t1 ready:t2", "balancer drain:t1 take:t2", // both told, and the overlay as it was
			"stop t1",
			"publish ready:t2", "overlay port:t1 port:t2", "balancer take:t2", "overlay port:t2", // the overlay last
			"destroy t1")
		if got := r.leader.status(one.ID); got.State != weft.TaskRemove {
			t.Errorf("state %v", got.State)
		}
	})
}

// TestStopGrace: the time asked for is the time given, none at all included.
func TestStopGrace(t *testing.T) {
	for _, grace := range []time.Duration{0, time.Second, weft.DefaultStopGrace} {
		bubble(t, func(t *testing.T, r *rig) {
			one := testTask(1, front)
			m := full(one)
			m.Specs[0].Spec.Container.StopGrace = grace
			r.start()
			s := <-r.leader.sessions
			s.send <- m
			settle(time.Second)
			s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskShutdown)}}
			settle(time.Second)
			r.journal.inOrder(t, fmt.Sprintf("stop t1 within %s", grace))
		})
	}
}

// TestRemovedNetworkStaysForItsLastTask: a network can be removed while tasks of
// a service that went before it still end; they serve their open flows until then.
func TestRemovedNetworkStaysForItsLastTask(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, s := r.running(one)
		r.journal.clear()
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskRemove)}, GoneNetworks: []weft.ID{front.ID}, GoneServices: []weft.ID{svc}}
		settle(time.Second)
		log := r.journal.String()
		before, after, stopped := strings.Cut(log, "stop t1")
		if !stopped || strings.Contains(strings.ReplaceAll(before, "overlay port:t1", ""), "overlay") {
			t.Errorf("its port went before it had stopped:\n%s", log)
		}
		if !strings.Contains(after, "overlay") || len(r.kernel.networks()) != 0 {
			t.Errorf("the network is still there after its last task, %v:\n%s", r.kernel.networks(), log)
		}
	})
}

// TestStopFailsWhileDraining: what drains must not be balanced to again because
// its stop is tried again.
func TestStopFailsWhileDraining(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, s := r.running(one)
		r.rt.Fail("Stop", weft.ErrUnavailable)
		r.journal.clear()
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskShutdown)}}
		settle(time.Second)
		if got := r.leader.status(one.ID); got.State != weft.TaskRunning || !strings.Contains(got.Err, "tried again") {
			t.Fatalf("status %+v, want running with the reason", got)
		}
		if _, after, _ := strings.Cut(r.journal.String(), "publish draining:t1"); strings.Contains(after, "take:t1") || strings.Contains(after, "ready:t1") {
			t.Errorf("it was balanced to again:\n%s", after)
		}
		r.rt.Fail("Stop", nil)
		settle(20 * time.Second)
		r.wantState(one.ID, weft.TaskShutdown)
	})
}

// TestShutdownBeforeStart: a container that was never started is not stopped.
func TestShutdownBeforeStart(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := desired(testTask(1, front), weft.TaskReady)
		r.start()
		s := <-r.leader.sessions
		s.send <- full(one)
		settle(time.Second)
		r.wantState(one.ID, weft.TaskReady)
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskShutdown)}}
		settle(time.Second)
		r.wantState(one.ID, weft.TaskShutdown)
		if strings.Contains(r.journal.String(), "stop t1") {
			t.Error("a container that was not started was stopped")
		}
		if n := r.sockets.opened(); n != 0 {
			t.Errorf("%d resolvers are open after the end", n)
		}
	})
}

func TestSpecThatWasNotSent(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		odd, lost := testTask(1, front), testTask(3, front)
		odd.SpecVersion = 7
		lost.Attachments[0].Network = testID("q")
		r.start()
		s := <-r.leader.sessions
		s.send <- full(odd, testTask(2, front), lost)
		settle(time.Second)
		r.wantState(testTask(2, front).ID, weft.TaskRunning) // the others are not held up
		r.wantState(odd.ID, weft.TaskRejected)
		if got := r.leader.status(odd.ID).Err; !strings.Contains(got, "version 7") {
			t.Errorf("reason %q does not name the version", got)
		}
		r.wantState(lost.ID, weft.TaskRejected)
		if got := r.leader.status(lost.ID).Err; !strings.Contains(got, string(testID("q"))) {
			t.Errorf("reason %q does not name the network", got)
		}
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(odd, weft.TaskRemove)}}
		settle(time.Second)
		r.wantState(odd.ID, weft.TaskRemove)
	})
}

func TestBrokenNetworkHoldsUpNobodyElse(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, back)
		r.kernel.setFail(4098, errors.New("file exists"))
		r.start()
		s := <-r.leader.sessions
		s.send <- full(one, two)
		settle(200 * time.Millisecond)
		r.wantState(one.ID, weft.TaskRunning)
		got := r.leader.status(two.ID)
		if got.State != weft.TaskPreparing || !strings.Contains(got.Err, "file exists") {
			t.Fatalf("the task on the broken network is %v (%q), want preparing with the reason", got.State, got.Err)
		}
		if strings.Contains(r.journal.String(), "start t2") {
			t.Fatal("a task started without its network")
		}
		// Releasing does not wait either.
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskRemove)}}
		settle(500 * time.Millisecond)
		r.wantState(one.ID, weft.TaskRemove)
		// It heals by itself.
		r.kernel.setFail(4098, nil)
		settle(15 * time.Second)
		r.wantState(two.ID, weft.TaskRunning)
		if got := r.leader.status(two.ID).Err; got != "" {
			t.Errorf("the old reason stands: %q", got)
		}
	})
}

func TestUnnamedFailureHoldsUpAll(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		r.kernel.setFail(0, errors.New("netlink is gone"))
		r.start()
		(<-r.leader.sessions).send <- full(one)
		settle(time.Second)
		if got := r.leader.status(one.ID); got.State != weft.TaskPreparing || !strings.Contains(got.Err, "netlink is gone") {
			t.Fatalf("%v (%q), want preparing with the reason", got.State, got.Err)
		}
		r.kernel.setFail(0, nil)
		settle(10 * time.Second)
		r.wantState(one.ID, weft.TaskRunning)
	})
}

func TestFailedPassIsRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		_, _ = r.running(testTask(1, front))
		r.kernel.setFail(0, errors.New("once"))
		r.table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}, weft.Endpoint{
			Network: front.ID, Task: testID("t9"), Service: svc, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady})
		settle(10 * time.Millisecond)
		r.kernel.setFail(0, nil)
		r.kernel.mu.Lock()
		r.kernel.state.Networks = nil // and half of it was lost
		r.kernel.mu.Unlock()
		settle(planeRetryGap + planeMinGap)
		if got := r.kernel.peers(); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("10.0.16.9")}) {
			t.Errorf("peers %v after the retry gap", got)
		}
		// Without any event the kernel is written again within the longest gap.
		r.kernel.mu.Lock()
		r.kernel.state.Networks = nil
		r.kernel.mu.Unlock()
		settle(planeMaxGap + 2*planeMinGap)
		if len(r.kernel.peers()) != 1 {
			t.Error("what somebody else broke is not repaired")
		}
	})
}

// TestDrainIsToldWhateverFails: others hear of a draining task although this
// host's own kernel fails.
func TestDrainIsToldWhateverFails(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, s := r.running(one)
		r.paths.link.Store(0)
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{desired(one, weft.TaskShutdown)}}
		settle(time.Second)
		r.wantState(one.ID, weft.TaskShutdown)
		r.journal.inOrder(t, "publish draining:t1", "stop t1", "publish ")
	})
}

func TestLeaderLostDuringAReport(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, s := r.running(one)
		r.leader.onReport(func(ctx context.Context, rep wire.Report) error {
			<-ctx.Done() // the leader took nothing and answers nothing
			return ctx.Err()
		})
		r.rt.Exit(one.ID, 9, false)
		settle(2 * time.Second)
		r.wantState(one.ID, weft.TaskRunning)
		r.leader.onReport(nil)
		s.end <- weft.ErrUnavailable
		<-r.leader.sessions
		settle(100 * time.Millisecond)
		r.wantState(one.ID, weft.TaskFailed)
	})
}

func TestFailedReportEndsTheSession(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, s := r.running(one)
		r.leader.onReport(func(context.Context, wire.Report) error { return weft.ErrUnavailable })
		r.rt.Exit(one.ID, 9, false)
		settle(2 * time.Second)
		if s.ctx.Err() == nil {
			t.Fatal("the session outlived a failed report")
		}
		r.leader.onReport(nil)
		settle(2 * time.Second)
		r.wantState(one.ID, weft.TaskFailed)
	})
}

// TestRecordedBeforeReported: whatever the leader knows is on disk.
func TestRecordedBeforeReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		checked := 0
		r.leader.onReport(func(_ context.Context, rep wire.Report) error {
			for _, k := range rep.Tasks {
				if k.Status.State <= weft.TaskAssigned || k.Status.State == weft.TaskRemove {
					continue
				}
				st, err := r.agent.tasks.loadStatus(k.Task)
				if err != nil || st == nil || st.Status.State < k.Status.State {
					t.Errorf("reported %v, on disk %+v, %v", k.Status.State, st, err)
				}
				checked++
			}
			return nil
		})
		r.running(testTask(1, front), testTask(2, back))
		if checked < 2 {
			t.Errorf("%d reports were looked at", checked)
		}
	})
}

// TestNewSessionDoesNotGoBack: what a new session repeats is never older than
// what was recorded.
func TestNewSessionDoesNotGoBack(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.start()
		s := <-r.leader.sessions
		s.send <- full(testTask(1, front))
		for range 40 {
			r.agent.tasks.reportAll()
			settle(time.Millisecond)
		}
		settle(time.Second)
		states := r.leader.states(testTask(1, front).ID)
		if !slices.IsSorted(states) {
			t.Errorf("reported states %v go back", states)
		}
		r.wantState(testTask(1, front).ID, weft.TaskRunning)
	})
}

func TestWithdraw(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		_, s := r.running(testTask(1, front))
		if err := r.agent.Withdraw(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := r.table.ownEndpoints(); len(got) != 0 {
			t.Errorf("published after the withdrawal: %v", got)
		}
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{testTask(2, front)}}
		settle(time.Second)
		if got := r.table.ownEndpoints(); len(got) != 0 {
			t.Errorf("published again: %v", got)
		}
	})
}

// TestContainersOfTheNode: what the API shows and does to single containers.
func TestContainersOfTheNode(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, back)
		r.running(one, two)
		list, err := r.agent.Containers(t.Context())
		if err != nil || len(list) != 2 {
			t.Fatalf("containers %v, %v", list, err)
		}
		for _, c := range list {
			network := map[weft.ID]string{one.ID: "front", two.ID: "back"}[c.Task]
			if c.ID != weft.ContainerID(c.Task) || c.State.Status != "running" || c.Image != "weft/whoami" || len(c.Networks) != 1 || !c.Networks[network].Addr.IsValid() {
				t.Errorf("container %+v, want it running on %s", c, network)
			}
		}
		if err := r.agent.RemoveContainer(t.Context(), one.ID, false); !errors.Is(err, weft.ErrConflict) {
			t.Errorf("remove a running container: %v, want a conflict", err)
		}
		if err := r.agent.RemoveContainer(t.Context(), one.ID, true); err != nil {
			t.Errorf("force: %v", err)
		}
		if err := r.agent.RemoveContainer(t.Context(), one.ID, true); !errors.Is(err, weft.ErrNotFound) {
			t.Errorf("again: %v, want not found", err)
		}
		if err := r.agent.StopContainer(t.Context(), two.ID, time.Second); err != nil {
			t.Errorf("stop: %v", err)
		}
		if code, err := r.agent.WaitContainer(t.Context(), two.ID); code != 7 || err != nil {
			t.Errorf("wait: %d, %v", code, err)
		}
		settle(time.Second)
		r.wantState(one.ID, weft.TaskFailed) // the service's restart policy acts
		r.wantState(two.ID, weft.TaskFailed)
		if len(r.table.ownEndpoints()) != 0 {
			t.Error("an ended task is published")
		}
	})
}

func TestNewChecksItsConfig(t *testing.T) {
	r := newRig(t)
	for name, spoil := range map[string]func(*Config){
		"node": func(c *Config) { c.Node = "x" }, "VTEP": func(c *Config) { c.VTEP = netip.Addr{} }, "Log": func(c *Config) { c.Log = nil },
		"Gossip": func(c *Config) { c.Gossip = nil }, "StateDir": func(c *Config) { c.StateDir = "" },
	} {
		cfg := r.config()
		spoil(&cfg)
		if _, err := New(cfg); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("without %s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := New(r.config()); err != nil {
		t.Error(err)
	}
}
