package state

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestGoldenHealth is a recording of version 1 with a health check; the others
// have none and keep their bytes.
func TestGoldenHealth(t *testing.T) {
	cluster := *goldenCommands()[0].Changes[0].Cluster
	svc := testService(4)
	svc.Spec.Container.Health = weft.HealthCheck{
		Test: []string{"CMD", "true"}, Interval: time.Second, Timeout: 2 * time.Second, StartPeriod: 3 * time.Second, StartInterval: 4 * time.Second, Retries: 5,
	}
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{{Cluster: &cluster}, {Service: svc}}}})
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	errs, err := s.Apply(7, golden(t, "entry-v1-health.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-health.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	for name, store := range map[string]*Store{"applied": s, "restored": r} {
		got, ok := store.View().Service(id(4))
		if !ok || !reflect.DeepEqual(got.Spec.Container.Health, svc.Spec.Container.Health) {
			t.Errorf("%s: %+v", name, got.Spec.Container.Health)
		}
	}
}
