package nft

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// applyRouter makes the tables of the encrypted networks' way out. It is right
// before the balancer chooses by it.
func (e *Engine) applyRouter(r ingress.Router, places map[string]*place) error {
	if r.NetNS == "" {
		e.routed = nil
		return nil // the tables went with their namespace
	}
	p, err := e.placeAt(r.NetNS, "the router of encrypted networks")
	if err != nil {
		return err
	}
	places[r.NetNS] = p
	err = withConn(r.NetNS, func(conn *nftables.Conn) error {
		for _, f := range families(e.ip6) {
			if err := e.converge(p, conn, f.routerRules(r)); err != nil {
				return err
			}
		}
		return e.converge(p, conn, acceptRules(r))
	})
	if err != nil {
		return err
	}
	now := map[netip.Addr]bool{}
	for _, b := range r.Backends {
		now[b.Addr] = true
		if b.Addr6.IsValid() {
			now[b.Addr6] = true
		}
	}
	if e.routed == nil || lacks(now, e.routed) {
		if err := netns.Do(r.NetNS, func() error { return forgetTranslated(now, e.ip6) }); err != nil {
			return err
		}
	}
	e.routed = now
	return nil
}

// lacks reports whether now misses one of earlier.
func lacks(now, earlier map[netip.Addr]bool) bool {
	for a := range earlier {
		if !now[a] {
			return true
		}
	}
	return false
}

// forgetTranslated drops the calling namespace's tracked flows that lead a
// service address to a backend that is not there any more: the balancer has
// chosen another by now.
func forgetTranslated(backends map[netip.Addr]bool, with6 bool) error {
	match := matchFunc(func(c *netlink.ConntrackFlow) bool {
		asked, _ := netip.AddrFromSlice(c.Forward.DstIP)
		answers, _ := netip.AddrFromSlice(c.Reverse.SrcIP)
		return asked.Unmap() != answers.Unmap() && !backends[answers.Unmap()]
	})
	if err := forget(match, with6); err != nil {
		return fmt.Errorf("forget flows to backends that are gone: %w", err)
	}
	return nil
}
