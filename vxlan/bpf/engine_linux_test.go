package bpf

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

func TestConformance(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	n := network(h, weft.NewID(), 1450, map[*testHost][]vxlan.Port{h: {h.task(1, false)}})
	peer, vip := netip.MustParseAddr("10.100.0.21"), netip.MustParseAddr("10.100.0.200")
	n.Peers = []vxlan.Peer{{Addr: peer, MAC: weft.EndpointMAC("u", peer), VTEP: netip.MustParseAddr("10.99.8.2")}}
	n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("s", vip)}}
	must(t, h.ns.Do(func() error { vxlantest.Conformance(t, h.k, n); return nil }))
}

// TestPacketsCross: both families inside and outside, alone and beside the
// bridge engine, at the sizes of Ethernet and of jumbo frames.
func TestPacketsCross(t *testing.T) {
	for _, c := range []struct {
		name string
		plan plan
		v6   bool
	}{
		{"ipv4 in ipv4", plan{hosts: 2}, false},
		{"ipv6 in ipv4", plan{hosts: 2}, true},
		{"ipv4 in ipv6", plan{hosts: 2, under6: true}, false},
		{"ipv6 in ipv6", plan{hosts: 2, under6: true}, true},
		{"jumbo", plan{hosts: 2, mtu: 9000}, false},
		{"with the bridge engine", plan{hosts: 2, bridges: []int{2}}, false},
		{"with the bridge engine, ipv6", plan{hosts: 2, bridges: []int{2}}, true},
		{"with the bridge engine over ipv6", plan{hosts: 2, under6: true, bridges: []int{2}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t, c.plan, c.v6)
			for _, h := range m.hosts {
				expectEqual(t, h, m.want[h])
			}
			t.Run("tcp", func(t *testing.T) { m.all(t, overTCP) })
			t.Run("udp", func(t *testing.T) { m.all(t, overUDP) })
			if t.Failed() {
				for _, h := range m.hosts {
					if !h.bridge {
						fmt.Println(h.i, h.drops())
					}
				}
			}
		})
	}
}

func TestProbe(t *testing.T) {
	h := rig(t, plan{hosts: 1})[0]
	must(t, h.ns.Do(func() error { return h.engine().Probe(context.Background()) }))
}
