package nft

import (
	"context"
	"testing"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
)

// TestSpeakers: each task speaks of its own addresses.
func TestSpeakers(t *testing.T) {
	ingresstest.Speakers(t, rigParts(t), func(r *ingresstest.Rig) (ingress.Engine, error) {
		e := New(r.Dir)
		t.Cleanup(func() { must(t, e.Close(context.Background())) })
		return e, e.Probe(t.Context())
	})
}
