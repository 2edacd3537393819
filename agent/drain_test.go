package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/wire"
)

// fakeConns is what tasks have open.
type fakeConns struct {
	mu  sync.Mutex // guards: all below
	n   int
	err error
}

func (f *fakeConns) count(string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n, f.err
}

func (f *fakeConns) set(n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n, f.err = n, err
}

// neighbours answer by a function of the test.
type neighbours struct {
	journal *journal
	answer  func(ctx context.Context, node weft.ID) error
	arrive  func(ctx context.Context, node weft.ID) error // nil = at once
}

func (n *neighbours) agent(node weft.ID, addr netip.AddrPort) wire.Agent {
	return neighbour{n, node, addr}
}

type neighbour struct {
	*neighbours
	node weft.ID
	addr netip.AddrPort
}

func (n neighbour) Logs(context.Context, weft.ID, weft.LogOptions, func(weft.LogRecord) error) error {
	return weft.ErrUnsupported
}

func (n neighbour) Drain(ctx context.Context, owner, task weft.ID) error {
	n.journal.add("ask %s at %s about %s of %s", n.node.Short()[:1], n.addr, task.Short()[:2], owner.Short()[:1])
	err := n.answer(ctx, n.node)
	n.journal.add("%s says %v", n.node.Short()[:1], err)
	return err
}

func (n neighbour) Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error {
	if n.arrive == nil {
		return nil
	}
	n.journal.add("tell %s about %s on %d networks", n.node.Short()[:1], task.Short()[:2], len(networks))
	err := n.arrive(ctx, n.node)
	n.journal.add("%s leads %v", n.node.Short()[:1], err)
	return err
}

var (
	memberOfB = gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}
	endpointB = weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Slot: 9, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady}
)

// draining runs one task beside another on node b, and takes it away; answer is
// what b says. The function that it returns gives the time until the signal.
func draining(r *rig, answer func(ctx context.Context, node weft.ID) error) (*fakeSession, func(within time.Duration) time.Duration) {
	r.t.Helper()
	n := &neighbours{journal: r.journal, answer: answer}
	r.neighbour = n.agent
	r.table.set(memberOfB, endpointB)
	_, s := r.running(testTask(1, front))
	r.journal.clear()
	began := time.Now()
	return s, func(within time.Duration) time.Duration {
		r.t.Helper()
		for time.Since(began) < within {
			if strings.Contains(r.journal.String(), "stop t1") {
				return time.Since(began)
			}
			settle(time.Millisecond)
		}
		return within
	}
}

func shutdown(s *fakeSession, seq uint64) {
	s.send <- wire.Assignments{Seq: seq, Tasks: []weft.Task{desired(testTask(1, front), weft.TaskShutdown)}}
}

// wantDrains checks both counts of one kind of word and returns what was last
// passed over.
func (r *rig) wantDrains(confirmed, passed string, wantConfirmed, wantPassed int) weft.RepairCount {
	r.t.Helper()
	_, all := r.agent.cfg.Drains.Drains()
	by := map[string]weft.RepairCount{}
	for _, c := range all {
		by[c.Kind] = c
	}
	if by[confirmed].Count != uint64(wantConfirmed) || by[passed].Count != uint64(wantPassed) {
		r.t.Errorf("counted %+v, want %d and %d", all, wantConfirmed, wantPassed)
	}
	return by[passed]
}

func TestSignalFollowsConfirmation(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		said := make(chan error)
		s, signalled := draining(r, func(ctx context.Context, _ weft.ID) error {
			select {
			case err := <-said:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		shutdown(s, 2)
		time.AfterFunc(700*time.Millisecond, func() { said <- fmt.Errorf("%w: not now", weft.ErrUnavailable) })
		time.AfterFunc(1200*time.Millisecond, func() { said <- nil })
		got := signalled(5 * time.Second)
		if got < 1200*time.Millisecond+drainSpread || got > 1200*time.Millisecond+drainSpread+50*time.Millisecond {
			t.Errorf("signalled after %s", got)
		}
		r.journal.inOrder(t, "publish draining:t1", "ask b at 10.99.0.2:2377 about t1 of a", "b says unavailable", "b says <nil>", "stop t1")
		r.wantDrains(drainConfirmed, drainPassed, 1, 0)
	})
}

func TestSilentNodeIsPassedAndCounted(t *testing.T) {
	for name, answer := range map[string]func(ctx context.Context, _ weft.ID) error{
		"silent":  func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() },
		"failing": func(context.Context, weft.ID) error { return fmt.Errorf("%w: connection refused", weft.ErrUnavailable) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				s, signalled := draining(r, answer)
				shutdown(s, 2)
				if got := signalled(5 * time.Second); got < drainBound || got > drainBound+drainSpread+50*time.Millisecond {
					t.Errorf("signalled after %s", got)
				}
				if last := r.wantDrains(drainConfirmed, drainPassed, 0, 1); !strings.Contains(last.Object, string(nodeB)) {
					t.Errorf("counted %+v", last)
				}
				if !strings.Contains(r.log.String(), "has not confirmed") {
					t.Error("nothing is logged")
				}
			})
		})
	}
}

func TestNodeThatFailsIsNotWaitedFor(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		s, signalled := draining(r, func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() })
		shutdown(s, 2)
		time.AfterFunc(500*time.Millisecond, func() { r.table.fail(nodeB) })
		if got := signalled(5 * time.Second); got < 500*time.Millisecond || got > 550*time.Millisecond+drainSpread {
			t.Errorf("signalled after %s", got)
		}
	})
}

func TestNodeWithoutTasksThereIsNotAsked(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		s, signalled := draining(r, func(ctx context.Context, _ weft.ID) error { <-ctx.Done(); return ctx.Err() })
		r.table.set(memberOfB, weft.Endpoint{Network: back.ID, Task: testID("t9"), Service: svc, Addr: netip.MustParseAddr("10.0.32.9")})
		shutdown(s, 2)
		if got := signalled(5 * time.Second); got > 50*time.Millisecond+drainSpread {
			t.Errorf("signalled after %s", got)
		}
	})
}

func TestDrainTimeIsForOpenConnections(t *testing.T) {
	view := func(d time.Duration) wire.Assignments {
		v := full().Services[0]
		v.Drain = d
		return wire.Assignments{Services: []wire.ServiceView{v}}
	}
	yes := func(context.Context, weft.ID) error { return nil }
	for _, c := range []struct {
		name     string
		drain    time.Duration
		conns    int
		err      error
		idle     time.Duration // when connections end; 0 = never
		change   wire.Assignments
		from, to time.Duration
	}{
		{name: "none open", drain: time.Minute, from: drainSpread, to: drainSpread + 50*time.Millisecond},
		{name: "none wanted", conns: 3, from: drainSpread, to: drainSpread + 50*time.Millisecond},
		{name: "they end", drain: time.Minute, conns: 3, idle: 20 * time.Second, from: 20 * time.Second, to: 20*time.Second + 2*drainLook},
		{name: "they do not", drain: 25 * time.Second, conns: 3, from: 25 * time.Second, to: 25*time.Second + 50*time.Millisecond},
		{name: "cannot be counted", drain: 25 * time.Second, err: errors.New("no diag"), from: 25 * time.Second, to: 25*time.Second + 50*time.Millisecond},
		{name: "service is removed", drain: time.Hour, conns: 3, change: wire.Assignments{GoneServices: []weft.ID{svc}}, from: 10 * time.Second, to: 10*time.Second + 2*drainLook},
		{name: "time is shortened", drain: time.Hour, conns: 3, change: view(12 * time.Second), from: 12 * time.Second, to: 12*time.Second + 2*drainLook},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				s, signalled := draining(r, yes)
				r.conns.set(c.conns, c.err)
				a := view(c.drain)
				a.Seq = 2
				s.send <- a
				shutdown(s, 3)
				if c.idle > 0 {
					time.AfterFunc(c.idle, func() { r.conns.set(0, nil) })
				}
				time.AfterFunc(10*time.Second, func() {
					c.change.Seq = 4
					s.send <- c.change
				})
				if got := signalled(90 * time.Second); got < c.from || got > c.to {
					t.Errorf("signalled after %s, want %s to %s", got, c.from, c.to)
				}
				settle(11 * time.Second)
			})
		})
	}
}

// TestDrainTimeGoesOnOverARestart: it does not begin anew, and what is over is over.
func TestDrainTimeGoesOnOverARestart(t *testing.T) {
	for _, c := range []struct{ killed, away, want time.Duration }{
		{10 * time.Second, 5 * time.Second, 25 * time.Second},
		{10 * time.Second, time.Minute, 70 * time.Second},
	} {
		bubble(t, func(t *testing.T, r *rig) {
			n := &neighbours{journal: r.journal, answer: func(context.Context, weft.ID) error { return nil }}
			r.neighbour = n.agent
			r.table.set(memberOfB, endpointB)
			kill, s := r.running(testTask(1, front))
			r.conns.set(3, nil)
			v := full().Services[0]
			v.Drain = 25 * time.Second
			s.send <- wire.Assignments{Seq: 2, Services: []wire.ServiceView{v}}
			began := time.Now()
			shutdown(s, 3)
			settle(c.killed)
			kill()
			time.Sleep(c.away)
			r.start()
			for time.Since(began) < 2*time.Minute && !strings.Contains(r.journal.String(), "stop t1") {
				settle(10 * time.Millisecond)
			}
			if got := time.Since(began); got < c.want || got > c.want+2*drainSpread+50*time.Millisecond {
				t.Errorf("signalled after %s, want %s", got, c.want)
			}
		})
	}
}

// TestClockThatWasSetBack adds nothing to a drain time.
func TestClockThatWasSetBack(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.running(testTask(1, front))
		id, now := testID("t1"), time.Now()
		if got := r.agent.tasks.beginDrain(id, now); !got.Equal(now) {
			t.Errorf("began at %s", got)
		}
		if got := r.agent.tasks.beginDrain(id, now.Add(time.Second)); !got.Equal(now) {
			t.Errorf("began again, at %s", got)
		}
		back := now.Add(-time.Hour)
		if got := r.agent.tasks.beginDrain(id, back); !got.Equal(back) {
			t.Errorf("began at %s", got)
		}
		if st, err := r.agent.tasks.loadStatus(id); err != nil || !st.Drain.Equal(back) || st.Status.State != weft.TaskRunning {
			t.Errorf("recorded %+v, %v", st, err)
		}
	})
}

// TestOwnersWordGoesBeforeGossip: the asked node takes the task out although its
// table does not say so yet, and answers when its kernel has followed.
func TestOwnersWordGoesBeforeGossip(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.table.set(memberOfB, endpointB)
		_, _ = r.running(testTask(1, front))
		nine := endpointB.Task
		if got := r.balancer.backends(); !slices.Contains(got, "take:t9") {
			t.Fatalf("backends %q", got)
		}
		if err := r.agent.Drain(t.Context(), testID("x"), nine); err != nil { // no concern of x
			t.Fatal(err)
		}
		if got := r.balancer.backends(); !slices.Contains(got, "take:t9") {
			t.Errorf("after the word of another node: backends %q", got)
		}
		r.kernel.setFail(front.VNI, errors.New("broken"))
		if err := r.agent.Drain(t.Context(), nodeB, nine); !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("on a broken network: %v", err)
		}
		r.kernel.setFail(front.VNI, nil)
		if err := r.agent.Drain(t.Context(), nodeB, nine); err != nil {
			t.Fatal(err)
		}
		if got := r.balancer.backends(); !slices.Contains(got, "drain:t9") {
			t.Errorf("confirmed with backends %q", got)
		}
		settle(2 * drainHeed) // the table still has it: it stays so
		r.table.set(memberOfB, endpointB)
		settle(time.Second)
		if got := r.balancer.backends(); !slices.Contains(got, "drain:t9") {
			t.Errorf("after a while: backends %q", got)
		}
		r.table.set(memberOfB)
		settle(2 * drainHeed)
		r.agent.plane.mu.Lock()
		defer r.agent.plane.mu.Unlock()
		if n := len(r.agent.plane.past.draining); n != 0 {
			t.Errorf("%d words are kept for ever", n)
		}
	})
}

// TestConcernedAgainstSlowTwin: asked is exactly who is alive, of the cluster,
// and attached.
func TestConcernedAgainstSlowTwin(t *testing.T) {
	ids := []weft.ID{nodeA, nodeB, testID("c"), testID("d")}
	nets := []weft.ID{front.ID, back.ID, testID("i")}
	rapid.Check(t, func(t *rapid.T) {
		m := newModel()
		ingress := rapid.Bool().Draw(t, "an ingress network")
		for i, id := range nets {
			m.Networks[id] = weft.Network{ID: id, Spec: weft.NetworkSpec{Ingress: ingress && i == 2}}
		}
		member, known := map[weft.ID]bool{}, map[weft.ID]bool{}
		var members []gossip.Member
		for _, id := range ids {
			if known[id] = rapid.Bool().Draw(t, "known"); known[id] {
				m.Nodes[id] = wire.NodeView{ID: id}
			}
			if member[id] = rapid.Bool().Draw(t, "alive"); member[id] {
				members = append(members, gossip.Member{ID: id})
			}
		}
		has := map[[2]weft.ID]bool{}
		var endpoints []weft.OwnedEndpoint
		for range rapid.IntRange(0, 6).Draw(t, "endpoints") {
			o, n := rapid.SampledFrom(ids).Draw(t, "owner"), rapid.SampledFrom(nets).Draw(t, "network")
			has[[2]weft.ID{o, n}] = true
			endpoints = append(endpoints, weft.OwnedEndpoint{Endpoint: weft.Endpoint{Network: n}, Owner: o})
		}
		var task weft.Task
		for _, n := range nets {
			if rapid.Bool().Draw(t, "on") {
				task.Attachments = append(task.Attachments, weft.Attachment{Network: n})
			}
		}
		var want []weft.ID
		for _, id := range slices.Sorted(slices.Values(ids)) {
			needed := false
			for _, at := range task.Attachments {
				needed = needed || has[[2]weft.ID{id, at.Network}] || ingress && at.Network == nets[2]
			}
			if needed && id != nodeA && member[id] && known[id] {
				want = append(want, id)
			}
		}
		if got := concerned(m, nodeA, task, members, endpoints); !slices.Equal(got, want) {
			t.Fatalf("asked %v, want %v", got, want)
		}
	})
}

func TestDrainTimeWithoutNetworks(t *testing.T) {
	task := testTask(1, front)
	task.Attachments = nil
	spec := testSpec(1)
	spec.Spec.Labels = map[string]string{"weft.drain": "25s"}
	for _, c := range []struct {
		desired weft.TaskState
		service bool // known to this node
		want    time.Duration
	}{
		{weft.TaskShutdown, false, 25 * time.Second}, {weft.TaskRemove, false, 0},
		{weft.TaskShutdown, true, 7 * time.Second}, {weft.TaskRemove, true, 7 * time.Second},
	} {
		m := newModel()
		m.Tasks[task.ID] = desired(task, c.desired)
		m.Specs[specKey{svc, 1}] = spec
		if c.service {
			m.Services[svc] = wire.ServiceView{ID: svc, Drain: 7 * time.Second}
		}
		if got := m.drainTime(task); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}
