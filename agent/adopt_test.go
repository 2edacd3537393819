package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestAdoption: a daemon dies and comes back; its containers do not notice.
func TestAdoption(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, back)
		r.table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB},
			weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Slot: 9, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady})
		kill, _ := r.running(one, two)
		settle(lingerSave)
		before := r.rt
		pids := map[weft.ID]int{}
		list, _ := before.List(context.Background())
		for _, c := range list {
			pids[c.Task] = c.PID
		}
		kill()
		r.leader.mu.Lock()
		r.leader.refuse = errors.New("no leader")
		r.leader.state = map[weft.ID]weft.TaskStatus{}
		r.leader.mu.Unlock()
		r.table.fail(nodeB) // a new daemon knows nobody at first
		r.table.own = nil
		r.journal.clear()
		r.dial = refuse

		r.start()
		if first, _, _ := strings.Cut(r.journal.String(), "\n"); first != "publish ready:t1 ready:t2" {
			t.Errorf("the first word to the others was %q", first)
		}
		settle(2 * planeNews)
		if got := r.journal.String(); strings.Contains(got, "start t") || strings.Contains(got, "stop t") || strings.Contains(got, "remove t") || strings.Contains(got, "destroy") {
			t.Errorf("adoption touched containers:\n%s", got)
		}
		var ready []weft.ID
		for _, e := range r.table.ownEndpoints() {
			if e.State == weft.EndpointReady {
				ready = append(ready, e.Task)
			}
		}
		if !slices.Equal(ready, []weft.ID{one.ID, two.ID}) {
			t.Errorf("published as ready: %v, want both tasks", ready)
		}
		if n := r.sockets.opened(); n != 2 {
			t.Errorf("%d resolvers are open, want 2", n)
		}
		if got := r.journal.String(); !strings.Contains(got, "overlay peer:10.0.16.9 port:t1 port:t2") || strings.Contains(got, "overlay port:t1 port:t2") {
			t.Errorf("the way to the other node was cut until gossip found it again:\n%s", got)
		}

		// The leader comes back and is told; the containers are still the same.
		r.leader.mu.Lock()
		r.leader.refuse = nil
		r.leader.mu.Unlock()
		s := <-r.leader.sessions
		s.send <- full(one, two)
		settle(time.Second)
		r.wantState(one.ID, weft.TaskRunning)
		list, _ = r.rt.List(context.Background())
		for _, c := range list {
			if pids[c.Task] != c.PID {
				t.Errorf("container of %s has pid %d, had %d", c.Task.Short(), c.PID, pids[c.Task])
			}
		}
		// And the adopted are watched: a crash is seen.
		r.rt.Exit(one.ID, 3, false)
		settle(time.Second)
		r.wantState(one.ID, weft.TaskFailed)
	})
}

// TestFirstPassWaitsForGossip: a daemon that died before it could write down
// what others run leaves the kernel alone until it has heard of them.
func TestFirstPassWaitsForGossip(t *testing.T) {
	for _, c := range []struct {
		name  string
		heard time.Duration // 0 = never
		want  time.Duration // until the first pass
	}{
		{"the other is there", 200 * time.Millisecond, 200*time.Millisecond + planeTables},
		{"the other is dead", 0, planeNews},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				kill, _ := r.running(testTask(1, front))
				kill()
				r.journal.clear()
				began := time.Now()
				if c.heard > 0 {
					time.AfterFunc(c.heard, func() {
						r.table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB},
							weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Slot: 9, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady})
					})
				}
				r.start()
				for !strings.Contains(r.journal.String(), "overlay ") && time.Since(began) < 2*planeNews {
					settle(time.Millisecond)
				}
				if took := time.Since(began); took < c.want || took > c.want+20*time.Millisecond {
					t.Errorf("the first pass began after %s, want %s:\n%s", took, c.want, r.journal)
				}
				if has := strings.Contains(r.journal.String(), "peer"); has != (c.heard > 0) {
					t.Errorf("the first pass knows the other's task: %t:\n%s", has, r.journal)
				}
			})
		})
	}
}

func TestExitWhileDown(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		kill, _ := r.running(one)
		kill()
		r.rt.Exit(one.ID, 42, false)
		r.start()
		(<-r.leader.sessions).send <- full(one)
		settle(time.Second)
		if got := r.leader.status(one.ID); got.State != weft.TaskFailed || got.ExitCode != 42 || !got.ExitKnown {
			t.Errorf("status = %+v, want failed with 42", got)
		}
		if len(r.table.ownEndpoints()) != 0 {
			t.Error("an ended task is still published")
		}
	})
}

func TestRemovedWhileDown(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one, two := testTask(1, front), testTask(2, front)
		kill, _ := r.running(one, two)
		kill()
		r.start()
		settle(100 * time.Millisecond)
		if len(r.table.ownEndpoints()) != 2 {
			t.Fatal("before the leader has spoken, both tasks must go on")
		}
		(<-r.leader.sessions).send <- full(two)
		settle(2 * time.Second)
		r.wantState(one.ID, weft.TaskRemove)
		list, _ := r.rt.List(context.Background())
		if len(list) != 1 || list[0].Task != two.ID {
			t.Errorf("containers %v, want that of task 2 alone", list)
		}
		if _, err := os.Stat(r.agent.tasks.statusPath(one.ID)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the state of a removed task: %v, want no file", err)
		}
	})
}

func TestStraysAreRemoved(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		for _, s := range []weft.ID{testID("x1"), testID("x2")} {
			if err := r.rt.Create(ctx, runtime.Spec{Task: s}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.rt.Start(ctx, testID("x1")); err != nil {
			t.Fatal(err)
		}
		r.boxes.all[testID("x3")] = sandbox.Sandbox{Task: testID("x3")}
		old := filepath.Join(r.dir, "tasks", string(testID("x4"))+".json")
		if err := saveFile(old, storedStatus{Version: statusVersion}); err != nil {
			t.Fatal(err)
		}
		r.rt.Fail("Remove", errors.New("busy"))
		r.start()
		s := <-r.leader.sessions
		settle(time.Second)
		if list, _ := r.rt.List(ctx); len(list) != 2 {
			t.Fatal("something was removed before the leader has said what is assigned")
		}
		s.send <- full(testTask(1, front))
		settle(time.Second)
		r.rt.Fail("Remove", nil) // a failed sweep is repeated
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{testTask(2, front)}}
		settle(2 * sweepRetry)
		list, _ := r.rt.List(ctx)
		if len(list) != 2 {
			t.Errorf("%d containers, want those of tasks 1 and 2", len(list))
		}
		r.wantState(testTask(1, front).ID, weft.TaskRunning)
		r.wantState(testTask(2, front).ID, weft.TaskRunning)
		boxes, _ := r.boxes.List(ctx)
		if len(boxes) != 2 {
			t.Errorf("%d sandboxes, want 2", len(boxes))
		}
		if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("state of a stray: %v, want no file", err)
		}
	})
}

func TestDamagedFiles(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		kill, _ := r.running(one)
		settle(lingerSave)
		kill()
		for _, f := range []string{"assignments.json", "endpoints.json", "tasks/" + string(one.ID) + ".json"} {
			path := filepath.Join(r.dir, f)
			if _, err := os.Stat(path); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil { // what a power cut leaves
				t.Fatal(err)
			}
		}
		r.journal.clear()
		r.start()
		(<-r.leader.sessions).send <- full(one)
		settle(time.Second)
		r.wantState(one.ID, weft.TaskRunning)
		if strings.Contains(r.journal.String(), "start t1") {
			t.Error("a running container was started again")
		}
	})
}

func TestFileOfAnotherVersionIsRefused(t *testing.T) {
	for _, f := range []string{"assignments.json", "endpoints.json"} {
		t.Run(f, func(t *testing.T) {
			r := newRig(t)
			if err := os.WriteFile(filepath.Join(r.dir, f), []byte(`{"Version":99,"Tasks":"of another kind"}`), 0o600); err != nil {
				t.Fatal(err)
			}
			a, err := New(r.config())
			if err != nil {
				t.Fatal(err)
			}
			err = a.Run(t.Context())
			if !errors.Is(err, weft.ErrUnsupported) || !strings.Contains(err.Error(), f) || !strings.Contains(err.Error(), "99") {
				t.Errorf("Run = %v, want a refusal that names file and version", err)
			}
		})
	}
}

func TestRemoveAllLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, _ := r.running(testTask(1, front), testTask(2, back))
		settle(lingerSave)
		kill()
		if err := r.agent.RemoveAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		list, _ := r.rt.List(t.Context())
		boxes, _ := r.boxes.List(t.Context())
		files, err := os.ReadDir(r.dir)
		if err != nil || len(list)+len(boxes)+len(files)+len(r.kernel.state.Networks) != 0 {
			t.Errorf("left: containers %v, sandboxes %v, files %v, networks %v, %v", list, boxes, files, r.kernel.state.Networks, err)
		}
	})
}

// TestNamesAreBackAtOnce: the first question after a restart finds its answer,
// before the kernel was looked at, before anybody was heard, and before the
// engines are there, which take long to choose.
func TestNamesAreBackAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, _ := r.running(testTask(1, front))
		kill()
		q := new(miekg.Msg)
		q.SetQuestion("web.", miekg.TypeA)
		var err error
		if r.sockets.query, err = q.Pack(); err != nil {
			t.Fatal(err)
		}
		r.sockets.answers = make(chan []byte, 1)
		r.journal.clear()
		chosen := make(chan struct{})
		r.engineGate = func(ctx context.Context) error {
			select {
			case <-chosen:
			case <-ctx.Done():
			}
			return ctx.Err()
		}
		r.start()
		answer := new(miekg.Msg)
		if err := answer.Unpack(<-r.sockets.answers); err != nil {
			t.Fatal(err)
		}
		if len(answer.Answer) != 1 || !strings.Contains(answer.Answer[0].String(), "10.0.16.200") {
			t.Errorf("the first answer was %v, want the service's address", answer)
		}
		settle(2 * planeNews)
		if strings.Contains(r.journal.String(), "overlay ") {
			t.Errorf("a pass without engines:\n%s", r.journal)
		}
		close(chosen)
		settle(2 * planeNews)
		if !strings.Contains(r.journal.String(), "overlay ") {
			t.Errorf("no pass when the engines were there:\n%s", r.journal)
		}
	})
}

// TestHangingKernelIsReported: a pass that does not end keeps all tasks waiting,
// and must not do so without a word.
func TestHangingKernelIsReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		hang := make(chan struct{})
		r.kernel.setHang(hang)
		r.start()
		settle(planeSlow - time.Millisecond)
		if s := r.log.String(); strings.Contains(s, "the kernel does not answer") {
			t.Errorf("reported too soon: %s", s)
		}
		settle(planeSlow)
		if n := strings.Count(r.log.String(), "the kernel does not answer"); n != 1 {
			t.Errorf("reported %d times, want once:\n%s", n, r.log.String())
		}
		r.kernel.setHang(nil)
		close(hang)
		settle(10 * planeMaxGap)
		if n := strings.Count(r.log.String(), "the kernel does not answer"); n != 1 {
			t.Errorf("reported %d times after it came right:\n%s", n, r.log.String())
		}
	})
}

// TestNamesGoBeforeTheKernelTurns: a task that another node drains is not given as
// an answer any more, however long the kernel takes.
func TestNamesGoBeforeTheKernelTurns(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		other := weft.Endpoint{Network: front.ID, Task: testID("t9"), Service: svc, Slot: 9, Addr: netip.MustParseAddr("10.0.16.9"), State: weft.EndpointReady}
		member := gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}
		r.table.set(member, other)
		r.running(testTask(1, front))
		ready := func() (n int) {
			for _, s := range r.agent.plane.names.last().Networks[front.ID].Services {
				for _, k := range s.Tasks {
					if k.Ready {
						n++
					}
				}
			}
			return n
		}
		if n := ready(); n != 2 {
			t.Fatalf("%d tasks are answered, want 2", n)
		}
		hang := make(chan struct{})
		r.kernel.setHang(hang)
		other.State = weft.EndpointDraining
		r.table.set(member, other)
		settle(time.Second)
		if n := ready(); n != 1 {
			t.Errorf("%d tasks are answered while the kernel hangs, want 1", n)
		}
		r.kernel.setHang(nil)
		close(hang)
		settle(time.Second)
	})
}

// TestNoEngines: an agent that gets no engines ends with the reason, and leaves
// the containers alone.
func TestNoEngines(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, _ := r.running(testTask(1, front))
		kill()
		r.journal.clear()
		want := errors.New("no engine works here")
		r.engineGate = func(context.Context) error { return want }
		a, err := New(r.config())
		if err != nil {
			t.Fatal(err)
		}
		a.listen, a.linger.dial = r.sockets.listen, r.dial
		if err := a.Run(t.Context()); !errors.Is(err, want) {
			t.Errorf("Run ended with %v, want %v", err, want)
		}
		if n := r.sockets.opened(); n != 0 || strings.Contains(r.journal.String(), "stop") {
			t.Errorf("%d resolvers are open; journal:\n%s", n, r.journal)
		}
	})
}

func TestResolverIsReopened(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, _ := r.running(testTask(1, front))
		kill()
		r.sockets.setBroken(errors.New("address in use"))
		r.start()
		settle(100 * time.Millisecond)
		if r.sockets.opened() != 0 {
			t.Fatal("the sockets are open")
		}
		r.sockets.setBroken(nil)
		settle(2 * resolverRetry)
		if n := r.sockets.opened(); n != 1 {
			t.Errorf("%d resolvers are open, want 1", n)
		}
	})
}
