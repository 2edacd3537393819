package netstate

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// A task stands for its service's addresses by its own on the same network and of
// the same family, also while it drains; one of no service address stands for none.
func TestDeriveEnds(t *testing.T) {
	in := base()
	dual := localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointDraining)
	dual.Task.Attachments[1].Addr6 = netip.MustParsePrefix("fd00::3/64")
	alone := localWeb(2, "10.0.16.4/20", "10.255.0.6/16", weft.EndpointReady)
	alone.Task.Service = "none"
	in.Local = []LocalTask{alone, dual}
	in.Services = slices.Clone(in.Services)
	i := slices.IndexFunc(in.Services, func(s Service) bool { return s.ID == "web" })
	in.Services[i].VIPs = []weft.VIP{{Network: "front", Addr: netip.MustParsePrefix("10.0.16.2/20"), Addr6: netip.MustParsePrefix("fd00::2/64")}}
	at := netip.MustParseAddr
	want := []ingress.End{{Task: "web1", NetNS: "/ns/web1", Addrs: []ingress.EndAddr{{VIP: at("10.0.16.2"), Own: at("10.0.16.3")}, {VIP: at("fd00::2"), Own: at("fd00::3")}}}}
	if got := Derive(in).Ingress.Ends; !reflect.DeepEqual(got, want) {
		t.Errorf("ends\n%+v, want\n%+v", got, want)
	}
	in.NoIPv6 = true
	want[0].Addrs = want[0].Addrs[:1]
	if got := Derive(in).Ingress.Ends; !reflect.DeepEqual(got, want) {
		t.Errorf("ends without IPv6\n%+v, want\n%+v", got, want)
	}
}
