package agent

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/vxlan"
)

// fakeNatives is told what it has proven.
type fakeNatives struct {
	mu      sync.Mutex // guards: all below
	watched map[vxlan.NativeWay]vxlan.NativeEnds
	proven  map[vxlan.NativeWay]bool
	changed chan struct{} // closed by set
	cuts    bool
	err     error
}

func (n *fakeNatives) CutsTunnels() (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cuts, n.err
}

func (n *fakeNatives) Watch(ways map[vxlan.NativeWay]vxlan.NativeEnds) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.watched = ways
}

func (n *fakeNatives) Proven() (map[vxlan.NativeWay]bool, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proven, n.changed
}

func (n *fakeNatives) set(proven map[vxlan.NativeWay]bool, cuts bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.proven, n.cuts, n.err = proven, cuts, err
	close(n.changed)
	n.changed = make(chan struct{})
}

// TestProvenWayIsUsed: the plane has the ways of native networks proven, uses what
// is proven at once, and leaves it at once; where the link does not tell whether
// it pays, encap=auto stays with VXLAN and nothing fails.
func TestProvenWayIsUsed(t *testing.T) {
	for _, encap := range []string{weft.EncapNative, weft.EncapAuto} {
		t.Run(encap, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				n := &fakeNatives{proven: map[vxlan.NativeWay]bool{}, changed: make(chan struct{})}
				r.natives = n
				one := testTask(1, front)
				_, s := r.running(one)
				all := full(one)
				all.Networks = slices.Clone(all.Networks)
				all.Networks[0].Spec.Options = map[string]string{weft.OptionEncap: encap}
				all.Seq++
				s.send <- all
				far := netip.MustParseAddr("10.0.16.9")
				r.table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}, weft.Endpoint{
					Network: front.ID, Task: testID("t9"), Service: svc, Addr: far, State: weft.EndpointReady})
				settle(2 * planeMinGap)
				way := vxlan.NativeWay{VNI: front.VNI, VTEP: vtepB}
				native := func() bool {
					have, _ := r.kernel.Read(t.Context())
					return have.Networks[front.VNI].Peers[0].Native
				}
				if ends := n.watched[way]; !slices.Equal(ends.To, []netip.Addr{far}) || len(ends.From) != 1 || native() {
					t.Fatalf("watched %v, native %t", n.watched, native())
				}
				for _, c := range []struct {
					name   string
					proven map[vxlan.NativeWay]bool
					cuts   bool
					err    error
					want   bool
				}{
					{"proven", map[vxlan.NativeWay]bool{way: true}, false, nil, true},
					{"lost", map[vxlan.NativeWay]bool{}, false, nil, false},
					{"the link cuts", map[vxlan.NativeWay]bool{way: true}, true, nil, encap == weft.EncapNative},
					{"the link does not tell", map[vxlan.NativeWay]bool{way: true}, false, errors.New("no"), encap == weft.EncapNative},
				} {
					n.set(c.proven, c.cuts, c.err)
					settle(2 * planeMinGap)
					if got := native(); got != c.want {
						t.Errorf("%s: native %t, want %t", c.name, got, c.want)
					}
				}
			})
		})
	}
}
