package netstate

import (
	"bytes"
	"net"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Between is the input of a state between have and what in leads to (want): in
// without the addresses that go from one holder to another. Applied first, it
// makes every table drop the former holder before any learns of the next: a
// packet that was sent to an address by an old answer of the resolver finds
// nobody there, and not somebody else. It reports false when no address goes.
//
// A node needs it that missed the time for which an address was nobody's: one
// that was cut off, or without a daemon, for longer than freed addresses rest.
func Between(have, want vxlan.State, in Input) (Input, bool) {
	going := map[weft.ID]map[netip.Addr]bool{}
	for vni, w := range want.Networks {
		if h, ok := have.Networks[vni]; ok && h.ID == w.ID {
			if addrs := handedOver(h, w); len(addrs) > 0 {
				going[w.ID] = addrs
			}
		}
	}
	if len(going) == 0 {
		return in, false
	}
	goes := func(at weft.Attachment) bool {
		return slices.ContainsFunc(at.Addrs(), func(p netip.Prefix) bool { return going[at.Network][p.Addr().Unmap()] })
	}
	in.Endpoints = slices.DeleteFunc(slices.Clone(in.Endpoints), func(e weft.OwnedEndpoint) bool {
		return slices.ContainsFunc(e.Addrs(), func(a netip.Addr) bool { return going[e.Network][a.Unmap()] })
	})
	in.Local = slices.DeleteFunc(slices.Clone(in.Local), func(t LocalTask) bool { return slices.ContainsFunc(t.Task.Attachments, goes) })
	in.Services = slices.Clone(in.Services)
	for i := range in.Services {
		s := &in.Services[i]
		s.VIPs = slices.DeleteFunc(slices.Clone(s.VIPs), func(v weft.VIP) bool { return goes(weft.Attachment(v)) })
	}
	mesh := slices.IndexFunc(in.Networks, func(n weft.Network) bool { return n.Spec.Ingress })
	in.Nodes = slices.Clone(in.Nodes)
	for i := range in.Nodes {
		n := &in.Nodes[i]
		if mesh < 0 || n.ID == in.Self.ID {
			continue
		}
		if goes(weft.Attachment{Network: in.Networks[mesh].ID, Addr: n.IngressAddr, Addr6: n.IngressAddr6}) {
			n.IngressAddr, n.IngressAddr6 = netip.Prefix{}, netip.Prefix{}
		}
	}
	return in, true
}

// handedOver are the addresses that have and want give different hardware
// addresses: those stand for the holder. What a kernel has of an encrypted
// network's endpoints elsewhere is the router's, which is nobody's.
func handedOver(have, want vxlan.Network) map[netip.Addr]bool {
	// What both have is handed over to nobody.
	have.Ports, want.Ports = trimmed(have.Ports, want.Ports, func(a, b *vxlan.Port) bool { return samePort(a, b) && bytes.Equal(a.MAC, b.MAC) })
	have.Peers, want.Peers = trimmed(have.Peers, want.Peers, samePeer)
	have.VIPs, want.VIPs = trimmed(have.VIPs, want.VIPs, sameVIP)
	old := map[netip.Addr]net.HardwareAddr{}
	router := weft.RouterMAC(have.VNI)
	holders(have, func(a netip.Addr, mac net.HardwareAddr) {
		if !bytes.Equal(mac, router) {
			old[a.Unmap()] = mac
		}
	})
	var out map[netip.Addr]bool
	holders(want, func(a netip.Addr, mac net.HardwareAddr) {
		if was, ok := old[a.Unmap()]; ok && !bytes.Equal(was, mac) {
			if out == nil {
				out = map[netip.Addr]bool{}
			}
			out[a.Unmap()] = true
		}
	})
	return out
}

func holders(n vxlan.Network, f func(netip.Addr, net.HardwareAddr)) {
	for _, p := range n.Ports {
		for _, a := range p.Addrs() {
			f(a.Addr(), p.MAC)
		}
	}
	for _, p := range n.Peers {
		f(p.Addr, p.MAC)
	}
	for _, v := range n.VIPs {
		f(v.Addr, v.MAC)
	}
}
