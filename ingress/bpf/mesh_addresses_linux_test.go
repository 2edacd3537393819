package bpf

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: the rig's, and host 0 is 198.18.0.9 and 2001:db8:0::9 to the client as well.
var (
	firstAddrs = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:db8:0::1")}
	otherAddrs = []netip.Addr{netip.MustParseAddr("198.18.0.9"), netip.MustParseAddr("2001:db8:0::9")}
)

// addrsRig is a rig of which host 0 has the other addresses, and refuses as often as it
// is asked.
func addrsRig(t *testing.T) *meshRig {
	r := newMeshRig(t, false, 0, 1)
	r.hosts[0].do(t, func() error {
		return errors.Join(address("out0", []string{"198.18.0.9/24", "2001:db8:0::9/64"}),
			writeProc("net/ipv4/icmp_ratelimit", "0"), writeProc("net/ipv6/icmp/ratelimit", "0"))
	})
	return r
}

// TestPublishedAtTwoAddresses: what goes past the host goes where its address leads, and
// the clients of the one that are hidden stay so.
func TestPublishedAtTwoAddresses(t *testing.T) {
	r := addrsRig(t)
	far, near := r.task(1, 11), r.task(0, 12)
	var ports []ingress.Published
	for p, target := range map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7} {
		ports = append(ports,
			ingress.Published{Service: "a", Protocol: p, Port: 30000, Target: target, IPs: firstAddrs, Backends: []ingress.Backend{far}},
			ingress.Published{Service: "b", Protocol: p, Port: 30000, Target: target, IPs: otherAddrs, Backends: []ingress.Backend{near}, HideClient: true})
	}
	r.apply(ports...)
	r.serve(far)
	r.serve(near)
	own := []netip.Addr{r.hosts[0].leg.Addr.Addr(), r.hosts[0].leg.Addr6.Addr()}
	for i, client := range []string{meshClient, meshClient6} {
		for _, network := range []string{"tcp", "udp"} {
			for _, q := range []struct {
				at   netip.Addr
				task ingress.Backend
				seen netip.Addr
			}{{firstAddrs[i], far, netip.MustParseAddr(client)}, {otherAddrs[i], near, own[i]}} {
				c, task, seen, err := r.open(network, join(q.at.String(), 30000), 0)
				if err != nil || task != string(q.task.Task) || seen.Addr() != q.seen {
					t.Fatalf("%s to %s: %q saw %s, %v; want %s and %s", network, q.at, task, seen, err, q.task.Task, q.seen)
				}
				if err := again(network, c, task); err != nil {
					t.Errorf("%s to %s, once more: %v", network, q.at, err)
				}
			}
		}
	}
	for k := range r.flows(0) {
		if at := netip.AddrFrom16(k.Host).Unmap(); !slices.Contains(firstAddrs, at) {
			t.Errorf("a flow to %s goes past the host, and its client is to be hidden", at)
		}
	}
}

// TestPublishedNarrowed: flows that go past the host end when their clients might not
// begin them any more, and others go on.
func TestPublishedNarrowed(t *testing.T) {
	r := addrsRig(t)
	b := r.task(1, 11)
	base := append(meshPorts(b), ingress.Published{Service: "web", Protocol: weft.UDP, Port: 30002, Target: 7, Backends: []ingress.Backend{b}})
	r.apply(base...)
	r.serve(b)
	foreign := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:8::/64")}
	for _, tc := range []struct {
		name   string
		change func(*ingress.Published)
	}{
		{"not allowed any more", func(p *ingress.Published) { p.Allow = foreign }},
		{"at another address", func(p *ingress.Published) { p.IPs = otherAddrs }},
		{"unpublished", func(p *ingress.Published) { p.Port = 30004 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r.apply(base...)
			type running struct {
				network, to string
				c           net.Conn
			}
			var mine, others []running
			for _, at := range firstAddrs {
				for _, network := range []string{"tcp", "udp"} {
					for port, list := range map[int]*[]running{30000: &mine, 30002: &others} {
						to := join(at.String(), port)
						c, _, _, err := r.open(network, to, 0)
						must(t, err)
						must(t, again(network, c, string(b.Task)))
						*list = append(*list, running{network, to, c})
					}
				}
			}
			next := slices.Clone(base)
			for i := range next {
				if next[i].Port == 30000 {
					tc.change(&next[i])
				}
			}
			r.apply(next...)
			for _, f := range mine {
				if err := again(f.network, f.c, string(b.Task)); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("%s to %s: %v, want an end", f.network, f.to, err)
				}
			}
			for _, f := range others {
				if err := again(f.network, f.c, string(b.Task)); err != nil {
					t.Errorf("%s to %s, which nobody has changed: %v", f.network, f.to, err)
				}
			}
			for k := range r.flows(0) {
				if k.HPort == [2]byte{30000 >> 8, 30000 & 0xff} {
					t.Errorf("a flow is left: %+v", k)
				}
			}
		})
	}
}
