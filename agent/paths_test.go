package agent

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/vxlan"
)

// TestNarrowPathIsRouted: the plane asks about the nodes that it shares networks
// with, and what is found out reaches the tasks at once, both ways, and again
// after a failure.
func TestNarrowPathIsRouted(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		_, _ = r.running(one)
		far := netip.MustParseAddr("10.0.16.9")
		r.table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}, weft.Endpoint{
			Network: front.ID, Task: testID("t9"), Service: svc, Addr: far, State: weft.EndpointReady})
		settle(2 * planeMinGap)
		if got := r.paths.asked(); !slices.Equal(got, []netip.Addr{vtepB}) {
			t.Fatalf("paths are asked for to %v, want %v", got, vtepB)
		}
		if got := r.routes.Routes(one.ID); len(got) != 0 {
			t.Fatalf("routes %v before anything is known", got)
		}
		r.paths.set(map[netip.Addr]int{vtepB: 1280})
		settle(2 * planeMinGap)
		want := vxlan.Route{Dst: netip.PrefixFrom(far, 32), MTU: 1230}
		if got := r.routes.Routes(one.ID); !slices.Contains(got, want) {
			t.Errorf("routes %v, want %v", got, want)
		}
		r.routes.Fail(errors.New("netlink is gone"))
		r.paths.set(map[netip.Addr]int{vtepB: 1400})
		settle(2 * planeMinGap)
		r.routes.Fail(nil)
		settle(planeRetryGap + planeMinGap)
		want.MTU = 1350
		if got := r.routes.Routes(one.ID); !slices.Contains(got, want) {
			t.Errorf("routes %v after a failure, want %v", got, want)
		}
		// The link shrinks below the path: the port tells it, no route does.
		r.paths.link.Store(1300)
		settle(planeMaxGap + 2*planeMinGap)
		if got := r.routes.Routes(one.ID); len(got) != 0 {
			t.Errorf("routes %v where no way is narrower than the link", got)
		}
	})
}
