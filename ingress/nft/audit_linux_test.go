package nft

import (
	"context"
	"net/netip"
	"testing"

	"github.com/google/nftables"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// The rule that lets pass what is not for a service stands on one bit.
func TestServiceBit(t *testing.T) {
	for _, text := range []string{"10.0.16.200", "fd00:16::200"} {
		a := netip.MustParseAddr(text)
		if weft.VIPMAC("s", a)[0]&serviceBit == 0 {
			t.Errorf("service address %s: %s lacks the bit", a, weft.VIPMAC("s", a))
		}
		for _, m := range [][]byte{weft.EndpointMAC("t", a), weft.NodeMAC("n", a), weft.RouterMAC(4097)} {
			if m[0]&serviceBit != 0 {
				t.Errorf("%x is no service's and has the bit", m)
			}
		}
	}
}

// What another node has balanced goes to the task it was given to, even while
// this node's ring, which may be older or newer, would choose another one.
func TestBalancedOnceOnly(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a, b := f.task(11), f.task(12)
	s := service(a, b)
	given := s
	given.MAC = b.MAC // as a frame that comes out of the tunnel
	ns := f.client(50, given)
	f.apply(e, s)
	for i := range 50 {
		name, _, c, err := f.get(ns, vipText+":80")
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
		if name != string(b.Task) {
			t.Fatalf("connection %d: given to %s, answered by %s", i, b.Task, name)
		}
	}
}

// A change of the wish, another engine's start and a namespace made anew are no
// repairs; what is broken while the wish changes is one.
func TestChangesAreNoRepairs(t *testing.T) {
	f := newFabric(t)
	a, b := f.task(11), f.task(12)
	var got []weft.Repair
	start := func() *Engine {
		e := New(f.dir)
		e.Repaired = func(r weft.Repair) { got = append(got, r) }
		return e
	}
	table := func(s ...ingress.Service) ingress.Table {
		return ingress.Table{Networks: []ingress.Network{{VNI: 4097, NetNS: f.br, Bridge: "br", Services: s}}}
	}
	apply := func(e *Engine, t2 ingress.Table) { t.Helper(); must(t, e.Apply(context.Background(), t2)) }
	e := start()
	apply(e, table(service(a)))
	apply(e, table(service(a, b)))
	apply(e, table(service(b)))
	flush := func() {
		t.Helper()
		must(t, withConn(f.br, func(c *nftables.Conn) error {
			c.FlushTable(&nftables.Table{Name: weft.TableName, Family: nftables.TableFamilyBridge})
			return c.Flush()
		}))
	}
	flush()
	e = start()
	apply(e, table(service(a))) // it does not know what was left
	if len(got) != 0 {
		t.Errorf("repairs of what nobody broke: %+v", got)
	}
	flush()
	apply(e, table(service(a, b)))
	if len(got) != 1 || got[0].Kind != kindTable {
		t.Errorf("broken while the wish changes: %+v", got)
	}
	got = nil
	must(t, netns.Remove(f.br))
	if _, err := netns.Create(f.dir, "hidden"); err != nil {
		t.Fatal(err)
	}
	apply(e, table(service(a, b)))
	if len(got) != 0 {
		t.Errorf("the table of a new namespace: %+v", got)
	}
}

func TestElementFault(t *testing.T) {
	type m = map[string]string
	for _, c := range []struct {
		name             string
		have, left, want m
		fault            string
	}{
		{"as left, wish changed", m{"a": "1", "b": "2"}, m{"a": "1", "b": "2"}, m{"a": "3", "c": "4"}, ""},
		{"missing", m{"b": "2"}, m{"a": "1", "b": "2"}, m{"a": "1", "b": "2"}, "1 elements were missing, 0 wrong, 0 stray"},
		{"missing and not wanted any more", m{"b": "2"}, m{"a": "1", "b": "2"}, m{"b": "2"}, ""},
		{"wrong", m{"a": "9"}, m{"a": "1"}, m{"a": "1"}, "0 elements were missing, 1 wrong, 0 stray"},
		{"wrong, and what is wanted now", m{"a": "9"}, m{"a": "1"}, m{"a": "9"}, ""},
		{"stray", m{"a": "1", "x": "9"}, m{"a": "1"}, m{"a": "1"}, "0 elements were missing, 0 wrong, 1 stray"},
		{"stray, and what is wanted now", m{"x": "9"}, m{}, m{"x": "9"}, ""},
	} {
		if got := elementFault(c.have, c.left, c.want); got != c.fault {
			t.Errorf("%s: %q, want %q", c.name, got, c.fault)
		}
	}
}

func TestSysctlsOfTheLegAreRepaired(t *testing.T) {
	f := newFabric(t)
	f.outside()
	e := New(f.dir)
	var got []weft.Repair
	e.Repaired = func(r weft.Repair) { got = append(got, r) }
	key := "net/ipv4/conf/" + weft.IngressLeg + "/route_localnet"
	for range 2 {
		must(t, e.prepareLeg(ingress.Entry{Link: weft.IngressLeg}, false))
	}
	must(t, writeSysctl(key, "0"))
	for range 2 {
		must(t, e.prepareLeg(ingress.Entry{Link: weft.IngressLeg}, false))
	}
	want := weft.Repair{Kind: kindSysctl, Object: key, Reason: "it was 0 instead of 1"}
	if len(got) != 1 || got[0] != want {
		t.Errorf("repairs %+v, want %+v once", got, want)
	}
}
