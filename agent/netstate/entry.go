package netstate

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// entry is how requests enter the ingress network: by this node's leg, to its own
// tasks from all nodes' legs. The node's own leg is one of them; a member at our
// address that is gone is none.
func (d *deriver) entry(n weft.Network) ingress.Entry {
	self := d.in.Self
	if !self.IngressAddr.IsValid() {
		return ingress.Entry{}
	}
	out := ingress.Entry{Link: weft.IngressLeg, Addr: self.IngressAddr, Addr6: self.IngressAddr6}
	port := d.mtu(n)
	for _, o := range d.in.Nodes {
		if a := o.IngressAddr.Addr(); a.IsValid() && (o.ID == self.ID || isElsewhere(o.VTEP, self.VTEP)) {
			out.Nodes = append(out.Nodes, ingress.EntryNode{MAC: weft.NodeMAC(o.ID, a), Addr: a})
			if way := d.way(n, o.VTEP, port); way != 0 && (out.MTU == 0 || way < out.MTU) {
				out.MTU = way
			}
		}
	}
	slices.SortFunc(out.Nodes, func(a, b ingress.EntryNode) int { return a.Addr.Compare(b.Addr) })
	out.Tasks = d.entryTasks(n)
	return out
}

func (d *deriver) entryTasks(n weft.Network) (out []ingress.EntryTask) {
	for _, t := range d.local[n.ID] {
		for i, a := range t.Task.Attachments {
			if a.Network == n.ID {
				out = append(out, ingress.EntryTask{Task: t.Task.ID, NetNS: t.NetNS, Link: fmt.Sprintf("eth%d", i), Addr: a.Addr, Addr6: a.Addr6})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b ingress.EntryTask) int { return cmp.Compare(a.Task, b.Task) })
	return out
}
