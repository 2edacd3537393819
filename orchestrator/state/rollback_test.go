package state

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestGoldenRollback is a recording of version 1 with a policy of rollbacks, a
// previous specification and what tasks tell since then; the others have none and
// keep their bytes.
func TestGoldenRollback(t *testing.T) {
	cmds := goldenCommands()[:1]
	cluster := *cmds[0].Changes[0].Cluster
	svc := testService(4)
	svc.Spec.Update.OnFailure = weft.UpdateRollback
	svc.Spec.Rollback = weft.UpdateConfig{Parallelism: 2, Delay: time.Second, Monitor: 2 * time.Second, StartFirst: true, OnFailure: weft.UpdateContinue, MaxFailureRatio: 0.1}
	previous := svc.Spec
	previous.Container.Image = "before"
	svc.Previous = &previous
	svc.Update = weft.UpdateStatus{State: weft.RollbackPaused, StartedAt: t0, Message: "rollback paused"}
	task := &weft.Task{ID: id(6), Service: id(4), Slot: 1, SpecVersion: svc.SpecVersion, Node: id(2), Desired: weft.TaskRunning, Status: weft.TaskStatus{
		State: weft.TaskRunning, At: t0, Ran: t0.Add(-time.Second), Err: "unhealthy container", Unhealthy: true,
	}}
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{{Cluster: &cluster}, {Service: svc}, {Task: task}}}})
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	errs, err := s.Apply(7, golden(t, "entry-v1-rollback.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-rollback.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	for name, store := range map[string]*Store{"applied": s, "restored": r} {
		got, ok := store.View().Service(id(4))
		if !ok || got.Spec.Rollback != svc.Spec.Rollback || got.Spec.Update.OnFailure != weft.UpdateRollback || got.Update != svc.Update ||
			got.Previous == nil || !reflect.DeepEqual(*got.Previous, previous) {
			t.Errorf("%s: %+v", name, got)
		}
		if k, ok := store.View().Task(id(6)); !ok || !reflect.DeepEqual(k.Status, task.Status) {
			t.Errorf("%s: %+v", name, k.Status)
		}
	}
}
