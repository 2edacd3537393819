package netstate

import (
	"cmp"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// underlay are all members, those that are down, too: they may have come back.
// Before any is known nobody is kept out.
func (d *deriver) underlay() ingress.Underlay {
	if len(d.in.Nodes) == 0 {
		return ingress.Underlay{}
	}
	u := ingress.Underlay{Port: d.in.DataPathPort, Self: d.in.Self.VTEP}
	for _, n := range append(slices.Clone(d.in.Nodes), d.in.Self) {
		if n.VTEP.IsValid() {
			u.Members = append(u.Members, n.VTEP.Unmap())
		}
	}
	slices.SortFunc(u.Members, netip.Addr.Compare)
	u.Members = slices.Compact(u.Members)
	return u
}

// encrypt adds what the node's encrypted networks share: the other nodes' keys,
// and how a balancer reaches tasks there.
func (d *deriver) encrypt(out *Output) {
	for _, n := range d.in.Networks {
		if !out.Overlay.Networks[n.VNI].Encrypted || out.Overlay.Networks[n.VNI].ID != n.ID {
			continue
		}
		r := &out.Ingress.Router
		r.NetNS = filepath.Join(d.in.NetNSDir, weft.CryptNetNS(d.in.Self.ID))
		r.VNIs = append(r.VNIs, n.VNI)
		for _, e := range d.endpoints[n.ID] {
			if !e.local && e.Service != "" {
				r.Backends = append(r.Backends, ingress.Backend{
					Task: e.Task, Addr: e.Addr, Addr6: e.Addr6, MAC: weft.EndpointMAC(e.Task, e.Addr),
					Draining: e.State == weft.EndpointDraining,
				})
			}
		}
	}
	if out.Ingress.Router.NetNS == "" {
		return
	}
	slices.SortFunc(out.Ingress.Router.Backends, func(a, b ingress.Backend) int {
		return cmp.Or(cmp.Compare(a.Task, b.Task), a.Addr.Compare(b.Addr))
	})
	out.Overlay.Encryption.Epoch = d.in.KeyEpoch
	for _, n := range d.in.Nodes {
		if n.ID != d.in.Self.ID && isElsewhere(n.VTEP, d.in.Self.VTEP) {
			out.Overlay.Encryption.Peers = append(out.Overlay.Encryption.Peers, vxlan.EncryptionPeer{Node: n.ID, VTEP: n.VTEP, Keys: n.Keys})
		}
	}
}
