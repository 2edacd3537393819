package bpf

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// TestExpress: a change of one peer is made without a pass over everything, and
// only if the entries that it is about are as they were left.
func TestExpress(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h := m.hosts[0]
	e := h.engine()
	peer := func(i byte) vxlan.Peer {
		a := netip.AddrFrom4([4]byte{10, 100, 0, 200 + i})
		return vxlan.Peer{Addr: a, MAC: weft.EndpointMAC(weft.ID("far"+string('a'+rune(i))), a), VTEP: m.hosts[1].vtep()}
	}
	// with is the wish with more peers.
	with := func(more ...vxlan.Peer) vxlan.State {
		n := m.want[h].Networks[testVNI]
		n.Peers = append(append([]vxlan.Peer(nil), n.Peers...), more...)
		return state(n)
	}
	keyOf := func(p vxlan.Peer) macKey { return macKey{VNI: testVNI, MAC: vxlan.MACOf(p.MAC)} }
	for _, c := range []struct {
		name  string
		spoil func() error
		want  vxlan.State
		quick bool
		// repaired are the kinds that are told at once, and later those of the
		// pass that follows.
		repaired, later string
	}{
		{"one more", nil, with(peer(1)), true, "", ""},
		{"one less", nil, with(), true, "", ""},
		{"several", nil, with(peer(1), peer(2), peer(3)), true, "", ""},
		{"another holder of an address", nil, with(peer(1), peer(2), vxlan.Peer{Addr: peer(3).Addr, MAC: peer(4).MAC, VTEP: peer(3).VTEP}), true, "", ""},
		{"nothing", nil, with(peer(1), peer(2), vxlan.Peer{Addr: peer(3).Addr, MAC: peer(4).MAC, VTEP: peer(3).VTEP}), false, "", ""},
		{"the entry that goes was changed", func() error { return h.pinnedMap("macs").Put(keyOf(peer(1)), destValue{Kind: 99}) }, with(peer(2)), false, "", ""},
		{"the entry that comes is there", func() error {
			return h.pinnedMap("macs").Put(keyOf(peer(1)), h.remoteTo(t, m.hosts[1].vtep()))
		}, with(peer(1), peer(2)), false, "", ""},
		{"another entry was lost", func() error { return h.pinnedMap("macs").Delete(keyOf(peer(1))) }, with(peer(1), peer(2), peer(3)), true, "", "fdb missing"},
		{"a node that nobody knew", nil, with(peer(1), peer(2), peer(3), vxlan.Peer{Addr: peer(5).Addr, MAC: peer(5).MAC, VTEP: netip.MustParseAddr("10.99.8.77")}), false, "", ""},
		{"a way that is narrower", nil, with(peer(1), peer(2), peer(3), vxlan.Peer{Addr: peer(5).Addr, MAC: peer(5).MAC, VTEP: netip.MustParseAddr("10.99.8.77"), MTU: 1300}), false, "", ""},
		{"the map is another one", func() error { return os.Remove(e.path("macs")) }, with(peer(1)), false, "map missing", ""},
		{"long after", func() error { e.last.at = time.Now().Add(-2 * expressFor); return nil }, with(peer(1), peer(2)), false, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.spoil != nil {
				must(t, c.spoil())
			}
			before := e.last.at
			must(t, h.apply(c.want))
			if quick := e.last.at.Equal(before); quick != c.quick {
				t.Errorf("without a whole pass: %v, want %v", quick, c.quick)
			}
			if got := strings.Join(h.repairs(), ","); got != c.repaired {
				t.Errorf("repaired %q, want %q", got, c.repaired)
			}
			must(t, h.apply(c.want))
			expectEqual(t, h, c.want)
			if got := strings.Join(h.repairs(), ","); got != c.later {
				t.Errorf("repaired %q later, want %q", got, c.later)
			}
		})
	}
	must(t, overTCP(m.ports[h][0], m.ports[m.hosts[1]][0]))
}
