package netstate

import (
	"net/netip"

	"github.com/weftnet/weft/ingress"
)

// ends are this node's tasks that stand for their services' addresses, whatever
// their state: one that drains still answers.
func (d *deriver) ends() []ingress.End {
	var out []ingress.End
	for i := range d.in.Local {
		t := &d.in.Local[i]
		s := d.service(t.Task.Service)
		if s == nil {
			continue
		}
		e := ingress.End{Task: t.Task.ID, NetNS: t.NetNS}
		for _, v := range s.VIPs {
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
