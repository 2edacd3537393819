package state

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestGoldenUpdate is a recording of version 1 with a policy of failures; the
// others have none and keep their bytes.
func TestGoldenUpdate(t *testing.T) {
	cluster := *goldenCommands()[0].Changes[0].Cluster
	svc := testService(4)
	svc.Spec.Update = weft.UpdateConfig{Parallelism: 2, Delay: time.Second, Monitor: 2 * time.Second, StartFirst: true, OnFailure: weft.UpdateContinue, MaxFailureRatio: 0.1}
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{{Cluster: &cluster}, {Service: svc}}}})
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	errs, err := s.Apply(7, golden(t, "entry-v1-update.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-update.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	for name, store := range map[string]*Store{"applied": s, "restored": r} {
		if got, ok := store.View().Service(id(4)); !ok || got.Spec.Update != svc.Spec.Update {
			t.Errorf("%s: %+v", name, got.Spec.Update)
		}
	}
}
