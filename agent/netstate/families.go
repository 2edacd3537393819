package netstate

import (
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// withoutIPv6 is the input as a host without IPv6 can carry it out: second
// addresses are gone, and with them the IPv6 half of networks of two families.
// Others are still told of the addresses, which are the tasks' by right.
func withoutIPv6(in Input) Input {
	in.Self.IngressAddr6 = netip.Prefix{}
	in.Nodes = slices.Clone(in.Nodes)
	for i := range in.Nodes {
		in.Nodes[i].IngressAddr6 = netip.Prefix{}
	}
	in.Networks = slices.Clone(in.Networks)
	for i := range in.Networks {
		if s := &in.Networks[i].Spec; s.IPv6 && !s.NoIPv4 {
			s.IPv6 = false
			s.Subnets = slices.DeleteFunc(slices.Clone(s.Subnets), func(n weft.Subnet) bool { return n.Prefix.Addr().Is6() })
		}
	}
	in.Endpoints = slices.Clone(in.Endpoints)
	for i := range in.Endpoints {
		in.Endpoints[i].Addr6 = netip.Addr{}
	}
	in.Services = slices.Clone(in.Services)
	for i := range in.Services {
		in.Services[i].VIPs = slices.Clone(in.Services[i].VIPs)
		for j := range in.Services[i].VIPs {
			in.Services[i].VIPs[j].Addr6 = netip.Prefix{}
		}
	}
	in.Local = slices.Clone(in.Local)
	for i := range in.Local {
		t := &in.Local[i].Task
		t.Attachments = slices.Clone(t.Attachments)
		for j := range t.Attachments {
			t.Attachments[j].Addr6 = netip.Prefix{}
		}
	}
	return in
}
