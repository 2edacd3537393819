package nft

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: the host is 192.0.2.1, its leg 10.0.16.250, backends are
// 10.0.16.1 to 10.0.16.3 with target ports from 7 and 17 on, published are ports
// from 30000 and 30010 on.

func drawTrackable(r *rapid.T) ingress.Table {
	t := ingress.Table{Ingress: ingress.Entry{Link: "leg", Addr: netip.MustParsePrefix("10.0.16.250/24")}}
	for i := range uint16(2) {
		if !rapid.Bool().Draw(r, "published") {
			continue
		}
		p := ingress.Published{
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP}).Draw(r, "protocol"), Port: 30000 + 10*i, Target: 7 + 10*i,
			Count: uint16(rapid.IntRange(0, 3).Draw(r, "count")),
		}
		for n := range byte(3) {
			if rapid.Bool().Draw(r, "backend") {
				p.Backends = append(p.Backends, ingress.Backend{
					Addr: netip.AddrFrom4([4]byte{10, 0, 16, n + 1}), Draining: rapid.Bool().Draw(r, "draining"),
				})
			}
		}
		t.Published = append(t.Published, p)
	}
	return t
}

// TestNothingMisledStays: a pass that does not read the tracked flows leaves
// none that reading them would have deleted.
func TestNothingMisledStays(t *testing.T) {
	host := netip.MustParseAddr("192.0.2.1")
	local := map[netip.Addr]bool{host: true}
	rapid.Check(t, func(r *rapid.T) {
		var was *trackable
		flows := map[tracked]bool{}
		for range rapid.IntRange(1, 12).Draw(r, "passes") {
			table := drawTrackable(r)
			now := trackableOf(table)
			if !now.follows(was) {
				for f := range flows {
					if now.misled(f, local) {
						delete(flows, f)
					}
				}
			}
			was = &now
			for f := range flows {
				if now.misled(f, local) {
					r.Fatalf("%v stays with %+v", f, now)
				}
			}
			// Every flow that can begin now does, and none of them is misled.
			for _, f := range newFlows(table, host) {
				if now.misled(f, local) {
					r.Fatalf("new flow %v is misled with %+v", f, now)
				}
				flows[f] = true
			}
		}
	})
}

// newFlows are all that can begin: to each published port, and to its neighbours.
func newFlows(t ingress.Table, host netip.Addr) []tracked {
	var out []tracked
	for port := uint16(29999); port < 30015; port++ {
		for name, proto := range map[weft.Protocol]byte{weft.TCP: unix.IPPROTO_TCP, weft.UDP: unix.IPPROTO_UDP} {
			asked := netip.AddrPortFrom(host, port)
			found := false
			for _, p := range t.Published {
				for _, b := range p.Backends {
					if p.Protocol == name && port >= p.Port && port < p.Port+max(p.Count, 1) && !b.Draining {
						found = true
						f := tracked{proto: proto, asked: asked, answers: netip.AddrPortFrom(b.Addr, p.Target+port-p.Port)}
						out = append(out, f)
						if f.isAsking = proto == unix.IPPROTO_TCP; f.isAsking {
							out = append(out, f)
						}
					}
				}
			}
			if !found { // the host itself refuses
				out = append(out, tracked{proto: proto, asked: asked, answers: asked})
			}
		}
	}
	return out
}

func TestForeignFlowsStay(t *testing.T) {
	open := ingress.Table{
		Ingress:   ingress.Entry{Link: "leg", Addr: netip.MustParsePrefix("10.0.16.250/24")},
		Published: []ingress.Published{{Protocol: weft.UDP, Port: 30000, Target: 7, Backends: []ingress.Backend{{Addr: netip.MustParseAddr("10.0.16.1")}}}},
	}
	k := trackableOf(open)
	local := map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true}
	ap := netip.MustParseAddrPort
	for name, f := range map[string]tracked{
		"translated by another program": {17, ap("192.0.2.1:53"), ap("10.9.9.9:53"), false},
		"the host's own server":         {17, ap("192.0.2.1:53"), ap("192.0.2.1:53"), false},
		"routed through, same port":     {17, ap("203.0.113.5:30000"), ap("203.0.113.5:30000"), false},
	} {
		if k.misled(f, local) {
			t.Errorf("%s: %v would be forgotten", name, f)
		}
	}
}
