package netstate

import (
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// ends are this node's tasks that stand for their services' addresses, whatever
// their state: one that drains still answers.
func (d *deriver) ends() []ingress.End {
	vips := map[weft.ID][]weft.VIP{}
	for _, s := range d.in.Services {
		vips[s.ID] = s.VIPs
	}
	var out []ingress.End
	for _, t := range sorted(d.in.Local, func(t LocalTask) string { return string(t.Task.ID) }) {
		e := ingress.End{Task: t.Task.ID, NetNS: t.NetNS}
		for _, v := range vips[t.Task.Service] {
			for _, a := range t.Task.Attachments {
				if a.Network == v.Network {
					e.Addrs = append(e.Addrs, endAddrs(v.Addrs(), a.Addrs())...)
				}
			}
		}
		if len(e.Addrs) > 0 {
			out = append(out, e)
		}
	}
	return out
}

// endAddrs pairs addresses of one family.
func endAddrs(vips, own []netip.Prefix) (out []ingress.EndAddr) {
	for _, v := range vips {
		for _, o := range own {
			if v.Addr().Is6() == o.Addr().Is6() {
				out = append(out, ingress.EndAddr{VIP: v.Addr(), Own: o.Addr()})
			}
		}
	}
	return out
}
