package gossip

import (
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestFailures: a member that membership gives up and the watch does not stays in sight for
// disputeFor, once; one that both miss goes at once, and none comes to sight by a dispute.
func TestFailures(t *testing.T) {
	const id = weft.ID("a")
	start := time.Unix(1000, 0)
	type look struct {
		after           time.Duration
		inSight, missed bool
		stays           bool
	}
	for name, looks := range map[string][]look{
		"stays, and not for ever": {
			{0, true, false, true}, {disputeFor - 1, true, false, true}, {disputeFor, true, false, false},
			{disputeFor + 1, false, false, false}, {2 * disputeFor, false, false, false},
		},
		"missed by both":                   {{0, true, true, false}, {1, false, false, false}},
		"missed by the watch, a bit later": {{0, true, false, true}, {1, true, true, false}, {2, false, false, false}},
		"was out of sight":                 {{0, false, false, false}, {1, false, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			f := failures{}
			for _, l := range looks {
				// Who is out of sight is not in sight the next time.
				if got := f.stays(start.Add(l.after), id, l.inSight, l.missed); got != l.stays {
					t.Errorf("%+v: stays %v", l, got)
				}
			}
			f.settle(id)
			if !f.stays(start.Add(time.Hour), id, true, false) {
				t.Error("after it was settled, no new dispute begins")
			}
		})
	}
}
