package gossip

import (
	"log/slog"
	"testing"
	"testing/synctest"
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

// TestFailedButHeard: one that membership gives up, as no packet of its own comes from it,
// while it answers the watch, stays in sight for a while; it is back once it can refute.
func TestFailedButHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logLines
		const members, quiet = 4, 3
		c := newLoggedCluster(t, members, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		defer c.close()
		time.Sleep(3 * time.Second)
		at := testAddr(quiet).String()
		c.f.onlyFrames(func(from, to string) bool { return from == at || to == at })
		given := c.await(time.Minute, "membership to give it up", func() bool { return log.count("EventMemberFailed: "+string(nodeID(quiet))) > 0 })
		gone := c.await(time.Minute, "the first to take it out of sight", func() bool { return c.seenBy(quiet) < members-1 })
		t.Logf("given up after %v, out of sight %v later", given, gone)
		if gone < disputeFor-10*time.Millisecond || gone > disputeFor+tickInterval+10*time.Millisecond {
			t.Errorf("it was in sight for %v after membership had given it up, want %v to %v", gone, disputeFor, disputeFor+tickInterval)
		}
		c.await(time.Minute, "all to give it up", func() bool { return c.seenBy(quiet) == 0 })
		c.f.onlyFrames(nil)
		back := c.await(5*time.Second, "all to see it again", func() bool { return c.allSee(members) })
		t.Logf("back %v after its packets come", back)
	})
}
