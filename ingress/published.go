package ingress

import (
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// IsAt reports whether the port, or one of the range, is the one of an address.
func (p *Published) IsAt(protocol weft.Protocol, asked netip.AddrPort) bool {
	if p.Protocol != protocol || asked.Port() < p.Port || asked.Port()-p.Port >= max(p.Count, 1) {
		return false
	}
	return len(p.IPs) == 0 || slices.ContainsFunc(p.IPs, func(a netip.Addr) bool { return a.Unmap() == asked.Addr().Unmap() })
}

// Admits reports whether a client may connect, by its address.
func (p *Published) Admits(client netip.Addr) bool {
	return len(p.Allow) == 0 || slices.ContainsFunc(p.Allow, func(n netip.Prefix) bool { return n.Contains(client.Unmap()) })
}

// Unanswered is a published port that an engine does not answer on this host.
type Unanswered struct {
	Published
	// Addrs are those of its addresses at which it is not answered; none = all that it
	// would be answered at.
	Addrs  []netip.Addr
	Reason string
}

// UnansweredBy are the ports of a table that an engine leaves out, because the host or
// the network lacks what they need. Engines that leave out any have the method.
func UnansweredBy(e Engine, t Table) []Unanswered {
	if a, ok := e.(interface{ Unanswered(Table) []Unanswered }); ok {
		return a.Unanswered(t)
	}
	return nil
}
