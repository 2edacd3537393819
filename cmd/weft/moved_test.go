package main

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/weftnet/weft"
)

// TestFollowAddrs: a member goes by the address that the link of its former one has now,
// if there is one, and by no other.
func TestFollowAddrs(t *testing.T) {
	a := netip.MustParseAddr
	on := func(link string, addrs ...string) (out []weft.HostAddr) {
		for _, s := range addrs {
			out = append(out, weft.HostAddr{Interface: link, Addr: a(s)})
		}
		return out
	}
	both := func(lists ...[]weft.HostAddr) (out []weft.HostAddr) {
		for _, l := range lists {
			out = append(out, l...)
		}
		return out
	}
	for _, c := range []struct {
		name                string
		advertise, dataPath string
		links               [2]string // names
		addrs               []weft.HostAddr
		wantA, wantD        string
	}{
		{"nothing has changed", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.1"), "10.0.0.1", "10.0.0.1"},
		{"another address", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, both(on("eth0", "10.0.0.9"), on("eth1", "10.1.0.1")), "10.0.0.9", "10.0.0.9"},
		{"it has gone to another link", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, both(on("eth0", "10.0.0.9"), on("eth1", "10.0.0.1")), "10.0.0.1", "10.0.0.1"},
		{"one more", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.1", "10.0.0.9"), "10.0.0.1", "10.0.0.1"},
		{"none at the moment", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth1", "10.1.0.1"), "10.0.0.1", "10.0.0.1"},
		{"several come into question", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.8", "10.0.0.9"), "10.0.0.1", "10.0.0.1"},
		{"the other family is none", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "fd00::9"), "10.0.0.1", "10.0.0.1"},
		{"IPv6", "fd00::1", "fd00::1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.9", "fd00::9"), "fd00::9", "fd00::9"},
		{"behind a router, tunnels by the host's own", "192.0.2.1", "10.0.0.1", [2]string{"", "eth0"}, on("eth0", "10.0.0.9"), "192.0.2.1", "10.0.0.9"},
		{"tunnels on a link of their own", "10.0.0.1", "10.1.0.1", [2]string{"eth0", "eth1"}, both(on("eth0", "10.0.0.9"), on("eth1", "10.1.0.1")), "10.0.0.9", "10.1.0.1"},
		{"an alias that was there before", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.100"), "10.0.0.1", "10.0.0.1"},
		{"beside such an alias", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "10.0.0.9", "10.0.0.100"), "10.0.0.9", "10.0.0.9"},
		{"what a host gives itself without a lease", "10.0.0.1", "10.0.0.1", [2]string{"eth0", "eth0"}, on("eth0", "169.254.7.7"), "10.0.0.1", "10.0.0.1"},
		{"no link is known", "10.0.0.1", "10.0.0.1", [2]string{}, on("eth0", "10.0.0.9"), "10.0.0.1", "10.0.0.1"},
	} {
		was := memberState{
			Advertise: netip.AddrPortFrom(a(c.advertise), 2377), DataPath: a(c.dataPath),
			Links: memberLinks{memberLink{c.links[0], []netip.Addr{a("10.0.0.100")}}, memberLink{c.links[1], []netip.Addr{a("10.0.0.100")}}}, Listen: netip.AddrPortFrom(a(c.advertise), 2377),
			Managers: []netip.AddrPort{netip.MustParseAddrPort("10.7.7.7:2377"), netip.AddrPortFrom(a(c.advertise), 2377)},
		}
		kept := append([]netip.AddrPort{}, was.Managers...)
		got := was.follow(c.addrs)
		want := netip.AddrPortFrom(a(c.wantA), 2377)
		if got.Advertise != want || got.DataPath != a(c.wantD) || got.Listen != want || got.Managers[0] != was.Managers[0] || got.Managers[1] != want {
			t.Errorf("%s: %+v, want %s and %s", c.name, got, c.wantA, c.wantD)
		}
		if !reflect.DeepEqual(was.Managers, kept) {
			t.Errorf("%s: the former state has changed: %v", c.name, was.Managers)
		}
		// Once followed, it is where it is.
		if again := got.note(c.addrs).follow(c.addrs); again.Advertise != got.Advertise || again.DataPath != got.DataPath {
			t.Errorf("%s: it goes on to %+v", c.name, again)
		}
	}
	s := memberState{Advertise: netip.MustParseAddrPort("10.0.0.1:2377"), DataPath: a("10.1.0.1")}
	s = s.note(both(on("eth0", "10.0.0.1", "10.0.0.100"), on("eth1", "10.1.0.1")))
	want := memberLinks{memberLink{"eth0", []netip.Addr{a("10.0.0.100")}}, memberLink{"eth1", nil}}
	if !reflect.DeepEqual(s.Links, want) {
		t.Errorf("links %+v, want %+v", s.Links, want)
	}
	if s = s.note(on("eth2", "10.2.0.1")); !reflect.DeepEqual(s.Links, want) {
		t.Errorf("links of addresses that have gone are %+v", s.Links)
	}
}

// TestMovesWait: an address that is away for a moment is waited for.
func TestMovesWait(t *testing.T) {
	at := func(s string) memberState { return memberState{Advertise: netip.MustParseAddrPort(s)} }
	home, other, third := at("10.0.0.1:2377"), at("10.0.0.9:2377"), at("10.0.0.10:2377")
	var m moves
	for i, c := range []struct {
		found memberState
		want  bool
	}{
		{other, false}, {other, false}, {home, false}, // it is back
		{other, false}, {third, false}, {third, false}, {third, true}, {third, true},
	} {
		if got := m.look(home, c.found); got != c.want {
			t.Errorf("look %d, at %s: %v, want %v", i, c.found.Advertise, got, c.want)
		}
	}
}
