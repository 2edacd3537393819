package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
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
// as it flows, and a connection into silence; and it would serve for ever who was once
// let in.
type trackable struct {
	// ranges are the addresses that backends have, own the host's own among them,
	// which hidden clients are seen by.
	ranges []netip.Prefix
	own    []netip.Addr
	// ports are the published ports; one finds those that are no range, by protocol and
	// port, wide are the others.
	ports map[offer]*ingress.Published
	one   map[ingress.PortKey][]*ingress.Published
	wide  []*ingress.Published
	// twice: a port stands twice in the table.
	twice bool
	// backends of ports that were asked for, by address: whether they get no new flows.
	backends map[*ingress.Published]map[netip.Addr]bool
	// about, when not nil, is what flows are looked at for: all others are right.
	about *trackable
}

// offer is all of a published port but its backends, to compare.
type offer struct {
	protocol            weft.Protocol
	port, target, count uint16
	ips, allow          string
	hides, isHost       bool
}

func offerOf(p *ingress.Published) offer {
	o := offer{protocol: p.Protocol, port: p.Port, target: p.Target, count: max(p.Count, 1), hides: p.HideClient, isHost: p.Host}
	for _, a := range p.IPs {
		o.ips += raw(a.Unmap()) + "/"
	}
	for _, n := range p.Allow {
		o.allow += n.String() + " "
	}
	return o
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
		if slices.ContainsFunc(ports, func(o ingress.Published) bool {
			return o.Protocol == p.Protocol && int(o.Port) < int(p.Port)+int(max(p.Count, 1)) && int(p.Port) < int(o.Port)+int(max(o.Count, 1))
		}) {
			near = append(near, *p)
		}
	}
	k := trackableOf(withPorts(t, near))
	k.about = &about
	return k
}

func trackableOf(t ingress.Table) trackable {
	k := trackable{ports: make(map[offer]*ingress.Published, len(t.Published)), one: map[ingress.PortKey][]*ingress.Published{}, backends: map[*ingress.Published]map[netip.Addr]bool{}}
	for _, p := range []netip.Prefix{t.Ingress.Addr, t.Ingress.Addr6, t.Gateway.Subnet, t.Gateway.Addr6} {
		if p.IsValid() {
			k.ranges = append(k.ranges, p.Masked())
		}
	}
	k.own = []netip.Addr{t.Ingress.Addr.Addr(), t.Ingress.Addr6.Addr()}
	for i := range t.Published {
		p := &t.Published[i]
		if o := offerOf(p); k.ports[o] == nil {
			k.ports[o] = p
		} else {
			k.twice = true
		}
		if p.Count > 1 {
			k.wide = append(k.wide, p)
		} else {
			at := ingress.PortKey{Protocol: p.Protocol, Port: p.Port}
			k.one[at] = append(k.one[at], p)
		}
	}
	return k
}

// follows reports whether every flow that was tracked rightly under was is so
// under k: then nobody need read the table of connections, which grows with
// traffic. A nil was is not known.
func (k trackable) follows(was *trackable) bool {
	if was == nil || k.twice || was.twice || !slices.Equal(k.ranges, was.ranges) || !slices.Equal(k.own, was.own) {
		return false
	}
	for o, p := range was.ports {
		if len(p.Backends) > 0 && !keepsFlows(p, k.ports[o]) {
			return false
		}
	}
	for o, p := range k.ports {
		if p.Protocol == weft.UDP && isOpen(p) && (was.ports[o] == nil || !isOpen(was.ports[o])) { // of others nothing goes on that the host has refused
			return false
		}
	}
	return true
}

// keepsFlows reports whether all backends of a port are there, and none begins to drain.
func keepsFlows(was, is *ingress.Published) bool {
	if is == nil || ingress.SameBackends(was.Backends, is.Backends) {
		return is != nil
	}
	now := drainingOf(is)
	for a, drained := range drainingOf(was) {
		if drains, ok := now[a]; !ok || drains && !drained {
			return false
		}
	}
	return true
}

// drainingOf are the backends of a port by address, and whether they get no new flows.
func drainingOf(p *ingress.Published) map[netip.Addr]bool {
	out := make(map[netip.Addr]bool, 2*len(p.Backends))
	for _, b := range p.Backends {
		for _, a := range []netip.Addr{b.Addr, b.Addr6} {
			if a.IsValid() {
				out[a] = b.Draining
			}
		}
	}
	return out
}

// isOpen reports whether a port takes new flows.
func isOpen(p *ingress.Published) bool {
	return slices.ContainsFunc(p.Backends, func(b ingress.Backend) bool { return !b.Draining })
}

// tracked is one flow: who has asked whom, who answers, and as whom it sees the client.
type tracked struct {
	proto          byte
	client, seen   netip.Addr
	asked, answers netip.AddrPort
	isAsking       bool // a connection of which nothing but requests was seen
}

// port is the published port that a flow has asked; nil = none.
func (k trackable) port(f tracked) *ingress.Published {
	name := protocolOf(f.proto)
	is := func(p *ingress.Published) bool { return p.IsAt(name, f.asked) }
	for _, of := range [][]*ingress.Published{k.one[ingress.PortKey{Protocol: name, Port: f.asked.Port()}], k.wide} {
		if i := slices.IndexFunc(of, is); i >= 0 {
			return of[i]
		}
	}
	return nil
}

// leads reports whether a port leads a flow to where it goes, and whether the backend there
// drains.
func (k trackable) leads(p *ingress.Published, f tracked) (drains, ok bool) {
	if !p.Admits(f.client) || p.Target+f.asked.Port()-p.Port != f.answers.Port() {
		return false, false
	}
	all, known := k.backends[p]
	if !known {
		all = drainingOf(p)
		k.backends[p] = all
	}
	drains, ok = all[f.answers.Addr()]
	return drains, ok
}

// misled reports whether f goes where its client could not begin it any more: to a
// backend that is none of the port's at that address, or that drains and has not been
// seen to answer, or to any although the client is not allowed. Datagrams are misled,
// too, that show a client who is to be hidden, and those to the host itself (local) although the port has a backend by now, which is what
// remains of asking while there was none. A connection is reset with its next packet; one that
// shows or hides its client otherwise goes on as it is.
func (k trackable) misled(f tracked, local map[netip.Addr]bool) bool {
	if !local[f.asked.Addr()] || k.about != nil && k.about.port(f) == nil {
		return false
	}
	p := k.port(f)
	if f.asked == f.answers {
		return f.proto == unix.IPPROTO_UDP && p != nil && p.Admits(f.client) && isOpen(p)
	}
	if !slices.ContainsFunc(k.ranges, func(n netip.Prefix) bool { return n.Contains(f.answers.Addr()) }) {
		return false // not ours
	}
	if p == nil {
		return true
	}
	drains, ok := k.leads(p, f)
	return !ok || f.isAsking && drains || f.proto == unix.IPPROTO_UDP && !p.Host && k.shows(p, f)
}

// shows reports whether the backend sees the client where it is to see the host's own
// address.
func (k trackable) shows(p *ingress.Published, f tracked) bool {
	return p.HideClient && !slices.Contains(k.own, f.seen) &&
		slices.ContainsFunc(k.own, func(a netip.Addr) bool { return a.IsValid() && a.Is6() == f.seen.Is6() })
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
		client, _ := netip.AddrFromSlice(c.Forward.SrcIP)
		seen, _ := netip.AddrFromSlice(c.Reverse.DstIP)
		tcp, _ := c.ProtoInfo.(*netlink.ProtoInfoTCP)
		return k.misled(tracked{
			proto:    c.Forward.Protocol,
			client:   client.Unmap(),
			seen:     seen.Unmap(),
			asked:    netip.AddrPortFrom(asked.Unmap(), c.Forward.DstPort),
			answers:  netip.AddrPortFrom(answers.Unmap(), c.Reverse.SrcPort),
			isAsking: tcp != nil && tcp.State == tcpAsking,
		}, local)
	})
	with6 := slices.ContainsFunc(k.ranges, func(p netip.Prefix) bool { return p.Addr().Is6() })
	if err := forget(match, with6); err != nil {
		return fmt.Errorf("forget flows of published ports that lead where none may begin: %w", err)
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
