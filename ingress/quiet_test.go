package ingress

import (
	"errors"
	"testing"

	"github.com/weftnet/weft"
)

// TestEndFlows: a flow that a packet on its way brings back is ended, too, and packets are
// waited for before each look.
func TestEndFlows(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name    string
		ended   []int // by look; none further
		err     error // of the look after these
		quiet   int
		looks   int
		wantErr error
	}{
		{name: "none", quiet: 1, looks: 1},
		{name: "some at once", ended: []int{3}, quiet: 1, looks: 2},
		{name: "one comes back", ended: []int{3, 1}, quiet: 1, looks: 3},
		{name: "one comes back after a look that found none", ended: []int{3, 0, 1}, quiet: 2, looks: 5},
		{name: "a look fails", ended: []int{3}, err: broken, quiet: 1, looks: 2, wantErr: broken},
		{name: "they never end", ended: make([]int, flowLooks), quiet: 1, looks: flowLooks, wantErr: weft.ErrUnavailable},
	} {
		if len(c.ended) == flowLooks {
			for i := range c.ended {
				c.ended[i] = 1
			}
		}
		passed, looks := 0, 0
		err := EndFlows(func() { passed++ }, func() (int, error) {
			if looks++; passed != looks {
				t.Errorf("%s: look %d after packets were waited for %d times", c.name, looks, passed)
			}
			if looks <= len(c.ended) {
				return c.ended[looks-1], nil
			}
			return 0, c.err
		}, c.quiet)
		if !errors.Is(err, c.wantErr) || looks != c.looks {
			t.Errorf("%s: %v after %d looks, want %v after %d", c.name, err, looks, c.wantErr, c.looks)
		}
	}
}
