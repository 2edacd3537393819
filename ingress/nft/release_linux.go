package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
)

// tcpAsking is TCP_CONNTRACK_SYN_SENT (nf_conntrack_tcp.h): that is all the host
// has seen of a flow that goes past it since (ingress/bpf). Its client's next
// connection from the same port would go where this one did.
const tcpAsking = 1

// dumpTries bounds how often a dump that changes interrupted is begun anew.
const dumpTries = 4

// trackable is what tracked flows of published ports may lead to. Connection
// tracking would send a stream of datagrams to where its backend was for as long
// as it flows, and a connection into silence.
type trackable struct {
	// ranges are the addresses that backends have.
	ranges []netip.Prefix
	// backends by address and ports; those that drain are among them. spans
	// are those with more than one port.
	backends map[end]bool
	spans    []end
	// open are the published ports that have a backend for new flows.
	open map[end]bool
	wide []end
	// draining are backends that get no new flows, as in backends.
	draining map[end]bool
	// about, when not nil, is what flows are looked at for: all others are right.
	about *trackable
}

// end is one end of flows: count ports from port on, at addr if it matters.
type end struct {
	proto byte
	addr  netip.Addr
	port  uint16
	count uint16
}

func (e end) covers(proto byte, at netip.AddrPort) bool {
	return e.proto == proto && e.addr == at.Addr() && at.Port() >= e.port && at.Port()-e.port < e.count
}

// withPorts is the table with other published ports.
func withPorts(t ingress.Table, ports []ingress.Published) ingress.Table {
	t.Published = ports
	return t
}

// trackableAbout is what matters of trackableOf to the flows of some ports, which
// have changed and stand there as they were and as they are.
func trackableAbout(t ingress.Table, ports []ingress.Published) trackable {
	about := trackableOf(withPorts(t, ports))
	var near []ingress.Published
	for i := range t.Published {
		p := &t.Published[i]
		proto := protocolNumber(p.Protocol)
		isNear := p.Count > 1 || slices.ContainsFunc(ports, func(o ingress.Published) bool { return o.Protocol == p.Protocol && o.Port == p.Port })
		for k := 0; k < len(p.Backends) && !isNear; k++ {
			b := &p.Backends[k]
			isNear = about.leads(proto, netip.AddrPortFrom(b.Addr, p.Target)) || about.leads(proto, netip.AddrPortFrom(b.Addr6, p.Target))
		}
		if isNear {
			near = append(near, *p)
		}
	}
	k := trackableOf(withPorts(t, near))
	k.about = &about
	return k
}

// concerns reports whether a flow is one of those that k may be wrong for.
func (k trackable) concerns(f tracked) bool {
	if f.asked == f.answers {
		return k.opens(f.proto, f.asked.Port())
	}
	return k.leads(f.proto, f.answers)
}

func trackableOf(t ingress.Table) trackable {
	k := trackable{backends: make(map[end]bool, len(t.Published)), open: make(map[end]bool, len(t.Published)), draining: map[end]bool{}}
	for _, p := range []netip.Prefix{t.Ingress.Addr, t.Ingress.Addr6, t.Gateway.Subnet, t.Gateway.Addr6} {
		if p.IsValid() {
			k.ranges = append(k.ranges, p.Masked())
		}
	}
	for _, p := range t.Published {
		proto, count := protocolNumber(p.Protocol), max(p.Count, 1)
		for _, b := range p.Backends {
			for _, a := range []netip.Addr{b.Addr, b.Addr6} {
				if !a.IsValid() {
					continue
				}
				e := end{proto, a, p.Target, count}
				if k.backends[e] = true; count > 1 {
					k.spans = append(k.spans, e)
				}
				if b.Draining {
					k.draining[e] = true
				}
			}
			if !b.Draining {
				e := end{proto: proto, port: p.Port, count: count}
				if k.open[e] = true; count > 1 {
					k.wide = append(k.wide, e)
				}
			}
		}
	}
	return k
}

// follows reports whether every flow that was tracked rightly under was is so
// under k: then nobody need read the table of connections, which grows with
// traffic. A nil was is not known.
func (k trackable) follows(was *trackable) bool {
	if was == nil || !slices.Equal(k.ranges, was.ranges) {
		return false
	}
	for b := range was.backends {
		if !k.backends[b] {
			return false
		}
	}
	for b := range k.draining {
		if !was.draining[b] {
			return false
		}
	}
	for p := range k.open {
		if p.proto == unix.IPPROTO_UDP && !was.open[p] { // of others nothing goes on that the host has refused
			return false
		}
	}
	return true
}

// leads reports whether a backend is at one of its ports there.
func (k trackable) leads(proto byte, to netip.AddrPort) bool {
	return k.backends[end{proto, to.Addr(), to.Port(), 1}] || slices.ContainsFunc(k.spans, func(e end) bool { return e.covers(proto, to) })
}

// opens reports whether a published port takes new flows.
func (k trackable) opens(proto byte, port uint16) bool {
	at := netip.AddrPortFrom(netip.Addr{}, port)
	return k.open[end{proto: proto, port: port, count: 1}] || slices.ContainsFunc(k.wide, func(e end) bool { return e.covers(proto, at) })
}

// drains reports whether the backend there gets no new flows, from any port.
func (k trackable) drains(proto byte, to netip.AddrPort) bool {
	for e := range k.draining {
		if e.covers(proto, to) {
			return true
		}
	}
	return false
}

// tracked is one flow: whom the client asked and who answers.
type tracked struct {
	proto          byte
	asked, answers netip.AddrPort
	isAsking       bool // a connection of which nothing but requests was seen
}

// misled reports whether f goes where new flows of its kind would not: to a
// backend that is gone, or that drains and has not been seen to answer, or, of
// datagrams, to the host itself (local) although the port has a backend by now. The
// last is what remains of asking while there was none. A connection whose backend has gone is reset with its next packet.
func (k trackable) misled(f tracked, local map[netip.Addr]bool) bool {
	if !local[f.asked.Addr()] || k.about != nil && !k.about.concerns(f) {
		return false
	}
	if f.asked == f.answers {
		return f.proto == unix.IPPROTO_UDP && k.opens(f.proto, f.asked.Port())
	}
	ours := slices.ContainsFunc(k.ranges, func(p netip.Prefix) bool { return p.Contains(f.answers.Addr()) })
	if !ours {
		return false
	}
	return !k.leads(f.proto, f.answers) || f.isAsking && k.drains(f.proto, f.answers)
}

// release forgets the misled flows of the calling namespace; their next
// datagram is balanced anew.
func (k trackable) release() error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	for i := 1; errors.Is(err, netlink.ErrDumpInterrupted) && i < dumpTries; i++ {
		addrs, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return fmt.Errorf("list the host's addresses: %w", err)
	}
	local := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			local[ip.Unmap()] = true
		}
	}
	match := matchFunc(func(c *netlink.ConntrackFlow) bool {
		asked, _ := netip.AddrFromSlice(c.Forward.DstIP)
		answers, _ := netip.AddrFromSlice(c.Reverse.SrcIP)
		tcp, _ := c.ProtoInfo.(*netlink.ProtoInfoTCP)
		return k.misled(tracked{
			proto:    c.Forward.Protocol,
			asked:    netip.AddrPortFrom(asked.Unmap(), c.Forward.DstPort),
			answers:  netip.AddrPortFrom(answers.Unmap(), c.Reverse.SrcPort),
			isAsking: tcp != nil && tcp.State == tcpAsking,
		}, local)
	})
	with6 := slices.ContainsFunc(k.ranges, func(p netip.Prefix) bool { return p.Addr().Is6() })
	if err := forget(match, with6); err != nil {
		return fmt.Errorf("forget flows tracked to backends that are gone: %w", err)
	}
	return nil
}

// forget deletes the tracked flows of the calling namespace that match, of IPv4
// and with6 of IPv6.
func forget(match netlink.CustomConntrackFilter, with6 bool) error {
	all := []netlink.InetFamily{unix.AF_INET}
	if with6 {
		all = append(all, unix.AF_INET6)
	}
	for _, f := range all {
		var err error
		for range dumpTries {
			_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, match)
			if !errors.Is(err, netlink.ErrDumpInterrupted) {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// matchFunc is netlink.CustomConntrackFilter as a function.
type matchFunc func(*netlink.ConntrackFlow) bool

func (f matchFunc) MatchConntrackFlow(c *netlink.ConntrackFlow) bool { return f(c) }
