package vxlan_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// TestDeltaIsDiff holds Delta against its slow twin: whatever it takes on is
// what Diff says of valid states, and it takes on every change of one peer or one
// service address of a network in the clear.
func TestDeltaIsDiff(t *testing.T) {
	taken := 0
	rapid.Check(t, func(t *rapid.T) {
		left := vxlan.Normalize(draw(t, "left"))
		want := vxlan.Normalize(left)
		if rapid.Bool().Draw(t, "keeps ways") {
			for vni, n := range left.Networks {
				n.Ways = true
				left.Networks[vni] = n
			}
		}
		simple := changeFew(t, want)
		if vxlan.Validate(want) != nil {
			simple = false // half a twin has moved
		}
		ops := vxlan.Diff(left, want)
		got, _, ok := vxlan.Delta(left, want)
		if ok && !reflect.DeepEqual(got, ops) {
			t.Fatalf("Delta gives\n%v\nDiff\n%v", got, ops)
		}
		if ok && vxlan.Validate(want) != nil {
			t.Fatalf("Delta takes a wish that is not valid: %v", vxlan.Validate(want))
		}
		if !ok && simple && len(ops) > 0 {
			t.Fatalf("Delta leaves %v to others", ops)
		}
		if ok {
			taken++
		}
	})
	if taken == 0 {
		t.Error("Delta took on nothing")
	}
}

// changeFew changes a few peers and service addresses, or nothing, of each network.
// It reports whether all of that is simple: in the clear.
func changeFew(t *rapid.T, want vxlan.State) bool {
	simple := true
	for _, vni := range slices.Sorted(maps.Keys(want.Networks)) {
		n := want.Networks[vni]
		switch rapid.IntRange(0, 6).Draw(t, fmt.Sprint("change of ", vni)) {
		case 0: // one more endpoint, of one or two addresses
			p := vxlan.Peer{Addr: netip.AddrFrom4([4]byte{10, 0, 0, 90}), MAC: weft.EndpointMAC("new", second(90)), VTEP: netip.AddrFrom4([4]byte{10, 99, 0, 9})}
			n.Peers = append(n.Peers, p)
			if rapid.Bool().Draw(t, "two") {
				p.Addr = second(90)
				n.Peers = append(n.Peers, p)
			}
		case 1: // one less
			if len(n.Peers) > 0 {
				i := rapid.IntRange(0, len(n.Peers)-1).Draw(t, "which")
				n.Peers = slices.Delete(n.Peers, i, i+1)
			}
		case 2: // an address has a new holder
			if len(n.Peers) > 0 {
				i := rapid.IntRange(0, len(n.Peers)-1).Draw(t, "which")
				n.Peers[i].MAC = weft.EndpointMAC("other", n.Peers[i].Addr)
			}
		case 3: // one moves to another node, with both addresses
			if len(n.Peers) > 0 {
				mac := vxlan.MACOf(n.Peers[0].MAC)
				for i := range n.Peers {
					if vxlan.MACOf(n.Peers[i].MAC) == mac {
						n.Peers[i].VTEP = netip.AddrFrom4([4]byte{10, 99, 0, 8})
					}
				}
			}
		case 6: // a way becomes native, or encapsulated, and narrower
			for i := range n.Peers {
				n.Peers[i].Native, n.Peers[i].MTU = n.Native && !n.Peers[i].Native, 1290
			}
		case 4:
			a := netip.AddrFrom4([4]byte{10, 0, 0, 91})
			n.VIPs = append(n.VIPs, vxlan.VIP{Addr: a, MAC: weft.VIPMAC("s", a)})
		case 5:
			continue
		}
		if n.Encrypted {
			simple = false
		}
		want.Networks[vni] = n
	}
	return simple
}

// TestDeltaLeavesTheRest: any two states, most of which differ in more.
func TestDeltaLeavesTheRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		left, want := draw(t, "left"), draw(t, "want")
		if got, _, ok := vxlan.Delta(left, want); ok && !reflect.DeepEqual(got, vxlan.Diff(left, want)) {
			t.Fatalf("Delta gives\n%v\nDiff\n%v", got, vxlan.Diff(left, want))
		}
		if got, _, ok := vxlan.Delta(left, left); ok {
			t.Fatalf("nothing has changed, and Delta gives %v", got)
		}
	})
}

// TestDeltaRefusesWhatMayBeWrong: an address or a hardware address that stands
// twice is for Validate to judge.
func TestDeltaRefusesWhatMayBeWrong(t *testing.T) {
	a := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
	node := netip.MustParseAddr("10.99.0.3")
	peer := func(i byte) vxlan.Peer {
		return vxlan.Peer{Addr: a(i), MAC: weft.EndpointMAC(weft.ID(fmt.Sprint("t", i)), a(i)), VTEP: node}
	}
	left := vxlan.State{Networks: map[uint32]vxlan.Network{4097: {
		ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789,
		Peers: []vxlan.Peer{peer(1), peer(2)}, VIPs: []vxlan.VIP{{Addr: a(9), MAC: weft.VIPMAC("s", a(9))}},
		Ports: []vxlan.Port{{Task: "p", NetNS: "/run/p", IfName: "eth0", Addr: netip.PrefixFrom(a(5), 24), MAC: weft.EndpointMAC("p", a(5))}},
	}}}
	for name, add := range map[string]vxlan.Peer{
		"address of a peer":            {Addr: a(1), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"address of a service":         {Addr: a(9), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"address of a port":            {Addr: a(5), MAC: weft.EndpointMAC("x", a(7)), VTEP: node},
		"hardware address of a port":   {Addr: a(7), MAC: weft.EndpointMAC("p", a(5)), VTEP: node},
		"hardware address of a peer":   {Addr: a(7), MAC: weft.EndpointMAC("t1", a(1)), VTEP: node},
		"VTEP that is this node":       {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: netip.MustParseAddr("10.99.0.1")},
		"VTEP of another family":       {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: netip.MustParseAddr("fd00::1")},
		"hardware address of a group":  {Addr: a(7), MAC: []byte{1, 0, 0, 0, 0, 7}, VTEP: node},
		"no hardware address":          {Addr: a(7), VTEP: node},
		"hardware address of a VIP":    {Addr: a(7), MAC: weft.VIPMAC("s", a(9)), VTEP: node},
		"MTU of the way out of bounds": {Addr: a(7), MAC: weft.EndpointMAC("x", a(7)), VTEP: node, MTU: 3},
	} {
		want := vxlan.Normalize(left)
		n := want.Networks[4097]
		n.Peers = append(n.Peers, add)
		want.Networks[4097] = n
		if ops, _, ok := vxlan.Delta(left, want); ok {
			t.Errorf("%s: taken on as %v", name, ops)
		}
	}
}

// BenchmarkDelta is what one of 1,000 endpoints that moves costs to find.
func BenchmarkDelta(b *testing.B) {
	n := vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789}
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).Next()
		n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: netip.AddrFrom4([4]byte{10, 99, 0, byte(2 + i%9)})})
	}
	m := n
	m.Peers = slices.Clone(n.Peers)
	m.Peers[500].VTEP = netip.MustParseAddr("10.99.0.77")
	left := vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}
	want := vxlan.State{Networks: map[uint32]vxlan.Network{m.VNI: m}}
	for b.Loop() {
		if ops, _, ok := vxlan.Delta(left, want); !ok || len(ops) != 1 {
			b.Fatal(ops, ok)
		}
	}
}

// TestExpressIsAsAWholePass: over random histories with damage and failures, a
// kernel that makes changes of a few entries alone comes to the state, and to the
// repairs, of its slow twin, which always reads everything. What it has not looked
// at yet it may find to be no damage any more; it never counts what the twin does not.
func TestExpressIsAsAWholePass(t *testing.T) {
	ctx := context.Background()
	quick := 0
	rapid.Check(t, func(t *rapid.T) {
		kernels := [2]vxlantest.Kernel{{Express: true}, {}}
		var counts [2]map[string]int
		for i := range kernels {
			kernels[i].Repaired = func(r weft.Repair) { counts[i][r.Kind+" of "+r.Object]++ }
		}
		apply := func(want vxlan.State) {
			for i := range kernels {
				if err := kernels[i].Apply(ctx, want); err != nil {
					t.Fatal(i, err)
				}
			}
		}
		// settle has both read everything until nothing is left to find.
		settle := func(want vxlan.State) {
			for range 3 {
				apply(want)
			}
			a, _ := kernels[0].Read(ctx)
			b, _ := kernels[1].Read(ctx)
			if text(a) != text(b) || len(vxlan.Diff(a, want)) > 0 {
				t.Fatalf("quick\n%s\nslow\n%s", text(a), text(b))
			}
		}
		want := vxlan.Normalize(draw(t, "start"))
		counts = [2]map[string]int{{}, {}}
		settle(want)
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			counts = [2]map[string]int{{}, {}}
			isLate := rapid.Bool().Draw(t, "several changes between two whole passes")
			for range map[bool]int{false: 1, true: 3}[isLate] {
				for range rapid.IntRange(0, 2).Draw(t, "damages") {
					op := drawDamage(t, &kernels[1])
					for i := range kernels {
						_ = kernels[i].Behind(op) // of what is not there: no damage
					}
				}
				next := vxlan.Normalize(want)
				changeFew(t, next)
				if vxlan.Validate(next) != nil {
					continue
				}
				want = next
				apply(want)
			}
			settle(want)
			if !isLate && !maps.Equal(counts[0], counts[1]) {
				t.Fatalf("quick counts %v, slow %v", counts[0], counts[1])
			}
			// Of two damages to one object the last is found.
			quick, slow := byObject(counts[0]), byObject(counts[1])
			for what, n := range quick {
				if n > slow[what] {
					t.Fatalf("quick counts %v, slow %v", counts[0], counts[1])
				}
			}
		}
		quick += kernels[0].Quick()
	})
	if quick == 0 {
		t.Error("no change was made without a whole pass")
	}
}

// byObject adds up counts of kinds of each object.
func byObject(counts map[string]int) map[string]int {
	out := map[string]int{}
	for what, n := range counts {
		_, object, _ := strings.Cut(what, " of ")
		out[object] += n
	}
	return out
}

// TestFailedExpressIsAChange: an operation that fails on the way without a whole
// pass is made by the pass that follows, and what it left half done is no repair.
func TestFailedExpressIsAChange(t *testing.T) {
	ctx := context.Background()
	tried := 0
	rapid.Check(t, func(t *rapid.T) {
		k := vxlantest.Kernel{Express: true}
		k.Repaired = func(r weft.Repair) { t.Fatalf("counted: %+v", r) }
		left := vxlan.Normalize(draw(t, "left"))
		want := vxlan.Normalize(left)
		changeFew(t, want)
		if vxlan.Validate(want) != nil {
			return
		}
		if err := k.Apply(ctx, left); err != nil {
			t.Fatal(err)
		}
		ops, _, ok := vxlan.Delta(left, want)
		if ok && len(ops) > 1 {
			tried++
		}
		k.FailAt(rapid.IntRange(1, 4).Draw(t, "at"), unix.EBUSY)
		for range 3 { // a failure that was not met may be in a later pass
			if err := k.Apply(ctx, want); err != nil && !errors.Is(err, unix.EBUSY) {
				t.Fatal(err)
			}
		}
		got, _ := k.Read(ctx)
		if ops := vxlan.Diff(got, want); len(ops) > 0 {
			t.Fatalf("still to do: %v", ops)
		}
	})
	if tried == 0 {
		t.Error("nothing could fail")
	}
}
