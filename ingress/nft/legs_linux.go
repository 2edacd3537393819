package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Ports in mode host are asked over IPv6 at a task's gateway leg, which the sandbox
// gives an IPv4 address and the way out. Over IPv6 a task has no way out: what stands
// here lets it answer from its ports, and nothing else.
//
//	host    the bridge has an address, the legs' router
//	task    the leg has its own; by rule, behind the main table, what comes from
//	        there and one of the ports goes back by it, and so does a datagram
//	        from such a port of a socket that has not said from which address
//
// A rule of the address alone would open a way: the kernel looks for a route from each
// address that a task has before it says that there is none. It is there only for tasks
// that are on the ingress network, too, and may have to change their answer's address
// (askedRules), for which the kernel looks without ports.
const ruleLeg = 32900

// legPorts are the ports of each leg, by its address.
func legPorts(published []ingress.Published) map[netip.Addr][]end {
	out := map[netip.Addr][]end{}
	for i := range published {
		p := &published[i]
		for _, b := range p.Backends {
			if p.Host && b.Addr6.IsValid() {
				out[b.Addr6] = append(out[b.Addr6], end{proto: protocolNumber(p.Protocol), port: p.Target, count: max(p.Count, 1)})
			}
		}
	}
	return out
}

// legRules are the routing rules of the way by a task's gateway leg.
func (w way) legRules(t wish) []netlink.Rule {
	f := &ipv6
	wrong := w.fromOwn(f, ruleLeg) // what the task says of packets to it
	wrong.IPProto = unix.IPPROTO_ICMPV6
	out := []netlink.Rule{wrong}
	for _, p := range t.ports {
		r := w.fromOwn(f, ruleLeg)
		if p.proto == unix.IPPROTO_UDP {
			r = w.rule(f, ruleLeg)
		}
		r.IPProto, r.Sport = int(p.proto), netlink.NewRulePortRange(p.port, p.port+p.count-1)
		if !slices.ContainsFunc(out, func(o netlink.Rule) bool { return sameRule(o, r) }) { // two ports of the host may lead to one
			out = append(out, r)
		}
	}
	if t.Link != "" {
		out = append(out, w.fromOwn(f, ruleLeg))
	}
	return out
}

// prepareGateway6 gives the gateway bridge its IPv6 address, from which the host
// reaches the legs, if ports in mode host are to be asked over IPv6. A host on which
// IPv6 is switched off for new links has no such clients.
func (e *Engine) prepareGateway6(g ingress.Gateway) error {
	if !g.Addr6.IsValid() || !e.ip6 {
		e.gateway6 = 0
		return nil
	}
	off, err := readSysctl("net/ipv6/conf/" + g.Bridge + "/disable_ipv6")
	if errors.Is(err, fs.ErrNotExist) || off == "1" {
		e.gateway6 = 0
		return nil
	}
	if err != nil {
		return err
	}
	l, err := netlink.LinkByName(g.Bridge)
	if err != nil {
		return fmt.Errorf("look up link %s: %w", g.Bridge, err)
	}
	audit := e.gateway6 == l.Attrs().Index
	for _, p := range []netip.Prefix{g.Addr6, netip.PrefixFrom(linkLocal(g.Addr6.Addr()), 64)} {
		added, err := setAddr6(l, p)
		if err != nil {
			return err
		}
		if added && audit {
			e.report(weft.Repair{Kind: kindAddress, Object: fmt.Sprintf("address %s of %s", p.Addr(), g.Bridge), Reason: "it was gone"})
		}
	}
	e.gateway6 = l.Attrs().Index
	return forward6()
}

// applyLeg makes the way back by a task's gateway leg, in the task's namespace. A leg
// that is not there is the sandbox's to mend; it is looked for again with each pass.
func (e *Engine) applyLeg(now *insideTask, audit bool) error {
	leg := now.want.gateway
	l, err := netlink.LinkByName(leg.Link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		now.gateway, now.seen = 0, now.seen.Add(-insideMaxGap)
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", leg.Link, err)
	}
	audit = audit && now.gateway == l.Attrs().Index
	now.gateway = l.Attrs().Index
	added, err := setAddr6(l, leg.Addr6)
	if err != nil {
		return err
	}
	if added && audit {
		e.report(weft.Repair{Kind: kindAddress, Object: fmt.Sprintf("address of %s of %s", leg.Link, now.place.name), Reason: "it was gone"})
	}
	w := way{table: legTable, link: now.gateway, own: leg.Addr6, via: weft.GatewayAddr6()}
	return e.setWay(&ipv6, now.place.name, w, w.legRules(now.want), audit)
}

// removeAddr6 takes an address from a link; without either there is nothing to do.
func removeAddr6(link string, p netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", link, err)
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 128)}}
	if err := netlink.AddrDel(l, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove address %s from %s: %w", p, link, err)
	}
	return nil
}
