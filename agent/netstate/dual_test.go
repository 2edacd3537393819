package netstate

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// Address plan of the second family: front fd00:0:0:1::/64, ingress
// fd00:0:0:ff::/64.
var (
	front6   = netip.MustParsePrefix("fd00:0:0:1::/64")
	mesh6    = netip.MustParsePrefix("fd00:0:0:ff::/64")
	webVIP6  = netip.MustParsePrefix("fd00:0:0:1::2/64")
	meshVIP6 = netip.MustParsePrefix("fd00:0:0:ff::4/64")
)

// dualBase is base with a second family on front and on the ingress network, one
// task here and one on the other node.
func dualBase() Input {
	in := base()
	in.Networks = slices.Clone(in.Networks)
	for i, n := range in.Networks {
		switch n.ID {
		case front.ID:
			in.Networks[i].Spec.Subnets = append(slices.Clone(n.Spec.Subnets), weft.Subnet{Prefix: front6})
			in.Networks[i].Spec.IPv6 = true
		case mesh.ID:
			in.Networks[i].Spec.Subnets = append(slices.Clone(n.Spec.Subnets), weft.Subnet{Prefix: mesh6})
			in.Networks[i].Spec.IPv6 = true
		}
	}
	in.Self.IngressAddr6 = netip.MustParsePrefix("fd00:0:0:ff::2/64")
	there := other
	there.IngressAddr6 = netip.MustParsePrefix("fd00:0:0:ff::3/64")
	in.Nodes = []Node{in.Self, there}
	svc := web
	svc.VIPs = []weft.VIP{{Network: "ingress", Addr: meshVIP, Addr6: meshVIP6}, {Network: "front", Addr: webVIP, Addr6: webVIP6}}
	in.Services = []Service{svc}
	here := localWeb(1, "10.0.16.10/20", "10.255.0.10/16", weft.EndpointReady)
	here.Task.Attachments[0].Addr6 = netip.MustParsePrefix("fd00:0:0:ff::a/64")
	here.Task.Attachments[1].Addr6 = netip.MustParsePrefix("fd00:0:0:1::a/64")
	in.Local = []LocalTask{here}
	remote := remoteWeb(2, "10.0.16.11", weft.EndpointReady)
	remote.Addr6 = netip.MustParseAddr("fd00:0:0:1::b")
	in.Endpoints = []weft.OwnedEndpoint{remote}
	return in
}

func TestDeriveTwoFamilies(t *testing.T) {
	in := dualBase()
	out := Derive(in)
	if err := vxlan.Validate(out.Overlay); err != nil {
		t.Fatal(err)
	}
	n := out.Overlay.Networks[front.VNI]
	if len(n.Ports) != 1 || n.Ports[0].Addr6 != in.Local[0].Task.Attachments[1].Addr6 {
		t.Errorf("ports %+v", n.Ports)
	}
	mac := weft.EndpointMAC("web2", netip.MustParseAddr("10.0.16.11"))
	if len(n.Peers) != 2 || n.Peers[0].Addr.Is6() || n.Peers[1].Addr != in.Endpoints[0].Addr6 ||
		!bytes.Equal(n.Peers[0].MAC, mac) || !bytes.Equal(n.Peers[1].MAC, mac) {
		t.Errorf("peers %+v, want both addresses behind %s", n.Peers, mac)
	}
	if len(n.VIPs) != 2 || n.VIPs[1].Addr != webVIP6.Addr() || bytes.Equal(n.VIPs[0].MAC, n.VIPs[1].MAC) {
		t.Errorf("service addresses %+v", n.VIPs)
	}
	m := out.Overlay.Networks[weft.IngressVNI]
	if m.HostLeg.Addr6 != in.Self.IngressAddr6 || len(m.Peers) != 2 || m.Peers[1].Addr != in.Nodes[1].IngressAddr6.Addr() {
		t.Errorf("leg %+v, peers %+v", m.HostLeg, m.Peers)
	}
	if out.Ingress.Ingress.Addr6 != in.Self.IngressAddr6 {
		t.Errorf("entry %+v", out.Ingress.Ingress)
	}
	if b := out.Ingress.Published[0].Backends; len(b) != 1 || b[0].Addr6 != in.Local[0].Task.Attachments[0].Addr6.Addr() {
		t.Errorf("published to %+v", b)
	}
	i := slices.IndexFunc(out.Ingress.Networks, func(n ingress.Network) bool { return n.VNI == front.VNI })
	if s := out.Ingress.Networks[i].Services; len(s) != 2 || s[1].VIP != webVIP6.Addr() || len(s[1].Backends) != 2 {
		t.Errorf("services %+v", s)
	}
	names := out.Names.Networks[front.ID].Services[0]
	if !slices.Equal(names.VIP, []netip.Addr{webVIP.Addr(), webVIP6.Addr()}) || len(names.Tasks[0].Addrs) != 2 || len(names.Tasks[1].Addrs) != 2 {
		t.Errorf("names %+v", names)
	}
	if len(out.Publish) != 2 || out.Publish[1].Addr6 != in.Local[0].Task.Attachments[1].Addr6.Addr() {
		t.Errorf("publishes %+v", out.Publish)
	}
	if !slices.Contains(out.Ingress.Gateway.Protect, front6) {
		t.Errorf("protects %v", out.Ingress.Gateway.Protect)
	}
}

// One address of an endpoint that somebody else has takes both away: half an
// endpoint is none.
func TestDeriveLeavesOutHalfEndpoints(t *testing.T) {
	in := dualBase()
	odd := remoteWeb(3, "10.0.16.12", weft.EndpointReady)
	odd.Addr6 = in.Local[0].Task.Attachments[1].Addr6.Addr()
	in.Endpoints = append(in.Endpoints, odd)
	n := Derive(in).Overlay.Networks[front.VNI]
	if err := n.Validate(); err != nil || len(n.Peers) != 2 {
		t.Errorf("%v, peers %+v", err, n.Peers)
	}
}

// On a host without IPv6 the other family goes on, and nothing asks the kernel
// for what it lacks.
func TestDeriveWithoutIPv6(t *testing.T) {
	in := dualBase()
	in.NoIPv6 = true
	before := in.Local[0].Task.Attachments[1].Addr6
	out := Derive(in)
	if err := vxlan.Validate(out.Overlay); err != nil {
		t.Fatal(err)
	}
	for vni, n := range out.Overlay.Networks {
		for _, s := range n.Subnets {
			if s.Addr().Is6() {
				t.Errorf("network %d has subnet %s", vni, s)
			}
		}
		for _, p := range n.Peers {
			if p.Addr.Is6() {
				t.Errorf("network %d has peer %s", vni, p.Addr)
			}
		}
		for _, p := range n.Ports {
			if p.Addr6.IsValid() {
				t.Errorf("network %d has port %s", vni, p.Addr6)
			}
		}
		if n.HostLeg != nil && n.HostLeg.Addr6.IsValid() || len(n.VIPs) != 1 {
			t.Errorf("network %d has leg %+v, service addresses %v", vni, n.HostLeg, n.VIPs)
		}
	}
	if n := out.Overlay.Networks[front.VNI]; len(n.Ports) != 1 || len(n.Peers) != 1 {
		t.Errorf("front is %+v", n)
	}
	if out.Ingress.Ingress.Addr6.IsValid() {
		t.Error("ports are published on IPv6")
	}
	for _, n := range out.Ingress.Networks {
		if n.IPv6 {
			t.Errorf("network %d is balanced on IPv6", n.VNI)
		}
	}
	if out.Publish[1].Addr6 != before.Addr() || in.Local[0].Task.Attachments[1].Addr6 != before {
		t.Error("the others are not told, or the input was changed")
	}
}

// IPv6 needs links of 1280 bytes, whatever the underlay has.
func TestDeriveMTUOfIPv6(t *testing.T) {
	in := dualBase()
	in.Local[0].Task.Attachments = append(in.Local[0].Task.Attachments, weft.Attachment{Network: back.ID, Addr: netip.MustParsePrefix("10.0.32.5/20")})
	for _, c := range [][3]int{{1500, 1450, 1450}, {1280, 1280, 1230}} {
		in.MTU = c[0]
		n := Derive(in).Overlay.Networks
		if n[front.VNI].MTU != c[1] || n[back.VNI].MTU != c[2] {
			t.Errorf("underlay of %d: front has %d, back %d", c[0], n[front.VNI].MTU, n[back.VNI].MTU)
		}
	}
}
