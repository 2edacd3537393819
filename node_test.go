package weft_test

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
)

func TestClusterAddr(t *testing.T) {
	addr := netip.MustParseAddr("10.99.0.2")
	manager := func(text string) *weft.ManagerStatus {
		return &weft.ManagerStatus{Addr: netip.MustParseAddrPort(text)}
	}
	for _, tc := range []struct {
		name string
		node weft.Node
		want string
	}{
		{"record older than the port", weft.Node{Status: weft.NodeStatus{Addr: addr}}, "10.99.0.2:2377"},
		{"older record of a manager", weft.Node{Status: weft.NodeStatus{Addr: addr}, Manager: manager("10.99.0.2:5377")}, "10.99.0.2:5377"},
		{"port that was told", weft.Node{Status: weft.NodeStatus{Addr: addr, ClusterPort: 4377}}, "10.99.0.2:4377"},
		{"its session told a manager's port last", weft.Node{Status: weft.NodeStatus{Addr: addr, ClusterPort: 4377}, Manager: manager("10.99.0.2:5377")}, "10.99.0.2:4377"},
		{"IPv6", weft.Node{Status: weft.NodeStatus{Addr: netip.MustParseAddr("fd00::2"), ClusterPort: 4377}}, "[fd00::2]:4377"},
	} {
		if got := tc.node.ClusterAddr(); got.String() != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
	if got := (&weft.Node{Status: weft.NodeStatus{ClusterPort: 4377}}).ClusterAddr(); got.IsValid() {
		t.Errorf("a node without an address is dialled at %s", got)
	}
}

// No packet from ::1 leaves its device, so that nothing can be answered there.
func TestNodeHasAddr(t *testing.T) {
	n := weft.Node{Description: weft.NodeDescription{Addrs: []weft.HostAddr{{Interface: "eth0", Addr: netip.MustParseAddr("2001:db8::1")}}}}
	for text, want := range map[string]bool{"127.0.0.1": true, "127.0.0.2": true, "2001:db8::1": true, "2001:db8::2": false, "10.0.0.1": false, "::1": false} {
		if got := n.HasAddr(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}
