package orchestrator

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// settled waits until the update of a service has come to an end.
func (r *rig) settled(id weft.ID) weft.Service {
	r.t.Helper()
	var s weft.Service
	r.eventually(5*time.Minute, "the update ends", func() (err error) {
		if s, err = r.leader().Service(r.ctx, string(id)); err == nil && s.Update.State.IsRunning() {
			err = fmt.Errorf("update is %+v", s.Update)
		}
		return err
	})
	return s
}

// breakUpdate updates a service to what does not run, without its network and port.
func (r *rig) breakUpdate(s weft.Service) weft.Service {
	r.t.Helper()
	up := s.Spec
	up.Container.Image, up.Networks, up.Ports = brokenImage, nil, nil
	up.Update.OnFailure = weft.UpdateRollback
	out, err := r.leader().UpdateService(r.ctx, s.ID, s.Meta.Index, up)
	r.must(err)
	return out
}

func (r *rig) webWithAll(replicas uint64) weft.Service {
	r.t.Helper()
	_, err := r.leader().CreateNetwork(r.ctx, weft.NetworkSpec{Name: "net"})
	r.must(err)
	spec := webSpec("web", replicas)
	spec.Networks = []weft.NetworkTarget{{Network: "net"}}
	spec.Ports = []weft.PortSpec{{Target: 81, Published: 8081}}
	s, err := r.leader().CreateService(r.ctx, spec)
	r.must(err)
	return s
}

// TestFailedUpdateGoesBack, with network, address and port; also when the leader
// is lost on the way.
func TestFailedUpdateGoesBack(t *testing.T) {
	for name, managers := range map[string]int{"one leader": 1, "the leader is lost": 3} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.boot(managers)
				for i := range 2 {
					w := r.worker(i + 1)
					defer w.crash()
				}
				web := r.webWithAll(3)
				r.waitRunning(web.ID, 3)
				broken := r.breakUpdate(web)
				if len(broken.VIPs) != 0 || len(broken.Ports) != 0 {
					t.Fatalf("updated service is %+v", broken)
				}
				if managers > 1 {
					r.stop(r.leader())
				}
				s := r.settled(web.ID)
				if s.Update.State != weft.RollbackDone || s.Update.Message != "rollback completed" || s.Update.EndedAt.IsZero() || s.Previous != nil || s.SpecVersion != broken.SpecVersion+1 {
					t.Errorf("service is %+v", s)
				}
				if len(s.VIPs) != 2 || !slices.EqualFunc(s.Ports, web.Ports, weft.PortSpec.Equal) || weft.NeedsRestart(&web.Spec, &s.Spec) {
					t.Errorf("service is %+v, was %+v", s, web)
				}
				r.waitRunning(web.ID, 3)
				for _, k := range r.running(web.ID) {
					if k.SpecVersion == broken.SpecVersion {
						t.Errorf("task %s is of the broken version", k.ID)
					}
				}
				_, err := r.leader().RollbackService(r.ctx, s.ID, s.Meta.Index)
				wantErr(t, "nothing to go back to", err, weft.ErrInvalid, "does not have a previous spec", string(s.ID))
				r.checkAllocator()
			})
		})
	}
}

// TestWayBackIsClosed: what the previous specification needs is gone.
func TestWayBackIsClosed(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m := r.managers[0]
		w := r.worker(1)
		defer w.crash()
		web := r.webWithAll(2)
		r.waitRunning(web.ID, 2)
		up := web.Spec
		up.Ports, up.Update.OnFailure, up.Update.Delay = nil, weft.UpdateRollback, time.Minute
		up.Container.Image = "weft/whoami:2" // the second place fails later
		_, err := m.UpdateService(r.ctx, web.ID, web.Meta.Index, up)
		r.must(err)
		other := webSpec("other", 1)
		other.Ports = []weft.PortSpec{{Target: 81, Published: 8081}}
		_, err = m.CreateService(r.ctx, other)
		r.must(err)
		s, err := m.Service(r.ctx, "web")
		r.must(err)
		_, err = m.RollbackService(r.ctx, s.ID, s.Meta.Index)
		wantErr(t, "port is taken", err, weft.ErrConflict, "8081", "service other")
		r.eventually(time.Minute, "a new task runs", func() error {
			for _, k := range r.running(web.ID) {
				if k.SpecVersion == s.SpecVersion {
					w.fail(k.ID)
					return nil
				}
			}
			return fmt.Errorf("none does")
		})
		s = r.settled(web.ID)
		if st := s.Update; st.State != weft.UpdatePaused || !strings.HasPrefix(st.Message, "update paused due to failure or early termination of task ") ||
			!strings.Contains(st.Message, "; it cannot be rolled back: ") || !strings.Contains(st.Message, "8081") || s.Previous == nil {
			t.Errorf("update is %+v", st)
		}
		r.checkAllocator()
	})
}

// TestRollbackByHand: the two specifications change places each time.
func TestRollbackByHand(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		w := r.worker(1)
		defer w.crash()
		web := r.webWithAll(2)
		r.waitRunning(web.ID, 2)
		_, err := m.RollbackService(ctx, web.ID, web.Meta.Index)
		wantErr(t, "never updated", err, weft.ErrInvalid, "does not have a previous spec")
		_, err = m.RollbackService(ctx, "none", 1)
		wantErr(t, "no such service", err, weft.ErrNotFound, "none")
		up := web.Spec
		up.Container.Image, up.Replicas, up.Ports = "weft/whoami:2", 3, nil
		s, err := m.UpdateService(ctx, web.ID, web.Meta.Index, up)
		r.must(err)
		_, err = m.RollbackService(ctx, web.ID, web.Meta.Index)
		wantErr(t, "stale", err, weft.ErrOutOfSequence, "web")
		for i, want := range []uint64{2, 3, 2} {
			s, err = m.RollbackService(ctx, web.ID, s.Meta.Index)
			r.must(err)
			if s.Update.State != weft.RollbackRunning || s.Update.Message != "manually requested rollback" || s.Spec.Replicas != want || s.Previous == nil || s.Previous.Replicas != 5-want {
				t.Fatalf("rollback %d: service is %+v", i, s)
			}
			if s = r.settled(web.ID); s.Update.State != weft.RollbackDone || len(s.Ports) != int(3-want) {
				t.Fatalf("rollback %d: service is %+v", i, s)
			}
			r.waitRunning(web.ID, int(want))
		}
		r.checkAllocator()
	})
}
