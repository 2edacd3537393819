package vxlan_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// draw makes a valid state from a small world, so that two of them overlap.
func draw(t *rapid.T, label string) vxlan.State {
	s := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for vni := uint32(4097); vni < 4100; vni++ {
		if !rapid.Bool().Draw(t, label+" has network") {
			continue
		}
		n := vxlan.Network{
			ID: weft.ID(fmt.Sprintf("net%d-%d", vni, rapid.IntRange(0, 1).Draw(t, label+" id"))), VNI: vni,
			MTU:  rapid.SampledFrom([]int{1400, 1450}).Draw(t, label+" mtu"),
			VTEP: netip.AddrFrom4([4]byte{10, 99, 0, byte(rapid.IntRange(1, 2).Draw(t, label+" vtep"))}), Port: 4789,
		}
		n.Encrypted = n.ID[len(n.ID)-1] == '1' // fixed for the life of a network
		n.Native = !n.Encrypted && rapid.Bool().Draw(t, label+" is native")
		for i := byte(1); i < 8; i++ {
			a := netip.AddrFrom4([4]byte{10, 0, 0, i})
			task := weft.ID(fmt.Sprintf("task%d", rapid.IntRange(0, 1).Draw(t, label+" generation")*100+int(i)))
			mac := weft.EndpointMAC(task, a)
			switch rapid.IntRange(0, 3).Draw(t, label+" role") {
			case 1:
				p := vxlan.Port{Task: task, NetNS: "/run/" + string(task), IfName: "eth0", Addr: netip.PrefixFrom(a, 24), MAC: mac}
				if rapid.Bool().Draw(t, label+" is dual") {
					p.Addr6 = netip.PrefixFrom(second(i), 64)
				}
				n.Ports = append(n.Ports, p)
			case 2:
				p := vxlan.Peer{Addr: a, MAC: mac, VTEP: netip.AddrFrom4([4]byte{10, 99, 0, byte(rapid.IntRange(3, 4).Draw(t, label+" peer vtep"))}),
					MTU: rapid.SampledFrom([]int{0, 1300, 1350}).Draw(t, label+" way")}
				p.Native = n.Native && rapid.Bool().Draw(t, label+" peer is native")
				n.Peers = append(n.Peers, p)
				if rapid.Bool().Draw(t, label+" is dual") {
					p.Addr = second(i)
					n.Peers = append(n.Peers, p)
				}
			case 3:
				n.VIPs = append(n.VIPs, vxlan.VIP{Addr: a, MAC: mac})
			}
		}
		if rapid.Bool().Draw(t, label+" has leg") {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(50, 51).Draw(t, label+" leg"))})
			n.HostLeg = &vxlan.HostLeg{Name: "leg", Addr: netip.PrefixFrom(a, 24), MAC: weft.NodeMAC("n", a)}
			if rapid.Bool().Draw(t, label+" leg is dual") {
				n.HostLeg.Addr6 = netip.PrefixFrom(second(50), 64)
			}
		}
		s.Networks[vni] = n
	}
	return s
}

// second is the IPv6 address of the endpoint number i.
func second(i byte) netip.Addr { return netip.AddrFrom16([16]byte{0: 0xfd, 15: i}) }

func text(s vxlan.State) string {
	s = vxlan.Normalize(s)
	out := ""
	for vni := uint32(4097); vni < 4100; vni++ {
		if n, ok := s.Networks[vni]; ok {
			leg := n.HostLeg
			n.HostLeg, n.Ways = nil, false
			if n.Encrypted { // of its peers only the tables are left in a kernel
				out += fmt.Sprintf("%v\n", vxlan.Derive(n))
				n.Peers, n.VIPs, n.VTEP, n.Port = nil, nil, netip.Addr{}, 0
			}
			out += fmt.Sprintf("%v %v\n", n, leg)
		}
	}
	return out
}

func TestDiffReachesWant(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		have, want := draw(t, "have"), draw(t, "want")
		var k vxlantest.Kernel
		if err := errors.Join(k.Apply(ctx, have), k.Apply(ctx, want)); err != nil {
			t.Fatal(err)
		}
		got, _ := k.Read(ctx)
		if text(got) != text(want) {
			t.Fatalf("got\n%s\nwant\n%s", text(got), text(want))
		}
		if ops := vxlan.Diff(got, want); len(ops) != 0 {
			t.Fatalf("not empty for equal states: %v", ops)
		}
		ops := vxlan.Diff(have, want)
		if !slices.IsSortedFunc(ops, func(a, b vxlan.Op) int { return int(a.Kind) - int(b.Kind) }) {
			t.Fatalf("additions and removals are mixed: %v", ops)
		}
		// Minimal: no object is touched twice.
		seen := map[string]bool{}
		for _, op := range ops {
			if seen[op.String()] {
				t.Fatalf("twice: %s", op)
			}
			seen[op.String()] = true
		}
	})
}

func TestFailedOperationIsRepaired(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		have, want := draw(t, "have"), draw(t, "want")
		var k vxlantest.Kernel
		if err := k.Apply(ctx, have); err != nil {
			t.Fatal(err)
		}
		errno := rapid.SampledFrom([]error{unix.EEXIST, unix.ENOENT, unix.EBUSY}).Draw(t, "errno")
		k.FailAt(rapid.IntRange(1, 30).Draw(t, "at"), errno)
		if err := k.Apply(ctx, want); err != nil && !errors.Is(err, errno) {
			t.Fatal(err)
		}
		for range 2 { // the failure may have come with the second
			k.Apply(ctx, want)
		}
		if got, _ := k.Read(ctx); text(got) != text(want) {
			t.Fatalf("got\n%s\nwant\n%s", text(got), text(want))
		}
	})
}

func TestConformanceOfFake(t *testing.T) {
	a := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
	vxlantest.Conformance(t, &vxlantest.Kernel{}, vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789,
		Ports: []vxlan.Port{{Task: "t", NetNS: "/x", IfName: "eth0", Addr: netip.PrefixFrom(a(1), 24), MAC: weft.EndpointMAC("t", a(1))}},
		Peers: []vxlan.Peer{{Addr: a(2), MAC: weft.EndpointMAC("u", a(2)), VTEP: netip.MustParseAddr("10.99.0.2")}},
		VIPs:  []vxlan.VIP{{Addr: a(3), MAC: weft.VIPMAC("s", a(3))}}})
}

func TestMTU(t *testing.T) {
	for _, c := range []struct {
		under int
		vtep  string
		want  int
	}{{1500, "10.99.0.1", 1450}, {1500, "fd00::1", 1430}, {9000, "::ffff:10.99.0.1", 8950}, {100000, "10.99.0.1", 65485}, {117, "10.99.0.1", 0}} {
		got, err := vxlan.MTU(c.under, netip.MustParseAddr(c.vtep))
		if got != c.want || (err != nil) != (c.want == 0) {
			t.Errorf("MTU(%d, %s) = %d, %v; want %d", c.under, c.vtep, got, err, c.want)
		}
	}
}

func TestEncryptedMTU(t *testing.T) {
	for _, c := range []struct {
		under int
		vtep  string
		want  int
	}{{1500, "10.99.0.1", 1440}, {1500, "fd00::1", 1420}, {9000, "::ffff:10.99.0.1", 8940}, {127, "10.99.0.1", 0}} {
		vtep := netip.MustParseAddr(c.vtep)
		got, err := vxlan.EncryptedMTU(c.under, vtep)
		if got != c.want || (err != nil) != (c.want == 0) {
			t.Errorf("EncryptedMTU(%d, %s) = %d, %v; want %d", c.under, c.vtep, got, err, c.want)
		}
		if way, _ := vxlan.EncryptedWay(c.under, vtep); way > got || way <= got-16 || way%16 != 0 {
			t.Errorf("EncryptedWay(%d, %s) = %d of %d", c.under, c.vtep, way, got)
		}
	}
}

// TestEncryptedTables: the router answers for who is elsewhere, and frames to a
// peer's own MAC lead to the router.
func TestEncryptedTables(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.2")
	mac := weft.EndpointMAC("u", a)
	n := vxlan.Network{ID: "n", VNI: 4097, MTU: 1440, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789, Encrypted: true,
		Peers: []vxlan.Peer{{Addr: a, MAC: mac, VTEP: netip.MustParseAddr("10.99.0.2")}}}
	router := vxlan.MACOf(weft.RouterMAC(n.VNI))
	got := vxlan.Derive(n)
	if got.Neigh[a] != router || len(got.FDB) != 2 {
		t.Fatalf("tables %v: the router must answer for %s", got, a)
	}
	for _, m := range []vxlan.MAC{router, vxlan.MACOf(mac)} {
		if vtep, ok := got.FDB[m]; !ok || vtep.VTEP.IsValid() {
			t.Errorf("frames to %s: %v %v, want the uplink and no VTEP", m.HardwareAddr(), vtep, ok)
		}
	}
	// What was read as a wrong entry stays one, and is written anew.
	wrong := vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{a: router}, FDB: map[vxlan.MAC]vxlan.Way{router: {}, vxlan.MACOf(mac): {VTEP: netip.IPv6Unspecified()}}}
	read := n
	read.Peers, read.VIPs = vxlan.Observed(wrong)
	if got := vxlan.Derive(read); !maps.Equal(got.FDB, wrong.FDB) || !maps.Equal(got.Neigh, wrong.Neigh) {
		t.Errorf("%v became %v", wrong, got)
	}
	ops := vxlan.Diff(vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: read}}, vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}})
	if len(ops) != 1 || ops[0].Kind != vxlan.OpSetFDB || vxlan.MACOf(ops[0].MAC) != vxlan.MACOf(mac) {
		t.Errorf("operations %v, want one that mends the peer", ops)
	}
	plain := n
	plain.Encrypted = false
	if ops := vxlan.Diff(vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: plain}}, vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}); ops[0].Kind != vxlan.OpSetDevice {
		t.Errorf("a VXLAN device on an encrypted network stays: %v", ops)
	}
}

// TestWays: a narrow way is an entry's where the engine keeps it, and nobody's
// business where it does not. The narrower one of two for a MAC counts.
func TestWays(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")
	mac := weft.EndpointMAC("u", a)
	of := func(ways bool, mtu, mtu6 int) vxlan.State {
		n := vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789, Ways: ways}
		for addr, m := range map[netip.Addr]int{a: mtu, b: mtu6} {
			n.Peers = append(n.Peers, vxlan.Peer{Addr: addr, MAC: mac, VTEP: netip.MustParseAddr("10.99.0.2"), MTU: m})
		}
		return vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}
	}
	for _, c := range []struct {
		name       string
		have, want vxlan.State
		ops, mtu   int
	}{
		{"kept", of(true, 0, 0), of(false, 1300, 1300), 1, 1300},
		{"not kept", of(false, 0, 0), of(false, 1300, 1300), 0, 0},
		{"the same", of(true, 1300, 1300), of(false, 1300, 1300), 0, 0},
		{"wider", of(true, 1300, 1300), of(false, 0, 0), 1, 0},
		{"as wide as the network", of(true, 0, 0), of(false, 1450, 9000), 0, 0},
		{"one of two", of(true, 0, 0), of(false, 1400, 1300), 1, 1300},
		{"new", vxlan.State{}, of(false, 1300, 1300), 4, 1300},
	} {
		ops := vxlan.Diff(c.have, c.want)
		if len(ops) != c.ops {
			t.Errorf("%s: %v", c.name, ops)
		}
		for _, op := range ops {
			if op.Kind == vxlan.OpSetFDB && op.MTU != c.mtu {
				t.Errorf("%s: %s, want MTU %d", c.name, op, c.mtu)
			}
		}
	}
}

func TestValidateNames(t *testing.T) {
	good := vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.0.0.1")
	mac := weft.EndpointMAC("t", a)
	for name, spoil := range map[string]func(*vxlan.Network){
		"no id": func(n *vxlan.Network) { n.ID = "" }, "VNI 0": func(n *vxlan.Network) { n.VNI = 0 }, "VNI of 25 bits": func(n *vxlan.Network) { n.VNI = 1 << 24 },
		"no VTEP": func(n *vxlan.Network) { n.VTEP = netip.Addr{} }, "no port": func(n *vxlan.Network) { n.Port = 0 },
		"MTU for IPv6":     func(n *vxlan.Network) { n.MTU, n.Subnets = 1279, []netip.Prefix{netip.MustParsePrefix("fd00::/64")} },
		"peer at own VTEP": func(n *vxlan.Network) { n.Peers = []vxlan.Peer{{Addr: a, MAC: mac, VTEP: n.VTEP}} },
		"family of VTEP": func(n *vxlan.Network) {
			n.Peers = []vxlan.Peer{{Addr: a, MAC: mac, VTEP: netip.MustParseAddr("fd00::1")}}
		},
		"peer of a tiny MTU": func(n *vxlan.Network) {
			n.Peers = []vxlan.Peer{{Addr: a, MAC: mac, VTEP: n.VTEP.Next(), MTU: 67}}
		},
		"native and encrypted": func(n *vxlan.Network) { n.Native, n.Encrypted = true, true },
		"native peer of another network": func(n *vxlan.Network) {
			n.Peers = []vxlan.Peer{{Addr: a, MAC: mac, VTEP: n.VTEP.Next(), Native: true}}
		},
		"VIP of a negative MTU": func(n *vxlan.Network) { n.VIPs = []vxlan.VIP{{Addr: a, MAC: mac, MTU: -1}} },
		"address twice":         func(n *vxlan.Network) { n.VIPs = []vxlan.VIP{{Addr: a, MAC: mac}, {Addr: a, MAC: weft.VIPMAC("s", a)}} },
		"MAC of three": func(n *vxlan.Network) {
			for _, x := range []netip.Addr{a, second(1), second(2)} {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: x, MAC: mac, VTEP: netip.MustParseAddr("10.99.0.2")})
			}
		},
		"MAC at two VTEPs": func(n *vxlan.Network) {
			n.Peers = []vxlan.Peer{{Addr: a, MAC: mac, VTEP: netip.MustParseAddr("10.99.0.2")}, {Addr: second(1), MAC: mac, VTEP: netip.MustParseAddr("10.99.0.3")}}
		},
		"two addresses of IPv4": func(n *vxlan.Network) {
			n.HostLeg = &vxlan.HostLeg{Name: "leg", Addr: netip.PrefixFrom(a, 24), Addr6: netip.PrefixFrom(a.Next(), 24), MAC: mac}
		},
		"two addresses of IPv6": func(n *vxlan.Network) {
			n.HostLeg = &vxlan.HostLeg{Name: "leg", Addr: netip.PrefixFrom(second(1), 64), Addr6: netip.PrefixFrom(second(2), 64), MAC: mac}
		},
		"MAC twice": func(n *vxlan.Network) { n.VIPs = []vxlan.VIP{{Addr: a, MAC: mac}, {Addr: a.Next(), MAC: mac}} },
		"group MAC": func(n *vxlan.Network) { n.VIPs = []vxlan.VIP{{Addr: a, MAC: []byte{1, 0, 0, 0, 0, 1}}} },
		"long interface": func(n *vxlan.Network) {
			n.HostLeg = &vxlan.HostLeg{Name: "0123456789abcdef", Addr: netip.PrefixFrom(a, 24), MAC: mac}
		},
	} {
		n := good
		spoil(&n)
		if err := n.Validate(); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// TestTwinsAreNativeTogether: the two addresses of an endpoint share a forwarding
// entry, which goes without encapsulation only if both may.
func TestTwinsAreNativeTogether(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.2")
	mac, vtep := weft.EndpointMAC("u", a), netip.MustParseAddr("10.99.0.2")
	for _, c := range [][2]bool{{false, false}, {true, false}, {false, true}, {true, true}} {
		n := vxlan.Network{Native: true, Peers: []vxlan.Peer{{Addr: a, MAC: mac, VTEP: vtep, Native: c[0]}, {Addr: second(2), MAC: mac, VTEP: vtep, Native: c[1]}}}
		if got := vxlan.Derive(n).FDB[vxlan.MACOf(mac)]; got != (vxlan.Way{VTEP: vtep, Native: c[0] && c[1]}) {
			t.Errorf("%v: the way is %s", c, got)
		}
	}
}
