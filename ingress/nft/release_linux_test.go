package nft

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: the host is 192.0.2.1 and 192.0.2.2, its leg 10.0.16.250, backends are
// 10.0.16.1 to 10.0.16.3 with target ports from 7 and 17 on, published are ports
// from 30000 and 30010 on. Clients are 198.51.100.7 and 203.0.113.9.

func drawTrackable(r *rapid.T) ingress.Table {
	t := ingress.Table{Ingress: ingress.Entry{Link: "leg", Addr: netip.MustParsePrefix("10.0.16.250/24")}}
	for i := range uint16(4) {
		if !rapid.Bool().Draw(r, "published") {
			continue
		}
		p := ingress.Published{
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP}).Draw(r, "protocol"), Port: 30000 + 10*(i/2), Target: 7 + 10*rapid.SampledFrom([]uint16{i / 2, 0}).Draw(r, "target"),
			Count: uint16(rapid.IntRange(0, 3).Draw(r, "count")), HideClient: rapid.IntRange(0, 2).Draw(r, "hide") == 0,
		}
		if rapid.Bool().Draw(r, "bound") {
			p.IPs = drawSome(r, hostAddrs[:2], "address")
		}
		if rapid.Bool().Draw(r, "limited") {
			p.Allow = drawSome(r, clientNets[:3], "allowed")
		}
		for n := range byte(3) {
			if rapid.Bool().Draw(r, "backend") {
				p.Backends = append(p.Backends, ingress.Backend{
					Addr: netip.AddrFrom4([4]byte{10, 0, 16, n + 1}), Draining: rapid.Bool().Draw(r, "draining"),
				})
			}
		}
		if spec := specOf(p); !slices.ContainsFunc(t.Published, func(o ingress.Published) bool { other := specOf(o); return spec.Clashes(&other) }) {
			t.Published = append(t.Published, p)
		}
	}
	return t
}

// TestNothingMisledStays: a pass that does not read the tracked flows leaves
// none that reading them would have deleted.
func TestNothingMisledStays(t *testing.T) {
	local := map[netip.Addr]bool{hostAddrs[0]: true, hostAddrs[1]: true}
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
			for _, f := range newFlows(table) {
				if now.misled(f, local) {
					r.Fatalf("new flow %v is misled with %+v", f, now)
				}
				flows[f] = true
			}
		}
	})
}

// newFlows are all that can begin: to each published port of either address, and to its
// neighbours, from either client.
func newFlows(t ingress.Table) []tracked {
	var out []tracked
	for _, at := range hostAddrs[:2] {
		for _, client := range clientAddrs[:2] {
			for port := uint16(29999); port < 30015; port++ {
				for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
					out = append(out, flowsTo(t, tracked{proto: proto, client: client, asked: netip.AddrPortFrom(at, port)})...)
				}
			}
		}
	}
	return out
}

// flowsTo are those of a client to one port.
func flowsTo(t ingress.Table, f tracked) (out []tracked) {
	for _, p := range t.Published {
		if p.IsAt(protocolOf(f.proto), f.asked) && p.Admits(f.client) {
			for _, b := range p.Backends {
				if b.Draining {
					continue
				}
				f.answers = netip.AddrPortFrom(b.Addr, p.Target+f.asked.Port()-p.Port)
				// One of the host's own, behind its gateway bridge for one, is seen as the host.
				for _, f.seen = range []netip.Addr{t.Ingress.Addr.Addr(), f.client} {
					if f.seen == f.client && p.HideClient {
						continue
					}
					f.isAsking = false
					out = append(out, f)
					if f.isAsking = f.proto == unix.IPPROTO_TCP; f.isAsking {
						out = append(out, f)
					}
				}
			}
		}
	}
	if len(out) == 0 { // the host itself refuses
		f.answers, f.seen = f.asked, f.client
		out = append(out, f)
	}
	return out
}

// TestMayStay: a flow stays as long as its client might begin it, or its backend drains;
// a connection also if its client is to be hidden by now.
func TestMayStay(t *testing.T) {
	local := map[netip.Addr]bool{hostAddrs[0]: true, hostAddrs[1]: true}
	stayed := 0
	rapid.Check(t, func(r *rapid.T) {
		was, is := drawTrackable(r), drawTrackable(r)
		k, may := trackableOf(is), withPorts(is, nil)
		for _, p := range is.Published { // what drains keeps what it has
			p.Backends = slices.Clone(p.Backends)
			for n := range p.Backends {
				p.Backends[n].Draining = false
			}
			may.Published = append(may.Published, p)
		}
		for _, f := range newFlows(was) {
			if f.isAsking || f.asked == f.answers {
				continue
			}
			want := slices.ContainsFunc(flowsTo(may, tracked{proto: f.proto, client: f.client, asked: f.asked}), func(o tracked) bool {
				return o.answers == f.answers && (o.seen == f.seen || f.proto == unix.IPPROTO_TCP)
			})
			if got := !k.misled(f, local); got != want {
				r.Fatalf("flow %+v stays: %v, want %v; from %+v to %+v", f, got, want, was.Published, is.Published)
			}
			if want {
				stayed++
			}
		}
	})
	if stayed == 0 {
		t.Error("no flow stayed: the test shows nothing")
	}
}

func TestForeignFlowsStay(t *testing.T) {
	open := ingress.Table{
		Ingress:   ingress.Entry{Link: "leg", Addr: netip.MustParsePrefix("10.0.16.250/24")},
		Published: []ingress.Published{{Protocol: weft.UDP, Port: 30000, Target: 7, Backends: []ingress.Backend{{Addr: netip.MustParseAddr("10.0.16.1")}}}},
	}
	k := trackableOf(open)
	local := map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true}
	ap, client := netip.MustParseAddrPort, clientAddrs[0]
	for name, f := range map[string]tracked{
		"translated by another program": {17, client, client, ap("192.0.2.1:53"), ap("10.9.9.9:53"), false},
		"the host's own server":         {17, client, client, ap("192.0.2.1:53"), ap("192.0.2.1:53"), false},
		"routed through, same port":     {17, client, client, ap("203.0.113.5:30000"), ap("203.0.113.5:30000"), false},
	} {
		if k.misled(f, local) {
			t.Errorf("%s: %v would be forgotten", name, f)
		}
	}
}
