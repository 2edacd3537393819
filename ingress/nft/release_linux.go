package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// dumpTries bounds how often a dump that changes interrupted is begun anew.
const dumpTries = 4

// trackable is what tracked datagrams of published ports may lead to. A
// connection ends with its backend, a stream of datagrams does not: connection
// tracking would send it to where the backend was for as long as it flows.
type trackable struct {
	// leg and leg6 are the addresses that requests are sent on from.
	leg, leg6 netip.Addr
	// backends by address and port; those that drain are among them.
	backends map[netip.AddrPort]bool
	// open are the published ports that have a backend for new flows.
	open map[uint16]bool
}

func trackableOf(t ingress.Table) trackable {
	k := trackable{leg: t.Ingress.Addr.Addr(), leg6: t.Ingress.Addr6.Addr(), backends: map[netip.AddrPort]bool{}, open: map[uint16]bool{}}
	for _, p := range t.Published {
		if p.Protocol != weft.UDP {
			continue
		}
		for _, b := range p.Backends {
			k.backends[netip.AddrPortFrom(b.Addr, p.Target)] = true
			if b.Addr6.IsValid() {
				k.backends[netip.AddrPortFrom(b.Addr6, p.Target)] = true
			}
			if !b.Draining {
				k.open[p.Port] = true
			}
		}
	}
	return k
}

// follows reports whether every flow that was tracked rightly under was is so
// under k: then nobody need read the table of connections, which grows with
// traffic. A nil was is not known.
func (k trackable) follows(was *trackable) bool {
	if was == nil || k.leg != was.leg || k.leg6 != was.leg6 {
		return false
	}
	for b := range was.backends {
		if !k.backends[b] {
			return false
		}
	}
	for p := range k.open {
		if !was.open[p] {
			return false
		}
	}
	return true
}

// tracked is one flow of datagrams: whom the client asked, who answers, and to
// which address.
type tracked struct {
	asked, answers netip.AddrPort
	back           netip.Addr
}

// misled reports whether f goes where new flows of its kind would not: to a
// backend that is gone, or to the host itself (local) although the port has a
// backend by now. The latter is what remains of asking while there was none.
func (k trackable) misled(f tracked, local map[netip.Addr]bool) bool {
	if f.asked == f.answers {
		return local[f.asked.Addr()] && k.open[f.asked.Port()]
	}
	return f.back.IsValid() && (f.back == k.leg || f.back == k.leg6) && !k.backends[f.answers]
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
		if c.Forward.Protocol != unix.IPPROTO_UDP {
			return false
		}
		asked, _ := netip.AddrFromSlice(c.Forward.DstIP)
		answers, _ := netip.AddrFromSlice(c.Reverse.SrcIP)
		back, _ := netip.AddrFromSlice(c.Reverse.DstIP)
		return k.misled(tracked{
			asked:   netip.AddrPortFrom(asked.Unmap(), c.Forward.DstPort),
			answers: netip.AddrPortFrom(answers.Unmap(), c.Reverse.SrcPort),
			back:    back.Unmap(),
		}, local)
	})
	if err := forget(match, k.leg6.IsValid()); err != nil {
		return fmt.Errorf("forget datagrams tracked to backends that are gone: %w", err)
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
