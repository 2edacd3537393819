package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// arriving begins a task beside another on node b; arrive is what b says. It
// returns the time until the leader heard that the task runs.
func arriving(r *rig, within time.Duration, arrive func(ctx context.Context, node weft.ID) error) time.Duration {
	r.t.Helper()
	n := &neighbours{journal: r.journal, answer: func(context.Context, weft.ID) error { return nil }, arrive: arrive}
	r.neighbour = n.agent
	r.table.set(memberOfB, endpointB)
	r.start()
	s := <-r.leader.sessions
	began := time.Now()
	s.send <- full(testTask(1, front))
	for time.Since(began) < within {
		if slices.Contains(r.leader.states(testID("t1")), weft.TaskRunning) {
			return time.Since(began)
		}
		settle(time.Millisecond)
	}
	return within
}

func TestRunningFollowsArrival(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		said := make(chan error)
		time.AfterFunc(700*time.Millisecond, func() { said <- fmt.Errorf("%w: not now", weft.ErrUnavailable) })
		time.AfterFunc(1200*time.Millisecond, func() { said <- nil })
		got := arriving(r, 5*time.Second, func(ctx context.Context, _ weft.ID) error {
			select {
			case err := <-said:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if got < 1200*time.Millisecond || got > 1300*time.Millisecond {
			t.Errorf("said to run after %s", got)
		}
		r.journal.inOrder(t, "start t1", "publish ready:t1", "tell b about t1 on 1 networks", "b leads unavailable", "b leads <nil>")
		r.wantDrains(arriveConfirmed, arrivePassed, 1, 0)
	})
}

func TestArrivalIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		answer   func(ctx context.Context, _ weft.ID) error
		from, to time.Duration
	}{
		"silent":  {func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() }, drainBound, drainBound + 100*time.Millisecond},
		"failing": {func(context.Context, weft.ID) error { return fmt.Errorf("%w: refused", weft.ErrUnavailable) }, drainBound, drainBound + 100*time.Millisecond},
		"older":   {func(context.Context, weft.ID) error { return fmt.Errorf("%w: no such call", weft.ErrUnsupported) }, 0, 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				if got := arriving(r, 5*time.Second, c.answer); got < c.from || got > c.to {
					t.Errorf("said to run after %s", got)
				}
				confirmed := 0
				if name == "older" {
					confirmed = 1 // by all that can say so
				}
				if last := r.wantDrains(arriveConfirmed, arrivePassed, confirmed, 1); !strings.Contains(last.Object, string(nodeB)) {
					t.Errorf("counted %+v", last)
				}
				if !strings.Contains(r.log.String(), "has not confirmed that it leads to a new task") {
					t.Error("nothing is logged")
				}
			})
		})
	}
}

// TestStopDoesNotWaitForAnArrival, and it is no node's fault.
func TestStopDoesNotWaitForAnArrival(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		n := &neighbours{journal: r.journal, answer: func(context.Context, weft.ID) error { return nil },
			arrive: func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() }}
		r.neighbour = n.agent
		r.table.set(memberOfB, endpointB)
		r.start()
		s := <-r.leader.sessions
		s.send <- full(testTask(1, front))
		settle(500 * time.Millisecond)
		shutdown(s, 2)
		settle(500 * time.Millisecond)
		r.wantState(testID("t1"), weft.TaskShutdown)
		r.wantDrains(arriveConfirmed, arrivePassed, 0, 0)
	})
}

// TestArrivalGoesBeforeGossip: the asked node leads to the task although its table
// says that it starts; of one that the table does not know it waits to hear.
func TestArrivalGoesBeforeGossip(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		starting := endpointB
		starting.State = weft.EndpointStarting
		r.table.set(memberOfB)
		_, _ = r.running(testTask(1, front))
		nine := endpointB.Task
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		nets := []weft.ID{front.ID, testID("elsewhere")} // the second is not on this node
		if err := r.agent.Arrive(short, nodeB, nine, nets); !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("an unknown task: %v", err)
		}
		if n := len(r.arrived()); n != 1 {
			t.Errorf("%d words are kept", n)
		}
		time.AfterFunc(500*time.Millisecond, func() { r.table.set(memberOfB, starting) })
		began := time.Now()
		if err := r.agent.Arrive(t.Context(), nodeB, nine, nets); err != nil || time.Since(began) < 500*time.Millisecond || time.Since(began) > 600*time.Millisecond {
			t.Errorf("confirmed after %s: %v", time.Since(began), err)
		}
		if got := r.balancer.backends(); !slices.Contains(got, "take:t9") {
			t.Errorf("confirmed with backends %q", got)
		}
		// The word of another node is none.
		r.table.set(memberOfB, starting)
		settle(2 * arriveHeed)
		if got := r.balancer.backends(); slices.Contains(got, "take:t9") {
			t.Errorf("the table has said otherwise for long: backends %q", got)
		}
		if err := r.agent.Arrive(short, testID("x"), nine, nets); err == nil || slices.Contains(r.balancer.backends(), "take:t9") {
			t.Errorf("by the word of another node: %v, backends %q", err, r.balancer.backends())
		}
		r.kernel.setFail(front.VNI, errors.New("broken"))
		if err := r.agent.Arrive(t.Context(), nodeB, nine, nets); !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("on a broken network: %v", err)
		}
		r.kernel.setFail(front.VNI, nil)
		if err := r.agent.Arrive(t.Context(), nodeB, nine, nets); err != nil {
			t.Fatal(err)
		}
		// A drain goes before an arrival, and the table's own word ends it.
		if err := r.agent.Drain(t.Context(), nodeB, nine); err != nil {
			t.Fatal(err)
		}
		if got := r.balancer.backends(); !slices.Contains(got, "drain:t9") {
			t.Errorf("draining: backends %q", got)
		}
		r.table.set(memberOfB, endpointB)
		settle(arriveHeed + 2*planeMaxGap) // also for what another node has said
		if n := len(r.arrived()); n != 0 {
			t.Errorf("%d words are kept although the table says the same", n)
		}
	})
}

func (r *rig) arrived() map[owned]time.Time {
	r.agent.plane.mu.Lock()
	defer r.agent.plane.mu.Unlock()
	return r.agent.plane.past.arrived
}

// TestVerdictIsRecordedFirst: that a task is unhealthy, and why, is told before it is
// stopped, and a daemon that is restarted meanwhile goes on stopping it.
func TestVerdictIsRecordedFirst(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				n := &neighbours{journal: r.journal, answer: func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() }}
				r.neighbour = n.agent
				r.table.set(memberOfB, endpointB)
				kill, _ := checked(r, testCheck)
				settle(2 * time.Second)
				r.execs.out = "no database"
				r.execs.set(3, nil)
				settle(30 * time.Second) // two failures, and the third; it drains for 2 s
				const why = "unhealthy container: 3 checks in a row failed, the last with exit 3: no database"
				if st := r.leader.status(testID("t1")); st.State != weft.TaskRunning || st.Err != why || !st.Unhealthy {
					t.Fatalf("status %+v", st)
				}
				r.wantHealth(weft.HealthUnhealthy, 3, 4)
				if strings.Contains(r.journal.String(), "stop t1") {
					t.Fatal("it is stopped already")
				}
				if restart {
					kill()
					time.Sleep(time.Minute)
					r.execs.set(0, nil) // too late
					r.journal.clear()
					r.start()
					settle(time.Second)
					r.wantHealth(weft.HealthUnhealthy, 0, 0)
				}
				settle(5 * time.Second)
				r.wantState(testID("t1"), weft.TaskFailed)
				if st := r.leader.status(testID("t1")); st.Err != why || st.Unhealthy || st.Ran.IsZero() || !st.ExitKnown {
					t.Errorf("status %+v", st)
				}
				if restart && strings.Contains(r.journal.String(), "publish ready") {
					t.Errorf("it was led to again:\n%s", r.journal)
				}
				if !restart {
					r.wantHealth(weft.HealthUnhealthy, 3, 4) // of the ended container, too
				}
			})
		})
	}
}

// TestNewestEndpointsAreConfirmed: a pass that had looked at the table before it had
// the endpoint confirms nothing.
func TestNewestEndpointsAreConfirmed(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.table.set(memberOfB)
		_, _ = r.running(testTask(1, front))
		hang := make(chan struct{})
		r.kernel.setHang(hang)
		r.agent.plane.kick()
		settle(time.Second) // a pass hangs that knows nothing of it
		starting := endpointB
		starting.State = weft.EndpointStarting
		r.table.set(memberOfB, starting)
		done := make(chan error, 1)
		go func() {
			done <- r.agent.Arrive(t.Context(), nodeB, endpointB.Task, []weft.ID{front.ID})
		}()
		settle(time.Second)
		select {
		case err := <-done:
			t.Fatalf("confirmed by a pass that hangs: %v", err)
		default:
		}
		r.kernel.setHang(nil)
		close(hang)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := r.balancer.backends(); !slices.Contains(got, "take:t9") {
			t.Errorf("confirmed with backends %q", got)
		}
	})
}
