package vxlan_test

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// things is a state as a flat list of its objects, each with what it is: the
// slow twin of the audit works on nothing else.
func things(s vxlan.State) map[string]string {
	out := map[string]string{}
	for vni, n := range s.Networks {
		out[fmt.Sprintf("network %d", vni)] = string(n.ID)
		out[fmt.Sprintf("settings of network %d", vni)] = fmt.Sprint(n.MTU, n.Native)
		out[weft.VXLANName(vni)] = fmt.Sprint(n.VTEP, n.Port)
		t := vxlan.Derive(n)
		for mac, vtep := range t.FDB {
			out[fmt.Sprintf("fdb %s of network %d", mac.HardwareAddr(), vni)] = fmt.Sprint(vtep, " ", t.MTU[mac])
		}
		for a, mac := range t.Neigh {
			out[fmt.Sprintf("neighbour %s of network %d", a, vni)] = mac.HardwareAddr().String()
		}
		for _, p := range n.Ports {
			out[fmt.Sprintf("port %s of task %s of network %d", p.IfName, p.Task.Short(), vni)] = fmt.Sprint(p.Addr, p.MAC, p.NetNS)
		}
		if n.HostLeg != nil {
			out[fmt.Sprintf("leg of network %d", vni)] = fmt.Sprint(n.HostLeg.Addr, n.HostLeg.MAC)
		}
	}
	return out
}

// expected is what must be counted, from the rule alone: the object is not what
// was left, and not what is wanted. What is not wanted any more, and was left,
// is removed whatever became of it. Nothing within a network that is made anew
// counts, nor what went with a device.
func expected(left, had, want vxlan.State) map[string]int {
	l, h, w := things(left), things(had), things(want)
	out := map[string]int{}
	for name := range union(l, h, w) {
		lv, inL := l[name]
		hv, inH := h[name]
		wv, inW := w[name]
		vni := vniOf(name)
		ln, inLeft := left.Networks[vni]
		hn, inHad := had.Networks[vni]
		wn, inWant := want.Networks[vni]
		anew := inWant && (!inHad || hn.ID != wn.ID)
		lost := hn.VTEP != wn.VTEP || hn.Port != wn.Port
		if hn.Encrypted && wn.Encrypted { // an uplink has no address of its own
			lost = !hn.VTEP.IsValid()
		}
		switch {
		case inL == inH && lv == hv, inH == inW && hv == wv: // as left, or as wanted
		case inL && !inW: // goes anyway
		case strings.HasPrefix(name, "network"):
			if !inLeft && !inWant || inLeft && inWant && ln.ID == wn.ID {
				out[name]++
			}
		case anew || !inLeft || !inWant:
		case strings.HasPrefix(name, "fdb") && hn.MTU != ln.MTU && inL && inH && wayOf(lv) == wayOf(hv): // went with the network's MTU
		case strings.HasPrefix(name, "fdb") && lost && !inH:
		case strings.HasPrefix(name, "fdb") && lost && !inW: // strays went with it
		case strings.HasPrefix(name, "settings"):
			out[fmt.Sprintf("network %d", vni)]++
		case strings.HasPrefix(name, "leg"):
			out["leg"]++
		default:
			out[name]++
		}
	}
	return out
}

// wayOf is a forwarding entry of things without its MTU.
func wayOf(entry string) string { return entry[:strings.LastIndex(entry, " ")] }

func union(ms ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range ms {
		maps.Copy(out, m)
	}
	return out
}

// vniOf is the number at the end of a name.
func vniOf(name string) (vni uint32) {
	i := strings.LastIndexAny(name, " x")
	fmt.Sscan(name[i+1:], &vni)
	return vni
}

// damage does something drawn to the kernel that somebody else might do.
func damage(t *rapid.T, k *vxlantest.Kernel) {
	_ = k.Behind(drawDamage(t, k)) // of what is not there: no damage
}

func drawDamage(t *rapid.T, k *vxlantest.Kernel) vxlan.Op {
	vni := uint32(rapid.IntRange(4097, 4099).Draw(t, "damaged network"))
	a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 7).Draw(t, "damaged address"))})
	task := weft.ID(fmt.Sprintf("task%d", rapid.IntRange(0, 1).Draw(t, "damaged generation")*100+int(a.As4()[3])))
	mac := weft.EndpointMAC(task, a)
	op := vxlan.Op{VNI: vni, Addr: a, MAC: mac, Port: &vxlan.Port{Task: task}}
	switch op.Kind = rapid.SampledFrom([]vxlan.OpKind{
		vxlan.OpSetFDB, vxlan.OpDelFDB, vxlan.OpDelFDB, vxlan.OpSetNeigh, vxlan.OpDelNeigh, vxlan.OpDelPort,
		vxlan.OpSetDevice, vxlan.OpSetNetwork, vxlan.OpDelHostLeg, vxlan.OpDelNetwork, vxlan.OpAddNetwork,
	}).Draw(t, "damage"); op.Kind {
	case vxlan.OpSetFDB:
		if st, _ := k.Read(context.Background()); !st.Networks[vni].Encrypted { // whose uplink leads to no VTEP
			op.VTEP = netip.MustParseAddr("10.99.0.9")
			op.MTU = rapid.SampledFrom([]int{0, 1300}).Draw(t, "damaged way")
			if peers := st.Networks[vni].Peers; len(peers) > 0 && rapid.Bool().Draw(t, "damaged MTU alone") {
				op.MAC, op.VTEP = peers[0].MAC, peers[0].VTEP
			}
		}
	case vxlan.OpSetNeigh:
		op.MAC = weft.VIPMAC("stranger", a)
	case vxlan.OpSetDevice, vxlan.OpSetNetwork:
		op.Network = &vxlan.Network{}
	case vxlan.OpAddNetwork:
		op.Network = &vxlan.Network{ID: "stranger", VNI: vni, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789}
	}
	return op
}

func counted(rs []weft.Repair) map[string]int {
	out := map[string]int{}
	for _, r := range rs {
		if r.Object == "leg" || r.Object == weft.IngressLeg {
			r.Object = "leg"
		}
		out[r.Object]++
	}
	return out
}

func TestRepairsAreWhatTheSlowTwinSays(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		var k vxlantest.Kernel
		var got []weft.Repair
		k.Repaired = func(r weft.Repair) { got = append(got, r) }
		left := draw(t, "left")
		if err := k.Apply(ctx, left); err != nil || len(got) != 0 {
			t.Fatalf("to begin with: %v, %v", got, err)
		}
		for range rapid.IntRange(0, 6).Draw(t, "damages") {
			damage(t, &k)
		}
		had, _ := k.Read(ctx)
		want := left
		if rapid.Bool().Draw(t, "the wish changes, too") {
			want = draw(t, "want")
		}
		if err := k.Apply(ctx, want); err != nil {
			t.Fatal(err)
		}
		if n, w := counted(got), expected(left, had, want); !maps.Equal(n, w) {
			t.Fatalf("repairs %v, want of %v", got, w)
		}
		for _, r := range got {
			if r.Kind == "" || r.Reason == "" || strings.Contains(r.Reason, "%!") {
				t.Fatalf("unclear: %+v", r)
			}
		}
		// A lost MTU of the network hides that of a way, which is seen once the
		// first is back: a second pass may find more, and nothing again.
		hidden := had.Networks
		first := counted(got)
		got = nil
		if err := k.Apply(ctx, want); err != nil {
			t.Fatal(err)
		}
		for _, r := range got {
			vni := vniOf(r.Object)
			if first[r.Object] > 0 || !strings.HasPrefix(r.Object, "fdb") || hidden[vni].MTU == want.Networks[vni].MTU {
				t.Fatalf("counted twice: %v", got)
			}
		}
		got = nil
		if err := k.Apply(ctx, want); err != nil || len(got) != 0 {
			t.Fatalf("counted twice: %v, %v", got, err)
		}
	})
}

// A failing repair is counted when it is done, and a failing change never,
// however often either is tried.
func TestFailuresAreCountedWhenDone(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		var k vxlantest.Kernel
		var got []weft.Repair
		k.Repaired = func(r weft.Repair) { got = append(got, r) }
		left, want := draw(t, "left"), draw(t, "want")
		if err := k.Apply(ctx, left); err != nil {
			t.Fatal(err)
		}
		// Entries alone: what a greater object answers for depends on what
		// of it has failed.
		for range rapid.IntRange(0, 4).Draw(t, "damages") {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 7).Draw(t, "damaged address"))})
			_ = k.Behind(vxlan.Op{Kind: vxlan.OpDelNeigh, VNI: 4097, Addr: a})
		}
		had, _ := k.Read(ctx)
		if rapid.Bool().Draw(t, "only damages") {
			want = left
		}
		for range rapid.IntRange(0, 3).Draw(t, "failures") {
			k.FailAt(rapid.IntRange(1, 12).Draw(t, "at"), unix.EBUSY)
		}
		for {
			if err := k.Apply(ctx, want); err == nil {
				break
			}
		}
		n, w := counted(got), expected(left, had, want)
		for what, count := range n {
			if count > w[what] {
				t.Fatalf("%s was counted %d times, want %d: %v", what, count, w[what], got)
			}
		}
		if slices.Equal(slices.Collect(maps.Keys(left.Networks)), nil) || want.Networks[4097].ID != left.Networks[4097].ID {
			return
		}
		if !maps.Equal(n, w) {
			t.Fatalf("repairs %v, want of %v", got, w)
		}
	})
}

// A new process knows of no wish before its own: what was changed while none ran
// is a change, what no wish explains is a repair.
func TestFirstApplyCountsFaultsOnly(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		var k vxlantest.Kernel
		left, want := draw(t, "left"), draw(t, "want")
		if err := k.Apply(ctx, left); err != nil {
			t.Fatal(err)
		}
		broken := map[uint32]bool{}
		for vni := range left.Networks {
			if broken[vni] = rapid.Bool().Draw(t, "device broken"); broken[vni] {
				if err := k.Behind(vxlan.Op{Kind: vxlan.OpSetDevice, VNI: vni, Network: &vxlan.Network{}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		k.Restart()
		w := map[string]int{}
		for vni, n := range want.Networks {
			if broken[vni] && left.Networks[vni].ID == n.ID {
				w[weft.VXLANName(vni)] = 1
			}
		}
		var got []weft.Repair
		k.Repaired = func(r weft.Repair) { got = append(got, r) }
		if err := k.Apply(ctx, want); err != nil {
			t.Fatal(err)
		}
		if n := counted(got); !maps.Equal(n, w) {
			t.Fatalf("repairs %v, want of %v", got, w)
		}
	})
}

// An invalid network is left alone, and what it becomes later is a change.
func TestInvalidNetworkIsNoRepair(t *testing.T) {
	ctx := context.Background()
	a := netip.MustParseAddr("10.0.0.2")
	good := vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789}
	bad := good
	bad.MTU = 1
	more := good
	more.Peers = []vxlan.Peer{{Addr: a, MAC: weft.EndpointMAC("t", a), VTEP: netip.MustParseAddr("10.99.0.2")}}
	var k vxlantest.Kernel
	k.Repaired = func(r weft.Repair) { t.Errorf("repaired %+v", r) }
	for _, n := range []vxlan.Network{good, bad, more, bad, good} {
		err := k.Apply(ctx, vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}})
		if (err != nil) != (n.MTU == 1) {
			t.Fatal(err)
		}
	}
}

// TestSharedDeviceIsOneObject: what two networks lack is counted once, by its own
// name, again when it happens again, and by the network's where each has its own.
func TestSharedDeviceIsOneObject(t *testing.T) {
	want := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for _, vni := range []uint32{4097, 4098} {
		want.Networks[vni] = vxlan.Network{ID: weft.ID(fmt.Sprint("n", vni)), VNI: vni, MTU: 1450, Port: 4789, VTEP: netip.MustParseAddr("192.0.2.1"),
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
	}
	damaged := func(device, fault string) vxlan.State {
		have := vxlan.State{Networks: maps.Clone(want.Networks)}
		for vni, n := range have.Networks {
			n.VTEP, n.Port, n.Device, n.DeviceFault = netip.Addr{}, 0, device, fault
			have.Networks[vni] = n
		}
		return have
	}
	var a vxlan.Audit
	for _, c := range []struct {
		have vxlan.State
		want string
	}{
		{vxlan.State{}, "[]"},
		{damaged("wxu4789", vxlan.FaultGone), "[{device missing wxu4789 it was gone}]"},
		{damaged("wxu4789", "it was down"), "[{device wrong wxu4789 it was down}]"},
		{want, "[]"},
		{damaged("", "it was down"), "[{device wrong wx4097 it was down} {device wrong wx4098 it was down}]"},
	} {
		got, err := a.Apply(t.Context(), c.have, want, func(vxlan.Op) error { return nil })
		if err != nil || fmt.Sprint(got) != c.want {
			t.Errorf("got %v, %v; want %s", got, err, c.want)
		}
	}
}

// TestLostMTUIsOneRepair: how narrow ways are cannot be read beside a wrong MTU of
// their network, and does not count besides it.
func TestLostMTUIsOneRepair(t *testing.T) {
	ctx := context.Background()
	var k vxlantest.Kernel
	var got []string
	k.Repaired = func(r weft.Repair) { got = append(got, r.Kind) }
	n := vxlan.Network{ID: "n", VNI: 4097, MTU: 1450, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789}
	for i := range byte(3) {
		a := netip.AddrFrom4([4]byte{10, 0, 0, 1 + i})
		n.Peers = append(n.Peers, vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("x", a), VTEP: netip.MustParseAddr("10.99.0.3"), MTU: 1300})
	}
	want := vxlan.State{Networks: map[uint32]vxlan.Network{4097: n}}
	for range 2 {
		if err := k.Apply(ctx, want); err != nil {
			t.Fatal(err)
		}
		if err := k.Behind(vxlan.Op{Kind: vxlan.OpSetNetwork, VNI: 4097, Network: &vxlan.Network{}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Apply(ctx, want); err != nil || !slices.Equal(got, []string{"network wrong", "network wrong"}) {
		t.Errorf("counted %v (%v), want one for each damage", got, err)
	}
	if had, _ := k.Read(ctx); len(vxlan.Diff(had, want)) != 0 {
		t.Errorf("still to do: %v", vxlan.Diff(had, want))
	}
}
