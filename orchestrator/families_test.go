package orchestrator

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

var (
	testULA = netip.MustParsePrefix("fd12:3456:789a::/48")
	// smallFour leaves 5 addresses, smallSix 6.
	smallFour = weft.Subnet{Prefix: netip.MustParsePrefix("10.77.0.0/29")}
	smallSix  = weft.Subnet{Prefix: netip.MustParsePrefix("fd77::/125")}
)

// One family that is full must not cost the other an address.
func TestFamiliesAllOrNone(t *testing.T) {
	for _, subnets := range [][]weft.Subnet{{smallFour, smallSix}, {smallFour}, {smallSix}} {
		f := newFamilies(weft.NetworkSpec{Name: "n", Subnets: subnets})
		want := 5
		if len(subnets) == 1 && subnets[0] == smallSix {
			want = 6
		}
		var held []weft.Attachment
		for {
			at, err := f.next("net")
			if err != nil {
				if !errors.Is(err, weft.ErrUnavailable) {
					t.Fatal(err)
				}
				break
			}
			if len(at.Addrs()) != len(subnets) || at.Network != "net" {
				t.Fatalf("%v of %v", at, subnets)
			}
			held = append(held, at)
		}
		if len(held) != want {
			t.Errorf("%v: %d attachments, want %d", subnets, len(held), want)
		}
		full := usage(f)
		if err := f.take(held[0]); !errors.Is(err, weft.ErrConflict) || usage(f) != full {
			t.Errorf("taken twice: %v, %v", err, usage(f))
		}
		for _, at := range held {
			f.free(at)
		}
		if usage(f) != [2]uint64{} {
			t.Errorf("freed all, %v are in use", usage(f))
		}
		// The second address is taken: the first must be given back.
		if len(subnets) == 2 {
			if err := f.Take(held[0].Addr6.Addr()); err != nil {
				t.Fatal(err)
			}
			if err := f.take(held[0]); !errors.Is(err, weft.ErrConflict) || usage(f) != [2]uint64{0, 1} {
				t.Errorf("half taken: %v, %v", err, usage(f))
			}
		}
	}
}

func TestFamilyThatIsNotThere(t *testing.T) {
	f := newFamilies(weft.NetworkSpec{Name: "net", Subnets: []weft.Subnet{smallFour}})
	a := netip.MustParseAddr("fd77::5")
	if err := f.Take(a); !errors.Is(err, weft.ErrInvalid) {
		t.Error(err)
	}
	f.Free(a)
}

func TestNetworksOfTwoFamilies(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		cluster := testCluster()
		cluster.ULA = testULA
		r.bootWith(cluster, 1)
		m, ctx := r.managers[0], r.ctx
		nets, err := m.Networks(ctx)
		r.must(err)
		six, ok := nets[0].Spec.Subnet(true)
		if !ok || six.Prefix.String() != "fd12:3456:789a::/64" || !nets[0].Spec.IPv6 {
			t.Fatalf("the ingress network is %+v", nets[0].Spec)
		}
		resp, err := m.Admit(ctx, wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "worker-token", CSR: []byte("c")}, netip.MustParseAddr("10.99.1.1"))
		r.must(err)
		nodes, err := m.Nodes(ctx)
		r.must(err)
		legs := map[netip.Prefix]bool{}
		for _, n := range nodes {
			if legs[n.IngressAddr6] || !six.Prefix.Contains(n.IngressAddr6.Addr()) {
				t.Errorf("node %s enters by %s", n.ID, n.IngressAddr6)
			}
			legs[n.IngressAddr6] = true
		}
		if len(legs) != 2 || resp.Node == "" {
			t.Errorf("legs %v", legs)
		}

		dual, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "dual", IPv6: true})
		r.must(err)
		if s := dual.Spec.Subnets; len(s) != 2 || s[0].Prefix.String() != "10.0.0.0/20" || s[1].Prefix.String() != "fd12:3456:789a:1::/64" || s[1].Gateway.String() != "fd12:3456:789a:1::1" {
			t.Errorf("subnets %v", s)
		}
		only, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "only", IPv6: true, NoIPv4: true})
		r.must(err)
		if s := only.Spec.Subnets; len(s) != 1 || s[0].Prefix.String() != "fd12:3456:789a:2::/64" {
			t.Errorf("subnets %v", s)
		}
		given, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "given", IPv6: true, Subnets: []weft.Subnet{smallSix, smallFour}})
		r.must(err)
		if s := given.Spec.Subnets; len(s) != 2 || s[0].Prefix != smallFour.Prefix || s[1].Prefix != smallSix.Prefix {
			t.Errorf("subnets %v, want IPv4 first", s)
		}
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "x", IPv6: true, Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("fd12:3456:789a:1:8000::/66")}}})
		wantErr(t, "overlap", err, weft.ErrConflict, "IPAM.Config[0].Subnet", "network dual")

		spec := webSpec("web", 2)
		spec.Networks = []weft.NetworkTarget{{Network: "dual"}, {Network: "only"}}
		spec.Ports = []weft.PortSpec{{Target: 80}}
		svc, err := m.CreateService(ctx, spec)
		r.must(err)
		if v := svc.VIPs; len(v) != 3 || len(v[0].Addrs()) != 2 || len(v[1].Addrs()) != 2 || len(v[2].Addrs()) != 1 || !v[2].Addr.Addr().Is6() {
			t.Errorf("service addresses %v", v)
		}
		time.Sleep(time.Second)
		list, err := m.Tasks(ctx, weft.TaskFilter{})
		r.must(err)
		seen := map[netip.Prefix]bool{}
		for _, k := range list.Tasks {
			if len(k.Attachments) != 3 || len(k.Attachments[0].Addrs()) != 2 || len(k.Attachments[1].Addrs()) != 2 || len(k.Attachments[2].Addrs()) != 1 {
				t.Errorf("task %s is at %v", k.ID, k.Attachments)
			}
			for _, at := range k.Attachments {
				for _, a := range at.Addrs() {
					if seen[a] {
						t.Errorf("%s stands twice", a)
					}
					seen[a] = true
				}
			}
		}
		if len(seen) != 10 {
			t.Errorf("%d addresses of two tasks", len(seen))
		}
		r.checkAllocator()
	})
}

// A cluster that is older than IPv6 gets its range with the first network that
// needs it, and keeps it.
func TestOldClusterGetsItsRange(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		nets, err := m.Networks(ctx)
		r.must(err)
		if nets[0].Spec.IPv6 || len(nets[0].Spec.Subnets) != 1 {
			t.Errorf("the ingress network is %+v", nets[0].Spec)
		}
		var subnets []netip.Prefix
		for i := range 2 {
			n, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: fmt.Sprintf("n%d", i), IPv6: true})
			r.must(err)
			s, _ := n.Spec.Subnet(true)
			subnets = append(subnets, s.Prefix)
		}
		c, err := m.Cluster(ctx)
		r.must(err)
		if c.ULA.Bits() != 48 || c.ULA.Addr().As16()[0] != 0xfd || c.ULA.Masked() != c.ULA {
			t.Errorf("the range is %s", c.ULA)
		}
		for i, s := range subnets {
			if !c.ULA.Contains(s.Addr()) || s.Addr().As16()[7] != byte(i) {
				t.Errorf("network %d has %s of %s", i, s, c.ULA)
			}
		}
	})
}

func TestJoinNeedsTheFamilyOfTheOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1) // its tunnel address is of IPv4
		admit := func(advertise, dataPath string) error {
			req := wire.AdmitRequest{Version: wire.ProtocolVersion, Token: "worker-token", CSR: []byte("c"), Advertise: netip.MustParseAddrPort(advertise)}
			if dataPath != "" {
				req.DataPath = netip.MustParseAddr(dataPath)
			}
			_, err := r.leader().Admit(r.ctx, req, netip.Addr{})
			return err
		}
		wantErr(t, "advertised", admit("[fd00::2]:2377", ""), weft.ErrInvalid, "DataPathAddr", "fd00::2", "m1", "give an IPv4 address")
		wantErr(t, "data path", admit("10.99.1.2:2377", "fd00::2"), weft.ErrInvalid, "DataPathAddr")
		r.must(admit("10.99.1.2:2377", ""))
		r.must(admit("[fd00::2]:2377", "10.99.1.3")) // control over IPv6, overlay over IPv4
		r.must(admit("[::ffff:10.99.1.4]:2377", ""))
	})
}
