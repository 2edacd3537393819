package weft

import (
	"net/netip"
	"strings"
	"testing"
)

func TestIDs(t *testing.T) {
	seen := make(map[ID]bool)
	for range 1000 {
		id := NewID()
		if !id.Valid() || seen[id] || len(id.Short()) != 12 || !strings.HasPrefix(string(id), id.Short()) {
			t.Fatalf("bad id %q", id)
		}
		seen[id] = true
	}
	for _, bad := range []ID{"", "abc", ID(strings.Repeat("A", 25)), ID(strings.Repeat("a", 26)), ID(strings.Repeat("-", 25))} {
		if bad.Valid() {
			t.Errorf("%q is valid", bad)
		}
	}
	if got := ID("abc").Short(); got != "abc" {
		t.Errorf("short id cut to %q", got)
	}
}

// Kernel names must fit, and differ for objects that may share a host.
func TestInterfaceNames(t *testing.T) {
	task, other, network := NewID(), NewID(), NewID()
	names := []string{HostVethName(task), HostVethName(other), PortVethName(task, network), PortVethName(other, network), PortVethName(task, other),
		VXLANName(FirstVNI), VXLANName(LastVNI), BridgeName(LastVNI), GatewayBridge, IngressLeg}
	seen := make(map[string]bool)
	for _, n := range names {
		if n == "" || len(n) > 15 || seen[n] || strings.ContainsAny(n, "/ ") {
			t.Errorf("bad or repeated interface name %q", n)
		}
		seen[n] = true
	}
	if PortVethName("ab", "c") == PortVethName("a", "bc") {
		t.Error("task and network run together")
	}
	if p := NetNSPrefix(task); !strings.HasPrefix(TaskNetNS(task, other), p) || !strings.HasPrefix(OverlayNetNS(task, 5), p) {
		t.Error("namespace names lack their prefix")
	}
}

// Twins are one to one, none is the host's own or another bridge's, and only IPv4 has one.
func TestGatewayTwins(t *testing.T) {
	pool := GatewayPool()
	first, last := pool.Addr(), netip.MustParseAddr("172.31.255.255")
	for a := first; a.Compare(last) <= 0; a = a.Next() {
		twin := GatewayTwin(a)
		low := twin.As16()
		if !GatewayPool6().Contains(twin) || twin == GatewayAddr6() || netip.AddrFrom4([4]byte(low[12:])) != a {
			t.Fatalf("the twin of %s is %s", a, twin)
		}
	}
	for _, none := range []netip.Addr{{}, netip.IPv6Loopback()} {
		if got := GatewayTwin(none); got.IsValid() {
			t.Errorf("the twin of %s is %s", none, got)
		}
	}
}

// Every golden value here is seen by other nodes or survives a restart.
func TestDerivedValuesAreStable(t *testing.T) {
	a := netip.MustParseAddr("10.0.1.2")
	for _, c := range []struct{ got, want string }{
		{EndpointMAC("task", a).String(), "82:87:28:00:01:02"},
		{VIPMAC("task", a).String(), "86:87:28:00:01:02"},
		{NodeMAC("task", a).String(), "8a:87:28:00:01:02"},
		{VIPMAC("task", netip.MustParseAddr("fd00::a00:102")).String(), "8e:87:28:00:01:02"},
		{EndpointMAC("task", netip.MustParseAddr("fd00::1:2")).String()[9:], "01:00:02"},
		{EndpointMAC("task", a).String(), EndpointMAC("task", netip.MustParseAddr("::ffff:10.0.1.2")).String()},
		{GatewayTwin(netip.MustParseAddr("172.31.240.2")).String(), "fd77:6566:7467::ac1f:f002"},
		{HostVethName("0123456789abcdefghijklmno"), "wv0123456789a"},
		{TaskNetNS("0123456789abcdefghijklmno", "zyxwvutsrqponmlkjihgfedcb"), "weft-01234567-tzyxwvutsrqpo"},
		{OverlayNetNS("0123456789abcdefghijklmno", 4097), "weft-01234567-n4097"},
	} {
		if c.got != c.want {
			t.Errorf("got %s, want %s", c.got, c.want)
		}
	}
	if id := ContainerID("task"); len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" {
		t.Errorf("container id %q", id)
	}
}

// A reused address must not match an entry that was made for its former holder,
// and two holders of one network never share a hardware address.
func TestHardwareAddresses(t *testing.T) {
	a := netip.MustParseAddr("10.0.1.2")
	const n = 4000 // so many holders of one address one after the other
	last, same := "", 0
	for range n {
		mac := EndpointMAC(NewID(), a)
		if mac[0]&0x0f != 0x02 || mac[3] != 0 || mac[4] != 1 || mac[5] != 2 {
			t.Fatalf("hardware address %s of %s", mac, a)
		}
		if mac.String() == last {
			same++
		}
		last = mac.String()
	}
	// Expected: n in 2^20, one run in 260. With one byte it would be 16.
	if same > 2 {
		t.Errorf("%d of %d holders had the hardware address of the one before", same, n)
	}
	task := NewID()
	seen := map[string]netip.Addr{}
	for _, a := range []netip.Addr{a, a.Next(), netip.MustParseAddr("10.1.1.2"), netip.MustParseAddr("10.255.255.254")} {
		for _, mac := range []string{EndpointMAC(task, a).String(), VIPMAC(task, a).String(), NodeMAC(task, a).String()} {
			if b, ok := seen[mac]; ok {
				t.Errorf("%s stands for %s and %s", mac, a, b)
			}
			seen[mac] = a
		}
	}
}

func TestTaskNameAndStates(t *testing.T) {
	if got := (&Task{ID: "t", Slot: 2, Node: "n"}).Name("web"); got != "web.2.t" {
		t.Error(got)
	}
	if got := (&Task{ID: "t", Node: "n"}).Name("web"); got != "web.n.t" {
		t.Error(got)
	}
	for s, name := range taskStateNames {
		if s.String() != name || s.Ended() != (s >= TaskComplete) {
			t.Errorf("%d: %s", s, s)
		}
	}
	if got := TaskState(1).String(); got != "state(1)" {
		t.Error(got)
	}
}
